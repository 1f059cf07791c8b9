"""`smolpost.train` under FSDP2 on CPU ranks: accelerate knows FSDP on accelerators alone, so it is told gloo is one."""

import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import DistributedType

from smolpost.train import main


def gloo_as_an_accelerator(*args, **kwargs):
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    return "gloo", DistributedType.MULTI_GPU


PartialState._prepare_backend = gloo_as_an_accelerator

if __name__ == "__main__":
    main()

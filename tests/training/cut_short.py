"""`smolpost.train` that is killed, all ranks at once, when the checkpoint of step CUT_AFTER is whole."""

import os
import signal

import torch
import torch.distributed as dist

from smolpost.training.checkpoint_writer import Writer

if os.environ.get("ACCELERATE_USE_FSDP") == "true" and not torch.accelerator.is_available():
    import fsdp_on_cpu  # noqa: F401, makes accelerate run FSDP on a CPU

save = Writer.save


def save_and_die(writer, stage_trainer, backend):
    save(writer, stage_trainer, backend)
    if stage_trainer.state.global_step == int(os.environ["CUT_AFTER"]):
        writer.wait()
        if dist.is_initialized():
            dist.barrier()
        os.kill(os.getpid(), signal.SIGKILL)


Writer.save = save_and_die

if __name__ == "__main__":
    from smolpost.train import main

    main()

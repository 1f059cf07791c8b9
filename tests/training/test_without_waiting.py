"""An optimizer step asks a GPU for nothing: on the CPU, by following which tensors a GPU would hold."""

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from smolpost.objectives import tiling
from smolpost.training import sft, trainer
from tests.training.tiny_trainers import build, char_tokenizer, pair_trainer, sft_trainer

aten = torch.ops.aten
ASKING = {  # operations whose result, or its shape, Python gets to see
    aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten._unique, aten._unique2, aten.unique_dim,
    aten.unique_consecutive, aten.equal, aten.bincount, aten.repeat_interleave,
}  # fmt: skip


class Device(TorchDispatchMode):
    """Refuses what would wait for a GPU, of given tensors and of all that is made from them."""

    def __init__(self):
        super().__init__()
        self.held: dict[int, StorageWeakRef] = {}  # by address, which the reference keeps from being used again
        self.seen = 0

    def hold(self, *tensors: torch.Tensor) -> None:
        for tensor in tensors:
            found = StorageWeakRef(tensor.untyped_storage())
            self.held[found.cdata] = found

    def holds(self, tensor: object) -> bool:
        return isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata in self.held

    def __torch_dispatch__(self, func, kinds, args=(), kwargs=None):
        asked = any(map(self.holds, tree_leaves((args, kwargs))))
        if asked:
            self.seen += 1
            assert func.overloadpacket not in ASKING, f"{func} of a tensor on the device"
            if func.overloadpacket in (aten.index, aten.index_put, aten.index_put_):
                assert all(index is None or index.dtype != torch.bool for index in args[1]), f"{func} by a mask"
        result = func(*args, **(kwargs or {}))
        if asked:
            self.hold(*(x for x in tree_leaves(result) if isinstance(x, torch.Tensor)))
        return result


@pytest.fixture
def device(monkeypatch):
    """Stands for a GPU; what `to_device` gives is there."""
    device = Device()

    def to_device(x, _):
        x = x.clone()
        device.hold(x)
        return x

    for module in (tiling, sft, trainer):
        monkeypatch.setattr(module, "to_device", to_device)
    monkeypatch.setattr(tiling, "READ_WITHOUT_WAITING", ())
    for name in ("tolist", "numpy"):  # these read memory without an operation
        real = getattr(torch.Tensor, name)

        def read(x, *args, real=real, name=name, **kwargs):
            assert not device.holds(x), f"{name}() of a tensor on the device"
            return real(x, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, read)
    return device


def small_run(name, folder):
    tokenizer, few = char_tokenizer(), {"max_steps": 3, "logging_steps": 100}
    if name == "sft":
        return sft_trainer(tokenizer, folder, build(tokenizer), **few)[0]
    few |= {"pack_tokens": 150, "sft_weight": 0.5, "ld_alpha": 0.5}
    return pair_trainer(tokenizer, folder, build(tokenizer), build(tokenizer), **few)[0]


@pytest.mark.parametrize("name", ["sft", "apo"])
def test_a_step_asks_the_device_for_nothing(name, device, tmp_path):
    run = small_run(name, tmp_path)
    model, passes = run.model, next(iter(run.get_train_dataloader()))
    optimizer = run.create_optimizer()
    device.hold(*model.parameters(), *model.buffers())
    with device:
        loss = run.training_step(model, passes)
        run.accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    assert device.holds(loss) and device.seen > 500
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    with pytest.raises(AssertionError, match="_local_scalar_dense"), device:
        loss.item()


@pytest.mark.parametrize("name", ["sft", "apo"])
def test_the_gpus_way_trains_the_same_model(name, monkeypatch, tmp_path):
    runs = []
    for folder in ("read", "unread"):
        runs.append(small_run(name, tmp_path / folder))
        runs[-1].train()
        monkeypatch.setattr(tiling, "READ_WITHOUT_WAITING", ())
    for found, expected in zip(*(run.model.parameters() for run in runs), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)

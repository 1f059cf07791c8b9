"""The optimizer's fused kernel, and what training keeps on the disk while it runs."""

import copy
import errno
import json
import os
import signal
import threading
import time

import pytest
import torch
import transformers

from smolpost import signals
from smolpost.errors import UserError
from smolpost.training import checkpoint_writer, host_memory
from smolpost.training.checkpoints import WHOLE, last_whole
from smolpost.training.host_memory import HostCopies, free_memory
from tests.training.tiny_trainers import build, char_tokenizer, logged, sft_trainer


@pytest.fixture(scope="module")
def tokenizer():
    return char_tokenizer()


# ---------------------------------------------------------------- AdamW


def test_fused_adamw_equals_the_loop(tokenizer, tmp_path):
    model = build(tokenizer)
    words = {"max_steps": 8, "global_batch_size": 2, "weight_decay": 0.1, "warmup_ratio": 0.0}
    weights = {}
    for optim in ("adamw_torch_fused", "adamw_torch"):
        trainer, _, _ = sft_trainer(tokenizer, tmp_path / optim, copy.deepcopy(model), **words)
        assert trainer.args.optim == "adamw_torch_fused"
        trainer.args.optim = optim
        trainer.train()
        assert trainer.optimizer.optimizer.defaults["fused"] is (True if optim == "adamw_torch_fused" else None)
        weights[optim] = trainer.model.state_dict()
    for name, start in model.state_dict().items():
        fused, loop = (weights[optim][name] for optim in weights)
        torch.testing.assert_close(fused, loop, atol=1e-6, rtol=0)
        assert (fused - start).abs().max() > 1e-4


def test_a_loss_that_is_not_a_number_is_in_the_log(tokenizer, tmp_path, monkeypatch, capsys):
    trainer, _, _ = sft_trainer(tokenizer, tmp_path, build(tokenizer), max_steps=4, global_batch_size=2)
    plain = trainer.pass_loss

    def diverging(*args):
        return plain(*args) * (float("nan") if trainer.state.global_step == 2 else 1)

    monkeypatch.setattr(trainer, "pass_loss", diverging)
    trainer.train()
    assert [entry["loss"] == entry["loss"] for entry in logged(trainer, ["loss"])] == [True, True, False, False]
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()[2:]].count("nan") == 2


# ---------------------------------------------------------------- checkpoints beside the training


class At(transformers.TrainerCallback):
    """Does something at the end of a step, or of the training."""

    def __init__(self, step, what):
        self.step, self.what = step, what

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.what()

    def on_train_end(self, args, state, control, **kwargs):
        if self.step == "end":
            self.what()


def saving(tokenizer, folder, **changes):
    words = {"max_steps": 10, "save_steps": 4, "global_batch_size": 2, "save_total_limit": 9} | changes
    return sft_trainer(tokenizer, folder, build(tokenizer), **words)[0]


def saved(folder):
    return sorted(place.name for place in (folder / "out").glob("checkpoint-*") if (place / WHOLE).exists())


def test_what_is_written_beside_later_steps_is_of_the_step_of_the_save(tokenizer, tmp_path, monkeypatch):
    waited = saving(tokenizer, tmp_path / "waited")
    waited.writer.copies = False
    waited.train()
    beside, gate, at_work = saving(tokenizer, tmp_path / "beside"), threading.Event(), []
    write = checkpoint_writer._write_tensors

    def held(*args):
        at_work.append(beside.state.global_step)
        assert gate.wait(30)
        return write(*args)

    monkeypatch.setattr(checkpoint_writer, "_write_tensors", held)
    beside.add_callback(At(7, gate.set))
    beside.train()
    assert beside.writer.copies is True and at_work[0] < 7
    assert saved(tmp_path / "beside") == saved(tmp_path / "waited") == ["checkpoint-4", "checkpoint-8"]
    for name in saved(tmp_path / "beside"):
        found, expected = (
            json.loads((tmp_path / way / "out" / name / WHOLE).read_text())["files"] for way in ("beside", "waited")
        )
        del found["trainer_state.json"], expected["trainer_state.json"]  # it has seconds in it
        assert found == expected and len(found) == 2
        assert {file.name for file in (tmp_path / "beside" / "out" / name).iterdir()} == {
            *found, "trainer_state.json", WHOLE
        }  # fmt: skip


def test_the_last_step_leaves_no_checkpoint(tokenizer, tmp_path):
    saving(tokenizer, tmp_path, max_steps=8).train()
    assert saved(tmp_path) == ["checkpoint-4"]


def test_a_signal_after_the_last_step_leaves_its_checkpoint(tokenizer, tmp_path):
    trainer = saving(tokenizer, tmp_path, max_steps=8)
    trainer.add_callback(At("end", lambda: os.kill(os.getpid(), signal.SIGTERM)))
    with signals.handled_by(signals.stop), pytest.raises(signals.Stopped) as stop:
        trainer.train()
    assert stop.value.where == " at step 8" and saved(tmp_path) == ["checkpoint-4", "checkpoint-8"]


@pytest.mark.parametrize(("step", "raised_at"), [(4, 5), (9, 10)])
def test_a_full_disk_ends_the_training(tokenizer, tmp_path, monkeypatch, step, raised_at):
    """At the end of the next step, or at the end of training."""
    trainer = saving(tokenizer, tmp_path, save_steps=step)

    def full(file, tensors):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))

    monkeypatch.setattr(checkpoint_writer, "_write_tensors", full)
    on_save = transformers.TrainerCallback()
    on_save.on_save = lambda *args, **kwargs: trainer.writer._thread.join()
    trainer.add_callback(on_save)
    with pytest.raises(OSError, match=r"No space left on device: .*state-00000-00000.safetensors"):
        trainer.train()
    assert trainer.state.global_step == raised_at and not saved(tmp_path)
    assert last_whole(tmp_path / "out") is None and not list(tmp_path.glob("out/checkpoint-*"))


def test_an_error_in_training_waits_for_the_checkpoint(tokenizer, tmp_path, monkeypatch, capsys):
    trainer, write = saving(tokenizer, tmp_path), checkpoint_writer._write_tensors

    def broken():
        raise ValueError("broken")

    monkeypatch.setattr(checkpoint_writer, "_write_tensors", lambda *args: time.sleep(1.5) or write(*args))
    trainer.add_callback(At(5, broken))
    with pytest.raises(ValueError, match="broken"):
        trainer.train()
    assert saved(tmp_path) == ["checkpoint-4"]
    assert f"waiting until {tmp_path}/out/checkpoint-4 is written\n" in capsys.readouterr().out


def test_without_memory_for_a_copy_training_waits_and_says_so_once(tokenizer, tmp_path, monkeypatch, capsys):
    trainer, threads = saving(tokenizer, tmp_path), []
    needed = 12 * sum(parameter.numel() for parameter in trainer.model.parameters())
    monkeypatch.setattr(checkpoint_writer, "free_memory", lambda: int(needed * checkpoint_writer.SPARE) - 1)
    write = checkpoint_writer._write
    monkeypatch.setattr(
        checkpoint_writer, "_write", lambda *a, **k: threads.append(threading.current_thread()) or write(*a, **k)
    )
    trainer.train()
    assert saved(tmp_path) == ["checkpoint-4", "checkpoint-8"] and threads == [threading.main_thread()] * 2
    line = f"training waits for each checkpoint: writing beside it takes a copy of {needed / 1e9:.3g} GB, and "
    assert capsys.readouterr().out.count(line) == 1


def test_rank_0_does_not_wait_forever_for_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_writer, "PATIENCE", 0)
    (tmp_path / "share-00000.json").write_text("{}")
    with pytest.raises(UserError, match=r"share-00001.json is not there after 0 s: .* share$"):
        checkpoint_writer._all_lists(tmp_path, 2)
    (tmp_path / "share-00001.json").write_text('{"state": [1, "ab"]}')
    assert checkpoint_writer._all_lists(tmp_path, 2) == {"state": [1, "ab"]} and not list(tmp_path.iterdir())


# ---------------------------------------------------------------- memory


def test_copies_are_in_few_blocks(monkeypatch):
    monkeypatch.setattr(host_memory, "BLOCK", 10)
    tensors = [torch.randn(2, 3), torch.randn(4), torch.randn(7).double(), torch.randn(5, 5).T, torch.randn(3)]
    copied = HostCopies(1000)
    copies = [copied(tensor) for tensor in tensors]
    for tensor, copy_ in zip(tensors, copies, strict=True):
        assert torch.equal(copy_, tensor.float()) and copy_.dtype == torch.float32 and copy_.is_contiguous()
    assert len({copy_.untyped_storage().data_ptr() for copy_ in copies}) == 4  # 6 + 4 | 7 | 25 | 3
    tensors[0].zero_()
    assert copies[0].any()
    assert HostCopies(3)(tensors[4]).untyped_storage().nbytes() == 12


def test_a_containers_limit_bounds_the_free_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(host_memory, "CGROUPS", tmp_path)
    assert free_memory() > 10**8
    for place, limits in (("job/step", "max"), ("job", "9000"), ("memory/old", "8000"), ("memory", "7000")):
        (folder := tmp_path / place).mkdir(parents=True, exist_ok=True)
        files = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        limit, used, cache = files if "memory" in place else ("memory.max", "memory.current", "inactive_file")
        (folder / limit).write_text(f"{limits}\n")
        (folder / used).write_text("5000\n")
        (folder / "memory.stat").write_text(f"anon 1\n{cache} 700\n")
    (tmp_path / "own").write_text("5:cpuset:/a\n4:memory,cpu:/old/unseen\n0::/job/step\n")
    assert list(host_memory._left_in_groups(tmp_path / "own")) == [4700, 3700, 2700]
    assert not list(host_memory._left_in_groups(tmp_path / "absent"))

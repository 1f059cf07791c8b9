"""Distillation on two ranks, launched as users launch it."""

import json

import pytest
import torch

WORDS = [
    "+stage@stages.distill=distill", "stages.distill.init_from=init", "stages.distill.teacher=sft",
    "stages.distill.max_seq_len=256", "stages.distill.max_new_tokens=12", "stages.distill.max_steps=4",
    "stages.distill.global_batch_size=8", "stages.distill.micro_batch_size=2", "stages.distill.logging_steps=1",
    "stages.distill.learning_rate=1e-2", "stages.distill.max_grad_norm=1.0",
]  # fmt: skip


def sampled_rows(folder) -> list[set[int]]:
    files = sorted((folder / "samples").iterdir())
    return [{json.loads(line)["row"] for line in file.read_text().splitlines()} for file in files]


@pytest.mark.slow
def test_two_ranks_train_as_one(started, single, tmp_path):
    """Given replies: losses and weights. Sampled ones are drawn by each rank, in reply to the same rows."""
    for share, same in (("0.0", True), ("0.5", False)):
        words = [*WORDS, f"stages.distill.on_policy={share}", f"data_root={started.folder / 'data'}"]
        found = []
        for config, processes in (("single", 1), ("ddp", 2)):
            small = single.copy(tmp_path / f"{config}-{share}")
            done = small.launch("distill", config, processes, *words)
            assert done.returncode == 0, done.stderr
            found.append(
                (small.log("distill", *words), small.weights("distill", *words), small.folder_of("distill", *words))
            )
        (one, weights, folder), (two, others, other_folder) = found
        for a, b in zip(one, two, strict=True):
            assert a["on_policy"] == b["on_policy"]
            if same:
                for key in ("loss", "grad_norm", "entropy", "num_tokens"):
                    assert b[key] == pytest.approx(a[key], rel=1e-4), key
        if same:
            for name, tensor in weights.items():
                torch.testing.assert_close(others[name], tensor, atol=1e-5, rtol=1e-4)
        else:
            assert sampled_rows(folder) == sampled_rows(other_folder)

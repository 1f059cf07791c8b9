"""The warmup in steps or as a share, and what it means for keys."""

import pytest

from smolpost.stages.sft import SFTStage
from smolpost.training.arguments import training_arguments
from smolpost.training.environment import Environment

CPU = Environment(rank=0, world_size=1, local_world_size=1, use_cpu=True, bf16=False)


def stage(**settings) -> SFTStage:
    return SFTStage(
        init_from="checkpoint", data="sft", max_seq_len=64, learning_rate=1e-3, global_batch_size=4, **settings
    )


@pytest.mark.parametrize(
    ("settings", "steps"),
    [({}, 9), ({"warmup_ratio": 0.1}, 30), ({"warmup_steps": 7}, 7), ({"warmup_steps": 1, "warmup_ratio": 0.1}, 1)],
)
def test_steps_count_before_the_share(tmp_path, settings, steps):
    arguments = training_arguments(stage(**settings), 0, 1200, tmp_path, CPU)
    assert arguments.get_warmup_steps(300) == steps


def test_stages_without_it_keep_their_key():
    assert "warmup_steps" not in stage().keyed_fields()
    assert stage(warmup_steps=7).keyed_fields()["warmup_steps"] == 7

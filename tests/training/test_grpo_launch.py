"""GRPO launched as users launch it: on two ranks, and killed."""

import json

import pytest

WORDS = [
    "+stage@stages.grpo=grpo", "stages.grpo.init_from=init", "stages.grpo.max_seq_len=256", "stages.grpo.max_steps=4",
    "stages.grpo.max_new_tokens=12", "stages.grpo.global_batch_size=2", "stages.grpo.num_generations=4",
    "stages.grpo.micro_batch_size=2", "stages.grpo.logging_steps=1", "stages.grpo.learning_rate=1e-2",
    "+stages.grpo.rewards={soft_overlong: 1.0}", "+stages.grpo.reward_settings={soft_overlong: {buffer: 12}}",
    "stages.grpo.kept_samples=100",
]  # fmt: skip


@pytest.mark.slow
def test_two_ranks_ask_the_same_prompts_as_one(started, single, tmp_path):
    """Each rank draws its own replies, so they differ; prompts, their order and the replies to each do not."""
    words = [*WORDS, f"data_root={started.folder / 'data'}"]
    asked = []
    for config, processes in (("single", 1), ("ddp", 2)):
        small = single.copy(tmp_path / config)
        done = small.launch("grpo", config, processes, *words)
        assert done.returncode == 0, done.stderr
        files = sorted((small.folder_of("grpo", *words) / "samples").iterdir())
        steps = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
        assert [len(samples) for samples in steps] == [8] * 4
        for samples, log in zip(steps, small.log("grpo", *words), strict=True):
            rewards = [sample["rewards"]["soft_overlong"] for sample in samples]
            assert log["reward"] == pytest.approx(sum(rewards) / 8, abs=1e-6)
        asked.append([sorted(sample["prompt"] for sample in samples) for samples in steps])
    assert asked[0] == asked[1]

"""On-policy distillation by TRL's DistillationTrainer: a teacher scores the student's own replies, and given ones.

The loss is the generalized Jensen-Shannon divergence of the next-token distributions of teacher p and student q
(arXiv:2306.13649, section 3), with beta = divergence_beta and m = beta p + (1 - beta) q:

    beta KL(p, m) + (1 - beta) KL(q, m);   KL(p, q) at beta 0;   KL(q, p) at beta 1

Its mean is over the tokens of all replies of the global batch, sampled and given.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments
from trl import DistillationConfig, DistillationTrainer

from smolpost.data.dataset_folder import list_lengths
from smolpost.training.environment import Environment
from smolpost.training.settings import DistillTraining
from smolpost.training.with_trl.engine import arguments_of, batches_of, built, check_even
from smolpost.training.with_trl.rollouts import EachStepRepeated, Samples, check_room, check_whole_steps

REPLY = ("completion_ids", "completion_mask")  # columns of the given replies


class Distillation(Samples, DistillationTrainer):
    """TRL's trainer, run as a stage. It samples; given replies take the place of a share of the samples.

    Args:
        stage: Share on policy and the like.
        seed: With step and row, decides which rows are sampled, on any number of ranks.
    """

    def __init__(self, *, stage: DistillTraining, seed: int, **settings: Any):
        super().__init__(kept=stage.kept_samples, **settings)
        self.stage, self.seed = stage, seed

    def _get_train_sampler(self, train_dataset=None) -> EachStepRepeated:
        return EachStepRepeated(self.batches, self.args.gradient_accumulation_steps)

    def _tokenize_prompts(self, rows: list[dict]) -> tuple[list[list[int]], None, dict]:
        return [row["prompt_ids"] for row in rows], None, {"rows": rows}

    def _generate(self, rows: list[dict]) -> tuple:
        prompts, completions, _, images, tool_images = super()._generate(rows)
        masks = [
            [1] * len(ids) if self._samples(row) else row["completion_mask"]
            for row, ids in zip(rows, completions, strict=True)
        ]
        return prompts, completions, masks, images, tool_images

    def _generate_single_turn(self, prompt_ids, images, fields, has_tool_images=False) -> list[list[int]]:
        rows = fields["rows"]
        sampled = [i for i, row in enumerate(rows) if self._samples(row)]
        # Ranks that share the weights generate together, so one without a sampled row generates what nobody reads.
        asked = sampled or ([0] if self.stage.on_policy and self.args.world_size > 1 else [])
        replies = super()._generate_single_turn([prompt_ids[i] for i in asked], images, {}) if asked else []
        completions = [row["completion_ids"] for row in rows]
        for i, reply in zip(sampled, replies, strict=False):
            completions[i] = reply
        self.samples = [
            {
                "row": rows[i]["row"],
                "prompt": prompt_ids[i],
                "completion": completions[i],
                "ended_by": self.ended_by(completions[i]),
            }
            for i in sampled
        ]
        self._observe(len(rows))
        return completions

    def _samples(self, row: dict) -> bool:
        """Whether the student replies to the row in this step."""
        return np.random.default_rng([self.seed, self.state.global_step, row["row"]]).random() < self.stage.on_policy

    def _observe(self, num_rows: int) -> None:
        """Metrics of the step's sampled replies, over all ranks."""
        lengths = [len(sample["completion"]) for sample in self.samples]
        stopped = sum(sample["ended_by"] == "stop token" for sample in self.samples)
        numbers = torch.tensor([num_rows, len(lengths), sum(lengths), stopped], device=self.accelerator.device)
        num_rows, num_sampled, num_tokens, stopped = self.accelerator.reduce(numbers, "sum").tolist()
        metrics = self._metrics["train"]
        metrics["on_policy"].append(num_sampled / num_rows)
        if num_sampled:
            metrics["samples/mean_length"].append(num_tokens / num_sampled)
            metrics["samples/stopped"].append(stopped / num_sampled)


class PromptRows(torch.utils.data.Dataset):
    """Prepared rows as TRL's trainer takes them: it hands on what it finds under "prompt"."""

    def __init__(self, rows: Dataset):
        self.rows = rows.select_columns(["prompt_ids", *REPLY])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> dict:
        found = self.rows[row]
        mask = found["completion_mask"]
        end = len(mask) - mask[::-1].index(1)  # a sampled reply has nothing after its stop token either
        return {"prompt": found | {name: found[name][:end] for name in REPLY} | {"row": row}}


def check(name: str, stage: DistillTraining, rows: Dataset, environment: Environment) -> None:
    """
    Raises:
        UserError: Rows do not come out even, or prompts leave no room for a reply.
    """
    check_even(name, stage, stage.micro_batch_size, "micro_batch_size", len(rows), environment)
    check_whole_steps(name, stage, len(rows))
    if stage.on_policy:
        check_room(name, stage, int(list_lengths(rows, "prompt_ids").max()))


def reference(
    stage: DistillTraining, rows: Dataset, teacher: Path, load_teacher: Callable[[], PreTrainedModel], *_: object
) -> tuple[Callable[[], PreTrainedModel], dict]:
    """How the teacher is loaded: beside the student, once the backend is known, as TRL shards both."""
    return load_teacher, {}


def arguments(
    stage: DistillTraining, seed: int, num_rows: int, out: Path, environment: Environment
) -> TrainingArguments:
    return arguments_of(
        DistillationConfig,
        stage,
        stage.micro_batch_size,
        seed,
        num_rows,
        out,
        environment,
        beta=stage.divergence_beta,
        temperature=stage.temperature,
        top_p=stage.top_p,
        top_k=stage.top_k,
        max_completion_length=stage.max_new_tokens,
    )


def trainer(
    stage: DistillTraining,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    reference: Callable[[], PreTrainedModel],
    arguments: TrainingArguments,
    seed: int,
    environment: Environment,
) -> Distillation:
    return built(
        Distillation,
        model,
        tokenizer,
        batches_of(list_lengths(rows, "prompt_ids") + list_lengths(rows, "completion_ids"), stage, seed, environment),
        stage=stage,
        seed=seed,
        teacher_model=reference(),
        args=arguments,
        train_dataset=PromptRows(rows),
    )

"""KTO by TRL's KTOTrainer: padded prompts and completions with labels, beside its own reference."""

import functools
from collections.abc import Callable
from pathlib import Path

import torch
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments
from trl import KTOConfig, KTOTrainer

from smolpost.data.dataset_folder import list_lengths, list_sums
from smolpost.training.environment import Environment
from smolpost.training.settings import KTOTraining
from smolpost.training.with_trl.engine import FromTRL, arguments_of, batches_of, built, check_even

COLUMNS = ("prompt_ids", "completion_ids", "completion_mask", "label")
MOST_DESIRED = 4 / 3  # weight of all desired completions over that of all undesired ones; the least is 1


class KTO(FromTRL, KTOTrainer):
    """TRL's trainer, run as a stage."""

    def _prepare_dataset(self, dataset: Dataset, *_: object) -> Dataset:
        return dataset  # tokenized and fitted already


def check(name: str, stage: KTOTraining, rows: Dataset, environment: Environment) -> None:
    check_even(name, stage, stage.micro_batch_size, "micro_batch_size", len(rows), environment)
    if environment.rank == 0 and (line := imbalance(name, stage, rows)):
        print(line, flush=True)


def imbalance(name: str, stage: KTOTraining, rows: Dataset) -> str:
    """A line where the two labels do not weigh 1 to 4/3 of each other, as the paper advises (its equation 8), or "".

    Args:
        name: The stage.
    """
    desired = int(list_sums(rows, "label").sum())
    undesired = len(rows) - desired
    ratio = desired * stage.desirable_weight / (undesired * stage.undesirable_weight)
    if 1 <= ratio <= MOST_DESIRED:
        return ""
    least = undesired * stage.undesirable_weight / desired
    where = f"stages.{name}"
    return (
        f"{where}: {desired:,} desired and {undesired:,} undesired completions weigh {ratio:.3g} to 1 with "
        f"desirable_weight={stage.desirable_weight:g} and undesirable_weight={stage.undesirable_weight:g}; KTO's paper "
        f"advises 1 to 1.33: {where}.desirable_weight between {least:.3g} and {MOST_DESIRED * least:.3g}"
    )


def reference(
    stage: KTOTraining, rows: Dataset, start: Path, load_start: Callable[[], PreTrainedModel], *_: object
) -> tuple[Callable[[], PreTrainedModel], dict]:
    """How the reference is loaded: beside the policy, once the backend is known, as TRL shards both."""
    return load_start, {}


def arguments(stage: KTOTraining, seed: int, num_rows: int, out: Path, environment: Environment) -> TrainingArguments:
    return arguments_of(
        KTOConfig,
        stage,
        stage.micro_batch_size,
        seed,
        num_rows,
        out,
        environment,
        loss_type=stage.loss,
        beta=stage.beta,
        desirable_weight=stage.desirable_weight,
        undesirable_weight=stage.undesirable_weight,
        max_length=None,  # rows are fitted already
        disable_dropout=False,  # as in our engine
    )


def trainer(
    stage: KTOTraining,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    reference: Callable[[], PreTrainedModel],
    arguments: TrainingArguments,
    seed: int,
    environment: Environment,
) -> KTO:
    return built(
        KTO,
        model,
        tokenizer,
        batches_of(list_lengths(rows, "prompt_ids") + list_lengths(rows, "completion_ids"), stage, seed, environment),
        args=arguments,
        ref_model=None if stage.lora.r else reference(),  # adapters that are switched off are the reference
        train_dataset=rows.select_columns(list(COLUMNS)),
        data_collator=functools.partial(collate_labelled, max_seq_len=stage.max_seq_len, with_kl=stage.loss == "kto"),
    )


def collate_labelled(rows: list[dict], max_seq_len: int, with_kl: bool) -> dict[str, torch.Tensor]:
    """Prompts with their completions, and with each other's, in TRL's layout, padded on the right.

    The KL divergence is estimated on mismatched sequences: each prompt with the completion of the row before it in the
    forward pass, the first with the last's. That is TRL's rule, but TRL pairs the rows before training, which holds for
    one fixed order of the rows alone. TRL's collator also counts every token of a completion; this one counts the
    trained ones.

    Args:
        rows: B rows of a dataset by prepare_completions, with labels.
        max_seq_len: A mismatched sequence is cut there.
        with_kl: Whether the loss needs the mismatched sequences.
    Returns:
        input_ids, attention_mask, completion_mask: [B, L] int64; with_kl: the same as KL_input_ids, ...; label: [B]
            bool.
    """
    batch = _padded(rows, rows, max_seq_len)
    if with_kl:
        mismatched = _padded(rows, [rows[-1], *rows[:-1]], max_seq_len)
        batch |= {f"KL_{name}": values for name, values in mismatched.items()}
    return batch | {"label": torch.tensor([bool(row["label"][0]) for row in rows])}


def _padded(prompts: list[dict], completions: list[dict], max_seq_len: int) -> dict[str, torch.Tensor]:
    """The prompts of some rows with the completions of others. Padding is masked, so its id means nothing."""
    found: dict[str, list[torch.Tensor]] = {"input_ids": [], "attention_mask": [], "completion_mask": []}
    for prompt, completion in zip((row["prompt_ids"] for row in prompts), completions, strict=True):
        ids = torch.tensor((prompt + completion["completion_ids"])[:max_seq_len])
        found["input_ids"].append(ids)
        found["attention_mask"].append(torch.ones_like(ids))
        found["completion_mask"].append(torch.tensor(([0] * len(prompt) + completion["completion_mask"])[:max_seq_len]))
    return {name: pad_sequence(values, batch_first=True) for name, values in found.items()}

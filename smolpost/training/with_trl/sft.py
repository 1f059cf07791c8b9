"""SFT by TRL's SFTTrainer: on packs, without padding, documents told apart by positions that restart."""

from pathlib import Path

import numpy as np
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments
from trl import SFTConfig, SFTTrainer

from smolpost.chat.fates import Fate
from smolpost.data.collate import IGNORE_INDEX
from smolpost.training import sft
from smolpost.training.environment import Environment
from smolpost.training.settings import PackTraining
from smolpost.training.with_trl.engine import FromTRL, arguments_of, built, check_even

COLUMNS = ("input_ids", "fates", "seq_lengths")

reference = sft.reference


class SFT(FromTRL, SFTTrainer):
    """TRL's trainer, run as a stage."""


def check(name: str, stage: PackTraining, rows: Dataset, environment: Environment) -> None:
    check_even(
        name, stage, stage.micro_batch_size, "micro_batch_size", len(rows), environment,
        counts_tokens=True,
    )  # fmt: skip


def arguments(stage: PackTraining, seed: int, num_rows: int, out: Path, environment: Environment) -> TrainingArguments:
    return arguments_of(
        SFTConfig,
        stage,
        stage.micro_batch_size,
        seed,
        num_rows,
        out,
        environment,
        loss_type=stage.trl.loss_type,
        padding_free=True,
        max_length=None,  # rows are fitted already
        dataset_kwargs={"skip_prepare_dataset": True},
    )


def trainer(
    stage: PackTraining,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    reference: None,
    arguments: TrainingArguments,
    seed: int,
    environment: Environment,
) -> SFT:
    return built(
        SFT,
        model,
        tokenizer,
        sft.batches(stage, rows, seed, environment),
        args=arguments,
        train_dataset=rows.select_columns(list(COLUMNS)).with_transform(_labelled),
    )


def _labelled(packs: dict[str, list]) -> dict[str, list]:
    """Packs in TRL's columns: labels are the ids of trained tokens, not shifted, and IGNORE_INDEX elsewhere."""
    labels = [
        np.where(np.asarray(fates) == Fate.TRAINED, ids, IGNORE_INDEX).tolist()
        for ids, fates in zip(packs["input_ids"], packs["fates"], strict=True)
    ]
    return {"input_ids": packs["input_ids"], "labels": labels, "seq_lengths": packs["seq_lengths"]}

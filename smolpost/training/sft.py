"""Mid-training and SFT: the weighted mean negative log-likelihood of the trained tokens of a global batch."""

import functools

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from smolpost.data.collate import IGNORE_INDEX, collate_packs
from smolpost.data.dataset_folder import list_lengths
from smolpost.objectives.transfer import to_device
from smolpost.training.arguments import training_arguments
from smolpost.training.batches import GlobalBatches, by_count
from smolpost.training.environment import Environment
from smolpost.training.scoring import Scored
from smolpost.training.settings import PackTraining
from smolpost.training.trainer import StageTrainer

COLUMNS = ("input_ids", "fates", "seq_lengths", "seq_weights")
TINY = torch.finfo(torch.float64).tiny  # in place of 0: a global batch without a trained token


class PackTrainer(StageTrainer):
    """Trains on packs of documents."""

    ON_CPU = ("labels", "token_weights")

    def count(self, batch):
        return [float(batch["token_weights"][batch["labels"][0] != IGNORE_INDEX].sum())]

    def pass_loss(self, model, batch, counts, totals):
        labels, weights = batch["labels"][0], batch["token_weights"]
        positions = (labels[1:] != IGNORE_INDEX).nonzero()[:, 0]
        # The coefficients are known before the forward pass, so the head computes its gradients in the same pass.
        coefficients = (weights[positions + 1] * counts / totals[0].clamp(min=TINY)).float()
        device = batch["input_ids"].device
        scores = model(
            **{key: batch[key] for key in ("input_ids", "position_ids", "document_lengths")},
            scored=Scored(to_device(positions, device), labels[positions + 1], to_device(coefficients, device)),
        )
        num_tokens = len(positions) * counts
        self.observe("entropy", scores.entropy.sum() * counts, num_tokens)
        self.observe("mean_token_accuracy", scores.is_top1.sum() * counts, num_tokens)
        return -scores.total


def check(*_: object) -> None:
    """This engine trains all rows that can be prepared."""


arguments = training_arguments


def batches(stage: PackTraining, rows: Dataset, seed: int, environment: Environment) -> GlobalBatches:
    return GlobalBatches(
        list_lengths(rows, "input_ids"),
        stage.global_batch_size,
        functools.partial(by_count, micro_batch_size=stage.micro_batch_size),
        seed=seed if stage.shuffle_packs else None,
        rank=environment.rank,
        num_ranks=environment.world_size,
    )


def reference(*_: object) -> tuple[None, dict]:
    """Packs need none."""
    return None, {}


def trainer(
    stage: PackTraining,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    reference: None,
    arguments: TrainingArguments,
    seed: int,
    environment: Environment,
) -> PackTrainer:
    return PackTrainer(
        model,
        arguments,
        tokenizer,
        rows.with_format("numpy", columns=[name for name in rows.column_names if name in COLUMNS]),
        collate_packs,
        batches(stage, rows, seed, environment),
    )

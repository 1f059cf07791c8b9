"""Mid-training and SFT: the mean negative log-likelihood of the trained tokens of a global batch."""

import functools

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from smolpost.data.collate import IGNORE_INDEX, collate_packs
from smolpost.data.dataset_folder import list_lengths
from smolpost.schema import SFTStage
from smolpost.training.batches import GlobalBatches, by_count
from smolpost.training.environment import Environment
from smolpost.training.scoring import Scored
from smolpost.training.trainer import StageTrainer


class PackTrainer(StageTrainer):
    """Trains on packs of documents."""

    def count(self, batch: dict) -> list[int]:
        return [int((batch["labels"] != IGNORE_INDEX).sum())]

    def pass_loss(self, model, batch, counts, totals):
        labels = batch.pop("labels")[0]
        positions = (labels[1:] != IGNORE_INDEX).nonzero()[:, 0]
        # The coefficients are known before the forward, so the head makes its gradients in the same sweep.
        weights = torch.full((len(positions),), counts / totals[0].clamp(min=1), device=labels.device)
        scores = model(**batch, scored=Scored(positions, labels[positions + 1], weights))
        num_tokens = len(positions) * counts
        self.observe("entropy", scores.entropy.sum() * counts, num_tokens)
        self.observe("mean_token_accuracy", scores.is_top1.sum() * counts, num_tokens)
        return -scores.total


def batches(stage: SFTStage, rows: Dataset, seed: int, environment: Environment) -> GlobalBatches:
    return GlobalBatches(
        list_lengths(rows, "input_ids"),
        stage.global_batch_size,
        functools.partial(by_count, micro_batch_size=stage.micro_batch_size),
        seed=seed if stage.shuffle_packs else None,
        rank=environment.rank,
        num_ranks=environment.world_size,
    )


def trainer(
    stage: SFTStage,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    arguments: TrainingArguments,
    seed: int,
    environment: Environment,
    callbacks: list,
) -> PackTrainer:
    return PackTrainer(
        model,
        arguments,
        tokenizer,
        rows.with_format("numpy"),
        collate_packs,
        batches(stage, rows, seed, environment),
        callbacks,
    )

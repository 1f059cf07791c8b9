"""Anchored preference optimization, and its relatives, on packed pairs that share their prompt."""

import functools
from collections.abc import Callable
from pathlib import Path

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from smolpost.objectives.logprobs import TokenScores
from smolpost.objectives.losses import SideLengths, configured
from smolpost.objectives.sides import summed_logps
from smolpost.training.arguments import training_arguments
from smolpost.training.batches import GlobalBatches, by_tokens
from smolpost.training.environment import Environment
from smolpost.training.reference import (
    VERSION,
    PairsBesideReference,
    collate_beside_reference,
    fill,
    pair_lengths,
    scored_tokens,
)
from smolpost.training.reference_cache import ReferenceCache, reference_key, weights_hash
from smolpost.training.scoring import Scored
from smolpost.training.settings import PairTraining
from smolpost.training.trainer import StageTrainer


class PairTrainer(StageTrainer):
    """Trains on preference pairs beside cached log-probabilities of the reference.

    Args:
        stage: Loss, beta and the like.
    """

    ON_CPU = ("targets",)

    def __init__(self, *args, stage: PairTraining):
        super().__init__(*args)
        self.stage, self.loss = stage, configured(stage.loss, stage.loss_settings)

    def count(self, batch):
        weights = batch["pair_weights"]
        return [float(weights.sum()), float((weights * batch["side_lengths"][::2]).sum())]

    def pass_loss(self, model, batch, counts, totals):
        stage, (num_pairs, num_chosen_tokens) = self.stage, totals[:2].float()
        scores = model(
            **{key: batch[key] for key in ("input_ids", "position_ids", "pair_lengths")},
            scored=Scored(batch["positions"], batch["targets"]),
        )
        tokens, sides, side_lengths = batch["side_tokens"], batch["sides"], batch["side_lengths"]
        # Log-ratios are summed token by token: a difference of two sums of thousands of nats would lose its digits.
        ratios = summed_logps(
            (scores.logps - batch["ref_logps"])[tokens], sides, len(side_lengths), ld_alpha=stage.ld_alpha
        ).view(-1, 2)
        losses = self.loss(*ratios.unbind(1), stage.beta, SideLengths(*side_lengths.view(-1, 2).unbind(1)))
        weights = batch["pair_weights"]
        loss = (weights * losses).sum() / num_pairs
        if stage.sft_weight:
            of_chosen = batch["of_chosen"]
            chosen = weights[sides[of_chosen] // 2] * scores.logps[tokens[of_chosen]]
            loss = loss - stage.sft_weight * chosen.sum() / num_chosen_tokens
        self._observe(batch, scores, ratios.detach(), counts)
        return loss * counts

    def _observe(self, batch: dict, scores: TokenScores, ratios: torch.Tensor, counts: bool) -> None:
        """TRL's metrics, under its names."""
        tokens, sides, side_lengths = batch["side_tokens"], batch["sides"], batch["side_lengths"]
        logps = summed_logps(scores.logps.detach()[tokens], sides, len(side_lengths), ld_alpha=self.stage.ld_alpha)
        of_pairs = {"logps/chosen": logps[::2], "logps/rejected": logps[1::2]}
        rewards = self.stage.beta * ratios
        of_pairs |= {"rewards/chosen": rewards[:, 0], "rewards/rejected": rewards[:, 1]}
        of_pairs["rewards/margins"] = rewards[:, 0] - rewards[:, 1]
        of_pairs["rewards/accuracies"] = of_pairs["rewards/margins"] > 0
        of_tokens = {
            "entropy": scores.entropy[tokens],
            "mean_token_accuracy": scores.is_top1[tokens[batch["of_chosen"]]],
        }
        for name, values in (of_pairs | of_tokens).items():
            self.observe(name, values.sum() * counts, len(values) * counts)


def check(*_: object) -> None:
    """This engine trains all rows that can be prepared."""


arguments = training_arguments


def capacity(stage: PairTraining) -> int:
    """Tokens of a forward pass."""
    return stage.pack_tokens or stage.max_seq_len


def batches(stage: PairTraining, rows: Dataset, seed: int, environment: Environment) -> GlobalBatches:
    lengths = pair_lengths(rows)
    return GlobalBatches(
        lengths,
        stage.global_batch_size,
        functools.partial(by_tokens, lengths=lengths, capacity=capacity(stage)),
        seed=seed,
        rank=environment.rank,
        num_ranks=environment.world_size,
    )


def reference(
    stage: PairTraining,
    rows: Dataset,
    start: Path,
    load_start: Callable[[], PreTrainedModel],
    references: Path,
    environment: Environment,
) -> tuple[ReferenceCache, dict]:
    """The start checkpoint's log-probabilities, of which this rank works out its part.

    The cache lies under the key of all that decides them, and of nothing else.
    """
    key = reference_key(
        rows=rows._fingerprint,  # of the content: prepare hashes ids and masks
        weights=weights_hash(start),
        precision="bf16" if environment.bf16 else "fp32",
        context=f"{stage.rope_theta}/{stage.max_position_embeddings}",
        version=VERSION,
    )
    cache = ReferenceCache(references / key, key, scored_tokens(rows))
    scored = fill(cache, rows, load_start, capacity(stage), environment)
    return cache, {"reference_cache": str(cache.folder), "reference_pairs_scored": scored}


def trainer(
    stage: PairTraining,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    reference: ReferenceCache,
    arguments: TrainingArguments,
    seed: int,
    environment: Environment,
) -> PairTrainer:
    reference.open()
    return PairTrainer(
        model,
        arguments,
        tokenizer,
        PairsBesideReference(rows, reference),
        collate_beside_reference,
        batches(stage, rows, seed, environment),
        stage=stage,
    )

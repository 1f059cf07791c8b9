"""Anchored preference optimization, and its relatives, on packed pairs that share their prompt."""

import functools

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from smolpost.objectives.apo import preference_loss, summed_logps
from smolpost.objectives.logprobs import TokenScores
from smolpost.schema import APOStage
from smolpost.training.batches import GlobalBatches, by_tokens
from smolpost.training.environment import Environment
from smolpost.training.reference import PairsBesideReference, collate_beside_reference, pair_lengths
from smolpost.training.reference_cache import ReferenceCache
from smolpost.training.scoring import Scored
from smolpost.training.trainer import StageTrainer


class PairTrainer(StageTrainer):
    """Trains on preference pairs beside cached log-probabilities of the reference.

    Args:
        stage: Loss, beta and the like.
    """

    def __init__(self, *args, stage: APOStage):
        super().__init__(*args)
        self.stage = stage

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
        losses = preference_loss(
            stage.loss, *ratios.unbind(1), beta=stage.beta, label_smoothing=stage.label_smoothing,
            num_chosen=side_lengths[::2], num_rejected=side_lengths[1::2],
        )  # fmt: skip
        weights = batch["pair_weights"]
        loss = (weights * losses).sum() / num_pairs
        if stage.sft_weight:
            is_chosen = sides % 2 == 0
            chosen = weights[sides[is_chosen] // 2] * scores.logps[tokens[is_chosen]]
            loss = loss - stage.sft_weight * chosen.sum() / num_chosen_tokens
        self._observe(batch, scores, ratios.detach(), counts)
        return loss * counts

    def _observe(self, batch: dict, scores: TokenScores, ratios: torch.Tensor, counts: bool) -> None:
        """TRL's metrics, under its names."""
        tokens, sides, side_lengths = batch["side_tokens"], batch["sides"], batch["side_lengths"]
        logps = summed_logps(scores.logps.detach()[tokens], sides, len(side_lengths), ld_alpha=self.stage.ld_alpha)
        is_chosen = sides % 2 == 0
        of_pairs = {"logps/chosen": logps[::2], "logps/rejected": logps[1::2]}
        rewards = self.stage.beta * ratios
        of_pairs |= {"rewards/chosen": rewards[:, 0], "rewards/rejected": rewards[:, 1]}
        of_pairs["rewards/margins"] = rewards[:, 0] - rewards[:, 1]
        of_pairs["rewards/accuracies"] = of_pairs["rewards/margins"] > 0
        of_tokens = {
            "entropy": scores.entropy[tokens],
            "mean_token_accuracy": scores.is_top1[tokens[is_chosen]],
        }
        for name, values in (of_pairs | of_tokens).items():
            self.observe(name, values.sum() * counts, len(values) * counts)


def capacity(stage: APOStage) -> int:
    """Tokens of a forward pass."""
    return stage.pack_tokens or stage.max_seq_len


def batches(stage: APOStage, rows: Dataset, seed: int, environment: Environment) -> GlobalBatches:
    lengths = pair_lengths(rows)
    return GlobalBatches(
        lengths,
        stage.global_batch_size,
        functools.partial(by_tokens, lengths=lengths, capacity=capacity(stage)),
        seed=seed,
        rank=environment.rank,
        num_ranks=environment.world_size,
    )


def trainer(
    stage: APOStage,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    cache: ReferenceCache,
    arguments: TrainingArguments,
    seed: int,
    environment: Environment,
    callbacks: list,
) -> PairTrainer:
    """
    Args:
        cache: Complete and opened.
    """
    return PairTrainer(
        model,
        arguments,
        tokenizer,
        PairsBesideReference(rows, cache),
        collate_beside_reference,
        batches(stage, rows, seed, environment),
        callbacks,
        stage=stage,
    )

"""Tests the promises of training on a few prepared rows, with the stage's own model.

A packed row equals its documents one by one, one large forward pass equals many small ones, a pair equals its two
sequences, and a policy that equals its reference has the loss that theory predicts. Only the model's gradients change.
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from smolpost.chat.fates import Fate
from smolpost.data.collate import IGNORE_INDEX, PARTS
from smolpost.objectives.losses import configured
from smolpost.training import preference, reference, sft
from smolpost.training.arguments import training_arguments
from smolpost.training.environment import Environment
from smolpost.training.reference_cache import ReferenceCache
from smolpost.training.scoring import Scored, score_tokens
from smolpost.training.settings import PackTraining, PairTraining, Training
from smolpost.training.trainer import StageTrainer

# Relative, of loss, gradient norm and largest gradient; absolute, in nats, of a token's log-probability. Measured on
# miniatures: below 2e-6 in fp32; bf16 keeps three digits.
TOLERANCE = {False: 1e-4, True: 3e-2}  # fp32, bf16
TOKEN_COLUMNS = ("input_ids", "fates")  # of a pack; its other columns have an entry for each document


class Finding(NamedTuple):
    """Whether a check passed, and the numbers."""

    passed: bool
    detail: str


class Step(NamedTuple):
    """Loss and gradients of one global batch, gradients by parameter."""

    loss: float
    gradients: dict[str, torch.Tensor]

    def norm(self) -> float:
        """Norm of all gradients together."""
        return math.sqrt(sum(float(g.double().square().sum()) for g in self.gradients.values()))

    def largest(self) -> float:
        """Largest absolute gradient."""
        return max(float(g.abs().max()) for g in self.gradients.values())


# ---------------------------------------------------------------- documents


def documents(packs: Iterable[dict]) -> list[dict]:
    """Each document of the packs as a pack of its own."""
    found = []
    for pack in packs:
        ends = np.cumsum(pack["seq_lengths"])
        for i, (start, stop) in enumerate(zip(ends - pack["seq_lengths"], ends, strict=True)):
            cut = {True: slice(start, stop), False: slice(i, i + 1)}
            found.append({name: np.asarray(values)[cut[name in TOKEN_COLUMNS]] for name, values in pack.items()})
    return found


def joined(packs: list[dict]) -> dict:
    """The packs as one."""
    return {name: np.concatenate([pack[name] for pack in packs]) for name in packs[0]}


def short_documents(packs: Iterable[dict], max_tokens: int) -> list[dict]:
    """The shortest documents with a trained token, together at most max_tokens; at least two, if there are two.

    Longer ones of these two are cut to the tokens that end with the last trained one.
    """
    chosen, room = [], max_tokens
    trained = (d for d in documents(packs) if (d["fates"][1:] == Fate.TRAINED).any())
    for document in sorted(trained, key=lambda d: len(d["input_ids"])):
        length = len(document["input_ids"])
        if length > room and len(chosen) >= 2:
            break
        chosen.append(_tail(document, max_tokens // 2) if length > max_tokens // 2 else document)
        room -= len(chosen[-1]["input_ids"])
    return chosen


def _tail(document: dict, length: int) -> dict:
    """The last `length` tokens of the document, up to its last trained one."""
    stop = int((document["fates"] == Fate.TRAINED).nonzero()[0][-1]) + 1
    start = max(0, stop - length)
    cut = {name: v[start:stop] if name in TOKEN_COLUMNS else v for name, v in document.items()}
    cut["fates"] = cut["fates"].copy()
    cut["fates"][0] = Fate.FIRST  # nothing is left that predicts it
    return cut | {"seq_lengths": np.array([stop - start])}


# ---------------------------------------------------------------- comparing


def compare(first: str, a: Step, second: str, b: Step, environment: Environment) -> Finding:
    """Whether loss, gradient norm and every gradient agree, relative to b's."""
    loss_off = abs(a.loss - b.loss) / abs(b.loss)
    norm_off = abs(a.norm() - b.norm()) / b.norm()
    largest_off = max(float((g - b.gradients[name]).abs().max()) for name, g in a.gradients.items()) / b.largest()
    tolerance = TOLERANCE[environment.bf16]
    return Finding(
        all(off <= tolerance for off in (loss_off, norm_off, largest_off)),  # nan does not agree
        f"loss {a.loss:.6f} {first}, {b.loss:.6f} {second}; gradient norm {a.norm():.6g} and {b.norm():.6g}; largest "
        f"gradient difference {largest_off:.1e} of the largest gradient; tolerance {tolerance:g} "
        f"({'bf16' if environment.bf16 else 'fp32'})",
    )


def _take_step(model: PreTrainedModel, loss: float) -> Step:
    """The gradients of the model's parameters, which are then cleared."""
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return Step(loss, gradients)


def precision(environment: Environment) -> contextlib.AbstractContextManager:
    return torch.autocast(environment.device.type, torch.bfloat16, enabled=environment.bf16)


def without_dropout(model: PreTrainedModel) -> PreTrainedModel:
    """The model with every dropout off, also in training mode: two passes are to be compared."""
    if getattr(model.config, "attention_dropout", None):
        model.config.attention_dropout = 0.0  # ours reads it at every call, others keep a copy
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0
    return model


# ---------------------------------------------------------------- sft


def packed_equals_unpacked(model: PreTrainedModel, chosen: list[dict], environment: Environment) -> Finding:
    """Compare the documents in one packed row with each in its own row, without any packing.

    Args:
        model: On the environment's device.
        chosen: From `short_documents`.
    """
    score_tokens(model)
    packed = sft.collate_packs([joined(chosen)])
    alone = [{key: sft.collate_packs([d])[key] for key in ("input_ids", "labels")} for d in chosen]
    steps = [_summed(model, batches, environment) for batches in ([packed], alone)]
    return compare(f"packed ({len(chosen)} documents)", steps[0], "one by one", steps[1], environment)


def _summed(model: PreTrainedModel, batches: list[dict], environment: Environment) -> Step:
    """Mean negative log-likelihood over the trained tokens of all batches."""
    model.eval()
    total = sum(int((batch["labels"][0, 1:] != IGNORE_INDEX).sum()) for batch in batches)
    loss = 0.0
    for batch in batches:
        labels = batch["labels"][0].to(environment.device)
        positions = (labels[1:] != IGNORE_INDEX).nonzero()[:, 0]
        weights = torch.full((len(positions),), 1 / total, device=environment.device)
        inputs = {key: batch[key] for key in ("input_ids", "position_ids", "document_lengths") if key in batch}
        inputs |= {key: value.to(environment.device) for key, value in inputs.items() if torch.is_tensor(value)}
        with precision(environment):
            scores = model(**inputs, scored=Scored(positions, labels[positions + 1], weights, metrics=False))
        (-scores.total).backward()
        loss -= float(scores.total.detach())
    return _take_step(model, loss)


def sft_accumulation(
    stage: PackTraining,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    chosen: list[dict],
    environment: Environment,
    folder: Path,
) -> Finding:
    """One optimizer step of the trainer on all documents in one forward pass, and on a pass for each.

    Args:
        chosen: From `short_documents`; a pack each.
        folder: The trainer's, written to where it wants to.
    """
    rows = Dataset.from_list([{name: values.tolist() for name, values in d.items()} for d in chosen])
    steps = []
    for micro_batch_size in (len(rows), 1):
        settings = _without_log(stage, len(rows), micro_batch_size=micro_batch_size)
        arguments = training_arguments(settings, 0, len(rows), folder, environment)
        trainer = sft.trainer(settings, model, tokenizer, rows, None, arguments, 0, environment)
        steps.append(global_step(trainer, environment))
    return compare(f"in 1 pass of {len(rows)} packs", steps[0], f"in {len(rows)} passes of 1", steps[1], environment)


def _without_log(stage: Training, num_rows: int, **changes) -> Training:
    """The stage with all rows in one global batch."""
    return dataclasses.replace(
        stage, global_batch_size=num_rows, report_to=[], activation_checkpointing="none", num_epochs=1, **changes
    )


def global_step(trainer: StageTrainer, environment: Environment) -> Step:
    """The trainer's own step on its first global batch, without the optimizer's part."""
    passes = next(iter(trainer.get_train_dataloader()))
    trainer.model.zero_grad(set_to_none=True)
    with precision(environment):
        loss = float(trainer.training_step(trainer.model, passes))
    return _take_step(trainer.model, loss)


# ---------------------------------------------------------------- apo


def pair_equals_two_sequences(model: PreTrainedModel, pairs: list[dict], environment: Environment) -> Finding:
    """Log-probabilities of `prompt | chosen | rejected` against those of two rows, which know of no pair."""
    score_tokens(model.eval())
    together = reference.score_pairs(model, pairs, environment)
    off, sums = 0.0, [[], []]
    for pair, logps in zip(pairs, together, strict=True):
        counts = [int(np.sum(pair[f"{part}_mask"])) for part in PARTS]
        prompt, chosen, rejected = np.split(logps, np.cumsum(counts)[:-1])
        for part, own in (("chosen", chosen), ("rejected", rejected)):
            expected = _side_logps(model, pair, part, environment)
            found = np.concatenate((prompt, own))
            if len(found) != len(expected):
                return Finding(False, f"{len(found)} scored tokens in the pair, {len(expected)} in the {part} sequence")
            off = max([off, *np.abs(found - expected).tolist()])
            sums[0].append(float(found.sum()))
            sums[1].append(float(expected.sum()))
    tolerance = TOLERANCE[environment.bf16]
    return Finding(
        off <= tolerance,
        f"{len(pairs)} pairs: logps of the {len(sums[0])} sides sum to {sum(sums[0]):.4f} nats as pairs, "
        f"{sum(sums[1]):.4f} as sequences; largest difference of a token {off:.1e}; tolerance {tolerance:g}",
    )


@torch.no_grad()
def _side_logps(model: PreTrainedModel, pair: dict, part: str, environment: Environment) -> np.ndarray:
    """[S] log-probabilities of the scored tokens of the prompt and one side, as a sequence of its own."""
    ids = torch.from_numpy(np.concatenate((pair["prompt_ids"], pair[f"{part}_ids"])).astype(np.int64))
    mask = torch.from_numpy(np.concatenate((pair["prompt_mask"], pair[f"{part}_mask"])) != 0)
    positions = mask[1:].nonzero()[:, 0]
    ids, positions = ids.to(environment.device), positions.to(environment.device)
    with precision(environment):
        scores = model(input_ids=ids[None], scored=Scored(positions, ids[positions + 1], metrics=False))
    return scores.logps.float().cpu().numpy()


class PairSteps(NamedTuple):
    """A global batch of pairs whose reference is the policy itself.

    Attributes:
        whole: All pairs in one forward pass.
        single: A pass for each pair.
        rewards: Metric -> its mean over the sides, of `whole`.
        nll: Mean negative log-likelihood of the chosen sides' tokens, nats.
    """

    whole: Step
    single: Step
    rewards: dict[str, float]
    nll: float


def pair_steps(
    stage: PairTraining,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    environment: Environment,
    folder: Path,
) -> PairSteps:
    """One optimizer step of the trainer on all pairs, in one forward pass and in many.

    Args:
        rows: By `prepare`, few enough for one pass.
        folder: For the trainer and its reference cache.
    """
    lengths = reference.pair_lengths(rows)
    cache = ReferenceCache(folder / "reference", "conformance", reference.scored_tokens(rows))
    reference.fill(cache, rows, lambda: model, int(lengths.sum()), environment)
    cache.open()
    steps, rewards = [], {}
    for pack_tokens in (int(lengths.sum()), 1):  # a longer pair has a pass of its own
        settings = _without_log(stage, len(rows), pack_tokens=pack_tokens)
        arguments = training_arguments(settings, 0, len(rows), folder, environment)
        trainer = preference.trainer(settings, model, tokenizer, rows, cache, arguments, 0, environment)
        steps.append(global_step(trainer, environment))
        means = {name: float(total / weight) for name, (total, weight) in trainer.sums.items()}
        rewards = rewards or {name: means[name] for name in ("rewards/chosen", "rewards/rejected")}
    logps = [cache.read(i) for i in range(len(rows))]
    chosen = [
        own[: int(np.sum(pair["prompt_mask"]) + np.sum(pair["chosen_mask"]))]
        for own, pair in zip(logps, rows, strict=True)
    ]
    return PairSteps(*steps, rewards, -float(np.concatenate(chosen).mean(dtype=np.float64)))


def loss_at_reference(stage: PairTraining, steps: PairSteps, environment: Environment) -> Finding:
    """The loss where every log-ratio is 0, against the value that the loss states for it."""
    theory = configured(stage.loss, stage.loss_settings).at_reference(stage.beta)
    words = f"{stage.loss} {theory:.6f}"
    if stage.sft_weight:
        theory += stage.sft_weight * steps.nll
        words += f" + {stage.sft_weight:g} x {steps.nll:.6f} nats"
    tolerance = TOLERANCE[environment.bf16]
    off = abs(steps.whole.loss - theory) / theory
    reward = max(map(abs, steps.rewards.values()))
    return Finding(
        off <= tolerance and reward <= tolerance,
        f"loss {steps.whole.loss:.6f}, theory {words}; largest mean reward {reward:.1e}; tolerance {tolerance:g}",
    )


def apo_accumulation(steps: PairSteps, environment: Environment) -> Finding:
    """Compare one pass for all pairs with a pass for each pair."""
    return compare("in 1 pass", steps.whole, "in a pass for each pair", steps.single, environment)


# ---------------------------------------------------------------- both


def vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: np.ndarray) -> Finding:
    """Whether every id has an embedding of its own and no text was unknown.

    Args:
        ids: Of the sample.
    """
    weight = model.get_input_embeddings().weight.detach()
    highest = max(int(ids.max()), *tokenizer.get_vocab().values())
    num_unknown = 0 if tokenizer.unk_token_id is None else int((ids == tokenizer.unk_token_id).sum())
    used = sorted({i for i in tokenizer.added_tokens_decoder if i < len(weight)} & set(np.unique(ids).tolist()))
    rows = weight[used].float()
    names = tokenizer.convert_ids_to_tokens(used)
    zero = [name for name, norm in zip(names, rows.norm(dim=1).tolist(), strict=True) if norm == 0]
    equal = [name for name, row in zip(names, rows, strict=True) if int((rows == row).all(1).sum()) > 1]
    detail = f"highest id {highest:,}, {len(weight):,} embeddings; {num_unknown:,} unknown of {len(ids):,} tokens"
    detail += f"; {len(used)} added tokens in use"
    if zero:
        detail += f", {len(zero)} with an embedding of 0 ({', '.join(zero)})"
    if equal:
        detail += f", {len(equal)} with an embedding that another one has, too ({', '.join(equal)})"
    return Finding(highest < len(weight) and not (num_unknown or zero or equal), detail)

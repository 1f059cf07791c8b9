"""Preference training by TRL's DPOTrainer: on padded pairs, two sequences each, beside its own reference."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from datasets import Dataset, load_from_disk
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments
from trl import DPOConfig, DPOTrainer

from smolpost.data.collate import PARTS
from smolpost.training.environment import Environment
from smolpost.training.reference import pair_lengths
from smolpost.training.reference_cache import reference_key, weights_hash
from smolpost.training.settings import PairTraining
from smolpost.training.with_trl.engine import FromTRL, arguments_of, batches_of, built, check_even

COLUMNS = [f"{part}_{what}" for part in PARTS for what in ("ids", "mask")]


class DPO(FromTRL, DPOTrainer):
    """TRL's trainer, run as a stage."""

    def _prepare_dataset(self, dataset: Dataset, *_: object) -> Dataset:
        return dataset  # tokenized and fitted already


def check(name: str, stage: PairTraining, rows: Dataset, environment: Environment) -> None:
    check_even(name, stage, stage.trl.micro_batch_size, "trl.micro_batch_size", len(rows), environment)


class Reference(NamedTuple):
    """TRL's reference.

    Attributes:
        load: Loads it, once the backend is known, as TRL shards it like the policy.
        cache: Folder for its log-probabilities, where they are worked out before training.
    """

    load: Callable[[], PreTrainedModel]
    cache: Path | None = None


def reference(
    stage: PairTraining,
    rows: Dataset,
    start: Path,
    load_start: Callable[[], PreTrainedModel],
    references: Path,
    environment: Environment,
) -> tuple[Reference, dict]:
    """Nothing is scored here: that is TRL's part. Its own key forgets ld_alpha, the precision and the context."""
    if not stage.trl.precompute_ref_log_probs:
        return Reference(load_start), {}
    key = reference_key(
        rows=rows._fingerprint,
        weights=weights_hash(start),
        precision="bf16" if environment.bf16 else "fp32",
        context=f"{stage.rope_theta}/{stage.max_position_embeddings}",
        version=f"trl {stage.ld_alpha}",
    )
    cache = references / f"trl-{key}"
    return Reference(load_start, cache), {"reference_cache": str(cache)}


def arguments(stage: PairTraining, seed: int, num_rows: int, out: Path, environment: Environment) -> TrainingArguments:
    trl = stage.trl
    return arguments_of(
        DPOConfig,
        stage,
        trl.micro_batch_size,
        seed,
        num_rows,
        out,
        environment,
        loss_type=trl.loss_type or [stage.loss],
        loss_weights=trl.loss_weights or None,
        label_smoothing=stage.loss_settings.get("label_smoothing", trl.label_smoothing),
        f_divergence_type=trl.f_divergence_type,
        f_alpha_divergence_coef=trl.f_alpha_divergence_coef,
        discopop_tau=trl.discopop_tau,
        use_weighting=trl.use_weighting,
        beta=stage.beta,
        ld_alpha=stage.ld_alpha,
        precompute_ref_log_probs=trl.precompute_ref_log_probs,
        max_length=None,  # rows are fitted already
        disable_dropout=False,  # as in our engine
    )


def trainer(
    stage: PairTraining,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    reference: Reference,
    arguments: TrainingArguments,
    seed: int,
    environment: Environment,
) -> DPO:
    # Adapters that are switched off are the reference. A precomputed one is what the policy is before training, but for
    # FSDP, which shards the policy only then: there TRL would load one without the stage's context.
    is_precomputed = reference.cache and os.environ.get("ACCELERATE_USE_FSDP") != "true"
    if reference.cache:
        rows = _beside(rows, reference.cache, arguments)
    return built(
        DPO,
        model,
        tokenizer,
        batches_of(pair_lengths(rows), stage, seed, environment),
        args=arguments,
        ref_model=None if stage.lora.r or is_precomputed else reference.load(),
        train_dataset=rows.select_columns(list(COLUMNS)),
        data_collator=collate_padded,
    )


def _beside(rows: Dataset, cache: Path, arguments: TrainingArguments) -> Dataset:
    """The same rows by links in the cache folder: TRL writes its file beside the rows, which stay as prepared."""
    if arguments.process_index == 0:
        cache.mkdir(parents=True, exist_ok=True)
        for file in Path(rows.cache_files[0]["filename"]).resolve().parent.iterdir():
            (cache / file.name).unlink(missing_ok=True)
            (cache / file.name).symlink_to(file)
    arguments.distributed_state.wait_for_everyone()
    return load_from_disk(str(cache))


def collate_padded(pairs: list[dict]) -> dict[str, torch.Tensor]:
    """Preference pairs in TRL's layout: all chosen sequences, then all rejected ones, padded on the right.

    TRL's own collator counts every token after the prompt; this one counts the scored ones, so user and tool turns
    inside a completion stay out, and a beginning that both sides share is in.

    Args:
        pairs: P rows of a dataset by prepare_pairs.
    Returns:
        input_ids, attention_mask, completion_mask: [2P, L] int64; of TRL's reference also, where it was precomputed,
        ref_chosen_logps and ref_rejected_logps: [P] float32.
    """
    found: dict[str, list[torch.Tensor]] = {"input_ids": [], "attention_mask": [], "completion_mask": []}
    for side in ("chosen", "rejected"):
        for pair in pairs:
            ids = torch.tensor(pair["prompt_ids"] + pair[f"{side}_ids"])
            found["input_ids"].append(ids)
            found["attention_mask"].append(torch.ones_like(ids))
            found["completion_mask"].append(torch.tensor(pair["prompt_mask"] + pair[f"{side}_mask"]))
    # Padding is masked, so its id means nothing.
    batch = {name: pad_sequence(values, batch_first=True) for name, values in found.items()}
    precomputed = [name for name in ("ref_chosen_logps", "ref_rejected_logps") if name in pairs[0]]
    return batch | {name: torch.tensor([pair[name] for pair in pairs]) for name in precomputed}

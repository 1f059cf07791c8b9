"""Is the exported model still ours? Recall at length through both, and the distance of their logits.

Recall alone would pass a slightly wrong model, and says nothing of a model that recalls nothing; logits of a short
prompt pass a wrong RoPE theta. Together, at several lengths, they do not.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from smolpost.data.tasks import recall_row
from smolpost.errors import UserError
from smolpost.evaluation.scores import aggregate
from smolpost.evaluation.task import Context, Item, Measurement
from smolpost.evaluation.tasks.recall import RecallTask
from smolpost.evaluation.tasks.ruler import RulerTask
from smolpost.export.session import CHUNK, GreedyEngine, Session, TorchSession
from smolpost.inference.engine import Engine
from smolpost.inference.local import LocalEngine
from smolpost.model.loading import load_model
from smolpost.schema import RELEASE_DAY

# The last tokens of a prompt are fed one by one, as a reply's are: a broken cache shows.
DECODED = 8
# Below it, equal recall on both sides proves nothing: it may be chance.
TELLING_RECALL = 0.5
NAME = "export"  # of the task, in its messages


@dataclass(frozen=True)
class Limits:
    """What an export may differ by.

    Attributes:
        recall: Largest drop of recall at any length, in [0, 1].
        logits: Largest difference of a logit for weights in fp32, nats. For 16-bit weights the limit is `rounding`
            times what our own model's logits move by when it runs in that dtype, or this, whichever is more.
        rounding: See `logits`; above 1, because runtimes round in other places than torch.
    """

    recall: float = 0.02
    logits: float = 0.01
    rounding: float = 3.0


LIMITS = Limits()


class LengthCheck(NamedTuple):
    """What both models are asked at one length."""

    task: Measurement
    items: list[Item]


def ask(
    tokenizer: PreTrainedTokenizerBase, lengths: list[int], *, num_prompts: int, seed: int
) -> dict[int, LengthCheck]:
    """Recall by length: keys and values where a character is a token, RULER's needles among needles elsewhere.

    Args:
        lengths: Tokens of prompt and answer.
    Raises:
        UserError: A length cannot hold a prompt.
    """
    context = Context(today=RELEASE_DAY, seed=seed, rows=lambda name: [])
    text = recall_row(np.random.default_rng(0), length=200, pairs=8, queries=8)["messages"][1]["content"]
    by_characters = len(tokenizer.encode(text, add_special_tokens=False)) == len(text)
    asked = {}
    try:
        for length in lengths:
            shared = {"lengths": [length], "num_prompts": num_prompts}
            if by_characters:
                task = RecallTask(**shared).build(NAME, context)
            else:
                task = RulerTask(tasks=["niah_multikey_1"], **shared).build(NAME, context)
            asked[length] = LengthCheck(task, task.items(tokenizer))
    except UserError as error:  # the tasks know a recipe's keys
        raise UserError(str(error).replace(f"evaluation.tasks.{NAME}.", "--")) from None
    return asked


def compare(
    ours: PreTrainedModel,
    exported: Session,
    tokenizer: PreTrainedTokenizerBase,
    asked: dict[int, LengthCheck],
    *,
    dtype: str = "float32",
    limits: Limits = LIMITS,
) -> dict[str, Any]:
    """Ask both models the same.

    Args:
        ours: The checkpoint's model in fp32.
        exported: The same in another runtime.
        asked: Length in tokens -> a task whose headline metric is the recall, in [0, 1], and its items.
        dtype: Of the exported weights.
    Returns:
        "lengths": for each length `ours` and `exported` (recall), `num_prompts`, `logit_difference` (largest absolute
        one on the first prompt), `rounding` (the same of our own model in `dtype`) and `logit_limit`; "limits";
        "stop_tokens": ids at which replies of `ours` end, and of `exported` as its runtime reads the folder;
        "failures": a sentence for each limit that was passed; "notes": what the numbers do not show.
    """
    rounded = None if dtype == "float32" else load_model(Path(ours.name_or_path), dtype=dtype)
    local = LocalEngine(ours, tokenizer)
    stops = local.stop_tokens if exported.stop_tokens is None else exported.stop_tokens
    engines = {"ours": local, "exported": GreedyEngine(exported, tokenizer, stops)}
    lengths, failures = {}, []
    if unknown := [token for token in local.stop_tokens if token not in stops]:
        names = ", ".join(map(str, tokenizer.convert_ids_to_tokens(unknown)))
        failures.append(f"it does not stop at {names} (ids {unknown}), as the checkpoint does")
    for length, (task, items) in asked.items():
        found = {side: _recall(task, engine, items) for side, engine in engines.items()}
        ids = items[0].ids
        rounding = 0.0 if rounded is None else logit_difference(ours, TorchSession(rounded), ids)
        row = {
            **found,
            "num_prompts": len(items),
            "logit_difference": logit_difference(ours, exported, ids),
            "rounding": rounding,
            "logit_limit": max(limits.logits, limits.rounding * rounding),
        }
        lengths[length] = row
        if row["ours"] - row["exported"] > limits.recall:
            failures.append(
                f"recall at {length} tokens is {row['exported']:.3f} and {row['ours']:.3f} in our model (limit: "
                f"{limits.recall:g} less)"
            )
        if not row["logit_difference"] <= row["logit_limit"]:  # NaN fails too
            failures.append(
                f"logits at {length} tokens differ by {row['logit_difference']:.3g} (limit: {row['logit_limit']:.3g})"
            )
    notes = []
    if all(row["ours"] < TELLING_RECALL for row in lengths.values()):
        notes.append(
            f"our model's recall is below {TELLING_RECALL:g} at every length: recall shows nothing here, only the "
            "logits were compared"
        )
    limit = {"recall": limits.recall, "logits": limits.logits, "rounding": limits.rounding}
    stop_tokens = {"ours": local.stop_tokens, "exported": exported.stop_tokens and sorted(exported.stop_tokens)}
    return {"lengths": lengths, "limits": limit, "stop_tokens": stop_tokens, "failures": failures, "notes": notes}


def _recall(task: Measurement, engine: Engine, items: list[Item]) -> float:
    """The task's headline metric."""
    samples = [sample for item in items for sample in task.measure(engine, [item])]
    [score] = [score["value"] for metric, score in aggregate(samples).items() if "/" not in metric]
    return score


def logit_difference(ours: PreTrainedModel, exported: Session, ids: list[int]) -> float:
    """Largest absolute difference of a logit over all positions of a prompt; NaN where either side has one.

    Ours come from one forward pass without a cache, so that nothing of what is checked checks itself.
    """
    exported.reset()
    with torch.no_grad():
        rows = torch.tensor([ids], device=ours.device)
        hidden = ours.model(input_ids=rows, use_cache=False).last_hidden_state[0]  # [L, H]
    head, largest, done = ours.get_output_embeddings(), 0.0, 0
    while done < len(ids):
        left = len(ids) - done - DECODED
        size = min(CHUNK, left) if left > 0 else 1
        theirs = torch.from_numpy(np.ascontiguousarray(exported.feed(ids[done : done + size])))  # [L, V]
        with torch.no_grad():
            mine = head(hidden[done : done + size]).float().cpu()
        # A runtime may pad the vocabulary.
        difference = (mine - theirs[:, : mine.shape[1]]).abs().max().item()
        if not np.isfinite(difference):
            return float("nan")
        largest, done = max(largest, difference), done + size
    return largest


def refuse_failed(report: dict[str, Any], kind: str) -> None:
    """
    Raises:
        UserError: A limit was passed.
    """
    if report["failures"]:
        raise UserError(
            f"the {kind} export is not the checkpoint: {'; '.join(report['failures'])}; nothing was written"
        )

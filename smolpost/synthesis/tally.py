"""What the filters did to lengths and labels: whether the rows are shorter or longer than what was dropped.

A filter for right or finished replies also favours some lengths, and a preference for the longer side of each pair
teaches length (Singhal et al. 2023, arXiv:2310.03716; Park et al. 2024, arXiv:2403.19159).
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from smolpost.chat.render import text_of
from smolpost.synthesis.filters import ANSWER_LABEL
from smolpost.synthesis.filters.form import BYTES_PER_TOKEN, tokens_of
from smolpost.synthesis.records import Message, Outcome

BINS = 8  # for each doubling of a length, so that a median is right to within 5%
# From where warnings begin; our own choice. At 0.8, "the longer one" would be the right guess for 4 of 5 pairs.
LONGER_SHARE, MEAN_RATIO, CUT_SHARE = 0.8, 2.0, 0.05
FEWEST = 50  # pairs or replies that say something of all


class Spread:
    """Number, mean and median of lengths, in memory that does not grow with their number."""

    def __init__(self):
        self.count, self.total = 0, 0.0
        self.bins: Counter[int] = Counter()

    def add(self, length: float) -> None:
        self.count += 1
        self.total += length
        self.bins[int(BINS * math.log2(1 + length))] += 1

    def mean(self) -> float | None:
        return self.total / self.count if self.count else None

    def median(self) -> float | None:
        """The middle of the bin that holds the lower median."""
        left = (self.count + 1) // 2
        for bin in sorted(self.bins):
            left -= self.bins[bin]
            if left <= 0:
                return 2 ** ((bin + 0.5) / BINS) - 1
        return None

    def report(self) -> dict[str, float | None]:
        return {"count": self.count, "mean": self.mean(), "median": self.median()}


class _Counts:
    """Of one source."""

    def __init__(self):
        self.replies: dict[str, dict[bool, Spread]] = {}  # role -> whether they became rows -> tokens
        self.cut: Counter[str] = Counter()
        self.sides = {side: Spread() for side in ("chosen", "rejected")}
        self.chosen_longer = 0.0
        self.labels: Counter[bool] = Counter()


class Tally:
    """Lengths of replies and sides, in all and by source. Fed one outcome at a time."""

    def __init__(self):
        self.total = _Counts()
        self.sources: dict[str, _Counts] = defaultdict(_Counts)

    def add(self, outcome: Outcome) -> None:
        for counts in (self.total, self.sources[outcome.prompt.source]):
            _add_replies(counts, outcome)
            _add_sides(counts, outcome.row)
            labels = (v.passed for name, v in outcome.verdicts.items() if name.endswith(ANSWER_LABEL))
            counts.labels.update(labels)

    def report(self) -> dict[str, Any]:
        """Fit for JSON.

        Returns:
            "replies": role -> "accepted" and "dropped" ("count", "mean" and "median" of tokens as the server counted
                them) and "cut", the share that was cut at the length limit. A reply is accepted if its sample became a
                row.
            "pairs": None without pairs; else "count", "chosen" and "rejected" (mean tokens, UTF-8 bytes / 4, as two
                teachers count differently) and "chosen_longer", a share in which equal lengths count half.
            "answers": None without labels; else "labelled" (number) and "right" (share).
            "sources": source -> these three.
        """
        return _report(self.total) | {"sources": {name: _report(counts) for name, counts in self.sources.items()}}


def _add_replies(counts: _Counts, outcome: Outcome) -> None:
    kept = {text_of(message.get("content")) for message in _all_turns(outcome.row)}
    for role, record in outcome.records.items():
        spreads = counts.replies.setdefault(role, {True: Spread(), False: Spread()})
        for sample in record.samples:
            became_row = bool(kept) and text_of(sample.messages[-1].get("content")) in kept
            for reply in sample.replies:
                spreads[became_row].add(tokens_of(reply))
                counts.cut[role] += reply.finish_reason == "length"


def _all_turns(row: Mapping[str, Any] | None) -> Iterable[Message]:
    return [turn for column in ("messages", "chosen", "rejected") for turn in ((row or {}).get(column) or [])]


def _add_sides(counts: _Counts, row: Mapping[str, Any] | None) -> None:
    if not row or not row.get("chosen"):
        return
    lengths = {}
    for side, spread in counts.sides.items():
        texts = (text_of(turn.get("content")) for turn in row[side] if turn["role"] == "assistant")
        lengths[side] = sum(len(text.encode("utf-8", "replace")) for text in texts) / BYTES_PER_TOKEN
        spread.add(lengths[side])
    chosen, rejected = lengths["chosen"], lengths["rejected"]
    counts.chosen_longer += (chosen > rejected) + 0.5 * (chosen == rejected)


def _report(counts: _Counts) -> dict[str, Any]:
    replies = {}
    for role, spreads in counts.replies.items():
        total = sum(spread.count for spread in spreads.values())
        cut = counts.cut[role] / total if total else None
        replies[role] = {"accepted": spreads[True].report(), "dropped": spreads[False].report(), "cut": cut}
    chosen, rejected = counts.sides["chosen"], counts.sides["rejected"]
    pairs = {
        "count": chosen.count,
        "chosen": chosen.mean(),
        "rejected": rejected.mean(),
        "chosen_longer": counts.chosen_longer / chosen.count if chosen.count else None,
    }
    labelled = counts.labels.total()
    answers = {"labelled": labelled, "right": counts.labels[True] / labelled} if labelled else None
    return {"replies": replies, "pairs": pairs if chosen.count else None, "answers": answers}


def warnings(report: Mapping[str, Any]) -> list[str]:
    """What of `Tally.report` a user should look at, a line each; of few replies or pairs nothing is said."""
    lines = []
    pairs = report["pairs"]
    if pairs and pairs["count"] >= FEWEST and abs(pairs["chosen_longer"] - 0.5) > LONGER_SHARE - 0.5:
        more = pairs["chosen_longer"] > 0.5
        share = pairs["chosen_longer"] if more else 1 - pairs["chosen_longer"]
        lines.append(
            f"chosen is {'longer' if more else 'shorter'} in {share:.0%} of {pairs['count']:,} pairs (about "
            f"{pairs['chosen']:,.1f} against {pairs['rejected']:,.1f} tokens, at {BYTES_PER_TOKEN} bytes a token): "
            "training may learn length instead of quality; set filters.max_tokens or balance the lengths"
        )
    for role, found in report["replies"].items():
        accepted, dropped = found["accepted"], found["dropped"]
        if found["cut"] is not None and found["cut"] > CUT_SHARE and accepted["count"] + dropped["count"] >= FEWEST:
            lines.append(f"{role}: {found['cut']:.0%} of the replies were cut; raise its max_new_tokens")
        if min(accepted["count"], dropped["count"]) >= FEWEST:
            short, long = sorted((accepted, dropped), key=lambda spread: spread["mean"])
            if long["mean"] > MEAN_RATIO * short["mean"]:
                lines.append(
                    f"{role}: accepted replies have {accepted['mean']:,.0f} tokens on average and dropped ones "
                    f"{dropped['mean']:,.0f}: the filters favour {'short' if short is accepted else 'long'} replies"
                )
    return lines

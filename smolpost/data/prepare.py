"""A training stage's mixture to prepared rows: tokenized in shards, chosen, fitted, packed, and accounted for."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from smolpost.chat.layout import ROLES
from smolpost.data import mixtures
from smolpost.data.hygiene import HygieneFilter, Removal, features
from smolpost.data.ledger import REFUSED, Taken, check_refused
from smolpost.data.prepare_completions import prepare_completions
from smolpost.data.prepare_documents import prepare_documents
from smolpost.data.prepare_pairs import prepare_pairs
from smolpost.data.settings import Rows
from smolpost.data.shards import Tokenize, TokenShard, shard_slices, tokenize_shards
from smolpost.data.tokens import Tokens, open_tokens
from smolpost.errors import UserError
from smolpost.progress import Progress
from smolpost.schema import Mixture, Source

#: Layout of rows -> what fits and writes them.
WRITERS = {
    "documents": prepare_documents,
    "pairs": prepare_pairs,
    "completions": prepare_completions,
    "labelled": prepare_completions,
}


def prepare(stage: Rows, mixture: Mixture, tokenizer, shards: Callable[[str], Path], folder: Path) -> dict:
    """Make the rows that a stage trains on.

    The result depends on the rows, the settings and the tokenizer, not on the number of workers. Tokenized rows stay in
    the shards, so the same call continues after a kill, and another packing does not re-tokenize.

    Args:
        tokenizer: Its chat template is the stage's.
        shards: Name of a source -> folder of its tokenized rows.
        folder: Must exist and be empty; becomes a `datasets` folder with data_report.json, rows.parquet, dropped.jsonl.
    Returns:
        The report.
    Raises:
        RefusedRows: More rows of a source are refused than the stage allows to drop.
        UserError: A setting is refused, or a source has no trained token, too many dropped rows, or another share of
            think rows than declared. The folder may then be incomplete.
    """
    check(stage)
    mixtures.check(mixture)
    taken = take(stage, mixture, tokenizer, shards)
    return WRITERS[stage.layout](stage, mixture, taken, folder)


def check(stage: Rows) -> None:
    """Refuse settings out of range.

    Raises:
        UserError: Names the setting, its value and the limit.
    """
    known = ROLES if stage.layout == "documents" else ROLES[:-1]  # a prompt does not train
    for role in stage.train_roles:
        if role not in known:
            raise UserError(f"train_roles={stage.train_roles}: {role} is not a choice; use some of {', '.join(known)}")
    if not stage.train_roles:
        raise UserError("train_roles=[] trains no token; use [assistant]")
    if not 0 <= stage.max_dropped <= 1:
        raise UserError(f"max_dropped={stage.max_dropped} is not in [0, 1], a share of a source's rows")
    if stage.num_workers is not None and stage.num_workers < 1:
        raise UserError(f"num_workers={stage.num_workers} is below 1; use null for one per core")


@dataclass
class Chosen:
    """The rows a source gives.

    Attributes:
        order: [K] its rows in order, repeats included.
        rows: [U] the same ones, ascending, each once.
        num_rows: Of the source.
    """

    order: np.ndarray
    rows: np.ndarray
    num_rows: int


def take(stage: Rows, mixture: Mixture, tokenizer, shards: Callable[[str], Path]) -> Taken:
    """Tokenize what the mixture may need, remove what hygiene finds, take what the limits allow."""
    chosen, jobs = {}, []
    for name, source in mixture.sources.items():
        parts = shard_slices(source)
        num_rows = sum(part.num_rows for part in parts)
        order = mixtures.choose(source, name, mixture.seed, num_rows)
        chosen[name] = Chosen(order, np.unique(order), num_rows)
        jobs += shards_of(source, parts, chosen[name].rows, shards(name))
    checker = compare = None
    if HygieneFilter.needed(mixture.hygiene):
        checker = HygieneFilter(mixture.hygiene, key="hygiene")
        compare = partial(features, settings=mixture.hygiene)
    num_workers = stage.num_workers or len(os.sched_getaffinity(0))
    tokenize_shards(jobs, Tokenize(stage, tokenizer, compare), num_workers, f"tokenize {stage.data}")
    tokens = open_tokens([job.file for job in jobs])
    removed = {row: Removal(REFUSED, fault) for row, fault in tokens.faults.items()}
    if checker:
        removed |= remove(checker, tokens)
    return select(stage, mixture, chosen, tokens, removed, checker.searched if checker else {})


def shards_of(source: Source, parts: list, rows: np.ndarray, folder: Path) -> list[TokenShard]:
    """The shards of a source's slices that have chosen rows.

    Args:
        rows: [U] chosen rows of the source, ascending.
    """
    edges = np.searchsorted(rows, [part.first for part in parts] + [np.iinfo(np.int64).max])
    found = []
    for part, start, stop in zip(parts, edges[:-1], edges[1:], strict=True):
        if stop > start:
            found.append(TokenShard(folder, source, part, rows[start:stop] - part.first))
    return found


def remove(checker: HygieneFilter, tokens: Tokens) -> dict[int, Removal]:
    """Row of tokens -> why hygiene removes it; the first of a set of duplicates is kept."""
    removed = {}
    with Progress("hygiene", len(tokens), "row") as progress:
        for row, found in enumerate(tokens.features):
            if row not in tokens.faults and (removal := checker.check(found.as_py(), tokens.where(row))):
                removed[row] = removal
            progress.update()
    return removed


def select(
    stage: Rows,
    mixture: Mixture,
    chosen: dict[str, Chosen],
    tokens: Tokens,
    removed: dict[int, Removal],
    searched: dict,
) -> Taken:
    """The mixture's rows in its order, as rows of tokens."""
    first, kept, lost = 0, {}, {}
    source = np.empty(len(tokens), np.int32)
    is_removed = np.zeros(len(tokens), bool)
    is_removed[list(removed)] = True
    for i, (name, rows) in enumerate(chosen.items()):
        places = first + np.searchsorted(rows.rows, rows.order)
        source[first : first + len(rows.rows)] = i
        kept[name], lost[name] = places[~is_removed[places]], places[is_removed[places]]
        if not len(kept[name]):
            faults = [tokens.faults[row] for row in places.tolist() if row in tokens.faults]
            check_refused(stage, name, len(places), faults)
            raise UserError(
                f"source {name}: hygiene removes all of its {len(places)} rows; loosen it or drop the source"
            )
        first += len(rows.rows)
    counts = mixtures.within_shares(mixture, {name: tokens.lengths()[places] for name, places in kept.items()})
    pooled = np.concatenate([kept[name][: counts[name]] for name in kept])
    return Taken(
        names=list(chosen),
        tokens=tokens,
        source=source,
        rows=pooled[mixtures.order(mixture, counts)],
        removed={row: (removal.reason, removal.detail) for row, removal in removed.items()},
        removed_rows=np.concatenate(list(lost.values())),
        available={name: rows.num_rows for name, rows in chosen.items()},
        searched=searched,
    )

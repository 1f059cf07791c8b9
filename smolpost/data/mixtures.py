"""A mixture: weighted sources, each subsampled separately, then shuffled together."""

from dataclasses import replace

import numpy as np

from smolpost.data.columns import as_row
from smolpost.data.rows import Row
from smolpost.data.sources import read_rows
from smolpost.data.turns import CALL_ROLES, ROLES
from smolpost.data.validate import validate_row
from smolpost.errors import UserError
from smolpost.schema import Hygiene, Mixture, Source


def mix(mixture: Mixture, refused: list[str] | None = None, *, replies: bool = True) -> list[tuple[str, Row]]:
    """All rows of a mixture in memory, each with its source's name: for vocabularies, prompts and held-out rows.

    A weight of 1 takes a source's rows in file order. Any other weight shuffles them and takes round(weight * rows);
    above 1, the shuffled order repeats. The rows of a source depend only on the seed and its name. The order of the
    mixture depends on the set of sources, not on the order in which they are declared.

    Args:
        refused: Gets the reasons of refused rows, which are then left out; None: the first refused row is an error.
        replies: As `validate_row`.
    Raises:
        UserError: A setting is out of range or needs tokens, a weight keeps no row, or a row is refused.
    """
    check(mixture)
    if mixture.hygiene != Hygiene():
        raise UserError(
            "hygiene applies to tokenized rows of training stages, and this mixture is read as text; remove it"
        )
    for name, source in mixture.sources.items():
        for key in ("max_tokens", "share"):
            if getattr(source, key) is not None:
                raise UserError(
                    f"sources.{name}.{key} counts what training stages tokenize, and this mixture is read as text; "
                    "use max_rows or weight"
                )
    taken = {
        name: take(source, name, mixture.seed, refused, replies=replies) for name, source in mixture.sources.items()
    }
    rows = [(name, row) for name, found in taken.items() for row in found]
    return [rows[i] for i in order(mixture, {name: len(found) for name, found in taken.items()})]


def rows_alone(mixture: Mixture) -> Mixture:
    """The mixture without what only training stages read: a vocabulary is built before there are tokens to count."""
    plain = Source()
    training_only = {key: getattr(plain, key) for key in ("max_tokens", "share", "loss_weight", "think_share")}
    sources = {name: replace(source, **training_only) for name, source in mixture.sources.items()}
    return replace(mixture, sources=sources, hygiene=Hygiene())


def take(source: Source, name: str, seed: int, refused: list[str] | None = None, *, replies: bool = True) -> list[Row]:
    """The rows of one source by its weight; the arguments are those of `mix`."""
    rows = []
    for _, row in read_rows(source, faults=True):
        try:
            own = as_row(row, source)
            validate_row(own, row.where, replies=replies)
        except UserError as error:
            if refused is None:
                raise
            refused.append(str(error))
        else:
            rows.append(own)
    if not rows:
        raise UserError(refused[-1])
    return [rows[i] for i in choose(source, name, seed, len(rows))]


def check(mixture: Mixture) -> None:
    """
    Raises:
        UserError: A setting is out of its range.
    """
    if mixture.seed < 0:
        raise UserError(f"seed={mixture.seed} of a mixture is below 0; use 0 or more")
    if not mixture.sources:
        raise UserError("a mixture has no sources; give at least one")
    for name, source in mixture.sources.items():
        for role, ours in source.roles.items():
            if ours not in (*ROLES, *CALL_ROLES):
                raise UserError(
                    f"sources.{name}.roles.{role}={ours} is not a role; use one of {', '.join((*ROLES, *CALL_ROLES))}"
                )
        if not source.weight > 0:
            raise UserError(f"sources.{name}.weight={source.weight} is not above 0; raise it or remove the source")
        if not source.loss_weight > 0:
            raise UserError(
                f"sources.{name}.loss_weight={source.loss_weight} is not above 0; raise it or remove the source"
            )
        if source.max_row_bytes < 1:
            raise UserError(f"sources.{name}.max_row_bytes={source.max_row_bytes} is below 1; raise it")
        if source.max_tokens is not None and source.max_tokens < 1:
            raise UserError(f"sources.{name}.max_tokens={source.max_tokens} is below 1; raise it, or null for no limit")
        if source.think_share is not None and not 0 <= source.think_share <= 1:
            raise UserError(f"sources.{name}.think_share={source.think_share} is not in [0, 1]; null leaves it open")
    shares = {name: source.share for name, source in mixture.sources.items() if source.share is not None}
    if shares and len(shares) < len(mixture.sources):
        without = ", ".join(name for name in mixture.sources if name not in shares)
        raise UserError(
            f"sources {without} have no share, but other sources have one; give a share to all sources, or to none"
        )
    if shares and (min(shares.values()) <= 0 or abs(sum(shares.values()) - 1) > 1e-6):
        raise UserError(f"the sources' shares {shares} are not all above 0 with a sum of 1; change them")


def choose(source: Source, name: str, seed: int, num_rows: int) -> np.ndarray:
    """[K] the rows that a source gives, of num_rows, in its order.

    Raises:
        UserError: The weight keeps none.
    """
    if source.weight == 1:
        return np.arange(num_rows)
    count = round(source.weight * num_rows)
    if not count:
        raise UserError(
            f"sources.{name}.weight={source.weight} keeps none of {num_rows} rows; "
            f"raise it to {1 / num_rows:.2g} or more, or remove the source"
        )
    return np.resize(np.random.default_rng([seed, *name.encode()]).permutation(num_rows), count)


def within_shares(mixture: Mixture, sizes: dict[str, np.ndarray]) -> dict[str, int]:
    """How many rows of each source are taken, from its first on.

    A source ends before the row that would exceed its max_tokens. Shares then cut all sources except the scarcest,
    which is used completely: each of the others gives the number of rows that comes nearest to its share.

    Args:
        sizes: Source -> [K] tokens of its rows, in its order.
    Raises:
        UserError: A limit leaves a source no row.
    """
    counts = {}
    for name, lengths in sizes.items():
        limit = mixture.sources[name].max_tokens
        counts[name] = len(lengths) if limit is None else int(np.searchsorted(np.cumsum(lengths), limit, side="right"))
        if not counts[name]:
            raise UserError(
                f"sources.{name}.max_tokens={limit} is below the {lengths[0]} tokens of its first row; raise it"
            )
    shares = {name: mixture.sources[name].share for name in sizes}
    if None in shares.values():
        return counts
    units = {name: np.ones_like(s) if mixture.share_of == "rows" else s for name, s in sizes.items()}
    ends = {name: np.cumsum(units[name][: counts[name]]) for name in sizes}
    whole = min(ends[name][-1] / shares[name] for name in sizes)
    for name, end in ends.items():
        counts[name] = int(np.abs(end - shares[name] * whole).argmin()) + 1
    return counts


def order(mixture: Mixture, counts: dict[str, int]) -> np.ndarray:
    """[M] the mixture's order, as indices into the rows of all sources, joined in the order of declaration."""
    ends = dict(zip(counts, np.cumsum(list(counts.values())), strict=True))
    if not mixture.shuffle:
        return np.arange(sum(counts.values()))
    # By name, so that the order in which sources are declared changes nothing.
    pooled = np.concatenate([np.arange(ends[name] - counts[name], ends[name]) for name in sorted(counts)])
    return pooled[np.random.default_rng(mixture.seed).permutation(len(pooled))]

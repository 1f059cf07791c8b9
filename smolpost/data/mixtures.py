"""A mixture: weighted sources, each subsampled by itself, then shuffled together."""

import numpy as np

from smolpost.data.sources import Row, read_rows, validate_row
from smolpost.errors import UserError
from smolpost.schema import Mixture, Source


def mix(mixture: Mixture) -> list[tuple[str, Row]]:
    """All rows of a mixture, each with its source's name.

    A weight of 1 takes a source's rows in file order; any other takes round(weight * rows) of them after a shuffle,
    repeating that order where the weight is above 1. Which rows a source gives depends on the seed and its own name
    alone, and the shuffled order on the set of sources, not on the order in which they are declared.

    Raises:
        UserError: A weight or the seed is out of range, a weight keeps no row, or a row is refused.
    """
    if mixture.seed < 0:
        raise UserError(f"seed={mixture.seed} of a mixture is below 0; use 0 or more")
    if not mixture.sources:
        raise UserError("a mixture has no sources; give at least one")
    taken = {name: take(source, name, mixture.seed) for name, source in mixture.sources.items()}
    if not mixture.shuffle:
        return [(name, row) for name, rows in taken.items() for row in rows]
    pooled = [(name, row) for name in sorted(taken) for row in taken[name]]
    return [pooled[i] for i in np.random.default_rng(mixture.seed).permutation(len(pooled))]


def take(source: Source, name: str, seed: int) -> list[Row]:
    """The rows of one source by its weight."""
    if not source.weight > 0:
        raise UserError(f"sources.{name}.weight={source.weight} is not above 0; raise it or remove the source")
    rows = []
    for _, row in read_rows(source):
        validate_row(row, row.where)
        rows.append(row)
    if source.weight == 1:
        return rows
    count = round(source.weight * len(rows))
    if not count:
        raise UserError(
            f"sources.{name}.weight={source.weight} keeps none of {len(rows)} rows; "
            f"raise it to {1 / len(rows):.2g} or more, or remove the source"
        )
    order = np.random.default_rng([seed, *name.encode()]).permutation(len(rows))
    return [rows[i] for i in np.resize(order, count)]

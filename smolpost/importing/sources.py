"""Datasets of other tools as sources of a mixture."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from smolpost.importing.draft import Draft, name_of
from smolpost.importing.keys import Keys, brief, tidy

BUILDERS = ("json", "parquet", "arrow", "csv", "text")  # names in the place of a path: of the kind of `data_files`
_SLICE = re.compile(r"([\w.-]+)\[(\d*):(\d*)\]")


class Sources:
    """The sources of the draft's one mixture.

    Args:
        mixture: Its name under `data`.
        held_out: Share of the rows that the tool keeps for evaluation and does not train on.
    """

    def __init__(self, draft: Draft, mixture: str, held_out: float = 0.0):
        self.draft, self.mixture, self.held_out = draft, mixture, held_out
        self.names: list[str] = []

    def add(
        self,
        where: str,
        path: str,
        *,
        files: Any = None,
        folder: str | None = None,
        subset: str | None = None,
        split: str = "train",
        weight: float = 1.0,
        note: str = "",
        more: Sequence[str] = (),
        **fields: Any,
    ) -> None:
        """Write a source, or one for each of its files.

        Args:
            where: The key of the file that names it.
            path: Hub id, file, folder, or one of BUILDERS.
            files: `data_files`: a file, a list of them, or split -> these.
            folder: `data_dir`.
            split: With datasets' slices, e.g. "train[:1000]".
            weight: Share of the rows that is kept.
            more: Further keys that are about it.
            fields: Further fields of a source; None and empty ones are left out.
        """
        paths = self._paths(where, path, files, folder, split.partition("[")[0])
        if len(paths) > 1 and fields.get("share"):
            fields["share"] = tidy(fields["share"] / len(paths))
            self.draft.differs(where, "its share is divided equally among its files")
        weight_left = tidy(weight * (1 - self.held_out))
        for place in paths:
            own, name = split, split.partition("[")[0]
            if place != path or Path(place).is_file():
                own, limits = self._limits(where, split)
                fields |= limits
            stem = Path(place).name.partition(".")[0] if name.startswith("train") else name
            source = {"path": place, "subset": subset, "split": own if own != "train" else None, **fields}
            source["weight"] = weight_left if weight_left != 1 else None
            given = {key: value for key, value in source.items() if value not in (None, "", {})}
            ours = f"data.{self.mixture}.sources.{self._unique(name_of(stem))}"
            self.draft.set(ours, given, where, *more, note=note)
            if "://" in place:
                self.draft.differs(where, "rows are read from local files and the Hub; copy them here first")

    def _paths(self, where: str, path: str, files: Any, folder: str | None, split: str) -> list[str]:
        if isinstance(files, dict):
            files = files.get(split) or next(iter(files.values()), None)
        chosen = [str(file) for file in files] if isinstance(files, list) else [str(files)] if files else []
        if path in BUILDERS:
            if path in ("csv", "text"):
                self.draft.differs(where, "CSV and text files are not read; convert them to JSONL or Parquet")
            return [str(Path(folder or "") / file) for file in chosen] or [folder or path]
        if Path(path).is_dir():
            return [str(Path(path) / (folder or "") / file) for file in chosen] or [str(Path(path) / (folder or ""))]
        if chosen or folder:
            self.draft.differs(where, "data_files and data_dir of a Hub dataset cannot be chosen; its split is read")
        return [path]

    def _limits(self, where: str, split: str) -> tuple[str, dict[str, int]]:
        """Files have one split, and a slice of it is said by first_row and max_rows."""
        found = _SLICE.fullmatch(split)
        if found is None:
            if "[" in split:
                self.draft.differs(where, f"the slice {split} of a file is not read; set first_row and max_rows")
            return "train", {}
        first, end = int(found[2] or 0), int(found[3]) if found[3] else None
        limits = {"first_row": first} if first else {}
        return "train", limits | ({"max_rows": end - first} if end is not None and end > first else {})

    def _unique(self, name: str) -> str:
        number, unique = 1, name
        while unique in self.names:
            number += 1
            unique = f"{name}_{number}"
        self.names.append(unique)
        return unique


def held_out(draft: Draft, name: str) -> float:
    """The share of rows that a key keeps for evaluation; 0 where it says none, or a number of rows."""
    size = draft.keys.take(name, float, 0.0)
    if 0 < size < 1:
        draft.left_out(name, "the held-out share is subtracted from the sources' weights, and is not evaluated")
        return size
    if size:
        draft.differs(name, "a number of held-out rows cannot be set here; all rows train")
    elif draft.keys.given(name):
        draft.left_out(name, "no row is held out, as here")
    return 0.0


def shares(fractions: list[float]) -> list[float]:
    """Fractions as shares with a sum of 1."""
    return [tidy(fraction / sum(fractions)) for fraction in fractions]


def unread(draft: Draft, entry: Keys, known: dict[str, str]) -> None:
    """Say what becomes of a dataset's keys that were not read: known ones, and the rest."""
    for name in entry.unread():
        if name in known:
            entry.read.add(name)
            draft.left_out(f"{entry.where}{name}: {brief(entry.values[name])}", known[name])
    draft.unknown(entry, [*known, *entry.read], f"{draft.tool} has no such key of a dataset")

"""Rows to a prepared folder, as `smolpost prepare` does it, without a pipeline around."""

import json
from pathlib import Path

import datasets

from smolpost.data.prepare import prepare
from smolpost.schema import Mixture, Source


def prepared(stage, rows, tokenizer, folder: Path, settings: dict | None = None, **mixture):
    """(dataset, report) of rows that are dicts of the source `only`, or (source, row); in order, source by source.

    Args:
        folder: Exists; the sources' files, the tokenized rows and, in `rows`, the prepared ones come to lie in it.
        settings: Source -> further fields of it.
        mixture: Further fields of the mixture.
    """
    by_source: dict[str, list[dict]] = {}
    for row in rows:
        name, content = row if isinstance(row, tuple) else ("only", row)
        by_source.setdefault(name, []).append(content)
    sources = {}
    for name, contents in by_source.items():
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(content) + "\n" for content in contents))
        sources[name] = Source(path=str(file), **(settings or {}).get(name, {}))
    (out := folder / "rows").mkdir()
    mixed = Mixture(sources=sources, **{"shuffle": False} | mixture)
    report = prepare(stage, mixed, tokenizer, lambda name: folder / "tokenized" / name, out)
    return datasets.load_from_disk(str(out)), report

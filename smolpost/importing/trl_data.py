"""Datasets of TRL's and alignment-handbook's settings."""

from smolpost.errors import UserError
from smolpost.importing.draft import Draft
from smolpost.importing.keys import Keys
from smolpost.importing.sources import Sources, held_out, shares, unread
from smolpost.screen import shown

COLUMNS = (
    "columns are read by what they mean, also those that the list leaves out; rows with chat_template_kwargs or tools "
    "that it leaves out would render otherwise"
)
SMOLTALK2 = "HuggingFaceTB/smoltalk2"


def datasets(draft: Draft, mixture: str) -> bool:
    """Write the mixture.

    Args:
        mixture: Its name under `data`.
    Returns:
        Whether the file says that its rows are prompts and completions.
    Raises:
        UserError: The file names no dataset.
    """
    keys = draft.keys
    for key, read in (("dataset_mixture", _mixture), ("dataset_mixer", _mixer), ("datasets", _datasets)):
        if keys.given(key):
            if keys.given("dataset_name"):
                keys.take("dataset_name", str)
                draft.broken("dataset_name", f"{draft.tool} reads {key} and ignores it")
            return read(draft, mixture)
    if keys.given("test_split_size"):
        keys.take("test_split_size", float)
        draft.broken("test_split_size", "TRL reads it beside datasets alone; no row is held out")
    if not keys.given("dataset_name"):
        raise UserError(f"{shown(draft.file)}: names no dataset; add dataset_name, or datasets with a path for each")
    more = [name for name in ("dataset_config", "dataset_train_split", "dataset_text_field") if keys.given(name)]
    Sources(draft, mixture).add(
        "dataset_name",
        keys.take("dataset_name", str),
        subset=keys.take("dataset_config", str),
        split=keys.take("dataset_train_split", str, "train"),
        rename=_text(draft),
        more=more,
    )
    return False


def _text(draft: Draft) -> dict[str, str]:
    """`rename` for the column that has a row's text."""
    name = "dataset_text_field" if draft.keys.given("dataset_text_field") else "text_column"
    column = draft.keys.take(name, str, "text")
    return {column: "text"} if column != "text" else {}


def _datasets(draft: Draft, mixture: str) -> bool:
    """TRL's `datasets`."""
    entries = draft.keys.mappings("datasets")
    draft.told.add("datasets")
    fractions = [entry.take("fraction", float) for entry in entries]
    given = [fraction for fraction in fractions if fraction is not None]
    if given and len(given) < len(entries):
        raise UserError(
            f"{shown(draft.file)}: fraction is set for {len(given)} of {len(entries)} datasets; TRL wants it for all "
            "or none; give the others one"
        )
    parts = shares(given) if len(entries) > 1 and given else [None] * len(entries)
    sources, rename, found = Sources(draft, mixture, held_out(draft, "test_split_size")), _text(draft), set()
    for entry, share in zip(entries, parts, strict=True):
        found.update(_listed(draft, entry))
        sources.add(
            entry.where.removesuffix("."),
            _path(draft, entry, "path"),
            files=entry.values.get("data_files"),
            folder=entry.take("data_dir", str),
            subset=entry.take("name", str),
            split=entry.take("split", str, "train"),
            share=share,
            rename=rename,
        )
        entry.read.add("data_files")
        unread(draft, entry, {})
    if given and len(entries) > 1:
        note = "fractions are shares of the mixture's rows; the scarcest dataset is used completely, as under TRL"
        draft.set(f"data.{mixture}.share_of", "rows", "datasets", note=note)
    return "completion" in found


def _mixture(draft: Draft, mixture: str) -> bool:
    """alignment-handbook's `dataset_mixture`: a weight keeps that share of a dataset's rows after a shuffle."""
    [whole] = draft.keys.mappings("dataset_mixture") or [Keys({}, draft.file)]
    draft.told.add("dataset_mixture")
    parts = Draft(draft.file, whole, draft.tool, draft.stage, said=draft.said)
    if not (entries := whole.mappings("datasets")):
        raise UserError(f"{shown(draft.file)}: dataset_mixture has no datasets; list them with an id for each")
    sources, rename, found = Sources(draft, mixture, held_out(parts, "test_split_size")), _text(draft), set()
    for entry in entries:
        path, listed = _path(draft, entry, "id"), _listed(draft, entry)
        found.update(listed)
        sources.add(
            entry.where.removesuffix("."),
            path,
            subset=entry.take("config", str),
            split=entry.take("split", str, "train"),
            weight=entry.take("weight", float, 1.0),
            rename=rename,
        )
        _known_faults(draft, entry.where, path, listed)
        unread(draft, entry, {})
    seed = whole.take("seed", int, 0)
    draft.set(f"data.{mixture}.seed", seed, *(["dataset_mixture"] if whole.given("seed") else []))
    draft.unknown(whole, ["datasets", "seed", "test_split_size"], f"{draft.tool} has no such key")
    return "completion" in found


def _known_faults(draft: Draft, where: str, path: str, columns: list[str]) -> None:
    if "rejected" not in columns:
        return
    if "chat_template_kwargs" in columns:
        draft.broken(f"{where}columns", "TRL's DPO did not read chat_template_kwargs before 0.24: no think mode")
    if path == SMOLTALK2 and "prompt" in columns:
        draft.broken(f"{where}columns", "TRL 1.16 raises a TypeError on SmolTalk2's pairs, whose prompt is a string")


def _mixer(draft: Draft, mixture: str) -> bool:
    """alignment-handbook's older `dataset_mixer`: dataset -> share of its rows, with splits and configs for all."""
    keys = draft.keys
    mixer = keys.take("dataset_mixer", dict)
    splits = [str(name) for name in keys.take("dataset_splits", list, ["train", "test"])]
    training = [name for name in splits if "train" in name]
    if not training:
        raise UserError(f"{shown(draft.file)}: dataset_splits={splits} has no split with train in its name; add it")
    configs = keys.take("dataset_configs", list, []) or [None] * len(mixer)
    if len(configs) != len(mixer):
        raise UserError(
            f"{shown(draft.file)}: dataset_configs has {len(configs)} names for {len(mixer)} datasets; give each one"
        )
    said = [name for name in ("dataset_splits", "dataset_configs") if keys.given(name)]
    sources, rename = Sources(draft, mixture), _text(draft)
    weights = Keys(mixer, draft.file, "dataset_mixer.")
    for path, config in zip(mixer, configs, strict=True):
        weight = weights.take(str(path), float, 1.0)
        if weight:
            sources.add(
                "dataset_mixer",
                str(path),
                more=said,
                subset=config,
                split="+".join(training),
                weight=weight,
                rename=rename,
            )
        else:
            draft.left_out(f"dataset_mixer.{path}", "its share is 0")
    if any(0 < float(weight or 0) < 1 for weight in mixer.values()):
        draft.differs("dataset_mixer", "a share keeps rows by a seeded shuffle here; the handbook keeps the first ones")
    draft.set(f"data.{mixture}.seed", 42, note="the handbook's own")
    return False


def _path(draft: Draft, entry: Keys, name: str) -> str:
    path = entry.take(name, str)
    if path is None:
        raise UserError(f"{shown(draft.file)}: {entry.where}{name} has no value; name the dataset")
    return path


def _listed(draft: Draft, entry: Keys) -> list[str]:
    columns = [str(name) for name in entry.take("columns", list, [])]
    if columns:
        draft.left_out(f"{entry.where}columns", COLUMNS)
    return columns

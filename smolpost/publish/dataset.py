"""What is published of a stage of synthetic data: rows, card, counts, and the provenance of every row."""

from pathlib import Path
from typing import Any

from smolpost.files import read_json
from smolpost.publish.package import CARD, Content, Package, own_card, packed, with_license
from smolpost.synthesis.card import card, without_provenance
from smolpost.synthesis.results import FAILED_ROWS, FILTERED_ROWS, REPORT
from smolpost.synthesis.row_table import PROVENANCE_ROWS, ROWS

RAW = (PROVENANCE_ROWS, FILTERED_ROWS, FAILED_ROWS)  # hold replies as the teachers gave them
# The card, which names the file of the rows, comes first and the rows last: nothing loads in between.
ORDER = (CARD, REPORT, FAILED_ROWS, FILTERED_ROWS, PROVENANCE_ROWS, ROWS)


def is_dataset(folder: Path) -> bool:
    """Whether the folder holds synthetic data."""
    return "facts" in read_json(folder / REPORT) and (folder / ROWS).is_file()


def dataset_package(
    folder: Path,
    manifest: dict[str, Any],
    *,
    with_provenance: bool = True,
    license_id: str | None = None,
    card_file: Path | None = None,
) -> Package:
    """
    Args:
        folder: For which `is_dataset` holds.
        manifest: Of the folder.
        with_provenance: Also what the teachers replied, word by word.
        card_file: The owner's card; None: the folder's, in which its owner may have changed something.
    Raises:
        UserError: The card cannot be read.
    """
    report = read_json(folder / REPORT)
    files: dict[str, Content] = {name: folder / name for name in ORDER if with_provenance or name not in RAW}
    written = card_file or folder / CARD
    text = own_card(written) if card_file or written.is_file() else card(report)
    text = text if with_provenance else without_provenance(text)
    files[CARD] = with_license(text, license_id).encode()
    key, rows = manifest["key"], report["accepted"]
    note = "with the teachers' replies word by word; --no-provenance leaves them out"
    if not with_provenance:
        note = "without the teachers' raw replies"
    return packed("dataset", f"{rows:,} rows of key {key}", folder, manifest, files, {"key": key, "rows": rows}, [note])

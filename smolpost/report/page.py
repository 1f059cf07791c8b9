"""A prepared folder as one HTML page that needs no network: everything it shows is data inside it."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from markupsafe import Markup

from smolpost.chat.fates import MASKED, Fate
from smolpost.data.report import caption
from smolpost.report.fate_names import LEDGER, NAMES
from smolpost.report.html import as_json, check_is_ours, write_html
from smolpost.report.inspect import Prepared
from smolpost.report.prepared_units import (
    Location,
    PackedDocument,
    PreparedCompletion,
    PreparedPair,
    PreparedRow,
    TokenSequence,
)

WHAT = {"documents": "packs", "pairs": "pairs"}  # what a folder of a layout has; of others, completions
LABELS = {True: "desired", False: "undesired", None: ""}  # of a completion


def write_page(
    prepared: Prepared, file: Path, *, limit: int = 200, source: str | None = None, row: str | None = None
) -> int:
    """Write the page: the ledger, what the folder has token by token, think and no-think rows side by side.

    Args:
        file: Replaced in one step if it is such a page; its folder exists.
        limit: Packs, pairs or completions shown, at most.
        source, row: As `Prepared.find`: packs that hold such rows, with the page's search set to them.
    Returns:
        Bytes written.
    Raises:
        UserError: As `Prepared.find`, or the file cannot be written or is something else.
    """
    file = Path(file)
    check_is_ours(file)
    numbers, total = range(min(limit, len(prepared))), len(prepared)
    dropped: list[str] = []
    if source is not None or row is not None:
        rows = prepared.find(source, row)
        dropped = prepared.dropped(rows)
        numbers = list(dict.fromkeys(place.pack for place in prepared.locate(rows)))
        numbers, total = numbers[:limit], len(numbers)
    page = _Page(prepared)
    page.add(numbers)
    page.add_comparisons()
    return write_html(
        file,
        "page.html.jinja",
        prepared=prepared,
        data=page.data({"source": source or "", "row": row or ""}),
        fates=[(fate, name, page.counts[fate]) for fate, name in NAMES.items()],
        num_tokens=page.counts.total(),
        ledger=_ledger(prepared.report),
        whole=caption(prepared.report["totals"]),
        shown=len(numbers),
        total=total,
        dropped=dropped,
        what=WHAT.get(prepared.layout, "completions"),
        Fate=Fate,
        LEDGER=LEDGER,
    )


class _Page:
    """What the page's script gets: units (documents, parts of pairs or completions) as numbers into a table of tokens.

    Attributes:
        counts: Tokens of what is shown by fate; the comparisons repeat documents and are not counted.
    """

    def __init__(self, prepared: Prepared):
        self.prepared = prepared
        self.counts: Counter[int] = Counter()
        self._units: list[dict] = []
        self._groups: list[dict] = []
        self._comparisons: list[dict] = []
        self._tokens: dict[tuple[int, str], int] = {}  # (id, text) -> number in the table
        self._unit_of: dict[tuple[int, int], list[int]] = {}  # (pack, document) -> its units

    def add(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            units = []
            if self.prepared.layout == "documents":
                for document in self.prepared.pack(number).documents:
                    units += self._document(document)
            else:
                units = self._parts_at(number)
            for unit in units:
                for fate, count in self._units[unit]["runs"]:
                    self.counts[fate] += count
            self._groups.append({"number": number, "units": units})

    def add_comparisons(self) -> None:
        for source, places in self.prepared.first_by_thinking().items():
            sides = [self._units_at(places[think]) for think in (True, False)]
            if any(sides):
                self._comparisons.append({"source": source, "think": sides[0], "no_think": sides[1]})

    def data(self, search: dict[str, str]) -> Markup:
        return as_json(
            {
                "layout": self.prepared.layout,
                "what": WHAT.get(self.prepared.layout, "completions"),
                "fates": [[NAMES[fate].word, NAMES[fate].why] for fate in Fate],
                "tokens": [[i, text] for i, text in self._tokens],
                "control": [n for n, (i, _) in enumerate(self._tokens) if i in self.prepared.control_ids],
                "units": self._units,
                "groups": self._groups,
                "comparisons": self._comparisons,
                "search": search,
            }
        )

    def _units_at(self, place: Location | None) -> list[int]:
        if place is None:
            return []
        known = self._unit_of.get((place.pack, place.document))
        if known is None and self.prepared.layout == "documents":
            known = self._document(self.prepared.pack(place.pack).documents[place.document])
        elif known is None:
            known = self._parts_at(place.pack)
        return known[:2]  # of a pair: the prompt and what was chosen

    def _document(self, document: PackedDocument) -> list[int]:
        units = [self._unit(document.tokens, document.row, pack=document.pack, nth=document.index)]
        self._unit_of[document.pack, document.index] = units
        return units

    def _parts_at(self, number: int) -> list[int]:
        """The units of a pair or completion."""
        item: PreparedPair | PreparedCompletion
        item = self.prepared.pair(number) if self.prepared.layout == "pairs" else self.prepared.completion(number)
        label = LABELS[item.label] if isinstance(item, PreparedCompletion) else ""
        units = [self._unit(part, item.row, pack=number, nth=0, label=label) for part in item.parts]
        self._unit_of[number, 0] = units
        return units

    def _unit(self, tokens: TokenSequence, row: PreparedRow, **place: int | str) -> int:
        pairs = zip(tokens.ids.tolist(), self.prepared.texts(tokens.ids), strict=True)
        unit = {
            "name": tokens.name,
            "source": row.source,
            "path": row.path,
            "row": row.number,
            "row_tokens": row.tokens,
            "think": row.think,
            "first": tokens.first_position,
            "runs": [[int(fate), stop - start] for fate, start, stop in tokens.runs()],
            "tokens": [self._tokens.setdefault(pair, len(self._tokens)) for pair in pairs],
            **place,
        }
        self._units.append(unit)
        return len(self._units) - 1


def _ledger(report: dict) -> list[dict]:
    """A line per source and one for all: rows, tokens trained and masked by reason, and both as shares."""
    reasons = list(MASKED.values())
    lines = []
    for source, entry in report["sources"].items():
        masked = entry["masked"]
        reasons += [reason for reason in masked if reason not in reasons]  # one that a later version counts
        lines.append({"name": source, "entry": entry, "masked": masked, "dropped": entry["dropped"]})
    if len(lines) > 1:
        masked = {reason: sum(line["masked"].get(reason, 0) for line in lines) for reason in reasons}
        lines.append(
            {"name": "all", "entry": report["totals"], "masked": masked, "dropped": report["totals"]["dropped"]}
        )
    for line in lines:
        line["masked"] = {reason: line["masked"].get(reason, 0) for reason in reasons}
        whole = max(1, line["entry"]["tokens_trained"] + sum(line["masked"].values()))
        parts = {"trained": line["entry"]["tokens_trained"], **line["masked"]}
        line["shares"] = {reason: 100 * count / whole for reason, count in parts.items()}
    return lines

"""The page's file: what it holds, that texts stay data in it, and what it may replace."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import prepared_folders as made
import pytest
from markupsafe import escape

from smolpost.chat.fates import MASKED, Fate
from smolpost.data.report import caption
from smolpost.errors import UserError
from smolpost.report.fate_names import NAMES
from smolpost.report.inspect import Prepared
from smolpost.report.page import write_page
from tests.report.prepared_folders import HOSTILE_PATH, HOSTILE_SOURCE


class Page(HTMLParser):
    """Elements, scripts and texts of a page, read by another parser than a browser's."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.scripts, self.cells, self.legend = [], [], {}, {}
        self._inside = self._row = self._fate = None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        if tag == "script":
            self.scripts.append("")
        if tag == "tr":
            self._row = attributes.get("data-source")
        if tag == "li":
            self._fate = attributes["data-fate"]
        self._inside = (tag, attributes)

    def handle_data(self, text):
        tag, attributes = self._inside or (None, {})
        if tag == "script":
            self.scripts[-1] += text
        elif tag == "td" and "data-key" in attributes and text.strip():
            self.cells[self._row, attributes["data-key"]] = text.strip()
        elif tag == "b":
            self.legend[self._fate] = int(text.replace(",", ""))

    def handle_endtag(self, tag):
        self._inside = None

    @property
    def data(self) -> dict:
        return json.loads(self.scripts[0])


def page_of(prepared, file, **asked) -> Page:
    assert write_page(prepared, file, **asked) == file.stat().st_size
    return Page(file.read_text())


def shown(data: dict, unit: int) -> tuple[list[int], list[int], str]:
    """(ids, fates, text) of a unit of the page's data."""
    unit = data["units"][unit]
    tokens = [data["tokens"][n] for n in unit["tokens"]]
    fates = [fate for fate, length in unit["runs"] for _ in range(length)]
    return [i for i, _ in tokens], fates, "".join(text for _, text in tokens)


def test_the_page_holds_every_token_of_its_packs_once(sft, apo, tmp_path):
    for prepared, rows in [(sft[0], sft[1]), (apo[0], [[pair] for pair in apo[1]])]:
        data = page_of(prepared, tmp_path / f"{prepared.kind}.html").data
        assert [group["number"] for group in data["groups"]] == list(range(len(rows)))
        for group, members in zip(data["groups"], rows, strict=True):
            parts = [part for row in members for part in zip(row.ids, row.fates, row.parts, strict=True)]
            assert len(group["units"]) == len(parts)
            for unit, (ids, fates, segments) in zip(group["units"], parts, strict=True):
                text = "".join(text for _, text in segments)
                assert shown(data, unit) == (ids.tolist(), fates.tolist(), text)


def test_legend_and_ledger_count_as_the_data_do(sft, tmp_path):
    prepared, packs = sft
    page = page_of(prepared, tmp_path / "page.html")
    fates = np.concatenate([row.fates[0] for pack in packs for row in pack])
    assert page.legend == {name.word: int((fates == fate).sum()) for fate, name in NAMES.items()}
    for source in ("everyday", HOSTILE_SOURCE):
        own = np.concatenate([row.fates[0] for pack in packs for row in pack if row.source == source])
        assert page.cells[source, "trained"] == str((own == Fate.TRAINED).sum())
        for fate, reason in MASKED.items():
            assert page.cells[source, reason] == str((own == fate).sum())
    assert page.cells["everyday", "dropped"] == "1 overlong"
    assert page.cells["all", "tokens_read"] == f"{len(fates) + 600:,}"
    assert page.cells["all", "trained"] == str((fates == Fate.TRAINED).sum())
    lengths = prepared.report["sources"]["everyday"]["length_percentiles"]
    assert page.cells["everyday", "lengths"] == "/".join(map(str, lengths.values()))
    assert escape(caption(prepared.report["totals"])) in (tmp_path / "page.html").read_text()


def test_texts_stay_data(sft, apo, tmp_path):
    """Whatever rows, paths and names hold, the page has the elements of a page without them."""
    innocent = tmp_path / "innocent"
    plain = made.Made("s", "p", 1, False, [made.chat("hi", "hello")])
    made.write_sft(innocent, [[plain]] * 1)
    kinds = {tag for tag, _ in page_of(Prepared(innocent), tmp_path / "innocent.html").tags}
    for prepared in (sft[0], apo[0]):
        page = page_of(prepared, tmp_path / f"{prepared.kind}.html")
        assert {tag for tag, _ in page.tags} <= kinds and "img" not in kinds
        assert [tag for tag, _ in page.tags].count("script") == 2
        handlers = [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
        assert handlers == []
        text = (tmp_path / f"{prepared.kind}.html").read_text()
        assert text.lower().count("</script") == 2
        assert "\x00" not in text and "\u202e" not in text
    assert HOSTILE_PATH in {unit["path"] for unit in page_of(sft[0], tmp_path / "sft.html").data["units"]}


def test_nothing_of_the_page_lies_elsewhere(sft, tmp_path):
    page = page_of(sft[0], tmp_path / "page.html")
    for tag, attributes in page.tags:
        assert not {"src", "href", "action", "srcset"} & attributes.keys(), (tag, attributes)
    text = (tmp_path / "page.html").read_text()
    assert not re.search(r"https?://|url\(|@import|fetch\(|XMLHttpRequest|innerHTML", text)
    policy = next(attributes for _, attributes in page.tags if "http-equiv" in attributes)["content"]
    assert "default-src 'none'" in policy and "script-src 'sha256-" in policy


def test_comparisons_may_lie_outside_the_packs_shown(sft, tmp_path):
    prepared, packs = sft
    page = page_of(prepared, tmp_path / "page.html", limit=1)
    data = page.data
    assert [group["number"] for group in data["groups"]] == [0]
    assert page.legend["trained"] == sum(int((row.fates[0] == Fate.TRAINED).sum()) for row in packs[0])
    places = {
        pair["source"]: [
            [(data["units"][u]["pack"], data["units"][u]["nth"]) for u in pair[side]] for side in ("think", "no_think")
        ]
        for pair in data["comparisons"]
    }
    assert places == {"everyday": [[(2, 0)], [(0, 0)]], "tools": [[(0, 1)], []], HOSTILE_SOURCE: [[], [(1, 0)]]}


def test_packs_of_rows_that_were_asked_for(sft, tmp_path):
    data = page_of(sft[0], tmp_path / "page.html", source="tools", row="2").data
    assert [group["number"] for group in data["groups"]] == [2]
    assert data["search"] == {"source": "tools", "row": "2"}
    with pytest.raises(UserError, match=r"was dropped: data/everyday.jsonl:2 overlong"):
        write_page(sft[0], tmp_path / "other.html", row="everyday.jsonl:2")
    assert not (tmp_path / "other.html").exists()


def test_the_same_folder_gives_the_same_page(sft, tmp_path):
    for name in ("one", "two"):
        write_page(sft[0], tmp_path / f"{name}.html")
    assert (tmp_path / "one.html").read_bytes() == (tmp_path / "two.html").read_bytes()


def test_only_its_own_file_is_replaced(sft, tmp_path):
    prepared, _ = sft
    file = tmp_path / "page.html"
    write_page(prepared, file, limit=1)
    small = file.stat().st_size
    write_page(prepared, file)
    assert file.stat().st_size > small and file.stat().st_mode & 0o777 == 0o644
    file.write_text("<html>the thesis</html>")
    with pytest.raises(
        UserError, match=r"page.html exists and is not a page of `smolpost inspect`; remove it or give another name"
    ):
        write_page(prepared, file)
    assert file.read_text() == "<html>the thesis</html>"
    with pytest.raises(UserError, match=r"the folder .*none does not exist"):
        write_page(prepared, tmp_path / "none" / "page.html")
    with pytest.raises(UserError, match=r"is a folder"):
        write_page(prepared, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


def test_a_failed_write_leaves_the_old_page(sft, tmp_path, monkeypatch):
    file = tmp_path / "page.html"
    write_page(sft[0], file)
    before = file.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("smolpost.report.page.os.replace", full)
    with pytest.raises(OSError, match="No space"):
        write_page(sft[0], file, limit=1)
    assert file.read_bytes() == before and [path.name for path in tmp_path.iterdir()] == ["page.html"]

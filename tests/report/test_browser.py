"""The page in a browser: headless Chromium, driven as a reader would, from file://."""

import json
import random
import re

import prepared_folders as made
import pytest

from smolpost.chat.fates import Fate
from smolpost.report.fate_names import NAMES
from smolpost.report.inspect import Prepared
from smolpost.report.page import write_page
from tests.report.chromium import CONTRASTS, By, Keys, OpenedPage, chromium, needs_chromium
from tests.report.prepared_folders import HOSTILE, HOSTILE_SOURCE

pytestmark = needs_chromium
LONG_PACKS, LONG_TOKENS = 200, 4096


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    yield from chromium(tmp_path_factory.mktemp("chromium"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("browser")


@pytest.fixture(scope="module")
def sft(folder):
    packs = made.write_sft(folder / "sft")
    write_page(Prepared(folder / "sft"), folder / "sft.html")
    return packs


@pytest.fixture(scope="module")
def apo(folder):
    pairs = made.write_apo(folder / "apo")
    write_page(Prepared(folder / "apo"), folder / "apo.html")
    return pairs


class Opened(OpenedPage):
    """A page of prepared rows."""

    def detail(self, name: str) -> str:
        return self.run("return document.querySelector(`[data-detail=${arguments[0]}]`)?.textContent", name)

    def details(self) -> tuple[str, int, str]:
        """(text, position, where) of the selected token."""
        return json.loads(self.detail("text")), int(self.detail("position")), self.detail("in")

    def shown(self) -> list[str]:
        """Headings of the units of packs or pairs that the search leaves."""
        return self.run(
            "return [...document.querySelectorAll('#packs .unit:not([hidden]) h4')].map((h) => h.textContent)"
        )


def fill_everything(page: Opened) -> None:
    """What scrolling through the page would do, all at once."""
    page.run("for (const view of views) for (const chunk of view.chunks) fill(view, chunk)")


def test_every_token_is_a_span_that_says_what_it_is(browser, folder, sft):
    page = Opened(browser, folder / "sft.html")
    fill_everything(page)
    units = page.run(
        "return [...document.querySelectorAll('#packs .unit')].map((unit) => [...unit.querySelectorAll('.t')]"
        ".map((t) => [t.getAttribute('aria-label'), t.title, t.closest('.run').className, t.textContent]))"
    )
    rows = [row for pack in sft for row in pack]
    assert len(units) == len(rows)
    for unit, row in zip(units, rows, strict=True):
        assert len(unit) == len(row.ids[0])
        for position, (label, title, run, _) in enumerate(unit):
            name = NAMES[Fate(row.fates[0][position])]
            expected = rf'id {row.ids[0][position]}, text ".*", position {position}, {name.word}: {re.escape(name.why)}'
            assert re.fullmatch(expected, label, re.DOTALL) and title == label
            assert run == f"run f{row.fates[0][position]}"
    text = "".join(text for *_, text in units[0]).replace("↵", "").replace("␣", " ")
    assert text == "".join(text for _, text in rows[0].parts[0])


def test_the_counts_on_the_page_are_those_of_its_spans(browser, folder, sft):
    page = Opened(browser, folder / "sft.html")
    fill_everything(page)
    for fate, name in NAMES.items():
        spans = page.run(f"return document.querySelectorAll('#packs .f{fate.value} .t').length")
        legend = page.run(f"return document.querySelector('[data-fate={name.word}] b').textContent")
        assert int(legend) == spans == sum(int((row.fates[0] == fate).sum()) for pack in sft for row in pack)
    assert page.run("return document.querySelector('#found').textContent") == "6 of 6 documents"


def test_arrows_enter_and_documents(browser, folder, sft):
    page = Opened(browser, folder / "sft.html")
    page.press("n")  # the first comparison: everyday's first think document
    assert page.details() == ("<|im_start|>", 0, "pack 2, document 0, token 0 of 37")
    assert page.detail("fate").startswith("first (") and page.detail("label") == "−100"
    page.press(Keys.ARROW_RIGHT)
    assert page.details()[1] == 1 and page.detail("fate").startswith("template")
    page.press(Keys.ARROW_DOWN, Keys.ARROW_DOWN, Keys.ARROW_DOWN)  # user, template, trained
    assert page.details() == ("<think>", 20, "pack 2, document 0, token 20 of 37")
    assert page.detail("label") == page.detail("id")
    page.press(Keys.ARROW_UP)
    assert page.details()[1] == 8
    page.press(Keys.ARROW_UP, Keys.ARROW_UP, Keys.ARROW_UP, Keys.ARROW_LEFT)
    assert page.details()[1] == 0  # nothing lies before
    page.press("n")
    assert page.details()[1:] == (0, "pack 0, document 0, token 0 of 64")
    page.press(Keys.ARROW_LEFT)  # back over the border, to the last token before it
    assert page.details()[1:] == (36, "pack 2, document 0, token 36 of 37")
    page.press("p")
    assert page.details()[1:] == (36, "pack 2, document 0, token 36 of 37")  # the first document has none before
    page.press(*"nnnnn")  # everyday, tools, the hostile source, pack 0's two documents
    assert page.details()[1:] == (0, "pack 0, document 1, token 0 of 106")
    page.press("p")
    assert page.details()[1:] == (0, "pack 0, document 0, token 0 of 64")
    focused = page.run("return [document.activeElement.title, document.activeElement.getAttribute('aria-selected')]")
    assert focused[0].startswith("id ") and focused[1] == "true"
    assert page.run("return document.querySelectorAll('[aria-selected=true]').length") == 1
    assert page.run("return document.querySelectorAll('.t[tabindex=\"0\"]').length") == 1
    assert page.run("return document.querySelector('#details').getAttribute('aria-live')") == "polite"


def test_tab_reaches_the_tokens_and_enter_selects(browser, folder, sft):
    page = Opened(browser, folder / "sft.html")
    for _ in range(12):
        page.press(Keys.TAB)
        if page.run("return document.activeElement.matches('.t')"):
            break
    assert page.detail("id") is None
    page.press(Keys.ENTER)
    assert page.details()[1] == 0


def test_click_and_strip(browser, folder, sft):
    page = Opened(browser, folder / "sft.html")
    segments = page.run(
        "const text = (b, part) => b.querySelector(part).textContent;"
        "return [...document.querySelectorAll('.strip')].map((s) => [...s.children].map((b) =>"
        " [text(b, '.zero'), text(b, '.last'), b.offsetWidth, getComputedStyle(b).borderLeftWidth]))"
    )
    for strip, pack in zip(segments, sft, strict=True):
        lengths = [len(row.ids[0]) for row in pack]
        assert [segment[:2] for segment in strip] == [["0", str(length - 1)] for length in lengths]
        widths = sum(segment[2] for segment in strip)
        assert [segment[2] / widths for segment in strip] == pytest.approx(
            [n / sum(lengths) for n in lengths], abs=0.03
        )
        assert all(segment[3] == "3px" for segment in strip[1:])
    page.run("document.querySelectorAll('.strip')[2].children[0].focus()")
    page.press(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ENTER)
    assert page.details()[1:] == (0, "pack 2, document 2, token 0 of 84")
    page.run("document.querySelectorAll('#packs .unit')[1].querySelectorAll('.t')[87].click()")
    assert page.details() == ("G", 87, "pack 0, document 1, token 87 of 106")


def test_search(browser, folder, sft):
    page = Opened(browser, folder / "sft.html")
    page.press("/")
    assert page.run("return document.activeElement.id") == "text"
    page.press("snowflakes")
    assert page.shown() == ["document 2 of pack 2"]
    assert page.run("return document.querySelector('#found').textContent") == "1 of 6 documents"
    page.press(Keys.ENTER)
    assert page.details()[1] == 66 and page.details()[0] == "S"
    page.run("document.querySelector('#clear').click()")
    assert len(page.shown()) == 6
    page.write("row", "1")
    assert page.shown() == ["document 0 of pack 0", "document 1 of pack 0"]
    page.write("row", "tools.jsonl:2")
    assert page.shown() == ["document 2 of pack 2"]
    page.run("document.querySelector('#clear').click()")
    page.run(
        "const box = find('source'); box.value = arguments[0]; box.dispatchEvent(new Event('input'))",
        HOSTILE_SOURCE,
    )
    assert page.shown() == ["document 0 of pack 1"]
    assert page.run("return document.querySelectorAll('.segment.match').length") == 1
    page.write("text", "no such text")
    assert page.shown() == []
    page.press("n")  # a letter of the text, not a command
    assert page.run("return document.querySelector('#text').value") == "no such textn"


def test_the_search_comes_set_to_what_was_asked_for(browser, folder, sft):
    write_page(Prepared(folder / "sft"), folder / "asked.html", source="tools", row="2")
    page = Opened(browser, folder / "asked.html")
    assert page.shown() == ["document 2 of pack 2"]
    assert page.run("return [document.querySelector('#source').value, document.querySelector('#row').value]") == [
        "tools",
        "2",
    ]


def test_think_and_no_think_side_by_side(browser, folder, sft):
    page = Opened(browser, folder / "sft.html")
    sides = page.run(
        "return [...document.querySelectorAll('#comparisons .group')].map((group) =>"
        " [...group.querySelectorAll('.side')].map((side) =>"
        " [side.querySelector('.unit h4')?.textContent ?? null, side.getBoundingClientRect().top]))"
    )
    assert [[title for title, _ in group] for group in sides] == [
        ["document 0 of pack 2", "document 0 of pack 0"],
        ["document 1 of pack 0", None],
        [None, "document 0 of pack 1"],
    ]
    assert all(left == right for (_, left), (_, right) in sides)


def test_pairs(browser, folder, apo):
    page = Opened(browser, folder / "apo.html")
    fill_everything(page)
    for i, pair in enumerate(apo):
        parts = page.run(
            "const group = document.querySelectorAll('#packs .group')[arguments[0]];"
            "return [...group.querySelectorAll('.unit')].map((unit) => [unit.querySelector('header').textContent,"
            " unit.querySelectorAll('.t').length, unit.querySelectorAll('.f0 .t').length,"
            " unit.querySelector('.t').title, unit.getBoundingClientRect().top])",
            i,
        )
        assert [part[1] for part in parts] == [len(ids) for ids in pair.ids]
        assert [part[2] for part in parts] == [int((fates == Fate.TRAINED).sum()) for fates in pair.fates]
        assert "shared by both sides, 3 scored for both sides" in parts[0][0]
        assert parts[1][4] == parts[2][4] > parts[0][4]  # chosen and rejected beside each other, under their prompt
        for part in parts[1:]:
            assert f"position {len(pair.ids[0])}," in part[3]
    page.press("n", "n", "n")
    assert page.details()[1:] == (0, "pair 1, prompt, token 0 of 104")
    assert page.detail("scored") == "no"
    page.press(Keys.ARROW_DOWN, Keys.ARROW_DOWN, Keys.ARROW_DOWN, Keys.ARROW_DOWN)
    assert page.detail("scored") == "yes" and page.details()[1] == 101


def test_help(browser, folder, sft):
    page = Opened(browser, folder / "sft.html")
    page.press("?")
    assert page.run("return document.querySelector('#help').open")
    page.press(Keys.ESCAPE)
    assert not page.run("return document.querySelector('#help').open")


# ---------------------------------------------------------------- colours


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("kind", ["sft", "apo"])
def test_every_text_has_contrast(browser, folder, sft, apo, scheme, kind):
    page = Opened(browser, folder / f"{kind}.html", color_scheme=scheme)
    fill_everything(page)
    page.press("n", "/", "a")  # details are shown, and the search marks segments
    page.run("document.querySelector('#help').show()")
    ratios = page.run(CONTRASTS)
    assert len(ratios) > 40 and {f"SPAN t in run f{f.value}" for f in (Fate.TRAINED, Fate.USER)} <= ratios.keys()
    assert {name: ratio for name, ratio in ratios.items() if ratio < 4.5} == {}


def test_light_dark_and_the_button(browser, folder, sft):
    background = "return getComputedStyle(document.body).backgroundColor"
    seen = {}
    for scheme in ("light", "dark"):
        page = Opened(browser, folder / "sft.html", color_scheme=scheme)
        seen[scheme] = page.run(background)
    assert seen == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 23, 26)"}
    button = browser.find_element(By.ID, "theme")
    assert button.get_attribute("aria-pressed") == "true"
    button.click()
    assert page.run(background) == seen["light"] and button.get_attribute("aria-pressed") == "false"
    button.click()
    assert page.run(background) == seen["dark"]


def test_fates_differ_without_colour(browser, folder, sft):
    page = Opened(browser, folder / "sft.html")
    fill_everything(page)
    marks = page.run(
        "return [...document.querySelectorAll('.sample')].map((s) => { const style = getComputedStyle(s);"
        "const { textDecorationLine: line, textDecorationStyle: form, textDecorationThickness: width } = style;"
        "return [s.textContent, line + form + width]; })"
    )
    assert [word for word, _ in marks] == [name.word for name in NAMES.values()]
    assert len({mark for _, mark in marks}) == len(Fate)
    tags = page.run(
        "return [...document.querySelectorAll('.run')].map((run) => [run.className, run.firstChild.textContent])"
    )
    assert {(run, tag.split()[0]) for run, tag in tags} == {
        (f"run f{fate.value}", name.word) for fate, name in NAMES.items()
    }


def test_reduced_motion(browser, folder, sft):
    names = {}
    for motion in ("no-preference", "reduce"):
        page = Opened(browser, folder / "sft.html", reduced_motion=motion)
        page.press("n")
        names[motion] = page.run("return getComputedStyle(document.activeElement).animationName")
    assert names == {"no-preference": "arrive", "reduce": "none"}


# ---------------------------------------------------------------- safety, size


@pytest.mark.parametrize("kind", ["sft", "apo"])
def test_hostile_text_is_inert_and_nothing_leaves(browser, folder, sft, apo, kind):
    page = Opened(browser, folder / f"{kind}.html")
    fill_everything(page)
    page.press("n", "?", Keys.ESCAPE, "/")
    page.press("onerror", Keys.ENTER)
    assert page.run("return document.querySelectorAll('img, iframe, object, link, b[onclick]').length") == 0
    assert page.run("return document.scripts.length") == 2
    assert browser.title == f"{kind} - smolpost inspect"
    shown = page.run("return document.querySelector('#packs').textContent")
    assert HOSTILE[: HOSTILE.index("\u202e")] in shown.replace("\u200b", "")
    assert browser.get_log("browser") == []
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    requests = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert requests == [(folder / f"{kind}.html").as_uri()]


def test_the_policy_stops_a_script_of_others(browser, folder, sft):
    """Were a text ever written as markup, it still could not run."""
    page = Opened(browser, folder / "sft.html")
    page.run("document.body.insertAdjacentHTML('beforeend', `<img src='x:' onerror=\"document.title='owned'\">`)")
    page.run(
        "const s = document.createElement('script'); s.text = \"document.title = 'owned'\"; document.body.append(s)"
    )
    assert browser.title == "sft - smolpost inspect"
    assert any("Content Security Policy" in entry["message"] for entry in browser.get_log("browser"))


def test_200_packs_of_4096_tokens_stay_responsive(browser, folder):
    made.write_sft(folder / "long", long_packs())
    size = write_page(Prepared(folder / "long"), folder / "long.html", limit=LONG_PACKS)
    page = Opened(browser, folder / "long.html")
    total = page.run(
        "return data.groups.flatMap((g) => g.units).reduce((sum, n) => sum + data.units[n].tokens.length, 0)"
    )
    assert total >= LONG_PACKS * LONG_TOKENS and size < 6 * total

    def spans() -> int:
        return page.run("return document.querySelectorAll('.t').length")

    assert 0 < spans() < 0.05 * total
    timed = "const start = performance.now(); {}; return performance.now() - start"
    jump = page.run(timed.format("moveTo(views[views.length >> 1], 5)"))
    assert page.details()[1] == 5
    search = page.run(timed.format("find('text').value = 'Zebra'; search()"))
    print(f"\n{total:,} tokens: {size / 1e6:.1f} MB, jump to the middle {jump:.0f} ms, first search {search:.0f} ms")
    assert jump < 1000 and search < 5000
    assert page.shown() == [f"document 1 of pack {LONG_PACKS - 1}"]
    page.run("nextHit()")
    page.run("find('clear').click()")
    page.run("moveTo(views[views.length >> 1], 1500)")  # what is put in above it must not push it away
    for _ in range(3):
        page.wait("return new Promise((done) => requestAnimationFrame(() => setTimeout(() => done(true), 100)))")
    top = page.run("return document.activeElement.getBoundingClientRect().top / innerHeight")
    assert 0.3 < top < 0.7
    page.run("find('text').value = 'Zebra'; search(); nextHit()")
    assert page.details()[0] == "z" and page.details()[1] > LONG_TOKENS // 2 - 20
    page.run("find('clear').click()")
    for nth in range(1, 21):  # through the whole page: what was left behind lets go of its tokens
        page.run("scrollTo(0, document.documentElement.scrollHeight * arguments[0])", nth / 20)
        page.wait("return new Promise((done) => requestAnimationFrame(() => setTimeout(() => done(true), 40)))")
    assert 0 < spans() < 8000


def long_packs() -> list[list[made.Made]]:
    """Two documents of random letters a pack, in stretches of two fates; the very last one ends in a zebra."""
    draw, packs = random.Random(0), []
    for number in range(LONG_PACKS):
        halves = []
        for nth in (1, 2):
            letters = "".join(draw.choices("bcdfghjklmn\n", k=LONG_TOKENS // 2))
            segments = [(Fate(i % 64 // 32 * 2), letters[i : i + 32]) for i in range(0, len(letters), 32)]
            halves.append(made.Made("long", "data/long.jsonl", 2 * number + nth, nth == 1, [segments]))
        packs.append(halves)
    packs[-1][-1].parts[0].append((Fate.TRAINED, "zebra"))
    return packs

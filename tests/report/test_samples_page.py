"""The page of synthetic data in a browser."""

import json
import time

import pytest

from smolpost.report.samples import Samples
from smolpost.report.samples_page import write_samples_page
from tests.report.chromium import CONTRASTS, Keys, OpenedPage, chromium, needs_chromium
from tests.report.test_samples import OUTCOMES, stage
from tests.synthesis.outcomes import accepted, failed, pair

pytestmark = needs_chromium
HOSTILE = "</script><img src='x:' onerror=\"document.title='owned'\"><b onclick=1>\u202eback\x1b[31m{{ 7*7 }}"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    yield from chromium(tmp_path_factory.mktemp("chromium"))


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("samples")
    hostile = [accepted(f"h {HOSTILE}", HOSTILE, HOSTILE, f"<think>\n{HOSTILE}\n</think>\n\n{HOSTILE}")]
    write_samples_page(
        Samples(stage(folder / "traces", [*OUTCOMES, *hostile, failed("x3", HOSTILE)])), folder / "t.html"
    )
    return folder / "t.html"


class Opened(OpenedPage):
    def shown(self) -> list[str]:
        """Ids of the outcomes that the filters leave."""
        return self.run("return shownOnes().map((element) => element.getAttribute('aria-label'))")

    def choose(self, box: str, value: str) -> None:
        self.run(
            "const box = document.getElementById(arguments[0]); box.value = arguments[1];"
            "box.dispatchEvent(new Event('input'))",
            box, value,
        )  # fmt: skip

    def focused(self) -> str:
        return self.run("return document.activeElement.getAttribute('aria-label')")


def test_filters(browser, page):
    opened = Opened(browser, page)
    assert len(opened.shown()) == 12 and opened.run("return find('found').textContent") == "12 of 12 prompts"
    opened.choose("status", "filtered")
    assert opened.shown() == ["f1", "f2", "f3"]
    opened.choose("source", "code")
    assert opened.shown() == ["f2"] and opened.run("return find('found').textContent") == "1 of 12 prompts"
    opened.run("find('clear').click()")
    opened.choose("reason", "cut")
    assert opened.shown() == ["f1", "f3"]
    opened.run("find('clear').click()")
    opened.write("text", "ON AND")  # inside a folded think block
    assert opened.shown() == ["f1", "f2", "f3"]


def test_keys(browser, page):
    opened = Opened(browser, page)
    opened.press("n", "n")
    assert opened.focused() == "a2"
    opened.press("p")
    assert opened.focused() == "a1"
    is_open = "return [...document.querySelectorAll('.think')].map((block) => block.open)"
    opened.press("t")
    assert opened.run(is_open)[:2] == [True, False]
    opened.press("T")
    assert all(opened.run(is_open))
    opened.press("T")
    assert not any(opened.run(is_open))
    opened.press("/", "n")
    assert opened.run("return find('text').value") == "n"
    opened.press(Keys.ESCAPE, "?")
    assert opened.run("return find('help').open")
    opened.press(Keys.ESCAPE)
    opened.choose("text", "")
    opened.choose("reason", "wrong")
    opened.press("n")
    assert opened.focused() == "f2"


def test_think_blocks_are_folded_and_verdicts_are_words(browser, page):
    opened = Opened(browser, page)
    first = "const one = document.querySelector('.outcome');"
    assert opened.run(f"{first} return one.querySelector('summary').textContent") == "think, 12 characters"
    assert opened.run(f"{first} return one.querySelector('.think .text').checkVisibility()") is False
    assert opened.run(f"{first} return [...one.querySelectorAll('.verdicts li')].map((v) => v.textContent)") == [
        "finished ✓", "repetition ✓ 0.25",
    ]  # fmt: skip
    fault = opened.run("return document.querySelector('li.fault').textContent")
    assert fault == "finished ✗ cut"
    tokens = opened.run(f"{first} return one.querySelector('.reply').textContent.replace(/\\s+/g, ' ').trim()")
    assert tokens == "teacher: 5 tokens after 10, stop"


@pytest.mark.parametrize("width", [1400, 500])
def test_pairs_stand_side_by_side_where_there_is_room(browser, tmp_path, width):
    write_samples_page(Samples(stage(tmp_path / "pairs", [pair("p")])), tmp_path / "p.html")
    browser.set_window_size(width, 1000)
    opened = Opened(browser, tmp_path / "p.html")
    tops = opened.run("return [...document.querySelectorAll('.side')].map((side) => side.getBoundingClientRect().top)")
    browser.set_window_size(1400, 1000)
    assert len(tops) == 2 and (tops[0] == tops[1]) == (width == 1400)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_has_contrast(browser, page, scheme):
    opened = Opened(browser, page, color_scheme=scheme)
    opened.press("T")
    opened.run("document.querySelector('#help').show()")
    ratios = opened.run(CONTRASTS)
    assert len(ratios) > 20
    assert {name: ratio for name, ratio in ratios.items() if ratio < 4.5} == {}


def test_hostile_text_is_inert_and_nothing_leaves(browser, page):
    opened = Opened(browser, page)
    opened.press("T")
    assert opened.run("return document.querySelectorAll('img, iframe, object, link, b[onclick]').length") == 0
    assert opened.run("return document.scripts.length") == 1 and browser.title == "traces - smolpost inspect"
    text = opened.run("return document.querySelector('main').textContent")
    assert "{{ 7*7 }}" in text and "⟨U+202E⟩back⟨U+001B⟩[31m" in text
    assert browser.get_log("browser") == []
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    requests = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert requests == [page.as_uri()]
    opened.run("document.body.insertAdjacentHTML('beforeend', `<img src='x:' onerror=\"document.title='owned'\">`)")
    assert browser.title == "traces - smolpost inspect"


def test_200_long_replies_open_quickly(browser, tmp_path):
    answer = "<think>\n" + "Some reasoning about it. " * 1500 + "\n</think>\n\nDone."  # about 9,000 tokens
    folder = stage(tmp_path / "long", [pair(str(i), sides=(answer, answer + "!")) for i in range(200)])
    size = write_samples_page(Samples(folder), tmp_path / "long.html")
    assert size > 15e6
    began = time.monotonic()
    opened = Opened(browser, tmp_path / "long.html")
    opened.choose("text", "done.!")
    assert len(opened.shown()) == 200
    assert time.monotonic() - began < 20

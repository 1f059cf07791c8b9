"""The page of `smolpost sample` in a browser."""

import json

import pytest

from smolpost.errors import UserError
from smolpost.report.replies import Column, Given, Prompt, shown_replies
from smolpost.report.replies_page import write_replies_page
from smolpost.synthesis.records import Reply
from tests.report.chromium import CONTRASTS, Keys, OpenedPage, chromium, needs_chromium
from tests.report.test_samples_page import HOSTILE

pytestmark = needs_chromium
SETTINGS = {"temperature": 0.6, "max_new_tokens": 32}
MODELS = ("base", "mid", "sft", "apo", "merge")


def prompts() -> list[Prompt]:
    weather = {"type": "function", "function": {"name": "get_weather"}}
    asked = [[{"role": "user", "content": f"question {i}"}] for i in range(9)]
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": HOSTILE}]
    return [*(Prompt(str(i + 1), messages) for i, messages in enumerate(asked)), Prompt("tools", turns, [weather])]


def columns() -> list[Column]:
    found = []
    for model in MODELS:
        given = {}
        for mode in ("plain",) if model == "base" else ("think", "no_think"):
            for i in range(10):
                thought = f"thought {i}" if mode == "think" else None
                given[i, mode, 0] = Given(Reply(f"{model} says {i}", thought, "stop", completion_tokens=5), None)
        found.append(Column(model, f"runs/{model}", given))
    apo = found[3].replies
    apo[1, "think", 0] = Given(Reply("", "never ends", "length", False, completion_tokens=32), None)
    apo[2, "no_think", 0] = Given(None, f"refused {HOSTILE}")
    apo[3, "no_think", 0] = Given(Reply(HOSTILE, HOSTILE, "stop", completion_tokens=3), None)
    calls = [{"function": {"name": "get_weather", "arguments": '{"city": "Oslo"}'}}]
    apo[9, "think", 0] = Given(Reply("", "a tool", "tool_calls", tool_calls=calls, completion_tokens=9), None)
    apo[9, "think", 1] = Given(Reply("second sample", "b", "stop", completion_tokens=9), None)
    return found


def write(file, found=None) -> None:
    found = found or columns()
    write_replies_page(found, prompts(), shown_replies(found, prompts()), SETTINGS, file)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    yield from chromium(tmp_path_factory.mktemp("chromium"))


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    file = tmp_path_factory.mktemp("replies") / "p.html"
    write(file)
    return file


class Opened(OpenedPage):
    def choose(self, box: str, value: str) -> None:
        self.run(
            "const box = find(arguments[0]); box.value = arguments[1]; box.dispatchEvent(new Event('input'))",
            box, value,
        )  # fmt: skip

    def shown(self) -> list[str]:
        """Labels of the prompts that the filters leave."""
        return self.run("return shownSections().map((section) => section.getAttribute('aria-label'))")

    def visible(self) -> list[str]:
        """Texts of the replies that can be seen."""
        return self.run("return replies.filter((one) => one.checkVisibility()).map((one) => one.innerText)")

    def found(self) -> str:
        return self.run("return find('found').textContent")


def test_every_reply_stands_in_the_column_of_its_model(browser, page):
    opened = Opened(browser, page)
    assert opened.found() == "10 of 10 prompts, 91 replies" == f"10 of 10 prompts, {len(opened.visible())} replies"
    lefts = opened.run(
        "return [...document.querySelectorAll('.prompt')[0].querySelectorAll('.cell:not(.none)')]"
        ".map((cell) => [cell.querySelector('h5').textContent, Math.round(cell.getBoundingClientRect().left)])"
    )
    assert len(lefts) == 9 and len({left for _, left in lefts}) == 5  # five columns, whatever the mode
    assert all(len({left for name, left in lefts if name == model}) == 1 for model in MODELS)
    assert opened.run("return document.documentElement.scrollWidth <= innerWidth")
    assert "get_weather" in opened.run("return document.querySelectorAll('.question')[9].textContent")


def test_filters_of_text_mode_hint_and_model(browser, page):
    opened = Opened(browser, page)
    opened.choose("mode", "no_think")
    assert opened.found() == "10 of 10 prompts, 40 replies" and "base says 0" not in " ".join(opened.visible())
    opened.choose("hint", "thinks")
    assert opened.shown() == ["prompt 4"] and len(opened.visible()) == 1
    opened.run("find('clear').click()")
    opened.choose("hint", "open think")
    assert opened.shown() == ["prompt 2"] and "32 tokens, length cut open think empty" in " ".join(
        opened.visible()[0].split()
    )
    opened.run("find('clear').click()")
    opened.write("text", "merge says 7")
    assert opened.shown() == ["prompt 8"] and len(opened.visible()) == 2
    opened.run("find('clear').click()")
    opened.write("text", "question 3")  # a prompt shows all of its replies
    assert opened.shown() == ["prompt 4"] and len(opened.visible()) == 9
    opened.run("find('clear').click()")
    opened.run("models.slice(0, 4).forEach((box) => box.click())")
    assert len(opened.visible()) == 20 and all("merge" in text for text in opened.visible())
    width = opened.run("return document.querySelector('.cell:not([hidden]):not(.none)').getBoundingClientRect().width")
    assert width > 1000  # what is left takes the room


def test_keys(browser, page):
    opened = Opened(browser, page)
    focused = "return document.activeElement.getAttribute('aria-label')"
    opened.press("n", "n")
    assert opened.run(focused) == "prompt 2"
    opened.press("p")
    assert opened.run(focused) == "prompt 1"
    is_open = "return [...document.querySelectorAll('.think')].map((block) => block.open)"
    opened.press("t")
    assert opened.run(is_open)[:5] == [True] * 4 + [False]
    opened.press("T")
    assert all(opened.run(is_open))
    opened.press("T")
    assert not any(opened.run(is_open))
    opened.press("m")
    assert opened.run("return find('mode').value") == "plain" and len(opened.visible()) == 10
    opened.press("m", "m", "m")
    assert len(opened.visible()) == 91
    opened.press("1", "2")
    assert len(opened.visible()) == 61
    opened.press("/", "m", "1")
    assert opened.run("return find('text').value") == "m1"
    opened.press(Keys.ESCAPE, "?")
    assert opened.run("return find('help').open")


def test_narrow_windows_stack_the_models_and_paper_has_all_of_them(browser, page):
    browser.set_window_size(500, 900)
    opened = Opened(browser, page)
    tops = opened.run(
        "return [...document.querySelectorAll('.row')[1].querySelectorAll('.cell:not(.none)')]"
        ".map((cell) => cell.getBoundingClientRect().top)"
    )
    browser.set_window_size(1400, 1000)
    assert len(tops) == 4 and len(set(tops)) == 4
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    bar, widths = opened.run(
        "return [document.querySelector('.bar').checkVisibility(), document.documentElement.scrollWidth <= innerWidth]"
    )
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
    assert (bar, widths) == (False, True)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_has_contrast(browser, page, scheme):
    opened = Opened(browser, page, color_scheme=scheme)
    opened.press("T")
    opened.run("find('help').show()")
    ratios = opened.run(CONTRASTS)
    assert len(ratios) > 20
    assert {name: ratio for name, ratio in ratios.items() if ratio < 4.5} == {}


def test_hostile_text_is_inert_and_nothing_leaves(browser, tmp_path):
    found = columns()
    found[1] = found[1]._replace(name=HOSTILE)
    write(tmp_path / "h.html", found)
    opened = Opened(browser, tmp_path / "h.html")
    opened.press("T")
    assert opened.run("return document.querySelectorAll('img, iframe, object, link, b[onclick]').length") == 0
    assert opened.run("return document.scripts.length") == 1 and browser.title.endswith(" - smolpost sample")
    assert "⟨U+202E⟩back⟨U+001B⟩[31m{{ 7*7 }}" in opened.run("return document.querySelector('main').textContent")
    assert browser.get_log("browser") == []
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    requests = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert requests == [(tmp_path / "h.html").as_uri()]


def test_another_page_is_not_replaced(page, tmp_path):
    (tmp_path / "p.html").write_text("<!doctype html>")
    with pytest.raises(UserError, match="exists and is not a page of `smolpost sample`"):
        write(tmp_path / "p.html")
    write(page)  # one of its own is

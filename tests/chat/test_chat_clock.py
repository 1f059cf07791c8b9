"""A template's clock stands still: the day in the text is the recipe's, in the template's own format."""

import copy
from datetime import datetime as real_datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers.utils import chat_template_utils

from smolpost.chat.clock import FORMATS, frozen
from smolpost.chat.masks import encode, encode_pair, encode_prompt
from smolpost.chat.render import load_template, render
from smolpost.errors import UserError

USER = {"role": "user", "content": "hi"}
TURNS = [USER, {"role": "assistant", "content": "yo"}]
OTHER = [USER, {"role": "assistant", "content": "hey"}]
BODY = (
    "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{%- endif %}"
)


def rendered(template: str, today: str, **kwargs) -> str:
    return render(template, TURNS, today=today, **kwargs)


@pytest.fixture
def clock(monkeypatch):
    """Sets transformers' own clock to a day's midnight."""

    def set_to(day: str) -> None:
        class Clock(real_datetime):
            @classmethod
            def now(cls, tz=None):
                return real_datetime.fromisoformat(day)

        monkeypatch.setattr(chat_template_utils, "datetime", Clock)

    return set_to


@pytest.mark.parametrize("text", [real_datetime(2020, 1, 2).strftime(f) for f in FORMATS])
def test_the_day_is_given_in_the_format_that_is_asked_for(text):
    template = "{{ strftime_now('%d %b %Y') }} {{ strftime_now(format='%A, %-d.%-m.%y %H:%M 100%%') }}"
    assert rendered(template, text) == "02 Jan 2020 Thursday, 2.1.20 00:00 100%"


@pytest.mark.parametrize("name", ["llama3_2", "gptoss", "muse_glimmer"])
def test_a_public_template_shows_what_transformers_shows_on_that_day(bpe, clock, name):
    trl = pytest.importorskip("trl")
    stock = copy.deepcopy(bpe)
    stock.chat_template = (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text()
    clock("2020-01-02")
    expected = stock.apply_chat_template(TURNS, tokenize=False)
    assert "2020" in expected
    clock("2031-07-08")
    assert render(stock, TURNS, today="2 January 2020") == expected
    assert "2031" in stock.apply_chat_template(TURNS, tokenize=False)


@pytest.mark.parametrize("name", ["smollm3", "smollm3_published"])
def test_our_header_shows_the_text_itself(name):
    assert "Today Date: some day in May\n" in rendered(load_template(name), "some day in May")


@pytest.mark.parametrize("name", ["date_string", "current_date", "datetime"])
def test_variables_for_the_date_are_the_text(name):
    template = f"{{%- if {name} is not defined %}}{{%- set {name} = 'then' %}}{{%- endif %}}On {{{{ {name} }}}}."
    assert rendered(template, "8 July") == "On 8 July."
    assert rendered(template, "8 July", template_kwargs={name: "a row's day"}) == "On a row's day."


def test_a_template_that_asks_the_clock_fills_the_variable_in_its_own_format():
    template = "{%- if not date_string is defined %}{%- set date_string = strftime_now('%d %b %Y') %}{%- endif %}"
    assert rendered(template + "{{ date_string }}", "08 July 2025") == "08 Jul 2025"
    assert rendered(template + "{{ date_string }}", "x", template_kwargs={"date_string": "now"}) == "now"


def test_tokens_prompts_and_pairs_have_the_day(bpe):
    tokenizer = copy.deepcopy(bpe)
    tokenizer.chat_template = "Today is {{ strftime_now('%d %B %Y') }}." + BODY
    day, beginning = {"today": "2020-01-01"}, "Today is 01 January 2020.<|im_start|>user"
    pair = encode_pair(tokenizer, TURNS, OTHER, **day)
    for ids in (
        encode(tokenizer, TURNS, **day).input_ids, encode_prompt(tokenizer, [USER], **day), pair.prompt_ids
    ):  # fmt: skip
        assert tokenizer.decode(ids).startswith(beginning)


@pytest.mark.parametrize("today", ["midsummer", "", "2020-13-01"])
def test_a_text_that_is_no_date_is_one_line_where_a_format_is_asked_for(today):
    with pytest.raises(UserError, match=rf"^today={today!r} is not a date, .*; write it like (.*) or 2025-07-08$") as e:
        rendered("{{ strftime_now('%Y') }}" + BODY, today)
    for remedy in str(e.value).partition("like ")[2].split(" or "):
        assert rendered("{{ strftime_now('%Y') }}", remedy) == "2025"
    assert rendered("{{ strftime_now('%Y') if false }}", today) == ""  # not asked: our own template has such a branch


def test_a_format_put_together_is_refused():
    assert rendered("{%- set y = '%Y' %}{{ strftime_now(y) }}", "2020-01-01") == "2020"
    with pytest.raises(
        UserError, match="computes a date format; write the format as a string in the call of strftime_now"
    ):
        rendered("{{ strftime_now('%' ~ 'Y') }}", "2020-01-01")


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ ['a', 'b']|random }}", "calls random, which gives a row different tokens each time"),
        ("{{ lipsum(2) }}", "calls lipsum, which gives a row different tokens each time"),
        ("{{ datetime.now() }}", "'datetime' is undefined"),
        ("{{ now() }}", "'now' is undefined"),
    ],
)
def test_other_clocks_and_chance_are_refused(template, text):
    with pytest.raises(UserError, match=text):
        rendered(template + BODY, "2020-01-01")


def test_keys_called_like_them_are_keys():
    turns = [{**USER, "random": "r", "lipsum": "l", "datetime": "d"}]
    template = "{% for m in messages %}{{ m.random ~ m['lipsum'] ~ m.datetime }}{% endfor %}"
    assert render(template, turns, today="2020-01-01") == "rld"


def test_a_row_cannot_set_the_clock():
    for key in ("today", "strftime_now"):
        with pytest.raises(UserError, match=f"chat_template_kwargs.{key} is not a variable a row can set"):
            rendered("{{ strftime_now('%Y') }}", "2020-01-01", template_kwargs={key: "x"})


PIECES = [
    "\n", "  ", "a", "%", "{% if true %}", "{%- if true %}b", "  {% if true -%}\n", "{{ today }}", "{#- c -#}",
    "{# d #}\n", "{%- set x = 1 -%}",
]  # fmt: skip
TODAYS = st.sampled_from(["8 July", 'a "b" \\ {{ c }} %} é😀\n'])


@given(st.lists(st.sampled_from(PIECES), max_size=8).map("".join), TODAYS)
def test_what_stands_before_a_template_changes_nothing_else(template, today):
    template += "{% endif %}" * template.count("if true")
    [expected], _ = chat_template_utils.render_jinja_template([[USER]], chat_template=template, today=today)
    assert chat_template_utils.render_jinja_template([[USER]], chat_template=frozen(template, today))[0] == [expected]

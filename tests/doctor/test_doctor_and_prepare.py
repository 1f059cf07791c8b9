"""The doctor sees what prepare sees: its rows, its rendering, its refusals; and what it advises helps."""

import re

import pytest

from smolpost.doctor import stage_sample as doctor_case
from smolpost.errors import UserError
from smolpost.pipeline import manifest, steps
from tests.doctor.clinic import ASK, TURNS, conversations, failed, pairs

REPLY = {"role": "assistant", "content": "42."}
GSM8K = "data.sft.sources.gsm8k"


def prepared(clinic, *words: str) -> dict:
    """What `smolpost prepare` reports of the stage sft."""
    lineage = clinic.lineage(*words)
    return manifest.read(steps.prepare(lineage, lineage.stages["sft"]))["report"]


def own_template(clinic, text: str) -> str:
    file = clinic.folder / "own.jinja"
    file.write_text(text)
    return f"stages.sft.template={file}"


WITH_EOS = (
    "{%- for m in messages %}{{ '[' + m.role + '] ' + m.content + eos_token + '\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '[assistant] ' }}{%- endif %}"
)
PLAIN_ROWS = [{"messages": [ASK, REPLY]}, {"messages": [ASK, REPLY, ASK, {"role": "assistant", "content": "43."}]}]


@pytest.mark.parametrize(
    ("before", "kwargs"),
    [("", {}), ("{{ raise_exception('who am I?') if not persona is defined }}{{ persona }}\n", {"persona": "P"})],
    ids=["special tokens", "variables that rows give"],
)
def test_what_prepare_renders_the_doctor_renders(clinic, before, kwargs):
    clinic.write("sft", [row | {"chat_template_kwargs": kwargs} for row in PLAIN_ROWS])
    template = own_template(clinic, before + WITH_EOS)
    assert prepared(clinic, template)["totals"]["rows_read"] == 2
    found = clinic.diagnose("sft", template)
    assert failed(found) == set()
    assert {check.status for check in found.values()} == {"pass"}
    assert "sample of 2" in found["rows"].detail and "3 of 3 replies end with <|im_end|>" in found["stop token"].detail


TAKEN = [
    ([], 10), ([f"{GSM8K}.first_row=2", f"{GSM8K}.max_rows=5"], 5), ([f"{GSM8K}.weight=0.3"], 3),
    ([f"{GSM8K}.weight=2"], 20), ([f"+{GSM8K[:-6]}.more={{path:'${{data_root}}/smoltalk2_mid.jsonl'}}"], 20),
]  # fmt: skip


@pytest.mark.parametrize(("words", "number"), TAKEN, ids=["all", "a part", "a share", "twice", "two sources"])
def test_rows_are_those_that_the_mixture_takes(healthy, clinic, words, number):
    assert prepared(clinic, *words)["totals"]["rows_read"] == number
    detail = clinic.diagnose("sft", *words)["rows"].detail
    scanned = min(number, 10) if "weight=2" in str(words) else number
    expected = f"0 of {number} rows refused" if scanned == number else f"looked at, of {number} that the mixture takes"
    assert expected in detail


def test_a_bad_row_counts_only_where_the_mixture_takes_it(clinic):
    clinic.write("sft", [*conversations(), {"messages": [ASK]}])
    whole, part = [], [f"{GSM8K}.max_rows=10"]
    assert failed(clinic.diagnose("sft", *whole)) == {"rows"}
    with pytest.raises(UserError, match=r"smoltalk2_sft\.jsonl:11"):
        prepared(clinic, *whole, "stages.sft.max_dropped=0")
    assert failed(clinic.diagnose("sft", *part)) == set()
    assert prepared(clinic, *part)["totals"]["rows_read"] == 10


def test_the_first_rows_are_looked_at(clinic, monkeypatch):
    monkeypatch.setattr(doctor_case, "SCANNED", 4)
    detail = clinic.diagnose("sft")["rows"].detail
    assert detail.startswith("0 of the 4 rows looked at, of 10 that the mixture takes, refused; sample of 4: ")


def test_a_source_without_a_row_is_said_as_prepare_says_it(clinic):
    words = [f"{GSM8K}.weight=0.01"]
    with pytest.raises(UserError, match=r"keeps none of 10 rows; raise it to 0\.1 or more"):
        prepared(clinic, *words)
    found = clinic.diagnose("sft", *words)
    assert "keeps none of 10 rows; raise it to 0.1 or more" in found["rows"].detail
    assert failed(clinic.diagnose("sft", f"{GSM8K}.weight=0.1")) == set()


# ---------------------------------------------------------------- what it advises


def test_a_row_that_only_tokenizing_refuses_is_found_and_leaving_it_out_helps(clinic):
    short = own_template(clinic, WITH_EOS.replace("m.content", "(m.content[:30] if m.role == 'user' else m.content)"))
    bad = {"messages": [{"role": "user", "content": "<|im_end|> is what ends a turn of this model."}, REPLY]}
    clinic.write("sft", [*PLAIN_ROWS, bad])
    found = clinic.diagnose("sft", short)
    assert failed(found) == {"rows"}
    line = found["rows"].detail.partition("the first refused: ")[2]
    assert "smoltalk2_sft.jsonl:3: messages[0] has '<|im_end|>', a control token" in line
    with pytest.raises(UserError, match=re.escape(line)):
        prepared(clinic, short, "stages.sft.max_dropped=0")
    assert found["rows"].remedy == "do what the line says, or delete these rows of data=sft"
    clinic.write("sft", PLAIN_ROWS)
    assert failed(clinic.diagnose("sft", short)) == set() and prepared(clinic, short)["totals"]["rows_read"] == 2


def test_rows_that_are_all_refused_fail_once_and_skip_the_rest(clinic):
    found = clinic.diagnose("sft", own_template(clinic, WITH_EOS.replace("eos_token", "eod_token")))
    assert failed(found) == {"rows"}
    assert "none of 10 rows is valid; the first: " in found["rows"].detail
    assert "'eod_token' is undefined: the chat template reads it" in found["rows"].detail
    assert {found[name].status for name in ("mask", "packing", "accumulation", "vocabulary", "lengths")} == {"skip"}


@pytest.mark.parametrize("remedy", ["max_seq_len=200", "overlong=truncate", "overlong=drop"])
def test_the_remedies_for_long_rows_help(clinic, remedy):
    words = ["stages.sft.max_seq_len=100", "stages.sft.overlong=refuse", "stages.sft.max_dropped=1"]
    found = clinic.diagnose("sft", *words)
    assert failed(found) == {"lengths"} and remedy.partition("=")[0] in found["lengths"].remedy
    assert failed(clinic.diagnose("sft", *words, f"stages.sft.{remedy}")) == set()
    assert prepared(clinic, *words, f"stages.sft.{remedy}")["totals"]["rows_read"] > 0


def test_leaving_out_equal_pairs_helps(clinic):
    same = [[ASK, {"role": "assistant", "content": text}] for text in ("42.", "<think>\nSix sevens.\n</think>\n42.")]
    row = {"chosen": same[0], "rejected": same[1], "chat_template_kwargs": {"enable_thinking": False}}
    clinic.write("preference", [*pairs(), row])
    assert failed(clinic.diagnose("apo")) == {"equal pairs"}
    clinic.write("preference", pairs())
    assert failed(clinic.diagnose("apo")) == set()


def test_another_template_helps_against_one_that_rewrites_earlier_turns(clinic):
    clinic.write("sft", [{"messages": TURNS}] * 3)
    rewriting = WITH_EOS.replace("m.content", "(m.content if loop.last else m.content.split('</think>')[-1])")
    found = clinic.diagnose("sft", own_template(clinic, rewriting))
    assert failed(found) >= {"rows", "template"}
    assert "renders earlier turns differently when later turns follow; use a template" in found["rows"].detail
    last = clinic.diagnose("sft", own_template(clinic, rewriting), "stages.sft.last_turn_only=true")
    assert "rows" not in failed(last)  # the line's other remedy
    assert failed(clinic.diagnose("sft", "stages.sft.template=smollm3")) == set()


# ---------------------------------------------------------------- {% generation %} tags of other templates

TAGGED = (
    "{%%- for m in messages %%}{{ '<|im_start|>' + m.role }}"
    "{%%- if m.role == 'assistant' %%}%s{{ '\n' + m.content + '<|im_end|>\n' }}%s"
    "{%%- else %%}{{ '\n' + m.content + '<|im_end|>\n' }}{%%- endif %%}{%%- endfor %%}"
    "{%%- if add_generation_prompt %%}{{ '<|im_start|>assistant\n' }}{%%- endif %%}"
)
ANSWER_ONLY = TAGGED.replace("m.content + '<|im_end|>\n' }}%s", "m.content }}%s{{ '<|im_end|>\n' }}")
TAGS = "{%- generation %}", "{%- endgeneration %}"


def test_line_breaks_inside_tags_do_not_train(clinic):
    """As in the templates that TRL trains Qwen models with."""
    clinic.write("sft", PLAIN_ROWS)
    template = own_template(clinic, TAGGED % TAGS)
    found = clinic.diagnose("sft", template)
    assert failed(found) == set() and found["mask"].status == "pass"
    report = prepared(clinic, template)
    untagged = prepared(clinic, own_template(clinic, TAGGED % ("", "")))
    assert report["totals"]["tokens_trained"] == untagged["totals"]["tokens_trained"] > 0


@pytest.mark.parametrize("stage", ["sft", "apo"])
def test_prepare_refuses_tags_around_something_else_as_the_doctor_does(clinic, stage):
    clinic.write("sft", PLAIN_ROWS)
    wrong = [ASK, {"role": "assistant", "content": "41."}]
    clinic.write("preference", [{"chosen": [ASK, REPLY], "rejected": wrong}] * 2)
    words = [own_template(clinic, ANSWER_ONLY % TAGS).replace("sft", stage)]
    found = clinic.diagnose(stage, *words)
    mask = "mask" if stage == "sft" else "pair mask"
    assert failed(found) == {mask}
    lineage = clinic.lineage(*words)
    with pytest.raises(UserError, match=re.escape(found[mask].detail[:200])) as refused:
        steps.prepare(lineage, lineage.stages[stage])
    assert "remove all tags from the template" in str(refused.value)
    assert not lineage.stages[stage].prepared.exists()
    for remedy in (TAGGED % TAGS, ANSWER_ONLY % ("", "")):
        words = [own_template(clinic, remedy).replace("sft", stage)]
        assert failed(clinic.diagnose(stage, *words)) == set()
        lineage = clinic.lineage(*words)
        assert manifest.read(steps.prepare(lineage, lineage.stages[stage]))

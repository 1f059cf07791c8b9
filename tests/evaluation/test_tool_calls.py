"""Berkeley's rows asked in both styles: right replies score one, each fault is named; all rows of files alike."""

import copy
import json
from pathlib import Path

import pytest

from smolpost.chat.render import render
from smolpost.chat.tokenizer import build_tokenizer
from smolpost.errors import UserError
from smolpost.evaluation.scores import aggregate
from smolpost.evaluation.task import Context
from smolpost.evaluation.tasks.tool_calls import ToolCalls, ToolCallsTask, category
from smolpost.inference.engine import Reply
from smolpost.inference.local import LocalEngine
from tests.evaluation.canned import Canned


def question(number, kind="simple", **changes):
    area = {
        "name": "geometry.area",
        "description": "Area of a triangle.",
        "parameters": {
            "type": "dict",
            "properties": {"base": {"type": "integer"}, "height": {"type": "float"}, "unit": {"type": "string"}},
            "required": ["base", "height"],
        },
    }
    text = f"Area of a triangle with base {number} and height 5?"
    row = {"id": f"{kind}_{number}", "question": [[{"role": "user", "content": text}]], "function": [area]}
    return {**row, **changes}


def answer(number, kind="simple"):
    accepted = {"base": [number], "height": [5.0], "unit": ["cm", ""]}
    return {"id": f"{kind}_{number}", "ground_truth": [{"geometry.area": accepted}]}


QUESTIONS = [question(i) for i in range(3)]
ANSWERS = [answer(i) for i in range(3)]
RIGHT = {
    "xml": '<tool_call>{"name": "geometry.area", "arguments": {"base": 1, "height": 5}}</tool_call>',
    "python": "<code>geometry.area(base=1, height=5)</code>",
}


@pytest.fixture
def make(tmp_path):
    """Return a function of questions, answers and settings that returns the task."""

    def made(questions=QUESTIONS, answers=ANSWERS, **settings):
        paths = {}
        for key, rows in (("questions", questions), ("answers", answers)):
            paths[key] = str(tmp_path / f"{key}.jsonl")
            Path(paths[key]).write_text("".join(json.dumps(row) + "\n" for row in rows))
        context = Context("08 July 2025", 7, lambda name: [])
        return ToolCalls("calls", ToolCallsTask(**{**paths, **settings}), context)

    return made


def measure(task, tokenizer, reply):
    engine = Canned(tokenizer, reply)
    return task.measure(engine, task.items(tokenizer)), engine


@pytest.fixture
def judged(make, tokenizer):
    """Return a function of a style and a reply to question 1 that returns its sample."""

    def judge(style, reply):
        task = make([question(1)], [answer(1)], styles=[style])
        [sample], _ = measure(task, tokenizer, lambda prompt: reply)
        return sample

    return judge


@pytest.mark.parametrize("style", ["xml", "python"])
@pytest.mark.parametrize("frame", ["{}", "<think>\nlet me see\n</think>\n{}", "Here it is:\n{}\nDone."])
def test_a_right_reply(judged, style, frame):
    sample = judged(style, frame.format(RIGHT[style]))
    assert sample.metrics == {style: 1.0, f"{style}/parsed": 1.0, f"{style}/name": 1.0, f"{style}/cut": 0.0}
    assert sample.record["reason"] == ""


@pytest.mark.parametrize(
    ("style", "reply", "parsed", "name", "reason"),
    [
        ("xml", "The area is 2.5.", 0, 0, "0 calls instead of 1"),
        ("xml", RIGHT["python"], 0, 0, "0 calls instead of 1"),
        ("python", RIGHT["xml"], 0, 0, "0 calls instead of 1"),
        ("xml", "<think>\n" + RIGHT["xml"], 0, 0, "0 calls instead of 1"),
        ("xml", "<think>\n" + RIGHT["xml"] + "\n</think>\nDone.", 0, 0, "0 calls instead of 1"),
        ("xml", RIGHT["xml"] * 2, 1, 0, "2 calls instead of 1"),
        ("xml", RIGHT["xml"].replace("geometry.", ""), 1, 0, "calls area instead of geometry.area"),
        ("xml", RIGHT["xml"].replace('"base": 1', '"base": 2'), 1, 1, "base=2 is not one of [1]"),
        ("xml", RIGHT["xml"].replace('"base": 1', '"base": "1"'), 1, 1, "base='1' is of type str, not int"),
        ("xml", RIGHT["xml"].replace("}}", "}"), 0, 0, "the block: is not JSON"),
        ("xml", RIGHT["xml"] + "<tool_call>{</tool_call>", 1, 1, "the block: is not JSON"),
        ("python", RIGHT["python"].replace("base=1, ", ""), 1, 1, "the required base is missing"),
        ("python", RIGHT["python"].replace("base=1", "base=f(1)"), 0, 0, "the argument f(1) is not a literal"),
    ],
)
def test_a_wrong_reply(judged, style, reply, parsed, name, reason):
    sample = judged(style, reply)
    assert sample.metrics == {style: 0, f"{style}/parsed": parsed, f"{style}/name": name, f"{style}/cut": 0}
    assert sample.record["reason"].startswith(reason)


def test_a_call_inside_a_think_block_that_the_prompt_opened(make, tokenizer, monkeypatch):
    opened = tokenizer.chat_template.replace('("" if thinking else', '("<think>\n" if thinking else')
    monkeypatch.setattr(tokenizer, "chat_template", opened)
    task = make([question(1)], [answer(1)], styles=["xml"], thinking=True)
    for reply, right in ((RIGHT["xml"], 0.0), ("hm\n</think>\n" + RIGHT["xml"], 1.0)):
        [sample], _ = measure(task, tokenizer, lambda prompt, reply=reply: reply)
        assert sample.metrics["xml"] == right


def test_positional_arguments_follow_the_document(judged):
    assert judged("python", "<code>geometry.area(1, 5, unit='cm')</code>").metrics["python"] == 1.0
    assert judged("python", "<code>geometry.area(5, 1)</code>").metrics["python"] == 0.0


def test_what_the_reader_finds(judged):
    sample = judged("python", "<code>geometry.area(1, height=6)</code>")
    assert json.loads(json.dumps(sample.record)) == {
        "style": "python",
        "question": [{"role": "user", "content": "Area of a triangle with base 1 and height 5?"}],
        "functions": ["geometry.area"],
        "reply": "<code>geometry.area(1, height=6)</code>",
        "calls": ["geometry.area(1, height=6)"],
        "expected": [{"geometry.area": {"base": [1], "height": [5.0], "unit": ["cm", ""]}}],
        "reason": "height=6 is not one of [5.0]",
    }


# ---------------------------------------------------------------- prompts and rows


def test_prompts_list_the_functions_as_json_schemas(make, tokenizer):
    task = make(max_rows=1)
    items = task.items(tokenizer)
    assert [(item.id, item.max_new_tokens) for item in items] == [("simple_0/xml", 512), ("simple_0/python", 512)]
    xml, python = (tokenizer.decode(item.ids) for item in items)
    schema = '"parameters": {"type": "object", "properties": {"base": {"type": "integer"}, "height": {"type": "number"}'
    assert schema in xml and schema in python and '"dict"' not in xml + python
    assert "### XML Tools" in xml and "### Python Tools" not in xml
    assert "### Python Tools" in python and "### XML Tools" not in python
    assert all(text.endswith("<|im_start|>assistant\n<think>\n\n</think>\n") for text in (xml, python))
    thinking = make(max_rows=1, thinking=True, styles=["xml"]).items(tokenizer)[0]
    assert tokenizer.decode(thinking.ids).endswith("<|im_start|>assistant\n")


def test_a_template_that_reads_common_tools_alone(make, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", "{% for tool in tools %}[{{ tool.name }}]{% endfor %}")
    [item] = make(max_rows=1, styles=["xml"]).items(tokenizer)
    assert tokenizer.decode(item.ids) == "[geometry.area]"
    with pytest.raises(UserError, match=r"^evaluation.tasks.calls.styles=.*not read python_tools; take python out"):
        make(max_rows=1).items(tokenizer)
    monkeypatch.setattr(tokenizer, "chat_template", "{{ messages }}")
    with pytest.raises(UserError, match=r"does not read xml_tools; take xml out"):
        make(max_rows=1).items(tokenizer)


def test_categories_are_scored_apart_where_there_are_several(make, tokenizer):
    rows = [*QUESTIONS[:2], question(1, "live_simple", id="live_simple_1-0-0")]
    answers = [*ANSWERS, {**answer(1), "id": "live_simple_1-0-0"}]
    samples, _ = measure(make(rows, answers, styles=["xml"]), tokenizer, lambda prompt: RIGHT["xml"])
    scores = aggregate(samples)
    assert {metric: scores[metric]["value"] for metric in ("xml/simple", "xml/live_simple")} == {
        "xml/simple": 0.5,
        "xml/live_simple": 1.0,
    }
    assert scores["xml"]["value"] == pytest.approx(2 / 3)
    samples, _ = measure(make(styles=["xml"]), tokenizer, lambda prompt: RIGHT["xml"])
    assert list(aggregate(samples)) == ["xml", "xml/parsed", "xml/name", "xml/cut"]


def test_category():
    names = ["simple_python_12", "live_simple_0-0-0", "multiple_7", "plain"]
    assert [category(name) for name in names] == ["simple_python", "live_simple", "multiple", "plain"]


def test_both_styles_of_a_row_are_one_cluster(make, tokenizer):
    samples, engine = measure(make(), tokenizer, lambda prompt: Reply(RIGHT["xml"], 9, True))
    assert [(sample.id, sample.cluster) for sample in samples][:2] == [
        ("simple_0/xml", "simple_0"),
        ("simple_0/python", "simple_0"),
    ]
    assert {sample.metrics.get("xml/cut", 1.0) for sample in samples} == {1.0}
    assert {settings["max_new_tokens"] for _, settings in engine.asked} == {512}


def test_rows_without_an_answer_are_passed_over_and_counted(make, tokenizer):
    task = make([question(9), *QUESTIONS], max_rows=2, styles=["xml"])
    assert [item.id for item in task.items(tokenizer)] == ["simple_0/xml", "simple_1/xml"]
    assert task.notes == {"rows_without_answer": 1}


JAVA = {"name": "f", "parameters": {"properties": {"m": {"type": "HashMap"}}}}


@pytest.mark.parametrize(
    ("questions", "answers", "message"),
    [
        (
            [question(1), question(1)],
            ANSWERS,
            r"questions.jsonl:2: id='simple_1' is not a text, or an earlier",
        ),
        ([question(1, id=3)], ANSWERS, "questions.jsonl:1: id=3 is not a text"),
        ([question(1, id="name_1")], ANSWERS, "id='name_1' begins with the name of a metric"),
        ([{"id": "simple_1"}], ANSWERS, "questions.jsonl:1: has no question but the columns id"),
        ([question(1, question="area?")], ANSWERS, r"questions.jsonl:1: question is a str; expected \[\[message"),
        ([question(1, question=[[], []])], ANSWERS, "question is a list of 2; expected"),
        ([question(1, function=[{"name": "f"}])], ANSWERS, r"function\[0\] has no name or no parameters"),
        ([question(1, function=[JAVA])], ANSWERS, "properties.m is of type 'HashMap'; .*other languages than Python"),
        ([question(1)], [{"id": "simple_1"}], "answers.jsonl:1: has no ground_truth"),
        ([question(1)], [{"id": "simple_1", "ground_truth": []}], r"ground_truth is \[\]; expected a list"),
        ([question(1)], [{"id": "simple_1", "ground_truth": ["f(x=1)"]}], r"ground_truth\[0\] is 'f\(x=1\)'; expected"),
        ([question(1)], [{"id": "simple_1", "ground_truth": [{"f": {"x": 1}}]}], r"ground_truth\[0\] is .*; expected"),
        ([question(1)], [{"id": "simple_1", "ground_truth": [{"f": {"x": [{"y": 1}]}}]}], r"objects among the values"),
        (
            [question(1)],
            [{"id": "simple_1", "ground_truth": [{"f": {"x": [1]}}]}],
            "calls 'f', which is not one of",
        ),
    ],
)
def test_bad_rows_are_refused(make, tokenizer, questions, answers, message):
    with pytest.raises(UserError, match=message) as error:
        make(questions, answers).items(tokenizer)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"styles": ["json"]}, r"styles=\['json'\] is not a list of different styles; use some of xml, python"),
        ({"styles": []}, r"styles=\[\] is not a list"),
        ({"max_rows": 0}, "max_rows=0 is below 1"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 is below 1"),
    ],
)
def test_bad_settings_are_refused(make, settings, message):
    with pytest.raises(UserError, match=f"^evaluation.tasks.calls.{message}"):
        make(**settings)


# ---------------------------------------------------------------- files of rows


@pytest.fixture(scope="module")
def bpe():
    return build_tokenizer(["some words"], kind="bpe", vocab_size=400, template="smollm3")


def first_choice(value):
    """Of an accepted value, objects with the first accepted value of each key."""
    if isinstance(value, dict):
        return {key: choices[0] for key, choices in value.items() if choices[0] != ""}
    return [first_choice(item) if isinstance(item, dict) else item for item in value] if type(value) is list else value


def right_arguments(accepted, required):
    """The first accepted value of each argument that has to be given."""
    given = {}
    for name, values in accepted.items():
        choices = [value for value in values if value != ""]
        if "" not in values or name in required:
            given[name] = first_choice(choices[0])
    return given


def written(style, name, arguments):
    if style == "xml":
        return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"
    return f"<code>{name}({', '.join(f'{key}={value!r}' for key, value in arguments.items())})</code>"


def rendered(tokenizer, style, name, arguments):
    """The reply as the chat template writes an assistant's structured calls."""
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "tool_calls": [call]}]
    tools = {"xml_tools": ["x"]} if style == "xml" else {"python_tools": ["x"]}
    text = render(tokenizer, messages, template_kwargs=tools | {"enable_thinking": False}, today="today")
    return text.rpartition("</think>\n")[2].removesuffix("<|im_end|>\n")


def wrong_value(value):
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1000  # some neighbours are accepted as well
    return value + "x" if isinstance(value, str) else [*value, "x"] if isinstance(value, list) else {**value, "x": 1}


def faults(name, arguments):
    """(what is wrong, name, arguments) of a right call made wrong."""
    last = list(arguments)[-1]
    yield "name", name + "x", arguments
    yield "value", name, {**arguments, last: wrong_value(copy.deepcopy(arguments[last]))}
    yield "missing", name, {key: value for key, value in arguments.items() if key != last}
    yield "unknown", name, {**arguments, "no_such_parameter": 1}


class InOrder:
    """An engine that has its replies ready and reads no prompt."""

    def __init__(self, texts):
        self.texts = texts

    def generate(self, prompts, **settings):
        return [[Reply(text, 1, False)] for _, text in zip(prompts, self.texts, strict=True)]


@pytest.mark.parametrize("part", ["simple", "multiple"])
def test_all_rows_of_a_file(bpe, rows_file, part):
    paths = {name: str(rows_file(f"{part}_{name}")) for name in ("questions", "answers")}
    config = ToolCallsTask(**paths, max_rows=None)
    task = ToolCalls("bfcl", config, Context("08 July 2025", 0, lambda name: []))
    items = task.items(bpe)
    assert len(items) == 2 * len(rows_file(f"{part}_questions").read_bytes().splitlines())
    assert task.notes == {"rows_without_answer": 0}
    replies = {}
    for item in items:
        [(name, accepted)] = item.about.expected
        arguments = right_arguments(accepted, item.about.functions[name]["parameters"]["required"])
        style = item.about.style
        replies.setdefault("right", []).append((item, rendered(bpe, style, name, arguments)))
        for fault, *call in faults(name, arguments):
            replies.setdefault(fault, []).append((item, written(style, *call)))
    assert {fault: len(pairs) for fault, pairs in replies.items()} == dict.fromkeys(replies, len(items))
    assert list(replies) == ["right", "name", "value", "missing", "unknown"]
    for fault, pairs in replies.items():
        asked, texts = zip(*pairs, strict=True)
        samples = task.measure(InOrder(texts), list(asked))
        scores = aggregate(samples)
        for style in ("xml", "python"):
            wrong = [s.id for s in samples if s.metrics.get(style) == (fault != "right")]
            assert not wrong, f"{fault}: {wrong}"
            assert scores[f"{style}/parsed"]["value"] == 1.0
            assert scores[f"{style}/name"]["value"] == (fault != "name")


def test_a_model_of_transformers(make, model, tokenizer):
    task = make(max_new_tokens=8)
    items = task.items(tokenizer)
    samples = task.measure(LocalEngine(model, tokenizer), items)
    assert [sample.id for sample in samples] == [item.id for item in items]
    scores = aggregate(samples)
    assert (scores["xml"]["value"], scores["python"]["value"], scores["xml"]["n"]) == (0.0, 0.0, 3)
    assert all(sample.record["reason"] == "0 calls instead of 1" for sample in samples)

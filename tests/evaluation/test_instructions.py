"""Own prompts by replies built for them, and IFEval's scores by hand."""

import json

import pytest

from smolpost.errors import UserError
from smolpost.evaluation.constraints import LANGUAGE, VERIFIERS, checked, follows
from smolpost.evaluation.instruction_prompts import FORBIDDEN, KINDS, REQUESTS, TOPICS, own_prompts
from smolpost.evaluation.scores import aggregate
from smolpost.evaluation.task import Context
from smolpost.evaluation.tasks.instructions import Instructions, InstructionsTask
from smolpost.inference.engine import Reply
from smolpost.inference.local import LocalEngine
from tests.evaluation.canned import Canned

LEAST, LESS = "at least", "less than"

# ---------------------------------------------------------------- own prompts


def oracle(prompt):
    """A reply that follows all of a prompt's instructions."""
    wanted = dict(prompt.instructions)

    def argument(name, key, default):
        return wanted.get(name, {}).get(key, default)

    parts = max(
        argument("length_constraints:number_paragraphs", "num_paragraphs", 1),
        argument("length_constraints:nth_paragraph_first_word", "num_paragraphs", 1),
        argument("detectable_format:multiple_sections", "num_sections", 1),
        2 if "combination:two_responses" in wanted else 1,
    )
    texts = [f"it is {number}" for number in "abcd"[:parts]]
    for name, kwargs in wanted.items():
        texts[0] += content(name, kwargs)
    for i, text in enumerate(texts):
        if spliter := argument("detectable_format:multiple_sections", "section_spliter", None):
            texts[i] = f"{spliter} {i + 1}\n{text}"
        if argument("length_constraints:nth_paragraph_first_word", "nth_paragraph", 0) == i + 1:
            first_word = wanted["length_constraints:nth_paragraph_first_word"]["first_word"]
            texts[i] = f"{first_word.capitalize()}. {text}"
    between = "\n***\n" if "length_constraints:number_paragraphs" in wanted else "\n\n"
    text = ("\n******\n" if "combination:two_responses" in wanted else between).join(texts)
    text = argument("combination:repeat_prompt", "prompt_to_repeat", "") + text
    text += " " + argument("startend:end_checker", "end_phrase", "")
    text += argument("detectable_content:postscript", "postscript_marker", "")
    text = json.dumps({"reply": text}) if "detectable_format:json_format" in wanted else text
    text = f'"{text}"' if "startend:quotation" in wanted else text
    text = text.upper() if "change_case:english_capital" in wanted else text
    return text.lower() if "change_case:english_lowercase" in wanted else text


def content(name, kwargs):
    """What an instruction adds to a text wherever it stands."""
    at_least = kwargs.get("relation") == LEAST
    return {
        "keywords:existence": " ".join(["", *kwargs.get("keywords", [])]),
        "keywords:frequency": f" {kwargs.get('keyword')}" * kwargs.get("frequency", 0),
        "keywords:letter_frequency": " " + kwargs.get("letter", "") * kwargs.get("let_frequency", 0),
        "length_constraints:number_words": " word" * kwargs.get("num_words", 0) * at_least,
        "length_constraints:number_sentences": " yes." * (kwargs.get("num_sentences", 0) + 1) * at_least,
        "change_case:capital_word_frequency": " YES" * kwargs.get("capital_frequency", 0),
        "detectable_content:number_placeholders": " [name]" * kwargs.get("num_placeholders", 0),
        "detectable_format:number_highlighted_sections": " *so*" * kwargs.get("num_highlights", 0),
        "detectable_format:number_bullet_lists": "\n* so" * kwargs.get("num_bullets", 0) + "\nso",
        "detectable_format:title": " <<so>>",
    }.get(name, "")


OWN = own_prompts(600, seed=1)
MODEST = {"punctuation:no_comma", "keywords:forbidden_words", "change_case:english_lowercase"}  # "no" follows these


def test_own_prompts_can_be_followed():
    for prompt in OWN:
        reply = oracle(prompt)
        for name, kwargs in prompt.instructions:
            assert follows(reply, name, kwargs), (prompt, name, reply)


def test_a_short_no_follows_only_what_asks_for_little():
    for prompt in OWN:
        for name, kwargs in prompt.instructions:
            if kwargs.get("relation") != LESS and name not in MODEST:
                assert not follows("no", name, kwargs), (name, kwargs)


def test_own_prompts_hold_one_to_three_instructions_of_all_kinds():
    assert {len(prompt.instructions) for prompt in OWN} == {1, 2, 3}
    names = {name for prompt in OWN for name, _ in prompt.instructions}
    assert names == KINDS.keys() == VERIFIERS.keys() - {LANGUAGE, "detectable_format:constrained_response"}
    for prompt in OWN:
        assert "{" not in prompt.text
        assert len({KINDS[name].slot for name, _ in prompt.instructions}) == len(prompt.instructions)
        for name, kwargs in prompt.instructions:
            assert checked(name, kwargs, "own") == kwargs
            for value in kwargs.values():
                assert all(str(v) in prompt.text for v in (value if isinstance(value, list) else [value]))


def test_requests_hold_no_word_that_is_forbidden_and_no_comma():
    text = " ".join(REQUESTS + TOPICS)
    assert "," not in text and follows(text, "keywords:forbidden_words", {"forbidden_words": list(FORBIDDEN)})


def test_own_prompts_are_the_seeds_and_the_first_ones_whatever_their_number():
    assert own_prompts(5, seed=1) == OWN[:5] != own_prompts(5, seed=2)


# ---------------------------------------------------------------- the task

NULLS = {"keywords": None, "num_words": None, "relation": None, "end_phrase": None}  # as tables fill them
ROWS = [
    {"key": 1000, "prompt": "Name it. No commas.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [NULLS]},
    {
        "key": 1001,
        "prompt": "Use tea and cup. Three words. No commas.",
        "instruction_id_list": ["keywords:existence", "length_constraints:number_words", "punctuation:no_comma"],
        "kwargs": [NULLS | {"keywords": ["tea", "cup"]}, NULLS | {"num_words": 3.0, "relation": LEAST}, NULLS],
    },
]


def made(tmp_path, rows=ROWS, **settings):
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Instructions(
        "follow", InstructionsTask(**{"prompts": str(file)} | settings), Context("8 July 2025", 0, None)
    )


def measured(task, tokenizer, reply):
    engine = Canned(tokenizer, reply)
    return task.measure(engine, task.items(tokenizer)), engine


def test_ifevals_rows_are_asked_in_both_modes(tmp_path, tokenizer):
    task = made(tmp_path)
    items = task.items(tokenizer)
    assert [item.id for item in items] == ["0/think", "1/think", "0/no_think", "1/no_think"]
    texts = [tokenizer.decode(item.ids) for item in items]
    assert all("Today Date: 8 July 2025" in text for text in texts)
    assert [text.endswith("<|im_start|>assistant\n") for text in texts] == [True, True, False, False]
    assert items[1].about.prompt.instructions[:2] == [
        ("keywords:existence", {"keywords": ["tea", "cup"]}),
        ("length_constraints:number_words", {"num_words": 3, "relation": LEAST}),
    ]
    assert len(made(tmp_path, num_prompts=1, modes=["think"]).items(tokenizer)) == 1


def test_scores_by_hand(tmp_path, tokenizer):
    """The first prompt is followed; of the second's three instructions the keywords, and the words loosely not."""
    samples, engine = measured(made(tmp_path, modes=["no_think"]), tokenizer, lambda text: "*tea* cup")
    found = {metric: (score["value"], score["n"]) for metric, score in aggregate(samples).items()}
    assert found == {
        "no_think": (0.5, 2),
        "no_think/prompt_loose": (0.5, 2),
        "no_think/instruction_strict": (0.75, 2),
        "no_think/instruction_loose": (0.75, 2),
        "no_think/punctuation": (1.0, 2),
        "no_think/keywords": (1.0, 1),
        "no_think/length_constraints": (0.0, 1),
        "no_think/cut": (0.0, 2),
        "no_think/unclosed": (0.0, 2),
    }
    assert [sample.cluster for sample in samples] == ["0", "1"]
    assert all(settings.get("temperature", 0) == 0 for _, settings in engine.asked)


def test_loose_scores_forgive_a_first_line(tmp_path, tokenizer):
    samples, _ = measured(made(tmp_path, modes=["think"]), tokenizer, lambda text: "Sure, here:\na cup of tea")
    metrics = samples[1].metrics
    assert (metrics["think"], metrics["think/prompt_loose"]) == (0, 1)
    assert metrics["think/instruction_strict"] == pytest.approx(2 / 3)
    assert samples[1].weights["think/instruction_strict"] == 3


@pytest.mark.parametrize(
    ("reply", "right", "unclosed"),
    [
        ("<think>\nwell, well\n</think>\na cup of tea", 1, 0),
        ("<think>\na cup of tea\n</think>\n", 0, 0),
        ("<think>\na cup of tea", 0, 1),
        ("", 0, 0),
    ],
)
def test_only_the_text_after_the_think_block_is_judged(tmp_path, tokenizer, reply, right, unclosed):
    samples, _ = measured(made(tmp_path, modes=["think"]), tokenizer, lambda text: reply)
    assert (samples[1].metrics["think"], samples[1].metrics["think/unclosed"]) == (right, unclosed)


def test_a_sample_keeps_what_was_asked_and_what_came_back(tmp_path, tokenizer):
    [sample], _ = measured(made(tmp_path, ROWS[:1], modes=["think"]), tokenizer, lambda text: Reply("so, yes", 4, True))
    no_comma = {"instruction": "punctuation:no_comma", "kwargs": {}, "strict": False, "loose": False}
    assert json.loads(json.dumps(sample.record)) == {
        "key": "1000", "mode": "think", "question": "Name it. No commas.", "instructions": [no_comma],
        "reply": "so, yes", "answer": "so, yes", "tokens": 4, "cut": True,
    }  # fmt: skip
    assert sample.metrics["think/cut"] == 1


def test_through_a_model(tmp_path, tokenizer, model):
    task = Instructions("follow", InstructionsTask(num_prompts=3, max_new_tokens=8), Context("8 July 2025", 0, None))
    samples = task.measure(LocalEngine(model, tokenizer), task.items(tokenizer))
    assert len(samples) == 6 and all(0 <= v <= 1 for sample in samples for v in sample.metrics.values())
    assert all(sample.record["tokens"] <= 8 for sample in samples)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"instruction_id_list": ["punctuation:no_dot"]},
            r"prompts: .*prompts.jsonl:1: instruction 'punctuation:no_dot'",
        ),
        ({"instruction_id_list": []}, r"prompts.jsonl:1: instruction_id_list=\[\]; expected a list"),
        ({"kwargs": [{}, {}]}, "prompts.jsonl:1: kwargs=.*one object per instruction"),
        ({"kwargs": [3]}, r"prompts.jsonl:1: .*kwargs\[0\] is not an object"),
        ({"prompt": None}, "prompts.jsonl:1: prompt=None; expected a text"),
    ],
)
def test_a_row_that_cannot_be_asked_is_named(tmp_path, tokenizer, changes, message):
    with pytest.raises(UserError, match=message) as told:
        made(tmp_path, [ROWS[0] | changes]).items(tokenizer)
    assert str(told.value).startswith("evaluation.tasks.follow.prompts: ") and "\n" not in str(told.value)


def test_rows_may_lack_key_and_kwargs(tmp_path, tokenizer):
    row = {key: ROWS[0][key] for key in ("prompt", "instruction_id_list")}
    [item] = made(tmp_path, [row], modes=["think"]).items(tokenizer)
    assert item.about.prompt.key == "1" and item.about.prompt.instructions == [("punctuation:no_comma", {})]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"modes": ["thinking"]}, r"evaluation.tasks.follow.modes=\['thinking'\]"),
        ({"modes": []}, r"modes=\[\]"),
        ({"prompts": None, "num_prompts": None}, "num_prompts=null asks for all prompts of a file, and prompts=null"),
        ({"num_prompts": 0}, "num_prompts=0 is below 1"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 is below 1"),
    ],
)
def test_a_wrong_setting_is_refused(tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        made(tmp_path, **settings)

"""Prompts fill their length and can be solved by reading them alone; scores are RULER's; what cannot be is refused."""

import json
import random
import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smolpost.chat.tokenizer import build_tokenizer
from smolpost.errors import UserError
from smolpost.evaluation.results import SAMPLES
from smolpost.evaluation.ruler_problems import PROBLEMS, Material, placed
from smolpost.evaluation.run import run_task
from smolpost.evaluation.scores import aggregate
from smolpost.evaluation.task import Context
from smolpost.evaluation.tasks.ruler import Ruler, RulerTask, depth_of, string_match_all, string_match_part
from smolpost.inference.local import LocalEngine
from tests.evaluation.canned import Canned

QA = ["qa_1", "qa_2"]
WITHOUT_FILES = [task for task in PROBLEMS if task not in QA]
SINGLE = [task for task in WITHOUT_FILES if task.startswith(("niah_single", "niah_multikey"))]
COLOURS = ["teal", "ochre", "mauve", "indigo", "crimson", "beige", "olive", "violet"]


@pytest.fixture(scope="session")
def bpe():
    problems = [PROBLEMS[task](random.Random(0), Material(4096, 0.5)) for task in WITHOUT_FILES]
    texts = [problem.message(100) for problem in problems]
    return build_tokenizer(texts, kind="bpe", vocab_size=2000, template="smollm3")


@pytest.fixture(scope="session")
def questions(tmp_path_factory):
    """Houses with a colour, and people who own a house: one hop, and two."""
    rows = []
    for i in range(8):
        colour = f"The house at number {i} is old. It was painted {COLOURS[i]}."
        question = {"question": f"What is the colour of the house at number {i}?", "answers": [COLOURS[i], "paint"]}
        rows.append(question | {"context": colour})
        owner = f"Owner{i} is a painter and owns the house at number {i}."
        question = {"question": f"What is the colour of the house of Owner{i}?", "answers": [COLOURS[i]]}
        rows.append(question | {"context": [owner, colour]})
    file = tmp_path_factory.mktemp("questions") / "questions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def build(seed=0, **config):
    return Ruler("ruler", RulerTask(**config), Context("8 July 2025", seed, None))


def samples(task, tokenizer, reply):
    items = task.items(tokenizer)
    return task.measure(Canned(tokenizer, reply), items)


# ---------------------------------------------------------------- solvers that read the prompt, and nothing else


def message(prompt):
    return re.search(r"(?s)<\|im_start\|>user\n(.*)<\|im_end\|>", prompt)[1].rpartition("Now your turn.\n\n")[2]


def solve(prompt):
    text = message(prompt)
    context, _, question = text.partition("\n\n")[2].rpartition("\n\n")
    for start, solver in SOLVERS.items():
        if text.startswith(start):
            return solver(context, question)


def solve_needles(context, question):
    kind, names = re.search(r"secret (\w+?)s? for (.+) in the text above", question).groups()
    found = [re.findall(rf"A secret {kind} for {key} is (\S+)\.", context) for key in re.split(", | and ", names)]
    assert all(found)
    return "They are " + " and ".join(value for values in found for value in values)


def solve_variables(context, question):
    value = re.search(r"\d+", question)[0]
    values = {}
    for name, source in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", context):
        assert name not in values
        values[name] = values.get(source, source)
    return " ".join(name for name, of_name in values.items() if of_name == value)


def solve_common(context, question):
    numbers, words = zip(*re.findall(r"(\d+)\. (\w+)", context), strict=True)
    assert list(map(int, numbers)) == list(range(1, len(numbers) + 1))
    (_, least), (_, next_most) = Counter(words).most_common(11)[9:]
    assert least > next_most
    return ", ".join(word for word, _ in Counter(words).most_common(10)).upper()


def solve_frequent(context, question):
    counts = Counter(re.findall(r"[a-z]{6}", context)).most_common(4)
    assert counts[0][1] > counts[1][1] > counts[2][1] > counts[3][1]
    return " ".join(word for word, _ in counts[:3])


def solve_questions(context, question):
    place = re.search(r"the house (?:at number (\d+)|of (\w+))\?", question)
    number = place[1] or re.search(rf"{place[2]} is a painter and owns the house at number (\d+)", context)[1]
    return re.search(rf"number {number} is old. It was painted (\w+)", context)[1]


SOLVERS = {
    "Secret": solve_needles,
    "Variables": solve_variables,
    "Some words": solve_common,
    "Count": solve_frequent,
    "Answer a question": solve_questions,
}


@settings(max_examples=4, deadline=None)
@given(st.integers(0, 10**6), st.integers(1200, 2000))
def test_every_prompt_can_be_solved_and_fills_its_length(bpe, questions, seed, length):
    task = build(seed, tasks=list(PROBLEMS), lengths=[length], num_prompts=1, questions=questions)
    items = task.items(bpe)
    assert [item.id for item in items] == [f"{length}/{name}/0" for name in PROBLEMS]
    for item, sample in zip(items, task.measure(Canned(bpe, solve), items), strict=True):
        assert sample.id == item.id and set(sample.metrics.values()) == {1.0}, sample.record
    for reply in ("", "I do not know."):
        assert {v for s in task.measure(Canned(bpe, lambda _, r=reply: r), items) for v in s.metrics.values()} == {0.0}
    for item in items:
        problem, size = task.problem(item.about.task, 0, length), item.about.size
        assert item.ids == task.encode(bpe, problem.message(size))
        assert len(item.ids) + item.max_new_tokens <= length
        assert len(task.encode(bpe, problem.message(size + 1))) + item.max_new_tokens > length
        assert item.max_new_tokens >= len(bpe.encode(", ".join(problem.references)))


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([task for task in WITHOUT_FILES if "niah" in task]), st.integers(0, 10**6), st.integers(0, 400))
def test_needles_stand_once_and_their_keys_and_values_differ(name, seed, size):
    problem = PROBLEMS[name](random.Random(seed), Material(4096, 0.3))
    text = problem.message(size)
    assert text == problem.message(size)
    pairs = re.findall(r"A secret \w+ for (\S+) is (\S+)\.", text)
    keys, values = zip(*pairs, strict=True)
    assert len(set(values)) == len(values)
    assert all(text.count(reference) == 1 for reference in problem.references)
    number = {"niah_multikey_1": 4, "niah_multivalue": 4, "niah_multiquery": 4}.get(name, 1)
    among = size if name in ("niah_multikey_2", "niah_multikey_3") else 0
    assert len(pairs) == number + among
    assert len(set(keys)) == (1 if name == "niah_multivalue" else len(pairs))
    assert len(problem.references) == (4 if name in ("niah_multivalue", "niah_multiquery") else 1)
    # Seven digits, or 8-4-4-4-12 hexadecimal ones of version 4.
    identifiers = name in ("niah_single_3", "niah_multikey_3")
    pattern = r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}" if identifiers else r"\d{7}"
    assert all(re.fullmatch(pattern, value) for value in values)


@pytest.mark.parametrize("name", SINGLE)
@pytest.mark.parametrize("depth", [0.0, 0.25, 1.0])
def test_the_asked_needle_stands_at_its_depth(name, depth):
    problem = PROBLEMS[name](random.Random(0), Material(4096, depth))
    assert problem.depth == depth
    before, after = problem.message(200).split(problem.references[0])
    share = len(before) / (len(before) + len(after))
    assert abs(share - depth) < 0.05  # units differ in length, and the question takes room


def test_needles_are_placed_by_hand():
    units = list("abcdefgh")
    assert "".join(placed(units, ["3", "1", "2"], [1.0, 0.0, 0.25])) == "1ab2cdefgh3"
    assert placed([], ["1", "2"], [0.9, 0.1]) == ["2", "1"]
    assert "".join(units) == "abcdefgh"


@pytest.mark.parametrize("length, often, seldom", [(4096, 30, 3), (4095, 6, 1)])
def test_common_words_occur_as_often_as_in_ruler(length, often, seldom):
    problem = PROBLEMS["cwe"](random.Random(0), Material(length, 0.5))
    shown, listed = problem.message(50).split("Now your turn.")
    counts = Counter(re.findall(r"\d+\. (\w+)", listed))
    assert Counter(counts.values()) == {often: 10, seldom: 50}
    assert {word for word, count in counts.items() if count == often} == set(problem.references)
    example = Counter(re.findall(r"\d+\. (\w+)", shown))
    assert Counter(example.values()) == ({10: 10, 3: 30} if length == 4096 else {3: 10, 1: 10})
    assert not set(example) & set(counts)
    answer = shown.rpartition("Answer: ")[2].split()
    assert {word for word, _ in example.most_common(10)} == set(answer)


def test_coded_words_follow_the_zeta_distribution():
    """zeta(2) = 1.6449: of 10,000 words 6079 are dots, then 1519, 675, 379 and 243 are one word each."""
    problem = PROBLEMS["fwe"](random.Random(0), Material(4096, 0.5))
    text = problem.message(10_000)
    assert len(re.findall(r"(?<!\S)\.\.\.(?!\S)", text)) == 6079
    most = Counter(re.findall(r"\b[a-z]{6}\b", text.split("\n\n")[1])).most_common(4)
    assert [count for _, count in most] == [1519, 675, 379, 243]
    assert [word for word, _ in most[:3]] == problem.references


def test_variables_form_one_chain_in_the_order_of_the_text():
    problem = PROBLEMS["vt"](random.Random(0), Material(4096, 0.5))
    shown, text = problem.message(60).split("Now your turn.")
    chain = re.findall(r"VAR (\w{5}) = (?:VAR )?(\w{5})\.", text)
    assert [new for new, _ in chain] == problem.references and len(chain) == 5
    assert [old for _, old in chain[1:]] == problem.references[:-1]
    assert chain[0][1] in problem.question
    assert re.search(r"Answer: ([A-Z]{3} ){4}[A-Z]{3}\n", shown)


# ---------------------------------------------------------------- the task


def test_prompts_do_not_depend_on_what_else_is_asked(bpe):
    def ids(seed=0, **config):
        return {item.id: item.ids for item in build(seed, num_prompts=2, **config).items(bpe)}

    several = ids(tasks=["vt", "fwe", "niah_multikey_1"], lengths=[900, 700])
    assert ids(tasks=["niah_multikey_1", "fwe"], lengths=[900]).items() <= several.items()
    other = ids(1, tasks=["vt", "fwe", "niah_multikey_1"], lengths=[900, 700])
    assert not {tuple(i) for i in other.values()} & {tuple(i) for i in several.values()}
    assert len({tuple(i) for i in several.values()}) == len(several) == 12


def test_depths_are_spread_evenly_over_the_prompts():
    assert [depth_of(i, 5) for i in range(5)] == [0, 0.25, 0.5, 0.75, 1]
    assert depth_of(0, 1) == 0.5
    counts = Counter(round(depth_of(i, 50), 6) for i in range(50))
    assert sorted(counts) == [tenth / 10 for tenth in range(11)]
    assert set(counts.values()) == {4, 5}


def test_scores_are_means_over_tasks_and_depths(bpe):
    """The values of single_1 are found; vt's are not; a reply with two of four values is half right."""

    def reply(prompt):
        if "VAR" in prompt:
            return "none"
        found = solve(prompt)
        return found if "number for" in prompt.rpartition("\n\nWhat")[2] else " and ".join(found.split(" and ")[:2])

    tasks = ["niah_single_1", "niah_multivalue", "vt"]
    measured = samples(build(tasks=tasks, lengths=[800, 1000], num_prompts=3), bpe, reply)
    values = {name: score["value"] for name, score in aggregate(measured).items()}
    assert values == {
        f"{length}{name}": value
        for length in (800, 1000)
        for name, value in {
            "": 0.5, "/niah_single_1": 1.0, "/niah_multivalue": 0.5, "/vt": 0.0,
            "/depth_0.00": 1.0, "/depth_0.50": 1.0, "/depth_1.00": 1.0,
        }.items()
    }  # fmt: skip
    assert json.loads(json.dumps([sample.record for sample in measured]))


def test_samples_keep_prompt_reply_answer_and_verdict(bpe, tmp_path):
    """As docs/evaluation.md says, the prompt with its header and its control tokens."""
    task = build(tasks=["niah_single_1", "vt"], lengths=[800], num_prompts=2)
    engine = Canned(bpe, lambda prompt: "<think>\nwhere?\n</think>\n" + solve(prompt))
    run_task("ruler", task, engine, tmp_path, batch_tokens=4000, seed=0)
    kept = [json.loads(line)["record"] for line in (tmp_path / SAMPLES).read_text().splitlines()]
    assert sorted(record["prompt"] for record in kept) == sorted(prompt for prompt, _ in engine.asked)
    for record in kept:
        assert record["prompt"].startswith("<|im_start|>system") and record["question"] in record["prompt"]
        assert len(bpe.encode(record["prompt"])) == record["prompt_tokens"]
        assert record["answer"] == record["reply"].removeprefix("<think>\nwhere?\n</think>\n")
        assert record["score"] == 1.0


def test_string_matches_by_hand():
    """The definitions of RULER's paper, appendix: mean share of references, and the best reference."""
    references = ["4831", "ABC", "7", "Nine"]
    assert string_match_all("It is 4831 and abc.", references) == 0.5
    assert string_match_all("nine, 7, ABC, 4831", references) == 1.0
    assert string_match_part("It is 4831 and abc.", references) == 1.0
    assert string_match_part("eight", references) == 0.0
    assert string_match_all("", references) == 0.0


def test_the_answer_is_what_follows_the_think_block(bpe):
    task = build(tasks=["niah_single_1"], lengths=[700], num_prompts=1)

    def score(spoil):
        return samples(task, bpe, lambda prompt: spoil(solve(prompt)))[0].metrics["700"]

    assert score(lambda answer: f"<think>\nhm\n</think>\n{answer}") == 1.0
    assert score(lambda answer: f"<think>\n{answer}\n</think>\nno") == 0.0
    assert score(lambda answer: f"<think>\n{answer}") == 0.0
    assert score(lambda answer: "\x00\x1f" + answer + "\x07") == 1.0


def test_thinking_keeps_room_for_the_think_block(bpe):
    config = dict(tasks=["niah_single_2"], lengths=[1500], num_prompts=2)
    plain = build(**config).items(bpe)
    thinking = build(**config, thinking=True, think_tokens=500).items(bpe)
    for with_block, without in zip(thinking, plain, strict=True):
        assert (with_block.max_new_tokens, without.max_new_tokens) == (628, 128)
        assert 1450 < len(with_block.ids) + 628 <= 1500
        assert bpe.decode(without.ids).endswith("<think>\n\n</think>\n")
        assert bpe.decode(with_block.ids).endswith("assistant\n")


def test_replies_of_a_batch_are_those_of_prompts_alone(bpe, model):
    """Prompts of all tasks in one batch, padded on the left, through a tiny random model."""
    model.resize_token_embeddings(len(bpe), mean_resizing=False)
    task = build(tasks=[*SINGLE, "vt", "fwe"], lengths=[700], num_prompts=1)
    items = task.items(bpe)
    engine = LocalEngine(model, bpe)
    prompts = [item.ids for item in items]
    assert len(set(map(len, prompts))) > 3
    together = engine.generate(prompts, max_new_tokens=12)
    assert together == [engine.generate([prompt], max_new_tokens=12)[0] for prompt in prompts]
    assert len({reply.text for [reply] in together}) > 1


# ---------------------------------------------------------------- the user's files


def test_haystacks_come_from_a_text_and_what_is_repeated_is_counted(bpe, tmp_path):
    file = tmp_path / "book.txt"
    sentences = [f"The {colour} cat sat  on\nthe mat, and the {colour} dog stood by." for colour in COLOURS]
    file.write_text(" ".join(sentences), encoding="utf-8")
    task = build(tasks=["niah_single_1", "niah_single_2"], lengths=[450, 1500], num_prompts=3, text=str(file))
    items = task.items(bpe)
    assert task.notes == {"prompts_with_repeated_text": 3}
    starts = set()
    for item in items:
        text = message(bpe.decode(item.ids))
        cats = re.findall(r"The (\w+) cat sat on the mat, and the \1 dog", text)
        assert bool(cats) == ("niah_single_2" in item.id)
        if cats:
            first = COLOURS.index(cats[0])
            assert cats == [COLOURS[(first + i) % 8] for i in range(len(cats))]
            starts.add(first)
    assert len(starts) > 1


def test_long_texts_without_sentences_are_cut(bpe, tmp_path):
    file = tmp_path / "words.txt"
    file.write_text("word " * 500 + "x" * 3000)
    items = build(tasks=["niah_single_2"], lengths=[900], num_prompts=2, text=str(file)).items(bpe)
    assert all(solve(bpe.decode(item.ids)).endswith(item.about.references[0]) for item in items)


def test_documents_are_hidden_among_the_others_and_what_is_repeated_is_counted(bpe, questions):
    task = build(tasks=QA, lengths=[400, 900], num_prompts=4, questions=questions)
    repeated = 0
    for item in task.items(bpe):
        documents = re.split(r"\n\nDocument \d+:\n", message(bpe.decode(item.ids)).rpartition("\n\n")[0])[1:]
        assert sum(item.about.references[0] in document for document in documents) == 1
        assert len(set(documents)) == min(len(documents), 16)
        repeated += len(documents) > 16
    assert task.notes == {"prompts_with_repeated_text": repeated}
    assert repeated == 8


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "a?", "context": "b", "answers": []}, 'q.jsonl:2: expected "question"'),
        ({"question": "a?", "context": ["b", ""], "answers": ["c"]}, 'q.jsonl:2: expected "question"'),
        ({"question": 3, "context": "b", "answers": ["c"]}, 'q.jsonl:2: expected "question"'),
        ({"question": "b?", "context": "same", "answers": ["c"]}, "no context differs from one question's"),
        ({"question": "b?", "context": "other", "answers": ["c"]}, "has 2 rows for qa_1, fewer than num_prompts=3"),
    ],
)
def test_unusable_questions_are_refused(bpe, tmp_path, row, message):
    file = tmp_path / "q.jsonl"
    file.write_text(
        "".join(json.dumps(r) + "\n" for r in ({"question": "a?", "context": "same", "answers": ["b"]}, row))
    )
    with pytest.raises(UserError, match=message):
        build(tasks=["qa_1"], lengths=[900], num_prompts=3, questions=str(file)).items(bpe)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b" \n", "holds no word"), (b"caf\xe9 au lait", "is not UTF-8 at byte 3"), (None, "is no")],
)
def test_unusable_texts_are_refused(bpe, tmp_path, content, message):
    file = tmp_path / "book.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=f"book.txt: {message}"):
        build(tasks=["niah_single_2"], lengths=[900], text=str(file)).items(bpe)


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(tasks=["niah"]), r"tasks=\['niah'\] is not a list of different tasks; use some of niah_single_1"),
        (dict(tasks=[]), r"tasks=\[\] is not a list"),
        (dict(tasks=["vt", "vt"]), "tasks=.* is not a list of different tasks"),
        (dict(lengths=[]), r"lengths=\[\] is not a list"),
        (dict(num_prompts=0), "num_prompts=0 is below 1"),
        (dict(think_tokens=0), "think_tokens=0 is below 1"),
        (dict(tasks=["vt", "qa_2"]), "questions is not given; qa_2 needs it"),
    ],
)
def test_settings_out_of_range_are_refused(changes, message):
    with pytest.raises(UserError, match=f"evaluation.tasks.ruler.{message}"):
        build(**changes)


def test_a_length_that_cannot_hold_a_task_names_the_least_that_can(bpe):
    tasks = ["niah_single_1", "cwe"]
    with pytest.raises(UserError, match=r"lengths=500 is too short: .* tokens in cwe; use \d+ or more") as caught:
        build(tasks=tasks, lengths=[3000, 500], num_prompts=3).items(bpe)
    assert "niah_single_1" not in str(caught.value)
    least = int(re.search(r"use (\d+) or more", str(caught.value))[1])
    assert len(build(tasks=tasks, lengths=[least], num_prompts=3).items(bpe)) == 6
    with pytest.raises(UserError, match=f"lengths={least - 1} is too short"):
        build(tasks=tasks, lengths=[least - 1], num_prompts=3).items(bpe)

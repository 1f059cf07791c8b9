import json
import re

import numpy as np
import pytest

from smolpost.chat.fates import Fate
from smolpost.chat.masks import encode
from smolpost.data.tasks import TaskBlock, TaskFile, chase_row, copy_row, recall_row, write_tasks
from smolpost.data.validate import validate_row
from smolpost.errors import UserError


def turns(row):
    _, user, assistant = row["messages"]
    return user["content"], assistant["content"]


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_copy_goes_on_repeating_half_of_length_to_length_distinct_letters(rng):
    rows = [copy_row(rng, length=9) for _ in range(200)]
    lengths = set()
    for row in rows:
        text, reply = (message["content"] for message in row["messages"][1:])
        lengths.add(len(text))
        assert text.isalpha() and len(set(text)) == len(text) and len(text + reply) == 27
        assert all(c == (text + reply)[i] for i, c in enumerate(reply))  # every character is the one a period before
    assert lengths == set(range(5, 10))
    assert rows[0]["source"] == "copy_9"


@pytest.mark.parametrize("length, pairs, queries", [(64, 8, 8), (33, 8, 8), (200, 26, 3), (5, 1, 1)])
def test_recall_has_its_length_its_pairs_and_the_asked_values(rng, length, pairs, queries):
    for _ in range(50):
        user, assistant = turns(recall_row(rng, length=length, pairs=pairs, queries=queries))
        assert len(user) == length
        context, asked = user.split("?")
        stored = dict(re.findall(r"#([A-Z])([a-z])", context))
        assert len(stored) == pairs
        assert re.fullmatch(r"[0-9]*", re.sub(r"#[A-Z][a-z]", "", context))
        assert len(asked) == queries
        assert assistant == "".join(key + stored[key] for key in asked)


def test_recall_pairs_stand_anywhere(rng):
    rows = [turns(recall_row(rng, length=9, pairs=1, queries=1))[0] for _ in range(300)]
    counts = np.bincount([user.index("#") for user in rows])
    assert len(counts) == 5  # 7 characters of context
    assert counts.min() > 30  # of 60 expected at each place


def test_recall_asks_with_replacement(rng):
    asked = [turns(recall_row(rng, length=40, pairs=4, queries=4))[0].split("?")[1] for _ in range(50)]
    assert any(len(set(keys)) < 4 for keys in asked)


@pytest.mark.parametrize("hops, think", [(4, True), (4, False), (1, True), (9, False)])
def test_chase_follows_its_edges(rng, hops, think):
    for _ in range(50):
        row = chase_row(rng, hops=hops, think=think)
        user, assistant = turns(row)
        edges = dict(re.findall(r">([A-Z])([A-Z])", user))
        assert re.fullmatch(r"(>[A-Z]{2}){8}@[A-Z]", user)
        assert len(edges) == 8
        assert set(edges) == set(edges.values())
        visited = user[-1]
        for _ in range(hops):
            visited += edges[visited[-1]]
        assert assistant == (f"<think>\n{visited}\n</think>\n{visited[-1]}" if think else visited[-1])
        assert row["chat_template_kwargs"]["enable_thinking"] is think


def test_chase_walks_one_cycle_of_all_nodes(rng):
    _, assistant = turns(chase_row(rng, hops=8, think=True))
    nodes = assistant.split("\n")[1]
    assert nodes[0] == nodes[8]
    assert len(set(nodes)) == 8


@pytest.mark.parametrize(
    "row",
    [
        copy_row(np.random.default_rng(0), length=9),
        recall_row(np.random.default_rng(0), length=64, pairs=8, queries=8),
        chase_row(np.random.default_rng(0), hops=4, think=True),
    ],
)
def test_rows_train_exactly_their_answer_after_a_prompt_without_header(row, tokenizer):
    assert validate_row(row, "f:1") == "messages"
    kwargs = row["chat_template_kwargs"]
    ids, fates, *_ = encode(tokenizer, row["messages"], template_kwargs=kwargs, today="1 May 2025")
    user, assistant = turns(row)
    assert tokenizer.decode(np.array(ids)[np.array(fates) == Fate.TRAINED]) == assistant + "<|im_end|>"
    assert tokenizer.decode(ids).startswith(f"<|im_start|>user\n{user}<|im_end|>")
    assert tokenizer.unk_token_id not in ids


def written(folder, name):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def test_files_hold_their_blocks_in_order(tmp_path):
    blocks = {
        "a": TaskBlock(task="copy", rows=2, length=5),
        "b": TaskBlock(task="recall", rows=3, length=20, pairs=2, queries=2),
        "c": TaskBlock(task="chase", rows=1, think=True),
    }
    assert write_tasks({"base": TaskFile(blocks=blocks)}, 0, tmp_path) == {"base": 6}
    sources = [row["source"] for row in written(tmp_path, "base")]
    assert sources == ["copy_5", "copy_5", "recall_20", "recall_20", "recall_20", "chase_4_think"]


def test_replay_is_a_share_of_the_text(tmp_path):
    """40% of each block's characters are earlier blocks', equally, though their rows are shorter."""
    blocks = {str(n): TaskBlock(task="recall", rows=3000, length=n, pairs=2, queries=2) for n in (26, 86, 286)}
    write_tasks({"base": TaskFile(blocks=blocks, replay=0.4)}, 0, tmp_path)
    rows = written(tmp_path, "base")
    assert {row["source"] for row in rows[:3000]} == {"recall_26"}
    sizes = {"recall_26": 40, "recall_86": 100, "recall_286": 300}  # with markup and reply
    text = {source: size * sum(row["source"] == source for row in rows[6000:]) for source, size in sizes.items()}
    for source, share in {"recall_26": 0.2, "recall_86": 0.2, "recall_286": 0.6}.items():
        assert text[source] / sum(text.values()) == pytest.approx(share, abs=0.04)


def test_a_file_depends_on_the_seed_and_itself_alone(tmp_path):
    file = TaskFile(blocks={"a": TaskBlock(task="copy", rows=5, length=12)})
    contents = []
    for i, (files, seed) in enumerate([({"x": file}, 0), ({"w": file, "x": file}, 0), ({"x": file}, 1)]):
        folder = tmp_path / str(i)
        folder.mkdir()
        write_tasks(files, seed, folder)
        contents.append((folder / "x.jsonl").read_text())
    assert contents[0] == contents[1] != contents[2]
    assert (tmp_path / "1" / "w.jsonl").read_text() != contents[1]


@pytest.mark.parametrize(
    "block, message",
    [
        (
            TaskBlock(task="recall", rows=1, length=32),
            r"files.f.blocks.b.length=32 is below 3 x pairs \+ 1 \+ queries = 33; raise it, or lower pairs or queries",
        ),
        (TaskBlock(task="recall", rows=1, length=99, pairs=27), r"blocks.b.pairs=27 is above 26, the number of keys"),
        (TaskBlock(task="recall", rows=1, queries=0), r"files.f.blocks.b.queries=0 is below 1; raise it"),
        (
            TaskBlock(task="copy", rows=1, length=2),
            r"files.f.blocks.b.length=2 is below 3, too short a string to copy",
        ),
        (TaskBlock(task="copy", rows=1, length=53), r"blocks.b.length=53 is above 52, the number of letters"),
        (TaskBlock(task="copy", rows=0), r"files.f.blocks.b.rows=0 is below 1; raise it"),
        (TaskBlock(task="chase", rows=1, hops=0), r"files.f.blocks.b.hops=0 is below 1; raise it"),
        (TaskBlock(task="sum", rows=1), r"files.f.blocks.b.task=sum is unknown; use copy, recall or chase"),
    ],
)
def test_infeasible_blocks_are_refused_and_nothing_is_written(tmp_path, block, message):
    fine = TaskFile(blocks={"a": TaskBlock(task="copy", rows=1, length=12)})
    with pytest.raises(UserError, match=message):
        write_tasks({"fine": fine, "f": TaskFile(blocks={"b": block})}, 0, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_infeasible_files_are_refused(tmp_path):
    blocks = {"a": TaskBlock(task="copy", rows=1, length=12)}
    with pytest.raises(UserError, match=r"files.f.replay=1 is outside \[0, 1\); use a share such as 0.2"):
        write_tasks({"f": TaskFile(blocks=blocks, replay=1)}, 0, tmp_path)
    with pytest.raises(UserError, match=r"files.f.blocks is empty; give at least one block"):
        write_tasks({"f": TaskFile()}, 0, tmp_path)
    with pytest.raises(UserError, match=r"seed=-1 is below 0; use 0 or more"):
        write_tasks({"f": TaskFile(blocks=blocks)}, -1, tmp_path)

import io
import json
import tempfile
from itertools import pairwise
from pathlib import Path
from unittest import mock

import datasets
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from smolpost.chat.fates import Fate
from smolpost.chat.masks import encode
from smolpost.chat.render import load_template
from smolpost.chat.tokenizer import build_tokenizer
from smolpost.data import prepare_documents, prepare_pairs
from smolpost.data.collate import PARTS, collate_packs, collate_pairs
from smolpost.data.dataset_folder import write_dataset
from smolpost.data.mixtures import mix
from smolpost.data.packing import best_fit_decreasing, unpacked, wrapped
from smolpost.data.report import format_report
from smolpost.data.tokenize import SCHEMA, num_shared
from smolpost.data.tokens import Tokens
from smolpost.errors import UserError
from smolpost.schema import Mixture, Source
from smolpost.stages.preference import APOStage
from smolpost.stages.sft import SFTStage
from tests.prepared import prepared

OVERRIDE = {"role": "system", "content": "/system_override"}
END = "<|im_end|>"


def chat(user, reply, *, think=True, **more):
    """Rendered: <|im_start|>user\\n{user}<|im_end|>\\n<|im_start|>assistant\\n{reply}<|im_end|>\\n."""
    turns = [OVERRIDE, {"role": "user", "content": user}, {"role": "assistant", "content": reply, **more}]
    return {"messages": turns, "chat_template_kwargs": {"enable_thinking": think}}


def pair(user, chosen, rejected):
    sides = {key: chat(user, reply)["messages"] for key, reply in (("chosen", chosen), ("rejected", rejected))}
    return {"prompt": user, **sides, "chat_template_kwargs": {"enable_thinking": True}}


def new(folder):
    """A folder of its own, for a test that prepares more than once."""
    return Path(tempfile.mkdtemp(dir=folder))


CHAT_TOKENS = 10  # of a think row beside its user and assistant characters


def sft(**settings):
    stage = {"init_from": "base", "data": "mixed", "max_seq_len": 64, "learning_rate": 1e-3, "global_batch_size": 1}
    return SFTStage(**stage | {"max_dropped": 1.0, "num_workers": 1} | settings)


def apo(**settings):
    stage = {"init_from": "base", "data": "pairs", "max_seq_len": 64, "global_batch_size": 1}
    return APOStage(**stage | {"max_dropped": 1.0, "num_workers": 1} | settings)


def documents_of(dataset):
    """[(ids, labels)] of every document of every pack."""
    found = []
    for row in dataset:
        edges = np.cumsum([0, *row["seq_lengths"]])
        labels = labels_of(row)
        assert edges[-1] == len(labels)
        found += [(row["input_ids"][a:b], labels[a:b]) for a, b in pairwise(edges)]
    return found


def labels_of(row):
    """The ids of a pack's trained tokens, -100 elsewhere, as collating makes them."""
    return [i if fate == Fate.TRAINED else -100 for i, fate in zip(row["input_ids"], row["fates"], strict=True)]


def decoded_labels(tokenizer, labels):
    return tokenizer.decode([token for token in np.ravel(labels).tolist() if token != -100])


# ---------------------------------------------------------------- sft


def test_one_conversation_by_hand(tokenizer, tmp_path):
    dataset, _ = prepared(sft(), [chat("ab", "cd")], tokenizer, new(tmp_path))
    ids = tokenizer.encode(f"<|im_start|>user\nab{END}\n<|im_start|>assistant\ncd{END}\n", add_special_tokens=False)
    header = 5  # <|im_start|>user\n is a token each, and the first of the document
    fates = [Fate.FIRST, *[Fate.TEMPLATE] * 2, *[Fate.USER] * 2, *[Fate.TEMPLATE] * header, *[Fate.TRAINED] * 3, 4]
    assert dataset[:] == {
        "input_ids": [ids], "fates": [fates], "seq_lengths": [[14]], "rows": [[0]],
    }  # fmt: skip
    assert labels_of(dataset[0]) == [-100] * 10 + ids[10:13] + [-100]
    assert len(ids) == CHAT_TOKENS + 4


def test_text_trains_all_but_its_first_token_and_ends_with_end_of_text(tokenizer, tmp_path):
    dataset, report = prepared(sft(), [{"text": "abc"}], tokenizer, new(tmp_path))
    ids = tokenizer.convert_tokens_to_ids(["a", "b", "c", "<|end_of_text|>"])
    assert (dataset["input_ids"][:], labels_of(dataset[0])) == ([ids], [-100, *ids[1:]])
    assert report["totals"]["think_rows"] == report["totals"]["no_think_rows"] == 0


def test_the_folder_is_memory_mapped_and_typed(tokenizer, tmp_path):
    dataset, report = prepared(sft(), [chat("ab", "cd")], tokenizer, tmp_path)
    assert {name: column.feature.dtype for name, column in dataset.features.items()} == prepare_documents.PACK_TYPES
    assert [file["filename"] for file in dataset.cache_files] == [str(tmp_path / "rows" / "data-00000-of-00001.arrow")]
    assert json.loads((tmp_path / "rows" / "data_report.json").read_text()) == report


@pytest.mark.parametrize("packing", ["bfd", "wrapped", "none"])
@pytest.mark.parametrize("chunk", [1, 50, 2**23])
def test_packs_hold_every_document_whatever_the_chunks(tokenizer, tmp_path, monkeypatch, packing, chunk):
    rng = np.random.default_rng(0)
    rows = [chat("u" * rng.integers(1, 20), "r" * rng.integers(1, 20)) for _ in range(30)]
    monkeypatch.setattr(prepare_documents, "CHUNK_TOKENS", chunk)
    dataset, report = prepared(sft(packing=packing), rows, tokenizer, tmp_path)
    found = documents_of(dataset)
    whole = [encode(tokenizer, row["messages"], today="x") for row in rows]
    if packing == "wrapped":
        assert [t for ids, _ in found for t in ids] == [t for row in whole for t in row.input_ids]
    else:
        expected = [
            [t if fate == Fate.TRAINED else -100 for t, fate in zip(row.input_ids, row.fates, strict=True)]
            for row in whole
        ]
        assert sorted(found) == sorted(zip([row.input_ids for row in whole], expected, strict=True))
    assert all(len(row["input_ids"]) <= 64 for row in dataset)
    assert all(labels[0] == -100 for _, labels in found)
    tokens = sum(len(row.input_ids) for row in whole)
    assert report["totals"]["packs"] == len(dataset)
    assert report["totals"]["tokens_per_pack"] == tokens / len(dataset)
    assert report["totals"]["fill_percent"] == pytest.approx(100 * tokens / len(dataset) / 64)


PLANS = {"bfd": best_fit_decreasing, "wrapped": wrapped, "none": lambda lengths, _: unpacked(lengths)}
FLAGS = st.lists(st.lists(st.booleans(), min_size=1, max_size=12), min_size=1, max_size=20)


def naive_packs(documents, plan):
    """The columns of a plan over documents [(ids, trained)], token by token."""
    packs = []
    for first, last in pairwise(plan.pack_offsets):
        pack = {"input_ids": [], "labels": [], "seq_lengths": []}
        for piece in range(first, last):
            (ids, trained), start, stop = documents[plan.document[piece]], plan.start[piece], plan.stop[piece]
            pack["input_ids"] += ids[start:stop]
            pack["labels"] += [ids[i] if trained[i] and i > start else -100 for i in range(start, stop)]
            pack["seq_lengths"].append(int(stop - start))
        packs.append(pack)
    return packs


@settings(max_examples=60, deadline=None)
@given(FLAGS, st.sampled_from(list(PLANS)), st.sampled_from([1, 20, 2**18]), st.integers(1, 5))
def test_the_folder_equals_a_naive_construction(flags, packing, chunk, rows_per_batch):
    flags = [[False, *trained] for trained in flags]
    offsets = np.cumsum([0, *map(len, flags)])
    rows = [(list(range(a, b)), trained) for (a, b), trained in zip(pairwise(offsets.tolist()), flags, strict=True)]
    documents = [(ids, trained) for ids, trained in rows if any(trained)]  # the others teach nothing
    if not documents:
        return
    stage = sft(packing=packing, max_seq_len=16)
    tokens = Tokens([token_batch(rows[i : i + rows_per_batch]) for i in range(0, len(rows), rows_per_batch)])
    _, pieces, plan = prepare_documents.pack(stage, tokens, prepare_documents.whole_rows(tokens, np.arange(len(rows))))
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(prepare_documents, "CHUNK_TOKENS", chunk):
        write_dataset(
            Path(folder), prepare_documents.PACK_TYPES, prepare_documents.pack_chunks(tokens, pieces, plan, None)
        )
        found = datasets.load_from_disk(folder)
    columns = [{key: row[key] for key in ("input_ids", "seq_lengths")} | {"labels": labels_of(row)} for row in found]
    assert columns == naive_packs(documents, PLANS[packing]([len(ids) for ids, _ in documents], 16))


def token_batch(rows):
    """Rows of (ids, trained) as tokenization stores them."""
    fates = [np.where(trained, Fate.TRAINED, Fate.USER) for _, trained in rows]
    for row_fates in fates:
        row_fates[0] = Fate.FIRST
    columns = {
        "path": ["f"] * len(rows), "number": [1] * len(rows), "ids": [ids for ids, _ in rows],
        "fates": [row_fates.tolist() for row_fates in fates], "parts": [[len(ids)] for ids, _ in rows],
        "fate_counts": [np.bincount(row_fates, minlength=len(Fate)).tolist() for row_fates in fates],
        "is_text": [False] * len(rows), "think": [False] * len(rows), "unknown": [0] * len(rows),
        "neutralised": [0] * len(rows), "content": [0] * len(rows), "features": [None] * len(rows),
        "fault": [None] * len(rows), "unread": [[]] * len(rows), "notes": [[]] * len(rows),
    }  # fmt: skip
    return pa.RecordBatch.from_pydict(columns, schema=SCHEMA)


def test_the_fingerprint_follows_every_value_length_and_type(tmp_path):
    def fingerprint(values, lengths=(2, 1), types=("int32", "int8")):
        chunk = {"a": (np.array(values[0]), lengths), "b": (np.array(values[1]), (2, 1))}
        write_dataset(tmp_path, dict(zip("ab", types, strict=True)), [chunk])
        return datasets.load_from_disk(tmp_path)._fingerprint

    base = ([1, 2, 3], [4, 5, 6])
    others = [
        fingerprint(([1, 2, 4], [4, 5, 6])),
        fingerprint(([1, 2, 3], [4, 5, 7])),
        fingerprint(base, lengths=(1, 2)),
        fingerprint(base, types=("int32", "int16")),
    ]
    assert fingerprint(base) == fingerprint(base)
    assert len({fingerprint(base), *others}) == 5


def test_preparing_twice_gives_the_same_bytes(tokenizer, tmp_path):
    files = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        prepared(sft(), [chat("ab", "cd"), {"text": "abc"}], tokenizer, tmp_path / name)
        made = (tmp_path / name / "rows").iterdir()  # rows.parquet names the file, which is another one
        files.append({file.name: file.read_bytes() for file in made if file.name != "rows.parquet"})
    assert files[0] == files[1]


def test_last_turn_only_trains_the_last_reply(tokenizer, tmp_path):
    row = chat("a", "first")
    row["messages"] += chat("b", "second")["messages"][1:]
    dataset, _ = prepared(sft(last_turn_only=True), [row], tokenizer, new(tmp_path))
    assert decoded_labels(tokenizer, labels_of(dataset[0])) == f"second{END}"


OVERLONG = chat("u" * 30, "r" * 30)  # 70 tokens, of which the last 32 are the reply, its stop token and a line break


@pytest.mark.parametrize("packing", ["bfd", "none"])
def test_overlong_rows_are_refused_by_name(tokenizer, tmp_path, packing):
    rows = [("s", chat("a", "b")), ("s", OVERLONG)]
    message = (
        r"s.jsonl:2 \(source s\): has 70 tokens, above max_seq_len=64; 1 of 2 rows are too long, the longest has 70; "
        "raise max_seq_len or set overlong to truncate, split or drop$"
    )
    with pytest.raises(UserError, match=message):
        prepared(sft(packing=packing), rows, tokenizer, tmp_path)


def source_entry(report, *keys):
    return [report["sources"]["only"][key] for key in keys]


KEPT_KEYS = ("rows_kept", "rows_truncated", "rows_split", "tokens_trained", "tokens_truncated", "tokens_dropped")


def test_overlong_rows_are_truncated(tokenizer, tmp_path):
    dataset, report = prepared(sft(overlong="truncate"), [OVERLONG], tokenizer, new(tmp_path))
    assert dataset["seq_lengths"][0] == [64]
    assert decoded_labels(tokenizer, labels_of(dataset[0])) == "r" * 26
    assert source_entry(report, *KEPT_KEYS) == [1, 1, 0, 26, 6, 0]


def test_overlong_rows_are_split(tokenizer, tmp_path):
    dataset, report = prepared(sft(overlong="split"), [OVERLONG], tokenizer, new(tmp_path))
    assert sorted(map(sum, dataset["seq_lengths"])) == [6, 64]
    # The second piece's first token follows nothing it could be predicted from.
    assert decoded_labels(tokenizer, labels_of(dataset[0]) + labels_of(dataset[1])) == "r" * 26 + "r" * 3 + END
    assert source_entry(report, *KEPT_KEYS) == [1, 0, 1, 30, 0, 0]


def test_split_pieces_without_a_trained_token_are_left_out(tokenizer, tmp_path):
    dataset, report = prepared(sft(overlong="split"), [chat("u" * 80, "r" * 5)], tokenizer, new(tmp_path))
    assert dataset["seq_lengths"][0] == [31]
    assert source_entry(report, *KEPT_KEYS) == [1, 0, 1, 6, 0, 64]


def test_overlong_rows_are_dropped(tokenizer, tmp_path):
    dataset, report = prepared(sft(overlong="drop"), [chat("a", "b"), OVERLONG], tokenizer, new(tmp_path))
    assert dataset["seq_lengths"][:] == [[12]]
    assert source_entry(report, *KEPT_KEYS) == [1, 0, 0, 2, 0, 70]
    assert report["sources"]["only"]["dropped"] == {"overlong": 1}


def test_rows_whose_truncation_leaves_no_reply_are_dropped(tokenizer, tmp_path):
    rows = [chat("a", "b"), chat("u" * 80, "r")]
    _, report = prepared(sft(overlong="truncate"), rows, tokenizer, new(tmp_path))
    assert report["sources"]["only"]["dropped"] == {"without a trained token": 1}
    assert source_entry(report, *KEPT_KEYS) == [1, 0, 0, 2, 0, 91]


def test_wrapped_cuts_overlong_rows_whatever_the_policy(tokenizer, tmp_path):
    dataset, report = prepared(sft(packing="wrapped"), [OVERLONG], tokenizer, new(tmp_path))
    assert dataset["seq_lengths"][:] == [[64], [6]]
    assert source_entry(report, *KEPT_KEYS) == [1, 0, 1, 30, 0, 0]


def test_untrained_rows_are_counted_and_an_untrained_source_is_refused(tokenizer, tmp_path):
    silent = chat("a", "b", train=False)
    _, report = prepared(sft(), [silent, chat("a", "b")], tokenizer, new(tmp_path))
    assert report["sources"]["only"]["dropped"] == {"without a trained token": 1}
    with pytest.raises(
        UserError, match=r"source mute: none of its 2 rows has a trained token \(2 without a trained tok"
    ):
        prepared(sft(), [("fine", chat("a", "b")), ("mute", silent), ("mute", silent)], tokenizer, new(tmp_path))
    with pytest.raises(
        UserError, match=r"source only: none of its 1 rows has a trained token \(1 overlong\); check its"
    ):
        prepared(sft(overlong="drop"), [OVERLONG], tokenizer, new(tmp_path))


def test_report_by_hand(tokenizer, tmp_path):
    think = chat("u", "<think>\nx\n</think>\ny")
    no_think = chat("u", "y", think=False)
    rows = [("a", think), ("b", {"text": "words é"}), ("a", no_think)]
    _, report = prepared(sft(), rows, tokenizer, new(tmp_path))
    a, b = report["sources"]["a"], report["sources"]["b"]
    assert list(report["sources"]) == ["a", "b"]
    assert (a["rows_read"], a["rows_kept"], a["think_rows"], a["no_think_rows"]) == (2, 2, 1, 1)
    # think: <think> \n x \n </think> \n y and the stop token; no-think: y and the stop token.
    assert (a["tokens_trained"], b["tokens_trained"], b["tokens_read"]) == (8 + 2, 7, 8)
    assert (a["tokens_unknown"], b["tokens_unknown"]) == (0, 1)
    assert b["masked"]["first of a document"] == 1
    assert a["length_percentiles"] == {"50": 17, "90": 18, "99": 18, "100": 18}
    assert report["settings"] == {"layout": "documents", "packing": "bfd", "max_seq_len": 64, "overlong": "refuse"}
    assert report["totals"]["tokens_read"] == a["tokens_read"] + b["tokens_read"] == 43


@pytest.mark.parametrize("packing", ["bfd", "wrapped", "none"])
@pytest.mark.parametrize("overlong", ["truncate", "split", "drop"])
def test_every_token_read_is_accounted_for(tokenizer, tmp_path, packing, overlong):
    rng = np.random.default_rng(1)
    rows = [("a" if i % 3 else "b", chat("u" * rng.integers(1, 90), "r" * rng.integers(1, 90))) for i in range(60)]
    dataset, report = prepared(sft(packing=packing, overlong=overlong), rows, tokenizer, tmp_path)
    for entry in (*report["sources"].values(), report["totals"]):
        parts = [entry[f"tokens_{part}"] for part in ("trained", "masked", "truncated", "dropped")]
        assert entry["tokens_read"] == sum(parts)
        assert entry["rows_read"] == entry["rows_kept"] + sum(entry["dropped"].values())
    fates = np.concatenate(dataset["fates"][:])
    assert report["totals"]["tokens_trained"] == (fates == Fate.TRAINED).sum()
    assert report["totals"]["tokens_masked"] == (fates != Fate.TRAINED).sum()


def test_rows_of_the_wrong_kind_are_refused(tokenizer, tmp_path):
    with pytest.raises(UserError, match=r"only.jsonl:1: is a preference row, and the stage trains on documents"):
        prepared(sft(), [pair("u", "a", "b")], tokenizer, new(tmp_path))
    with pytest.raises(UserError, match=r"only.jsonl:1: has the columns text, and the stage trains on pairs"):
        prepared(apo(), [{"text": "x"}], tokenizer, new(tmp_path))
    with pytest.raises(UserError, match=r"a mixture has no sources; give at least one"):
        prepared(sft(), [], tokenizer, new(tmp_path))


def test_a_row_the_template_refuses_is_named(tokenizer, tmp_path):
    broken = {**chat("a", "b"), "chat_template_kwargs": {"enable_thinking": "no"}}
    with pytest.raises(UserError, match=r"only.jsonl:2: chat_template_kwargs.enable_thinking='no' is not a boolean"):
        prepared(sft(max_dropped=0), [chat("a", "b"), broken], tokenizer, new(tmp_path))


# ---------------------------------------------------------------- apo


def test_one_pair_by_hand(tokenizer, tmp_path):
    dataset, report = prepared(apo(), [pair("u", "<think>\nx\n</think>\ny", "n")], tokenizer, new(tmp_path))
    row = dataset[0]
    assert tokenizer.decode(row["prompt_ids"]) == f"<|im_start|>user\nu{END}\n<|im_start|>assistant\n"
    assert tokenizer.decode(row["chosen_ids"]) == f"<think>\nx\n</think>\ny{END}"
    assert tokenizer.decode(row["rejected_ids"]) == f"n{END}"
    assert (row["chosen_mask"], row["rejected_mask"]) == ([1] * 8, [1] * 2)
    assert {name: column.feature.dtype for name, column in dataset.features.items()} == prepare_pairs.PAIR_TYPES
    totals = report["totals"]
    assert (totals["pairs"], totals["think_rows"], totals["tokens_trained"], totals["tokens_masked"]) == (1, 1, 10, 9)
    assert totals["tokens_per_pair"] == 19


def multi_turn():
    """A pair whose completions hold user and tool turns."""
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    tool = {"role": "tool", "content": "42"}
    chosen = [*chat("u", "one")["messages"], {"role": "user", "content": "v"}, call, tool, {**call}, tool]
    chosen.append({"role": "assistant", "content": "last"})
    return {"chosen": chosen, "rejected": chat("u", "bad")["messages"]}


def test_user_and_tool_turns_inside_a_completion_are_not_scored(tokenizer, tmp_path):
    row = prepared(apo(max_seq_len=512), [multi_turn()], tokenizer, new(tmp_path))[0][0]
    whole = encode(tokenizer, multi_turn()["chosen"], today="x")
    assert row["prompt_ids"] + row["chosen_ids"] == whole.input_ids[:-1]  # up to the line break after the stop token
    scored = np.array(row["chosen_mask"], bool)
    assert scored.tolist() == [fate == Fate.TRAINED for fate in whole.fates[len(row["prompt_ids"]) : -1]]
    call = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    assert tokenizer.decode(np.array(row["chosen_ids"])[scored]) == f"one{END}{call}{END}{call}{END}last{END}"


def test_what_both_completions_begin_with_is_part_of_the_prompt(tokenizer, tmp_path):
    rows = [pair("u", "same start, good", "same start, bad"), pair("u", "ab", "abc"), pair("u", "x", "y")]
    dataset, report = prepared(apo(), rows, tokenizer, new(tmp_path))
    head = f"<|im_start|>user\nu{END}\n<|im_start|>assistant\n"
    texts = [[tokenizer.decode(row[f"{part}_ids"]) for part in PARTS] for row in dataset]
    assert texts == [
        [head + "same start, ", f"good{END}", f"bad{END}"],
        [head + "ab", END, f"c{END}"],
        [head, f"x{END}", f"y{END}"],
    ]
    assert [sum(row["prompt_mask"]) for row in dataset] == [12, 2, 0]
    assert [row["prompt_mask"][:9] for row in dataset] == [[0] * 9] * 3
    totals = report["totals"]
    assert totals["tokens_shared"] == sum(len(row["prompt_ids"]) for row in dataset) == 3 * 9 + 14
    assert totals["tokens_trained"] == 12 + 5 + 4 + 2 + 1 + 2 + 2 + 2


def test_sharing_ends_where_the_masks_differ():
    same, mask = np.arange(5), np.array([0, 0, 2, 0, 0])  # fates: 0 is trained
    assert num_shared([same, same + 0], [mask, mask]) == 4  # each side keeps its last token
    assert num_shared([same, same], [mask, np.array([0, 0, 0, 0, 0])]) == 2
    assert num_shared([same, np.array([0, 1, 9, 3, 4])], [mask, mask]) == 2
    assert num_shared([same, np.zeros(0, int)], [mask, np.zeros(0, int)]) == 0


def test_last_turn_only_scores_the_last_reply_of_each_side(tokenizer, tmp_path):
    row = prepared(apo(max_seq_len=512, last_turn_only=True), [multi_turn()], tokenizer, new(tmp_path))[0][0]
    for side, text in (("chosen", f"last{END}"), ("rejected", f"bad{END}")):
        scored = np.array(row[f"{side}_mask"], bool)
        assert tokenizer.decode(np.array(row[f"{side}_ids"])[scored]) == text


def test_overlong_pairs(tokenizer, tmp_path):
    rows = [pair("u", "fine", "n"), pair("u", "c" * 60, "n")]  # 9 prompt tokens, then up to 61
    with pytest.raises(
        UserError, match=r"only.jsonl:2 \(source only\): has 70 tokens, above max_seq_len=64; 1 of 2 pairs are too long"
    ):
        prepared(apo(), rows, tokenizer, new(tmp_path))
    with pytest.raises(UserError, match=r"overlong=split in the apo stage on data=pairs: pairs cannot be split"):
        prepared(apo(overlong="split"), rows, tokenizer, new(tmp_path))
    dataset, report = prepared(apo(overlong="drop"), rows, tokenizer, new(tmp_path))
    assert (len(dataset), report["totals"]["dropped"]) == (1, {"overlong": 1})
    dataset, report = prepared(apo(overlong="truncate"), rows, tokenizer, new(tmp_path))
    assert len(dataset[1]["chosen_ids"]) == len(dataset[1]["chosen_mask"]) == 55
    assert (report["totals"]["rows_truncated"], report["totals"]["tokens_truncated"]) == (1, 6)


def test_pairs_that_truncation_spoils_are_dropped(tokenizer, tmp_path):
    rows = [pair("u", "fine", "n"), pair("u" * 70, "a", "b"), pair("u", "x" * 60 + "a", "x" * 60 + "b")]
    _, report = prepared(apo(overlong="truncate"), rows, tokenizer, new(tmp_path))
    assert report["totals"]["dropped"] == {"without a trained token": 1, "equal after truncation": 1}
    entry = report["totals"]
    assert entry["tokens_read"] == sum(entry[f"tokens_{k}"] for k in ("trained", "masked", "truncated", "dropped"))


@pytest.mark.parametrize("chunk", [1, 30])
def test_pairs_do_not_depend_on_the_chunks(tokenizer, tmp_path, monkeypatch, chunk):
    rows = [pair("u" * i, "c" * i, "r" * (i + 1)) for i in range(1, 9)]
    (tmp_path / "one").mkdir()
    whole, _ = prepared(apo(), rows, tokenizer, tmp_path / "one")
    monkeypatch.setattr(prepare_pairs, "CHUNK_TOKENS", chunk)
    (tmp_path / "many").mkdir()
    assert prepared(apo(), rows, tokenizer, tmp_path / "many")[0][:] == whole[:]


# ---------------------------------------------------------------- the table, and real rows


def shown(report):
    out = io.StringIO()
    Console(file=out, width=80).print(format_report(report))
    return " ".join(out.getvalue().split())


def test_the_table_shows_sources_totals_and_packs(tokenizer, tmp_path):
    rows = [("words", {"text": "one é"}), ("chats", chat("a", "b")), ("chats", OVERLONG)]
    text = shown(prepared(sft(overlong="drop"), rows, tokenizer, new(tmp_path))[1])
    assert "source rows think tokens trained masked cut dropped p50/p99/max" in text
    for row in ("words 1 0% 6 5 1 0 0 6/6/6", "chats 2 0% ", "all 3 0% "):
        assert row in text
    assert "1 packs of 18 tokens on average, 28.1% full; 1 rows dropped: overlong; 1 tokens unknown" in text
    text = shown(prepared(apo(), [pair("u", "a", "b")], tokenizer, new(tmp_path))[1])
    assert "1 pairs of 13 tokens on average, 41% fewer than as two sequences each" in text


@pytest.fixture(scope="module")
def bpe():
    return build_tokenizer(["The answer is 12."], kind="bpe", vocab_size=300, template="smollm3")


def policy_text(tokenizer, row):
    """What the policy wrote in a conversation, from its messages alone."""
    text = ""
    for message in row["messages"]:
        if message["role"] == "assistant":
            calls = [call["function"] for call in message.get("tool_calls") or []]
            written = [message["content"]] if message.get("content") else []
            for call in calls:
                arguments = call["arguments"]
                arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
                body = json.dumps({"name": call["name"], "arguments": arguments}, ensure_ascii=False)
                written.append(f"<tool_call>{body}</tool_call>")
            text += "\n".join(written) + END
    return text


def test_collated_labels_of_conversations_in_files_decode_to_the_policys_text(rows_file, bpe, tmp_path):
    sources = {
        "math": Source(path=str(rows_file("sft")), max_rows=150),
        "tools": Source(path=str(rows_file("tools")), max_rows=10),
    }
    rows = mix(Mixture(sources=sources, shuffle=False))
    stage = sft(max_seq_len=40_000)
    dataset, report = prepared(stage, rows, bpe, tmp_path)
    batch = collate_packs(list(dataset))
    starts = (batch["position_ids"][0] == 0).nonzero().ravel().tolist()
    found = [
        decoded_labels(bpe, batch["labels"][0, a:b])
        for a, b in zip(starts, [*starts[1:], batch["labels"].shape[1]], strict=True)
    ]
    assert sorted(found) == sorted(policy_text(bpe, row) for _, row in rows)
    thinks = sum(row["chat_template_kwargs"]["enable_thinking"] for _, row in rows[:150])
    assert report["sources"]["math"]["think_rows"] == thinks
    assert 0 < thinks < 150


def test_collated_masks_of_pairs_in_files_decode_to_the_policys_text(rows_file, bpe, tmp_path):
    rows = mix(Mixture(sources={"pairs": Source(path=str(rows_file("preference")), max_rows=40)}))
    dataset, _ = prepared(apo(max_seq_len=8192), rows, bpe, tmp_path)
    batch = collate_pairs(list(dataset))
    sides = batch["targets"][batch["side_tokens"]].split(batch["side_lengths"].tolist())
    expected = [row[side][-1]["content"] + END for _, row in rows for side in ("chosen", "rejected")]
    assert [bpe.decode(side) for side in sides] == expected


def test_multi_turn_pairs_in_files_score_assistant_turns_only(rows_file, bpe, tmp_path):
    with rows_file("tool_pairs").open() as lines:
        rows = [json.loads(line) for line in lines][:4]
    for row in rows:  # the real ones end with the user's goodbye
        for side in ("chosen", "rejected"):
            while row[side][-1]["role"] != "assistant":
                row[side].pop()
    dataset, _ = prepared(apo(max_seq_len=60_000), rows, bpe, tmp_path)
    for row, columns in zip(rows, dataset, strict=True):
        equal = [one == other for one, other in zip(row["chosen"], row["rejected"], strict=False)]
        for side in ("chosen", "rejected"):
            scored = np.array(columns["prompt_mask"] + columns[f"{side}_mask"], bool)
            ids = np.array(columns["prompt_ids"] + columns[f"{side}_ids"])
            assert bpe.decode(ids[scored]) == policy_text(bpe, {"messages": row[side][equal.index(False) :]})


def test_the_chatml_template_prepares_mid_training_rows(rows_file, bpe, tmp_path):
    tokenizer = build_tokenizer(["x"], kind="bpe", vocab_size=300, template="chatml")
    assert tokenizer.chat_template == load_template("chatml")
    rows = mix(Mixture(sources={"mid": Source(path=str(rows_file("mid")), max_rows=50)}))
    dataset, _ = prepared(sft(packing="wrapped", max_seq_len=100_000), rows, tokenizer, tmp_path)
    text = decoded_labels(tokenizer, labels_of(dataset[0]))
    assert text == "".join(row["messages"][-1]["content"] + END for _, row in rows)


def test_all_roles_train_every_token_but_each_documents_first(tokenizer, tmp_path):
    rows, _ = prepared(sft(train_roles=["all"]), [("chats", chat("hi", "yes"))], tokenizer, new(tmp_path))
    assert labels_of(rows[0]) == [-100, *rows[0]["input_ids"][1:]]

import json
import multiprocessing
import sys
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smolpost.data import overlap
from smolpost.data.hygiene import HygieneFilter, Removal, digest_of, features, turns_of
from smolpost.data.overlap import EvaluationTexts, SignatureIndex, band_size, signature_of, words_of
from smolpost.data.rows import Row
from smolpost.errors import UserError
from smolpost.schema import Hygiene as Settings

TEXT = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen"
GERMAN = "Der Hund läuft durch den Garten und sucht nach seinem Ball, während die Katze auf der Mauer schläft. "
ENGLISH = "The dog runs through the garden and looks for its ball while the cat is sleeping on the wall. "


def chat(user, reply, *more):
    messages = [{"role": "user", "content": user}, {"role": "assistant", "content": reply}, *more]
    return {"messages": messages}


def pair(prompt, chosen, rejected):
    return {key: chat(prompt, reply)["messages"] for key, reply in (("chosen", chosen), ("rejected", rejected))}


def removals(rows, **settings):
    """The removal, or None, of each row; the rows are f:1, f:2, ..."""
    settings = Settings(**settings)
    hygiene = HygieneFilter(settings)
    return [hygiene.check(features(row, settings), f"f:{i}") for i, row in enumerate(rows, start=1)]


# ---------------------------------------------------------------- words and turns


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Don't  stop\n(now)!", ["don", "t", "stop", "now"]),
        ("Don\u2019t stop_now", ["don", "t", "stop", "now"]),
        ("$1,234.50 + 7", ["1", "234", "50", "7"]),
        ("Stra\u00dfe STRASSE", ["strasse", "strasse"]),
        ("\uff26\uff55\uff4c\uff4c wi\ufb01", ["full", "wifi"]),  # full-width letters, a ligature
        ("co\u00adop zero\u200bwidth", ["coop", "zerowidth"]),
        ("e\u0301t\u00e9", ["\u00e9t\u00e9"]),
        ("\u0939\u093f\u0928\u094d\u0926\u0940 \u092d\u093e\u0937\u093e", ["हिन्दी", "भाषा"]),  # vowel signs stay
        ("\u4e2d\u6587 GPT\u3068", ["\u4e2d", "\u6587", "gpt", "\u3068"]),
        ("a\ud800b \udfff", ["a", "b"]),
        ("a\x00b\x1f", ["a", "b"]),
        ("\U0001f600 ... \u2192", []),
        ("", []),
    ],
)
def test_words(text, words):
    assert words_of(text) == words


def test_turns_are_what_user_and_model_wrote():
    call = {"id": "x1", "type": "function", "function": {"name": "find", "arguments": {"b": 1, "a": "é"}}}
    row = chat(
        "question",
        None,
        {"role": "tool", "content": "result"},
        {"role": "assistant", "content": ["an", {"type": "text", "text": "swer"}], "reasoning_content": "thought"},
    )
    row["messages"][1]["tool_calls"] = [call]
    row["messages"].insert(0, {"role": "system", "content": "policy"})
    assert turns_of(row) == [
        ("user", "question"),
        ("tool call", 'find {"a": "é", "b": 1}'),
        ("assistant", "thought\nanswer"),
    ]


def test_turns_of_a_pair_hold_the_prompt_once():
    assert turns_of(pair("p", "good", "bad")) == [("user", "p"), ("assistant", "good"), ("assistant", "bad")]


# ---------------------------------------------------------------- exact


def test_exact_duplicates_name_the_first_that_stayed():
    rows = [chat("a", "b"), chat("a", "c"), chat("a", "b"), chat("a", "c"), chat("a", "b")]
    removed = [Removal("exact duplicate", f"of f:{first}") for first in (1, 2, 1)]
    assert removals(rows, exact=True) == [None, None, *removed]


@pytest.mark.parametrize(
    ("first", "second", "equal"),
    [
        (chat("é  x", "b"), chat("e\u0301 x\n", " b"), True),
        (chat("a", "b"), chat("A", "b"), False),
        (chat("a", "b"), chat("a.", "b"), False),
        (chat("a b", "c"), chat("a", "b c"), False),
        (chat("a", "b"), {"text": "a b"}, False),
        (chat("\ud800", "b"), chat("\ud800", "b"), True),
        (chat("\ud800", "b"), chat("\ud801", "b"), False),
        (pair("p", "a", "b"), pair("p", "b", "a"), False),
        (chat("a", "b", {"role": "tool", "content": "1"}), chat("a", "b", {"role": "tool", "content": "2"}), True),
    ],
)
def test_what_counts_as_equal(first, second, equal):
    assert (removals([first, second], exact=True)[1] is not None) == equal


def test_tool_calls_count_without_their_ids():
    def calling(arguments, id):
        function = {"name": "add", "arguments": arguments}
        call = {"role": "assistant", "content": None, "tool_calls": [{"id": id, "function": function}]}
        return {"messages": [{"role": "user", "content": "add"}, call]}

    rows = [calling({"x": 1, "y": 2}, "a"), calling({"x": 2, "y": 1}, "a"), calling('{"y": 2, "x": 1}', "b")]
    assert removals(rows, exact=True) == [None, None, Removal("exact duplicate", "of f:1")]


def test_null_columns_count_as_missing():
    row = {"chosen": None, "rejected": None, "messages": None, "text": "a"}
    assert turns_of(row) == [("text", "a")]
    assert turns_of({**chat("a", "b"), "chosen": None, "text": None}) == [("user", "a"), ("assistant", "b")]


# ---------------------------------------------------------------- near


def naive_grams(text, n):
    words = text.split()
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)} or {tuple(words)}


def jaccard(first, second):
    return len(first & second) / len(first | second)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32 - 1), threshold=st.sampled_from([0.4, 0.6, 0.8]))
def test_near_duplicates_against_exact_jaccard(seed, threshold):
    pytest.importorskip("datasketch")
    rng = np.random.default_rng(seed)
    vocabulary = np.array([f"w{i}" for i in range(40)])
    texts = [rng.choice(vocabulary, rng.integers(1, 80)) for _ in range(10)]
    for _ in range(30):  # copies with a few words replaced
        text = texts[rng.integers(len(texts))].copy()
        places = rng.integers(len(text), size=rng.integers(0, 6))
        text[places] = rng.choice(vocabulary, len(places))
        texts.append(text)
    texts = [" ".join(text) for text in texts]
    grams = {f"f:{i}": naive_grams(text, 5) for i, text in enumerate(texts, start=1)}
    kept, margin = [], 0.22  # five standard errors of 128 values at most
    for (where, own), removal in zip(
        grams.items(), removals([{"text": text} for text in texts], near=threshold), strict=True
    ):
        if removal is None:
            assert all(jaccard(own, grams[other]) < threshold + margin for other in kept)
            kept.append(where)
        else:
            estimate, _, other = removal.detail.split()
            assert removal.reason == "near duplicate" and other in kept and float(estimate) >= threshold - 0.005
            assert abs(jaccard(own, grams[other]) - float(estimate)) < margin
            assert jaccard(own, grams[other]) > threshold - margin


def test_near_one_finds_equal_word_sets_only():
    pytest.importorskip("datasketch")
    rows = [{"text": TEXT}, {"text": TEXT.upper() + "!"}, {"text": TEXT + " sixteen"}]
    assert removals(rows, near=1.0) == [None, Removal("near duplicate", "1.00 of f:1"), None]


def test_the_first_stays_and_removed_rows_remove_nothing():
    pytest.importorskip("datasketch")
    words = [f"w{i}" for i in range(100)]
    a, b, c = (" ".join(words[i : i + 60]) for i in (0, 20, 40))  # neighbours share 36 of 76 5-grams, a and c 16 of 96
    forward = removals([{"text": text} for text in (a, b, c)], near=0.33)
    assert [removal and removal.detail.split()[-1] for removal in forward] == [None, "f:1", None]
    from_the_middle = removals([{"text": text} for text in (b, a, c)], near=0.33)
    assert [removal and removal.detail.split()[-1] for removal in from_the_middle] == [None, "f:1", "f:1"]


def test_texts_without_words_resemble_nothing():
    pytest.importorskip("datasketch")
    assert removals([{"text": "!!!"}, {"text": "?"}, {"text": "\U0001f600"}], near=0.5) == [None] * 3


def test_short_texts_are_compared_whole():
    pytest.importorskip("datasketch")
    rows = [{"text": "yes please do"}, {"text": "Yes, please do."}, {"text": "yes please do it"}, {"text": "yes"}]
    found = removals(rows, near=0.9)
    assert found == [None, Removal("near duplicate", "1.00 of f:1"), None, None]


def test_long_texts_are_hashed_in_pieces(monkeypatch):
    pytest.importorskip("datasketch")
    words = [f"w{i}" for i in range(300)]
    whole = signature_of(words, 5, 64)
    monkeypatch.setattr(overlap, "BATCH_GRAMS", 7)
    np.testing.assert_array_equal(signature_of(words, 5, 64), whole)


def test_index_finds_every_row_again_as_it_grows():
    rng = np.random.default_rng(0)
    signatures = rng.integers(1 << 32, size=(5000, 32), dtype=np.uint32)  # from 1,024 on, the tables are rebuilt
    index = SignatureIndex(32, 0.5)
    assert all(index.add(signature) is None for signature in signatures)
    assert [index.add(signature) for signature in signatures] == [(i, 1.0) for i in range(5000)]
    assert index.size == 5000


def test_index_agrees_with_comparing_all():
    """A row that shares a whole band with another is found; the most similar is named, the first of equals."""
    rng = np.random.default_rng(1)
    index, kept, found = SignatureIndex(24, 0.75), [], 0
    for _ in range(4000):
        signature = rng.integers(1 << 32, size=24, dtype=np.uint32)
        if kept and rng.random() < 0.7:
            same = rng.random(24) < rng.uniform(0.3, 1)
            signature[same] = kept[rng.integers(len(kept))][same]
        expected = None
        if kept:
            equal = np.array(kept) == signature
            r = index.band_size
            shares_band = equal[:, : 24 // r * r].reshape(len(kept), -1, r).all(axis=2).any(axis=1)
            similarity = equal.mean(axis=1) * shares_band
            best = int(similarity.argmax())
            expected = (best, similarity[best]) if similarity[best] >= 0.75 else None
        assert index.add(signature) == expected
        if expected is None:
            kept.append(signature)
        found += expected is not None
    assert found > 500 and len(kept) > 2048


@pytest.mark.parametrize(("threshold", "size"), [(1.0, 128), (0.9, 10), (0.8, 6), (0.5, 3), (0.02, 1)])
def test_bands_by_hand(threshold, size):
    assert band_size(128, threshold) == size  # 0.8: (1 - 0.8 ** 6) ** 21 = 0.002, (1 - 0.8 ** 7) ** 18 = 0.014


# ---------------------------------------------------------------- against


@pytest.fixture
def evaluation(write_jsonl):
    rows = [{"id": "a 1", "question": "Is " + TEXT + "?", "choices": [{"text": "What is the capital of France?"}]}]
    return write_jsonl([*rows, {"question": TEXT, "answer": "Yes"}], "eval.jsonl")


def test_a_planted_text_is_named(evaluation):
    planted = "So: ONE, two three; four five six seven eight nine ten eleven twelve (thirteen)! And on."
    gram = " ".join(TEXT.split()[:13])
    found = removals([chat("hello", planted), pair("hello", "x", planted), {"text": planted}], against=[evaluation])
    assert found == [Removal("contaminated", f"'{gram}' of {evaluation}:1")] * 3


def test_near_misses_stay(evaluation):
    words = TEXT.split()
    rows = [
        chat(" ".join(words[:12]), " ".join(words[12:])),  # 12 of 13 words, the rest in another turn
        {"text": " ".join([*words[:12], "x", *words[12:]])},
        {"text": " ".join(words[::-1])},
        {"text": "please " + " ".join(words[3:])},  # 12 words in a row
        chat("yes", "a 1"),  # whole evaluation texts, but of fewer than 5 words
        chat("Tell me: what is the capital of France?", "Paris"),
    ]
    assert removals(rows, against=[evaluation]) == [None] * len(rows)


def test_texts_of_fewer_words_are_found_whole(evaluation):
    found = removals([chat("what is the CAPITAL of France", "Paris")], against=[evaluation])
    assert found == [Removal("contaminated", f"'what is the capital of france' of {evaluation}:1")]


def test_what_was_searched_is_counted(evaluation):
    hygiene = HygieneFilter(Settings(against=[evaluation]))
    assert hygiene.searched == {evaluation: {"rows": 2, "texts": 3, "short texts": 2}}


def test_parquet_and_several_files(evaluation, tmp_path):
    path = str(tmp_path / "other.parquet")
    pq.write_table(pa.table({"turns": [[{"content": "x"}], [{"content": " ".join("abcdefghijklm")}]]}), path)
    found = removals([{"text": " ".join("ABCDEFGHIJKLMN")}], against=[evaluation, path])
    assert found == [Removal("contaminated", f"'a b c d e f g h i j k l m' of {path}:2")]


def test_a_file_written_anew_is_read_anew(write_jsonl):
    row = {"text": "alpha beta gamma delta epsilon"}
    path = write_jsonl([row])
    assert removals([row], against=[path], ngram=5) != [None]
    write_jsonl([{"text": "five other words are here"}])
    assert removals([row], against=[path], ngram=5) == [None]


def test_equal_hashes_are_not_equal_words(monkeypatch):
    monkeypatch.setattr(overlap, "gram_hashes", lambda words, n: np.zeros(max(0, len(words) - n + 1), np.uint64))
    texts = EvaluationTexts.of([("e:1", list("abc"))], 3)
    assert texts.find(list("xyz")) is None
    assert texts.find(list("xyabc")) == ("a b c", "e:1")


word_lists = st.lists(st.lists(st.sampled_from("abc"), max_size=12), max_size=6)


@settings(max_examples=200, deadline=None)
@given(word_lists, st.lists(st.sampled_from("abc"), max_size=30), st.integers(1, 8))
def test_evaluation_texts_against_brute_force(evaluated, words, n):
    found = EvaluationTexts.of([(f"e:{i}", text) for i, text in enumerate(evaluated)], n).find(words)
    if len(words) < n:
        expected = words in evaluated and len(words) >= 5
        assert (found is not None) == expected
        assert found is None or found == (" ".join(words), f"e:{evaluated.index(words)}")
        return
    shared = None
    for i in range(len(words) - n + 1):
        gram = words[i : i + n]
        holders = [f"e:{j}" for j, text in enumerate(evaluated) if gram in [text[k : k + n] for k in range(len(text))]]
        if holders:
            shared = (" ".join(gram), holders[0])
            break
    assert found == shared


# ---------------------------------------------------------------- language


def test_languages():
    pytest.importorskip("lingua")
    rows = [
        chat(ENGLISH, ENGLISH),
        chat(GERMAN, GERMAN),
        chat(ENGLISH * 2, ENGLISH + GERMAN[:30]),
        chat("\ud800" + GERMAN, "\udfff\x00"),
        chat("What is 3 + 5?", "8"),  # too short to tell
        chat("3 + 5", "\U0001f600"),
        {"text": "東京は日本の首都であり、世界で最も人口の多い都市の一つです。"},
    ]
    codes = [removal and removal.detail for removal in removals(rows, languages=["en"])]
    assert codes == [None, "de 1.00", None, "de 1.00", None, None, "ja 1.00"]
    assert removals(rows, languages=["en", "de", "ja"]) == [None] * len(rows)
    assert removals(rows, languages=["de"], min_confidence=0.9)[0] == Removal("language", "en 1.00")


def test_min_confidence_is_that_of_the_verdict():
    pytest.importorskip("lingua")
    row = {"text": "Was kostet das Ticket?"}
    [removal] = removals([row], languages=["en"], min_confidence=0.01)
    code, confidence = removal.detail.split()
    assert code == "de" and 0.1 < float(confidence) < 0.9
    assert removals([row], languages=["en"], min_confidence=float(confidence) + 0.01) == [None]


def test_a_long_turn_does_not_hide_the_others():
    """Each turn is judged from its beginning, so the language of most turns counts."""
    pytest.importorskip("lingua")
    row = chat(ENGLISH * 1000, GERMAN * 40, {"role": "user", "content": GERMAN * 40})
    assert removals([row], languages=["en"])[0].detail.startswith("de")


# ---------------------------------------------------------------- together


def test_what_the_row_alone_decides_comes_first(evaluation):
    row = chat("hello", TEXT)
    found = removals([row, row, chat("a", "b"), chat("a", "b")], exact=True, against=[evaluation])
    assert [removal and removal.reason for removal in found] == [
        "contaminated",
        "contaminated",
        None,
        "exact duplicate",
    ]


def test_nothing_asked_removes_nothing():
    assert removals([chat("a", "b")] * 3) == [None] * 3
    assert features(chat("a", "b"), Settings()) == b"+"
    assert not HygieneFilter.needed(Settings())
    wanted = ({"exact": True}, {"near": 0.5}, {"against": ["f"]}, {"languages": ["en"]})
    assert all(HygieneFilter.needed(Settings(**one)) for one in wanted)


def test_any_process_and_order_computes_the_same(evaluation):
    pytest.importorskip("datasketch")
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.permutation(TEXT.split()).tolist() * 2) for _ in range(15)]
    rows = [Row(chat(texts[rng.integers(15)], f"{rng.integers(30)}"), "f", i) for i in range(60)]
    rows[7]["messages"][0]["content"] = TEXT
    settings = Settings(exact=True, near=0.7, against=[evaluation])
    compute = partial(features, settings=settings)
    here = [compute(row) for row in rows]
    backwards = [compute(row) for row in rows[::-1]][::-1]
    with multiprocessing.get_context("spawn").Pool(2) as pool:  # each has its own seed of Python's hash()
        there = pool.map(compute, rows, chunksize=7)
    decided = []
    for computed in (here, backwards, there):
        assert computed == here
        hygiene = HygieneFilter(settings)
        decided.append([hygiene.check(feature, row.where) for feature, row in zip(computed, rows, strict=True)])
    assert decided[0] == decided[1] == decided[2]
    reasons = [removal.reason for removal in decided[0] if removal]
    assert reasons.count("contaminated") == 1 and reasons.count("near duplicate") > 5 and len(reasons) < 50


def test_digests_are_the_same_everywhere():
    assert digest_of([("text", TEXT)]).hex() == "8f000b730ef3952b6b880814a0605197"


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"near": 1.2}, r"data\.mid\.hygiene\.near=1\.2 is outside \[0, 1\]; use a similarity such as 0\.8"),
        ({"near": float("nan")}, r"near=nan is outside \[0, 1\]"),
        ({"near": -0.1}, r"near=-0\.1 is outside"),
        ({"ngram": 0}, r"data\.mid\.hygiene\.ngram=0 is below 1; use a number of words such as 13"),
        ({"near_permutations": 8}, r"near_permutations=8 is outside \[16, 1024\]; use 128"),
        ({"near_permutations": 4096}, r"near_permutations=4096 is outside"),
        ({"min_confidence": 0.0}, r"min_confidence=0\.0 is outside \(0, 1\]; use 0\.5"),
        ({"min_confidence": 2.0}, r"min_confidence=2\.0 is outside"),
        (
            {"against": ["absent.jsonl"]},
            r"hygiene\.against\[0\]=absent\.jsonl is not a file; expected JSONL or Parquet",
        ),
    ],
)
def test_settings_out_of_range(wrong, message):
    with pytest.raises(UserError, match=message):
        HygieneFilter(Settings(**wrong), key="data.mid.hygiene")


@pytest.mark.parametrize("code", ["xx", "EN", "english", ""])
def test_unknown_languages(code):
    pytest.importorskip("lingua")
    message = rf"hygiene\.languages\[1\]={code} is not a language of the detector; use ISO 639-1 codes, of af, .*, zu"
    with pytest.raises(UserError, match=message):
        HygieneFilter(Settings(languages=["en", code]))


def test_evaluation_files_without_content(evaluation, write_jsonl):
    empty = write_jsonl([], "empty.jsonl")
    with pytest.raises(UserError, match=r"empty\.jsonl: is empty; expected at least one row"):
        HygieneFilter(Settings(against=[evaluation, empty]))
    numbers = write_jsonl([{"question": "2 + 2", "answer": "4", "level": 1}], "numbers.jsonl")
    with pytest.raises(UserError, match=r"numbers\.jsonl: none of its 2 texts has 5 words or more, so nothing"):
        HygieneFilter(Settings(against=[numbers]))
    broken = write_jsonl([json.dumps({"a": 1}), "{"], "broken.jsonl")
    with pytest.raises(UserError, match=r"broken\.jsonl:2: is not JSON"):
        HygieneFilter(Settings(against=[broken]))


@pytest.mark.parametrize(
    ("module", "wanted"), [("datasketch", {"near": 0.8}), ("lingua", {"languages": ["en"]})], ids=str
)
def test_a_missing_library_names_the_extra(monkeypatch, module, wanted):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"needs {module}, which is not installed; pip install 'smolpost\[hygiene\]'"):
        HygieneFilter(Settings(**wanted))
    assert removals([chat("a", "b")] * 2, exact=True)[1]  # what needs neither runs without

from collections import Counter

import pytest

from smolpost.data.mixtures import mix, rows_alone
from smolpost.errors import UserError
from smolpost.schema import Hygiene, Mixture, Source


@pytest.fixture
def files(write_jsonl):
    """Two files of 10 and 4 texts: a0 ... a9 and b0 ... b3."""
    return {
        name: write_jsonl([{"text": f"{name}{i}"} for i in range(n)], f"{name}.jsonl")
        for name, n in [("a", 10), ("b", 4)]
    }


def texts(files, *, seed=0, shuffle=True, **weights):
    sources = {name: Source(path=files[name], weight=weight) for name, weight in weights.items()}
    return [row["text"] for _, row in mix(Mixture(sources=sources, seed=seed, shuffle=shuffle))]


def test_without_shuffle_weight_one_is_file_order_source_after_source(files):
    assert texts(files, b=1, a=1, shuffle=False) == [f"b{i}" for i in range(4)] + [f"a{i}" for i in range(10)]


def test_rows_carry_their_source_and_place(files):
    name, row = mix(Mixture(sources={"first": Source(path=files["b"], first_row=2)}, shuffle=False))[0]
    assert (name, row.where) == ("first", f"{files['b']}:3")


@pytest.mark.parametrize("weight, count", [(0.25, 2), (0.5, 5), (1, 10), (2.5, 25)])
def test_weight_is_a_share_of_the_rows_spread_evenly(files, weight, count):
    counts = Counter(texts(files, a=weight))
    assert sum(counts.values()) == count
    assert max(counts.values()) - min(counts.get(f"a{i}", 0) for i in range(10)) <= 1


def test_shuffle_is_a_permutation_that_the_seed_decides(files):
    ordered = texts(files, a=1, b=1, shuffle=False)
    assert sorted(texts(files, a=1, b=1)) == sorted(ordered)
    assert texts(files, a=1, b=1) == texts(files, a=1, b=1) != ordered
    assert texts(files, a=1, b=1, seed=1) != texts(files, a=1, b=1)


def test_order_of_declaration_changes_nothing(files):
    assert texts(files, a=0.5, b=2) == texts(files, b=2, a=0.5)


def test_a_sources_rows_do_not_depend_on_the_others(files):
    alone = texts(files, a=0.5, shuffle=False)
    assert [text for text in texts(files, b=2, a=0.5, shuffle=False) if text[0] == "a"] == alone


def test_subsampling_differs_by_source_name(write_jsonl):
    path = write_jsonl([{"text": str(i)} for i in range(100)])
    sources = {name: Source(path=path, weight=0.2) for name in ("x", "y")}
    rows = mix(Mixture(sources=sources, shuffle=False))
    x, y = ([row["text"] for name, row in rows if name == wanted] for wanted in ("x", "y"))
    assert x != y


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"a": 0}, r"sources.a.weight=0 is not above 0; raise it or remove the source"),
        ({"a": -1}, r"sources.a.weight=-1 is not above 0"),
        ({"a": 0.01}, r"sources.a.weight=0.01 keeps none of 10 rows; raise it to 0.1 or more, or remove the source"),
        ({"a": 1, "seed": -1}, r"seed=-1 of a mixture is below 0; use 0 or more"),
        ({}, r"a mixture has no sources; give at least one"),
    ],
)
def test_settings_out_of_range_are_refused(files, settings, message):
    with pytest.raises(UserError, match=message):
        texts(files, **settings)


def test_what_is_read_as_text_cannot_be_cleaned_or_cut_by_tokens(files):
    for change, message in [
        ({"hygiene": Hygiene(exact=True)}, "hygiene applies to tokenized rows of training stages"),
        ({"sources": {"a": Source(path=files["a"], max_tokens=9)}}, "sources.a.max_tokens counts what training stages"),
        ({"sources": {"a": Source(path=files["a"], share=1.0)}}, "sources.a.share counts what training stages"),
    ]:
        mixture = Mixture(**{"sources": {"a": Source(path=files["a"])}} | change)
        with pytest.raises(UserError, match=message):
            mix(mixture)
        assert [row["text"] for _, row in mix(rows_alone(mixture))] == texts(files, a=1)


def test_a_broken_row_is_named_by_file_and_line(write_jsonl):
    path = write_jsonl([{"text": "fine"}, {"txt": "typo"}], "typo.jsonl")
    with pytest.raises(UserError, match=r"typo.jsonl:2: has the columns txt; expected messages"):
        mix(Mixture(sources={"a": Source(path=path)}))

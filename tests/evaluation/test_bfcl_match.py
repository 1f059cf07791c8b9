"""Each rule of the Berkeley leaderboard's AST evaluation, with both verdicts."""

import pytest

from smolpost.evaluation.bfcl_match import call_mismatch, mismatch, value_mismatch
from smolpost.evaluation.parse_calls import Call

INTEGER, FLOAT, STRING, BOOLEAN = ({"type": name} for name in ("integer", "float", "string", "boolean"))
OBJECT, ANY = {"type": "dict"}, {"type": "any"}


def array(items, kind="array"):
    return {"type": kind, "items": items}


@pytest.mark.parametrize(
    ("value", "accepted", "schema"),
    [
        (5, [5], INTEGER),
        (5, [4, 5], INTEGER),
        (5, [5.0], FLOAT),  # a whole number does for a float
        (5.0, [5.0], FLOAT),
        (5.0, [5], FLOAT),
        (10**400, [10**400], FLOAT),  # beyond any float
        (True, [True], BOOLEAN),
        ("Paris", ["Lyon", "Paris"], STRING),
        ("paris", ["Paris"], STRING),
        ("April 1, 2024", ["april 1 2024"], STRING),
        ("a-b_c*d^e/f.g", ["abcdefg"], STRING),
        ("it's", ['it"s'], STRING),
        ("x", ["x"], ANY),
        (3, [3], ANY),  # the type of the accepted value
        (True, [True, "True"], STRING),
        ([1, 2], [[1, 2]], array(INTEGER)),
        ([1.5], [[1.5]], array(FLOAT)),
        ([1, 2], [[1, 2]], array(FLOAT)),  # the type of the accepted list's first item
        (["New York"], [["new-york"]], array(STRING)),
        ([], ["", ["a"]], array(STRING)),  # what may be left out may be empty
        ([[1], [2]], [[[1], [2]]], array(array(INTEGER))),
        ([1, "a"], [[1, "a"]], {"type": "array"}),
        ((1.5, 2.5), [[1.5, 2.5]], array(FLOAT, "tuple")),
        ([1.5, 2.5], [[1.5, 2.5]], array(FLOAT, "tuple")),
        ({"w": 20, "h": 12}, [{"w": [20], "h": [12, 13]}], OBJECT),
        ({"w": 20}, [{"w": [20], "h": [12, ""]}], OBJECT),
        ({"name": "john doe"}, ["", {"name": ["John Doe"]}], OBJECT),
        ({"a": [1]}, [{"a": [[1]]}], {"type": "object"}),
        ([{"f": "age"}, {"f": "job"}], [[{"f": ["Age"]}, {"f": ["Job"]}]], array(OBJECT)),
    ],
)
def test_accepted_values(value, accepted, schema):
    assert value_mismatch(value, accepted, schema) == ""


@pytest.mark.parametrize(
    ("value", "accepted", "schema", "reason"),
    [
        (6, [5], INTEGER, "is not one of [5]"),
        (5.0, [5], INTEGER, "is of type float, not int"),  # never a float for an integer
        ("5", [5], INTEGER, "is of type str, not int"),
        (True, [1], INTEGER, "is of type bool, not int"),
        (1, [True], BOOLEAN, "is of type int, not bool"),
        (None, [5], INTEGER, "is of type NoneType, not int"),
        (5.5, [5.0], FLOAT, "is not one of [5.0]"),
        (True, [1.0], FLOAT, "is of type bool, not float"),
        (False, [True], BOOLEAN, "is not one of [True]"),
        ("London", ["Paris"], STRING, "is not one of ['Paris']"),
        ("Paris!", ["Paris"], STRING, "is not one of ['Paris']"),
        (["Paris"], ["Paris"], STRING, "is of type list, not str"),
        ("true", [True], STRING, "is not one of [True]"),
        ("yes", [True, "Yes"], STRING, "is not one of [True, 'Yes']"),  # as it stands: the first is not a text
        (3, ["3"], ANY, "is of type int, not str"),
        ([2, 1], [[1, 2]], array(INTEGER), "is not one of [[1, 2]]"),
        ([1, 2, 3], [[1, 2]], array(INTEGER), "is not one of [[1, 2]]"),
        ([1, 2.5], [[1, 2]], array(INTEGER), "has an item that is not of type int"),
        ([1, 2], [[1.0, 2.0]], array(FLOAT), "has an item that is not of type float"),
        (["1"], [[1]], array(INTEGER), "has an item that is not of type int"),
        ([], [["a"]], array(STRING), "is not one of [['a']]"),
        ("a", [["a"]], array(STRING), "is of type str, not list"),
        ((1, 2), [[1, 2]], array(INTEGER), "is of type tuple, not list"),
        ({"w": 20, "h": 1}, [{"w": [20], "h": [12]}], OBJECT, "is not one of"),
        ({"w": 20}, [{"w": [20], "h": [12]}], OBJECT, "is not one of"),
        ({"w": 20, "d": 1}, [{"w": [20]}], OBJECT, "is not one of"),
        ({}, [""], OBJECT, "is not one of"),
        ([{"f": "job"}, {"f": "age"}], [[{"f": ["age"]}, {"f": ["job"]}]], array(OBJECT), "is not one of"),
        ([{"f": "age"}], [[{"f": ["age"]}, {"f": ["job"]}]], array(OBJECT), "is not one of"),
    ],
)
def test_other_values(value, accepted, schema, reason):
    assert value_mismatch(value, accepted, schema).startswith(reason)


# ---------------------------------------------------------------- one call

AREA = {
    "name": "geometry.area",
    "parameters": {"properties": {"base": INTEGER, "height": INTEGER, "unit": STRING}, "required": ["base", "height"]},
}
ACCEPTED = {"base": [10], "height": [5], "unit": ["cm", ""]}


@pytest.mark.parametrize(
    "call",
    [
        Call("geometry.area", {"base": 10, "height": 5}),
        Call("geometry.area", {"unit": "CM", "height": 5, "base": 10}),
        Call("geometry.area", {"height": 5}, (10,)),
        Call("geometry.area", {}, (10, 5, "cm")),
    ],
)
def test_a_right_call(call):
    assert call_mismatch(call, AREA, ACCEPTED) == ""


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (Call("area", {"base": 10, "height": 5}), "calls area instead of geometry.area"),
        (Call("Geometry.area", {"base": 10, "height": 5}), "calls Geometry.area instead of geometry.area"),
        (Call("geometry.area", {"base": 10}), "the required height is missing"),
        (Call("geometry.area", {"base": 10, "height": 5, "depth": 1}), "there is no parameter depth"),
        (Call("geometry.area", {"base": 10, "height": 6}), "height=6 is not one of [5]"),
        (Call("geometry.area", {"base": 10, "height": 5, "unit": "m"}), "unit='m' is not one of ['cm', '']"),
        (Call("geometry.area", {}, (5, 10)), "base=5 is not one of [10]"),
        (Call("geometry.area", {}, (10, 5, "cm", 1)), "4 positional arguments for 3 parameters"),
        (Call("geometry.area", {"base": 10, "height": 5}, (10,)), "base is given twice"),
    ],
)
def test_a_wrong_call(call, reason):
    assert call_mismatch(call, AREA, ACCEPTED) == reason


def test_what_may_be_left_out_is_the_answer_s_to_say():
    accepted = {**ACCEPTED, "unit": ["cm"]}
    assert call_mismatch(Call("geometry.area", {}, (10, 5)), AREA, accepted) == "unit is missing"
    accepted = {**ACCEPTED, "height": [5, ""]}  # but not against the document
    assert call_mismatch(Call("geometry.area", {"base": 10}), AREA, accepted) == "the required height is missing"


def test_a_parameter_without_an_accepted_value_is_none():
    call = Call("geometry.area", {"base": 10, "height": 5, "unit": "cm"})
    assert call_mismatch(call, AREA, {"base": [10], "height": [5]}) == "there is no parameter unit"


# ---------------------------------------------------------------- several

ADD = {"name": "add", "parameters": {"properties": {"x": INTEGER}, "required": ["x"]}}
FUNCTIONS = {"add": ADD, "geometry.area": AREA}
ONE, TWO = Call("add", {"x": 1}), Call("add", {"x": 2})


@pytest.mark.parametrize(
    ("calls", "expected", "reason"),
    [
        ([ONE], [1], ""),
        ([], [1], "0 calls instead of 1"),
        ([ONE, ONE], [1], "2 calls instead of 1"),
        ([Call("geometry.area", {"x": 1})], [1], "calls geometry.area instead of add"),
        ([ONE, TWO], [1, 2], ""),
        ([TWO, ONE], [1, 2], ""),
        ([ONE, ONE], [1, 2], "x=1 is not one of [2]"),
        ([ONE, ONE], [1, 1], ""),
        ([TWO, TWO], [1, 1], "x=2 is not one of [1]"),
        ([ONE, TWO], [1, 1], "x=2 is not one of [1]"),
        ([ONE], [1, 2], "1 calls instead of 2"),
    ],
)
def test_calls_are_matched_one_to_one_in_any_order(calls, expected, reason):
    assert mismatch(calls, FUNCTIONS, [("add", {"x": [value]}) for value in expected]) == reason

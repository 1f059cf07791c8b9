"""Calls read from replies: what is one, what is none, and that nothing runs."""

import pytest

from smolpost.evaluation.parse_calls import Call, read_calls


def xml(*blocks):
    return read_calls("".join(f"<tool_call>{block}</tool_call>\n" for block in blocks), "xml")


def python(*blocks):
    return read_calls("".join(f"<code>{block}</code>\n" for block in blocks), "python")


# ---------------------------------------------------------------- JSON


def test_json_calls():
    first, second = '{"name": "a.b", "arguments": {"x": [1, -2.5], "y": null}}', '\n{"name": "f", "arguments": {}}\n'
    expected = [Call("a.b", {"x": [1, -2.5], "y": None}), Call("f", {})]
    assert xml(first, second) == (expected, [])
    assert xml(f"[{first}, {second}]") == (expected, [])
    assert read_calls(f"Let me see.\n<tool_call>{first}</tool_call> Done.", "xml") == (expected[:1], [])


@pytest.mark.parametrize(
    ("block", "fault"),
    [
        ('{"name": "f", "arguments": {', "no JSON"),
        ("f(x=1)", "no JSON"),
        ("{'name': 'f', 'arguments': {}}", "no JSON"),
        ('{"name": "f", "arguments": {"x": 1, "x": 2}}', "'x' twice"),
        ('{"name": "f", "arguments": {"x": NaN}}', "NaN"),
        ('{"name": "f"}', "has the keys name; expected a name and an arguments object"),
        ('{"name": "f", "arguments": "{}"}', "expected a name and an arguments object"),
        ('{"name": 3, "arguments": {}}', "expected a name and an arguments object"),
        ("3", "a call is an int"),
        ('[["f"]]', "a call is a list"),
        (
            '{"name": "f", "arguments": {"x": ' + "[" * 100_000 + "]" * 100_000 + "}}",
            "nested more than 100 levels deep",
        ),
    ],
)
def test_a_block_that_is_no_json_call(block, fault):
    calls, [found] = xml(block)
    assert calls == [] and fault in found and "\n" not in found


def test_a_fault_leaves_the_other_blocks():
    assert xml("{", '{"name": "f", "arguments": {}}')[0] == [Call("f", {})]


@pytest.mark.parametrize("text", ["", "no call", '<tool_call>{"name": "f", "arguments": {}}', "<code>f()</code>"])
def test_what_is_not_within_tags_is_no_call(text):
    assert read_calls(text, "xml") == ([], [])


# ---------------------------------------------------------------- Python


@pytest.mark.parametrize(
    ("block", "call"),
    [
        ("f()", Call("f", {})),
        ("\n  a.b.c(x=1)\n", Call("a.b.c", {"x": 1})),
        ("f(-3, 'a', x=-2.5)", Call("f", {"x": -2.5}, (-3, "a"))),
        ("f(x=[1, [2, {'k': -1}]], y=(1, 'b'))", Call("f", {"x": [1, [2, {"k": -1}]], "y": (1, "b")})),
        ("f(x=True, y=None, z='it\\'s')", Call("f", {"x": True, "y": None, "z": "it's"})),
        ("f(x='a' 'b')  # both", Call("f", {"x": "ab"})),
        (r"f(x='\d')", Call("f", {"x": r"\d"})),
    ],
)
@pytest.mark.filterwarnings("error")
def test_python_calls(block, call):
    assert python(block) == ([call], [])


@pytest.mark.parametrize("length", [1000, 2000, 3000, 100_000])
def test_a_model_that_repeats_itself_breaks_nothing(length):
    for block in ("f" + ".a" * length + "()", "f" + "()" * length, f"f(x={'-' * length}1)", "x = " * length + "1"):
        calls, faults = python(block)
        assert len(calls) + len(faults) == 1


def test_several_python_calls():
    expected = [Call("f", {"x": 1}), Call("g", {})]
    for blocks in (["f(x=1)", "g()"], ["f(x=1)\ng()"], ["[f(x=1), g()]"], ["f(x=1); g()"]):
        assert python(*blocks) == (expected, [])


@pytest.mark.parametrize(
    ("block", "fault"),
    [
        ("f(x=1", "not Python ('(' was never closed"),
        ("\0", "not Python"),
        ("x = f()", "x = f() is not a call"),
        ("import os", "import os is not a call"),
        ("3", "3 is not a call"),
        ("f()()", "f() is not the name of a function"),
        ("f(**{'x': 1})", "has ** or a repeated name"),
        ("f(x=1, x=2)", "has ** or a repeated name"),
        ("f(*[1])", "the argument *[1] is not a literal"),
        ("f(x=y)", "the argument y is not a literal"),
        ("f(x=2 * 3)", "the argument 2 * 3 is not a literal"),
        ("f(x=g(1))", "the argument g(1) is not a literal"),
        ("f(x=f'{1}')", "is not a literal"),
        ("f(x={1, 2})", "the argument {1, 2} is not a literal"),
        ("f(x=b'a')", "is not a literal"),
        ("f(x=1j)", "is not a literal"),
        ("f(x=1e999)", "is not a literal"),
        (r"f(x='\ud800')", "is not a literal"),
        ("f(x=0x" + "f" * 6000 + ")", "something too long or too deep is not a literal"),
        ("f(x=" + "[" * 100_000 + "]" * 100_000 + ")", "not Python"),
    ],
)
def test_a_block_that_is_no_python_call(block, fault):
    calls, [found] = python(block)
    assert calls == [] and fault in found and "\n" not in found


def test_nothing_is_executed(tmp_path):
    target = tmp_path / "made"
    _, faults = python(f"open({str(target)!r}, mode=open({str(target)!r}, 'w'))", f"f(open({str(target)!r}, 'w'))")
    assert len(faults) == 2 and not target.exists()
    assert python("exit(0)") == ([Call("exit", {}, (0,))], [])


def test_a_call_for_the_reader():
    assert str(Call("a.f", {"x": "s", "y": [1]}, (2, None))) == "a.f(2, None, x='s', y=[1])"

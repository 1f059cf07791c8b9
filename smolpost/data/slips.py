"""A wrong solution made from a right one: one calculation goes wrong, and what follows from it goes wrong with it."""

import ast
import hashlib
import operator
import re
from fractions import Fraction
from random import Random

from smolpost.data.row_shapes.gsm8k import MARK, NUMBER, Problem

ERRORS = (-5, -3, -2, -1, 1, 2, 3, 5)  # of a result, in units of its last digit that is not 0
LARGEST = 10**9  # of a wrong number
_NUMBER = re.compile(NUMBER)
_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
Changed = dict[Fraction, Fraction]  # right value -> wrong one


def with_slip(problem: Problem, seed: int) -> Problem | None:
    """The problem with a solution that ends in a wrong number because one calculation in it is wrong.

    Later numbers are followed by their values: those that equal a wrong result's right value become the wrong one, and
    calculations with them are done again. A slip is made only where that value has not occurred before, so that no
    other number is taken for it, and only where every result keeps its number of decimals and stays above 0.

    Args:
        seed: The slip depends on it and on the question, on nothing else.
    Returns:
        None where no slip reaches the final number: the solution has no calculator marks, or a value is ambiguous.
    """
    draw = Random(hashlib.sha256(f"{seed}\0{problem.question}".encode()).digest())
    slips = [(step, error) for step in range(len(MARK.findall(problem.worked))) for error in ERRORS]
    draw.shuffle(slips)
    return next((wrong for slip in slips if (wrong := _slipped(problem, *slip)) is not None), None)


def _slipped(problem: Problem, slip: int, error: int) -> Problem | None:
    """The problem with the result of one step off by the error and all later steps done with it; None: as above."""
    known, changed, written = _values(problem.question), Changed(), []
    for i, part in enumerate(MARK.split(problem.worked)):  # text, mark, text, mark, ..., text
        if i % 2 == 0:
            known |= _values(part)
            written.append(_replaced(part, changed))
            continue
        expression, _, result = part.rpartition("=")
        right = _value(result)
        if right is None or _calculated(expression) != right:
            return None
        wrong = right + error * _unit(result) if i // 2 == slip else _calculated(_replaced(expression, changed))
        known |= _values(expression)
        if not _is_plausible(wrong, result) or not _follow(right, wrong, changed, known):
            return None
        written.append(f"<<{_replaced(expression, changed)}={_shown(wrong, result)}>>")
    final = _value(problem.final)
    if final not in changed:
        return None
    return Problem(problem.question, "".join(written), _shown(changed[final], problem.final))


def _follow(right: Fraction, wrong: Fraction, changed: Changed, known: set[Fraction]) -> bool:
    """Note what a result has become; False where its value stands for another number, too."""
    unambiguous = changed[right] == wrong if right in changed else wrong == right or right not in known
    if unambiguous and wrong != right:
        changed[right] = wrong
    known.add(right)
    return unambiguous


def _calculated(expression: str) -> Fraction | None:
    """The value of a calculation with + - * / and parentheses; None for anything else."""
    try:
        return _evaluated(ast.parse(expression.replace(",", "").strip(), mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None


def _evaluated(node: ast.expr) -> Fraction:
    match node:
        case ast.Constant(value=int() | float() as number):
            return Fraction(repr(number))
        case ast.UnaryOp(op=ast.USub(), operand=inner):
            return -_evaluated(inner)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](_evaluated(left), _evaluated(right))
    raise ValueError("not a calculation")


# ---------------------------------------------------------------- numbers in texts


def _value(number: str) -> Fraction | None:
    number = number.strip().lstrip("$").replace(",", "")
    return Fraction(number) if re.fullmatch(rf"-?(?:{NUMBER})", number) else None


def _values(text: str) -> set[Fraction]:
    return {_value(number) for number in _NUMBER.findall(text)}


def _replaced(text: str, changed: Changed) -> str:
    """The text with wrong numbers in the place of right ones."""

    def wrong(match: re.Match) -> str:
        value = changed.get(_value(match[0]))
        return match[0] if value is None else _shown(value, match[0])

    return _NUMBER.sub(wrong, text)


def _shown(value: Fraction, like: str) -> str:
    """The value with the commas of another number, and at least its decimals."""
    text = f"{float(value):,.{max(_decimals(like), _needed(value))}f}"
    return text if "," in like else text.replace(",", "")


def _decimals(number: str) -> int:
    return len(number.partition(".")[2])


def _needed(value: Fraction) -> int:
    """Decimals without which the value would be rounded; 9 for more."""
    return next((n for n in range(9) if (value * 10**n).denominator == 1), 9)


def _unit(number: str) -> Fraction:
    """Of the last digit that is not 0: 1 in 24, 1000 in 130,000, 1/10 in 0.50."""
    digits = number.replace(",", "").replace(".", "")
    zeros = len(digits) - len(digits.rstrip("0"))
    return Fraction(10) ** (zeros - _decimals(number))


def _is_plausible(value: Fraction | None, instead_of: str) -> bool:
    return value is not None and 0 < value < LARGEST and _needed(value) <= _decimals(instead_of)

"""The worker side of `symbolic` (`symbolic.py`): compares two expressions by their values at random points, then by
sympy. Runs in the worker process.

The points are drawn from a generator that is seeded with the texts, so a verdict never changes. A point at which either
expression is undefined, not real or larger than 10 ** 10,000 is drawn again; if one has the letter i, complex values
count. Values of 300 digits that differ by more than 1e-200 of their size prove that the expressions differ. After equal
values at 5 points only a difference that is too small to be seen is possible: sympy looks for a constant that remains.
"""

from __future__ import annotations

import operator
import random
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from typing import Any

import mpmath
import sympy

from lowrank_tune.rewards.math.expression import (
    ExpressionParseError,
    Node,
    children,
    free_variables,
    parse_expression,
)
from lowrank_tune.rewards.workers.budget import time_limit

NUM_POINTS = 5  # points at which the values are compared
MAX_POINTS = 60  # points that are drawn at most
PRECISION_DIGITS = 300  # decimal digits of a value; cancellation may take a third of them
RTOL = mpmath.mpf(10) ** -200  # relative difference of equal values; absolute for values below 1
# relative to the gold value: a smaller constant is not visible in the values; for a larger one sympy uses another root
MIN_RELATIVE_CONSTANT = 1e-20
MAX_VALUE_DIGITS = 10_000  # decimal digits of a value
MAX_FACTORIAL = 10_000
MAX_EXACT_FACTORIAL = mpmath.mpf(10) ** 1000  # larger values are not given to sympy
MAX_NUMBER_EXPONENT = 1000  # powers that sympy may expand: of numbers, and of expressions with variables
MAX_VARIABLE_EXPONENT = 100
SIMPLIFY_SECONDS = 1.0
RANGES = (
    (0.2, 3.0),
    (-4.0, 4.0),
    (0.05, 0.95),
    (3.0, 20.0),
)
GradeResult = dict[str, Any]
Point = Mapping[str, Any]


class Undefined(Exception):
    """An expression has no value at a point, or one that is too large."""


def load(spec: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], GradeResult]:
    """Returns the grader. Grades once, so that sympy has loaded all its parts before the first request."""
    grade({"gold": "(x+1)^2", "found": "x^2+2x+1", "seconds": 10})
    return grade


def grade(request: Mapping[str, Any]) -> GradeResult:
    """Returns {same, confirmed}, where `confirmed` means that sympy reduced the difference to 0; else {gold} or
    {found}: why that one cannot be used."""
    try:
        ground_truth = parse_expression(request["gold"])
    except ExpressionParseError as error:
        return {"gold": str(error)}
    try:
        answer = parse_expression(request["found"])
    except ExpressionParseError as error:
        return {"found": str(error)}
    return compare(ground_truth, answer, f"{request['gold']}\n{request['found']}")


def compare(
    ground_truth: Node,
    answer: Node,
    seed: str,
) -> GradeResult:
    """Returns the result for two trees, as `grade` does."""
    rng = random.Random(seed.encode(errors="surrogatepass"))
    variables = sorted(free_variables(ground_truth) | free_variables(answer))
    is_complex = _contains_name(ground_truth, "i") or _contains_name(answer, "i")
    num_defined = num_common = 0
    largest = mpmath.mpf(0)
    for point in points(rng, variables):
        expected = _try_evaluate(ground_truth, point, is_complex)
        if expected is None:
            continue
        num_defined += 1
        actual = _try_evaluate(answer, point, is_complex)
        if actual is None:
            continue
        num_common += 1
        with mpmath.workdps(PRECISION_DIGITS):
            if abs(actual - expected) > RTOL * max(abs(actual), abs(expected), 1):
                return {"same": False}
        largest = max(largest, abs(expected))
        if num_common == NUM_POINTS:
            break
    if num_defined < NUM_POINTS:
        return {"gold": f"has a real value at only {num_defined} of {MAX_POINTS} random points"}
    if num_common < NUM_POINTS:
        return {"found": "has no real value where the gold answer has one"}
    return _symbolic(ground_truth, answer, largest)


def points(rng: random.Random, variables: list[str]) -> Iterator[Point]:
    """Yields random points: small positive, of any sign, between 0 and 1, larger, and integers, in turn."""
    for index in range(MAX_POINTS):
        kind = index % (len(RANGES) + 1)
        yield {name: mpmath.mpf(_draw(rng, kind)) for name in variables}


def _draw(rng: random.Random, kind: int) -> float:
    if kind < len(RANGES):
        return rng.uniform(*RANGES[kind])
    return rng.randint(1, 12)


def _try_evaluate(
    tree: Node,
    point: Point,
    is_complex: bool,
    digits: int = PRECISION_DIGITS,
) -> Any:
    """Returns the value of a tree at a point, with `digits` digits; None if it has none, or none that counts."""
    with mpmath.workdps(digits):
        try:
            value = evaluate(tree, point)
        except (
            Undefined,
            ZeroDivisionError,
            ValueError,
            OverflowError,
            mpmath.libmp.NoConvergence,
        ):
            return None
        if not is_complex and abs(mpmath.im(value)) > abs(value) * mpmath.mpf(10) ** (-digits // 2):
            return None
        if is_complex:
            return mpmath.mpmathify(value)
        return mpmath.re(value)


def evaluate(tree: Node, point: Point) -> Any:
    """Returns the value of a tree as an mpmath number. Raises Undefined if a part is not finite or has more than
    MAX_VALUE_DIGITS digits."""
    kind = tree[0]
    if kind == "number":
        return mpmath.mpf(tree[1].numerator) / tree[1].denominator
    if kind == "name":
        if tree[1] in CONSTANTS:
            return CONSTANTS[tree[1]]()
        return point[tree[1]]
    parts = [evaluate(part, point) for part in tree[1:]]
    value = MPMATH_FUNCTIONS[kind](*parts)
    if not mpmath.isfinite(value) or (value != 0 and mpmath.mag(value) > MAX_VALUE_DIGITS * 3.33):
        raise Undefined
    return value


def _power(base: Any, exponent: Any) -> Any:
    if base != 0 and abs(mpmath.re(exponent * mpmath.log(base))) > MAX_VALUE_DIGITS * 2.4:
        raise Undefined
    return mpmath.power(base, exponent)


def _root(inner: Any, degree: Any) -> Any:
    if degree == 0:
        raise Undefined
    # the real root of a negative number, which is usually meant, and not the principal root
    is_negative = mpmath.im(inner) == 0 and mpmath.re(inner) < 0
    if is_negative and mpmath.isint(degree) and int(degree) % 2:
        return -_power(-inner, 1 / degree)
    return _power(inner, 1 / degree)


def _factorial(inner: Any) -> Any:
    if abs(inner) > MAX_FACTORIAL:
        raise Undefined
    return mpmath.factorial(inner)


def _exp(inner: Any) -> Any:
    if abs(inner) > MAX_VALUE_DIGITS * 2.4:
        raise Undefined
    return mpmath.exp(inner)


def _binomial(whole: Any, part: Any) -> Any:
    if max(abs(whole), abs(part)) > MAX_FACTORIAL:
        raise Undefined
    return mpmath.binomial(whole, part)


def _logarithm(inner: Any, base: Any) -> Any:
    return mpmath.log(inner) / mpmath.log(base)


def _sinh(inner: Any) -> Any:
    return (_exp(inner) - _exp(-inner)) / 2


def _cosh(inner: Any) -> Any:
    return (_exp(inner) + _exp(-inner)) / 2


# functions, because the values depend on the precision at the time of the call
CONSTANTS: dict[str, Callable[[], Any]] = {
    "pi": lambda: +mpmath.pi,
    "e": lambda: +mpmath.e,
    "i": lambda: mpmath.mpc(0, 1),
}
MPMATH_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "add": operator.add,
    "multiply": operator.mul,
    "divide": operator.truediv,
    "negative": operator.neg,
    "power": _power,
    "root": _root,
    "sqrt": mpmath.sqrt,
    "factorial": _factorial,
    "binomial": _binomial,
    "logarithm": _logarithm,
    "exp": _exp,
    "ln": mpmath.log,
    "log": mpmath.log,
    "abs": abs,
    "floor": mpmath.floor,
    "ceil": mpmath.ceil,
    "sin": mpmath.sin,
    "cos": mpmath.cos,
    "tan": mpmath.tan,
    "cot": mpmath.cot,
    "sec": mpmath.sec,
    "csc": mpmath.csc,
    "arcsin": mpmath.asin,
    "arccos": mpmath.acos,
    "arctan": mpmath.atan,
    "sinh": _sinh,
    "cosh": _cosh,
    "tanh": mpmath.tanh,
}


def _symbolic(
    ground_truth: Node,
    answer: Node,
    largest: Any,
) -> GradeResult:
    """Returns the result of sympy for two expressions with equal values, of which `largest` is the largest. A zero
    difference confirms that they are the same, and a constant one that is too small to be seen shows that they are not;
    any other result decides nothing."""
    same = {"same": True, "confirmed": True}
    unconfirmed = {"same": True, "confirmed": False}
    if ground_truth == answer:
        return same
    if not _safe_to_expand(ground_truth) or not _safe_to_expand(answer):
        return unconfirmed
    difference = time_limit(SIMPLIFY_SECONDS, lambda: sympy.simplify(to_sympy(ground_truth) - to_sympy(answer)))
    if difference is None:
        return unconfirmed
    if difference.is_zero:
        return same
    if difference.is_number:
        constant = abs(sympy.N(difference, 15, maxn=1000))
        if 0 < constant < max(MIN_RELATIVE_CONSTANT * largest, RTOL):
            return {"same": False}
    return unconfirmed


def _safe_to_expand(tree: Node) -> bool:
    """Returns whether sympy can expand all powers, factorials and binomials of a tree in a short time."""
    if tree[0] == "power" and not _has_small_exponent(tree):
        return False
    if tree[0] in ("factorial", "binomial") and not free_variables(tree):
        value = _try_evaluate(
            tree,
            {},
            False,
            15,
        )
        if not value or value > MAX_EXACT_FACTORIAL:
            return False
    return all(map(_safe_to_expand, children(tree)))


def _has_small_exponent(power: Node) -> bool:
    _, base, exponent = power
    if free_variables(exponent):
        return True
    value = _try_evaluate(
        exponent,
        {},
        True,
        15,
    )
    maximum = MAX_VARIABLE_EXPONENT if free_variables(base) else MAX_NUMBER_EXPONENT
    return value is not None and abs(value) <= maximum


def to_sympy(tree: Node) -> Any:
    """Returns a tree as a sympy expression with real variables."""
    kind = tree[0]
    if kind == "number":
        value: Fraction = tree[1]
        return sympy.Rational(value.numerator, value.denominator)
    if kind == "name":
        if tree[1] in SYMPY_CONSTANTS:
            return SYMPY_CONSTANTS[tree[1]]
        return sympy.Symbol(tree[1], real=True)
    return SYMPY_FUNCTIONS[kind](*(to_sympy(part) for part in tree[1:]))


SYMPY_CONSTANTS = {"pi": sympy.pi, "e": sympy.E, "i": sympy.I}
SYMPY_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "add": operator.add,
    "multiply": operator.mul,
    "divide": operator.truediv,
    "negative": operator.neg,
    "power": operator.pow,
    "root": sympy.real_root,
    "sqrt": sympy.sqrt,
    "factorial": sympy.factorial,
    "binomial": sympy.binomial,
    "logarithm": sympy.log,
    "exp": sympy.exp,
    "ln": sympy.log,
    "log": sympy.log,
    "abs": sympy.Abs,
    "floor": sympy.floor,
    "ceil": sympy.ceiling,
    "sin": sympy.sin,
    "cos": sympy.cos,
    "tan": sympy.tan,
    "cot": sympy.cot,
    "sec": sympy.sec,
    "csc": sympy.csc,
    "arcsin": sympy.asin,
    "arccos": sympy.acos,
    "arctan": sympy.atan,
    "sinh": sympy.sinh,
    "cosh": sympy.cosh,
    "tanh": sympy.tanh,
}


def _contains_name(tree: Node, name: str) -> bool:
    return tree == ("name", name) or any(_contains_name(part, name) for part in children(tree))

"""Two expressions compared in a worker process: their values at random points, then sympy.

Values are taken at points that are drawn from the texts, so a verdict never changes. A point at which either expression
is undefined, not real or larger than 10 ** 10,000 is drawn again; where one holds the letter i, complex values count.
Values of 300 digits that differ by more than 1e-200 of their size are a proof that the expressions differ; equal values
at 5 points are as good as one that they do not, but for a difference made too small to see: sympy then looks for a
constant that is left.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from typing import Any

import mpmath
import sympy

from lowrank_tune.rewards.math.expression import ExpressionParseError, Node, free_variables, parse_expression
from lowrank_tune.rewards.workers.budget import time_limit

# points that are compared, and at most drawn
NUM_POINTS = 5
MAX_POINTS = 60
PRECISION_DIGITS = 300  # decimal digits of a value; what cancels may take a third of them
RTOL = mpmath.mpf(10) ** -200  # of their size values may differ; nearer to 0 than this a difference is none
MIN_RELATIVE_CONSTANT = (
    1e-20  # of the gold value is a constant that values do not show; a larger one is sympy meaning another root
)
MAX_VALUE_DIGITS = 10_000  # decimal digits of a value
MAX_FACTORIAL = 10_000
SIMPLIFY_SECONDS = 1.0
RANGES = ((0.2, 3.0), (-4.0, 4.0), (0.05, 0.95), (3.0, 20.0))
GradeResult = dict[str, Any]
Point = Mapping[str, Any]


class Undefined(Exception):
    """An expression has no value at a point, or too large a one."""


def load(spec: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], GradeResult]:
    """One comparison at once: what sympy loads late is there when the first completion comes."""
    grade({"gold": "(x+1)^2", "found": "x^2+2x+1", "seconds": 10})
    return grade


def grade(request: Mapping[str, Any]) -> GradeResult:
    """`same`, and `confirmed` where sympy reduced the difference to 0; else `gold` or `found`: why that one cannot be
    used."""
    try:
        ground_truth = parse_expression(request["gold"])
    except ExpressionParseError as error:
        return {"gold": str(error)}
    try:
        answer = parse_expression(request["found"])
    except ExpressionParseError as error:
        return {"found": str(error)}
    return compare(ground_truth, answer, f"{request['gold']}\n{request['found']}")


def compare(ground_truth: Node, answer: Node, seed: str) -> GradeResult:
    """The verdict on two trees."""
    rng = random.Random(seed.encode(errors="surrogatepass"))
    variables = sorted(free_variables(ground_truth) | free_variables(answer))
    is_complex = _contains_name(ground_truth, "i") or _contains_name(answer, "i")
    defined = common = 0
    size = mpmath.mpf(0)
    for point in points(rng, variables):
        expected = _try_evaluate(ground_truth, point, is_complex)
        if expected is None:
            continue
        defined += 1
        actual = _try_evaluate(answer, point, is_complex)
        if actual is None:
            continue
        common += 1
        with mpmath.workdps(PRECISION_DIGITS):
            if abs(actual - expected) > RTOL * max(abs(actual), abs(expected), 1):
                return {"same": False}
        size = max(size, abs(expected))
        if common == NUM_POINTS:
            break
    if defined < NUM_POINTS:
        return {"gold": f"has a real value at only {defined} of {MAX_POINTS} random points"}
    if common < NUM_POINTS:
        return {"found": "has no real value where the gold answer has one"}
    return _symbolic(ground_truth, answer, size)


def points(rng: random.Random, variables: list[str]) -> Iterator[Point]:
    """Random points: small positive, any sign, between 0 and 1, larger, and whole numbers, in turn."""
    for index in range(MAX_POINTS):
        kind = index % (len(RANGES) + 1)
        yield {
            name: mpmath.mpf(rng.uniform(*RANGES[kind]) if kind < len(RANGES) else rng.randint(1, 12))
            for name in variables
        }


def _try_evaluate(tree: Node, point: Point, is_complex: bool, digits: int = PRECISION_DIGITS) -> Any:
    """The value of a tree at a point, or None."""
    with mpmath.workdps(digits):
        try:
            value = evaluate(tree, point)
        except (Undefined, ZeroDivisionError, ValueError, OverflowError, mpmath.libmp.NoConvergence):
            return None
        if not is_complex and abs(mpmath.im(value)) > abs(value) * mpmath.mpf(10) ** (-digits // 2):
            return None
        if is_complex:
            return mpmath.mpmathify(value)
        return mpmath.re(value)


def evaluate(tree: Node, point: Point) -> Any:
    """The value of a tree as mpmath has it; every part has to be finite and of at most MAX_VALUE_DIGITS digits. Raises
    Undefined."""
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
    # the real root, as people mean it
    if mpmath.im(inner) == 0 and mpmath.re(inner) < 0 and mpmath.isint(degree) and int(degree) % 2:
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


CONSTANTS: dict[str, Callable[[], Any]] = {
    "pi": lambda: +mpmath.pi,
    "e": lambda: +mpmath.e,
    "i": lambda: mpmath.mpc(0, 1),
}
MPMATH_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "add": lambda a, b: a + b,
    "multiply": lambda a, b: a * b,
    "divide": lambda a, b: a / b,
    "negative": lambda a: -a,
    "power": _power,
    "root": _root,
    "sqrt": mpmath.sqrt,
    "factorial": _factorial,
    "binomial": _binomial,
    "logarithm": lambda a, b: mpmath.log(a) / mpmath.log(b),
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
    "sinh": lambda a: (_exp(a) - _exp(-a)) / 2,
    "cosh": lambda a: (_exp(a) + _exp(-a)) / 2,
    "tanh": mpmath.tanh,
}


def _symbolic(ground_truth: Node, answer: Node, size: Any) -> GradeResult:
    """Sympy on two expressions with the same values: 0 confirms, a constant too small to be seen refutes, anything else
    leaves it there."""
    if ground_truth == answer:
        return {"same": True, "confirmed": True}
    if _safe_to_expand(ground_truth) and _safe_to_expand(answer):
        difference = time_limit(SIMPLIFY_SECONDS, lambda: sympy.simplify(to_sympy(ground_truth) - to_sympy(answer)))
        if difference is not None and difference.is_zero:
            return {"same": True, "confirmed": True}
        if (
            difference is not None
            and difference.is_number
            and 0 < abs(sympy.N(difference, 15, maxn=1000)) < max(MIN_RELATIVE_CONSTANT * size, RTOL)
        ):
            return {"same": False}
    return {"same": True, "confirmed": False}


def _safe_to_expand(tree: Node) -> bool:
    """Whether no power in a tree is one that sympy might write out: only of numbers or up to the 100th."""
    if tree[0] == "power":
        if not free_variables(tree[2]):
            exponent = _try_evaluate(tree[2], {}, True, 15)
        else:
            exponent = mpmath.mpf(0)
        if exponent is None or abs(exponent) > (1000 if not free_variables(tree[1]) else 100):
            return False
    if (
        tree[0] in ("factorial", "binomial")
        and not free_variables(tree)
        and (_try_evaluate(tree, {}, False, 15) or mpmath.inf) > mpmath.mpf(10) ** 1000
    ):
        return False
    return all(_safe_to_expand(part) for part in tree[1:] if isinstance(part, tuple))


def to_sympy(tree: Node) -> Any:
    """The tree as sympy has it, with real variables."""
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
    "add": lambda a, b: a + b,
    "multiply": lambda a, b: a * b,
    "divide": lambda a, b: a / b,
    "negative": lambda a: -a,
    "power": lambda a, b: a**b,
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
    return tree == ("name", name) or any(_contains_name(part, name) for part in tree[1:] if isinstance(part, tuple))

"""The worker side of `math_answer` (`math_answer.py`): reads both answers with latex2sympy2_extended and compares them
(`math_comparison.py`). Runs in the worker process.

Each call has limits on time and memory (`workers/worker.py`). Those of math-verify are switched off: they have a
resolution of a second, and count an answer as wrong if they interrupt it.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

import sympy
from latex2sympy2_extended.latex2sympy2 import ConversionConfig, NormalizationConfig, latex2sympy, normalize_latex
from latex2sympy2_extended.logic import And
from latex2sympy2_extended.sets import FiniteSet
from math_verify.grader import should_treat_as_complex

from lowrank_tune.rewards.math.math_comparison import MathParseError, answers_are_equal, without_approximation
from lowrank_tune.rewards.math.math_equality import UNEVALUATED_TYPES
from lowrank_tune.rewards.workers.budget import time_limit

GradeResult = dict[str, Any]
NORMALIZATION = NormalizationConfig(
    basic_latex=True,
    units=False,
    malformed_operators=True,
    nits=True,
    boxed="none",
)
CONVERSION = ConversionConfig(lowercase_symbols=False)
# parts of an answer, decimal digits of a number in it, exponent of a base with a symbol
MAX_NODES = 2000
MAX_DIGITS = 1e4
MAX_POWER = 1000.0
MAX_LOG_DIGITS = 300  # numbers of 10 ** 300 digits would not fit a float
CPU_TIME_SHARE = 0.5  # share of the seconds of a call that the computation of an answer may take
WARM_UP = (
    r"\frac{\sqrt{3}}{2}+x^{2}",
    r"(1,\pi]\cup\{2\}",
    r"x\leq 3",
    r"\begin{pmatrix}1\\2\end{pmatrix}",
)


def load(spec: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], GradeResult]:
    """Returns the grader. Reads a few answers first, so that the parser builds its tables before the first request."""
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    for text in WARM_UP:
        parse_answer(text)
    return grade


def grade(request: Mapping[str, Any]) -> GradeResult:
    """Returns {same}, whether the answers are equal; else {gold} or {found}: why that one cannot be read.

    An answer that takes most of the time of the call to read and compare counts as one that cannot be read. If the gold
    answer has an integral, a sum or the like, that may be the cause, and only the limit of the call holds.
    """
    try:
        ground_truth = parse_answer(request["gold"])
    except MathParseError as error:
        return {"gold": str(error)}
    is_set = any(request[name].startswith("\\{") for name in ("gold", "found"))
    compare = functools.partial(
        _is_equal,
        ground_truth,
        request["found"],
        is_set,
    )
    seconds = request["seconds"] * CPU_TIME_SHARE
    try:
        same = compare() if ground_truth.has(*UNEVALUATED_TYPES) else time_limit(seconds, compare)
    except MathParseError as error:
        return {"found": str(error)}
    if same is None:
        return {"found": f"takes more than {seconds:.3g} s, or too much memory, to compute"}
    return {"same": same}


def _is_equal(
    ground_truth: Any,
    found: str,
    is_set: bool,
) -> bool:
    """Returns whether the answers are equal. Raises MathParseError if the libraries fail with the answer but can
    compare the gold answer with itself, so that the answer is the cause."""
    answer = parse_answer(found)
    try:
        return answers_are_equal(ground_truth, answer, is_set)
    except (MathParseError, MemoryError):
        raise
    # sympy and math-verify raise AttributeError, KeyError, NotImplementedError, RecursionError and others
    except Exception as error:
        answers_are_equal(ground_truth, ground_truth, is_set)
        raise MathParseError(f"cannot be compared ({type(error).__name__})") from error


@functools.lru_cache(256)
def parse_answer(text: str) -> Any:
    r"""Returns a LaTeX answer as a sympy object; of `x = 2\sqrt{2} \approx 2.83` the exact part. Raises
    MathParseError."""
    exact, *approximations = (parse_expression(part) for part in text.split(r"\approx"))
    for approximation in approximations:
        exact = without_approximation(exact, approximation)
    return exact


def parse_expression(text: str) -> Any:
    """Returns LaTeX as a sympy object. Raises MathParseError."""
    expression = _read_latex(text)
    check_size(expression if isinstance(expression, sympy.Basic) else sympy.ImmutableMatrix(expression))
    try:
        # a decimal alone stays one: it may be a rounded answer
        if not isinstance(expression, sympy.Float):
            expression = to_exact(expression)
        expression = evaluate(expression)
    except (ArithmeticError, TypeError, ValueError) as error:
        raise MathParseError("has no value") from error
    if expression.has(sympy.nan, sympy.zoo):
        raise MathParseError("has no value")
    return expression


def _read_latex(text: str) -> Any:
    try:
        expression = latex2sympy(
            normalize_latex(text, NORMALIZATION),
            is_real=not should_treat_as_complex(text),
            convert_degrees=False,
            normalization_config=None,
            conversion_config=CONVERSION,
        )
    except MemoryError:
        raise
    except RecursionError as error:
        raise MathParseError("is nested too deeply") from error
    # the parser raises bare Exceptions for what it cannot read
    except Exception as error:
        raise MathParseError("is not read as mathematics") from error
    if not isinstance(expression, (sympy.Basic, sympy.MatrixBase)):
        raise MathParseError("is not read as mathematics")
    return expression


def evaluate(part: Any) -> Any:
    """Returns an expression with sums, products, powers and functions computed as far as sympy does it by itself. The
    parser does not compute them, and the value of nested fractions would then take twice the time for each level."""
    if isinstance(part, sympy.MatrixBase):
        return part.applyfunc(evaluate)
    if not part.args or isinstance(part, UNEVALUATED_TYPES):
        return part
    if isinstance(
        part,
        (
            sympy.core.relational.Relational,
            sympy.Union,
            sympy.Intersection,
            sympy.Complement,
        ),
    ):
        return part.func(*map(evaluate, part.args), evaluate=False)
    if isinstance(part, (FiniteSet, And)):
        return part.func(*map(evaluate, part._unsorted_args))
    if isinstance(part, (sympy.Expr, sympy.Tuple, sympy.Interval)):
        return part.func(*map(evaluate, part.args))
    return part


def to_exact(expression: Any) -> Any:
    """Returns an expression with fractions in place of decimals: 2^{0.5} is the root of 2."""
    if not isinstance(expression, sympy.Expr):
        return expression
    decimals = expression.atoms(sympy.Float)
    if not decimals:
        return expression
    return expression.xreplace({decimal: sympy.Rational(str(decimal)) for decimal in decimals})


def check_size(expression: Any) -> None:
    """Raises MathParseError for an expression that would take too long to compute."""
    num_parts = sum(1 for _ in sympy.preorder_traversal(expression))
    if num_parts > MAX_NODES:
        raise MathParseError(f"has {num_parts} parts (at most {MAX_NODES})")
    if estimate_digits(expression) > MAX_DIGITS:
        raise MathParseError(f"has numbers of more than {MAX_DIGITS:.0f} digits")


def estimate_digits(part: Any) -> float:
    """Returns an upper bound of the decimal digits of the largest number that occurs in the computation of an
    expression; may be infinite."""
    if isinstance(part, sympy.Rational):
        bits = max(part.p.bit_length(), part.q.bit_length())
        return float(bits * math.log10(2))
    inner = [estimate_digits(argument) for argument in part.args]
    if isinstance(part, sympy.Pow):
        return _power_digits(part, *inner)
    largest = max(inner, default=0.0)
    if isinstance(
        part,
        (
            sympy.factorial,
            sympy.binomial,
            sympy.gamma,
            sympy.exp,
            sympy.factorial2,
        ),
    ):
        return float(10 ** min(largest, MAX_LOG_DIGITS) * max(largest, 1.0))
    if isinstance(part, (sympy.Mul, sympy.Add, sympy.MatMul)):
        return sum(inner)
    return largest


def _power_digits(
    power: Any,
    base_digits: float,
    exponent_digits: float,
) -> float:
    if power.exp.is_Rational and exponent_digits < MAX_LOG_DIGITS:
        exponent = abs(float(power.exp))
    else:
        exponent = 10 ** min(exponent_digits, MAX_LOG_DIGITS)
    if power.base.free_symbols and exponent > MAX_POWER and not power.exp.free_symbols:
        return math.inf
    return float(max(base_digits, 1.0) * max(exponent, 1.0))

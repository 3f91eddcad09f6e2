"""Two answers read by latex2sympy2_extended, in a worker process, and compared (`math_comparison.py`).

The process's own alarm clock and limit on memory stand around each call (`rewards/worker.py`), so those of math-verify
are off: they count whole seconds and take what they interrupt for a wrong answer.
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
NORMALIZATION = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none")
CONVERSION = ConversionConfig(lowercase_symbols=False)
# parts of an answer; decimal digits of a number in it; power of what is no number
MAX_NODES = 2000
MAX_DIGITS = 1e4
MAX_POWER = 1000.0
CPU_TIME_SHARE = 0.5  # of the seconds of a call: computing time that an answer may take


def load(spec: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], GradeResult]:
    """Reads a few answers at once: the parser builds its tables with them, and the first completion does not wait for
    that."""
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    for text in (r"\frac{\sqrt{3}}{2}+x^{2}", r"(1,\pi]\cup\{2\}", r"x\leq 3", r"\begin{pmatrix}1\\2\end{pmatrix}"):
        parse_answer(text)
    return grade


def grade(request: Mapping[str, Any]) -> GradeResult:
    """`same`: whether the answers are equal; else `gold` or `found`: why that one cannot be read.

    An answer that takes most of the time of the call to read and compare is one that cannot be read. Where the gold
    answer has an integral, a sum or the like, that may be the cause, and the clock of the call decides.
    """
    try:
        ground_truth = parse_answer(request["gold"])
    except MathParseError as error:
        return {"gold": str(error)}
    is_set = any(request[name].startswith("\\{") for name in ("gold", "found"))
    compare = functools.partial(_is_equal, ground_truth, request["found"], is_set)
    seconds = request["seconds"] * CPU_TIME_SHARE
    try:
        same = compare() if ground_truth.has(*UNEVALUATED_TYPES) else time_limit(seconds, compare)
    except MathParseError as error:
        return {"found": str(error)}
    if same is None:
        return {"found": f"takes more than {seconds:.3g} s, or too much memory, to compute"}
    return {"same": same}


def _is_equal(ground_truth: Any, found: str, is_set: bool) -> bool:
    """Whether the answers are equal. Raises MathParseError for an answer with which the libraries fail, where they
    compare the gold one with itself: the answer alone is then the cause."""
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
    r"""A LaTeX answer as sympy has it; of `x = 2\sqrt{2} \approx 2.83` the exact part. Raises MathParseError."""
    exact, *approximations = (parse_expression(part) for part in text.split(r"\approx"))
    for approximation in approximations:
        exact = without_approximation(exact, approximation)
    return exact


def parse_expression(text: str) -> Any:
    """LaTeX as sympy has it. Raises MathParseError."""
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
    # the parser raises bare Exceptions; whatever it stumbles over is no answer that can be compared
    except Exception as error:
        raise MathParseError("is not read as mathematics") from error
    if not isinstance(expression, (sympy.Basic, sympy.MatrixBase)):
        raise MathParseError("is not read as mathematics")
    check_size(expression if isinstance(expression, sympy.Basic) else sympy.ImmutableMatrix(expression))
    try:
        expression = evaluate(expression if isinstance(expression, sympy.Float) else to_exact(expression))
    except (ArithmeticError, TypeError, ValueError) as error:
        raise MathParseError("has no value") from error
    if expression.has(sympy.nan, sympy.zoo):
        raise MathParseError("has no value")
    return expression


def evaluate(part: Any) -> Any:
    """With sums, products, powers and functions computed as far as sympy does it by itself. The parser leaves them as
    they stand, and the value of fractions in fractions would then cost twice as much with each level."""
    if isinstance(part, sympy.MatrixBase):
        return part.applyfunc(evaluate)
    if not part.args or isinstance(part, UNEVALUATED_TYPES):
        return part
    if isinstance(part, (sympy.core.relational.Relational, sympy.Union, sympy.Intersection, sympy.Complement)):
        return part.func(*map(evaluate, part.args), evaluate=False)
    if isinstance(part, (FiniteSet, And)):
        return part.func(*map(evaluate, part._unsorted_args))
    if isinstance(part, (sympy.Expr, sympy.Tuple, sympy.Interval)):
        return part.func(*map(evaluate, part.args))
    return part


def to_exact(expression: Any) -> Any:
    """With fractions for decimals: 2^{0.5} is the root of 2. A decimal alone stays one: it may be a rounded answer."""
    if isinstance(expression, sympy.Expr):
        decimals = expression.atoms(sympy.Float)
    else:
        decimals = ()
    if decimals:
        return expression.xreplace({decimal: sympy.Rational(str(decimal)) for decimal in decimals})
    return expression


def check_size(expression: Any) -> None:
    """Refuses what would take ages to compute."""
    parts = sum(1 for _ in sympy.preorder_traversal(expression))
    if parts > MAX_NODES:
        raise MathParseError(f"has {parts} parts (at most {MAX_NODES})")
    if estimate_digits(expression) > MAX_DIGITS:
        raise MathParseError(f"has numbers of more than {MAX_DIGITS:.0f} digits")


def estimate_digits(part: Any) -> float:
    """About how many decimal digits the largest number has that computing an expression makes, infinity included; an
    upper bound."""
    if isinstance(part, sympy.Rational):
        return float(max(part.p.bit_length(), part.q.bit_length()) * math.log10(2))
    inner = [estimate_digits(argument) for argument in part.args]
    largest = max(inner, default=0.0)
    if isinstance(part, sympy.Pow):
        if part.exp.is_Rational and inner[1] < 300:
            power = abs(float(part.exp))
        else:
            power = 10 ** min(inner[1], 300)
        if part.base.free_symbols and power > MAX_POWER and not part.exp.free_symbols:
            return math.inf
        return float(max(inner[0], 1.0) * max(power, 1.0))
    if isinstance(part, (sympy.factorial, sympy.binomial, sympy.gamma, sympy.exp, sympy.factorial2)):
        return float(10 ** min(largest, 300) * max(largest, 1.0))
    if isinstance(part, (sympy.Mul, sympy.Add, sympy.MatMul)):
        return sum(inner)
    return largest

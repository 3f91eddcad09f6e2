"""Two answers compared by algebra, in a worker process: latex2sympy2_extended reads them, math-verify compares what it
read.

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
from math_verify import verify
from math_verify.grader import should_treat_as_complex

GradeResult = dict[str, Any]
NORMALIZATION = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none")
CONVERSION = ConversionConfig(lowercase_symbols=False)
# parts of an answer; decimal digits of a number in it; power of what is no number
MAX_NODES, MAX_DIGITS, MAX_POWER = 2000, 1e4, 1000.0
DECIMAL_PLACES = (
    6  # decimals that a rounded answer must have right; significant digits where the gold answer is below 1
)
DIFFERENCE_TOLERANCE = 1e-4  # of their size; a rounded answer is nearer
UNEVALUATED_TYPES = (
    sympy.Integral,
    sympy.Sum,
    sympy.Product,
    sympy.Limit,
    sympy.Derivative,
    sympy.UnevaluatedExpr,
    sympy.MatrixExpr,
)


class MathParseError(Exception):
    """An answer that is no mathematics, or more than can be computed."""


def load(spec: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], GradeResult]:
    """Reads a few answers at once: the parser builds its tables with them, and the first completion does not wait for
    that."""
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    for text in (r"\frac{\sqrt{3}}{2}+x^{2}", r"(1,\pi]\cup\{2\}", r"x\leq 3", r"\begin{pmatrix}1\\2\end{pmatrix}"):
        parse_answer(text)
    return grade


def grade(request: Mapping[str, Any]) -> GradeResult:
    """`same`: whether the answers are equal; else `gold` or `found`: why that one cannot be read."""
    try:
        ground_truth = parse_answer(request["gold"])
    except MathParseError as error:
        return {"gold": str(error)}
    try:
        answer = parse_answer(request["found"])
    except MathParseError as error:
        return {"found": str(error)}
    return {"same": are_equal(ground_truth, answer)}


def are_equal(ground_truth: Any, answer: Any) -> bool:
    """Whether an answer is the gold one; the order matters to math-verify, which takes `x = 5` for 5 where the gold
    answer is 5."""
    if differ_numerically(ground_truth, answer):
        return False
    size = abs(ground_truth.evalf(15)) if getattr(ground_truth, "is_number", False) else None
    if size is not None and size.is_comparable and 0 < size < 1 and getattr(answer, "is_number", False):
        return bool(
            abs(sympy.N(ground_truth - answer, 15, maxn=1000)) < size * 10.0**-DECIMAL_PLACES
            if _rounded(answer)
            else _is_zero(ground_truth - answer)
        )
    return bool(
        verify(
            ground_truth,
            answer,
            float_rounding=DECIMAL_PLACES,
            allow_set_relation_comp=True,
            timeout_seconds=None,
            raise_on_error=True,
        )
    )


def differ_numerically(ground_truth: Any, answer: Any) -> bool:
    """Whether two expressions clearly differ at a point: told in no time, where sympy might try for ever to make their
    difference 0."""
    expressions = [
        expression
        for expression in (ground_truth, answer)
        if isinstance(expression, sympy.Expr) and not expression.is_Symbol and not expression.has(*UNEVALUATED_TYPES)
    ]
    if len(expressions) < 2:
        return False
    symbols = sorted(ground_truth.free_symbols | answer.free_symbols, key=str)
    for point in (0.7312, 1.3871):
        values = [
            expression.evalf(15, subs={symbol: point + 0.0731 * index for index, symbol in enumerate(symbols)})
            for expression in expressions
        ]
        if not all(value.is_comparable and value.is_finite for value in values):
            return False
        if abs(values[0] - values[1]) > DIFFERENCE_TOLERANCE * max(abs(values[0]), abs(values[1])):
            return True
    return False


def _rounded(expression: Any) -> bool:
    return bool(expression.has(sympy.Float))


def _is_zero(difference: Any) -> bool:
    return bool(sympy.N(difference, 30, maxn=300, chop=False) == 0 or sympy.simplify(difference) == 0)


@functools.lru_cache(256)
def parse_answer(text: str) -> Any:
    """A LaTeX answer as sympy has it. Raises MathParseError."""
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
    return expression if isinstance(expression, sympy.Float) else to_exact(expression)


def to_exact(expression: Any) -> Any:
    """With fractions for decimals: 2^{0.5} is the root of 2. A decimal alone stays one: it may be a rounded answer."""
    decimals = expression.atoms(sympy.Float) if isinstance(expression, sympy.Expr) else ()
    return (
        expression.xreplace({decimal: sympy.Rational(str(decimal)) for decimal in decimals}) if decimals else expression
    )


def check_size(expression: Any) -> None:
    """Refuses what has no value, or would take ages to compute."""
    parts = sum(1 for _ in sympy.preorder_traversal(expression))
    if parts > MAX_NODES:
        raise MathParseError(f"has {parts} parts (at most {MAX_NODES})")
    if expression.has(sympy.nan, sympy.zoo):
        raise MathParseError("has no value")
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
        power = abs(float(part.exp)) if part.exp.is_Rational and inner[1] < 300 else 10 ** min(inner[1], 300)
        if part.base.free_symbols and power > MAX_POWER and not part.exp.free_symbols:
            return math.inf
        return float(max(inner[0], 1.0) * max(power, 1.0))
    if isinstance(part, (sympy.factorial, sympy.binomial, sympy.gamma, sympy.exp, sympy.factorial2)):
        return float(10 ** min(largest, 300) * max(largest, 1.0))
    if isinstance(part, (sympy.Mul, sympy.Add, sympy.MatMul)):
        return sum(inner)
    return largest

"""Two values compared: by their digits where these differ, else by math-verify."""

from __future__ import annotations

from typing import Any

import sympy
from math_verify import verify

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


def values_are_equal(ground_truth: Any, answer: Any) -> bool:
    """Whether one value, set, interval or relation is the gold one."""
    if differ_numerically(ground_truth, answer):
        return False
    if getattr(ground_truth, "is_number", False):
        size = abs(ground_truth.evalf(15))
    else:
        size = None
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
    """Whether two expressions clearly differ at a point. It takes no time, where sympy might try for ever to make their
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
        # `evalf(subs=...)` raises AttributeError for the floor of a symbol
        substitutions = {symbol: sympy.Float(point + 0.0731 * index) for index, symbol in enumerate(symbols)}
        values = [expression.xreplace(substitutions).evalf(15) for expression in expressions]
        if not all(value.is_comparable and value.is_finite for value in values):
            return False
        if abs(values[0] - values[1]) > DIFFERENCE_TOLERANCE * max(abs(values[0]), abs(values[1])):
            return True
    return False


def _rounded(expression: Any) -> bool:
    return bool(expression.has(sympy.Float))


def _is_zero(difference: Any) -> bool:
    return bool(sympy.N(difference, 30, maxn=300, chop=False) == 0 or sympy.simplify(difference) == 0)

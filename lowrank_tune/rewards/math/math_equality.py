"""Compares two values of sympy: by their digits if these differ, else by math-verify. Runs in the worker process."""

from __future__ import annotations

from typing import Any

import sympy
from math_verify import verify

# decimals that a rounded answer must have right; significant digits if the gold answer is below 1
DECIMAL_PLACES = 6
DIFFERENCE_TOLERANCE = 1e-4  # relative; a correctly rounded answer differs by less
TEST_POINTS = (0.7312, 1.3871)
SYMBOL_OFFSET = 0.0731  # between the values of two symbols at a point
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
    """Returns whether one value, set, interval or relation is the gold one."""
    if differ_numerically(ground_truth, answer):
        return False
    if getattr(
        ground_truth,
        "is_number",
        False,
    ) and getattr(
        answer,
        "is_number",
        False,
    ):
        size = abs(ground_truth.evalf(15))
        if size.is_comparable and 0 < size < 1:
            return _small_numbers_are_equal(
                ground_truth - answer,
                size,
                is_rounded=answer.has(sympy.Float),
            )
    equal = verify(
        ground_truth,
        answer,
        float_rounding=DECIMAL_PLACES,
        allow_set_relation_comp=True,
        timeout_seconds=None,
        raise_on_error=True,
    )
    return bool(equal)


def _small_numbers_are_equal(
    difference: Any,
    size: Any,
    is_rounded: bool,
) -> bool:
    """Returns whether a number below 1 and an answer are equal; a rounded answer only in its significant digits."""
    if is_rounded:
        return bool(
            abs(
                sympy.N(
                    difference,
                    15,
                    maxn=1000,
                )
            )
            < size * 10.0**-DECIMAL_PLACES
        )
    return bool(
        sympy.N(
            difference,
            30,
            maxn=300,
            chop=False,
        )
        == 0
        or sympy.simplify(difference) == 0
    )


def differ_numerically(ground_truth: Any, answer: Any) -> bool:
    """Returns whether two expressions clearly differ at a point. This is fast, while sympy might try for ever to
    simplify their difference to 0."""
    expressions = [expression for expression in (ground_truth, answer) if _has_values(expression)]
    if len(expressions) < 2:
        return False
    symbols = sorted(ground_truth.free_symbols | answer.free_symbols, key=str)
    for point in TEST_POINTS:
        # `evalf(subs=...)` raises AttributeError for the floor of a symbol
        substitutions = {symbol: sympy.Float(point + SYMBOL_OFFSET * index) for index, symbol in enumerate(symbols)}
        values = [expression.xreplace(substitutions).evalf(15) for expression in expressions]
        if not all(value.is_comparable and value.is_finite for value in values):
            return False
        expected, actual = values
        if abs(expected - actual) > DIFFERENCE_TOLERANCE * max(abs(expected), abs(actual)):
            return True
    return False


def _has_values(expression: Any) -> bool:
    if not isinstance(expression, sympy.Expr) or expression.is_Symbol:
        return False
    return not expression.has(*UNEVALUATED_TYPES)

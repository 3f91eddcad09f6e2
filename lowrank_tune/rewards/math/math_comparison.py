"""Whether an answer, as sympy has it, is the gold one: values, equations, lists, points and sets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy
from math_verify.grader import is_assignment_relation, is_equation, take_first_relation, take_last_relation
from sympy.core.function import AppliedUndef

from lowrank_tune.rewards.math.math_equality import values_are_equal

APPROXIMATION_TOLERANCE = 0.05  # of its size: what a rough `\approx` may be off


class MathParseError(Exception):
    """An answer that is no mathematics, that does not hold, or that is more than can be computed."""


def answers_are_equal(ground_truth: Any, answer: Any, is_set: bool) -> bool:
    """Whether an answer is the gold one. `is_set`: one of them is written in the braces of a set, so that neither
    stands for a point. Raises MathParseError for an equation that does not hold."""
    ground_truth, answer = without_names(ground_truth, answer)
    members = list_members(ground_truth)
    answer_members = list_members(answer)
    point = coordinates(ground_truth)
    answer_point = coordinates(answer)
    if members is not None and answer_members is not None:
        return have_equal_members(members, answer_members)
    if members is not None and len(members) == 1:
        return answers_are_equal(members[0], answer, is_set=False)
    if answer_members is not None and len(answer_members) == 1:
        return answers_are_equal(ground_truth, answer_members[0], is_set=False)
    if members is not None and answer_point is not None:
        return not is_set and are_equal_in_order(members, answer_point)
    if point is not None and answer_members is not None:
        return not is_set and are_equal_in_order(point, answer_members)
    if point is not None and answer_point is not None and sympy.Tuple in (type(ground_truth), type(answer)):
        return are_equal_in_order(point, answer_point)
    return values_are_equal(ground_truth, answer)


def without_names(ground_truth: Any, answer: Any) -> tuple[Any, Any]:
    """Both without the name of the value, where one gives it no name, or both the same; else as they are."""
    if is_equation(answer):
        check_constant_sides(sides_of(answer))
        if not is_equation(ground_truth):
            return ground_truth, value_of_equation(answer)
        if not (is_assignment_relation(ground_truth) and is_assignment_relation(answer)):
            return ground_truth, answer
        if take_first_relation(ground_truth).lhs != take_first_relation(answer).lhs:
            return ground_truth, answer
        answer = take_last_relation(answer).rhs
    return (take_last_relation(ground_truth).rhs if is_assignment_relation(ground_truth) else ground_truth), answer


def list_members(expression: Any) -> Sequence[Any] | None:
    """The members of a list or set, in the order in which they were written."""
    return getattr(expression, "_unsorted_args", expression.args) if isinstance(expression, sympy.FiniteSet) else None


def coordinates(expression: Any) -> Sequence[Any] | None:
    """Those of a point; the parser takes (1, 2) for an open interval."""
    if isinstance(expression, sympy.Tuple):
        return tuple(expression.args)
    if isinstance(expression, sympy.Interval) and expression.is_open:
        return expression.start, expression.end
    return None


def have_equal_members(ground_truth: Sequence[Any], answer: Sequence[Any]) -> bool:
    """Whether two lists hold the same, in any order; what is in one twice counts once."""
    expected = list(dict.fromkeys(ground_truth))
    found = list(dict.fromkeys(answer))
    remaining = [member for member in found if member not in expected]
    missing = [member for member in expected if member not in found]
    if len(missing) != len(remaining):
        return False
    for member in missing:
        partner = next((each for each in remaining if answers_are_equal(member, each, is_set=False)), None)
        if partner is None:
            return False
        remaining.remove(partner)
    return True


def are_equal_in_order(ground_truth: Sequence[Any], answer: Sequence[Any]) -> bool:
    return len(ground_truth) == len(answer) and all(
        answers_are_equal(expected, found, is_set=False) for expected, found in zip(ground_truth, answer, strict=True)
    )


def sides_of(equation: Any) -> list[Any]:
    """The sides of `a = b`, or of a chain `a = b = c`."""
    relations = getattr(equation, "_unsorted_args", (equation,))
    return [relations[0].lhs, *(relation.rhs for relation in relations)]


def value_of_equation(equation: Any) -> Any:
    """The value that an equation gives to a name: 5 of x = 5 or 5 = x, 2x of y = 2x. Raises MathParseError where it
    gives none, because its sides differ."""
    sides = sides_of(equation)
    constants = constant_sides(sides)
    if constants:
        return next((side for side in constants if not side.has(sympy.Float)), constants[0])
    *others, value = sides
    for other in others:
        if names_of(other) <= names_of(value) and not values_are_equal(value, other):
            raise MathParseError("is an equation, and gives no value")
    return value


def check_constant_sides(sides: Sequence[Any]) -> None:
    """Refuses 2 = 3, and x = 2 = 3."""
    first, *others = constant_sides(sides) or [sympy.S.Zero]
    if not all(answers_are_equal(first, other, is_set=False) for other in others):
        raise MathParseError("is an equation that does not hold")


def constant_sides(sides: Sequence[Any]) -> list[Any]:
    """Those without a name in them. A letter e or i alone on the left is a name, and no number."""
    named = 1 if sides[0] in (sympy.E, sympy.I) else 0
    return [side for side in sides[named:] if not names_of(side)]


def names_of(expression: Any) -> set[Any]:
    """The symbols and undefined functions of an expression."""
    return set(expression.free_symbols) | set(expression.atoms(AppliedUndef))


def without_approximation(exact: Any, approximation: Any) -> Any:
    r"""The exact part of `exact \approx approximation`; of a name and a number, that they are equal.

    Raises MathParseError where the two are far apart.
    """
    if names_of(exact) and not is_equation(exact):
        return sympy.Eq(exact, approximation, evaluate=False)
    value = value_of_equation(exact) if is_equation(exact) else exact
    numbers = [each.evalf(15) for each in (value, approximation) if isinstance(each, sympy.Expr)]
    if len(numbers) < 2 or not all(number.is_comparable for number in numbers):
        raise MathParseError("is an approximation of no number")
    if abs(numbers[0] - numbers[1]) > APPROXIMATION_TOLERANCE * max(map(abs, numbers)):
        raise MathParseError("is an approximation that does not hold")
    return exact

"""Compares an answer with the gold answer as sympy objects: values, equations, lists, points and sets. Runs in the
worker process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy
from math_verify.grader import is_assignment_relation, is_equation, take_first_relation, take_last_relation
from sympy.core.function import AppliedUndef

from lowrank_tune.rewards.math.math_equality import values_are_equal

APPROXIMATION_TOLERANCE = 0.05  # relative error that a rough `\approx` may have


class MathParseError(Exception):
    """An answer that is not mathematics, does not hold, or is too large to be computed; the message is a predicate."""


def answers_are_equal(
    ground_truth: Any,
    answer: Any,
    is_set: bool,
) -> bool:
    """Returns whether an answer is the gold answer. `is_set`: one of them is written with the braces of a set, so that
    neither is a point. Raises MathParseError for an equation that does not hold."""
    ground_truth, answer = without_names(ground_truth, answer)
    members = list_members(ground_truth)
    answer_members = list_members(answer)
    point = coordinates(ground_truth)
    answer_point = coordinates(answer)
    if members is not None and answer_members is not None:
        return have_equal_members(members, answer_members)
    # a list of one member is that member
    if members is not None and len(members) == 1:
        return answers_are_equal(members[0], answer, is_set=False)
    if answer_members is not None and len(answer_members) == 1:
        return answers_are_equal(
            ground_truth,
            answer_members[0],
            is_set=False,
        )
    # a list without braces may be a point
    if members is not None and answer_point is not None:
        return not is_set and are_equal_in_order(members, answer_point)
    if point is not None and answer_members is not None:
        return not is_set and are_equal_in_order(point, answer_members)
    # of two open intervals neither is a point
    if point is not None and answer_point is not None and sympy.Tuple in (type(ground_truth), type(answer)):
        return are_equal_in_order(point, answer_point)
    return values_are_equal(ground_truth, answer)


def without_names(ground_truth: Any, answer: Any) -> tuple[Any, Any]:
    """Returns both without the name of the value (5 for x = 5), if one has no name or both have the same; else both as
    they are."""
    if is_equation(answer):
        check_constant_sides(sides_of(answer))
        if not is_equation(ground_truth):
            return ground_truth, value_of_equation(answer)
        if not (is_assignment_relation(ground_truth) and is_assignment_relation(answer)):
            return ground_truth, answer
        if take_first_relation(ground_truth).lhs != take_first_relation(answer).lhs:
            return ground_truth, answer
        answer = take_last_relation(answer).rhs
    if is_assignment_relation(ground_truth):
        ground_truth = take_last_relation(ground_truth).rhs
    return ground_truth, answer


def list_members(expression: Any) -> Sequence[Any] | None:
    """Returns the members of a list or set, in the order in which they were written; None for anything else."""
    if isinstance(expression, sympy.FiniteSet):
        members: Sequence[Any] = getattr(expression, "_unsorted_args", expression.args)
        return members
    return None


def coordinates(expression: Any) -> Sequence[Any] | None:
    """Returns the coordinates of a point, which the parser may read as an open interval; None for anything else."""
    if isinstance(expression, sympy.Tuple):
        return tuple(expression.args)
    if isinstance(expression, sympy.Interval) and expression.is_open:
        return expression.start, expression.end
    return None


def have_equal_members(ground_truth: Sequence[Any], answer: Sequence[Any]) -> bool:
    """Returns whether two lists have the same members in any order; a member that occurs twice counts once."""
    expected = list(dict.fromkeys(ground_truth))
    found = list(dict.fromkeys(answer))
    remaining = [member for member in found if member not in expected]
    missing = [member for member in expected if member not in found]
    if len(missing) != len(remaining):
        return False
    for member in missing:
        partner = next(
            (
                each
                for each in remaining
                if answers_are_equal(
                    member,
                    each,
                    is_set=False,
                )
            ),
            None,
        )
        if partner is None:
            return False
        remaining.remove(partner)
    return True


def are_equal_in_order(ground_truth: Sequence[Any], answer: Sequence[Any]) -> bool:
    if len(ground_truth) != len(answer):
        return False
    pairs = zip(ground_truth, answer, strict=True)
    return all(
        answers_are_equal(
            expected,
            found,
            is_set=False,
        )
        for expected, found in pairs
    )


def sides_of(equation: Any) -> list[Any]:
    """Returns the sides of `a = b`, or of a chain `a = b = c`."""
    relations = getattr(equation, "_unsorted_args", (equation,))
    return [relations[0].lhs, *(relation.rhs for relation in relations)]


def value_of_equation(equation: Any) -> Any:
    """Returns the value that an equation gives to a name: 5 of x = 5 or 5 = x, 2x of y = 2x. Raises MathParseError if
    it gives none, because its sides differ."""
    sides = sides_of(equation)
    constants = constant_sides(sides)
    if constants:
        return next((side for side in constants if not side.has(sympy.Float)), constants[0])
    *others, value = sides
    for other in others:
        if names_of(other) <= names_of(value) and not values_are_equal(value, other):
            raise MathParseError("is an equation that gives no value")
    return value


def check_constant_sides(sides: Sequence[Any]) -> None:
    """Raises MathParseError for 2 = 3 and for x = 2 = 3."""
    first, *others = constant_sides(sides) or [sympy.S.Zero]
    if not all(answers_are_equal(first, other, is_set=False) for other in others):
        raise MathParseError("is an equation that does not hold")


def constant_sides(sides: Sequence[Any]) -> list[Any]:
    """Returns the sides without a name in them. A letter e or i alone on the left is a name and not a number."""
    num_named = 1 if sides[0] in (sympy.E, sympy.I) else 0
    return [side for side in sides[num_named:] if not names_of(side)]


def names_of(expression: Any) -> set[Any]:
    """Returns the symbols and undefined functions of an expression."""
    return set(expression.free_symbols) | set(expression.atoms(AppliedUndef))


def without_approximation(exact: Any, approximation: Any) -> Any:
    r"""Returns the exact part of `exact \approx approximation`; if the exact part is a name, the equation of both.

    Raises MathParseError if the two differ much.
    """
    if names_of(exact) and not is_equation(exact):
        return sympy.Eq(exact, approximation, evaluate=False)
    value = value_of_equation(exact) if is_equation(exact) else exact
    numbers = [each.evalf(15) for each in (value, approximation) if isinstance(each, sympy.Expr)]
    if len(numbers) < 2 or not all(number.is_comparable for number in numbers):
        raise MathParseError("is an approximation of something that is not a number")
    if abs(numbers[0] - numbers[1]) > APPROXIMATION_TOLERANCE * max(map(abs, numbers)):
        raise MathParseError("is an approximation that does not hold")
    return exact

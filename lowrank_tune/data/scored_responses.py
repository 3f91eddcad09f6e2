"""Rows with responses and their scores, or with two responses and a preference: which two are a pair; and margins."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from lowrank_tune.data.row_values import (
    Columns,
    InvalidRow,
    RawRow,
    first_present,
    is_list,
)

RESPONSE_COLUMNS = (
    "responses",
    "completions",
    "generations",
    "answers",
)
"""The columns that may contain a list of responses; `columns` maps `responses`."""
RESPONSE_KEYS = (
    "response",
    "answer",
    "completion",
    "generation",
    "text",
    "content",
    "value",
)
"""The keys of the text of a response that is an object, and not a turn."""
SCORE_COLUMNS = ("scores", "ratings")
"""The columns that may contain a list of scores, one for each response; `columns` maps `scores`."""
SCORE_KEYS = (
    "overall_score",
    "fine-grained_score",
    "score",
    "rating",
)
RANK_KEY = "rank"
"""The keys of the score of a response that is an object. Of a rank the lowest is the best."""
COMPARISONS = (
    ("response_1", "response_2", "preference_strength"),
    ("response1", "response2", "overall_preference"),
)
"""Two responses and a preference of HelpSteer2 and HelpSteer3: negative for the first one, positive for the second."""
SIDE_SCORES = (
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen_rating", "rejected_rating"),
    ("chosen-rating", "rejected-rating"),
)
"""The columns of the scores of two sides; `columns` maps the first ones."""
EQUAL_SCORES = "all responses have the same score"
TOO_FEW_SCORES = "fewer than two responses with a score"
INVALID_MARGIN = "the margin is not a number of at least 0"


class Sides(NamedTuple):
    """The values of the two sides of a pair, and by how much the score of the chosen one is higher; None without
    scores."""

    chosen: Any
    rejected: Any
    difference: float | None = None


def has_scored_responses(row: RawRow, columns: Columns) -> bool:
    """Returns whether a row has responses with scores, or two responses with a preference."""
    if _comparison_of(row, columns) is not None:
        return True
    responses = _responses_of(row, columns)
    if not responses:
        return False
    if is_list(first_present(row, *_score_columns(columns))):
        return True
    return _score_of(responses[0], columns) is not None


def may_have_scored_responses(names: Collection[str], columns: Columns) -> bool:
    """Returns whether columns of these names may contain responses with scores."""
    return "responses" in columns or not set(RESPONSE_COLUMNS).isdisjoint(names)


def scored_sides(row: RawRow, columns: Columns) -> Sides | None:
    """Returns the best and the worst response of a row; None for a row that has sides already, or no responses. Raises
    InvalidRow."""
    if any(name in columns or row.get(name) is not None for name in ("chosen", "rejected")):
        return None
    comparison = _comparison_of(row, columns)
    if comparison is not None:
        return _preferred_first(*comparison)
    responses = _responses_of(row, columns)
    if responses is None:
        return None
    scored = [(score, response) for score, response in _scored(row, responses, columns) if score is not None]
    if len(scored) < 2:
        raise InvalidRow(TOO_FEW_SCORES)
    # Of equal scores the first one counts.
    best, chosen = max(scored, key=_score)
    worst, rejected = min(scored, key=_score)
    if best == worst:
        raise InvalidRow(EQUAL_SCORES)
    return Sides(
        _response_value(chosen),
        _response_value(rejected),
        best - worst,
    )


def _score(scored: tuple[float, Any]) -> float:
    return scored[0]


def _comparison_of(row: RawRow, columns: Columns) -> tuple[Any, Any, Any] | None:
    """Returns two responses and the preference; None for a row without them."""
    for names in COMPARISONS:
        first, second, preference = (row.get(columns.get(name, name)) for name in names)
        if first is not None and second is not None and preference is not None:
            return first, second, preference
    return None


def _preferred_first(
    first: Any,
    second: Any,
    preference: Any,
) -> Sides:
    """Returns two responses in the order of a preference. Raises InvalidRow."""
    strength = _number(preference)
    if strength is None:
        raise InvalidRow("the preference is not a number")
    if not strength:
        raise InvalidRow(EQUAL_SCORES)
    if strength < 0:
        return Sides(first, second, -strength)
    return Sides(second, first, strength)


def _responses_of(row: RawRow, columns: Columns) -> Any:
    """Returns the list of responses of a row; None without one."""
    names: tuple[str, ...] = RESPONSE_COLUMNS
    if "responses" in columns:
        names = (columns["responses"],)
    for name in names:
        value = row.get(name)
        if is_list(value) and not isinstance(value, bytes):
            return value
    return None


def _score_columns(columns: Columns) -> tuple[str, ...]:
    return (columns["scores"],) if "scores" in columns else SCORE_COLUMNS


def _scored(
    row: RawRow,
    responses: Any,
    columns: Columns,
) -> Iterator[tuple[float | None, Any]]:
    """Yields each response with its score, None for one without. Raises InvalidRow."""
    scores = first_present(row, *_score_columns(columns))
    if not is_list(scores):
        for response in responses:
            yield _score_of(response, columns), response
        return
    if len(scores) != len(responses):
        raise InvalidRow("not as many scores as responses")
    for score, response in zip(scores, responses, strict=True):
        yield _number(score), response


def _score_of(response: Any, columns: Columns) -> float | None:
    """Returns the score within a response; None without one."""
    if not isinstance(response, Mapping):
        return None
    if "scores" in columns:
        return _number(response.get(columns["scores"]))
    score = _number(first_present(response, *SCORE_KEYS))
    rank = _number(response.get(RANK_KEY))
    if score is None and rank is not None:
        return -rank
    return score


def _response_value(response: Any) -> Any:
    """Returns the text or the turns of a response; a turn as it is."""
    if not isinstance(response, Mapping) or "role" in response or "from" in response:
        return response
    value = first_present(response, *RESPONSE_KEYS)
    if value is None:
        raise InvalidRow("a response has no text")
    return value


def _number(value: Any) -> float | None:
    """Returns a finite number, also from text; None for anything else, such as `N/A`."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def side_difference(row: RawRow, columns: Columns) -> float | None:
    """Returns by how much the score of the chosen side is higher; None for a row without scores. Raises InvalidRow."""
    for index, names in enumerate(SIDE_SCORES):
        if index == 0:
            names = (columns.get(names[0], names[0]), columns.get(names[1], names[1]))
        chosen, rejected = (row.get(name) for name in names)
        if chosen is None or rejected is None:
            continue
        high = _number(chosen)
        low = _number(rejected)
        if high is None or low is None:
            raise InvalidRow("a score of a side is not a number")
        if low > high:
            raise InvalidRow("the rejected side has the higher score")
        return high - low
    return None


def margin_of(row: RawRow, columns: Columns) -> float | None:
    """Returns the margin in a column of a row; None without one. Raises InvalidRow."""
    value = row.get(columns.get("margin", "margin"))
    if value is None or value == "":
        return None
    margin = _number(value)
    if margin is None:
        raise InvalidRow(INVALID_MARGIN)
    return checked_margin(margin)


def checked_margin(margin: float) -> float:
    """Returns a margin that float32 can represent. Raises InvalidRow."""
    if not 0.0 <= margin <= float(np.finfo(np.float32).max):
        raise InvalidRow(INVALID_MARGIN)
    return margin

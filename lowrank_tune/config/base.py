"""The base class of all settings, and the types of their values."""

from __future__ import annotations

from contextlib import suppress
from datetime import date
from typing import Annotated, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

T = TypeVar("T")


def _non_empty(entries: tuple[T, ...]) -> tuple[T, ...]:
    """Checks that a list is not empty. Pydantic's own `min_length` would hide the faults of the entries behind a fault
    of the list."""
    if not entries:
        raise PydanticCustomError("too_short", "must have at least one entry")
    return entries


def _calendar_day(text: str) -> str:
    """Checks that a day is written as YYYY-MM-DD; `fromisoformat` alone also accepts 20260726 and 2026-W30-7."""
    with suppress(ValueError):
        if date.fromisoformat(text).isoformat() == text:
            return text
    raise PydanticCustomError("calendar_day", "must be a day as YYYY-MM-DD")


NON_EMPTY = (Field(strict=False, json_schema_extra={"minItems": 1}), AfterValidator(_non_empty))

PositiveInt = Annotated[int, Field(ge=1, le=1_000_000_000_000)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
NonEmptyStr = Annotated[str, Field(min_length=1, max_length=4096, pattern=r"^[^\x00-\x1f\x7f]+$")]
StrList = Annotated[tuple[NonEmptyStr, ...], *NON_EMPTY]
Day = Annotated[str, Field(json_schema_extra={"format": "date"}), AfterValidator(_calendar_day)]
RunName = Annotated[str, Field(pattern=r"^$|^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


class Settings(BaseModel):
    """Unknown keys, wrong types and later changes are errors."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )

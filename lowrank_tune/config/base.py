"""The base class of all settings, and the types of their values."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from datetime import date
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

T = TypeVar("T")
Path = tuple[str | int, ...]
"""The keys and list positions that lead to a value."""
Finding = tuple[Path, str]
"""The path of a setting, and a sentence about what is wrong with it."""


def _non_empty(entries: tuple[T, ...]) -> tuple[T, ...]:
    """Raises an error if a list is empty. Pydantic's own `min_length` would hide the errors of the entries behind an
    error of the list."""
    if not entries:
        raise PydanticCustomError("too_short", "must have at least one entry")
    return entries


def _calendar_day(text: str) -> str:
    """Raises an error if a day is not written as YYYY-MM-DD. `fromisoformat` alone also accepts 20260726 and
    2026-W30-7."""
    with suppress(ValueError):
        if date.fromisoformat(text).isoformat() == text:
            return text
    raise PydanticCustomError("calendar_day", "must be a day as YYYY-MM-DD")


NON_EMPTY = (
    Field(
        strict=False,
        json_schema_extra={"minItems": 1},
    ),
    AfterValidator(_non_empty),
)

PositiveInt = Annotated[int, Field(ge=1, le=1_000_000_000_000)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
NonEmptyStr = Annotated[str, Field(min_length=1, max_length=4096, pattern=r"^[^\x00-\x1f\x7f]+$")]
StrList = Annotated[tuple[NonEmptyStr, ...], *NON_EMPTY]
Day = Annotated[str, Field(json_schema_extra={"format": "date"}), AfterValidator(_calendar_day)]
RunName = Annotated[str, Field(pattern=r"^$|^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


class InvalidSetting(AttributeError):
    """Raised when a check reads a setting whose value is invalid or missing (see `validate`)."""


def until_invalid(found: Iterable[Finding]) -> Iterator[Finding]:
    """Yields the findings of a check until it reads an invalid setting."""
    with suppress(InvalidSetting):
        yield from found


class Settings(BaseModel):
    """One section of a recipe. Unknown keys, wrong types and later changes are errors."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            if name in type(self).model_fields:
                raise InvalidSetting(name)
            return super().__getattr__(name)

    def is_set(self, key: str) -> bool:
        """Returns whether the recipe contains this key, even with an invalid value. `null` counts as not set."""
        return key in self.model_fields_set and getattr(self, key, "invalid") is not None

    def findings(self) -> Iterator[Finding]:
        """Yields the keys that have no effect beside other keys of this section, or contradict them."""
        yield from ()

"""Errors for the user, with the place and what to do. Any other exception is a mistake in this package."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches


class UserError(Exception):
    """An error that the user can correct. Printed without a traceback; the process ends with `exit_code`."""

    exit_code = 2

    def _render_traceback_(self) -> list[str]:
        """Returns what a notebook shows of the error: its message without a traceback."""
        return [f"{type(self).__name__}: {self}"]


class TrainingError(UserError):
    """A run with valid input has failed: for example a full disk, or losses that are not finite."""

    exit_code = 1


class OutOfMemory(UserError):
    """The GPU or the machine does not have enough memory for a step."""

    exit_code = 3


@dataclass(frozen=True)
class ConfigProblem:
    """One problem of a recipe or a data file, with its place."""

    message: str
    key: str = ""
    file: str = ""
    line: int | None = None

    def __str__(self) -> str:
        location = self.file
        if self.file and self.line:
            location = f"{self.file}:{self.line}"
        return ": ".join(part for part in (location, self.key, self.message) if part)


class ConfigError(UserError):
    """All problems of an input, one for each line."""

    def __init__(self, problems: Sequence[ConfigProblem]) -> None:
        assert problems, "an error has at least one problem"
        self.problems = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


def first_line(error: Exception) -> str:
    """Returns the first line of the error's message, or its type if it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def did_you_mean(word: str, candidates: Sequence[str]) -> str:
    """Returns "; did you mean `x`?" for the nearest candidate, or an empty string."""
    matches = get_close_matches(word, candidates, n=1, cutoff=0.6)
    if not matches:
        return ""
    return f"; did you mean `{matches[0]}`?"

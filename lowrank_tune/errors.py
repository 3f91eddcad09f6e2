"""Errors for people: one sentence that says what, where, and what instead. Anything else that is raised is our own
mistake."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches


class UserError(Exception):
    """Something that the person at the keyboard can mend. Printed without a traceback; the process ends with
    `exit_code`."""

    exit_code = 2


class TrainingError(UserError):
    """The run itself broke (a full disk, losses that are not finite), though its input was well formed."""

    exit_code = 1


class OutOfMemory(UserError):
    """The card or the machine has not enough memory for a step."""

    exit_code = 3


@dataclass(frozen=True)
class ConfigProblem:
    """One fault of a recipe or a data file: where it stands, and a sentence."""

    message: str
    key: str = ""
    file: str = ""
    line: int | None = None

    def __str__(self) -> str:
        if self.file and self.line:
            location = f"{self.file}:{self.line}"
        else:
            location = self.file
        return ": ".join(part for part in (location, self.key, self.message) if part)


class ConfigError(UserError):
    """Several faults, told all at once, one a line."""

    def __init__(self, problems: Sequence[ConfigProblem]) -> None:
        assert problems, "an empty list of faults is no error"
        self.problems = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


def did_you_mean(word: str, candidates: Sequence[str]) -> str:
    """ "; did you mean `x`?" for the nearest known word, or an empty string."""
    matches = get_close_matches(word, candidates, n=1, cutoff=0.6)
    return f"; did you mean `{matches[0]}`?" if matches else ""

r"""`answer`: the final answer of a completion is the gold answer, exactly.

The final answer is the last `\boxed{}` (or the last boxes, where they make one list), else what follows the last
`####`, else the last number. A box that nothing closes is a wrong answer. Numbers are compared
as exact rationals: 1,234 = 1234, 12.50 = 12.5, 3/4 = 0.75 = \frac{3}{4}; digits are ASCII. A percent sign is a unit: 50
% is right where the gold says 50 % or 50 (the question asked for percent) or 0.5, and a bare 0.5 where it says 50 %. A
gold answer that is no number is compared as text, without case. What only begins like a number is wrong: "1,2" and
"1e5" are not 2 and 5, and in a box "2x" is not 2 ("2 apples" and "2kg" are, `units.py`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

from lowrank_tune.data.ground_truth import answer_after_hashes
from lowrank_tune.rewards.base import RewardInput, Score, truncate_for_display
from lowrank_tune.rewards.completion_box import extract_box
from lowrank_tune.rewards.math.units import is_unit

TAIL_CHARS = 4000  # characters at the end of a completion that may hold its answer: a hostile text costs milliseconds
MAX_NUMBER_CHARS = 100  # characters of a number

# generous: what looks like a number is read, strictly, later
SIGN = r"[-+\u2212]?"
DIGITS = r"(?:\d[\d,.]*+|(?<!\.)\.\d++)(?:[eE][-+]?\d++)?"
NUMBER = rf"(?:\d++ (?=\d++ ?/))?{DIGITS}(?: ?/ ?{DIGITS})?(?: ?%)?"
LOOSE_NUMBER = re.compile(rf"(?<!\w)(?:(?<![)\]}}]){SIGN})?\$?{NUMBER}")
STRICT_NUMBER = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+"
FULL_NUMBER = re.compile(
    rf"(?P<sign>[-+]?)\$?(?P<back>[-+]?)(?:(?P<whole>[0-9]+) (?=[0-9]+ ?/))?(?P<top>{STRICT_NUMBER})(?: ?/ "
    rf"?(?P<bottom>{STRICT_NUMBER}))?"
    r"(?P<percent> ?%)?"
)
VARIABLE_PREFIX = re.compile(r"[A-Za-z]\w{0,19} ?= ?")
CHOICE_PATTERN = re.compile(r"\(\w\)")  # (b) of several
LATEX = (
    (re.compile(r"(?<=\d) ?\\[dt]?frac\{([^{}]*)\}\{([^{}]*)\}"), r" \1/\2"),
    (re.compile(r"\\[dt]?frac\{([^{}]*)\}\{([^{}]*)\}"), r"\1/\2"),
    (re.compile(r"\\(?:text|mathrm|textbf|mathbf)\{([^{}]*)\}"), r" \1"),
    (re.compile(r"\{,\}|,\\!"), ","),
    (re.compile(r"\\[!,; ]|\\(?:left|right)\b"), " "),
    (re.compile(r"\\([%$])"), r"\1"),
)


@dataclass(frozen=True)
class NumericAnswer:
    """An exact number, and whether a percent sign stood behind it."""

    number: Fraction
    percent: bool = False

    def equals(self, other: NumericAnswer) -> bool:
        """Equal numbers; of which one alone has a percent sign, equal with it as a unit or as hundredths."""
        if self.percent == other.percent:
            return self.number == other.number
        if self.percent:
            percent, plain = (self.number, other.number)
        else:
            percent, plain = (other.number, self.number)
        return plain in (percent, percent / 100)


@dataclass(frozen=True)
class AnswerReward:
    """pass (1) or fail (0). A completion that did not stop by itself has not answered."""

    name: str = "answer"
    is_verifier: ClassVar[bool] = True

    def score(self, items: Sequence[RewardInput]) -> list[Score]:
        return [self._score(item) for item in items]

    def _score(self, item: RewardInput) -> Score:
        if item.ground_truth is None or not item.ground_truth.strip():
            return Score(None, "error", f"`{self.name}` needs a gold answer, and there is none for {item}")
        if not item.stopped:
            return Score(0.0, "fail", "did not stop")
        answer = extract_final_answer(item.completion)
        if answer is None:
            answer = item.completion[-TAIL_CHARS:]
        correct = answers_match(answer, item.ground_truth)
        return Score(
            float(correct),
            "pass" if correct else "fail",
            ""
            if correct
            else f"{truncate_for_display(answer, 40)} is not {truncate_for_display(item.ground_truth, 40)}",
        )


def extract_final_answer(completion: str) -> str | None:
    """The final answer as it was written."""
    tail = completion[-TAIL_CHARS:]
    answer = extract_box(completion)
    if answer is None:
        answer = answer_after_hashes(tail)
    return answer if answer is not None else _last_number(tail)


def answers_match(answer: str, ground_truth: str) -> bool:
    """Whether an answer is the gold one: as numbers where the gold is one, else as text."""
    expected = parse_number(ground_truth)
    actual = parse_number(answer)
    if expected is None:
        return _normalize_text(answer) == _normalize_text(ground_truth)
    return actual is not None and actual.equals(expected)


def parse_number(text: str) -> NumericAnswer | None:
    """The number that a text is; `x =` in front and a unit behind do not count. None for anything else."""
    found = split_number(text)
    if found is None:
        return None
    number, rest = found
    rest = rest.rstrip(". ")
    return number if not rest or is_unit(rest) else None


def split_number(text: str) -> tuple[NumericAnswer, str] | None:
    """The number at the beginning of a text, with `x =` in front or without, and what stands behind it."""
    text = _strip_latex(text)
    if name := VARIABLE_PREFIX.match(text):
        text = text[name.end() :]
    match = FULL_NUMBER.match(text)
    if match is None or match.end() > MAX_NUMBER_CHARS or (match["sign"] and match["back"]):
        return None
    number = _number_from_match(match)
    if number is None:
        return None
    return (number, text[match.end() :])


def _number_from_match(match: re.Match[str]) -> NumericAnswer | None:
    number = _to_fraction(match["top"])
    if match["bottom"] is not None:
        bottom = _to_fraction(match["bottom"])
        if not bottom or match["whole"] is not None and number >= bottom:
            return None
        number = number / bottom + int(match["whole"] or 0)
    negative = "-" in (match["sign"], match["back"])
    return NumericAnswer(-number if negative else number, match["percent"] is not None)


def _to_fraction(digits: str) -> Fraction:
    return Fraction(digits.replace(",", ""))


def _last_number(text: str) -> str | None:
    """The last number of a text, with its sign, fraction and percent sign. A minus behind a word or a bracket is a
    subtraction."""
    last = None
    for last in LOOSE_NUMBER.finditer(_strip_latex(text)):  # noqa: B007
        pass
    return None if last is None else last.group().rstrip(".,")


def _strip_latex(text: str) -> str:
    """Without the LaTeX that only sets a number."""
    for pattern, plain in LATEX:
        text = pattern.sub(plain, text)
    return " ".join(text.strip(" \n\t$").replace("\u2212", "-").split())


def _normalize_text(text: str) -> str:
    folded = _strip_latex(text).casefold().rstrip(".")
    if CHOICE_PATTERN.fullmatch(folded):
        return folded[1:-1]
    return folded

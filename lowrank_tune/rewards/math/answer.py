r"""`answer`: the final answer of a completion is the gold answer, exactly. Runs in the main process alone.

The final answer is the last `\boxed{}` (or the last boxes, if they make one list), else what follows the last `####`,
else the last number. A box that is not closed is a wrong answer. Numbers are compared as exact rational numbers:
1,234 = 1234, 12.50 = 12.5, 3/4 = 0.75 = \frac{3}{4}; digits are ASCII. A percent sign is a unit: 50 % is right for a
gold answer 50 %, 50 (the question asked for percent) or 0.5, and 0.5 is right for a gold answer 50 %. A gold answer
that is not a number is compared as text, without case. An answer that only begins like a number is wrong: "1,2" and
"1e5" are not 2 and 5, and in a box "2x" is not 2 ("2 apples" and "2kg" are, `units.py`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

from lowrank_tune.data.ground_truth import answer_after_hashes, boxed_answer, unclosed_box
from lowrank_tune.rewards.base import (
    DID_NOT_STOP,
    InProcessReward,
    RewardInput,
    Score,
    pass_or_fail,
    truncate_for_display,
)
from lowrank_tune.rewards.math.units import is_unit

TAIL_CHARS = 4000  # characters at the end of a completion that may contain its answer, so that a long text is fast
MAX_CHARS_BEFORE_BOX = 4000  # characters that are read before and after the place where the last box begins
MAX_CHARS_AFTER_BOX = 4000
MAX_NUMBER_CHARS = 100  # characters of a number
MAX_SHOWN_CHARS = 40  # characters of an answer in a reason

# finds everything that looks like a number; FULL_NUMBER then reads it strictly
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
    """An exact number, and whether it has a percent sign."""

    number: Fraction
    percent: bool = False

    def equals(self, other: NumericAnswer) -> bool:
        """Returns whether two answers are equal. If only one has a percent sign, the sign is read as a unit or as
        hundredths."""
        if self.percent == other.percent:
            return self.number == other.number
        if self.percent:
            percent, plain = self.number, other.number
        else:
            percent, plain = other.number, self.number
        return plain in (percent, percent / 100)


@dataclass(frozen=True)
class AnswerReward(InProcessReward):
    """pass (1) or fail (0). A completion that did not stop by itself gets 0."""

    name: str = "answer"
    is_verifier: ClassVar[bool] = True

    def score_one(self, item: RewardInput) -> Score:
        if item.ground_truth is None or not item.ground_truth.strip():
            return Score(
                None,
                "error",
                f"`{self.name}` needs a gold answer, which is missing for {item}",
            )
        if not item.stopped:
            return DID_NOT_STOP
        answer = extract_final_answer(item.completion)
        if answer is None:
            answer = item.completion[-TAIL_CHARS:]
        return pass_or_fail(answers_match(answer, item.ground_truth), not_equal_reason(answer, item.ground_truth))


def not_equal_reason(answer: str, ground_truth: str) -> str:
    """Returns why an answer is wrong."""
    shown = truncate_for_display(answer, MAX_SHOWN_CHARS)
    return f"{shown} is not {truncate_for_display(ground_truth, MAX_SHOWN_CHARS)}"


def extract_final_answer(completion: str) -> str | None:
    """Returns the final answer as it was written; None if there is none."""
    tail = completion[-TAIL_CHARS:]
    for answer in (extract_box(completion), answer_after_hashes(tail)):
        if answer is not None:
            return answer
    return _last_number(tail)


def extract_box(completion: str) -> str | None:
    r"""Returns the contents of the last `\boxed{}`, with those of the boxes that make one list with it; None if there
    is no box.

    A box that is not closed is returned with its command. No rule can read that, so the answer is wrong, and not a
    number inside the box.
    """
    start = completion.rfind("\\boxed")
    if start < 0:
        return None
    around = completion[max(0, start - MAX_CHARS_BEFORE_BOX) : start + MAX_CHARS_AFTER_BOX]
    return unclosed_box(around) or boxed_answer(around)


def answers_match(answer: str, ground_truth: str) -> bool:
    """Returns whether an answer is the gold answer: as numbers if the gold answer is a number, else as text."""
    expected = parse_number(ground_truth)
    if expected is None:
        return _normalize_text(answer) == _normalize_text(ground_truth)
    actual = parse_number(answer)
    return actual is not None and actual.equals(expected)


def parse_number(text: str) -> NumericAnswer | None:
    """Returns the number that a text is, without `x =` before it and a unit after it; None for other texts."""
    found = split_number(text)
    if found is None:
        return None
    number, rest = found
    rest = rest.rstrip(". ")
    return number if not rest or is_unit(rest) else None


def split_number(text: str) -> tuple[NumericAnswer, str] | None:
    """Returns the number at the beginning of a text, with or without `x =` before it, and the rest of the text."""
    text = _strip_latex(text)
    if name := VARIABLE_PREFIX.match(text):
        text = text[name.end() :]
    match = FULL_NUMBER.match(text)
    if match is None or match.end() > MAX_NUMBER_CHARS:
        return None
    has_two_signs = match["sign"] and match["back"]
    number = None if has_two_signs else _number_from_match(match)
    if number is None:
        return None
    return number, text[match.end() :]


def _number_from_match(match: re.Match[str]) -> NumericAnswer | None:
    number = _to_fraction(match["top"])
    if match["bottom"] is not None:
        bottom = _to_fraction(match["bottom"])
        if not bottom:
            return None
        # 1 5/4 is not a mixed number
        if match["whole"] is not None and number >= bottom:
            return None
        number = number / bottom + int(match["whole"] or 0)
    if "-" in (match["sign"], match["back"]):
        number = -number
    return NumericAnswer(number, match["percent"] is not None)


def _to_fraction(digits: str) -> Fraction:
    return Fraction(digits.replace(",", ""))


def last_match(matches: Iterable[re.Match[str]]) -> re.Match[str] | None:
    """Returns the last of some matches; None if there are none."""
    last = None
    for match in matches:
        last = match
    return last


def _last_number(text: str) -> str | None:
    """Returns the last number of a text, with its sign, fraction and percent sign; None if there is none. A minus after
    a word or a bracket is a subtraction."""
    last = last_match(LOOSE_NUMBER.finditer(_strip_latex(text)))
    return None if last is None else last.group().rstrip(".,")


def _strip_latex(text: str) -> str:
    """Returns a text without the LaTeX that only formats a number."""
    for pattern, plain in LATEX:
        text = pattern.sub(plain, text)
    return " ".join(text.strip(" \n\t$").replace("\u2212", "-").split())


def _normalize_text(text: str) -> str:
    folded = _strip_latex(text).casefold().rstrip(".")
    if CHOICE_PATTERN.fullmatch(folded):
        return folded[1:-1]
    return folded

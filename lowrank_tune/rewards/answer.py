r"""`answer`: the final answer of a completion is the gold answer, exactly.

The final answer is the last `\boxed{}`, else what follows the last `####`, else the last number. Numbers are compared
as exact rationals: 1,234 = 1234, 12.50 = 12.5, 3/4 = 0.75 = \frac{3}{4}; digits are ASCII. A percent sign is a unit: 50
% is right where the gold says 50 % or 50 (the question asked for percent) or 0.5, and a bare 0.5 where it says 50 %. A
gold answer that is no number is compared as text, without case. What only begins like a number is wrong: "1,2" and
"1e5" are not 2 and 5, and in a box "2x" is not 2 ("2 apples" and "2kg" are).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

from lowrank_tune.data.gold import after_hashes, last_boxed
from lowrank_tune.rewards.protocol import Item, Score, shown

TAIL = 4000  # characters at the end of a completion that may hold its answer: a hostile text costs milliseconds
LONGEST = 100  # characters of a number

# generous: what looks like a number is read, strictly, later
SIGN, DIGITS = r"[-+\u2212]?", r"(?:\d[\d,.]*+|(?<!\.)\.\d++)(?:[eE][-+]?\d++)?"
NUMBER = rf"(?:\d++ (?=\d++ ?/))?{DIGITS}(?: ?/ ?{DIGITS})?(?: ?%)?"
LAST = re.compile(rf"(?<!\w)(?:(?<![)\]}}]){SIGN})?\$?{NUMBER}")
STRICT = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+"
WHOLE = re.compile(
    rf"(?P<sign>[-+]?)\$?(?P<back>[-+]?)(?:(?P<whole>[0-9]+) (?=[0-9]+ ?/))?(?P<top>{STRICT})(?: ?/ "
    rf"?(?P<bottom>{STRICT}))?"
    r"(?P<percent> ?%)?"
)
NAMED = re.compile(r"[A-Za-z]\w{0,19} ?= ?")
UNIT = re.compile(
    r" ?(?!(?:hundred|thousand|million|billion|trillion|dozen)s?\b)(?:[^\W\d_]{2}[^\d+*/^=<>-]{0,40}|[mgslhjnwv])", re.I
)
CHOICE = re.compile(r"\(\w\)")  # (b) of several
LATEX = (
    (re.compile(r"\\[dt]?frac\{([^{}]*)\}\{([^{}]*)\}"), r" \1/\2"),
    (re.compile(r"\\(?:text|mathrm|textbf|mathbf)\{([^{}]*)\}"), r" \1"),
    (re.compile(r"\{,\}|,\\!"), ","),
    (re.compile(r"\\[!,; ]|\\(?:left|right)\b"), " "),
    (re.compile(r"\\([%$])"), r"\1"),
)


@dataclass(frozen=True)
class Value:
    """An exact number, and whether a percent sign stood behind it."""

    number: Fraction
    percent: bool = False

    def equals(self, other: Value) -> bool:
        """Equal numbers; of which one alone has a percent sign, equal with it as a unit or as hundredths."""
        if self.percent == other.percent:
            return self.number == other.number
        percent, plain = (self.number, other.number) if self.percent else (other.number, self.number)
        return plain in (percent, percent / 100)


@dataclass(frozen=True)
class Answer:
    """pass (1) or fail (0). A completion that did not stop by itself has not answered."""

    name: str = "answer"
    judges: ClassVar[bool] = True

    def score(self, items: Sequence[Item]) -> list[Score]:
        return [self._score(item) for item in items]

    def _score(self, item: Item) -> Score:
        if item.gold is None or not item.gold.strip():
            return Score(None, "error", f"`{self.name}` needs a gold answer, and there is none for {item}")
        if not item.stopped:
            return Score(0.0, "fail", "did not stop")
        found = final(item.completion)
        if found is None:
            found = item.completion[-TAIL:]
        right = agrees(found, item.gold)
        return Score(
            float(right),
            "pass" if right else "fail",
            "" if right else f"{shown(found, 40)} is not {shown(item.gold, 40)}",
        )


def final(completion: str) -> str | None:
    """The final answer as it was written."""
    tail = completion[-TAIL:]
    found = last_boxed(tail)
    if found is None:
        found = after_hashes(tail)
    return found if found is not None else _last_number(tail)


def agrees(found: str, gold: str) -> bool:
    """Whether an answer is the gold one: as numbers where the gold is one, else as text."""
    wanted, got = value_of(gold), value_of(found)
    if wanted is None:
        return _folded(found) == _folded(gold)
    return got is not None and got.equals(wanted)


def value_of(text: str) -> Value | None:
    """The number that a text is; `x =` in front and a unit behind do not count. None for anything else."""
    text = _plain(text)
    if name := NAMED.match(text):
        text = text[name.end() :]
    found = WHOLE.match(text)
    if found is None or found.end() > LONGEST or (found["sign"] and found["back"]):
        return None
    if (rest := text[found.end() :].rstrip(". ")) and not UNIT.fullmatch(rest):
        return None
    return _value(found)


def _value(found: re.Match[str]) -> Value | None:
    number = _exact(found["top"])
    if found["bottom"] is not None:
        if not (bottom := _exact(found["bottom"])):
            return None
        number = number / bottom + int(found["whole"] or 0)
    negative = "-" in (found["sign"], found["back"])
    return Value(-number if negative else number, found["percent"] is not None)


def _exact(digits: str) -> Fraction:
    return Fraction(digits.replace(",", ""))


def _last_number(text: str) -> str | None:
    """The last number of a text, with its sign, fraction and percent sign. A minus behind a word or a bracket is a
    subtraction."""
    last = None
    for last in LAST.finditer(_plain(text)):  # noqa: B007
        pass
    return None if last is None else last.group().rstrip(".,")


def _plain(text: str) -> str:
    """Without the LaTeX that only sets a number."""
    for pattern, plain in LATEX:
        text = pattern.sub(plain, text)
    return " ".join(text.strip(" \n\t$").replace("\u2212", "-").split())


def _folded(text: str) -> str:
    folded = _plain(text).casefold().rstrip(".")
    return folded[1:-1] if CHOICE.fullmatch(folded) else folded

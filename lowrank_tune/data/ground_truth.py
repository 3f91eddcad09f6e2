"""The gold answer of a row, which an answer is compared with, written plainly (no commas of thousands); and the box
around the final answer of a reply."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

GROUND_TRUTH_COLUMNS = ("gold", "expected_answer", "ground_truth", "final_answer")
THOUSANDS_SEPARATED = re.compile(r"(?<![\d,.])\d{1,3}(?:,\d{3})+(?![\d,])")
NUMBER = re.compile(r"-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?")
WHOLE_NUMBER = re.compile(r"[-+]?\$?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?%?")
HASHES_END = re.compile(r"####[^\n]*+(?:\s*\nThe answer is[^\n]*+)?\s*\Z")
"""The end of an answer of GSM8K, or of MetaMathQA."""

# Boxes of one answer, and characters between two of them.
MAX_BOXES = 20
MAX_SEPARATOR_CHARS = 80
TEXT_COMMAND = re.compile(r"\\text ?\{([^{}]*)\}")
MATH_DELIMITERS = re.compile(r"\$|\\[()\[\],;:! ]|\\q?quad\b|\s+")
VERB = r"(?:is|are|was|were|has|have|had|gives?|gave|equals?|makes?|means?|yields?|becomes?)\b"
SEPARATOR = re.compile(
    rf" *(?:(?:(?!{VERB})[\w()]+ +){{0,4}}(?:and|or) *|[,;] *(?:(?:and|or) +)?)?"
    r"(?:[A-Za-z]\w{0,3}(?:_\{?\w+\}?)? *= *)?"
)
BRACE = re.compile(r"\\.|[{}]", re.DOTALL)

HASHES_PATTERN = r"####[ \t]*(?P<hashes>[^\n]+)"
SENTENCE_PATTERN = r"The answer is:[ \t]*(?P<sentence>[^\n]+)"
MARKED_END = re.compile(rf"\s*(?:^{HASHES_PATTERN}(?:\n+The answer is:[^\n]*)?|^{SENTENCE_PATTERN})\s*\Z", re.MULTILINE)
"""A final answer after `####` (GSM8K) or `The answer is:` (MetaMathQA) at the end of a reply."""


def extract_answer(
    row: Mapping[str, Any],
    columns: Mapping[str, str],
    rule: str,
    answer: str,
    accept_bare_number: bool,
) -> str | None:
    """Returns the gold answer of a row by the setting `ground_truth` (`rule`); None if it has none.

    With `accept_bare_number` the rule `auto` takes an answer that is one number as its own gold answer.
    """
    if rule == "none":
        return None
    if rule == "answer":
        return _without_separators(answer) or None
    if rule == "hashes":
        return answer_after_hashes(answer)
    if rule == "boxed":
        return boxed_answer(answer)
    if rule == "last_number":
        return last_number(answer)
    column = _column(row, columns)
    if rule == "gold":
        return column
    extracted = None
    # Elsewhere `####` is a heading of Markdown.
    if HASHES_END.search(answer):
        extracted = answer_after_hashes(answer)
    if extracted is None:
        extracted = column
    if extracted is None:
        extracted = boxed_answer(answer)
    if extracted is None and accept_bare_number and WHOLE_NUMBER.fullmatch(answer.strip()):
        extracted = _without_separators(answer)
    return extracted


def answer_after_hashes(text: str) -> str | None:
    """Returns what follows the last `#### ` on its line, as GSM8K writes it."""
    _, hashes, rest = text.rpartition("####")
    if not hashes:
        return None
    line, _, _ = rest.strip().partition("\n")
    return _without_separators(line) or None


def last_boxed(text: str) -> str | None:
    r"""Returns the contents of the last closed `\boxed{...}`, with nested braces; `\{` and `\}` do not count."""
    box = _last_box(text, len(text), _closing_braces(text))
    return None if box is None else box.contents or None


def boxed_answer(text: str) -> str | None:
    r"""Returns the contents of the last closed `\boxed{...}`, or of the boxes at the end that make one list.

    `\boxed{1} and \boxed{2}` is `1, 2`; a box that repeats another counts once. Boxes with a sentence between them do
    not make a list.
    """
    closings = _closing_braces(text)
    box = _last_box(text, len(text), closings)
    contents: list[str] = []
    while box is not None and len(contents) < MAX_BOXES:
        contents.append(box.contents)
        before = _last_box(text, box.start, closings)
        joined = before is not None and before.end <= box.start and _is_separator(text[before.end : box.start])
        box = before if joined else None
    unique = dict.fromkeys(each for each in reversed(contents) if each)
    return ", ".join(unique) or None


def unclosed_box(text: str) -> str | None:
    r"""Returns the text from the last `\boxed{` on, if no brace closes it."""
    opening = _last_opening(text, len(text))
    if opening is None:
        return None
    start, brace = opening
    if brace in _closing_braces(text):
        return None
    return text[start:]


def box_answer(reply: str) -> str:
    r"""Returns the reply with its final answer in a box, if a mark at its end shows which it is (`MARKED_END`).

    A mark that repeats the last box is removed. Other replies do not change.
    """
    match = MARKED_END.search(reply)
    if match is None:
        return reply
    answer = (match["hashes"] or match["sentence"]).strip()
    before = reply[: match.start()]
    if last_boxed(answer) is not None:
        return reply
    plain = answer.strip("$")
    if match["sentence"] and last_boxed(before) == plain:
        return before
    escaped = plain.replace("\\%", "%").replace("%", "\\%")
    sentence = f"The answer is $\\boxed{{{escaped}}}$."
    return f"{before}\n{sentence}" if before else sentence


class _Box(NamedTuple):
    """A closed box: where it begins, where it ends, and its contents."""

    start: int
    end: int
    contents: str


def _last_box(
    text: str,
    end: int,
    closings: Mapping[int, int],
) -> _Box | None:
    """Returns the last closed box that begins before `end`."""
    while (opening := _last_opening(text, end)) is not None:
        start, brace = opening
        closing = closings.get(brace)
        if closing is not None:
            return _Box(
                start,
                closing + 1,
                _without_separators(text[brace + 1 : closing]),
            )
        end = start
    return None


def _last_opening(text: str, end: int) -> tuple[int, int] | None:
    r"""Returns the positions of the last `\boxed` before `end` with an opening brace after it, and of that brace."""
    while (start := text.rfind("\\boxed", 0, end)) >= 0:
        brace = start + len("\\boxed")
        while text[brace : brace + 1] == " ":
            brace += 1
        if text[brace : brace + 1] == "{":
            return start, brace
        end = start
    return None


def _is_separator(text: str) -> bool:
    r"""Returns whether a text between two boxes makes one list of them: nothing, a comma, `and`, `papers and`,
    `and $y =`. A verb before `and` makes a sentence."""
    if len(text) > MAX_SEPARATOR_CHARS:
        return False
    plain = MATH_DELIMITERS.sub(" ", TEXT_COMMAND.sub(r" \1 ", text))
    return SEPARATOR.fullmatch(plain) is not None


def _closing_braces(text: str) -> dict[int, int]:
    r"""Returns the position of the closing brace of each opening brace that has one. A backslash escapes the character
    after it. One pass over the text, because a text may have as many boxes as its length allows."""
    closings: dict[int, int] = {}
    opened: list[int] = []
    for match in BRACE.finditer(text):
        if match[0] == "{":
            opened.append(match.start())
        elif match[0] == "}" and opened:
            closings[opened.pop()] = match.start()
    return closings


def last_number(text: str) -> str | None:
    """Returns the last number in a text. A minus counts if it cannot be a subtraction."""
    last = None
    for last in NUMBER.finditer(text):  # noqa: B007
        pass
    if last is None:
        return None
    number = last.group().replace(",", "")
    before = text[: last.start()][-1:]
    is_difference = number.startswith("-") and (before.isalnum() or before in (")", "]", "}"))
    return number[1:] if is_difference else number


def _column(row: Mapping[str, Any], columns: Mapping[str, str]) -> str | None:
    names = (columns["gold"],) if "gold" in columns else GROUND_TRUTH_COLUMNS
    for name in names:
        value = row.get(name)
        if isinstance(value, str) and value.strip():
            return _without_separators(value)
        if isinstance(value, float) and value.is_integer():
            return str(int(value))
        if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300:
            return str(value)
    return None


def _without_separators(text: str) -> str:
    """Returns the text without the commas of thousands: "1,234" is "1234", while "(1, 2)" and "1,2" stay."""
    text = text.strip()
    if WHOLE_NUMBER.fullmatch(text):
        return THOUSANDS_SEPARATED.sub(lambda match: match.group().replace(",", ""), text)
    return text

"""The gold answer of a row: what a reply is checked against, written plainly (no thousands commas)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

GROUND_TRUTH_COLUMNS = ("gold", "expected_answer", "ground_truth", "final_answer")
THOUSANDS_SEPARATED = re.compile(r"(?<![\d,.])\d{1,3}(?:,\d{3})+(?![\d,])")
NUMBER = re.compile(r"-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?")
HASHES_END = re.compile(r"####[^\n]*+(?:\s*\nThe answer is[^\n]*+)?\s*\Z")  # GSM8K's end, and MetaMathQA's
WHOLE_NUMBER = re.compile(r"[-+]?\$?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?%?")


def extract_answer(
    row: Mapping[str, Any], columns: Mapping[str, str], rule: str, answer: str, accept_bare_number: bool
) -> str | None:
    """The gold answer by `rule`. `accept_bare_number`: by the rule auto an answer that is one number is its own
    gold."""
    if rule == "none":
        return None
    if rule == "answer":
        return _without_separators(answer)
    if rule == "hashes":
        return answer_after_hashes(answer)
    if rule == "boxed":
        return last_boxed(answer)
    if rule == "last_number":
        return last_number(answer)
    column = _column(row, columns)
    if rule == "gold":
        return column
    extracted = (
        answer_after_hashes(answer) if HASHES_END.search(answer) else None
    )  # elsewhere it is a heading of Markdown
    if extracted is None:
        extracted = column
    if extracted is None:
        extracted = last_boxed(answer)
    if extracted is None and accept_bare_number and WHOLE_NUMBER.fullmatch(answer.strip()):
        extracted = _without_separators(answer)
    return extracted


def answer_after_hashes(text: str) -> str | None:
    """What follows the last `#### ` on its line, as GSM8K writes it."""
    _, hashes, rest = text.rpartition("####")
    line = rest.strip().split("\n", 1)[0] if hashes else ""
    return _without_separators(line) or None


def last_boxed(text: str) -> str | None:
    r"""The contents of the last closed `\boxed{...}`, with nested braces; `\{` and `\}` do not count."""
    end = len(text)
    while (start := text.rfind("\\boxed", 0, end)) >= 0:
        opening = start + len("\\boxed")
        while opening < len(text) and text[opening] == " ":
            opening += 1
        if opening < len(text) and text[opening] == "{":
            closing = _closing_brace(text, opening)
            if closing is not None:
                return _without_separators(text[opening + 1 : closing]) or None
        end = start
    return None


def _closing_brace(text: str, opening: int) -> int | None:
    depth, position = 0, opening
    while position < len(text):
        if text[position] == "\\":
            position += 2
            continue
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return position
        position += 1
    return None


def last_number(text: str) -> str | None:
    """The last number in a text. A minus counts where it cannot be a subtraction."""
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
    """Without the commas of thousands: "1,234" is "1234", while "(1, 2)" and "1,2" stay."""
    text = text.strip()
    return (
        THOUSANDS_SEPARATED.sub(lambda match: match.group().replace(",", ""), text)
        if WHOLE_NUMBER.fullmatch(text)
        else text
    )

"""The gold answer of a row: what a reply is checked against, written plainly (no thousands commas)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

GOLD_COLUMNS = ("gold", "expected_answer", "ground_truth", "final_answer")
GROUPED = re.compile(r"(?<![\d,.])\d{1,3}(?:,\d{3})+(?![\d,])")
NUMBER = re.compile(r"-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?")
HASHES_END = re.compile(r"####[^\n]*+(?:\s*\nThe answer is[^\n]*+)?\s*\Z")  # GSM8K's end, and MetaMathQA's
WHOLE_NUMBER = re.compile(r"[-+]?\$?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?%?")


def find_gold(row: Mapping[str, Any], columns: Mapping[str, str], how: str, answer: str, whole: bool) -> str | None:
    """The gold answer by the rule `how`. `whole`: by `auto` an answer that is one number is its own gold."""
    if how == "none":
        return None
    if how == "answer":
        return _plain(answer)
    if how == "hashes":
        return after_hashes(answer)
    if how == "boxed":
        return last_boxed(answer)
    if how == "last_number":
        return last_number(answer)
    column = _column(row, columns)
    if how == "gold":
        return column
    found = after_hashes(answer) if HASHES_END.search(answer) else None  # elsewhere it is a heading of Markdown
    if found is None:
        found = column
    if found is None:
        found = last_boxed(answer)
    if found is None and whole and WHOLE_NUMBER.fullmatch(answer.strip()):
        found = _plain(answer)
    return found


def after_hashes(text: str) -> str | None:
    """What follows the last `#### ` on its line, as GSM8K writes it."""
    _, mark, rest = text.rpartition("####")
    line = rest.strip().split("\n", 1)[0] if mark else ""
    return _plain(line) or None


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
                return _plain(text[opening + 1 : closing]) or None
        end = start
    return None


def _closing_brace(text: str, opening: int) -> int | None:
    depth, place = 0, opening
    while place < len(text):
        if text[place] == "\\":
            place += 2
            continue
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return place
        place += 1
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
    names = (columns["gold"],) if "gold" in columns else GOLD_COLUMNS
    for name in names:
        value = row.get(name)
        if isinstance(value, str) and value.strip():
            return _plain(value)
        if isinstance(value, float) and value.is_integer():
            return str(int(value))
        if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300:
            return str(value)
    return None


def _plain(text: str) -> str:
    """Without the commas of thousands: "1,234" is "1234", while "(1, 2)" and "1,2" stay."""
    text = text.strip()
    return GROUPED.sub(lambda found: found.group().replace(",", ""), text) if WHOLE_NUMBER.fullmatch(text) else text

r"""Checks whether an answer in LaTeX has one meaning and a reasonable size, before a parser reads it. Runs in the main
process.

latex2sympy2 reads 5 6, 5{6} and 5[6] as 11 (a mixed number). It drops the 8 of 5_8, an apostrophe and \ldots, and reads
1.5.5 as a product. Such answers are ambiguous and count as unreadable. The time of the parser grows fast with nested
brackets, so these are counted first.
"""

from __future__ import annotations

import re
from typing import NamedTuple

MAX_CHARS = 1000  # characters of an answer
MAX_DIGITS = 200  # of one number
MAX_DEPTH = 20  # levels of nested brackets
MAX_GROUP_DEPTH = 6  # levels without the brackets around an argument of a command, which take little time
MAX_EXPONENT_DEPTH = 3  # levels of powers in exponents
CLOSING = {
    "(": (")", "]"),
    "[": (")", "]"),
    "{": ("}",),
    "\\{": ("\\}",),
}
TOKEN = re.compile(r"\\[a-zA-Z]+|\\.|[^\\ ]", re.DOTALL)
TEXT_ARGUMENT = re.compile(r"(\\text ?)\{[^{}]*\}")
MISREAD = (
    (re.compile(r"\\(?:[lcvd]?dots[bcmio]?)|\.\.|\u2026"), "leaves something out"),
    (re.compile(r"\\(?:[hv]?phantom|vrule|vcenter|vbox|vskip|vspace|hfil)"), "has a command for the layout"),
    (re.compile(r"(?<![\d._^])(?:\d*\.)?\d+ +[\d.]"), "has two numbers side by side"),
    # 2[3] would be read as 5; the root \sqrt[3]2 is not such a case
    (re.compile(r"\d ?(?:\[|\\\{) ?[\d.]+ ?(?:\]|\\\})"), "has a bracket around a number beside a number"),
    (re.compile(r"(?<!\\sqrt)(?<!\\sqrt )(?:\[[^\[\]]*\]|\\\{[^{}]*\\\}) ?[\d\[]"), "has a number after a bracket"),
    (re.compile(r"\.\d+\.\d|\d\.\d+\."), "has a number with two decimal points"),
    (re.compile(r"[\d)] ?_"), "has an index after a number"),
    (re.compile(r"(?<!matrix\}) ?\^ ?(?:T(?![a-zA-Z])|\{ ?T ?\}|\{? ?\\top)"), "has a transpose without a matrix"),
    (re.compile(r"['\"$\u00b0]|\^ ?\{? ?\\circ"), "has a sign that has no meaning there"),
    (re.compile(r"(?:^|[(\[{,;=<>]) ?[-+] ?[-+]"), "begins with two signs"),
)
MIXED_NUMBER = re.compile(r"(?<![\d._^])\d+ ?\\frac ?\{ ?(\d+) ?\} ?\{ ?(\d+) ?\}")


OPENING_BRACKETS = frozenset(CLOSING)
CLOSING_BRACKETS = (
    ")",
    "]",
    "}",
    "\\}",
)


class Bracket(NamedTuple):
    """An opening bracket: its token, the token before it, and its level, with and without the brackets of arguments,
    and among exponents."""

    token: str
    before: str
    depth: int
    group_depth: int
    exponent_depth: int


NO_BRACKET = Bracket(
    "",
    "",
    0,
    0,
    0,
)


def too_large_reason(text: str) -> str | None:
    """Returns why an answer is larger than any answer that a person would write, as a predicate; None if it is not."""
    if len(text) > MAX_CHARS:
        return f"is longer than {MAX_CHARS} characters"
    if re.search(rf"\d{{{MAX_DIGITS + 1}}}", text):
        return f"has a number of more than {MAX_DIGITS} digits"
    brackets = [NO_BRACKET, *_opening_brackets(text)]
    depth = max(bracket.depth for bracket in brackets)
    if depth > MAX_DEPTH:
        return f"has brackets {depth} deep (at most {MAX_DEPTH})"
    depth = max(bracket.group_depth for bracket in brackets)
    if depth > MAX_GROUP_DEPTH:
        return f"has brackets {depth} deep besides those of commands (at most {MAX_GROUP_DEPTH})"
    depth = max(bracket.exponent_depth for bracket in brackets)
    if depth > MAX_EXPONENT_DEPTH:
        return f"has a tower of {depth} powers (at most {MAX_EXPONENT_DEPTH})"
    if "!!!" in text or "\x00" in text:
        return "is not mathematics"
    return None


def unreadable_reason(text: str) -> str | None:
    """Returns why an answer in its algebraic form (`answer_parsing.to_algebraic_form`) is ambiguous or incomplete, as a
    predicate; None if it is not."""
    if reason := _bracket_reason(text):
        return reason
    plain = TEXT_ARGUMENT.sub(r"\1{}", text)
    for pattern, reason in MISREAD:
        if pattern.search(plain):
            return reason
    for fraction in MIXED_NUMBER.finditer(plain):
        if int(fraction[1]) >= int(fraction[2]):
            return "has a number before a fraction that is not below 1"
    return None


def _opening_brackets(text: str) -> list[Bracket]:
    """Returns all opening brackets of a text, also those that are not closed."""
    found: list[Bracket] = []
    opened: list[Bracket] = []
    before = ""
    for token in TOKEN.findall(text):
        if token in OPENING_BRACKETS:
            outer = opened[-1] if opened else NO_BRACKET
            bracket = Bracket(
                token,
                before,
                outer.depth + 1,
                outer.group_depth + (not _is_argument(token, before)),
                outer.exponent_depth + (before == "^"),
            )
            opened.append(bracket)
            found.append(bracket)
        elif token in CLOSING_BRACKETS and opened:
            opened.pop()
        before = token
    return found


def _is_argument(token: str, before: str) -> bool:
    """Returns whether a bracket holds an argument of a command (which may follow another one) or an exponent."""
    if token != "{":
        return False
    is_command = before[:1] == "\\" and before[1:].isalpha()
    return is_command or before in ("^", "}", "]")


def _bracket_reason(text: str) -> str | None:
    """Returns what is wrong with the brackets of a text; None if nothing is. `[0, 1)` is an interval; `5{6}` is not a
    number."""
    tokens = ["", *TOKEN.findall(text), ""]
    opened: list[tuple[str, bool]] = []
    for before, token, behind in zip(
        tokens,
        tokens[1:],
        tokens[2:],
        strict=False,
    ):
        if token in OPENING_BRACKETS:
            is_group = token == "{" and before != "_" and not _is_argument(token, before)
            if is_group and before.isdigit():
                return "has a group beside a number"
            opened.append((token, is_group))
        elif token in CLOSING_BRACKETS:
            opening, is_group = opened.pop() if opened else ("", False)
            if token not in CLOSING.get(opening, ()):
                return f"has {token!r} without an opening bracket"
            if is_group and (behind.isdigit() or behind == "{"):
                return "has a group beside a number"
    if opened:
        return f"has {opened[-1][0]!r} that is not closed"
    return None

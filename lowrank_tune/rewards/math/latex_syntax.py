r"""Whether an answer in LaTeX can be read as a whole, before a parser sees it.

latex2sympy2 reads what no one means: 5 6, 5{6} and 5[6] as 11 (a mixed number). The 8 of 5_8, an apostrophe and \ldots
vanish, 1.5.5 is a product. What it would read so has no one meaning, and is no answer. Its time grows fast with the
brackets in brackets, which are therefore counted first.
"""

from __future__ import annotations

import re
from typing import NamedTuple

MAX_CHARS = 1000  # characters of an answer
MAX_DIGITS = 200  # of one number
MAX_DEPTH = 20  # brackets in brackets
MAX_GROUP_DEPTH = 6  # the same without those around the argument of a command, which cost little
MAX_EXPONENT_DEPTH = 3  # powers in exponents
CLOSING = {"(": (")", "]"), "[": (")", "]"), "{": ("}",), "\\{": ("\\}",)}
TOKEN = re.compile(r"\\[a-zA-Z]+|\\.|[^\\ ]", re.DOTALL)
TEXT_ARGUMENT = re.compile(r"(\\text ?)\{[^{}]*\}")
MISREAD = (
    (re.compile(r"\\(?:[lcvd]?dots[bcmio]?)|\.\.|\u2026"), "leaves something out"),
    (
        re.compile(r"\\(?:[hv]?phantom|vrule|vcenter|vbox|vskip|vspace|hfil)"),
        "has a command for the layout",
    ),
    (re.compile(r"(?<![\d._^])(?:\d*\.)?\d+ +[\d.]"), "has two numbers side by side"),
    # 2[3] is read as 5; the root \sqrt[3]2 is none of these
    (re.compile(r"\d ?(?:\[|\\\{) ?[\d.]+ ?(?:\]|\\\})"), "has a bracket around a number beside a number"),
    (
        re.compile(r"(?<!\\sqrt)(?<!\\sqrt )(?:\[[^\[\]]*\]|\\\{[^{}]*\\\}) ?[\d\[]"),
        "has a number behind a bracket",
    ),
    (re.compile(r"\.\d+\.\d|\d\.\d+\."), "has a number with two decimal points"),
    (re.compile(r"[\d)] ?_"), "has an index behind a number"),
    (re.compile(r"(?<!matrix\}) ?\^ ?(?:T(?![a-zA-Z])|\{ ?T ?\}|\{? ?\\top)"), "has the transpose of no matrix"),
    (re.compile(r"['\"$\u00b0]|\^ ?\{? ?\\circ"), "has a sign in a place where it means nothing"),
    (re.compile(r"(?:^|[(\[{,;=<>]) ?[-+] ?[-+]"), "begins with two signs"),
)
MIXED_NUMBER = re.compile(r"(?<![\d._^])\d+ ?\\frac ?\{ ?(\d+) ?\} ?\{ ?(\d+) ?\}")


class Bracket(NamedTuple):
    """An opening bracket: itself, the token before it, and how many of each kind are open with it."""

    token: str
    before: str
    depth: int
    group_depth: int
    exponent_depth: int


def too_large_reason(text: str) -> str | None:
    """Why an answer is too large to be read, if it is: nothing that a person would write as one."""
    if len(text) > MAX_CHARS:
        return f"is longer than {MAX_CHARS} characters"
    if re.search(rf"\d{{{MAX_DIGITS + 1}}}", text):
        return f"has a number of more than {MAX_DIGITS} digits"
    brackets = _open_brackets(text)
    depth = max((bracket.depth for bracket in brackets), default=0)
    if depth > MAX_DEPTH:
        return f"has brackets {depth} deep (at most {MAX_DEPTH})"
    depth = max((bracket.group_depth for bracket in brackets), default=0)
    if depth > MAX_GROUP_DEPTH:
        return f"has brackets {depth} deep besides those of commands (at most {MAX_GROUP_DEPTH})"
    depth = max((bracket.exponent_depth for bracket in brackets), default=0)
    if depth > MAX_EXPONENT_DEPTH:
        return f"has a tower of {depth} powers (at most {MAX_EXPONENT_DEPTH})"
    if text.count("!!!") or "\x00" in text:
        return "is no mathematics"
    return None


def unreadable_reason(text: str) -> str | None:
    """Why an answer in its algebraic form (`answer_parsing.to_algebraic_form`) has no one meaning, if it has none."""
    if reason := _bracket_reason(text):
        return reason
    plain = TEXT_ARGUMENT.sub(r"\1{}", text)
    for pattern, reason in MISREAD:
        if pattern.search(plain):
            return reason
    if any(int(match[1]) >= int(match[2]) for match in MIXED_NUMBER.finditer(plain)):
        return "has a number beside a fraction that makes no mixed number"
    return None


def _open_brackets(text: str) -> list[Bracket]:
    """All opening brackets of a text, whether or not something closes them."""
    found: list[Bracket] = []
    opened: list[Bracket] = []
    before = ""
    for token in TOKEN.findall(text):
        if token in CLOSING:
            outer = opened[-1] if opened else Bracket("", "", 0, 0, 0)
            opened.append(
                Bracket(
                    token,
                    before,
                    outer.depth + 1,
                    outer.group_depth + (not _is_argument(token, before)),
                    outer.exponent_depth + (before == "^"),
                )
            )
            found.append(opened[-1])
        elif token in (")", "]", "}", "\\}") and opened:
            opened.pop()
        before = token
    return found


def _is_argument(token: str, before: str) -> bool:
    """Whether a bracket holds the argument of a command or an exponent; behind one comes the next."""
    return token == "{" and (before in ("^", "}", "]") or before[:1] == "\\" and before[1:].isalpha())


def _bracket_reason(text: str) -> str | None:
    """What is wrong with the brackets of a text. `[0, 1)` is an interval; `5{6}` is no number."""
    tokens = ["", *TOKEN.findall(text), ""]
    opened: list[tuple[str, bool]] = []
    for before, token, behind in zip(tokens, tokens[1:], tokens[2:], strict=False):
        if token in CLOSING:
            is_plain = token == "{" and before != "_" and not _is_argument(token, before)
            if is_plain and before.isdigit():
                return "has a group beside a number"
            opened.append((token, is_plain))
        elif token in (")", "]", "}", "\\}"):
            opening, is_plain = opened.pop() if opened else ("", False)
            if token not in CLOSING.get(opening, ()):
                return f"has {token!r} that nothing opens"
            if is_plain and (behind.isdigit() or behind == "{"):
                return "has a group beside a number"
    if opened:
        return f"has {opened[-1][0]!r} that nothing closes"
    return None

r"""Expands an answer with one \pm into its two values: `\frac{-1 \pm \sqrt{13}}{4}` becomes a list of two."""

from __future__ import annotations

import re

SIGN = re.compile(r"\\(pm|mp)(?![a-zA-Z])")
OPPOSITE = {"+": "-", "-": "+"}
TOKEN = re.compile(r"(?P<separator>[,;]|\\text ?\{ ?(?:and|or) ?\}|\b(?:and|or)\b)|\\[a-zA-Z]+|\\.|.", re.DOTALL)


def expand_plus_minus(text: str) -> str:
    r"""Returns a list, or one answer, in which each member with one \pm is replaced by two members. A \mp in it has the
    opposite sign."""
    if SIGN.search(text) is None:
        return text
    opening = closing = ""
    if text.startswith(r"\{") and text.endswith(r"\}"):
        opening, closing = r"\{", r"\}"
    members = split_list(text[len(opening) : len(text) - len(closing)])
    values = [value for member in members for value in _both_values(member)]
    return opening + ", ".join(values) + closing


def split_list(text: str) -> list[str]:
    """Returns the members of a list, separated by commas, semicolons, `and` and `or` outside all brackets."""
    members = []
    start = 0
    depth = 0
    for token in TOKEN.finditer(text):
        if token[0] in ("(", "[", "{", r"\{"):
            depth += 1
        elif token[0] in (")", "]", "}", r"\}"):
            depth -= 1
        elif token["separator"] and depth == 0:
            members.append(text[start : token.start()].strip())
            start = token.end()
    members.append(text[start:].strip())
    return [member for member in members if member]


def _both_values(member: str) -> list[str]:
    signs = SIGN.findall(member)
    if signs.count("pm") != 1 or signs.count("mp") > 1:
        return [member]
    return [_with_sign(member, "+"), _with_sign(member, "-")]


def _with_sign(member: str, sign: str) -> str:
    return SIGN.sub(lambda match: sign if match[1] == "pm" else OPPOSITE[sign], member)

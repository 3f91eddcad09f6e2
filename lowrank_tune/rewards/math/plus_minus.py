r"""Both values of an answer with one \pm: `\frac{-1 \pm \sqrt{13}}{4}` is a list of two."""

from __future__ import annotations

import re
from collections.abc import Iterator

SIGN = re.compile(r"\\(pm|mp)(?![a-zA-Z])")
OPPOSITE = {"+": "-", "-": "+"}
TOKEN = re.compile(r"(?P<separator>[,;]|\\text ?\{ ?(?:and|or) ?\}|\b(?:and|or)\b)|\\[a-zA-Z]+|\\.|.", re.DOTALL)


def expand_plus_minus(text: str) -> str:
    r"""A list, or one answer, in which each member with one \pm is two members. A \mp beside it has the other sign."""
    if SIGN.search(text) is None:
        return text
    if text.startswith(r"\{") and text.endswith(r"\}"):
        opening, closing = (r"\{", r"\}")
    else:
        opening, closing = ("", "")
    members = split_list(text[len(opening) : len(text) - len(closing)])
    values = [value for member in members for value in _both_values(member)]
    return opening + ", ".join(values) + closing


def split_list(text: str) -> list[str]:
    """The members of a list: what stands between commas, semicolons, `and` and `or` outside all brackets."""
    ends = [*_separators(text), (len(text), len(text))]
    starts = [0, *(end for _, end in ends)]
    members = [text[start:stop].strip() for start, (stop, _) in zip(starts, ends, strict=False)]
    return [member for member in members if member]


def _separators(text: str) -> Iterator[tuple[int, int]]:
    depth = 0
    for token in TOKEN.finditer(text):
        if token[0] in ("(", "[", "{", r"\{"):
            depth += 1
        elif token[0] in (")", "]", "}", r"\}"):
            depth -= 1
        elif token["separator"] and depth == 0:
            yield token.span()


def _both_values(member: str) -> list[str]:
    signs = SIGN.findall(member)
    if signs.count("pm") != 1 or signs.count("mp") > 1:
        return [member]
    return [_with_sign(member, "+"), _with_sign(member, "-")]


def _with_sign(member: str, sign: str) -> str:
    return SIGN.sub(lambda match: sign if match[1] == "pm" else OPPOSITE[sign], member)

"""S-expressions of SMT-LIB 2, read strictly: what a model wrote reaches Z3 only as terms of known operators, never as
text or a command."""

from __future__ import annotations

import re
from collections.abc import Container, Sequence
from typing import Any

# characters of a text, levels, characters of a literal, the largest index
LONGEST, DEEPEST, DIGITS, INDEX = 100_000, 100, 1000, 4096
TOKEN = re.compile(r'(?:\s+|;[^\n]*)|([()]|"(?:[^"]|"")*"|\|[^|\\]*\||[^\s()";|]+)')
LITERAL = re.compile(r'[0-9]+(?:\.[0-9]+)?|#x[0-9a-fA-F]+|#b[01]+|"[ -~]*"')
SYMBOL = re.compile(r"[A-Za-z~!@$%^&*_+=<>.?/-][0-9A-Za-z~!@$%^&*_+=<>.?/-]*")
CORE = """
true false not and or xor => = distinct ite + - * / div mod abs < <= > >= to_real to_int is_int select store concat
bvnot bvneg bvand bvor bvxor bvnand bvnor bvxnor bvadd bvsub bvmul bvudiv bvurem bvsdiv bvsrem bvsmod bvshl bvlshr
bvashr bvcomp bvult bvule bvugt bvuge bvslt bvsle bvsgt bvsge str.++ str.len str.at str.substr str.prefixof
str.suffixof str.contains str.indexof str.replace str.< str.<= str.to_int str.from_int
""".split()
INDEXED = "extract repeat zero_extend sign_extend rotate_left rotate_right divisible".split()
SORTS = ("Int", "Real", "Bool", "String")
BINDERS = ("forall", "exists")


class Refused(ValueError):
    """A text that is no expression, or uses what it must not."""


def read(text: str) -> list[Any]:
    """All expressions of a text, as nested lists of words. Raises Refused."""
    if len(text) > LONGEST:
        raise Refused(f"is longer than {LONGEST} characters")
    stack: list[list[Any]] = [[]]
    place = 0
    while place < len(text):
        found = TOKEN.match(text, place)
        if found is None:
            raise Refused(f"has an open quote at {text[place : place + 20]!r}")
        place, word = found.end(), found.group(1)
        if word == "(":
            stack.append([])
            if len(stack) > DEEPEST:
                raise Refused(f"is nested deeper than {DEEPEST}")
        elif word == ")":
            if len(stack) == 1:
                raise Refused("closes a bracket that was not opened")
            done = stack.pop()
            stack[-1].append(done)
        elif word:
            stack[-1].append(word)
    if len(stack) > 1:
        raise Refused("leaves a bracket open")
    return stack[0]


def write(expression: Any) -> str:
    """An expression as text."""
    return expression if isinstance(expression, str) else f"({' '.join(map(write, expression))})"


def check_term(term: Any, names: Container[str]) -> None:
    """A term over `names`, literals and known operators. A bound name is none of either. Raises Refused."""
    if isinstance(term, str):
        if term not in names and term not in CORE:
            _check_literal(term)
        return
    if not term:
        raise Refused("has empty brackets")
    head, rest = term[0], term[1:]
    if head == "let":
        _check_binder(term, names)
        for _, value in term[1]:
            check_term(value, names)
        check_term(term[2], {name for name, _ in term[1]} | _Both(names))
    elif head in BINDERS:
        _check_binder(term, names)
        for _, sort in term[1]:
            check_sort(sort, names)
        check_term(term[2], {name for name, _ in term[1]} | _Both(names))
    elif head == "_":
        _check_indexed(term)
    else:
        if isinstance(head, list) and head[:2] == ["as", "const"] and len(head) == 3:
            check_sort(head[2], names)
        elif isinstance(head, list):
            _check_indexed(head)
        elif head not in names and head not in CORE:
            raise Refused(f"uses {head[:40]!r}, which is neither declared nor a known operator")
        for part in rest:
            check_term(part, names)


class _Both:
    """A container joined with a set of more names."""

    def __init__(self, names: Container[str], more: Container[str] = ()) -> None:
        self.names, self.more = names, more

    def __ror__(self, more: Container[str]) -> _Both:
        return _Both(self.names, more)

    def __contains__(self, name: object) -> bool:
        return name in self.more or name in self.names


def _check_literal(word: str) -> None:
    if len(word) > DIGITS or not LITERAL.fullmatch(word):
        raise Refused(f"uses {word[:40]!r}, which is neither declared nor a literal")


def _check_binder(term: Sequence[Any], names: Container[str]) -> None:
    """(let|forall|exists ((name ...) ...) body), with names of its own."""
    if len(term) != 3 or not isinstance(term[1], list) or not term[1]:
        raise Refused(f"has a {term[0]} that is none")
    for pair in term[1]:
        if not (isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str) and SYMBOL.fullmatch(pair[0])):
            raise Refused(f"has a {term[0]} that is none")
        if pair[0] in names or pair[0] in (
            *CORE,
            *INDEXED,
            *SORTS,
            *BINDERS,
            "let",
            "as",
            "_",
            "!",
            "const",
            "match",
            "par",
        ):
            raise Refused(f"binds {pair[0][:40]!r} anew")


def _check_indexed(term: Sequence[Any]) -> None:
    known = (
        len(term) >= 3
        and term[0] == "_"
        and isinstance(term[1], str)
        and (term[1] in INDEXED or re.fullmatch(r"bv[0-9]{1,1000}", term[1]))
    )
    if not known or not all(
        isinstance(index, str) and re.fullmatch("[0-9]{1,4}", index) and int(index) <= INDEX for index in term[2:]
    ):
        raise Refused(f"uses {write(list(term))[:40]!r}, which is no known operator")


def check_sort(sort: Any, names: Container[str]) -> None:
    """A sort that is built in or declared. Raises Refused."""
    if isinstance(sort, str) and (sort in SORTS or sort in names):
        return
    if isinstance(sort, list) and sort[:1] == ["Array"] and len(sort) == 3:
        check_sort(sort[1], names)
        check_sort(sort[2], names)
    elif not (
        isinstance(sort, list)
        and sort[:2] == ["_", "BitVec"]
        and len(sort) == 3
        and re.fullmatch("[1-9][0-9]{0,3}", str(sort[2]))
    ):
        raise Refused(f"has a sort {write(sort)[:40]!r} that is not known")

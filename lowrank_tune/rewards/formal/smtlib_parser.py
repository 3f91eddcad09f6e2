"""S-expressions of SMT-LIB 2, read strictly: what a model wrote reaches Z3 only as terms of known operators, never as
text or a command."""

from __future__ import annotations

import re
from collections.abc import Container, Sequence
from typing import Any

# characters of a text, levels, characters of a literal, the largest index
MAX_CHARS = 100_000
MAX_DEPTH = 100
MAX_LITERAL_CHARS = 1000
MAX_INDEX = 4096
TOKEN = re.compile(r'(?:\s+|;[^\n]*)|([()]|"(?:[^"]|"")*"|\|[^|\\]*\||[^\s()";|]+)')
LITERAL = re.compile(r'[0-9]+(?:\.[0-9]+)?|#x[0-9a-fA-F]+|#b[01]+|"[ -~]*"')
SYMBOL = re.compile(r"[A-Za-z~!@$%^&*_+=<>.?/-][0-9A-Za-z~!@$%^&*_+=<>.?/-]*")
CORE_OPERATORS = """
true false not and or xor => = distinct ite + - * / div mod abs < <= > >= to_real to_int is_int select store concat
bvnot bvneg bvand bvor bvxor bvnand bvnor bvxnor bvadd bvsub bvmul bvudiv bvurem bvsdiv bvsrem bvsmod bvshl bvlshr
bvashr bvcomp bvult bvule bvugt bvuge bvslt bvsle bvsgt bvsge str.++ str.len str.at str.substr str.prefixof
str.suffixof str.contains str.indexof str.replace str.< str.<= str.to_int str.from_int
""".split()
INDEXED_OPERATORS = "extract repeat zero_extend sign_extend rotate_left rotate_right divisible".split()
SORTS = ("Int", "Real", "Bool", "String")
BINDERS = ("forall", "exists")


class SmtlibParseError(ValueError):
    """A text that is no expression, or uses what it must not."""


def parse_sexprs(text: str) -> list[Any]:
    """All expressions of a text, as nested lists of words. Raises SmtlibParseError."""
    if len(text) > MAX_CHARS:
        raise SmtlibParseError(f"is longer than {MAX_CHARS} characters")
    stack: list[list[Any]] = [[]]
    position = 0
    while position < len(text):
        match = TOKEN.match(text, position)
        if match is None:
            raise SmtlibParseError(f"has an open quote at {text[position : position + 20]!r}")
        position = match.end()
        word = match.group(1)
        if word == "(":
            stack.append([])
            if len(stack) > MAX_DEPTH:
                raise SmtlibParseError(f"is nested deeper than {MAX_DEPTH}")
        elif word == ")":
            if len(stack) == 1:
                raise SmtlibParseError("closes a bracket that was not opened")
            done = stack.pop()
            stack[-1].append(done)
        elif word:
            stack[-1].append(word)
    if len(stack) > 1:
        raise SmtlibParseError("leaves a bracket open")
    return stack[0]


def format_sexpr(expression: Any) -> str:
    """An expression as text."""
    if isinstance(expression, str):
        return expression
    return f"({' '.join(map(format_sexpr, expression))})"


def check_term(term: Any, names: Container[str]) -> None:
    """A term over `names`, literals and known operators. A bound name is none of either. Raises SmtlibParseError."""
    if isinstance(term, str):
        if term not in names and term not in CORE_OPERATORS:
            _check_literal(term)
        return
    if not term:
        raise SmtlibParseError("has empty brackets")
    head = term[0]
    rest = term[1:]
    if head == "let":
        _check_binder(term, names)
        for _, value in term[1]:
            check_term(value, names)
        check_term(term[2], {name for name, _ in term[1]} | _UnionContainer(names))
    elif head in BINDERS:
        _check_binder(term, names)
        for _, sort in term[1]:
            check_sort(sort, names)
        check_term(term[2], {name for name, _ in term[1]} | _UnionContainer(names))
    elif head == "_":
        _check_indexed(term)
    else:
        if isinstance(head, list) and head[:2] == ["as", "const"] and len(head) == 3:
            check_sort(head[2], names)
        elif isinstance(head, list):
            _check_indexed(head)
        elif head not in names and head not in CORE_OPERATORS:
            raise SmtlibParseError(f"uses {head[:40]!r}, which is neither declared nor a known operator")
        for part in rest:
            check_term(part, names)


class _UnionContainer:
    """A container joined with a set of more names."""

    def __init__(self, names: Container[str], more: Container[str] = ()) -> None:
        self.names = names
        self.more = more

    def __ror__(self, more: Container[str]) -> _UnionContainer:
        return _UnionContainer(self.names, more)

    def __contains__(self, name: object) -> bool:
        return name in self.more or name in self.names


def _check_literal(word: str) -> None:
    if len(word) > MAX_LITERAL_CHARS or not LITERAL.fullmatch(word):
        raise SmtlibParseError(f"uses {word[:40]!r}, which is neither declared nor a literal")


def _check_binder(term: Sequence[Any], names: Container[str]) -> None:
    """(let|forall|exists ((name ...) ...) body), with names of its own."""
    if len(term) != 3 or not isinstance(term[1], list) or not term[1]:
        raise SmtlibParseError(f"has a {term[0]} that is none")
    for pair in term[1]:
        if not (isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str) and SYMBOL.fullmatch(pair[0])):
            raise SmtlibParseError(f"has a {term[0]} that is none")
        if pair[0] in names or pair[0] in (
            *CORE_OPERATORS,
            *INDEXED_OPERATORS,
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
            raise SmtlibParseError(f"binds {pair[0][:40]!r} anew")


def _check_indexed(term: Sequence[Any]) -> None:
    is_known = (
        len(term) >= 3
        and term[0] == "_"
        and isinstance(term[1], str)
        and (term[1] in INDEXED_OPERATORS or re.fullmatch(r"bv[0-9]{1,1000}", term[1]))
    )
    if not is_known or not all(
        isinstance(index, str) and re.fullmatch("[0-9]{1,4}", index) and int(index) <= MAX_INDEX for index in term[2:]
    ):
        raise SmtlibParseError(f"uses {format_sexpr(list(term))[:40]!r}, which is no known operator")


def check_sort(sort: Any, names: Container[str]) -> None:
    """A sort that is built in or declared. Raises SmtlibParseError."""
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
        raise SmtlibParseError(f"has a sort {format_sexpr(sort)[:40]!r} that is not known")

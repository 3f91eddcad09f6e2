"""A strict parser of S-expressions of SMT-LIB 2: what a model wrote is passed to Z3 only as terms of known operators,
never as text or as a command. Runs in the worker process."""

from __future__ import annotations

import re
from collections.abc import Container, Sequence
from typing import Any

# characters of a text, levels of nesting, characters of a literal, largest index
MAX_CHARS = 100_000
MAX_DEPTH = 100
MAX_LITERAL_CHARS = 1000
MAX_INDEX = 4096
TOKEN = re.compile(r'(?:\s+|;[^\n]*)|([()]|"(?:[^"]|"")*"|\|[^|\\]*\||[^\s()";|]+)')
LITERAL = re.compile(r'[0-9]+(?:\.[0-9]+)?|#x[0-9a-fA-F]+|#b[01]+|"[ -~]*"')
SYMBOL = re.compile(r"[A-Za-z~!@$%^&*_+=<>.?/-][0-9A-Za-z~!@$%^&*_+=<>.?/-]*")
BIT_VECTOR = re.compile(r"bv[0-9]{1,1000}")
INDEX = re.compile(r"[0-9]{1,4}")
WIDTH = re.compile(r"[1-9][0-9]{0,3}")
CORE_OPERATORS = """
true false not and or xor => = distinct ite + - * / div mod abs < <= > >= to_real to_int is_int select store concat
bvnot bvneg bvand bvor bvxor bvnand bvnor bvxnor bvadd bvsub bvmul bvudiv bvurem bvsdiv bvsrem bvsmod bvshl bvlshr
bvashr bvcomp bvult bvule bvugt bvuge bvslt bvsle bvsgt bvsge str.++ str.len str.at str.substr str.prefixof
str.suffixof str.contains str.indexof str.replace str.< str.<= str.to_int str.from_int
""".split()
INDEXED_OPERATORS = "extract repeat zero_extend sign_extend rotate_left rotate_right divisible".split()
SORTS = (
    "Int",
    "Real",
    "Bool",
    "String",
)
BINDERS = ("forall", "exists")
RESERVED_WORDS = frozenset(
    (
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
    )
)


class SmtlibParseError(ValueError):
    """A text that is not an expression, or uses something that is not allowed; the message is a predicate."""


def parse_sexprs(text: str) -> list[Any]:
    """Returns all expressions of a text, as nested lists of words. Raises SmtlibParseError."""
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
    """Returns an expression as text."""
    if isinstance(expression, str):
        return expression
    return f"({' '.join(map(format_sexpr, expression))})"


def check_term(term: Any, names: Container[str]) -> None:
    """Raises SmtlibParseError if a term has anything but `names`, literals, known operators, and names that it binds
    itself, which must be new."""
    if isinstance(term, str):
        if term not in names and term not in CORE_OPERATORS:
            _check_literal(term)
        return
    if not term:
        raise SmtlibParseError("has empty brackets")
    head = term[0]
    if head == "let" or head in BINDERS:
        _check_binder(term, names)
        for _, bound in term[1]:
            # a value of `let`, or the sort of a quantified name
            if head == "let":
                check_term(bound, names)
            else:
                check_sort(bound, names)
        bound_names = {name for name, _ in term[1]}
        check_term(term[2], _UnionContainer(names, bound_names))
        return
    if head == "_":
        _check_indexed(term)
        return
    _check_head(head, names)
    for part in term[1:]:
        check_term(part, names)


class _UnionContainer:
    """A container with more names."""

    def __init__(self, names: Container[str], more: Container[str]) -> None:
        self.names = names
        self.more = more

    def __contains__(self, name: object) -> bool:
        return name in self.more or name in self.names


def _check_head(head: Any, names: Container[str]) -> None:
    """Raises SmtlibParseError if the first part of a term is not a name, an operator or a constant array."""
    if isinstance(head, str):
        if head not in names and head not in CORE_OPERATORS:
            raise SmtlibParseError(f"uses {head[:40]!r}, which is neither declared nor a known operator")
    elif head[:2] == ["as", "const"] and len(head) == 3:
        check_sort(head[2], names)
    else:
        _check_indexed(head)


def _check_literal(word: str) -> None:
    if len(word) > MAX_LITERAL_CHARS or not LITERAL.fullmatch(word):
        raise SmtlibParseError(f"uses {word[:40]!r}, which is neither declared nor a literal")


def _check_binder(term: Sequence[Any], names: Container[str]) -> None:
    """Raises SmtlibParseError if a term is not (let|forall|exists ((name ...) ...) body) with new names."""
    if len(term) != 3 or not isinstance(term[1], list) or not term[1]:
        raise SmtlibParseError(f"has an invalid `{term[0]}`")
    for pair in term[1]:
        if not isinstance(pair, list) or len(pair) != 2:
            raise SmtlibParseError(f"has an invalid `{term[0]}`")
        name = pair[0]
        if not isinstance(name, str) or not SYMBOL.fullmatch(name):
            raise SmtlibParseError(f"has an invalid `{term[0]}`")
        if name in names or name in RESERVED_WORDS:
            raise SmtlibParseError(f"binds {name[:40]!r} again")


def _check_indexed(term: Sequence[Any]) -> None:
    """Raises SmtlibParseError if a term is not (_ operator index ...)."""
    if not _is_indexed_operator(term):
        raise SmtlibParseError(f"uses {format_sexpr(list(term))[:40]!r}, which is not a known operator")


def _is_indexed_operator(term: Sequence[Any]) -> bool:
    if len(term) < 3 or term[0] != "_" or not isinstance(term[1], str):
        return False
    if term[1] not in INDEXED_OPERATORS and not BIT_VECTOR.fullmatch(term[1]):
        return False
    return all(_is_index(index) for index in term[2:])


def _is_index(word: Any) -> bool:
    return isinstance(word, str) and INDEX.fullmatch(word) is not None and int(word) <= MAX_INDEX


def check_sort(sort: Any, names: Container[str]) -> None:
    """Raises SmtlibParseError if a sort is neither built in nor declared."""
    if isinstance(sort, str) and (sort in SORTS or sort in names):
        return
    if isinstance(sort, list) and len(sort) == 3:
        if sort[0] == "Array":
            check_sort(sort[1], names)
            check_sort(sort[2], names)
            return
        if sort[:2] == ["_", "BitVec"] and WIDTH.fullmatch(str(sort[2])):
            return
    raise SmtlibParseError(f"has a sort {format_sexpr(sort)[:40]!r} that is not known")

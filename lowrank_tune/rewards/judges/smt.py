"""Z3 in a worker: decides a row's statement, and checks witnesses and invariants that a model wrote. z3 is an extra:
imported where used."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Container, Mapping
from fractions import Fraction
from typing import Any

from lowrank_tune.rewards.judges.sexpr import Refused, check_term, read, write

PATIENCE = 0.75  # of the time that a call has; the alarm of the worker cannot interrupt Z3
KEPT = 256  # decided statements: all completions of a group ask the same
DECLARES = ("declare-const", "declare-fun")
DEFINES = (
    "declare-sort",
    "define-sort",
    "define-fun",
    "define-fun-rec",
    "define-const",
    "declare-datatype",
    "declare-datatypes",
)
IGNORED = ("set-logic", "set-info", "check-sat", "get-model", "get-value", "exit")
NUMBER = re.compile(r"[-+]?[0-9]{1,1000}(?:\.[0-9]{1,1000})?(?:/[0-9]{1,1000})?")
LINE = re.compile(
    r"(?:^|[,;])[ \t]*([A-Za-z_][\w.!]{0,99})[ \t]*=[ "
    r'\t]*([-+]?[0-9][0-9./]{0,1999}|true|false|#x[0-9a-fA-F]+|#b[01]+|"[^"\n]*")'
    r"[ \t]*(?=[,;]|\.?[ \t]*$)",
    re.M,
)

Decide = Callable[[str], str]
"""Whether a script can be met: sat or unsat. Raises Unknown."""


class Unknown(Exception):
    """Z3 cannot tell; the message says why."""


class RowFault(Exception):
    """A row that is at fault itself."""


def load(job: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], Mapping[str, Any]]:
    """Judges by `kind` what `ask` of the reward sends: {status} of a statement, {right, why} otherwise, {unknown} or
    {row} instead."""
    import z3

    z3.set_param("memory_max_size", job["megabytes"] // 2)  # before the limit of the worker, with a word from Z3
    known: dict[str, str] = {}

    def judge(asked: Mapping[str, Any]) -> Mapping[str, Any]:
        decide = functools.partial(decided, milliseconds=int(1000 * PATIENCE * asked["seconds"]))
        try:
            if job["asks"] == "statement":
                return {"status": statement(asked, _remembered(decide, known))}
            right, why = (witness if job["asks"] == "witness" else invariant)(asked, decide)
            return {"right": right, "why": why}
        except Unknown as unknown:
            return {"unknown": str(unknown)}
        except RowFault as fault:
            return {"row": str(fault)}

    return judge


def _remembered(decide: Decide, known: dict[str, str]) -> Decide:
    def remember(script: str) -> str:
        if script not in known:
            if len(known) >= KEPT:
                known.clear()
            known[script] = decide(script)
        return known[script]

    return remember


def decided(script: str, milliseconds: int) -> str:
    """sat or unsat. Raises Unknown; Z3Exception where Z3 does not take the script."""
    import z3

    context = z3.Context()
    solver = z3.Solver(ctx=context)
    solver.set("timeout", milliseconds)
    solver.add(z3.parse_smt2_string(script, ctx=context))
    status = str(solver.check())
    if status == "unknown":
        raise Unknown(solver.reason_unknown())
    return status


class Row:
    """The `smt` of a row: declarations, definitions and assertions, and what they name. Raises RowFault."""

    def __init__(self, text: str) -> None:
        self.commands: list[Any] = []
        self.declared: dict[str, tuple[list[Any], Any]] = {}
        self.names: set[str] = set()
        for command in _row(read, text):
            word = (
                command[0] if isinstance(command, list) and command and isinstance(command[0], str) else write(command)
            )
            if word in IGNORED:
                continue
            if word not in (*DECLARES, *DEFINES, "assert"):
                raise RowFault(f"`smt` holds {word[:40]!r}, which is no declaration and no assertion")
            self.commands.append(command)
            if word in DECLARES and len(command) == 3 + (word == "declare-fun"):
                self.declared[str(command[1])] = (command[2] if word == "declare-fun" else [], command[-1])
            elif word != "assert":
                self.names |= {*_words(command[1:])} - {"Int", "Real", "Bool"}

    def script(self, values: Mapping[str, str] | None = None) -> str:
        """As text; each declaration that has a value is a definition instead."""
        values = values or {}
        return "\n".join(
            values.get(str(one[1]), write(one)) if one[0] in DECLARES else write(one) for one in self.commands
        )


def _words(expression: Any) -> list[str]:
    return [expression] if isinstance(expression, str) else [word for part in expression for word in _words(part)]


def _row(function: Callable[[str], Any], text: str) -> Any:
    try:
        return function(text)
    except Refused as error:
        raise RowFault(f"`smt` {error}") from None


def _term(name: str, text: str) -> str:
    """One term of a row."""
    found = _row(read, text)
    if len(found) != 1:
        raise RowFault(f"`{name}` is not one term")
    return write(found[0])


def _checked(decide: Decide, script: str, what: str) -> str:
    """As `decide`, for a script that is all the row's."""
    import z3

    try:
        return decide(script)
    except z3.Z3Exception as error:
        raise RowFault(f"Z3 does not take {what}: {_said(error)}") from None


def _said(error: Exception) -> str:
    told = error.args[0] if error.args else ""
    return (told.decode(errors="replace") if isinstance(told, bytes) else str(told)).strip()[:200]


def statement(asked: Mapping[str, Any], decide: Decide) -> str:
    """sat or unsat; with a `claim` valid (nothing that meets the constraints breaks it) or invalid."""
    script = Row(asked["smt"]).script()
    if asked.get("claim") is None:
        return _checked(decide, script, "`smt`")
    status = _checked(decide, f"{script}\n(assert (not {_term('claim', asked['claim'])}))", "`smt` with `claim`")
    return "valid" if status == "unsat" else "invalid"


def witness(asked: Mapping[str, Any], decide: Decide) -> tuple[bool, str]:
    """Whether the values meet the constraints: every declaration becomes a definition, with the row's own sorts."""
    import z3

    row = Row(asked["smt"])
    try:
        values = assigned(asked["text"], row)
    except Refused as error:
        return False, f"the answer {error}"
    if missing := [name for name in row.declared if name not in values]:
        return False, f"there is no value for {missing[0][:40]}"
    try:
        met = decide(row.script(values)) == "sat"
    except z3.Z3Exception as error:
        try:  # whose fault it is: the row's where that alone is not taken either
            z3.parse_smt2_string(row.script(), ctx=z3.Context())
        except z3.Z3Exception:
            raise RowFault(f"Z3 does not take `smt`: {_said(error)}") from None
        return False, f"a value does not fit: {_said(error)}"
    return met, "" if met else "the values do not meet the constraints"


def assigned(text: str, row: Row) -> dict[str, str]:
    """A definition for each name to which the answer gives a value. Raises Refused."""
    if not text.lstrip().startswith("("):
        found = {
            name: _literal(value, row.declared[name][1]) for name, value in LINE.findall(text) if name in row.declared
        }
        return {name: f"(define-fun {name} () {write(row.declared[name][1])} {value})" for name, value in found.items()}
    definitions = read(text)
    if len(definitions) == 1 and definitions[0][:1] != ["define-fun"]:
        definitions = [each for each in definitions[0] if each != "model"]
    made: dict[str, str] = {}
    for one in definitions:
        if not (
            isinstance(one, list)
            and len(one) == 5
            and one[0] == "define-fun"
            and isinstance(one[1], str)
            and isinstance(one[2], list)
        ):
            raise Refused("holds something other than (define-fun name (...) sort value)")
        name, parameters = (
            one[1],
            [each[0] for each in one[2] if isinstance(each, list) and len(each) == 2 and isinstance(each[0], str)],
        )
        if name not in row.declared or name in made:
            raise Refused(f"defines {name[:40]!r}, which is not declared or comes twice")
        sorts, sort = row.declared[name]
        if (
            len(parameters) != len(one[2])
            or len(parameters) != len(sorts)
            or any(not re.fullmatch(r"[A-Za-z]\w*(?:!\d+)?", p) for p in parameters)
        ):
            raise Refused(f"gives {name[:40]!r} other parameters than it has")
        check_term(one[4], {*row.names, *parameters})
        listed = " ".join(f"({parameter} {write(of)})" for parameter, of in zip(parameters, sorts, strict=True))
        value = _real(one[4]) if sort == "Real" else one[4]
        made[name] = f"(define-fun {name} ({listed}) {write(sort)} {write(value)})"
    return made


def _real(term: Any) -> Any:
    """5 and (- 5) where a real number stands, as 5.0 and (- 5.0)."""
    if isinstance(term, str):
        return f"{term}.0" if term.isdigit() else term
    return [term[0], *map(_real, term[1:])] if term[0] in ("+", "-", "*", "/") else term


def _literal(value: str, sort: Any) -> str:
    """`-3`, `1.5` or `1/3` as a term of the sort; anything else stays. Raises Refused."""
    value = value.rstrip(".")
    if sort not in ("Int", "Real") or not NUMBER.fullmatch(value):
        check_term(value, ())
        return value
    top, _, bottom = value.lstrip("+-").partition("/")
    if bottom and not int(bottom):
        raise Refused("divides by zero")
    number = Fraction(top) / int(bottom or 1)
    if sort == "Int" and number.denominator != 1:
        raise Refused(f"gives an integer the value {value[:40]}")
    term = str(number) if sort == "Int" else f"(/ {number.numerator}.0 {number.denominator}.0)"
    return f"(- {term})" if value.startswith("-") else term


def invariant(asked: Mapping[str, Any], decide: Decide) -> tuple[bool, str]:
    """Whether a formula holds at first, is kept by every step, and implies the property."""
    import z3

    row = Row(asked["smt"])
    if any(command[0] == "assert" for command in row.commands):
        raise RowFault("`smt` of an invariant holds declarations alone; say the rest in `init` and `transition`")
    state = [name for name, (parameters, _) in row.declared.items() if not parameters]
    script = "\n".join([row.script(), *(f"(declare-const {name}! {write(row.declared[name][1])})" for name in state)])
    init, transition, goal = (_term(name, asked[name]) for name in ("init", "transition", "property"))
    parts = (
        f"{script}\n(assert {init})\n(assert (or {transition} (not {transition})))\n(assert (or {goal} (not {goal})))"
    )
    if _checked(decide, parts, "the row") == "unsat":
        raise RowFault("`init` can never hold")
    try:
        formula = _formula(asked["text"], {*row.declared, *row.names}, set(state))
        now, then = write(formula), write(_next(formula, state))
        for what, premises, conclusion in (
            ("holds not at first", [init], now),
            ("is not kept by a step", [now, transition], then),
            ("does not imply the property", [now], goal),
        ):
            asserted = "\n".join(f"(assert {premise})" for premise in premises)
            if decide(f"{script}\n{asserted}\n(assert (not {conclusion}))") == "sat":
                return False, f"the formula {what}"
    except Refused as error:
        return False, f"the answer {error}"
    except z3.Z3Exception as error:  # the row alone was taken above
        return False, f"the formula is not taken: {_said(error)}"
    return True, ""


def _formula(text: str, names: Container[str], state: set[str]) -> Any:
    """The one term of an answer, or the body of its one definition over names of the state. Raises Refused."""
    found = read(text)
    if len(found) != 1:
        raise Refused("is not one formula")
    formula = found[0]
    if isinstance(formula, list) and formula[:1] == ["define-fun"]:
        named = len(formula) == 5 and isinstance(formula[2], list)
        if not named or not all(
            isinstance(each, list) and len(each) == 2 and isinstance(each[0], str) and each[0] in state
            for each in formula[2]
        ):
            raise Refused("defines something else than a formula over the row's variables")
        formula = formula[4]
    check_term(formula, names)
    return formula


def _next(term: Any, state: list[str]) -> Any:
    """After the step; no bound name is one of the state."""
    if isinstance(term, str):
        return f"{term}!" if term in state else term
    return [_next(part, state) for part in term]

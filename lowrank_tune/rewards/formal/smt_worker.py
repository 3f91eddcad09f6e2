"""Z3 in a worker: decides a row's statement, and checks witnesses and invariants that a model wrote. z3 is an extra:
imported where used."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Container, Mapping
from fractions import Fraction
from typing import Any

from lowrank_tune.rewards.formal.smtlib_parser import SmtlibParseError, check_term, format_sexpr, parse_sexprs
from lowrank_tune.rewards.workers.budget import interrupt_after

Z3_TIME_FRACTION = 0.75  # of the CPU time that a call has; the alarm of the worker cannot interrupt Z3
CACHE_SIZE = 256  # decided statements: all completions of a group ask the same
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
ASSIGNMENT_PATTERN = re.compile(
    r"(?:^|[,;])[ \t]*([A-Za-z_][\w.!]{0,99})[ \t]*=[ "
    r'\t]*([-+]?[0-9][0-9./]{0,1999}|true|false|#x[0-9a-fA-F]+|#b[01]+|"[^"\n]*")'
    r"[ \t]*(?=[,;]|\.?[ \t]*$)",
    re.M,
)

DecideFn = Callable[[str], str]
"""Whether a script can be met: sat or unsat. Raises Undecided, TimeoutError."""


class Undecided(Exception):
    """Z3 cannot decide; the message is its reason."""


class InvalidRow(Exception):
    """A row that is at fault itself."""


def load(spec: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], Mapping[str, Any]]:
    """Judges by `answer_type` what `build_request` of the reward sends: {status} of a statement, {right, why}
    otherwise, {unknown} or {row} instead. Without a `text` it judges the row's own formulas, which are right where Z3
    decides them. Raises TimeoutError where Z3 takes too long."""
    import z3

    z3.set_param("memory_max_size", spec["megabytes"] // 2)  # before the limit of the worker, with a word from Z3
    cache: dict[str, str] = {}

    def grade(request: Mapping[str, Any]) -> Mapping[str, Any]:
        decide = functools.partial(check_sat, seconds=Z3_TIME_FRACTION * request["seconds"])
        try:
            if spec["asks"] == "statement":
                return {"status": statement(request, _cached(decide, cache))}
            correct, reason = (witness if spec["asks"] == "witness" else invariant)(request, decide)
            return {"right": correct, "why": reason}
        except Undecided as unknown:
            return {"unknown": str(unknown)}
        except InvalidRow as fault:
            return {"row": str(fault)}

    return grade


def _cached(decide: DecideFn, cache: dict[str, str]) -> DecideFn:
    def cached_decide(script: str) -> str:
        if script not in cache:
            if len(cache) >= CACHE_SIZE:
                cache.clear()
            cache[script] = decide(script)
        return cache[script]

    return cached_decide


def check_sat(script: str, seconds: float) -> str:
    """sat or unsat. Raises TimeoutError after so many seconds of CPU, not of the wall clock, as Z3's own timeout has
    them; Undecided where Z3 gives up before; Z3Exception where it does not take the script."""
    import z3

    context = z3.Context()
    solver = z3.Solver(ctx=context)
    solver.add(z3.parse_smt2_string(script, ctx=context))
    with interrupt_after(seconds, context.interrupt) as interrupted:
        status = str(solver.check())
    if status == "unknown" and interrupted.is_set():
        raise TimeoutError
    if status == "unknown":
        raise Undecided(solver.reason_unknown())
    return status


class SmtProblem:
    """The `smt` of a row: declarations, definitions and assertions, and what they name. Raises InvalidRow."""

    def __init__(self, text: str) -> None:
        self.commands: list[Any] = []
        self.declared: dict[str, tuple[list[Any], Any]] = {}
        self.names: set[str] = set()
        for command in _parse_row(parse_sexprs, text):
            if isinstance(command, list) and command and isinstance(command[0], str):
                word = command[0]
            else:
                word = format_sexpr(command)
            if word in IGNORED:
                continue
            if word not in (*DECLARES, *DEFINES, "assert"):
                raise InvalidRow(f"`smt` holds {word[:40]!r}, which is no declaration and no assertion")
            self.commands.append(command)
            if word in DECLARES and len(command) == 3 + (word == "declare-fun"):
                self.declared[str(command[1])] = (command[2] if word == "declare-fun" else [], command[-1])
            elif word != "assert":
                self.names |= {*_words(command[1:])} - {"Int", "Real", "Bool"}

    def to_script(self, values: Mapping[str, str] | None = None) -> str:
        """As text; each declaration that has a value is a definition instead."""
        values = values or {}
        return "\n".join(
            values.get(str(command[1]), format_sexpr(command)) if command[0] in DECLARES else format_sexpr(command)
            for command in self.commands
        )


def _words(expression: Any) -> list[str]:
    if isinstance(expression, str):
        return [expression]
    return [word for part in expression for word in _words(part)]


def _parse_row(function: Callable[[str], Any], text: str) -> Any:
    try:
        return function(text)
    except SmtlibParseError as error:
        raise InvalidRow(f"`smt` {error}") from None


def _parse_term(name: str, text: str) -> str:
    """One term of a row."""
    terms = _parse_row(parse_sexprs, text)
    if len(terms) != 1:
        raise InvalidRow(f"`{name}` is not one term")
    return format_sexpr(terms[0])


def _decide_row(decide: DecideFn, script: str, label: str) -> str:
    """As `decide`, for a script that is all the row's."""
    import z3

    try:
        return decide(script)
    except z3.Z3Exception as error:
        raise InvalidRow(f"Z3 does not take {label}: {_error_text(error)}") from None


def _error_text(error: Exception) -> str:
    message = error.args[0] if error.args else ""
    return (message.decode(errors="replace") if isinstance(message, bytes) else str(message)).strip()[:200]


def statement(request: Mapping[str, Any], decide: DecideFn) -> str:
    """sat or unsat; with a `claim` valid (nothing that meets the constraints breaks it) or invalid."""
    script = SmtProblem(request["smt"]).to_script()
    if request.get("claim") is None:
        return _decide_row(decide, script, "`smt`")
    status = _decide_row(
        decide,
        f"{script}\n(assert (not {_parse_term('claim', request['claim'])}))",
        "`smt` with `claim`",
    )
    return "valid" if status == "unsat" else "invalid"


def witness(request: Mapping[str, Any], decide: DecideFn) -> tuple[bool, str]:
    """Whether the values meet the constraints: every declaration becomes a definition, with the row's own sorts."""
    import z3

    problem = SmtProblem(request["smt"])
    if request["text"] is None:
        _decide_row(decide, problem.to_script(), "`smt`")
        return True, ""
    try:
        values = parse_assignments(request["text"], problem)
    except SmtlibParseError as error:
        return False, f"the answer {error}"
    if missing := [name for name in problem.declared if name not in values]:
        return False, f"there is no value for {missing[0][:40]}"
    try:
        satisfied = decide(problem.to_script(values)) == "sat"
    except z3.Z3Exception as error:
        try:  # whose fault it is: the row's where that alone is not taken either
            z3.parse_smt2_string(problem.to_script(), ctx=z3.Context())
        except z3.Z3Exception:
            raise InvalidRow(f"Z3 does not take `smt`: {_error_text(error)}") from None
        return False, f"a value does not fit: {_error_text(error)}"
    return satisfied, "" if satisfied else "the values do not meet the constraints"


def parse_assignments(text: str, problem: SmtProblem) -> dict[str, str]:
    """A definition for each name to which the answer gives a value. Raises SmtlibParseError."""
    if not text.lstrip().startswith("("):
        values = {
            name: _literal(value, problem.declared[name][1])
            for name, value in ASSIGNMENT_PATTERN.findall(text)
            if name in problem.declared
        }
        return {
            name: f"(define-fun {name} () {format_sexpr(problem.declared[name][1])} {value})"
            for name, value in values.items()
        }
    definitions = parse_sexprs(text)
    if len(definitions) == 1 and definitions[0][:1] != ["define-fun"]:
        definitions = [each for each in definitions[0] if each != "model"]
    result: dict[str, str] = {}
    for definition in definitions:
        if not (
            isinstance(definition, list)
            and len(definition) == 5
            and definition[0] == "define-fun"
            and isinstance(definition[1], str)
            and isinstance(definition[2], list)
        ):
            raise SmtlibParseError("holds something other than (define-fun name (...) sort value)")
        name = definition[1]
        parameters = [
            each[0] for each in definition[2] if isinstance(each, list) and len(each) == 2 and isinstance(each[0], str)
        ]
        if name not in problem.declared or name in result:
            raise SmtlibParseError(f"defines {name[:40]!r}, which is not declared or comes twice")
        sorts, sort = problem.declared[name]
        if (
            len(parameters) != len(definition[2])
            or len(parameters) != len(sorts)
            or any(not re.fullmatch(r"[A-Za-z]\w*(?:!\d+)?", p) for p in parameters)
        ):
            raise SmtlibParseError(f"gives {name[:40]!r} other parameters than it has")
        check_term(definition[4], {*problem.names, *parameters})
        listed = " ".join(f"({parameter} {format_sexpr(of)})" for parameter, of in zip(parameters, sorts, strict=True))
        value = _to_real(definition[4]) if sort == "Real" else definition[4]
        result[name] = f"(define-fun {name} ({listed}) {format_sexpr(sort)} {format_sexpr(value)})"
    return result


def _to_real(term: Any) -> Any:
    """5 and (- 5) where a real number stands, as 5.0 and (- 5.0)."""
    if isinstance(term, str):
        return f"{term}.0" if term.isdigit() else term
    if term[0] in ("+", "-", "*", "/"):
        return [term[0], *map(_to_real, term[1:])]
    return term


def _literal(value: str, sort: Any) -> str:
    """`-3`, `1.5` or `1/3` as a term of the sort; anything else stays. Raises SmtlibParseError."""
    value = value.rstrip(".")
    if sort not in ("Int", "Real") or not NUMBER.fullmatch(value):
        check_term(value, ())
        return value
    top, _, bottom = value.lstrip("+-").partition("/")
    if bottom and not int(bottom):
        raise SmtlibParseError("divides by zero")
    number = Fraction(top) / int(bottom or 1)
    if sort == "Int" and number.denominator != 1:
        raise SmtlibParseError(f"gives an integer the value {value[:40]}")
    if sort == "Int":
        term = str(number)
    else:
        term = f"(/ {number.numerator}.0 {number.denominator}.0)"
    return f"(- {term})" if value.startswith("-") else term


def invariant(request: Mapping[str, Any], decide: DecideFn) -> tuple[bool, str]:
    """Whether a formula holds at first, is kept by every step, and implies the property."""
    import z3

    problem = SmtProblem(request["smt"])
    if any(command[0] == "assert" for command in problem.commands):
        raise InvalidRow("`smt` of an invariant holds declarations alone; say the rest in `init` and `transition`")
    state = [name for name, (parameters, _) in problem.declared.items() if not parameters]
    script = "\n".join(
        [problem.to_script(), *(f"(declare-const {name}! {format_sexpr(problem.declared[name][1])})" for name in state)]
    )
    init, transition, goal = (_parse_term(name, request[name]) for name in ("init", "transition", "property"))
    parts = (
        f"{script}\n(assert {init})\n(assert (or {transition} (not {transition})))\n(assert (or {goal} (not {goal})))"
    )
    if _decide_row(decide, parts, "the row") == "unsat":
        raise InvalidRow("`init` can never hold")
    if request["text"] is None:
        return True, ""
    try:
        formula = _parse_formula(request["text"], {*problem.declared, *problem.names}, set(state))
        now = format_sexpr(formula)
        then = format_sexpr(_prime_state_vars(formula, state))
        for failure, premises, conclusion in (
            ("holds not at first", [init], now),
            ("is not kept by a step", [now, transition], then),
            ("does not imply the property", [now], goal),
        ):
            asserted = "\n".join(f"(assert {premise})" for premise in premises)
            if decide(f"{script}\n{asserted}\n(assert (not {conclusion}))") == "sat":
                return False, f"the formula {failure}"
    except SmtlibParseError as error:
        return False, f"the answer {error}"
    except z3.Z3Exception as error:  # the row alone was taken above
        return False, f"the formula is not taken: {_error_text(error)}"
    return True, ""


def _parse_formula(text: str, names: Container[str], state: set[str]) -> Any:
    """The one term of an answer, or the body of its one definition over names of the state. Raises SmtlibParseError."""
    terms = parse_sexprs(text)
    if len(terms) != 1:
        raise SmtlibParseError("is not one formula")
    formula = terms[0]
    if isinstance(formula, list) and formula[:1] == ["define-fun"]:
        named = len(formula) == 5 and isinstance(formula[2], list)
        if not named or not all(
            isinstance(binding, list) and len(binding) == 2 and isinstance(binding[0], str) and binding[0] in state
            for binding in formula[2]
        ):
            raise SmtlibParseError("defines something else than a formula over the row's variables")
        formula = formula[4]
    check_term(formula, names)
    return formula


def _prime_state_vars(term: Any, state: list[str]) -> Any:
    """After the step; no bound name is one of the state."""
    if isinstance(term, str):
        return f"{term}!" if term in state else term
    return [_prime_state_vars(part, state) for part in term]

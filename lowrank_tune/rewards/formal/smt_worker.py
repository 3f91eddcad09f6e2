"""The worker side of `smt` (`smt.py`): decides a row's statement with Z3, and checks the witness or the invariant that
a completion contains. Runs in the worker process. z3 is optional, so it is imported where it is used."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Container, Mapping
from fractions import Fraction
from typing import Any

from lowrank_tune.rewards.formal.smtlib_parser import SmtlibParseError, check_term, format_sexpr, parse_sexprs
from lowrank_tune.rewards.workers.budget import interrupt_after

Z3_TIME_FRACTION = 0.75  # share of the CPU time of a call; the worker's alarm cannot interrupt Z3
CACHE_SIZE = 256  # statements whose result is stored, because all completions of a group have the same
MAX_ERROR_CHARS = 200
DECLARATIONS = ("declare-const", "declare-fun")
DEFINITIONS = (
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
PARAMETER = re.compile(r"[A-Za-z]\w*(?:!\d+)?")
ASSIGNMENT_PATTERN = re.compile(
    r"(?:^|[,;])[ \t]*([A-Za-z_][\w.!]{0,99})[ \t]*=[ "
    r'\t]*([-+]?[0-9][0-9./]{0,1999}|true|false|#x[0-9a-fA-F]+|#b[01]+|"[^"\n]*")'
    r"[ \t]*(?=[,;]|\.?[ \t]*$)",
    re.M,
)

DecideFn = Callable[[str], str]
"""Returns whether the assertions of a script can be satisfied: sat or unsat. Raises Undecided, TimeoutError."""


class Undecided(Exception):
    """Z3 cannot decide; the message is its reason."""


class InvalidRow(Exception):
    """A row that is itself at fault."""


def load(spec: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], Mapping[str, Any]]:
    """Returns the grader of what `SmtReward.build_request` sends.

    It returns {status} for a statement and {right, why} for the other answer types; {unknown} if Z3 cannot decide, and
    {row} if the row is at fault. If `text` is None it grades the row's own formulas, which are right if Z3 decides
    them. Raises TimeoutError if Z3 takes too long.
    """
    import z3

    # below the memory limit of the worker, so that Z3 reports the reason itself
    z3.set_param("memory_max_size", spec["megabytes"] // 2)
    answer_type = spec["answer_type"]
    cache: dict[str, str] = {}

    def grade(request: Mapping[str, Any]) -> Mapping[str, Any]:
        decide = functools.partial(check_sat, seconds=Z3_TIME_FRACTION * request["seconds"])
        try:
            if answer_type == "statement":
                return {"status": statement(request, _cached(decide, cache))}
            reason = witness(request, decide) if answer_type == "witness" else invariant(request, decide)
        except Undecided as unknown:
            return {"unknown": str(unknown)}
        except InvalidRow as fault:
            return {"row": str(fault)}
        return {"right": reason is None, "why": reason or ""}

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
    """Returns sat or unsat. Raises TimeoutError after `seconds` of CPU time (Z3's own timeout is wall-clock time),
    Undecided if Z3 gives up before, and Z3Exception if it rejects the script."""
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
    """The column `smt` of a row: its commands, the (parameter sorts, sort) of each declared name, and the other names
    that it defines. Raises InvalidRow."""

    def __init__(self, text: str) -> None:
        self.commands: list[Any] = []
        self.declared: dict[str, tuple[list[Any], Any]] = {}
        self.names: set[str] = set()
        for command in _parse_row_text("smt", text):
            self._add(command)

    def _add(self, command: Any) -> None:
        if isinstance(command, list) and command and isinstance(command[0], str):
            word = command[0]
        else:
            word = format_sexpr(command)
        if word in IGNORED:
            return
        if word not in (*DECLARATIONS, *DEFINITIONS, "assert"):
            raise InvalidRow(f"`smt` has {word[:40]!r}, which is not a declaration or an assertion")
        self.commands.append(command)
        if word == "declare-const" and len(command) == 3:
            self.declared[str(command[1])] = ([], command[2])
        elif word == "declare-fun" and len(command) == 4:
            self.declared[str(command[1])] = (command[2], command[3])
        elif word != "assert":
            self.names |= {*_words(command[1:])} - {"Int", "Real", "Bool"}

    def to_script(self, values: Mapping[str, str] | None = None) -> str:
        """Returns the problem as text; the declaration of a name in `values` is replaced by that definition."""
        lines = []
        for command in self.commands:
            line = format_sexpr(command)
            if values and command[0] in DECLARATIONS:
                line = values.get(str(command[1]), line)
            lines.append(line)
        return "\n".join(lines)


def _words(expression: Any) -> list[str]:
    if isinstance(expression, str):
        return [expression]
    return [word for part in expression for word in _words(part)]


def _parse_row_text(column: str, text: str) -> list[Any]:
    try:
        return parse_sexprs(text)
    except SmtlibParseError as error:
        raise InvalidRow(f"`{column}` {error}") from None


def _parse_row_term(request: Mapping[str, Any], column: str) -> str:
    """Returns the one term of a column. Raises InvalidRow."""
    terms = _parse_row_text(column, request[column])
    if len(terms) != 1:
        raise InvalidRow(f"`{column}` is not one term")
    return format_sexpr(terms[0])


def _decide_row(
    decide: DecideFn,
    script: str,
    label: str,
) -> str:
    """Returns the result for a script that contains only the row. Raises InvalidRow if Z3 rejects it."""
    import z3

    try:
        return decide(script)
    except z3.Z3Exception as error:
        raise InvalidRow(f"Z3 rejects {label}: {_error_text(error)}") from None


def _error_text(error: Exception) -> str:
    message = error.args[0] if error.args else ""
    text = message.decode(errors="replace") if isinstance(message, bytes) else str(message)
    return text.strip()[:MAX_ERROR_CHARS]


def statement(request: Mapping[str, Any], decide: DecideFn) -> str:
    """Returns sat or unsat; with a `claim` valid (the assertions imply it) or invalid."""
    script = SmtProblem(request["smt"]).to_script()
    if request.get("claim") is None:
        return _decide_row(decide, script, "`smt`")
    claim = _parse_row_term(request, "claim")
    status = _decide_row(
        decide,
        f"{script}\n(assert (not {claim}))",
        "`smt` with `claim`",
    )
    return "valid" if status == "unsat" else "invalid"


def witness(request: Mapping[str, Any], decide: DecideFn) -> str | None:
    """Returns why the values of an answer do not satisfy the assertions; None if they do. Each declaration is replaced
    by a definition of the same sort."""
    import z3

    problem = SmtProblem(request["smt"])
    if request["text"] is None:
        _decide_row(decide, problem.to_script(), "`smt`")
        return None
    try:
        values = parse_assignments(request["text"], problem)
    except SmtlibParseError as error:
        return f"the answer {error}"
    missing = [name for name in problem.declared if name not in values]
    if missing:
        return f"there is no value for {missing[0][:40]}"
    try:
        status = decide(problem.to_script(values))
    except z3.Z3Exception as error:
        # the row is at fault if Z3 rejects it also without the values
        try:
            z3.parse_smt2_string(problem.to_script(), ctx=z3.Context())
        except z3.Z3Exception:
            raise InvalidRow(f"Z3 rejects `smt`: {_error_text(error)}") from None
        return f"a value does not fit: {_error_text(error)}"
    return None if status == "sat" else "the values do not meet the constraints"


def parse_assignments(text: str, problem: SmtProblem) -> dict[str, str]:
    """Returns a definition for each name to which the answer gives a value. Raises SmtlibParseError."""
    if not text.lstrip().startswith("("):
        return _parse_equations(text, problem)
    definitions = parse_sexprs(text)
    # the whole model in brackets, as Z3 prints it
    if len(definitions) == 1 and definitions[0][:1] != ["define-fun"]:
        definitions = [each for each in definitions[0] if each != "model"]
    result: dict[str, str] = {}
    for definition in definitions:
        name, checked = _parse_definition(definition, problem)
        if name in result:
            raise SmtlibParseError(f"defines {name[:40]!r} twice")
        result[name] = checked
    return result


def _parse_equations(text: str, problem: SmtProblem) -> dict[str, str]:
    """Returns the definitions of an answer of the form x = 5."""
    result = {}
    for name, value in ASSIGNMENT_PATTERN.findall(text):
        if name in problem.declared:
            sort = problem.declared[name][1]
            result[name] = f"(define-fun {name} () {format_sexpr(sort)} {_literal(value, sort)})"
    return result


def _parse_definition(definition: Any, problem: SmtProblem) -> tuple[str, str]:
    """Returns the name and the text of a (define-fun name (...) sort value), with the sorts of the row."""
    if not isinstance(definition, list) or len(definition) != 5 or definition[0] != "define-fun":
        raise SmtlibParseError("holds something other than (define-fun name (...) sort value)")
    _, name, bindings, _, value = definition
    if not isinstance(name, str) or not isinstance(bindings, list):
        raise SmtlibParseError("holds something other than (define-fun name (...) sort value)")
    if name not in problem.declared:
        raise SmtlibParseError(f"defines {name[:40]!r}, which is not declared")
    sorts, sort = problem.declared[name]
    parameters = [binding[0] for binding in bindings if _is_binding(binding)]
    has_all = len(parameters) == len(bindings) == len(sorts)
    if not has_all or not all(map(PARAMETER.fullmatch, parameters)):
        raise SmtlibParseError(f"gives {name[:40]!r} other parameters than it has")
    check_term(value, {*problem.names, *parameters})
    if sort == "Real":
        value = _to_real(value)
    listed = [
        f"({parameter} {format_sexpr(parameter_sort)})"
        for parameter, parameter_sort in zip(parameters, sorts, strict=True)
    ]
    return name, f"(define-fun {name} ({' '.join(listed)}) {format_sexpr(sort)} {format_sexpr(value)})"


def _is_binding(expression: Any) -> bool:
    """Returns whether an expression is (name sort)."""
    return isinstance(expression, list) and len(expression) == 2 and isinstance(expression[0], str)


def _to_real(term: Any) -> Any:
    """Returns a term of a real number with 5 and (- 5) as 5.0 and (- 5.0)."""
    if isinstance(term, str):
        return f"{term}.0" if term.isdigit() else term
    if term[0] in ("+", "-", "*", "/"):
        return [term[0], *map(_to_real, term[1:])]
    return term


def _literal(value: str, sort: Any) -> str:
    """Returns `-3`, `1.5` or `1/3` as a term of the sort, and other values as they are. Raises SmtlibParseError."""
    value = value.rstrip(".")
    if sort not in ("Int", "Real") or not NUMBER.fullmatch(value):
        check_term(value, ())
        return value
    numerator, _, denominator = value.lstrip("+-").partition("/")
    if denominator and not int(denominator):
        raise SmtlibParseError("divides by zero")
    number = Fraction(numerator) / int(denominator or 1)
    if sort == "Real":
        term = f"(/ {number.numerator}.0 {number.denominator}.0)"
    elif number.denominator == 1:
        term = str(number)
    else:
        raise SmtlibParseError(f"gives an integer the value {value[:40]}")
    return f"(- {term})" if value.startswith("-") else term


def invariant(request: Mapping[str, Any], decide: DecideFn) -> str | None:
    """Returns why a formula is not an invariant that implies the property; None if it is one."""
    import z3

    problem = SmtProblem(request["smt"])
    if any(command[0] == "assert" for command in problem.commands):
        raise InvalidRow("`smt` of an invariant may only have declarations; use `init` and `transition` for the rest")
    state = [name for name, (parameters, _) in problem.declared.items() if not parameters]
    next_state = [f"(declare-const {name}! {format_sexpr(problem.declared[name][1])})" for name in state]
    script = "\n".join([problem.to_script(), *next_state])
    init = _parse_row_term(request, "init")
    transition = _parse_row_term(request, "transition")
    goal = _parse_row_term(request, "property")
    # the other terms only so that Z3 checks their sorts
    tautologies = f"(assert (or {transition} (not {transition})))\n(assert (or {goal} (not {goal})))"
    if (
        _decide_row(
            decide,
            f"{script}\n(assert {init})\n{tautologies}",
            "the row",
        )
        == "unsat"
    ):
        raise InvalidRow("`init` can never hold")
    if request["text"] is None:
        return None
    try:
        formula = _parse_formula(
            request["text"],
            {*problem.declared, *problem.names},
            set(state),
        )
        now = format_sexpr(formula)
        then = format_sexpr(_prime_state_vars(formula, state))
        conditions = (
            ("does not hold at first", [init], now),
            ("is not kept by a step", [now, transition], then),
            ("does not imply the property", [now], goal),
        )
        for failure, premises, conclusion in conditions:
            asserted = "\n".join(f"(assert {premise})" for premise in premises)
            if decide(f"{script}\n{asserted}\n(assert (not {conclusion}))") == "sat":
                return f"the formula {failure}"
    except SmtlibParseError as error:
        return f"the answer {error}"
    except z3.Z3Exception as error:  # Z3 accepted the row above
        return f"Z3 rejects the formula: {_error_text(error)}"
    return None


def _parse_formula(
    text: str,
    names: Container[str],
    state: set[str],
) -> Any:
    """Returns the one term of an answer, or the body of its one definition over names of the state. Raises
    SmtlibParseError."""
    terms = parse_sexprs(text)
    if len(terms) != 1:
        raise SmtlibParseError("is not one formula")
    formula = terms[0]
    if isinstance(formula, list) and formula[:1] == ["define-fun"]:
        bindings = formula[2] if len(formula) == 5 else None
        if not isinstance(bindings, list):
            raise SmtlibParseError("defines something other than a formula over the row's variables")
        if not all(_is_binding(binding) and binding[0] in state for binding in bindings):
            raise SmtlibParseError("defines something other than a formula over the row's variables")
        formula = formula[4]
    check_term(formula, names)
    return formula


def _prime_state_vars(term: Any, state: list[str]) -> Any:
    """Returns a term after the step, with x! for x. Bound names are never names of the state."""
    if isinstance(term, str):
        return f"{term}!" if term in state else term
    return [_prime_state_vars(part, state) for part in term]

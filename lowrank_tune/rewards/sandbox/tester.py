"""The process that runs the tests of a row. What it calls is answered by the solver; what it expects does not leave it.

A name of the solution is a `Remote` here: calls, attributes and items of it are requests, plain values come back as
plain values of this process, and everything else stays with the solver and is a Remote too, which equals nothing.
Arguments that a call changed are changed.
"""

from __future__ import annotations

import ast
import builtins
import sys

from lowrank_tune.rewards.sandbox import text
from lowrank_tune.rewards.sandbox.talk import Talk
from lowrank_tune.rewards.sandbox.values import Unplain, Unreadable, decode, encode

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any, NoReturn

SHOWN = 80
ENDLESS = (StopIteration, StopAsyncIteration, GeneratorExit)  # would end the tests' own loops early


class Foul(Exception):
    """The solution gave what cannot be compared."""


class Fault(Exception):
    """The tests do what cannot be carried out."""


def serve(talk: Talk) -> None:
    """Runs one row's tests and tells how they ended: pass, fail, or fault where the row is to blame; and why."""
    source, strict = decode(talk.hear())
    line = Line(talk, strict)
    outcome, reason = run(source, line)
    talk.tell(b"V" + encode([outcome, reason, line.mistyped and outcome == "fail"]))


def run(source: str, line: Line) -> tuple[str, str]:
    """How tests end."""
    try:
        text.load("tests", source, {"__solution__": line.name, "__same__": line.same}, Compared)
    except BaseException as error:
        return judged(error, source, line)
    return ("pass", "") if line.calls else ("fault", "its tests never call the solution")


def judged(error: BaseException, source: str, line: Line) -> tuple[str, str]:
    """An exception of the tests: whose it is."""
    told = f"{type(error).__name__}: {str(error)[:SHOWN]}"
    if getattr(error, "of_solution", False):
        return "fail", f"raised {error}" if isinstance(error, Foreign) else f"raised {told}"
    if isinstance(error, Foul):
        return "fail", str(error)
    if isinstance(error, AssertionError):
        return "fail", f"{where(error, source)}{line.seen}"
    if isinstance(error, (Fault, NameError, ImportError, SyntaxError, SystemExit)) or not line.calls:
        return "fault", f"its tests raise {told} ({where(error, source)})"
    return "fail", f"{where(error, source)} raised {told}{line.seen}"


def where(error: BaseException, source: str) -> str:
    """The line of the tests that an exception passed last."""
    found, trace = "", error.__traceback__
    lines = source.splitlines()
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<tests>" and 0 < trace.tb_lineno <= len(lines):
            found = lines[trace.tb_lineno - 1].strip()
        trace = trace.tb_next
    return found[:SHOWN] + ("..." if len(found) > SHOWN else "")


class Compared(text.Text):
    """Tests whose == and != also look at types."""

    def source_to_code(self, data: Any, path: Any = "<tests>", *, _optimize: int = -1) -> Any:  # type: ignore[override]
        return compile(
            ast.fix_missing_locations(Comparisons().visit(ast.parse(data))),
            "<tests>",
            "exec",
            dont_inherit=True,
            optimize=0,
        )


class Comparisons(ast.NodeTransformer):
    """`a == b` becomes `__same__(a, b)`, and `a != b` its opposite. Chains stay what they are."""

    def visit_Compare(self, node: ast.Compare) -> ast.expr:
        self.generic_visit(node)
        if len(node.ops) != 1 or not isinstance(node.ops[0], (ast.Eq, ast.NotEq)):
            return node
        called = ast.Call(ast.Name("__same__", ast.Load()), [node.left, node.comparators[0]], [])
        made = called if isinstance(node.ops[0], ast.Eq) else ast.UnaryOp(ast.Not(), called)
        return ast.copy_location(made, node)


class Foreign(Exception):
    """An exception of the solution of no class that is known here; the message names it."""


class Line:
    """The requests to the solver. `mistyped`: the last values that were not the same were equal but for their types."""

    def __init__(self, talk: Talk, strict: bool) -> None:
        self._talk, self._strict = talk, strict
        self.calls = 0
        self.seen, self.mistyped = "", False

    def name(self, name: str) -> Any:
        """What the solution calls so."""
        return self.ask("name", name)

    def ask(self, what: str, target: Any, *rest: Any) -> Any:
        """A request and its answer."""
        try:
            request = encode([what, target, *rest], self._number)
        except Unplain as error:
            raise Fault(f"the tests hand {error} to the solution") from None
        self._talk.tell(b"C" + request)
        try:
            answer = decode(self._talk.hear(), lambda number: Remote(self, number))
        except Unreadable as error:
            raise Foul(f"returned what cannot be read: {error}") from None
        given = [*rest[0], *rest[1].values()] if what == "call" else []
        self.calls += what == "call"
        return self._taken(answer, given)

    def _taken(self, answer: Any, given: list[Any]) -> Any:
        """The value of an answer, with its changes made to the arguments. Whatever it may hold, it came from the
        solution."""
        match answer:
            case ["raised", [str(first), *names], str(message)]:
                raise_again([first, *(name for name in names if type(name) is str)], message)
            case ["value", value, int(same), dict(changed)] if -1 <= same < len(given) and set(changed) <= set(
                range(len(given))
            ):
                for place, new in changed.items():
                    change(given[place], new)
                return given[same] if same >= 0 else value
        raise Foul("wrote to the stream of its results")

    def _number(self, value: Any) -> int:
        if type(value) is not Remote:
            raise Unplain(f"a {type(value).__name__}")
        number: int = object.__getattribute__(value, "_number")
        return number

    def same(self, one: Any, other: Any) -> bool:
        """Whether two values are equal, types too where they count; the solution's objects equal nothing."""
        if type(one) is Remote or type(other) is Remote:
            raise Foul("returned what is no plain data")
        equal = bool(one == other)
        same = alike(one, other) if self._strict and (type(one) in PLAIN or type(other) in PLAIN) else equal
        if not same:
            self.seen, self.mistyped = f": got {shorter(one)}", equal
        return same


PLAIN = {bool, int, float, str, bytes, list, tuple, dict, set, frozenset, type(None)}


def alike(one: Any, other: Any) -> bool:
    """Equality as Python has it, except that True is not 1, nor is 1 + 0j, within lists, tuples and values of dicts
    too."""
    if any(isinstance(one, kind) != isinstance(other, kind) for kind in (bool, complex)):
        return False
    if type(one) is type(other) and isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(alike(*pair) for pair in zip(one, other, strict=True))
    if isinstance(one, dict) and isinstance(other, dict):
        return bool(one == other) and all(alike(value, other[key]) for key, value in one.items())
    return bool(one == other)


def shorter(value: Any) -> str:
    told = repr(value)
    return told[:SHOWN] + ("..." if len(told) > SHOWN else "")


def change(old: Any, new: Any) -> None:
    """Makes an argument what it is in the solver after the call."""
    if type(old) is not type(new):
        return
    if isinstance(old, (list, bytearray)):
        old[:] = new
    elif isinstance(old, (dict, set)):
        old.clear()
        old.update(new)
    elif isinstance(old, tuple):
        for pair in zip(old, new, strict=False):
            change(*pair)


def raise_again(names: list[str], message: str) -> NoReturn:
    """Raises the solution's exception as the nearest built-in class that tests may expect."""
    found = (getattr(builtins, name, None) for name in names)
    nearest = next(
        (made for made in found if isinstance(made, type) and issubclass(made, Exception) and made not in ENDLESS),
        Exception,
    )
    try:
        error = Foreign(f"{names[0]}: {message}") if nearest is Exception else nearest(message)
    except TypeError:  # UnicodeError and its like want more than a message
        error = Foreign(f"{names[0]}: {message}")
    error.of_solution = True  # type: ignore[attr-defined]
    raise error


class Remote:
    """Something of the solution."""

    __slots__ = ("_line", "_number")

    def __init__(self, line: Line, number: int) -> None:
        object.__setattr__(self, "_line", line)
        object.__setattr__(self, "_number", number)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return ask(self, "call", list(arguments), named)

    def __getattr__(self, name: str) -> Any:
        return ask(self, "get", name)

    def __setattr__(self, name: str, value: Any) -> None:
        ask(self, "set", name, value)

    def __getitem__(self, key: Any) -> Any:
        return ask(self, "item", key)

    def __len__(self) -> int:
        length = ask(self, "len")
        if type(length) is not int or length < 0:
            raise Foul("has no length")
        return length

    def __iter__(self) -> Iterator[Any]:
        found = ask(self, "iter")
        while values := ask(found, "next"):
            yield values[0]

    def __bool__(self) -> bool:
        raise Foul("returned what is no plain data")

    def __eq__(self, other: object) -> bool:
        raise Foul("returned what is no plain data")

    __hash__ = None  # type: ignore[assignment]


def ask(remote: Remote, what: str, *rest: Any) -> Any:
    line: Line = object.__getattribute__(remote, "_line")
    return line.ask(what, remote, *rest)


sys.setrecursionlimit(5000)

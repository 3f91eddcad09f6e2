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
from lowrank_tune.rewards.sandbox.handshake import AuthenticatedChannel
from lowrank_tune.rewards.sandbox.values import DeserializationError, NotSerializable, decode, encode

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any, NoReturn

MAX_DISPLAY_CHARS = 80
ITERATION_EXCEPTIONS = (StopIteration, StopAsyncIteration, GeneratorExit)  # would end the tests' own loops early


class UncomparableResult(Exception):
    """The solution gave what cannot be compared."""


class UnsupportedTest(Exception):
    """The tests do what cannot be carried out."""


def serve(channel: AuthenticatedChannel) -> None:
    """Runs one row's tests and tells how they ended: pass, fail, or fault where the row is to blame; and why."""
    source, strict = decode(channel.receive())
    client = CandidateClient(channel, strict)
    outcome, reason = run(source, client)
    channel.send(b"V" + encode([outcome, reason, client.mistyped and outcome == "fail"]))


def run(source: str, client: CandidateClient) -> tuple[str, str]:
    """How tests end."""
    try:
        text.load_module(
            "tests",
            source,
            {"__solution__": client.name, "__same__": client.values_equal},
            StrictComparisonLoader,
        )
    except BaseException as error:
        return attribute_exception(error, source, client)
    if client.calls:
        return ("pass", "")
    return ("fault", "its tests never call the solution")


def attribute_exception(error: BaseException, source: str, client: CandidateClient) -> tuple[str, str]:
    """An exception of the tests: whose it is."""
    summary = f"{type(error).__name__}: {str(error)[:MAX_DISPLAY_CHARS]}"
    if getattr(error, "of_solution", False):
        return "fail", f"raised {error}" if isinstance(error, UnknownCandidateException) else f"raised {summary}"
    if isinstance(error, UncomparableResult):
        return "fail", str(error)
    if isinstance(error, AssertionError):
        return "fail", f"{failing_line(error, source)}{client.seen}"
    if isinstance(error, (UnsupportedTest, NameError, ImportError, SyntaxError, SystemExit)) or not client.calls:
        return "fault", f"its tests raise {summary} ({failing_line(error, source)})"
    return "fail", f"{failing_line(error, source)} raised {summary}{client.seen}"


def failing_line(error: BaseException, source: str) -> str:
    """The line of the tests that an exception passed last."""
    line = ""
    trace = error.__traceback__
    lines = source.splitlines()
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<tests>" and 0 < trace.tb_lineno <= len(lines):
            line = lines[trace.tb_lineno - 1].strip()
        trace = trace.tb_next
    return line[:MAX_DISPLAY_CHARS] + ("..." if len(line) > MAX_DISPLAY_CHARS else "")


class StrictComparisonLoader(text.SourceTextLoader):
    """Tests whose == and != also look at types."""

    def source_to_code(self, data: Any, path: Any = "<tests>", *, _optimize: int = -1) -> Any:  # type: ignore[override]
        return compile(
            ast.fix_missing_locations(ComparisonRewriter().visit(ast.parse(data))),
            "<tests>",
            "exec",
            dont_inherit=True,
            optimize=0,
        )


class ComparisonRewriter(ast.NodeTransformer):
    """`a == b` becomes `__same__(a, b)`, and `a != b` its opposite. Chains stay what they are."""

    def visit_Compare(self, node: ast.Compare) -> ast.expr:
        self.generic_visit(node)
        if len(node.ops) != 1 or not isinstance(node.ops[0], (ast.Eq, ast.NotEq)):
            return node
        call = ast.Call(ast.Name("__same__", ast.Load()), [node.left, node.comparators[0]], [])
        replacement = call if isinstance(node.ops[0], ast.Eq) else ast.UnaryOp(ast.Not(), call)
        return ast.copy_location(replacement, node)


class UnknownCandidateException(Exception):
    """An exception of the solution of no class that is known here; the message names it."""


class CandidateClient:
    """The requests to the solver. `mistyped`: the last values that were not the same were equal but for their types."""

    def __init__(self, channel: AuthenticatedChannel, strict: bool) -> None:
        self._channel = channel
        self._strict = strict
        self.calls = 0
        self.seen = ""
        self.mistyped = False

    def name(self, name: str) -> Any:
        """What the solution calls so."""
        return self.request("name", name)

    def request(self, operation: str, target: Any, *rest: Any) -> Any:
        """A request and its answer."""
        try:
            request = encode([operation, target, *rest], self._number)
        except NotSerializable as error:
            raise UnsupportedTest(f"the tests hand {error} to the solution") from None
        self._channel.send(b"C" + request)
        try:
            answer = decode(self._channel.receive(), lambda number: Remote(self, number))
        except DeserializationError as error:
            raise UncomparableResult(f"returned what cannot be read: {error}") from None
        if operation == "call":
            argument_values = [*rest[0], *rest[1].values()]
        else:
            argument_values = []
        self.calls += operation == "call"
        return self._unwrap_reply(answer, argument_values)

    def _unwrap_reply(self, answer: Any, argument_values: list[Any]) -> Any:
        """The value of an answer, with its changes made to the arguments. Whatever it may hold, it came from the
        solution."""
        match answer:
            case ["raised", [str(first), *names], str(message)]:
                reraise([first, *(name for name in names if type(name) is str)], message)
            case ["value", value, int(same), dict(changed)] if -1 <= same < len(argument_values) and set(
                changed
            ) <= set(range(len(argument_values))):
                for argument_index, new in changed.items():
                    update_in_place(argument_values[argument_index], new)
                if same >= 0:
                    return argument_values[same]
                return value
        raise UncomparableResult("wrote to the stream of its results")

    def _number(self, value: Any) -> int:
        if type(value) is not Remote:
            raise NotSerializable(f"a {type(value).__name__}")
        number: int = object.__getattribute__(value, "_number")
        return number

    def values_equal(self, actual: Any, expected: Any) -> bool:
        """Whether two values are equal, types too where they count; the solution's objects equal nothing."""
        if type(actual) is Remote or type(expected) is Remote:
            raise UncomparableResult("returned what is no plain data")
        equal = bool(actual == expected)
        if self._strict and (type(actual) in PLAIN or type(expected) in PLAIN):
            is_equal = strictly_equal(actual, expected)
        else:
            is_equal = equal
        if not is_equal:
            self.seen = f": got {short_repr(actual)}"
            self.mistyped = equal
        return is_equal


PLAIN = {bool, int, float, str, bytes, list, tuple, dict, set, frozenset, type(None)}


def strictly_equal(first: Any, second: Any) -> bool:
    """Equality as Python has it, except that True is not 1, nor is 1 + 0j, within lists, tuples and values of dicts
    too."""
    if any(isinstance(first, kind) != isinstance(second, kind) for kind in (bool, complex)):
        return False
    if type(first) is type(second) and isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(strictly_equal(*pair) for pair in zip(first, second, strict=True))
    if isinstance(first, dict) and isinstance(second, dict):
        return bool(first == second) and all(strictly_equal(value, second[key]) for key, value in first.items())
    return bool(first == second)


def short_repr(value: Any) -> str:
    representation = repr(value)
    return representation[:MAX_DISPLAY_CHARS] + ("..." if len(representation) > MAX_DISPLAY_CHARS else "")


def update_in_place(old: Any, new: Any) -> None:
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
            update_in_place(*pair)


def reraise(names: list[str], message: str) -> NoReturn:
    """Raises the solution's exception as the nearest built-in class that tests may expect."""
    candidates = (getattr(builtins, name, None) for name in names)
    nearest = next(
        (
            candidate
            for candidate in candidates
            if isinstance(candidate, type)
            and issubclass(candidate, Exception)
            and candidate not in ITERATION_EXCEPTIONS
        ),
        Exception,
    )
    try:
        error = UnknownCandidateException(f"{names[0]}: {message}") if nearest is Exception else nearest(message)
    except TypeError:  # UnicodeError and its like want more than a message
        error = UnknownCandidateException(f"{names[0]}: {message}")
    error.of_solution = True  # type: ignore[attr-defined]
    raise error


class Remote:
    """Something of the solution."""

    __slots__ = ("_line", "_number")

    def __init__(self, client: CandidateClient, number: int) -> None:
        object.__setattr__(self, "_line", client)
        object.__setattr__(self, "_number", number)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return send_request(self, "call", list(arguments), named)

    def __getattr__(self, name: str) -> Any:
        return send_request(self, "get", name)

    def __setattr__(self, name: str, value: Any) -> None:
        send_request(self, "set", name, value)

    def __getitem__(self, key: Any) -> Any:
        return send_request(self, "item", key)

    def __len__(self) -> int:
        length = send_request(self, "len")
        if type(length) is not int or length < 0:
            raise UncomparableResult("has no length")
        return length

    def __iter__(self) -> Iterator[Any]:
        iterator = send_request(self, "iter")
        while values := send_request(iterator, "next"):
            yield values[0]

    def __bool__(self) -> bool:
        raise UncomparableResult("returned what is no plain data")

    def __eq__(self, other: object) -> bool:
        raise UncomparableResult("returned what is no plain data")

    __hash__ = None  # type: ignore[assignment]


def send_request(remote: Remote, operation: str, *rest: Any) -> Any:
    client: CandidateClient = object.__getattribute__(remote, "_line")
    return client.request(operation, remote, *rest)


sys.setrecursionlimit(5000)

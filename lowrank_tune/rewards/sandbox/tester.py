"""The confined process that runs the tests of a row. Its calls are sent to the solver; the values that it expects never
leave it.

A name of the solution is a `Remote` here. Its calls, attributes and items are requests to the solver. Plain values are
returned as plain values of this process. All other objects stay in the solver, and are a Remote too, which is not equal
to any value. Arguments that a call has changed in the solver are changed here.
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
ITERATION_EXCEPTIONS = (StopIteration, StopAsyncIteration, GeneratorExit)  # would end the loops of the tests


class UncomparableResult(Exception):
    """The solution returned something that cannot be compared."""


class UnsupportedTest(Exception):
    """The tests do something that cannot be sent to the solver."""


FAULTS_OF_TESTS = (UnsupportedTest, NameError, ImportError, SyntaxError, SystemExit)


def serve(channel: AuthenticatedChannel) -> None:
    """Runs the tests of one row and sends the result: pass, fail, or fault if the row is the cause; and the reason."""
    source, strict = decode(channel.receive())
    client = CandidateClient(channel, strict)
    outcome, reason = run(source, client)
    channel.send(b"V" + encode([outcome, reason, client.mistyped and outcome == "fail"]))


def run(source: str, client: CandidateClient) -> tuple[str, str]:
    """Returns the outcome of the tests and its reason."""
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


def attribute_exception(
    error: BaseException,
    source: str,
    client: CandidateClient,
) -> tuple[str, str]:
    """Returns the outcome and its reason for an exception, which the solution or the tests may have caused."""
    summary = f"{type(error).__name__}: {str(error)[:MAX_DISPLAY_CHARS]}"
    if getattr(error, "of_solution", False):
        return "fail", f"raised {error if isinstance(error, UnknownCandidateException) else summary}"
    if isinstance(error, UncomparableResult):
        return "fail", str(error)
    line = failing_line(error, source)
    if isinstance(error, AssertionError):
        return "fail", f"{line}{client.seen}"
    if isinstance(error, FAULTS_OF_TESTS) or not client.calls:
        return "fault", f"its tests raise {summary} ({line})"
    return "fail", f"{line} raised {summary}{client.seen}"


def failing_line(error: BaseException, source: str) -> str:
    """Returns the last line of the tests in the traceback of an exception."""
    line = ""
    trace = error.__traceback__
    lines = source.splitlines()
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<tests>" and 0 < trace.tb_lineno <= len(lines):
            line = lines[trace.tb_lineno - 1].strip()
        trace = trace.tb_next
    return truncate(line)


class StrictComparisonLoader(text.SourceTextLoader):
    """Loads tests in which == and != also compare types."""

    def source_to_code(  # type: ignore[override]
        self,
        data: Any,
        path: Any = "<tests>",
        *,
        _optimize: int = -1,
    ) -> Any:
        tree = ast.fix_missing_locations(ComparisonRewriter().visit(ast.parse(data)))
        return compile(
            tree,
            "<tests>",
            "exec",
            dont_inherit=True,
            optimize=0,
        )


class ComparisonRewriter(ast.NodeTransformer):
    """Replaces `a == b` by `__same__(a, b)` and `a != b` by `not __same__(a, b)`. Chains are not changed."""

    def visit_Compare(self, node: ast.Compare) -> ast.expr:
        self.generic_visit(node)
        if len(node.ops) != 1 or not isinstance(node.ops[0], (ast.Eq, ast.NotEq)):
            return node
        replacement: ast.expr = ast.Call(
            ast.Name("__same__", ast.Load()),
            [node.left, node.comparators[0]],
            [],
        )
        if isinstance(node.ops[0], ast.NotEq):
            replacement = ast.UnaryOp(ast.Not(), replacement)
        return ast.copy_location(replacement, node)


class UnknownCandidateException(Exception):
    """An exception of the solution whose class is not known here; the message has its name."""


class CandidateClient:
    """Sends requests to the solver. `calls`: the number of calls of the solution. `seen`: the last wrong value, for a
    reason. `mistyped`: whether that value differs from the expected one only in its type."""

    def __init__(self, channel: AuthenticatedChannel, strict: bool) -> None:
        self._channel = channel
        self._strict = strict
        self.calls = 0
        self.seen = ""
        self.mistyped = False

    def name(self, name: str) -> Any:
        """Returns the object of the solution with a name."""
        return self.request("name", name)

    def request(
        self,
        operation: str,
        target: Any,
        *rest: Any,
    ) -> Any:
        """Sends a request and returns the value of its reply."""
        try:
            request = encode(
                [
                    operation,
                    target,
                    *rest,
                ],
                self._number,
            )
        except NotSerializable as error:
            raise UnsupportedTest(f"the tests pass {error} to the solution") from None
        self._channel.send(b"C" + request)
        try:
            answer = decode(self._channel.receive(), lambda number: Remote(self, number))
        except DeserializationError as error:
            raise UncomparableResult(f"returned what cannot be read: {error}") from None
        argument_values = []
        if operation == "call":
            self.calls += 1
            argument_values = [*rest[0], *rest[1].values()]
        return self._unwrap_reply(answer, argument_values)

    def _unwrap_reply(self, answer: Any, argument_values: list[Any]) -> Any:
        """Returns the value of a reply, after its changes were made to the arguments. The reply comes from the process
        of the solution and may contain anything."""
        count = len(argument_values)
        match answer:
            case ["raised", [str(first), *names], str(message)]:
                reraise([first, *(name for name in names if type(name) is str)], message)
            case ["value", value, int(same), dict(changed)] if -1 <= same < count and set(changed) <= set(range(count)):
                for argument_index, new in changed.items():
                    update_in_place(argument_values[argument_index], new)
                return argument_values[same] if same >= 0 else value
        raise UncomparableResult("wrote to the stream of its results")

    def _number(self, value: Any) -> int:
        if type(value) is not Remote:
            raise NotSerializable(f"a {type(value).__name__}")
        number: int = object.__getattribute__(value, "_number")
        return number

    def values_equal(self, actual: Any, expected: Any) -> bool:
        """Returns whether two values are equal, with their types if types count. Raises UncomparableResult for an
        object of the solution."""
        if type(actual) is Remote or type(expected) is Remote:
            raise UncomparableResult("returned an object that is not plain data")
        equal = bool(actual == expected)
        if self._strict and (type(actual) in PLAIN or type(expected) in PLAIN):
            is_equal = strictly_equal(actual, expected)
        else:
            is_equal = equal
        if not is_equal:
            self.seen = f": got {short_repr(actual)}"
            self.mistyped = equal
        return is_equal


PLAIN = {
    bool,
    int,
    float,
    str,
    bytes,
    list,
    tuple,
    dict,
    set,
    frozenset,
    type(None),
}


def strictly_equal(first: Any, second: Any) -> bool:
    """Returns whether two values are equal as in Python, except that True and 1 + 0j are not equal to 1, also in lists,
    tuples and values of dicts."""
    for kind in (bool, complex):
        if isinstance(first, kind) != isinstance(second, kind):
            return False
    if type(first) is type(second) and isinstance(first, (list, tuple)):
        if len(first) != len(second):
            return False
        return all(strictly_equal(*pair) for pair in zip(first, second, strict=True))
    equal = bool(first == second)
    if equal and isinstance(first, dict) and isinstance(second, dict):
        return all(strictly_equal(value, second[key]) for key, value in first.items())
    return equal


def short_repr(value: Any) -> str:
    return truncate(repr(value))


def truncate(text: str) -> str:
    """Returns the beginning of a text."""
    return text[:MAX_DISPLAY_CHARS] + ("..." if len(text) > MAX_DISPLAY_CHARS else "")


def update_in_place(old: Any, new: Any) -> None:
    """Changes an argument to its value in the solver after the call."""
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
    """Raises an exception of the solution as its most specific built-in class, which the tests may expect."""
    candidates = (getattr(builtins, name, None) for name in names)
    nearest: Any = next(filter(is_expected_exception, candidates), Exception)
    unknown = UnknownCandidateException(f"{names[0]}: {message}")
    try:
        error: Any = unknown if nearest is Exception else nearest(message)
    except TypeError:  # UnicodeError and some others need more arguments
        error = unknown
    error.of_solution = True
    raise error


def is_expected_exception(value: Any) -> bool:
    """Returns whether a value is a class of exceptions that does not end the loops of the tests."""
    return isinstance(value, type) and issubclass(value, Exception) and value not in ITERATION_EXCEPTIONS


class Remote:
    """An object of the solution."""

    __slots__ = ("_line", "_number")

    def __init__(self, client: CandidateClient, number: int) -> None:
        object.__setattr__(self, "_line", client)
        object.__setattr__(self, "_number", number)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return send_request(
            self,
            "call",
            list(arguments),
            named,
        )

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
        raise UncomparableResult("returned an object that is not plain data")

    def __eq__(self, other: object) -> bool:
        raise UncomparableResult("returned an object that is not plain data")

    __hash__ = None  # type: ignore[assignment]


def send_request(
    remote: Remote,
    operation: str,
    *rest: Any,
) -> Any:
    client: CandidateClient = object.__getattribute__(remote, "_line")
    return client.request(operation, remote, *rest)


# for values that are nested deeply
sys.setrecursionlimit(5000)

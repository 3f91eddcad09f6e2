"""The process that runs what a model wrote. It gets the code and arguments, and never learns what a test expects."""

from __future__ import annotations

from lowrank_tune.rewards.sandbox import text
from lowrank_tune.rewards.sandbox.handshake import AuthenticatedChannel
from lowrank_tune.rewards.sandbox.values import decode, encode

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

MAX_MESSAGE_CHARS = 300
MAX_OBJECTS = 100_000  # objects that a test may hold on to
ONLY_AST = 0x400  # ast.PyCF_ONLY_AST; that module costs a start too much


def serve(channel: AuthenticatedChannel) -> None:
    """Loads the code, then answers requests until the other side is gone."""
    message = decode(channel.receive())
    try:
        module = text.load_module(
            "solution",
            complete_program(message["prompt"], message["code"], message["entry"]),
            {},
        )
    except BaseException as error:
        channel.send(describe_exception(error))
        return
    channel.send(encode(["loaded"]))
    namespace = CandidateNamespace(module.__dict__)
    while True:
        request = channel.receive()
        try:
            answer = namespace.answer(request)
        except BaseException as error:
            answer = describe_exception(error)
        channel.send(answer)


class CandidateNamespace:
    """What tests can reach: the names of the solution, and its objects that are no plain data, by number."""

    def __init__(self, names: dict[str, Any]) -> None:
        self.names = names
        self.objects: list[Any] = []
        self.numbers: dict[int, int] = {}

    def register(self, value: Any) -> int:
        """The number of an object, the same every time."""
        number = self.numbers.setdefault(id(value), len(self.objects))
        if number == len(self.objects):
            if number >= MAX_OBJECTS:
                raise MemoryError("too many objects")
            self.objects.append(value)
        return number

    def answer(self, request: bytes) -> bytes:
        """The reply to one request: the value, which argument it is (-1: none), and the arguments that the call has
        changed, by place."""
        operation, target, *rest = decode(request, self.objects.__getitem__)
        if operation != "call":
            return encode(["value", self.get_attribute(operation, target, *rest), -1, {}], self.register)
        arguments, named = rest
        argument_values = [*arguments, *named.values()]
        before = [encode(value, self.register) for value in argument_values]
        result = target(*arguments, **named)
        changed = {
            index: value for index, value in enumerate(argument_values) if encode(value, self.register) != before[index]
        }
        same = next(
            (
                index
                for index, value in enumerate(argument_values)
                if value is result and type(value) in (list, dict, set, bytearray)
            ),
            -1,
        )
        return encode(["value", result if same < 0 else None, same, changed], self.register)

    def get_attribute(self, operation: str, target: Any, *rest: Any) -> Any:
        """Everything but a call."""
        if operation == "name":
            if target not in self.names:
                raise NameError(f"name '{target}' is not defined")
            return self.names[target]
        if operation == "next":
            return next_or_empty(target)
        if operation == "get":
            return getattr(target, *rest)
        if operation == "set":
            return setattr(target, *rest)
        if operation == "item":
            return target[rest[0]]
        if operation == "iter":
            return iter(target)
        return len(target)


def next_or_empty(iterator: Any) -> list[Any]:
    """The next value of an iterator in a list, an empty one at its end."""
    for value in iterator:
        return [value]
    return []


def describe_exception(error: BaseException) -> bytes:
    """An exception as the names of its classes, the nearest first, and its message."""
    try:
        message = str(error)[:MAX_MESSAGE_CHARS]
    except BaseException:
        message = "(its message raises too)"
    if isinstance(error, SyntaxError):
        message = f"{error.msg} (line {error.lineno})"
    return encode(["raised", [base.__name__[:80] for base in type(error).__mro__], message])


def complete_program(prompt: str, code: str, entry: str) -> str:
    """The text to run. Where a prompt begins a function `entry`, the code may be that function again, without its
    imports, or its body."""
    if not prompt:
        return code
    if defines(code, entry):
        candidates = [function_preamble(prompt, entry) + code, code]
    else:
        indented = "".join(f"    {line}" for line in code.splitlines(True))
        candidates = [prompt + code, f"{prompt.rstrip()}\n{code}", f"{prompt.rstrip()}\n{indented}", code]
    return next((candidate for candidate in candidates if compiles(candidate)), code)


def compiles(source: str) -> bool:
    try:
        compile(source, "<solution>", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def definition_line(source: str, entry: str) -> int | None:
    """The first line of the statement at the top of a text that makes the name; None where there is none."""
    try:
        tree: Any = compile(source, "<solution>", "exec", ONLY_AST, dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    for statement in tree.body:
        defined = [
            getattr(statement, "name", ""),
            *(getattr(target, "id", "") for target in getattr(statement, "targets", [])),
        ]
        if entry in defined:
            first: int = min(
                [statement.lineno, *(decorator.lineno for decorator in getattr(statement, "decorator_list", []))]
            )
            return first
    return None


def defines(source: str, entry: str) -> bool:
    return definition_line(source, entry) is not None


def function_preamble(prompt: str, entry: str) -> str:
    """What stands before the function in a prompt: imports and helpers."""
    line = definition_line(prompt, entry)
    if line is not None:
        return "".join(prompt.splitlines(True)[: line - 1])
    return ""

"""The confined process that runs the code of a model. It receives the code and arguments, and never what a test
expects."""

from __future__ import annotations

from lowrank_tune.rewards.sandbox import text
from lowrank_tune.rewards.sandbox.handshake import AuthenticatedChannel
from lowrank_tune.rewards.sandbox.values import decode, encode

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

MAX_MESSAGE_CHARS = 300
MAX_OBJECTS = 100_000  # objects that a test may refer to
MUTABLE_TYPES = (list, dict, set, bytearray)
ONLY_AST = 0x400  # ast.PyCF_ONLY_AST; an import of that module would take too long


def serve(channel: AuthenticatedChannel) -> None:
    """Loads the code, then answers requests until the channel is closed."""
    message = decode(channel.receive())
    try:
        program = complete_program(message["prompt"], message["code"], message["entry"])
        module = text.load_module("solution", program, {})
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
    """What tests can use: the names of the solution, and by number its objects that are not plain values."""

    def __init__(self, names: dict[str, Any]) -> None:
        self.names = names
        self.objects: list[Any] = []
        self.numbers: dict[int, int] = {}

    def register(self, value: Any) -> int:
        """Returns the number of an object, always the same for one object."""
        number = self.numbers.setdefault(id(value), len(self.objects))
        if number == len(self.objects):
            if number >= MAX_OBJECTS:
                raise MemoryError("too many objects")
            self.objects.append(value)
        return number

    def answer(self, request: bytes) -> bytes:
        """Returns the reply to one request: the value, the index of the argument that it is (-1: none), and the
        arguments that the call has changed, by index."""
        operation, target, *rest = decode(request, self.objects.__getitem__)
        if operation != "call":
            value = self.get_attribute(operation, target, *rest)
            return encode(
                [
                    "value",
                    value,
                    -1,
                    {},
                ],
                self.register,
            )
        arguments, named = rest
        argument_values = [*arguments, *named.values()]
        before = [encode(value, self.register) for value in argument_values]
        result = target(*arguments, **named)
        changed = {}
        for index, value in enumerate(argument_values):
            if encode(value, self.register) != before[index]:
                changed[index] = value
        same = -1
        for index, value in enumerate(argument_values):
            if same < 0 and value is result and type(value) in MUTABLE_TYPES:
                same = index
        return encode(
            [
                "value",
                result if same < 0 else None,
                same,
                changed,
            ],
            self.register,
        )

    def get_attribute(
        self,
        operation: str,
        target: Any,
        *rest: Any,
    ) -> Any:
        """Returns the value of a request that is not a call."""
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
    """Returns the next value of an iterator in a list, and an empty list at its end."""
    for value in iterator:
        return [value]
    return []


def describe_exception(error: BaseException) -> bytes:
    """Returns the reply for an exception: the names of its classes, the most specific first, and its message."""
    try:
        message = str(error)[:MAX_MESSAGE_CHARS]
    except BaseException:
        message = "(its message raises too)"
    if isinstance(error, SyntaxError):
        message = f"{error.msg} (line {error.lineno})"
    return encode(
        [
            "raised",
            [base.__name__[:80] for base in type(error).__mro__],
            message,
        ]
    )


def complete_program(
    prompt: str,
    code: str,
    entry: str,
) -> str:
    """Returns the program to run. If a prompt begins a function `entry`, the code may repeat that function without its
    imports, or be its body."""
    if not prompt:
        return code
    if defines(code, entry):
        candidates = [function_preamble(prompt, entry) + code, code]
    else:
        indented = "".join(f"    {line}" for line in code.splitlines(True))
        candidates = [
            prompt + code,
            f"{prompt.rstrip()}\n{code}",
            f"{prompt.rstrip()}\n{indented}",
            code,
        ]
    for candidate in candidates:
        if compiles(candidate):
            return candidate
    return code


def compiles(source: str) -> bool:
    return compile_or_none(source, 0) is not None


def compile_or_none(source: str, flags: int) -> Any:
    """Returns the code, or with the flag ONLY_AST the syntax tree, of a text; None if it is not Python."""
    try:
        return compile(
            source,
            "<solution>",
            "exec",
            flags,
            dont_inherit=True,
        )
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def definition_line(source: str, entry: str) -> int | None:
    """Returns the first line of the top-level statement that defines a name; None if there is none."""
    tree = compile_or_none(source, ONLY_AST)
    if tree is None:
        return None
    for statement in tree.body:
        targets = getattr(statement, "targets", [])
        defined = [
            getattr(
                statement,
                "name",
                "",
            ),
            *(
                getattr(
                    target,
                    "id",
                    "",
                )
                for target in targets
            ),
        ]
        if entry in defined:
            decorators = getattr(statement, "decorator_list", [])
            return int(min(node.lineno for node in (statement, *decorators)))
    return None


def defines(source: str, entry: str) -> bool:
    return definition_line(source, entry) is not None


def function_preamble(prompt: str, entry: str) -> str:
    """Returns the part of a prompt before the function: imports and helpers."""
    line = definition_line(prompt, entry)
    if line is None:
        return ""
    return "".join(prompt.splitlines(True)[: line - 1])

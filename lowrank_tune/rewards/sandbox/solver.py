"""The process that runs what a model wrote. It gets the code and arguments, and never learns what a test expects."""

from __future__ import annotations

from lowrank_tune.rewards.sandbox import text
from lowrank_tune.rewards.sandbox.talk import Talk
from lowrank_tune.rewards.sandbox.values import decode, encode

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

LONGEST_MESSAGE = 300
MOST_KEPT = 100_000  # objects that a test may hold on to
ONLY_TREE = 0x400  # ast.PyCF_ONLY_AST; that module costs a start too much


def serve(talk: Talk) -> None:
    """Loads the code, then answers requests until the other side is gone."""
    asked = decode(talk.hear())
    try:
        module = text.load("solution", whole(asked["prompt"], asked["code"], asked["entry"]), {})
    except BaseException as error:
        talk.tell(raised(error))
        return
    talk.tell(encode(["loaded"]))
    held = Held(module.__dict__)
    while True:
        request = talk.hear()
        try:
            answer = held.answer(request)
        except BaseException as error:
            answer = raised(error)
        talk.tell(answer)


class Held:
    """What tests can reach: the names of the solution, and its objects that are no plain data, by number."""

    def __init__(self, names: dict[str, Any]) -> None:
        self.names = names
        self.kept: list[Any] = []
        self.numbers: dict[int, int] = {}

    def keep(self, value: Any) -> int:
        """The number of an object, the same every time."""
        number = self.numbers.setdefault(id(value), len(self.kept))
        if number == len(self.kept):
            if number >= MOST_KEPT:
                raise MemoryError("too many objects")
            self.kept.append(value)
        return number

    def answer(self, request: bytes) -> bytes:
        """The reply to one request: the value, which argument it is (-1: none), and the arguments that the call has
        changed, by place."""
        what, target, *rest = decode(request, self.kept.__getitem__)
        if what != "call":
            return encode(["value", self.look(what, target, *rest), -1, {}], self.keep)
        arguments, named = rest
        given = [*arguments, *named.values()]
        before = [encode(each, self.keep) for each in given]
        result = target(*arguments, **named)
        changed = {place: each for place, each in enumerate(given) if encode(each, self.keep) != before[place]}
        same = next(
            (
                place
                for place, each in enumerate(given)
                if each is result and type(each) in (list, dict, set, bytearray)
            ),
            -1,
        )
        return encode(["value", result if same < 0 else None, same, changed], self.keep)

    def look(self, what: str, target: Any, *rest: Any) -> Any:
        """Everything but a call."""
        if what == "name":
            if target not in self.names:
                raise NameError(f"name '{target}' is not defined")
            return self.names[target]
        if what == "next":
            return each(target)
        if what == "get":
            return getattr(target, *rest)
        if what == "set":
            return setattr(target, *rest)
        if what == "item":
            return target[rest[0]]
        return iter(target) if what == "iter" else len(target)


def each(iterator: Any) -> list[Any]:
    """The next value of an iterator in a list, an empty one at its end."""
    for value in iterator:
        return [value]
    return []


def raised(error: BaseException) -> bytes:
    """An exception as the names of its classes, the nearest first, and its message."""
    try:
        message = str(error)[:LONGEST_MESSAGE]
    except BaseException:
        message = "(its message raises too)"
    if isinstance(error, SyntaxError):
        message = f"{error.msg} (line {error.lineno})"
    return encode(["raised", [known.__name__[:80] for known in type(error).__mro__], message])


def whole(prompt: str, code: str, entry: str) -> str:
    """The text to run. Where a prompt begins a function `entry`, the code may be that function again, without its
    imports, or its body."""
    if not prompt:
        return code
    if defines(code, entry):
        ways = [beginning(prompt, entry) + code, code]
    else:
        indented = "".join(f"    {line}" for line in code.splitlines(True))
        ways = [prompt + code, f"{prompt.rstrip()}\n{code}", f"{prompt.rstrip()}\n{indented}", code]
    return next((way for way in ways if compiles(way)), code)


def compiles(source: str) -> bool:
    try:
        compile(source, "<solution>", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def place_of(source: str, entry: str) -> int | None:
    """The first line of the statement at the top of a text that makes the name; None where there is none."""
    try:
        tree: Any = compile(source, "<solution>", "exec", ONLY_TREE, dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    for statement in tree.body:
        made = [
            getattr(statement, "name", ""),
            *(getattr(target, "id", "") for target in getattr(statement, "targets", [])),
        ]
        if entry in made:
            first: int = min([statement.lineno, *(mark.lineno for mark in getattr(statement, "decorator_list", []))])
            return first
    return None


def defines(source: str, entry: str) -> bool:
    return place_of(source, entry) is not None


def beginning(prompt: str, entry: str) -> str:
    """What stands before the function in a prompt: imports and helpers."""
    place = place_of(prompt, entry)
    return "".join(prompt.splitlines(True)[: place - 1]) if place is not None else ""

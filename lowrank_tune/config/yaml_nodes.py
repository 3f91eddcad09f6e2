"""A recipe as read: plain data in which every value remembers the file and line that it came from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from lowrank_tune.errors import ConfigProblem

MAX_DEPTH = 20
INFINITE_INT_BOUND = 10**40

Path = tuple[str | int, ...]


@dataclass(frozen=True)
class SourcePosition:
    """Where something stands. Data that came from Python has neither file nor line."""

    file: str = ""
    line: int | None = None

    def problem(self, message: str, path: Path = ()) -> ConfigProblem:
        return ConfigProblem(message, dotted(path), self.file, self.line)


@dataclass
class Node:
    """A mapping (`dict[str, Node]`), a list (`list[Node]`) or a scalar, and where its key stands."""

    value: Any
    position: SourcePosition


@dataclass(frozen=True)
class SourceTree:
    """The tree that a recipe was read from. It takes no part in comparisons: equal settings make equal recipes."""

    root: Node = field(default_factory=lambda: Node({}, SourcePosition()), compare=False)


def dotted(path: Path) -> str:
    """`data.train.0.max_samples`; whatever is not printable is escaped, so that a fault never breaks the screen."""
    return ".".join(word if word.isprintable() else ascii(word) for word in map(str, path))


def to_python(node: Node) -> Any:
    """The data without its places."""
    if isinstance(node.value, dict):
        return {key: to_python(child) for key, child in node.value.items()}
    if isinstance(node.value, list):
        return [to_python(child) for child in node.value]
    return node.value


def find_node(node: Node, path: Path) -> Node | None:
    """The node at a path, or None."""
    for step in path:
        value = node.value
        is_key = isinstance(value, dict) and step in value
        is_index = isinstance(value, list) and isinstance(step, int) and 0 <= step < len(value)
        if not (is_key or is_index):
            return None
        node = value[step]
    return node


def nearest_node(node: Node, path: Path) -> Node:
    """The node at a path, or its closest ancestor that was written: there a missing key would have stood."""
    for length in range(len(path), 0, -1):
        if (nearest := find_node(node, path[:length])) is not None:
            return nearest
    return node


def remove_key(node: Node, path: Path) -> None:
    """Takes a key out of its mapping."""
    parent = find_node(node, path[:-1])
    if parent is not None and isinstance(parent.value, dict):
        parent.value.pop(path[-1], None)


def invalid_text(text: str) -> str:
    """Why a text cannot be a value, or an empty string."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return "holds half of a surrogate pair, which is no character"
    if any(ord(letter) < 32 and letter not in "\t\n\r" for letter in text):
        return "holds a control character"
    return ""


def from_python(data: Any, position: SourcePosition, problems: list[ConfigProblem], path: Path = ()) -> Node:
    """Plain Python data as a tree. Keys that are no text, and nesting without end, become faults."""
    if len(path) > MAX_DEPTH:
        problems.append(position.problem(f"is nested more than {MAX_DEPTH} levels deep", path))
        return Node(None, position)
    if isinstance(data, dict):
        children: dict[str, Node] = {}
        for key, value in data.items():
            if isinstance(key, str):
                children[key] = from_python(value, position, problems, (*path, key))
            else:
                problems.append(position.problem(f"a key must be text, not {key!r:.40}", path))
        return Node(children, position)
    if isinstance(data, (list, tuple)):
        return Node(
            [from_python(value, position, problems, (*path, index)) for index, value in enumerate(data)], position
        )
    if isinstance(data, str) and (reason := invalid_text(data)):
        problems.append(position.problem(reason, path))
    elif isinstance(data, int) and abs(data) >= INFINITE_INT_BOUND:
        problems.append(position.problem("is an endless number", path))
    else:
        return Node(data, position)
    return Node(None, position)


def leaves(data: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Every scalar, and every empty mapping or list, of plain data."""
    if isinstance(data, dict) and data:
        for key, value in data.items():
            yield from leaves(value, (*path, key))
    elif isinstance(data, (list, tuple)) and data:
        for index, value in enumerate(data):
            yield from leaves(value, (*path, index))
    else:
        yield path, data

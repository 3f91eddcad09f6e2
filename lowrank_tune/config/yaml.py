"""Strict YAML: from text to a tree in which every value has its file and line.

Only the event stream of PyYAML is used, so that nothing recurses and every value is checked before it is built. This
module decides the type of a plain word: the numbers of YAML 1.2 (`1e-5` is one), `true` and `false`, `null`; every
other word (`no`, `12:30`, `010`, `2026-01-01`) is text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml

from lowrank_tune.config.base import Path
from lowrank_tune.errors import ConfigProblem

MAX_BYTES = 256 * 1024
MAX_VALUES = 2_000
MAX_DEPTH = 20
MAX_DIGITS = 40

INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*)")
DECIMAL = re.compile(r"[-+]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?")
CONSTANTS = {
    "": None,
    "~": None,
    "null": None,
    "Null": None,
    "NULL": None,
    "true": True,
    "false": False,
    ".inf": float("inf"),
    "+.inf": float("inf"),
    "-.inf": float("-inf"),
    ".nan": float("nan"),
}


@dataclass(frozen=True)
class SourcePosition:
    """File and line of a value. Data that was made in Python has neither."""

    file: str = ""
    line: int | None = None

    def problem(self, message: str, path: Path = ()) -> ConfigProblem:
        return ConfigProblem(
            message,
            dotted(path),
            self.file,
            self.line,
        )


@dataclass
class Node:
    """A mapping (`dict[str, Node]`), a list (`list[Node]`) or a scalar, with the position of its key."""

    value: Any
    position: SourcePosition

    def problem(self, message: str, path: Path) -> ConfigProblem:
        """Returns a problem of the setting at `path` below this node, at its line. A setting that is missing is at the
        line of its section."""
        return nearest_node(self, path).position.problem(message, path)


@dataclass(frozen=True)
class SourceTree:
    """The tree that a recipe was read from. It is not compared: equal settings are equal recipes."""

    root: Node = field(
        default_factory=lambda: Node({}, SourcePosition()),
        compare=False,
    )


def dotted(path: Path) -> str:
    """Returns `data.train.0.max_samples`. Characters that are not printable are escaped, as paths are printed."""
    words = map(str, path)
    return ".".join(word if word.isprintable() else ascii(word) for word in words)


def to_python(node: Node) -> Any:
    """Returns the data without positions."""
    if isinstance(node.value, dict):
        return {key: to_python(child) for key, child in node.value.items()}
    if isinstance(node.value, list):
        return [to_python(child) for child in node.value]
    return node.value


def find_node(node: Node, path: Path) -> Node | None:
    """Returns the node at a path, or None."""
    for step in path:
        if not has_entry(node.value, step):
            return None
        node = node.value[step]
    return node


def has_entry(value: Any, step: str | int) -> bool:
    """Returns whether a mapping has this key, or a list this index."""
    if isinstance(value, list):
        return isinstance(step, int) and 0 <= step < len(value)
    return isinstance(value, dict) and step in value


def nearest_node(node: Node, path: Path) -> Node:
    """Returns the node at a path, or its closest parent that exists."""
    for length in range(len(path), 0, -1):
        nearest = find_node(node, path[:length])
        if nearest is not None:
            return nearest
    return node


def remove_key(node: Node, path: Path) -> None:
    """Removes a key from its mapping."""
    parent = find_node(node, path[:-1])
    if parent is not None and isinstance(parent.value, dict):
        parent.value.pop(path[-1], None)


def leaves(data: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Yields every scalar, and every empty mapping or list, of plain data."""
    if isinstance(data, dict) and data:
        for key, value in data.items():
            yield from leaves(value, (*path, key))
    elif isinstance(data, (list, tuple)) and data:
        for index, value in enumerate(data):
            yield from leaves(value, (*path, index))
    else:
        yield path, data


def invalid_text(text: str) -> str:
    """Returns why a text cannot be a value, or an empty string."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return "contains half of a surrogate pair, which is not a character"
    if any(ord(letter) < 32 and letter not in "\t\n\r" for letter in text):
        return "contains a control character"
    return ""


def from_python(
    data: Any,
    position: SourcePosition,
    problems: list[ConfigProblem],
    path: Path = (),
) -> Node:
    """Returns plain Python data as a tree. Adds a problem for each key or value that a recipe cannot contain."""
    if len(path) > MAX_DEPTH:
        problems.append(position.problem(f"is nested more than {MAX_DEPTH} levels deep", path))
        return Node(None, position)
    if isinstance(data, dict):
        children: dict[str, Node] = {}
        for key, value in data.items():
            if isinstance(key, str):
                children[key] = from_python(
                    value,
                    position,
                    problems,
                    (*path, key),
                )
            else:
                problems.append(position.problem(f"a key must be text, not {key!r:.40}", path))
        return Node(children, position)
    if isinstance(data, (list, tuple)):
        entries = [from_python(value, position, problems, (*path, index)) for index, value in enumerate(data)]
        return Node(entries, position)
    reason = ""
    if isinstance(data, str):
        reason = invalid_text(data)
    elif isinstance(data, int) and abs(data) >= 10**MAX_DIGITS:
        reason = f"has more than {MAX_DIGITS} digits"
    if reason:
        problems.append(position.problem(reason, path))
        return Node(None, position)
    return Node(data, position)


def parse_scalar(text: str) -> Any:
    """Returns the value of a plain (unquoted) word."""
    if text in CONSTANTS:
        return CONSTANTS[text]
    if len(text) <= MAX_DIGITS:
        if INTEGER.fullmatch(text):
            return int(text)
        if DECIMAL.fullmatch(text):
            return float(text)
    return text


class YamlSyntaxError(Exception):
    """The text cannot be read beyond this line."""

    def __init__(self, message: str, line: int) -> None:
        super().__init__(message)
        self.message = message
        self.line = line


def decode(raw: bytes) -> str:
    """Returns the text of a file. Raises YamlSyntaxError if it is too large, not UTF-8, or indented with tabs."""
    if len(raw) > MAX_BYTES:
        raise YamlSyntaxError(f"has {len(raw):,} bytes, and a recipe has at most {MAX_BYTES:,}", 1)
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise YamlSyntaxError("is not UTF-8 text here", raw[: error.start].count(b"\n") + 1) from None
    for number, line in enumerate(text.split("\n"), 1):
        indentation = line[: len(line) - len(line.lstrip())]
        if "\t" in indentation and line.strip():
            raise YamlSyntaxError("is indented with a tab; YAML needs spaces", number)
    return text


class YamlComposer:
    """Builds the tree from events. Its own stack finds depth, size, duplicates and forbidden features at once."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.problems: list[ConfigProblem] = []
        self.root: Node | None = None
        self.stack: list[Node] = []
        self.keys: list[tuple[str, int] | None] = []
        """For each open mapping, the key whose value comes next, and its line."""
        self.path: list[str | int] = []
        self.count = 0
        self.documents = 0

    def add_problem(
        self,
        message: str,
        line: int,
        path: Path | None = None,
    ) -> None:
        if path is None:
            path = self.current_path()
        self.problems.append(SourcePosition(self.file, line).problem(message, path))

    def current_path(self) -> Path:
        """Returns the path of the value that comes next."""
        if self.stack and isinstance(self.stack[-1].value, list):
            return (*self.path, len(self.stack[-1].value))
        if self.keys and self.keys[-1]:
            return (*self.path, self.keys[-1][0])
        return tuple(self.path)

    def compose(self, text: str) -> None:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            line = event.start_mark.line + 1 if event.start_mark else 1
            if isinstance(event, yaml.DocumentStartEvent):
                self.documents += 1
                if self.documents > 1:
                    raise YamlSyntaxError("a second document begins; a recipe is one", line)
                if event.version or event.tags:
                    raise YamlSyntaxError("has a YAML directive (%); a recipe needs none", line)
            elif isinstance(event, yaml.AliasEvent):
                self.add_problem(f"has an alias (*{event.anchor:.40}); write the value out, or use `extends`", line)
                self.add_value(Node(None, SourcePosition(self.file, line)), line)
            elif isinstance(event, (yaml.ScalarEvent, yaml.MappingStartEvent, yaml.SequenceStartEvent)):
                self.open_node(event, line)
            elif isinstance(event, (yaml.MappingEndEvent, yaml.SequenceEndEvent)):
                if isinstance(event, yaml.MappingEndEvent):
                    self.keys.pop()
                self.stack.pop()
                self.close_node()

    def open_node(self, event: Any, line: int) -> None:
        """Adds a scalar, or opens a mapping or list."""
        self.count += 1
        if self.count > MAX_VALUES:
            raise YamlSyntaxError(f"has more than {MAX_VALUES:,} values", line)
        if event.anchor:
            self.add_problem(f"has an anchor (&{event.anchor:.40}); write the value out, or use `extends`", line)
        if event.tag:
            self.add_problem(f"has a tag ({event.tag:.40}); a recipe contains plain data", line)
        is_key = bool(self.stack) and isinstance(self.stack[-1].value, dict) and self.keys[-1] is None
        if isinstance(event, yaml.ScalarEvent):
            self.add_scalar(event, line, is_key)
        elif is_key:
            raise YamlSyntaxError(
                "a key must be a word, not a mapping or a list (a value that begins with a brace needs quotes)", line
            )
        else:
            self.open_container(isinstance(event, yaml.MappingStartEvent), line)

    def open_container(self, is_mapping: bool, line: int) -> None:
        if len(self.stack) >= MAX_DEPTH:
            raise YamlSyntaxError(f"is nested more than {MAX_DEPTH} levels deep", line)
        node = Node({} if is_mapping else [], SourcePosition(self.file, line))
        self.add_value(node, line, is_open=True)
        self.stack.append(node)
        if is_mapping:
            self.keys.append(None)

    def add_scalar(
        self,
        event: Any,
        line: int,
        is_key: bool,
    ) -> None:
        """Adds a scalar as a key or a value. A quoted one is text."""
        value = event.value
        if event.implicit[0]:
            value = parse_scalar(event.value)
        if is_key:
            self.add_key(event.value, value, line)
            return
        if isinstance(value, str) and (reason := invalid_text(value)):
            self.add_problem(reason, line)
            value = None
        self.add_value(Node(value, SourcePosition(self.file, line)), line)

    def add_key(
        self,
        text: str,
        value: Any,
        line: int,
    ) -> None:
        if text == "<<":
            self.add_problem("is a merge key; use `extends`", line, (*self.path, text))
        elif not isinstance(value, str):
            self.add_problem(f"a key must be a word, and `{text:.40}` is not one", line)
        elif reason := invalid_text(text):
            self.add_problem(f"a key {reason}", line)
        self.keys[-1] = (text, line)

    def add_value(
        self,
        node: Node,
        line: int,
        is_open: bool = False,
    ) -> None:
        """Adds a value to its mapping or list. A mapping or list that `is_open` stays on the path until its end."""
        if not self.stack:
            self.root = node
            return
        parent = self.stack[-1].value
        if isinstance(parent, list):
            self.path.append(len(parent))
            parent.append(node)
        else:
            self.add_to_mapping(parent, node, line)
        if not is_open:
            self.close_node()

    def add_to_mapping(
        self,
        mapping: dict[str, Node],
        node: Node,
        line: int,
    ) -> None:
        waiting = self.keys[-1]
        if waiting is None:
            raise YamlSyntaxError("an alias cannot be a key", line)
        key, key_line = waiting
        self.keys[-1] = None
        self.path.append(key)
        node.position = SourcePosition(self.file, key_line)
        if key in mapping:
            first = mapping[key].position.line
            self.add_problem(f"is written twice; the first is on line {first}", key_line, tuple(self.path))
        elif key != "<<":
            mapping[key] = node

    def close_node(self) -> None:
        if self.path:
            self.path.pop()


def parse_yaml(raw: bytes, file: str) -> tuple[Node | None, list[ConfigProblem]]:
    """Returns the tree of a file and its problems; None for the tree if the file cannot be read to its end."""
    composer = YamlComposer(file)

    def failed(message: str, line: int) -> tuple[None, list[ConfigProblem]]:
        return None, [
            *composer.problems,
            ConfigProblem(
                message,
                "",
                file,
                line,
            ),
        ]

    try:
        text = decode(raw)
        composer.compose(text)
    except YamlSyntaxError as stop:
        return failed(stop.message, stop.line)
    except yaml.reader.ReaderError as error:
        position = error.position if isinstance(error.position, int) else 0
        return failed("contains a control character", text.count("\n", 0, position) + 1)
    except yaml.MarkedYAMLError as error:
        return failed(f"is not YAML: {_reason(error):.160}", _line(error))
    # a character code such as "\UFFFFFFFF", or a number without end in a directive
    except (ValueError, OverflowError, yaml.YAMLError):
        return failed("is not YAML: a character code or number is out of range", 1)
    if composer.root is None:
        return failed("is empty", 1)
    if not isinstance(composer.root.value, dict):
        return failed("is not a recipe: it must begin with `key: value` lines", composer.root.position.line or 1)
    return composer.root, composer.problems


def _reason(error: yaml.MarkedYAMLError) -> str:
    parts = filter(None, (error.context, error.problem))
    return " ".join(parts).replace("'\\t'", "a tab")


def _line(error: yaml.MarkedYAMLError) -> int:
    """Returns the line of an error; of a quote that is not closed, the line of the quote."""
    mark = error.problem_mark
    if isinstance(error, yaml.scanner.ScannerError) and error.context_mark:
        mark = error.context_mark
    if mark is None:
        return 1
    return int(mark.line) + 1

"""Strict YAML: text in, a tree with lines out. The traps of YAML 1.1 are closed, and hostile files end in a sentence.

Only the event stream of PyYAML is used, so nothing recurses and nothing is built before it was looked at. What a plain
word means is decided here: YAML 1.2's numbers (`1e-5` is one), `true` and `false`, `null`; everything else (`no`,
`12:30`, `010`, `2026-01-01`) is text.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from lowrank_tune.config.yaml_nodes import MAX_DEPTH, Node, Path, SourcePosition, invalid_text
from lowrank_tune.errors import ConfigProblem

MAX_BYTES = 256 * 1024
MAX_VALUES = 2_000
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


def parse_scalar(text: str) -> Any:
    """What a plain (unquoted) word means."""
    if text in CONSTANTS:
        return CONSTANTS[text]
    if len(text) <= MAX_DIGITS:
        if INTEGER.fullmatch(text):
            return int(text)
        if DECIMAL.fullmatch(text):
            return float(text)
    return text


class YamlSyntaxError(Exception):
    """The text cannot be read beyond this point."""

    def __init__(self, message: str, line: int) -> None:
        super().__init__(message)
        self.message = message
        self.line = line


def decode(raw: bytes) -> str:
    """UTF-8, within the size limit, with something in it and no tabs as indentation."""
    if len(raw) > MAX_BYTES:
        raise YamlSyntaxError(f"has {len(raw):,} bytes, and a recipe has at most {MAX_BYTES:,}", 1)
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise YamlSyntaxError("is not UTF-8 text here", raw[: error.start].count(b"\n") + 1) from None
    for number, line in enumerate(text.split("\n"), 1):
        if "\t" in line[: len(line) - len(line.lstrip())] and line.strip():
            raise YamlSyntaxError("is indented with a tab; YAML needs spaces", number)
    return text


class YamlComposer:
    """Builds the tree from events, with a stack of its own: depth, size, duplicates and forbidden features are seen at
    once."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.problems: list[ConfigProblem] = []
        self.root: Node | None = None
        self.stack: list[Node] = []
        self.keys: list[tuple[str, int] | None] = []  # for each open mapping, the key that waits for its value
        self.path: list[str | int] = []
        self.count = 0
        self.documents = 0

    def add_problem(self, message: str, line: int, path: Path | None = None) -> None:
        self.problems.append(
            SourcePosition(self.file, line).problem(message, self.current_path() if path is None else path)
        )

    def current_path(self) -> Path:
        """The path of the value that comes next."""
        if self.stack and isinstance(self.stack[-1].value, list):
            return (*self.path, len(self.stack[-1].value))
        waiting = self.keys[-1] if self.keys else None
        if waiting:
            return (*self.path, waiting[0])
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
        """A scalar, or the opening of a mapping or list."""
        self.count += 1
        if self.count > MAX_VALUES:
            raise YamlSyntaxError(f"holds more than {MAX_VALUES:,} values", line)
        is_key = bool(self.stack) and isinstance(self.stack[-1].value, dict) and self.keys[-1] is None
        if event.anchor:
            self.add_problem(f"has an anchor (&{event.anchor:.40}); write the value out, or use `extends`", line)
        if event.tag:
            self.add_problem(f"has a tag ({event.tag:.40}); a recipe holds plain data", line)
        if isinstance(event, yaml.ScalarEvent):
            if event.implicit[0]:
                value = parse_scalar(event.value)
            else:
                value = event.value
            if is_key:
                self.add_key(event.value, value, line)
                return
            if isinstance(value, str) and (reason := invalid_text(value)):
                self.add_problem(reason, line)
                value = None
            elif isinstance(value, float) and len(event.value) > MAX_DIGITS:
                value = event.value
            self.add_value(Node(value, SourcePosition(self.file, line)), line)
        elif is_key:
            raise YamlSyntaxError(
                "a key must be a word, not a mapping or a list (a value that begins with a brace wants quotes)", line
            )
        else:
            if len(self.stack) >= MAX_DEPTH:
                raise YamlSyntaxError(f"is nested more than {MAX_DEPTH} levels deep", line)
            is_mapping = isinstance(event, yaml.MappingStartEvent)
            node = Node({} if is_mapping else [], SourcePosition(self.file, line))
            self.add_value(node, line, is_open=True)
            self.stack.append(node)
            if is_mapping:
                self.keys.append(None)

    def add_key(self, text: str, value: Any, line: int) -> None:
        if text == "<<":
            self.add_problem("is a merge key; use `extends`", line, (*self.path, text))
        elif not isinstance(value, str):
            self.add_problem(f"a key must be a word, and `{text:.40}` is none", line)
        elif reason := invalid_text(text):
            self.add_problem(f"a key {reason}", line)
        self.keys[-1] = (text, line)

    def add_value(self, node: Node, line: int, is_open: bool = False) -> None:
        """Puts a value where it belongs; one that opens stays on the path until it closes."""
        if not self.stack:
            self.root = node
            return
        parent = self.stack[-1].value
        if isinstance(parent, list):
            self.path.append(len(parent))
            parent.append(node)
        else:
            waiting = self.keys[-1]
            if waiting is None:
                raise YamlSyntaxError("an alias cannot be a key", line)
            key, key_line = waiting
            self.keys[-1] = None
            self.path.append(key)
            node.position = SourcePosition(self.file, key_line)
            if key in parent:
                self.add_problem(
                    f"is written twice; the first stands on line {parent[key].position.line}",
                    key_line,
                    tuple(self.path),
                )
            elif key != "<<":
                parent[key] = node
        if not is_open:
            self.close_node()

    def close_node(self) -> None:
        if self.path:
            self.path.pop()


def parse_yaml(raw: bytes, file: str) -> tuple[Node | None, list[ConfigProblem]]:
    """The tree of a file, and the faults found on the way; no tree where it could not be read to its end."""
    composer = YamlComposer(file)

    def failed(message: str, line: int) -> tuple[None, list[ConfigProblem]]:
        return None, [*composer.problems, ConfigProblem(message, "", file, line)]

    try:
        text = decode(raw)
        composer.compose(text)
    except YamlSyntaxError as stop:
        return failed(stop.message, stop.line)
    except yaml.reader.ReaderError as error:
        position = error.position if isinstance(error.position, int) else 0
        return failed("holds a control character", text.count("\n", 0, position) + 1)
    except yaml.MarkedYAMLError as error:
        # where an open quote or a lone word stands
        opening_mark = isinstance(error, yaml.scanner.ScannerError) and error.context_mark
        mark = opening_mark or error.problem_mark
        reason = " ".join(part for part in (error.context, error.problem) if part).replace("'\\t'", "a tab")
        return failed(f"is not YAML: {reason:.160}", mark.line + 1 if mark else 1)
    except (ValueError, OverflowError, yaml.YAMLError):  # `"\UFFFFFFFF"` and endless numbers in a directive
        return failed("is not YAML: a character code or number is out of range", 1)
    if composer.root is None:
        return failed("is empty", 1)
    if not isinstance(composer.root.value, dict):
        return failed("is not a recipe: it must begin with `key: value` lines", composer.root.position.line or 1)
    return composer.root, composer.problems

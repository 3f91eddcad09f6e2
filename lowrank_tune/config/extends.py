"""From the name of a preset, or a path, to one tree: `extends`, and `key=value` overrides.

A later layer replaces values of an earlier one. Of two settings that exclude each other, the one of the later layer
removes the other (`train.max_steps` above an inherited `train.num_train_epochs`). `null` removes an inherited setting.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Sequence
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path as File
from typing import Any

from lowrank_tune.config.base import Path
from lowrank_tune.config.schema import MUTUALLY_EXCLUSIVE
from lowrank_tune.config.yaml import (
    MAX_BYTES,
    Node,
    SourcePosition,
    find_node,
    has_entry,
    invalid_text,
    parse_scalar,
    parse_yaml,
    remove_key,
)
from lowrank_tune.errors import ConfigError, ConfigProblem, UserError
from lowrank_tune.regular_files import read_file_or_pipe, read_regular_file

SUFFIXES = (".yaml", ".yml")
MAX_PARENTS = 8
MAX_READ_BYTES = 16 * MAX_BYTES
"""Larger files are not read. A smaller one that is too large for a recipe is a problem with its line."""
NOT_INHERITED = ("name", "description", "extends")
OVERRIDE_POSITION = SourcePosition("override")
MAX_SIMILAR = 3
"""Names that the message about an unknown preset lists."""

Override = tuple[Path, Node]


def preset_folders() -> list[File]:
    """Returns the folders of presets: inside an installed package, or beside the package in a checkout."""
    package = File(__file__).resolve().parent.parent
    return [folder for folder in (package / "presets", package.parent / "presets") if folder.is_dir()]


def preset_names() -> list[str]:
    return sorted({file.stem for folder in preset_folders() for file in folder.glob("*.yaml")})


def find_preset(name: str) -> File:
    """Returns the file of a preset. Raises UserError if there is none of this name."""
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        for folder in preset_folders():
            file = folder / f"{name}.yaml"
            if file.is_file():
                return file
    similar = " or ".join(f"`{near}`" for near in near_recipes(File(name), MAX_SIMILAR))
    hint = f"; did you mean {similar}?" if similar else " (a file's name ends in .yaml);"
    raise UserError(f"no preset is called {name!r:.80}{hint} `lowrank-tune presets` lists them")


def near_recipes(file: File, count: int) -> list[str]:
    """Returns the recipes of a file's folder and the presets with the most similar names, at most `count`; only the
    first one if its name differs in nothing but the ending."""
    names = {name: name for name in preset_names()}
    with suppress(OSError, ValueError):
        names |= {other.stem: display_path(other) for other in file.parent.iterdir() if other.suffix in SUFFIXES}
    stem = file.stem if file.suffix in SUFFIXES else file.name
    if stem in names:
        return [names[stem]]
    matches = get_close_matches(stem, names, n=count, cutoff=0.6)
    return [names[match] for match in matches]


def is_file_name(text: str) -> bool:
    return text.endswith(SUFFIXES) or os.sep in text


def display_path(file: File) -> str:
    """Returns the path relative to the working directory if the file is below it, else unchanged."""
    try:
        relative = os.path.relpath(file)
    except (ValueError, OSError):
        return str(file)
    if relative.startswith(os.pardir):
        return str(file)
    return relative


def read_file(file: File, allow_pipe: bool = False) -> bytes:
    """Returns the content of a recipe file, or of a pipe such as that of a shell's `<(command)`. Raises UserError if it
    cannot be read, is no regular file, or is larger than `MAX_READ_BYTES`."""
    try:
        if file.is_dir():
            raise UserError(f"{display_path(file)}: is a folder, and a recipe is a YAML file")
        if allow_pipe:
            return read_file_or_pipe(file, MAX_READ_BYTES)
        return read_regular_file(file, MAX_READ_BYTES)
    except FileNotFoundError:
        similar = near_recipes(file, 1)
        hint = f"; did you mean `{similar[0]}`?" if similar else ""
        raise UserError(f"{display_path(file)}: there is no such file{hint}") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{str(file)!r:.200}: cannot be read: {reason}") from None


def read_tree(
    file: File,
    problems: list[ConfigProblem],
    children: Sequence[File] = (),
    allow_pipe: bool = False,
) -> Node | None:
    """Returns a file merged over what it extends. Returns None, and adds the problem, if a text cannot be read."""
    tree, yaml_problems = parse_yaml(read_file(file, allow_pipe), display_path(file))
    problems += yaml_problems
    if tree is None:
        return None
    _resolve_stage_parents(tree, file)
    extends = tree.value.pop("extends", None)
    if extends is None:
        return tree
    try:
        parent = read_parent(
            extends,
            file.parent,
            problems,
            ("extends",),
            [*children, file.resolve()],
        )
    except ParentNotFound:
        return tree
    return None if parent is None else merge_layer(parent, tree)


class ParentNotFound(Exception):
    """`extends` names no recipe that can be read; the reason is among the problems."""


def read_parent(
    extends: Node,
    folder: File,
    problems: list[ConfigProblem],
    path: Path,
    children: Sequence[File] = (),
) -> Node | None:
    """Returns the tree of the recipe that `extends` names, without the keys that are not inherited. Returns None if its
    text cannot be read. Raises ParentNotFound, and adds the problem."""
    try:
        parent = read_tree(_parent_file(extends.value, folder, children), problems, children)
    except UserError as error:
        problems.append(extends.position.problem(str(error), path))
        raise ParentNotFound from None
    # `resolve` of names with NUL, or of links that lead to themselves
    except (OSError, ValueError, RuntimeError) as error:
        problems.append(extends.position.problem(f"cannot be followed: {error}", path))
        raise ParentNotFound from None
    if parent is not None:
        for key in NOT_INHERITED:
            parent.value.pop(key, None)
    return parent


def _parent_file(
    name: Any,
    folder: File,
    children: Sequence[File],
) -> File:
    """Returns the file that `extends` names. Raises UserError."""
    if not isinstance(name, str):
        raise UserError("expected the name of a preset, or a path relative to this file")
    file = folder / name if is_file_name(name) else find_preset(name)
    if file.resolve() in children:
        circle = " -> ".join(each.name for each in (*children, file))
        raise UserError(f"goes in a circle: {circle}")
    if len(children) > MAX_PARENTS:
        raise UserError(f"goes through more than {MAX_PARENTS} files")
    return file


def _resolve_stage_parents(tree: Node, file: File) -> None:
    """Makes the paths in `extends` of stages relative to the working directory: the stages may be inherited by a file
    in another folder."""
    stages = tree.value.get("stages")
    if stages is None or not isinstance(stages.value, list):
        return
    for stage in stages.value:
        extends = find_node(stage, ("extends",))
        if extends is not None and isinstance(extends.value, str) and is_file_name(extends.value):
            extends.value = str(file.parent / extends.value)


def merge_layer(parent: Node, child: Node) -> Node:
    """Returns a later layer merged over an earlier one, without the settings there that it excludes."""
    paths = {path for pair in MUTUALLY_EXCLUSIVE for path in pair}
    drop_conflicting(parent, {path for path in paths if _has_value(child, path)})
    return merge_nodes(parent, child)


def _has_value(tree: Node, path: Path) -> bool:
    node = find_node(tree, path)
    return node is not None and node.value is not None


def drop_conflicting(inherited: Node, later: Collection[Path]) -> None:
    """Removes from the inherited tree the settings that settings of a later layer exclude."""
    for one, other in MUTUALLY_EXCLUSIVE:
        if one in later and other not in later:
            remove_key(inherited, other)
        elif other in later and one not in later:
            remove_key(inherited, one)


def merge_nodes(parent: Node, child: Node) -> Node:
    """Merges mappings key by key; scalars and lists are replaced; null removes an inherited key."""
    if not (isinstance(parent.value, dict) and isinstance(child.value, dict)):
        return child
    merged = dict(parent.value)
    for key, node in child.value.items():
        if key not in merged:
            merged[key] = node
        elif node.value is None:
            del merged[key]
        else:
            merged[key] = merge_nodes(merged[key], node)
    return Node(merged, child.position)


def parse_overrides(overrides: Sequence[str], problems: list[ConfigProblem]) -> list[Override]:
    """Returns `key=value` settings as paths and values, in their order."""
    parsed: list[Override] = []
    for text in overrides:
        key, equals, value = text.partition("=")
        path = _parse_path(key)
        if not equals or "" in path:
            message = f"{text!r:.80} is not of the form key=value, as train.max_steps=100"
            problems.append(OVERRIDE_POSITION.problem(message))
        elif path == ("extends",):
            problems.append(OVERRIDE_POSITION.problem("cannot be given here; name that recipe itself", path))
        else:
            node = parse_override_value(value.strip(), path, problems)
            if node is not None:
                parsed.append((path, node))
    return parsed


def _parse_path(key: str) -> Path:
    """Returns the steps of a dotted key; numbers are positions in lists."""
    steps: list[str | int] = []
    for word in key.strip().split("."):
        is_position = word.isdecimal() and word.isascii() and len(word) < 6
        steps.append(int(word) if is_position else word)
    return tuple(steps)


def apply_overrides(
    tree: Node,
    overrides: Sequence[Override],
    problems: list[ConfigProblem],
) -> None:
    """Sets values of a tree, in their order."""
    set_here: set[Path] = set()
    for path, node in overrides:
        if set_value(tree, path, node, problems) and node.value is not None:
            set_here.add(path)
            drop_conflicting(tree, set_here)


def parse_override_value(
    text: str,
    path: Path,
    problems: list[ConfigProblem],
) -> Node | None:
    """Returns a value of the command line: lists, mappings and quoted text as in YAML, everything else as a plain word.
    Returns None, and adds the problem, if it is not valid."""
    if not text:
        message = "has no value; `null` removes a setting, '\"\"' is an empty text"
        problems.append(OVERRIDE_POSITION.problem(message, path))
        return None
    if text[0] not in "[{\"'":
        if reason := invalid_text(text):
            problems.append(OVERRIDE_POSITION.problem(reason, path))
            return None
        return Node(parse_scalar(text), OVERRIDE_POSITION)
    tree, yaml_problems = parse_yaml(b"value: " + text.encode(errors="replace"), OVERRIDE_POSITION.file)
    problems += [OVERRIDE_POSITION.problem(problem.message, path) for problem in yaml_problems]
    if tree is None or yaml_problems:
        return None
    if set(tree.value) != {"value"}:
        problems.append(OVERRIDE_POSITION.problem("has more than one value", path))
        return None
    return without_lines(tree.value["value"])


def without_lines(node: Node) -> Node:
    """Returns the tree of a value of the command line, which has no lines."""
    if isinstance(node.value, dict):
        return Node({key: without_lines(child) for key, child in node.value.items()}, OVERRIDE_POSITION)
    if isinstance(node.value, list):
        return Node([without_lines(child) for child in node.value], OVERRIDE_POSITION)
    return Node(node.value, OVERRIDE_POSITION)


def set_value(
    tree: Node,
    path: Path,
    new: Node,
    problems: list[ConfigProblem],
) -> bool:
    """Sets a value, or removes it if the new one is null, and returns whether this is possible. Missing sections are
    added; entries of lists must exist."""
    node = tree
    for index, step in enumerate(path):
        reason = _invalid_step(node, step)
        if reason:
            problems.append(OVERRIDE_POSITION.problem(f"`{'.'.join(map(str, path[:index]))}` {reason}", path))
            return False
        is_last = index == len(path) - 1
        key = step if isinstance(node.value, list) else str(step)
        if is_last and new.value is None and isinstance(node.value, dict) and key in node.value:
            del node.value[key]
        elif is_last:
            node.value[key] = new
        else:
            if isinstance(node.value, dict) and (key not in node.value or node.value[key].value is None):
                node.value[key] = Node({}, OVERRIDE_POSITION)
            node = node.value[key]
    return True


def _invalid_step(node: Node, step: str | int) -> str:
    """Returns why a node has no such entry and can get none, or an empty string."""
    if isinstance(node.value, dict):
        return ""
    if not isinstance(node.value, list):
        return "is one value and has no parts"
    if has_entry(node.value, step):
        return ""
    if not node.value:
        return "is a list with no entries"
    return f"is a list with entries 0 to {len(node.value) - 1}"


def read_recipe(preset_or_path: str) -> tuple[Node, list[ConfigProblem], str]:
    """Returns the tree of a preset or file, the problems so far, and the stem of the file's name."""
    problems: list[ConfigProblem] = []
    file = File(preset_or_path) if is_file_name(preset_or_path) else find_preset(preset_or_path)
    tree = read_tree(file, problems, allow_pipe=True)
    if tree is None:
        raise ConfigError(problems)
    return tree, problems, file.stem

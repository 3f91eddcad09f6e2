"""From a name or a path to one tree: where presets lie, what `extends` means, and how `key=value` changes it.

A later layer wins. Where it sets one of two rivals (`train.max_steps` over an inherited `train.num_train_epochs`), the
inherited one gives way; `null` takes an inherited setting away.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path as File

from lowrank_tune.config.rules import MUTUALLY_EXCLUSIVE
from lowrank_tune.config.strict_yaml import parse_scalar, parse_yaml
from lowrank_tune.config.yaml_nodes import Node, Path, SourcePosition, find_node, invalid_text, remove_key
from lowrank_tune.errors import ConfigError, ConfigProblem, UserError

SUFFIXES = (".yaml", ".yml")
MAX_PARENTS = 8
NOT_INHERITED = ("name", "description", "extends")
OVERRIDE_POSITION = SourcePosition("override")

Override = tuple[Path, Node]


def preset_folders() -> list[File]:
    """In an installed package presets lie inside it; in a checkout, beside it."""
    package = File(__file__).resolve().parent.parent
    return [folder for folder in (package / "presets", package.parent / "presets") if folder.is_dir()]


def preset_names() -> list[str]:
    return sorted({file.stem for folder in preset_folders() for file in folder.glob("*.yaml")})


def find_preset(name: str) -> File:
    """The file of a preset."""
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        for folder in preset_folders():
            if (file := folder / f"{name}.yaml").is_file():
                return file
    hint = near_recipe(File(name)) or "; `lowrank-tune presets` lists them (a file's name ends in .yaml)"
    raise UserError(f"no preset is called {name!r:.80}{hint}")


def near_recipe(file: File) -> str:
    """ "; did you mean `my.yaml`?" for the recipe file beside it, or the preset, whose name is nearest; or an empty
    string."""
    names = {name: name for name in preset_names()}
    with suppress(OSError, ValueError):
        names |= {other.stem: display_path(other) for other in file.parent.iterdir() if other.suffix in SUFFIXES}
    stem = file.stem if file.suffix in SUFFIXES else file.name
    matches = get_close_matches(stem, names, n=1, cutoff=0.6)
    if matches:
        return f"; did you mean `{names[matches[0]]}`?"
    return ""


def is_file_name(text: str) -> bool:
    return text.endswith(SUFFIXES) or os.sep in text


def display_path(file: File) -> str:
    """The path as a person would write it from here."""
    try:
        relative = os.path.relpath(file)
    except (ValueError, OSError):
        return str(file)
    if relative.startswith(os.pardir):
        return str(file)
    return relative


def read_file(file: File) -> bytes:
    """A recipe file's bytes; every way in which a path can fail is a sentence."""
    try:
        if file.is_dir():
            raise UserError(f"{display_path(file)}: is a folder, and a recipe is a YAML file")
        return file.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{display_path(file)}: there is no such file{near_recipe(file)}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{str(file)!r:.200}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


def read_tree(file: File, problems: list[ConfigProblem], children: Sequence[File] = ()) -> Node | None:
    """A file laid over what it extends. None where a text could not be read; why stands in `problems`."""
    tree, yaml_problems = parse_yaml(read_file(file), display_path(file))
    problems += yaml_problems
    if tree is None:
        return None
    _resolve_stage_parents(tree, file)
    if "extends" not in tree.value:
        return tree
    try:
        parent = read_parent(
            tree.value.pop("extends"),
            file.parent,
            problems,
            ("extends",),
            [*children, file.resolve()],
        )
    except ParentNotFound:
        return tree
    return None if parent is None else merge_layer(parent, tree)


class ParentNotFound(Exception):
    """`extends` leads nowhere; why stands in the faults."""


def read_parent(
    extends_node: Node,
    folder: File,
    problems: list[ConfigProblem],
    path: Path,
    children: Sequence[File] = (),
) -> Node | None:
    """What `extends` names, without what is not inherited. None where its text could not be read."""

    def not_found(message: str) -> ParentNotFound:
        problems.append(extends_node.position.problem(message, path))
        return ParentNotFound()

    if not isinstance(extends_node.value, str):
        raise not_found("expected the name of a preset, or a path relative to this file")
    try:
        if is_file_name(extends_node.value):
            parent_file = folder / extends_node.value
        else:
            parent_file = find_preset(extends_node.value)
        if parent_file.resolve() in children:
            raise not_found(f"goes in a circle: {' -> '.join(ancestor.name for ancestor in [*children, parent_file])}")
        if len(children) > MAX_PARENTS:
            raise not_found(f"goes through more than {MAX_PARENTS} files")
        parent = read_tree(parent_file, problems, children)
    except UserError as error:
        raise not_found(str(error)) from None
    except (OSError, ValueError, RuntimeError) as error:  # `resolve` of names with NUL, or of links that circle
        raise not_found(f"cannot be followed: {error}") from None
    if parent is not None:
        for key in NOT_INHERITED:
            parent.value.pop(key, None)
    return parent


def _resolve_stage_parents(tree: Node, file: File) -> None:
    """A stage may be inherited by a file elsewhere; what it extends is still relative to the file that it is written
    in."""
    stages = tree.value.get("stages")
    for stage in stages.value if stages is not None and isinstance(stages.value, list) else ():
        if isinstance(stage.value, dict):
            line = stage.value.get("extends")
        else:
            line = None
        if line is not None and isinstance(line.value, str) and is_file_name(line.value):
            line.value = str(file.parent / line.value)


def merge_layer(parent: Node, child: Node) -> Node:
    """A later layer over an earlier one; what it contradicts there gives way."""
    drop_conflicting(
        parent,
        [
            path
            for path in conflicting_paths()
            if (node := find_node(child, path)) is not None and node.value is not None
        ],
    )
    return merge_nodes(parent, child)


def conflicting_paths() -> set[Path]:
    return {path for pair in MUTUALLY_EXCLUSIVE for path in pair}


def drop_conflicting(inherited: Node, later: Iterable[Path]) -> None:
    """Takes from the inherited tree whatever a later layer's settings contradict."""
    paths = set(later)
    for one, other in MUTUALLY_EXCLUSIVE:
        if one in paths and other not in paths:
            remove_key(inherited, other)
        elif other in paths and one not in paths:
            remove_key(inherited, one)


def merge_nodes(parent: Node, child: Node) -> Node:
    """Mappings are merged in depth; scalars and lists are replaced; null takes an inherited key away."""
    if not (isinstance(parent.value, dict) and isinstance(child.value, dict)):
        return child
    merged = dict(parent.value)
    for key, node in child.value.items():
        if key in merged and node.value is None:
            del merged[key]
        else:
            merged[key] = merge_nodes(merged[key], node) if key in merged else node
    return Node(merged, child.position)


def parse_overrides(overrides: Sequence[str], problems: list[ConfigProblem]) -> list[Override]:
    """`key=value` settings as paths and values, in their order."""
    parsed_overrides: list[Override] = []
    for text in overrides:
        key, equals, value = text.partition("=")
        path: Path = tuple(
            int(word) if word.isdecimal() and word.isascii() and len(word) < 6 else word
            for word in key.strip().split(".")
        )
        if not equals or "" in path:
            problems.append(
                OVERRIDE_POSITION.problem(f"{text!r:.80} is not of the form key=value, as train.max_steps=100")
            )
        elif path == ("extends",):
            problems.append(OVERRIDE_POSITION.problem("cannot be given here; name that recipe itself", path))
        elif (node := parse_override_value(value.strip(), path, problems)) is not None:
            parsed_overrides.append((path, node))
    return parsed_overrides


def apply_overrides(tree: Node, overrides: Sequence[Override], problems: list[ConfigProblem]) -> None:
    """Lays settings over a tree, in their order."""
    set_here: set[Path] = set()
    for path, node in overrides:
        if set_value(tree, path, node, problems) and node.value is not None:
            set_here.add(path)
            drop_conflicting(tree, set_here)


def parse_override_value(text: str, path: Path, problems: list[ConfigProblem]) -> Node | None:
    """A value on the command line: lists, mappings and quoted text as in YAML, everything else one plain word."""
    if not text:
        problems.append(
            OVERRIDE_POSITION.problem("has no value; `null` takes a setting away, '\"\"' is an empty text", path)
        )
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
        problems.append(OVERRIDE_POSITION.problem("holds more than one value", path))
        return None
    return strip_position(tree.value["value"])


def strip_position(node: Node) -> Node:
    """The tree of a command-line value has no lines."""
    if isinstance(node.value, dict):
        return Node({key: strip_position(child) for key, child in node.value.items()}, OVERRIDE_POSITION)
    if isinstance(node.value, list):
        return Node([strip_position(child) for child in node.value], OVERRIDE_POSITION)
    return Node(node.value, OVERRIDE_POSITION)


def set_value(tree: Node, path: Path, new: Node, problems: list[ConfigProblem]) -> bool:
    """Sets or, with null, takes away. Sections on the way are made; list entries must be there."""
    node = tree
    for index, step in enumerate(path):
        last = index == len(path) - 1
        if isinstance(node.value, list):
            if not isinstance(step, int) or step >= len(node.value):
                if node.value:
                    entries = f"entries 0 to {len(node.value) - 1}"
                else:
                    entries = "no entries"
                problems.append(
                    OVERRIDE_POSITION.problem(f"`{'.'.join(map(str, path[:index]))}` is a list with {entries}", path)
                )
                return False
            if last:
                node.value[step] = new
            node = node.value[step]
        elif isinstance(node.value, dict):
            word = str(step)
            if last and new.value is None and word in node.value:
                del node.value[word]
            elif last:
                node.value[word] = new
            else:
                if word not in node.value or node.value[word].value is None:
                    node.value[word] = Node({}, OVERRIDE_POSITION)
                node = node.value[word]
        else:
            problems.append(
                OVERRIDE_POSITION.problem(f"`{'.'.join(map(str, path[:index]))}` is one value and has no parts", path)
            )
            return False
    return True


def read_recipe(preset_or_path: str) -> tuple[Node, list[ConfigProblem], str]:
    """The tree of a preset or file, the faults so far, and the name that the file gives."""
    problems: list[ConfigProblem] = []
    if is_file_name(preset_or_path):
        file = File(preset_or_path)
    else:
        file = find_preset(preset_or_path)
    tree = read_tree(file, problems)
    if tree is None:
        raise ConfigError(problems)
    return tree, problems, file.stem

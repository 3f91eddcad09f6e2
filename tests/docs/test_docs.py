"""The documentation: links, recipes, commands, imports, tables and generated pages are those of the code."""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from markdown import DOCS, PAGES, README, ROOT, Block, anchors, commands, fenced_blocks, inline_code, links

from lowrank_tune.cli import app
from lowrank_tune.config import list_presets, load_any
from lowrank_tune.errors import ConfigError
from lowrank_tune.ui.metrics import DESCRIPTIONS, DESCRIPTIONS_BY_ALGORITHM

CHECKED = [README, ROOT / "CONTRIBUTING.md", ROOT / "AGENTS.md", ROOT / "CHANGELOG.md", *PAGES]
LANGUAGES = {"sh", "yaml", "python", "json", "text"}
FRAGMENT = "# part of a recipe"
TINY = [preset.name for preset in list_presets() if preset.name.startswith("tiny-")]
PRESETS = {preset.name for preset in list_presets()}
CLI = typer.main.get_command(app)
SCRIPTS = {
    "models.md": "models_page.py",
    "presets.md": "presets_table.py",
    "settings.md": "settings_reference.py",
}
each_page = pytest.mark.parametrize("page", CHECKED, ids=lambda path: path.name)


def test_navigation_lists_each_page_once() -> None:
    config = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    listed = re.findall(r"^ +- [^:\n]+: (\S+\.md)$", config[config.index("\nnav:") :], re.MULTILINE)
    assert sorted(listed) == [page.name for page in PAGES] and len(PAGES) > 25


def broken_links(page: Path, text: str) -> list[str]:
    """The relative links of a page that name no file, or no heading of it."""
    faults = []
    for link in links(text):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.exists() or (anchor and anchor not in anchors(target.read_text(encoding="utf-8"))):
            faults.append(link)
    return faults


@each_page
def test_links_lead_to_files_and_headings(page: Path) -> None:
    assert broken_links(page, page.read_text(encoding="utf-8")) == []


def test_pages_of_the_site_link_only_to_pages_of_the_site() -> None:
    """A page of the site has no file above `docs/` beside it."""
    outside = {
        page.name: [link for link in links(page.read_text(encoding="utf-8")) if link.startswith("..")] for page in PAGES
    }
    assert {name: found for name, found in outside.items() if found} == {}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("[a](README.md) [b](docs/data.md)", []),
        ("[a](missing.md)", ["missing.md"]),
        ("[a](README.md#the-demo)", []),
        ("[a](README.md#no-such-heading)", ["README.md#no-such-heading"]),
        ("`[a](missing.md)`\n```text\n[a](missing.md)\n```", []),
        ("![a](docs/missing.svg) [b](https://example.org/missing)", ["docs/missing.svg"]),
    ],
)
def test_broken_links_are_found(text: str, found: list[str]) -> None:
    assert broken_links(README, text) == found


@each_page
def test_blocks_have_a_language(page: Path) -> None:
    blocks = fenced_blocks(page.read_text(encoding="utf-8"))
    assert [block.line for block in blocks if block.language not in LANGUAGES] == []


def test_the_checks_of_blocks_have_what_to_check() -> None:
    texts = [page.read_text(encoding="utf-8") for page in CHECKED]
    counts = {language: sum(len(fenced_blocks(text, language)) for text in texts) for language in sorted(LANGUAGES)}
    assert counts["yaml"] > 30 and counts["sh"] > 40 and counts["python"] > 8 and counts["json"] > 8


def load_fragment(text: str, folder: Path) -> None:
    """Loads a fragment on top of the first tiny preset that accepts it. Raises the last ConfigError if none does."""
    file = folder / "fragment.yaml"
    error: ConfigError | None = None
    for preset in TINY:
        file.write_text(f"extends: {preset}\n{text}", encoding="utf-8")
        try:
            load_any(str(file))
            return
        except ConfigError as found:
            error = found
    assert error is not None
    raise error


def write_recipes(text: str, folder: Path) -> list[Path]:
    """Writes the recipes of a page, each as the file that its first line names. Fragments are loaded on the way."""
    files = []
    for number, block in enumerate(fenced_blocks(text, "yaml")):
        if block.text.startswith(FRAGMENT):
            load_fragment(block.text, folder)
            continue
        named = re.match(r"# (\S+\.yaml)\b", block.text)
        files.append(folder / (named[1] if named else f"block-{number}.yaml"))
        files[-1].write_text(block.text, encoding="utf-8")
    return files


@each_page
def test_recipes_load(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for file in write_recipes(page.read_text(encoding="utf-8"), tmp_path):
        load_any(str(file))


def test_faulty_fragments_are_found(tmp_path: Path) -> None:
    load_fragment(f"{FRAGMENT}\ntrain: {{learning_rate: 1e-4}}\n", tmp_path)
    with pytest.raises(ConfigError, match="unknown key"):
        load_fragment(f"{FRAGMENT}\ntrain: {{learning_rat: 1e-4}}\n", tmp_path)


@each_page
def test_python_blocks_compile_and_import_what_exists(page: Path) -> None:
    for block in fenced_blocks(page.read_text(encoding="utf-8"), "python"):
        for node in ast.walk(ast.parse(block.text)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "lowrank_tune":
                module = importlib.import_module(node.module or "")
                assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []


@each_page
def test_json_blocks_parse(page: Path) -> None:
    """A block is one JSON value, or JSON lines."""
    for block in fenced_blocks(page.read_text(encoding="utf-8"), "json"):
        try:
            json.loads(block.text)
        except ValueError:
            for line in block.text.splitlines():
                json.loads(line)


class NoSuchCommand(Exception):
    """A command line that begins with no command of the kit."""


def parse_command(words: list[str]) -> Any:
    """Parses a command line of the kit without running it and returns its context. Raises typer's error of usage, or
    NoSuchCommand."""
    command, arguments, parent = CLI, words[1:], None
    while arguments and not arguments[0].startswith("-") and hasattr(command, "commands"):
        if arguments[0] not in command.commands:
            raise NoSuchCommand(arguments[0])
        parent = command.make_context(command.name or "lowrank-tune", list(arguments), parent=parent)
        command, arguments = command.commands[arguments[0]], arguments[1:]
    return command.make_context(command.name, list(arguments), parent=parent)


def kit_commands(text: str) -> list[list[str]]:
    """The command lines of the kit in a page: those of `sh` blocks, and those between backticks that are more than the
    name of a command."""
    lines = [command for block in fenced_blocks(text, "sh") for command in commands(block)]
    inline = [Block("sh", code, 0) for code in inline_code(text) if code.startswith("lowrank-tune ")]
    lines += [command for block in inline for command in commands(block) if command[1:2] != command[1:]]
    lines = [words for words in lines if words[1:]]
    return [words for words in lines if Path(words[0]).name == "lowrank-tune" and words[1] != "--version"]


@each_page
def test_commands_parse_and_their_settings_exist(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Overrides are checked against the preset, or the recipe of the same page, that they are given to."""
    if page.name == "CHANGELOG.md":
        pytest.skip("entries name commands that later versions renamed")
    text = page.read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    recipes = {file.name for file in write_recipes(text, tmp_path)}
    for words in kit_commands(text):
        overrides = parse_command(words).params.get("overrides") or []
        target = next((word for word in words[2:] if word in PRESETS | recipes), None)
        if overrides and target is not None:
            load_any(target, *overrides)


@pytest.mark.parametrize(
    "line", ["lowrank-tune rnu tiny-sft", "lowrank-tune run tiny-sft --oot x", "lowrank-tune presets shwo tiny-sft"]
)
def test_faulty_commands_are_found(line: str) -> None:
    with pytest.raises(Exception, match="No such option|rnu|shwo"):
        parse_command(line.split())


def test_every_command_is_in_the_docs() -> None:
    used = {words[1] for page in CHECKED for words in kit_commands(page.read_text(encoding="utf-8"))}
    assert {*CLI.commands} <= used


def test_every_described_metric_is_in_the_table() -> None:
    """Held-out metrics are listed with the variant that they belong to."""
    table = set(inline_code((DOCS / "metrics.md").read_text(encoding="utf-8")))
    names = {*DESCRIPTIONS, *(name for own in DESCRIPTIONS_BY_ALGORITHM.values() for name in own)}
    assert len(names) > 40
    assert [name for name in sorted(names) if name.replace("heldout/", "heldout/VARIANT/") not in table] == []


@each_page
def test_named_files_exist(page: Path) -> None:
    """Paths of the repository between backticks and in commands are those of files."""
    text = page.read_text(encoding="utf-8")
    if page.name == "CHANGELOG.md":
        pytest.skip("older entries name files that later versions moved")
    words = [word for code in inline_code(text) for word in code.split()]
    words += [word for block in fenced_blocks(text, "sh") for command in commands(block) for word in command]
    pattern = re.compile(r"(?:lowrank_tune|benchmarks|scripts|tests|examples|presets|docs|constraints)/[\w./-]*\w")
    paths = {word.partition("::")[0] for word in words if pattern.fullmatch(word.partition("::")[0])}
    assert sorted(path for path in paths if not (ROOT / path).exists()) == []


@pytest.mark.parametrize("page", SCRIPTS)
def test_generated_pages_are_up_to_date(page: str) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / SCRIPTS[page]), "--check"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def string_constants() -> str:
    """All string literals of the package, parts of f-strings included."""
    literals = []
    for path in sorted((ROOT / "lowrank_tune").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                literals.append(node.value)
    return "\n".join(literals)


def test_messages_of_the_troubleshooting_page_exist() -> None:
    """The first column of its tables has parts of messages between backticks."""
    rows = re.findall(r"^\| (`.+?`) \|", (DOCS / "troubleshooting.md").read_text(encoding="utf-8"), re.MULTILINE)
    known = string_constants()
    fragments = [code for row in rows for code in inline_code(row)]
    assert len(fragments) >= 25
    assert [fragment for fragment in fragments if fragment not in known] == []


@pytest.mark.slow
def test_the_site_builds_strictly(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        env={**os.environ, "DISABLE_MKDOCS_2_WARNING": "true", "NO_MKDOCS_2_WARNING": "true"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    pages = {file.stem for file in (tmp_path / "site").glob("*.html")}
    assert {page.stem for page in PAGES} <= pages
    loaded = re.compile(r"<(?:script|link|img)[^>]+(?:src|href)=\"https?://")
    for file in (tmp_path / "site").glob("*.html"):
        assert loaded.findall(file.read_text(encoding="utf-8")) == [], file.name

"""Laws of the command line as a whole: its help pages, and a pipe whose reader goes."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lowrank_tune.cli import app
from lowrank_tune.cli.help_pages import PANELS

WIDE = {"COLUMNS": "80", "TERMINAL_WIDTH": "80"}


@pytest.mark.parametrize("command", ["schema", "presets", "presets show tiny-sft", "--help", "plan --help"])
def test_a_pipe_whose_reader_has_gone_ends_a_command_without_a_message(command: str) -> None:
    """As other programs end: by the code of SIGPIPE."""
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "lowrank_tune", *command.split()], stdout=write, stderr=subprocess.PIPE, timeout=60
        )
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.parametrize(("command", "code"), [("presets", 0), ("--version", 0), ("run nothing", 2)])
def test_a_closed_stdout_is_no_fault(command: str, code: int) -> None:
    line = f"{shlex.quote(sys.executable)} -m lowrank_tune {command} >&-"
    done = subprocess.run(line, shell=True, stderr=subprocess.PIPE, timeout=60)
    assert done.returncode == code and b"Traceback" not in done.stderr


def test_a_command_that_fails_keeps_its_code_where_the_reader_has_gone() -> None:
    """What it printed is still in the buffer when it fails."""
    read, write = os.pipe()
    os.close(read)
    program = """if True:
        import sys
        from lowrank_tune import cli
        def fail():
            print("printed")
            sys.exit(3)
        cli.app = fail
        cli.main()"""
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    try:
        done = subprocess.run([sys.executable, "-c", program], stdout=write, stderr=subprocess.PIPE, env=environ)
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (3, b"")


def test_the_help_lists_each_command_in_a_panel_and_breaks_no_sentence() -> None:
    page = CliRunner().invoke(app, ["--help"], env=WIDE).output
    panels = [line for line in page.splitlines() if re.match("╭─ .* ─", line)]
    assert [panel.strip("╭─╮ ") for panel in panels] == ["Options", *PANELS]
    # a line of a description is followed by another one only where its first word did not fit
    for line, following in zip(page.splitlines(), page.splitlines()[1:], strict=False):
        if line.startswith("│ ") and re.match(r"│ {10}\w", following):
            assert len(line[:-1].rstrip()) + 1 + len(following[10:].split()[0]) > 77, (line, following)


@pytest.mark.parametrize("command", [command.name or "" for command in app.registered_commands])
def test_no_help_page_shows_types_of_python(command: str) -> None:
    page = CliRunner().invoke(app, [command, "--help"], env=WIDE).output
    assert "list[" not in page and "<bool>" not in page and "[[" not in page and "......" not in page


@pytest.mark.parametrize(
    "command",
    [
        "chat {}",
        "eval {}",
        "merge {}",
        "export {} --to peft",
        "watch {}",
        "report {}",
        "compare runs/first {}",
        "score {} --file x.jsonl",
    ],
)
def test_error_for_an_unknown_run_contains_the_most_similar_name(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("first", "second"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "run.json").write_text("{}")
    for name, hint in (
        ("runs/frist", "; did you mean `runs/first`?"),
        ("./runs/zzz", "; runs here: runs/first, runs/second"),
        ("runs/zzz/1-sft", "; runs here: runs/first, runs/second"),
    ):
        done = CliRunner().invoke(app, command.format(name).split())
        assert done.exit_code == 2
        assert done.output.replace("run or model", "run").strip() == f"{Path(name)}: there is no such run{hint}"


def test_error_without_any_run_contains_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["merge", "nope"])
    assert (done.exit_code, done.output.strip()) == (2, "nope: there is no such run, and no run in runs/")


@pytest.mark.parametrize("command", ["chat ~nobody-of-this-name/x", "watch {long}", "chat ./{long}", "export {long}"])
def test_a_name_that_cannot_be_a_path_is_one_sentence(command: str) -> None:
    done = CliRunner().invoke(app, [*command.format(long="a" * 300).split(), *(["--to", "peft"] * ("ex" in command))])
    assert done.exit_code == 2 and "internal error" not in done.output and done.output.strip().count("\n") == 0


def test_names_of_files_are_inert_in_a_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs" / "red\x1b[31m"
    run.mkdir(parents=True)
    (run / "run.json").write_text("{}")
    (tmp_path / "a-recipe\x1b.yaml").touch()
    for command, name in (("watch runs/zzz", "runs/red\\x1b[31m"), ("run a-recipe.yaml", "`a-recipe\\x1b.yaml`")):
        assert name in CliRunner().invoke(app, command.split()).output

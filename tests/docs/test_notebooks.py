"""The notebooks of `examples/notebooks`: as they are committed, and run from the first cell to the last by a kernel."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from lowrank_tune.cli import app

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))
SECONDS = 600
SHORT_DEMO = (
    "stages.sft.train.max_steps=6 stages.grpo.train.max_steps=2 stages.grpo.train.prompts_per_step=4 "
    "stages.sft.evaluate.num_prompts=8 stages.grpo.evaluate.num_prompts=8 stages.sft.evaluate.num_samples=1 "
    "stages.grpo.evaluate.num_samples=1"
)
INTERRUPTED = """
import os, signal
from lowrank_tune import run

def stop(event):
    if event.kind == "step_end" and event.step == 2:
        os.kill(os.getpid(), signal.SIGINT)

RECIPE = ("tiny-sft", "train.max_steps=4", "evaluate.num_prompts=8", "evaluate.num_samples=1")
first = run(*RECIPE, out="run", on_event=stop)
"""
CONTINUED = """
second = run(*RECIPE, out="run")
print(first.status, second.status)
"""
FAULTY = """
run("tiny-sft", "train.max_step=1")
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in; the kernel has this package and the command of this environment."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("LOWRANK_TUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "work").mkdir()
    return tmp_path / "work"


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


def execute(notebook: Any, place: Path) -> Any:
    """Runs all cells, each with its outputs afterwards."""
    client = NotebookClient(notebook, timeout=SECONDS, kernel_name="python3", resources={"metadata": {"path": place}})
    return client.execute()


def outputs(notebook: Any, word: str) -> list[Any]:
    """The outputs of the only code cell that contains the word."""
    (cell,) = (cell for cell in notebook.cells if cell.cell_type == "code" and word in cell.source)
    return list(cell.outputs)


def html(output: Any) -> str:
    return str(output.data["text/html"])


def printed(notebook: Any, word: str) -> str:
    return "".join(output.text for output in outputs(notebook, word) if output.output_type == "stream")


def assert_quiet(notebook: Any) -> None:
    """No cell wrote to stderr: neither a warning of tqdm nor a bar."""
    found = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert [output.text for output in found if output.output_type == "stream" and output.name == "stderr"] == []


# --- as committed -----------------------------------------------------------------------------------------------------


def test_there_are_two_notebooks() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["demo_cpu", "qlora_own_rows_gpu"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_committed_without_outputs(path: Path) -> None:
    notebook = read(path)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)
    assert sum("parameters" in cell.metadata.get("tags", ()) for cell in code) == 1
    for cell in code:
        python = re.sub(r"(?m)^(\s*)[%!].*$", r"\1pass", cell.source)
        compile(python, path.name, "exec")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_commands_of_a_notebook_exist(path: Path) -> None:
    names = {command.name for command in app.registered_commands} | {"examples"}
    text = "\n".join(cell.source for cell in read(path).cells if cell.cell_type == "code")
    assert set(re.findall(r"(?m)^!lowrank-tune (\S+)", text)) <= names


# --- run --------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_demo_runs(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTEBOOK_OVERRIDES", SHORT_DEMO)
    notebook = execute(read(NOTEBOOKS[0]), place)
    (live,) = outputs(notebook, "outcome = run(")
    assert "<svg" in html(live) and "stage 1 of 2: SFT, 6 steps" in html(live) and 'lt-done">done' in html(live)
    (result,) = _result(notebook)
    assert html(result).count("<svg") == 8 and "exact answers (pass@1)" in html(result)
    assert "lowrank-tune chat runs/notebook-demo" in html(result)
    assert printed(notebook, "ask(").count("How much is 99 + 84?") == 2
    assert_quiet(notebook)


def _result(notebook: Any) -> list[Any]:
    """The outputs of the cell that is the result alone."""
    return [output for cell in notebook.cells if cell.source == "outcome" for output in cell.outputs]


@pytest.mark.slow
def test_own_rows_are_trained_on(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTEBOOK_BASE", "tiny-tutor")
    notebook = read(NOTEBOOKS[1])
    # `tests/test_doctor.py` has it, and each command takes seconds
    notebook.cells = [cell for cell in notebook.cells if "!lowrank-tune doctor" not in cell.source]
    notebook = execute(notebook, place)
    for word, text in (("data recipe", "200"), ("plan recipe", "GiB")):
        found = printed(notebook, f"!lowrank-tune {word}")
        assert text in found and "\x1b[2K" not in found, "a spinner that turns line after line"
    live, result = outputs(notebook, "outcome = run(")
    assert "<svg" in html(live) and "newest answer" in html(live) and "<svg" in html(result)
    assert printed(notebook, "ask(").startswith("base: ") and (place / "runs/notebook-own-rows/export/peft").is_dir()
    assert_quiet(notebook)


@pytest.mark.slow
def test_the_stop_button_saves_and_the_same_cell_continues(place: Path) -> None:
    notebook = nbformat.v4.new_notebook()
    notebook.cells = [nbformat.v4.new_code_cell(text) for text in (INTERRUPTED, CONTINUED, FAULTY)]
    with pytest.raises(CellExecutionError):
        execute(notebook, place)
    (first,) = outputs(notebook, "first = ")
    assert "lt-interrupted" in html(first) and "step 2 of 4" in html(first)
    assert printed(notebook, "second = ") == "interrupted done\n"
    second = outputs(notebook, "second = ")[0]
    assert "step 4 of 4" in html(second), "with the steps before the interruption"
    assert re.search(r'class="smooth" d="M[^L]*(L[^L]*){3}"', html(second))
    (error,) = outputs(notebook, "max_step=1")
    (line,) = error.traceback
    assert line == "ConfigError: override: train.max_step: unknown key; did you mean `max_steps`?"
    assert_quiet(notebook)

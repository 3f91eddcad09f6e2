"""Whole runs of seconds, through the command line and from Python: folder, resume, refusals, signals, and wrong
input."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from crash import run_fingerprint, small_recipe
from typer.testing import CliRunner, Result

from lowrank_tune import Recipe, UserError, run
from lowrank_tune.cli import app
from lowrank_tune.config import dump
from lowrank_tune.errors import TrainingError
from lowrank_tune.events import CheckpointSaved, LogMessage
from lowrank_tune.run_context import SummaryRecorder
from lowrank_tune.runner import RunResult
from lowrank_tune.training.run_totals import Session, totals_of
from lowrank_tune.training.signals import TrainerControl, handle_signals


def quick(**train: Any) -> dict[str, Any]:
    recipe = small_recipe(**{"max_steps": 4, "save_steps": 2, **train})
    recipe["evaluate"] = {**recipe["evaluate"], "eval_steps": 2}
    return recipe


def lowrank_tune(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def write_recipe(folder: Path, data: dict[str, Any]) -> str:
    path = folder / "mine.yaml"
    path.write_text(dump(Recipe.from_dict(data)), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "one"
    assert run(Recipe.from_dict(quick()), out=out, ui="none").status == "done"
    return out


def test_a_run_leaves_what_the_readme_promises(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert {
        "recipe.yaml",
        "events.jsonl",
        "samples.jsonl",
        "checkpoints",
        "final",
        "summary.json",
        "base.json",
        "data.json",
    } <= names
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["status"] == "done" and summary["step"] == summary["steps"] == 4
    assert set(summary["heldout"]) == {"base", "sft"} and all(0 <= share <= 1 for share in summary["heldout"].values())
    assert summary["base_hash"]["start"] == summary["base_hash"]["end"]
    events = [json.loads(line) for line in (finished / "events.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if event["event"] == "step_end"] == [1, 2, 3, 4]
    assert events[-1]["event"] == "run_ended" and all(event["v"] == 2 for event in events)
    first = next(event for event in events if event["event"] == "step_end")["stats"]
    assert first["kl"] == 0.0, "before the first update the policy is the reference"
    kept = sorted(path.name for path in (finished / "checkpoints").iterdir())
    best = summary["best"]["step"]
    assert set(kept) == {"step-2", "step-4", f"step-{best}"}


def test_the_recipe_of_a_run_repeats_it(finished: Path, tmp_path: Path) -> None:
    outcome = run(Recipe.load(finished / "recipe.yaml"), out=tmp_path / "again", ui="none")
    assert run_fingerprint(outcome.folder) == run_fingerprint(finished)


def test_the_final_adapter_loads_with_plain_peft(finished: Path) -> None:
    from peft import PeftModel

    from lowrank_tune.config import BaseConfig
    from lowrank_tune.model.base import load_base, load_tokenizer

    base = load_base(BaseConfig(), load_tokenizer(BaseConfig()))
    ids = torch.tensor([[1, 40, 41, 42, 43]])
    with torch.no_grad():
        bare = base.model(input_ids=ids).logits
        model = PeftModel.from_pretrained(base.model, finished / "final")
        tuned = model(input_ids=ids).logits
    assert not torch.equal(bare, tuned)
    config = json.loads((finished / "final" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tiny-tutor" and config["target_modules"] == sorted(
        config["target_modules"]
    )


def test_killed_at_its_very_end_it_still_reports_its_last_metrics(finished: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    outcome = run(Recipe.from_dict(quick()), out=tmp_path / "run", ui="none")
    before = json.loads((finished / "summary.json").read_text())
    assert outcome.summary["last"] == before["last"] and outcome.summary["heldout"] == before["heldout"]
    assert run_fingerprint(outcome.folder) == run_fingerprint(finished)


def test_a_finished_run_is_left_alone(tmp_path: Path) -> None:
    recipe = Recipe.from_dict(quick(max_steps=1))
    first = run(recipe, out=tmp_path / "demo", ui="none")
    before = {path: path.read_bytes() for path in first.folder.rglob("*") if path.is_file()}
    second = run(recipe, out=tmp_path / "demo", ui="none")
    assert second.folder == tmp_path / "demo-2"
    assert before == {path: path.read_bytes() for path in first.folder.rglob("*") if path.is_file()}


def stopped_after(recipe: dict[str, Any], out: Path, step: int) -> int:
    """A run in this process that gets SIGINT after a step; returns the step that it reached."""

    def on_event(event: Any) -> None:
        if event.kind == "step_end" and event.step == step:
            os.kill(os.getpid(), signal.SIGINT)

    outcome = run(Recipe.from_dict(recipe), out=out, ui="none", on_event=on_event)
    assert outcome.status == "interrupted"
    return int(outcome.summary["step"])


def test_interrupted_and_continued_equals_straight_through(finished: Path, tmp_path: Path) -> None:
    assert stopped_after(quick(), tmp_path / "run", 3) == 3
    assert (tmp_path / "run" / "checkpoints" / "step-3").exists()
    outcome = run(Recipe.from_dict(quick()), out=tmp_path / "run", ui="none")
    assert run_fingerprint(outcome.folder) == run_fingerprint(finished)


@pytest.mark.parametrize(
    "action", [pytest.param("stop", marks=pytest.mark.slow), "evaluate", pytest.param("save", marks=pytest.mark.slow)]
)
def test_what_is_requested_on_the_way_does_not_choose_the_final_adapter(
    action: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At this rate every step makes it worse: were the first step's adapter measured, it would be the best. Only
    scheduled ones count."""
    recipe = quick(max_steps=6, learning_rate=0.05, lr_scheduler_type="constant")
    recipe["evaluate"]["eval_steps"] = 5
    straight = run(Recipe.from_dict(recipe), out=tmp_path / "straight", ui="none")
    control = TrainerControl()
    monkeypatch.setattr("lowrank_tune.runner.TrainerControl", lambda: control)

    def on_event(event: Any) -> None:
        if event.kind == "step_end" and event.step == 1:
            setattr(control, action, True)

    outcome = run(Recipe.from_dict(recipe), out=tmp_path / "run", ui="none", on_event=on_event)
    if action == "stop":
        assert outcome.status == "interrupted"
        control.stop = False
        outcome = run(Recipe.from_dict(recipe), out=tmp_path / "run", ui="none")
    wanted, got = run_fingerprint(straight.folder), run_fingerprint(outcome.folder)
    assert got["steps"] == wanted["steps"] and got["final"] == wanted["final"]
    assert outcome.summary["best"] == straight.summary["best"]
    assert ((1, "policy") in {(step, role) for step, role, *_ in got["samples"]}) == (action == "evaluate"), (
        "it is measured where it was asked"
    )


@pytest.mark.parametrize("moment", ["before the first step", "while it evaluates"])
def test_stopped_between_two_steps_continues_exactly(
    moment: str, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    control = TrainerControl()
    monkeypatch.setattr("lowrank_tune.runner.TrainerControl", lambda: control)

    def on_event(event: Any) -> None:
        reached = (
            event.kind == "run_started"
            if moment.startswith("before")
            else event.kind == "evaluated" and event.step == 2
        )
        control.stop = control.stop or reached

    first = run(Recipe.from_dict(quick()), out=tmp_path / "run", ui="none", on_event=on_event)
    step = 0 if moment.startswith("before") else 2
    assert first.status == "interrupted" and (first.folder / "checkpoints" / f"step-{step}").exists()
    control.stop = False
    second = run(Recipe.from_dict(quick()), out=tmp_path / "run", ui="none")
    assert run_fingerprint(second.folder) == run_fingerprint(finished)
    events = [json.loads(line) for line in (second.folder / "events.jsonl").read_text().splitlines()]
    sessions = [event["seconds"] for event in events if event["event"] == "run_ended"]
    assert len(sessions) == 2 and abs(second.summary["seconds"] - sum(sessions)) < 0.5


def test_a_changed_recipe_is_refused_with_the_difference_but_more_steps_are_not(tmp_path: Path) -> None:
    stopped_after(quick(), tmp_path / "run", 1)
    with pytest.raises(UserError, match=r"learning_rate: was 0\.002, is 0\.001"):
        run(Recipe.from_dict(quick(learning_rate=1e-3)), out=tmp_path / "run", ui="none")
    assert run(Recipe.from_dict(quick(max_steps=5)), out=tmp_path / "run", ui="none").summary["steps"] == 5


def test_an_adapter_below_stays_as_it_is_and_is_the_reference(finished: Path, tmp_path: Path) -> None:
    recipe = quick()
    recipe["adapters"] = {"sft": {"path": str(finished)}, "policy": {"r": 2}}
    before = (finished / "final" / "adapter_model.safetensors").read_bytes()
    outcome = run(Recipe.from_dict(recipe), out=tmp_path / "run", ui="none")
    assert before == (finished / "final" / "adapter_model.safetensors").read_bytes()
    events = [json.loads(line) for line in (outcome.folder / "events.jsonl").read_text().splitlines()]
    started = next(event for event in events if event["event"] == "run_started")
    assert started["roles"] == {"policy": ["sft", "policy"], "reference": ["sft"]} and "sft" in started["reference"]
    assert next(event for event in events if event["event"] == "step_end")["stats"]["kl"] == 0.0


def test_losses_that_are_not_finite_fail_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import lowrank_tune.algorithms.sft as sft

    monkeypatch.setattr(sft, "sft_loss", lambda logps, scored, weight: logps.sum() * float("nan"))
    with pytest.raises(TrainingError, match="no finite loss"):
        run(Recipe.from_dict(quick(max_steps=9, max_nonfinite_steps=2)), out=tmp_path / "run", ui="none")
    last = json.loads((tmp_path / "run" / "events.jsonl").read_text().splitlines()[-1])
    assert last["event"] == "run_ended" and last["status"] == "failed"


def test_full_disk_while_saving_keeps_earlier_checkpoints(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lowrank_tune.training.checkpointer as module

    real, calls = module.write_atomically, []

    def full(target: Path, snapshot: Any) -> Path:
        calls.append(target)
        if len(calls) == 2:
            raise TrainingError(f"cannot write {target}: the disk is full")
        return real(target, snapshot)

    monkeypatch.setattr(module, "write_atomically", full)
    with pytest.raises(TrainingError, match="the disk is full"):
        run(Recipe.from_dict(quick()), out=tmp_path / "run", ui="none")
    monkeypatch.undo()
    outcome = run(Recipe.from_dict(quick()), out=tmp_path / "run", ui="none")
    assert run_fingerprint(outcome.folder)["final"] == run_fingerprint(finished)["final"]


def test_it_runs_outside_the_main_thread(tmp_path: Path) -> None:
    """Notebooks and servers do that; only the main thread may handle signals."""
    outcomes: list[Any] = []
    thread = threading.Thread(
        target=lambda: outcomes.append(run(Recipe.from_dict(quick(max_steps=1)), out=tmp_path / "run", ui="none"))
    )
    thread.start()
    thread.join()
    assert outcomes and outcomes[0].status == "done"


@pytest.mark.parametrize("repeated", [signal.SIGTERM, signal.SIGHUP])
def test_only_a_second_ctrl_c_ends_a_run_at_once(repeated: signal.Signals) -> None:
    control = TrainerControl()
    with handle_signals(control) as set_training:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(repeated)
        set_training(True)
        signal.raise_signal(repeated)
        assert control.stop
        signal.raise_signal(repeated)
        set_training(False)
        signal.raise_signal(repeated)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize(
    "sent", [signal.SIGINT, *(pytest.param(one, marks=pytest.mark.slow) for one in (signal.SIGTERM, signal.SIGHUP))]
)
def test_a_signal_ends_the_process_with_130_and_a_checkpoint(tmp_path: Path, sent: signal.Signals) -> None:
    recipe, out = write_recipe(tmp_path, small_recipe(max_steps=400, save_steps=400)), tmp_path / "run"
    command = [sys.executable, "-m", "lowrank_tune", "run", recipe, "--out", str(out), "--ui", "plain"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.time() + 120
    while time.time() < deadline and '"event": "step_end"' not in (_read(out / "events.jsonl")):
        time.sleep(0.05)
    process.send_signal(sent)
    if sent != signal.SIGINT:
        # As a terminal that closes does. A second Ctrl-C ends the run at once, a second one of these does not.
        process.send_signal(sent)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert "Traceback" not in output and "\x1b" not in output
    assert json.loads((out / "summary.json").read_text())["status"] == "interrupted"
    assert list((out / "checkpoints").glob("step-*"))


def _read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def rows_file(folder: Path, text: str) -> str:
    path = folder / "rows.jsonl"
    path.write_text(text, encoding="utf-8")
    return str(path)


GOOD = '{"prompt": "What is 1 + 1?", "completion": "It is 2."}\n'
BAD_INPUT = {
    "no such preset": (["run", "tiny-sfft"], "tiny-sft"),
    "no such file": (["run", "absent.yaml"], "absent.yaml"),
    "unknown key": (["run", "tiny-sft", "train.learning_rte=1"], "learning_rate"),
    "wrong type": (["run", "tiny-sft", "train.max_steps=ten"], "train.max_steps"),
    "missing data": (["run", "tiny-sft", "data.train=[{dataset: absent.jsonl}]"], "absent.jsonl"),
    "missing adapter": (["run", "tiny-sft", "adapters.sft.path=nowhere"], "nowhere"),
    "missing folder": (["run", "tiny-sft", "base.model=./nowhere"], "nowhere"),
    "absent hub model": (["run", "tiny-sft", "base.model=nobody/nothing-7b"], "nobody/nothing-7b"),
    "unwritable": (["run", "tiny-sft", "--out", "/proc/nowhere"], "/proc/nowhere"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_wrong_input_gives_one_sentence(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments, wanted = BAD_INPUT[case]
    result = lowrank_tune(*arguments)
    assert result.exit_code in (1, 2), result.output
    assert wanted in result.output and "Traceback" not in result.output and "internal error" not in result.output
    assert len(result.output.strip().splitlines()[-1]) < 400


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("", "rows.jsonl"),
        (GOOD * 3 + "{not json\n" * 3, "line"),
        (GOOD * 3 + '{"prompt": "What?", "completion": ""}\n' * 3, "lines 4, 5, 6"),
        ('{"note": "just text"}\n' * 3, "note"),
    ],
)
def test_bad_rows_stop_the_run_before_it_trains(tmp_path: Path, text: str, wanted: str) -> None:
    result = lowrank_tune(
        "run", "tiny-sft", f"data.train=[{{dataset: {rows_file(tmp_path, text)}}}]", "--out", str(tmp_path / "run")
    )
    assert result.exit_code == 2, result.output
    assert wanted in result.output and "Traceback" not in result.output
    assert '"event": "step_end"' not in _read(tmp_path / "run" / "events.jsonl")


def test_an_adapter_of_another_base_is_refused(tmp_path: Path, finished: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    other = tmp_path / "adapter"
    shutil.copytree(finished / "final", other)
    (other / "manifest.json").unlink()  # the change is meant
    weights = load_file(other / "adapter_model.safetensors")
    save_file(
        {key: torch.zeros(tensor.shape[0], tensor.shape[1] + 64) for key, tensor in weights.items()},
        other / "adapter_model.safetensors",
    )
    recipe = quick()
    recipe["adapters"] = {"sft": {"path": str(other)}, "policy": {"r": 2}}
    with pytest.raises(UserError, match="another base"):
        run(Recipe.from_dict(recipe), out=tmp_path / "run", ui="none")


def test_a_result_is_short_in_a_notebook(tmp_path: Path) -> None:
    result = RunResult("done", tmp_path, {"status": "done", "warnings": ["<b>"]})
    assert repr(result) == f"RunResult(status='done', folder='{tmp_path}')"
    page = result._repr_html_()
    assert 'class="lowrank-tune"' in page and "lt-done" in page and "&lt;b&gt;" in page and "<b>" not in page


def test_pause_before_a_continued_run_is_not_counted_as_its_time() -> None:
    """What is checked before the stage begins is a message of the new session, written before its start."""
    recorder = SummaryRecorder()
    killed = [LogMessage(time=100.0, message=""), CheckpointSaved(time=120.0, step=1, path="", seconds=1.0)]
    recorder(LogMessage(time=3719.0, message="planning memory"))
    session = Session(earlier=totals_of(killed))
    recorder.start_stage([*killed, *(recorder.earlier or ())])
    totals = session.totals(recorder.counter.totals)
    assert totals.seconds == pytest.approx(20.0, abs=1.0) and totals.sessions == 2

"""Chains run: one base in memory, each adapter flowing into the next stack, each stage resumable; and files of
responses are scored."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from crash import run_fingerprint
from safetensors.torch import load_file
from typer.testing import CliRunner

import lowrank_tune.runner as runner
from lowrank_tune import Chain, UserError, run
from lowrank_tune.batch import Row
from lowrank_tune.cli import app
from lowrank_tune.config import dump
from lowrank_tune.errors import TrainingError
from lowrank_tune.evaluation.questions import select_questions
from lowrank_tune.events import Event, LogMessage, RunEnded, RunStarted, StepEnd, from_json
from lowrank_tune.model.base import Base
from lowrank_tune.model.roles import Roles
from lowrank_tune.preflight.base import meta_model
from lowrank_tune.preflight.disk import disk_need
from lowrank_tune.preflight.stages import stages_of
from lowrank_tune.training.sinks import EventBus
from lowrank_tune.ui.report.run_log import read_chain
from lowrank_tune.ui.state import State
from lowrank_tune.ui.terminal.panes import View
from lowrank_tune.ui.terminal.render import render
from lowrank_tune.ui.terminal.text_layout import plain_text
from lowrank_tune.ui.views.summary import summary_table

STAGES = ("1-warm", "2-score", "3-dpo", "4-grpo")


def chain(**changes: Any) -> dict[str, Any]:
    """SFT, then a reward model over it, DPO on top of it, and GRPO on top of both; seconds."""
    pairs = {
        "data": {"train": [{"dataset": "builtin:arithmetic-preferences", "max_samples": 24}], "eval_fraction": 0.2}
    }
    few = {
        "prompts_per_step": 2,
        "micro_batch_size": 8,
        "max_steps": 2,
        "logging_steps": 1,
        "save_steps": 1,
        "learning_rate": 1e-3,
        "gradient_checkpointing": False,
    }
    rows = {key: value for key, value in few.items() if key != "prompts_per_step"} | {"global_batch_size": 8}
    evaluate = {
        "eval_steps": 2,
        "num_completions_to_print": 1,
        "eval_dataset": {"dataset": "builtin:arithmetic", "split": "heldout"},
        "num_prompts": 3,
        "max_new_tokens": 8,
    }
    return {
        "name": "chained",
        "base": {"model": "tiny-tutor"},
        "stages": [
            {
                "name": "warm",
                "algorithm": "sft",
                "data": {"train": [{"dataset": "builtin:arithmetic", "max_samples": 40}]},
                "train": rows,
                "evaluate": evaluate,
            },
            {
                "name": "score",
                "algorithm": "reward",
                **pairs,
                "train": rows,
                "evaluate": {"eval_steps": 2, "num_completions_to_print": 1},
            },
            {"name": "dpo", "algorithm": "dpo", "reference": "warm", **pairs, "train": rows, "evaluate": evaluate},
            {
                "name": "grpo",
                "algorithm": "grpo",
                "reference": "dpo",
                "data": {"train": [{"dataset": "builtin:arithmetic", "max_samples": 40}]},
                "rewards": [{"name": "answer"}, {"name": "length", "target_tokens": 8, "weight": 0.1}],
                "rollout": {"num_generations": 2, "max_new_tokens": 8},
                "train": few,
                "evaluate": evaluate,
            },
        ],
        **changes,
    }


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["LOWRANK_TUNE_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def hashed_bases() -> list[Base]:
    """Is filled by `finished`: the base, each time its tensors are hashed."""
    return []


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, cache: None, hashed_bases: list[Base]
) -> tuple[Path, list[Event]]:
    out, events = tmp_path_factory.mktemp("chains") / "one", list[Event]()
    hashes = Base.hashes

    def counted(base: Base) -> dict[str, str]:
        hashed_bases.append(base)
        return hashes(base)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Base, "hashes", counted)
        assert run(Chain.from_dict(chain()), out=out, ui="none", on_event=events.append).status == "done"
    return out, events


def test_a_chain_leaves_a_folder_for_each_stage_and_one_summary(finished: tuple[Path, list[Event]]) -> None:
    out, events = finished
    assert all((out / stage / "final" / "adapter_model.safetensors").is_file() for stage in STAGES)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["status"] == "done" and summary["algorithm"] == "sft -> reward -> dpo -> grpo"
    assert [stage["folder"] for stage in summary["stages"]] == list(STAGES) and all(
        stage["status"] == "done" for stage in summary["stages"]
    )
    assert list(summary["heldout"]) == ["base", "warm", "dpo", "grpo"], "a reward model answers nothing"
    assert (out / "report.html").is_file() and Chain.load(out / "recipe.yaml").to_dict() == Chain.from_dict(
        chain()
    ).to_dict()
    starts = [event for event in events if isinstance(event, RunStarted)]
    assert [(event.stage, event.stages) for event in starts] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert starts[3].roles == {"policy": ["warm", "dpo", "policy"], "reference": ["warm", "dpo"]}
    assert starts[1].roles == {"reward": ["warm", "reward"], "reference": ["warm"]}


def test_one_base_and_frozen_adapters_stay_what_they_were(
    finished: tuple[Path, list[Event]], hashed_bases: list[Base]
) -> None:
    out, _ = finished
    assert len(hashed_bases) == 1 + len(STAGES), "when it is loaded, and at the end of each stage"
    bases = [json.loads((out / stage / "base.json").read_text()) for stage in STAGES]
    assert all(base["tensors"] == bases[0]["tensors"] for base in bases)
    assert (
        list(bases[3]["adapters"]) == ["warm", "dpo"] and bases[3]["adapters"]["warm"] == bases[1]["adapters"]["warm"]
    )


def test_the_policy_begins_as_its_reference_in_every_stage(finished: tuple[Path, list[Event]]) -> None:
    _, events = finished
    firsts = [
        event.stats["kl"] for event in events if isinstance(event, StepEnd) and event.step == 1 and "kl" in event.stats
    ]
    assert len(firsts) == 3 and all(abs(kl) < 1e-9 for kl in firsts)


def test_disk_space_of_a_chain_is_checked_before_it_runs(finished: tuple[Path, list[Event]], cache: None) -> None:
    """Bytes of tensors on the disk, counted from the files, beside those that the check before a run expects."""
    out, _ = finished
    stages = stages_of(Chain.from_dict(chain()), out)
    model = meta_model(stages[0].recipe.base)
    for stage in stages:
        kept = [tensor_bytes(path) for path in (stage.folder / "checkpoints").iterdir()]
        need = disk_need(stage, model)
        assert need.checkpoint == pytest.approx(max(kept), rel=0.01)
        assert need.checkpoints == pytest.approx(sum(kept), rel=0.01)
        assert need.final == pytest.approx(tensor_bytes(stage.folder / "final"), rel=0.01)


def tensor_bytes(folder: Path) -> int:
    return sum(
        tensor.nbytes for file in folder.rglob("*.safetensors") for tensor in load_file(file).values() if tensor.ndim
    )


class Cut(Exception):
    """A crash between or within stages."""


@pytest.mark.parametrize(
    ("stage", "step"),
    [
        (2, 1),
        pytest.param(3, 1, marks=pytest.mark.slow),
        pytest.param(4, 0, marks=pytest.mark.slow),
        pytest.param(4, 1, marks=pytest.mark.slow),
    ],
)
def test_chain_interrupted_at_any_step_continues_bit_for_bit(
    finished: tuple[Path, list[Event]], tmp_path: Path, stage: int, step: int
) -> None:
    out, place = tmp_path / "cut", [0]

    def cut(event: Event) -> None:
        if isinstance(event, RunStarted):
            place[0] = event.stage
        if place[0] == stage and (
            isinstance(event, RunStarted) if step == 0 else isinstance(event, StepEnd) and event.step == step + 1
        ):
            raise Cut

    with pytest.MonkeyPatch.context() as patch:  # a listener that breaks is let go; this one breaks the run
        patch.setattr(
            EventBus,
            "__call__",
            lambda self, event, real=EventBus.__call__: (real(self, event), cut(event))[0],
        )
        with pytest.raises(Cut):
            run(Chain.from_dict(chain()), out=out, ui="none")
    events = list[Event]()
    outcome = run(Chain.from_dict(chain()), out=out, ui="none", on_event=events.append)
    left = [event for event in events if isinstance(event, LogMessage) and "is left as it is" in event.message]
    assert outcome.status == "done" and len(left) == stage - 1
    for each in STAGES:
        assert run_fingerprint(out / each) == run_fingerprint(finished[0] / each), each
    assert outcome.summary["heldout"] == json.loads((finished[0] / "summary.json").read_text())["heldout"]
    assert outcome.summary["sessions"] == 2, "also if the first one ended between two stages"
    text = summary_table(outcome.summary, out)
    for name, algorithm in (("warm", "sft"), ("score", "reward"), ("dpo", "dpo"), ("grpo", "grpo")):
        assert f"\n{name:10} {algorithm}: done, step 2 of 2 in " in text, "the stages of both sessions"


def test_a_changed_stage_is_refused_and_a_finished_chain_left_alone(
    finished: tuple[Path, list[Event]], tmp_path: Path
) -> None:
    out = tmp_path / "changed"
    half = chain(stages=chain()["stages"][:2])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "chain_summary", lambda *_: (_ for _ in ()).throw(Cut))
        with pytest.raises(Cut):
            run(Chain.from_dict(half), out=out, ui="none")
    half["stages"][1]["train"] = {**half["stages"][1]["train"], "learning_rate": 0.5}
    with pytest.raises(UserError, match=r"another recipe:\n  stages\.score\.train\.learning_rate: was 0\.001, is 0\.5"):
        run(Chain.from_dict(half), out=out, ui="none")


def test_error_contains_the_stage_that_failed(tmp_path: Path, cache: None, capsys: pytest.CaptureFixture[str]) -> None:
    """It fails while its data and base are prepared, before it starts: the last stage that started is another one."""
    stages = [
        {**chain()["stages"][0], "name": name, "evaluate": {"num_completions_to_print": 0}} for name in ("a", "b", "c")
    ]
    for stage in stages:
        stage["train"] = {**stage["train"], "max_steps": 1}
    build, out = runner.build, tmp_path / "out"
    for number, name in enumerate("abc", 1):
        events, screen = list[Event](), State()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(runner, "build", partial(_build_but, name, build))
            with pytest.raises(UserError, match=f"{name} cannot be built"):
                run(Chain.from_dict(chain(stages=stages)), out=out, ui="plain", on_event=events.append)
        ends = [event for event in events if isinstance(event, RunEnded)]
        assert [(event.status, event.stage, event.stages) for event in ends] == [
            *(("done", earlier, 3) for earlier in range(max(1, number - 1), number)),
            ("failed", number, 3),
        ]
        assert f"stage {number} of 3 failed after step 0" in capsys.readouterr().out
        for event in events:
            screen.apply(event)
        assert f"stage {number} failed" in plain_text(render(screen, View(), 120, 40))
        (*_, last) = (from_json(json.loads(line)) for line in (out / f"{number}-{name}/events.jsonl").open())
        assert isinstance(last, RunEnded) and (last.status, last.stage) == ("failed", number)
        log = read_chain(out)
        assert log.status == "failed" and list(log.stages) == ["1-a", "2-b", "3-c"]
        assert [part is not None for part in log.stages.values()] == [place <= number for place in (1, 2, 3)]


def _build_but(name: str, build: Any, recipe: Any, *more: Any, **named: Any) -> Any:
    if recipe.name == name:
        raise UserError(f"{name} cannot be built")
    return build(recipe, *more, **named)


@pytest.mark.slow
def test_a_base_that_changes_between_stages_ends_the_run(
    tmp_path: Path, cache: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second stage begins with the hashes of the end of the first one."""
    two = chain()
    two["stages"] = two["stages"][:2]
    unload = Roles.unload_adapters

    def unload_and_change(roles: Roles) -> None:
        unload(roles)
        norm = roles.base.model.get_decoder().norm.weight
        with torch.no_grad():
            norm += 1

    monkeypatch.setattr(Roles, "unload_adapters", unload_and_change)
    with pytest.raises(TrainingError, match="the frozen base, or a frozen adapter, is not what it was"):
        run(Chain.from_dict(two), out=tmp_path / "run", ui="none")
    assert (tmp_path / "run" / "1-warm" / "final").is_dir() and not (tmp_path / "run" / "2-score" / "final").exists()


def test_a_file_of_responses_is_scored(
    finished: tuple[Path, list[Event]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": "What is 2 + 3?", "completion": text} for text in ("It is 5.", "Good question.", "")]
    Path("answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = CliRunner().invoke(app, ["score", str(finished[0]), "--file", "answers.jsonl", "--out", "scores.jsonl"])
    assert result.exit_code == 0, result.output
    scores = [json.loads(line) for line in Path("scores.jsonl").read_text().splitlines()]
    assert [score["location"] for score in scores] == ["answers.jsonl:1", "answers.jsonl:2"] and scores[0][
        "score"
    ] != scores[1]["score"]
    assert "empty answer" in result.output, "what cannot be scored is told"
    again = CliRunner().invoke(
        app, ["score", str(finished[0] / "2-score"), "--file", "answers.jsonl", "--out", "again.jsonl"]
    )
    assert again.exit_code == 0 and Path("again.jsonl").read_bytes() == Path("scores.jsonl").read_bytes(), (
        "the same run, named by its stage"
    )
    pairs = [{"prompt": "What is 2 + 3?", "chosen": "It is 5.", "rejected": "Good question."}]
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    result = CliRunner().invoke(app, ["score", str(finished[0]), "--file", "pairs.jsonl", "--out", "pairs.scores"])
    sides = [json.loads(line) for line in Path("pairs.scores").read_text().splitlines()]
    assert result.exit_code == 0 and "the chosen answer scores higher" in result.output
    assert [side["side"] for side in sides] == ["chosen", "rejected"]
    assert [side["score"] for side in sides] == pytest.approx([score["score"] for score in scores], abs=1e-5), (
        "whatever shares a batch"
    )


@pytest.mark.parametrize(
    ("run_of", "sentence"), [("3-dpo", "only `algorithm: reward` trains a model that scores"), ("", "is not a run")]
)
def test_scoring_with_something_else_is_refused(
    finished: tuple[Path, list[Event]], tmp_path: Path, run_of: str, sentence: str
) -> None:
    folder = finished[0] / run_of if run_of else tmp_path
    result = CliRunner().invoke(app, ["score", str(folder), "--file", "x.jsonl"])
    assert result.exit_code == 2 and sentence in result.output


def test_a_pair_gives_one_question() -> None:
    """Both of its rows begin with the same question."""
    pairs = {"unit_starts": [0, 2, 4], "units": 2, "__len__": lambda self: 4}
    store = type(
        "Store", (), {**pairs, "__getitem__": lambda self, row: Row([row // 2, 9, row], [False, True, True])}
    )()
    template = SimpleNamespace(decode=lambda ids: f"question {ids[0]}")
    assert [one.text for one in select_questions(store, template, 5)] == ["question 0", "question 1"]  # type: ignore[arg-type]
    assert [one.prompt_ids for one in select_questions(store, template, 1)] == [[0]]  # type: ignore[arg-type]


def test_the_command_line_runs_a_chain_and_shows_its_data(tmp_path: Path, cache: None) -> None:
    file = tmp_path / "mine.yaml"
    short = Chain.from_dict(
        chain(stages=[{**stage, "train": {**stage["train"], "max_steps": 1}} for stage in chain()["stages"][:2]])
    )
    file.write_text(dump(short))
    result = CliRunner().invoke(app, ["run", str(file), "--out", str(tmp_path / "out"), "--ui", "plain"])
    assert result.exit_code == 0 and (tmp_path / "out" / "2-score" / "scores.json").is_file(), result.output
    seen = CliRunner().invoke(app, ["data", str(file)])
    assert seen.exit_code == 0 and "warm: sft" in seen.output and "score: reward" in seen.output

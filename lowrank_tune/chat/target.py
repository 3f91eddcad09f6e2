"""What a chat was asked to open: a run, a stage, a checkpoint, an adapter's folder, or a model; found without reading
any weights."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowrank_tune.assembly.finished_run import FinishedRun
from lowrank_tune.checkpoint import CorruptCheckpoint, load
from lowrank_tune.checkpoint.run_format import check_run_format
from lowrank_tune.config import default_adapter_name, from_dict
from lowrank_tune.errors import UserError, did_you_mean
from lowrank_tune.model.adapters import CONFIG
from lowrank_tune.model.base import BUILTIN_MODEL

_HUB = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[\w.-]+)?(?:@[\w./-]+)?")
_STEP = re.compile(r"step-(0|[1-9]\d*)")


@dataclass(frozen=True)
class ChatTarget:
    """A run with the folder of the adapters to take, `final/` or a checkpoint's; or `adapter`, a folder by itself; or
    `model` alone.

    `description` says what it is.
    """

    description: str
    run: FinishedRun | None = None
    checkpoint: Path | None = None
    adapter: Path | None = None
    model: str | None = None


def resolve_target(name: str) -> ChatTarget:
    """Raises UserError for what is none of these, and for reward models, which do not talk."""
    if name == BUILTIN_MODEL:
        return ChatTarget(f"{BUILTIN_MODEL}, the base that ships with the package", model=name)
    path = Path(name).expanduser()
    if path.is_dir():
        return _folder(path, name)
    if path.is_file():
        raise UserError(f"{name} is a file; name the folder of a run, an adapter or a model")
    if (
        name.startswith((".", "/", "~"))
        or "\\" in name
        or name.count("/") > 1
        or (len(path.parts) > 1 and Path(path.parts[0]).is_dir())
    ):
        if path.parent.is_dir():
            siblings = [str(path.parent / sibling.name) for sibling in path.parent.glob("*/")]
        else:
            siblings = []
        raise UserError(f"there is no run or model {name}{did_you_mean(str(path), siblings)}")
    if (Path("runs") / path / "run.json").is_file():
        raise UserError(f"there is no folder {name}; did you mean `{Path('runs') / path}`?")
    if not _HUB.fullmatch(name):
        raise UserError(f"{name} is no folder, and no name that a model of the hub could have")
    return ChatTarget(f"the model {name}", model=name)


def _folder(path: Path, name: str) -> ChatTarget:
    if (path / "run.json").is_file():
        return _run(path)
    full = path.resolve()
    for folder in (full, full.parent):  # a checkpoint, or the adapter in it
        if (
            _STEP.fullmatch(folder.name)
            and folder.parent.name == "checkpoints"
            and (folder.parents[1] / "run.json").is_file()
        ):
            return _checkpoint(_policy_run(_display_path(path, folder.parents[1])), folder)
    if full.name == "final" and (full.parent / "run.json").is_file():
        return _run(_display_path(path, full.parent))
    if (path / CONFIG).is_file():
        return ChatTarget(f"the adapter in {name}", adapter=path)
    if (path / "config.json").is_file():
        return ChatTarget(f"the model in {name}", model=name)
    runs = sorted(run_folder.name for run_folder in path.glob("*/") if (run_folder / "run.json").is_file())
    raise UserError(
        f"{name} holds no run, adapter or model"
        + (f"; it holds the runs {', '.join(runs[:8])}: name one of them" if runs else "")
    )


def _display_path(given: Path, full: Path) -> Path:
    """The folder as a person would write it from where they named another one in it."""
    return next((parent for parent in given.parents if parent.resolve() == full), full)


def _run(folder: Path) -> ChatTarget:
    check_run_format(folder)
    recipe = _read_json_object(folder / "run.json").get("recipe")
    if not isinstance(recipe, dict):
        raise UserError(f"{folder}/run.json cannot be understood, so nothing tells what this run trained")
    if isinstance(recipe.get("stages"), list):
        return _chain(folder, recipe["stages"])
    run = _policy_run(folder)
    if (folder / "final" / CONFIG).is_file():
        return ChatTarget(f"{folder}, a run of {run.recipe.algorithm} that has ended", run=run)
    return _latest_checkpoint(run)


def _policy_run(folder: Path) -> FinishedRun:
    """A run, ended or not. Raises UserError where it trains no policy."""
    recipe = _read_json_object(folder / "run.json").get("recipe")
    if not isinstance(recipe, dict):
        raise UserError(f"{folder}/run.json cannot be understood, so nothing tells what this run trained")
    if default_adapter_name(recipe.get("algorithm")) != "policy":
        raise UserError(
            f"{folder} trained a reward model, which scores answers and generates none: "
            f"use `lowrank-tune score {folder} --file FILE`"
        )
    return FinishedRun(folder, from_dict(recipe), _read_json_object(folder / "base.json"))


def _chain(folder: Path, stages: list[Any]) -> ChatTarget:
    """The last stage that has something to say."""
    writers = [
        f"{number}-{stage.get('name')}"
        for number, stage in enumerate(stages, 1)
        if isinstance(stage, dict) and default_adapter_name(stage.get("algorithm")) == "policy"
    ]
    if not writers:
        raise UserError(
            f"{folder} is a chain without a stage that trained a policy: a reward model scores answers and generates "
            "none"
        )
    for stage in reversed(writers):
        run = folder / stage
        if (run / "final" / CONFIG).is_file() or _steps(run):
            target = _run(run)
            missing = writers[writers.index(stage) + 1 :]
            if missing:
                later = f"; {', '.join(missing)} of this chain left nothing yet"
            else:
                later = ""
            return ChatTarget(target.description + later, target.run, target.checkpoint)
    raise UserError(
        f"{folder} is a chain that has left nothing to talk to yet: none of {', '.join(writers)} has a checkpoint"
    )


def _latest_checkpoint(run: FinishedRun) -> ChatTarget:
    """Of a run that has not ended: the best checkpoint where the best is what it would leave, else the newest one that
    is whole."""
    for _, path in reversed(_steps(run.path)):
        try:
            state = load(path, path.name).documents.get("state.json", {})
        except CorruptCheckpoint:  # set aside by the run itself, when it goes on
            continue
        if run.recipe.train.load_best_model_at_end:
            best = _get_mapping(_get_mapping(state, "memory"), "best_step")
        else:
            best = None
        if (
            isinstance(best, int)
            and path.name != f"step-{best}"
            and (better := path.with_name(f"step-{best}")).is_dir()
        ):
            return _checkpoint(
                run,
                better,
                f" that has not ended: its best checkpoint so far, of step {best} (the newest is {path})",
            )
        return _checkpoint(
            run,
            path,
            f" that has not ended: its newest checkpoint, of step {path.name.removeprefix('step-')}",
        )
    raise UserError(f"{run.path} has not ended and holds no whole checkpoint yet, so there is nothing to talk to")


def _checkpoint(run: FinishedRun, path: Path, description: str = "") -> ChatTarget:
    """The adapter in a checkpoint. Raises UserError for one that is broken."""
    load(path, path.name)
    description = description or f": the checkpoint of step {path.name.removeprefix('step-')}"
    return ChatTarget(
        f"{run.path}, a run of {run.recipe.algorithm}{description}",
        run,
        path / run.recipe.trained_adapter,
    )


def _steps(run: Path) -> list[tuple[int, Path]]:
    matches = ((_STEP.fullmatch(path.name), path) for path in (run / "checkpoints").glob("step-*"))
    return sorted((int(match[1]), path) for match, path in matches if match)


def _read_json_object(file: Path) -> Mapping[str, Any]:
    try:
        data = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def _get_mapping(data: Any, name: str) -> Any:
    return data.get(name, {}) if isinstance(data, dict) else {}

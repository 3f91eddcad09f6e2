"""Resolves the target of a chat (a run, a stage, a checkpoint, an adapter or a model) without reading weights."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowrank_tune.assembly.finished_run import ChainStage, FinishedRun, chain_stages
from lowrank_tune.checkpoint import CorruptCheckpoint, load
from lowrank_tune.checkpoint.checkpoint import STEP_NAME, saved_steps
from lowrank_tune.checkpoint.run_format import check_run_format
from lowrank_tune.config import default_adapter_name, from_dict
from lowrank_tune.errors import UserError, did_you_mean
from lowrank_tune.json_files import as_mapping, get_mapping, read_json_object
from lowrank_tune.model.adapters import CONFIG
from lowrank_tune.model.base_source import BUILTIN_MODEL

_HUB = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[\w.-]+)?(?:@[\w./-]+)?")


@dataclass(frozen=True)
class ChatTarget:
    """A target: a `run`, whose adapters are in `final/` or in `checkpoint`; or an `adapter` folder; or a `model`.

    `description` is shown to the user.
    """

    description: str
    run: FinishedRun | None = None
    checkpoint: Path | None = None
    adapter: Path | None = None
    model: str | None = None


def resolve_target(name: str) -> ChatTarget:
    """Returns the target with this name. Raises UserError if there is none, and for reward models."""
    if name == BUILTIN_MODEL:
        return ChatTarget(f"{BUILTIN_MODEL}, the base that ships with the package", model=name)
    path = Path(name).expanduser()
    if path.is_dir():
        return _folder(path, name)
    if path.is_file():
        raise UserError(f"{name} is a file; name the folder of a run, an adapter or a model")
    looks_like_path = name.startswith((".", "/", "~")) or "\\" in name or name.count("/") > 1
    begins_with_folder = len(path.parts) > 1 and Path(path.parts[0]).is_dir()
    if looks_like_path or begins_with_folder:
        siblings: list[str] = []
        if path.parent.is_dir():
            siblings = [str(path.parent / sibling.name) for sibling in path.parent.glob("*/")]
        raise UserError(f"there is no run or model {name}{did_you_mean(str(path), siblings)}")
    if (Path("runs") / path / "run.json").is_file():
        raise UserError(f"there is no folder {name}; did you mean `{Path('runs') / path}`?")
    if not _HUB.fullmatch(name):
        raise UserError(f"{name} is neither a folder nor a valid Hub model id")
    return ChatTarget(f"the model {name}", model=name)


def _folder(path: Path, name: str) -> ChatTarget:
    if (path / "run.json").is_file():
        return _run(path)
    full = path.resolve()
    # a checkpoint, or the adapter in it
    for folder in (full, full.parent):
        if not STEP_NAME.fullmatch(folder.name) or folder.parent.name != "checkpoints":
            continue
        run = folder.parents[1]
        if (run / "run.json").is_file():
            return _checkpoint(_policy_run(_display_path(path, run)), folder)
    if full.name == "final" and (full.parent / "run.json").is_file():
        return _run(_display_path(path, full.parent))
    if (path / CONFIG).is_file():
        return ChatTarget(f"the adapter in {name}", adapter=path)
    if (path / "config.json").is_file():
        return ChatTarget(f"the model in {name}", model=name)
    runs = sorted(run_folder.name for run_folder in path.glob("*/") if (run_folder / "run.json").is_file())
    hint = f"; it contains the runs {', '.join(runs[:8])}: name one of them" if runs else ""
    raise UserError(f"{name} contains no run, adapter or model{hint}")


def _display_path(given: Path, full: Path) -> Path:
    """Returns a folder as the user wrote it: the parent of the given path that is this folder."""
    for parent in given.parents:
        if parent.resolve() == full:
            return parent
    return full


def _run(folder: Path) -> ChatTarget:
    check_run_format(folder)
    stages = chain_stages(folder, _recipe_of(folder))
    if stages is not None:
        return _chain(folder, stages)
    run = _policy_run(folder)
    if (folder / "final" / CONFIG).is_file():
        return ChatTarget(f"{folder}, a run of {run.recipe.algorithm} that has ended", run=run)
    return _latest_checkpoint(run)


def _recipe_of(folder: Path) -> dict[str, Any]:
    recipe = read_json_object(folder / "run.json").get("recipe")
    if not isinstance(recipe, dict):
        raise UserError(f"{folder}/run.json cannot be read, so it is unknown what this run trained")
    return recipe


def _policy_run(folder: Path) -> FinishedRun:
    """Returns a run, finished or not. Raises UserError if it does not train a policy."""
    recipe = _recipe_of(folder)
    if default_adapter_name(recipe.get("algorithm")) != "policy":
        raise UserError(
            f"{folder} trained a reward model, which scores answers and generates none: "
            f"use `lowrank-tune score {folder} --file FILE`"
        )
    return FinishedRun(folder, from_dict(recipe), read_json_object(folder / "base.json"))


def _chain(folder: Path, stages: Sequence[ChainStage]) -> ChatTarget:
    """Returns the last policy stage of a chain that has an adapter."""
    writers = [stage.folder.name for stage in stages if stage.trains_policy]
    if not writers:
        raise UserError(
            f"{folder} is a chain without a stage that trained a policy: a reward model scores answers and generates "
            "none"
        )
    for index in reversed(range(len(writers))):
        run = folder / writers[index]
        if (run / "final" / CONFIG).is_file() or saved_steps(run / "checkpoints"):
            target = _run(run)
            missing = writers[index + 1 :]
            later = f"; {', '.join(missing)} of this chain left nothing yet" if missing else ""
            return ChatTarget(target.description + later, target.run, target.checkpoint)
    raise UserError(f"{folder} is a chain without an adapter yet: none of {', '.join(writers)} has a checkpoint")


def _latest_checkpoint(run: FinishedRun) -> ChatTarget:
    """Returns the checkpoint of a run that has not ended: the best one if the run selects it, else the newest."""
    for step, path in reversed(saved_steps(run.path / "checkpoints")):
        try:
            state = load(path, path.name).documents.get("state.json", {})
        # the run moves it aside when it is resumed
        except CorruptCheckpoint:
            continue
        best = None
        if run.recipe.train.load_best_model_at_end:
            best = _best_step(get_mapping(as_mapping(state), "memory"))
        if isinstance(best, int) and best != step:
            best_path = path.with_name(f"step-{best}")
            if best_path.is_dir():
                description = f" that has not ended: its best checkpoint so far, of step {best} (the newest is {path})"
                return _checkpoint(run, best_path, description)
        return _checkpoint(run, path, f" that has not ended: its newest checkpoint, of step {step}")
    raise UserError(f"{run.path} has not ended and has no complete checkpoint yet")


def _best_step(evaluations: Mapping[str, Any]) -> Any:
    """Returns the best step in the state of a checkpoint, None if it is not better than the last evaluated one by more
    than noise, as at the end of a run."""
    difference = get_mapping(get_mapping(evaluations, "last"), "difference")
    mean, stderr = difference.get("mean"), difference.get("stderr")
    if isinstance(mean, float) and isinstance(stderr, float) and -mean <= stderr:
        return None
    return evaluations.get("best_step")


def _checkpoint(
    run: FinishedRun,
    path: Path,
    description: str = "",
) -> ChatTarget:
    """Returns the adapter in a checkpoint. Raises UserError if the checkpoint is damaged."""
    load(path, path.name)
    description = description or f": the checkpoint of step {path.name.removeprefix('step-')}"
    return ChatTarget(
        f"{run.path}, a run of {run.recipe.algorithm}{description}",
        run,
        path / run.recipe.trained_adapter,
    )

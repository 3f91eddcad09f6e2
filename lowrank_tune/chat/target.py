"""What a chat was asked to open: a run, a stage, a checkpoint, an adapter's folder, or a model; found without reading
any weights."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowrank_tune import settings
from lowrank_tune.checkpoint import Broken, load
from lowrank_tune.errors import UserError, did_you_mean
from lowrank_tune.export.finished import Finished
from lowrank_tune.model.adapters import CONFIG
from lowrank_tune.model.base import TINY
from lowrank_tune.recipe import from_dict

_HUB = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[\w.-]+)?(?:@[\w./-]+)?")
_STEP = re.compile(r"step-(0|[1-9]\d*)")


@dataclass(frozen=True)
class Target:
    """A run with the folder of the adapters to take, `final/` or a checkpoint's; or `adapter`, a folder by itself; or
    `model` alone.

    `words` say what it is.
    """

    words: str
    run: Finished | None = None
    checkpoint: Path | None = None
    adapter: Path | None = None
    model: str | None = None


def find(name: str) -> Target:
    """Raises UserError for what is none of these, and for reward models, which do not talk."""
    if name == TINY:
        return Target(f"{TINY}, the base that ships with the package", model=name)
    place = Path(name).expanduser()
    if place.is_dir():
        return _folder(place, name)
    if place.is_file():
        raise UserError(f"{name} is a file; name the folder of a run, an adapter or a model")
    if (
        name.startswith((".", "/", "~"))
        or "\\" in name
        or name.count("/") > 1
        or (len(place.parts) > 1 and Path(place.parts[0]).is_dir())
    ):
        beside = [str(place.parent / one.name) for one in place.parent.glob("*/")] if place.parent.is_dir() else []
        raise UserError(f"there is no run or model {name}{did_you_mean(str(place), beside)}")
    if (Path("runs") / place / "run.json").is_file():
        raise UserError(f"there is no folder {name}; did you mean `{Path('runs') / place}`?")
    if not _HUB.fullmatch(name):
        raise UserError(f"{name} is no folder, and no name that a model of the hub could have")
    return Target(f"the model {name}", model=name)


def _folder(place: Path, name: str) -> Target:
    if (place / "run.json").is_file():
        return _run(place)
    full = place.resolve()
    for folder in (full, full.parent):  # a checkpoint, or the adapter in it
        if (
            _STEP.fullmatch(folder.name)
            and folder.parent.name == "checkpoints"
            and (folder.parents[1] / "run.json").is_file()
        ):
            return _checkpoint(_begun(_shown(place, folder.parents[1])), folder)
    if full.name == "final" and (full.parent / "run.json").is_file():
        return _run(_shown(place, full.parent))
    if (place / CONFIG).is_file():
        return Target(f"the adapter in {name}", adapter=place)
    if (place / "config.json").is_file():
        return Target(f"the model in {name}", model=name)
    runs = sorted(one.name for one in place.glob("*/") if (one / "run.json").is_file())
    raise UserError(
        f"{name} holds no run, adapter or model"
        + (f"; it holds the runs {', '.join(runs[:8])}: name one of them" if runs else "")
    )


def _shown(given: Path, full: Path) -> Path:
    """The folder as a person would write it from where they named another one in it."""
    return next((parent for parent in given.parents if parent.resolve() == full), full)


def _run(folder: Path) -> Target:
    recipe = _object(folder / "run.json").get("recipe")
    if not isinstance(recipe, dict):
        raise UserError(f"{folder}/run.json cannot be understood, so nothing tells what this run trained")
    if isinstance(recipe.get("stages"), list):
        return _chain(folder, recipe["stages"])
    run = _begun(folder)
    if (folder / "final" / CONFIG).is_file():
        return Target(f"{folder}, a run of {run.recipe.algorithm} that has ended", run=run)
    return _newest(run)


def _begun(folder: Path) -> Finished:
    """A run, ended or not. Raises UserError where it trains no policy."""
    recipe = _object(folder / "run.json").get("recipe")
    if not isinstance(recipe, dict):
        raise UserError(f"{folder}/run.json cannot be understood, so nothing tells what this run trained")
    if settings.trained_by(recipe.get("algorithm")) != "policy":
        raise UserError(
            f"{folder} trained a reward model, which scores answers and has no words of its own: "
            f"`lowrank-tune eval {folder} --file FILE` asks it"
        )
    return Finished(folder, from_dict(recipe), _object(folder / "base.json"))


def _chain(folder: Path, stages: list[Any]) -> Target:
    """The last stage that has something to say."""
    writers = [
        f"{number}-{stage.get('name')}"
        for number, stage in enumerate(stages, 1)
        if isinstance(stage, dict) and settings.trained_by(stage.get("algorithm")) == "policy"
    ]
    if not writers:
        raise UserError(
            f"{folder} is a chain without a stage that trained a policy: a reward model scores answers and has no "
            f"words of its own"
        )
    for stage in reversed(writers):
        run = folder / stage
        if (run / "final" / CONFIG).is_file() or _steps(run):
            found = _run(run)
            missing = writers[writers.index(stage) + 1 :]
            later = f"; {', '.join(missing)} of this chain left nothing yet" if missing else ""
            return Target(found.words + later, found.run, found.checkpoint)
    raise UserError(
        f"{folder} is a chain that has left nothing to talk to yet: none of {', '.join(writers)} has a checkpoint"
    )


def _newest(run: Finished) -> Target:
    """Of a run that has not ended: the best checkpoint where the best is what it would leave, else the newest one that
    is whole."""
    for _, path in reversed(_steps(run.path)):
        try:
            state = load(path, path.name).documents.get("state.json", {})
        except Broken:  # set aside by the run itself, when it goes on
            continue
        best = _inside(_inside(state, "memory"), "best_step") if run.recipe.train.final == "best" else None
        if (
            isinstance(best, int)
            and path.name != f"step-{best}"
            and (better := path.with_name(f"step-{best}")).is_dir()
        ):
            return _checkpoint(
                run, better, f" that has not ended: its best checkpoint so far, of step {best} (the newest is {path})"
            )
        return _checkpoint(
            run, path, f" that has not ended: its newest checkpoint, of step {path.name.removeprefix('step-')}"
        )
    raise UserError(f"{run.path} has not ended and holds no whole checkpoint yet, so there is nothing to talk to")


def _checkpoint(run: Finished, path: Path, words: str = "") -> Target:
    """The adapter in a checkpoint. Raises UserError for one that is broken."""
    load(path, path.name)
    words = words or f": the checkpoint of step {path.name.removeprefix('step-')}"
    return Target(f"{run.path}, a run of {run.recipe.algorithm}{words}", run, path / run.recipe.trained)


def _steps(run: Path) -> list[tuple[int, Path]]:
    found = ((_STEP.fullmatch(path.name), path) for path in (run / "checkpoints").glob("step-*"))
    return sorted((int(match[1]), path) for match, path in found if match)


def _object(file: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _inside(data: Any, name: str) -> Any:
    return data.get(name, {}) if isinstance(data, dict) else {}

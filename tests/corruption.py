"""Files that change at rest: one file of a killed run, or of its cache, gets a flipped bit, loses its end, becomes
zeros, is deleted, or is swapped with the same file of another checkpoint or of another run; then the run is continued.

The result must be that of the straight run, or a sentence must name what is broken. `python tests/corruption.py
--seconds 600 --seed 1` is the long sweep.
"""

from __future__ import annotations

import argparse
import random
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from crash import KILL_POINTS, run_fingerprint, small_recipe
from faults import CommandServer, Outcome, cache_of, checkpoints_of, fault_recipe, is_whole, leftovers, sweep

LOST_BEST = "final/ is the adapter of the last step instead of the best"


def chain_recipe() -> dict[str, Any]:
    """SFT, then DPO on top of it; two steps each."""
    stages = []
    for algorithm in ("sft", "dpo"):
        recipe = small_recipe(algorithm, max_steps=2, save_steps=1)
        stages.append({"name": algorithm, **{key: recipe[key] for key in recipe if key not in ("name", "base")}})
    return {"name": "crash", "base": {"model": "tiny-tutor"}, "stages": stages}


@dataclass(frozen=True)
class Situation:
    """A run, and the call in which it was killed: of `KILL_POINTS[place]`, after `call` others."""

    recipe: Callable[[], dict[str, Any]]
    place: str
    call: int


SITUATIONS = {
    "sft": Situation(partial(fault_recipe, "sft"), "a step", 5),
    "grpo": Situation(partial(fault_recipe, "grpo"), "a step", 5),
    "dpo": Situation(partial(fault_recipe, "dpo"), "a step", 5),
    "at its end": Situation(partial(fault_recipe, "sft"), "end of a stage", 0),
    "between stages": Situation(chain_recipe, "start of a stage", 1),
    "in the second stage": Situation(chain_recipe, "a step", 3),
}


# --- what happens to a file -------------------------------------------------------------------------------------------


def flip(path: Path, stream: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[stream.randrange(len(data))] ^= 1 << stream.randrange(8)
    path.write_bytes(data)


def truncate(path: Path, stream: random.Random) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: stream.randrange(len(data))])


def zero(path: Path, _: random.Random) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def delete(path: Path, _: random.Random) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def swap(path: Path, other: Path) -> None:
    """Each takes the place of the other."""
    between = path.with_name("between")
    path.rename(between)
    other.rename(path)
    between.rename(other)


DAMAGES: dict[str, Callable[[Path, random.Random], None]] = {
    "flip": flip,
    "truncate": truncate,
    "zero": zero,
    "delete": delete,
}


def groups_of(run: Path) -> list[list[Path]]:
    """What may be damaged: files of checkpoints, whole checkpoints, files of `final/`, logs and other files of the run,
    files of the cache. Empty files and empty groups are left out."""
    files = [path for kept in (run, cache_of(run)) for path in sorted(kept.rglob("*")) if path.is_file()]
    groups: dict[str, list[Path]] = {"folders": sorted(run.rglob("step-*"))}
    for path in files:
        parts = path.relative_to(run).parts if path.is_relative_to(run) else ("cache",)
        group = next((part for part in ("checkpoints", "final", "cache") if part in parts), "run")
        groups.setdefault(group, []).extend([path] if path.stat().st_size else [])
    return [group for group in groups.values() if group]


def partners_of(path: Path, run: Path, other_run: Path) -> list[Path]:
    """What a file can be swapped with: the same file of other checkpoints, stages, and of the other run, where its
    content differs; a checkpoint with others of its run."""
    if path.is_dir():
        return [other for other in path.parent.glob("step-*") if other != path]
    if not path.is_relative_to(run):
        return []
    others = [other for other in run.rglob(path.name) if other.is_file() and other != path]
    others += [other_run / path.relative_to(run)]
    return [other for other in others if other.is_file() and other.read_bytes() != path.read_bytes()]


def copy(run: Path, target: Path) -> None:
    """A run with its cache."""
    shutil.copytree(run, target)
    if cache_of(run).exists():
        shutil.copytree(cache_of(run), cache_of(target))


def remove(run: Path) -> None:
    for kept in (run, cache_of(run)):
        shutil.rmtree(kept, ignore_errors=True)


# --- draws ------------------------------------------------------------------------------------------------------------


def stages_of(run: Path) -> list[Path]:
    """The folders of the stages of a chain; of a single run its own."""
    return sorted(path.parent for path in run.glob("*/run.json")) or [run]


def fingerprints(run: Path) -> dict[str, Any]:
    return {stage.name if stage != run else "": run_fingerprint(stage) for stage in stages_of(run)}


def results(run: Path) -> dict[str, Any]:
    """What a run leaves besides its log: final adapters and scores."""
    return {
        (stage.name if stage != run else "", file): (stage / file).read_bytes()
        for stage in stages_of(run)
        for file in ("final/adapter_model.safetensors", "final/adapter_config.json", "scores.json")
        if (stage / file).exists()
    }


OUTCOMES = ("refused", "best checkpoint reported as lost", "equal but for the log", "set aside, equal", "equal")
"""How a damaged run may end."""


class Corruptions:
    """Draws of a situation, a file and a damage, from a seed. Each is carried out, and the run continued and
    checked."""

    def __init__(self, server: CommandServer, folder: Path, seed: int, situations: Sequence[str] = ()) -> None:
        self.server, self.folder, self.stream = server, folder, random.Random(seed)
        self.situations = sorted(situations or SITUATIONS)
        self._straight: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {}

    def killed(self, name: str, seed: int = 0) -> Path:
        """The folder of the killed run, as it was left; with another seed another run, killed at the same place."""
        kept = self.folder / f"killed-{name.replace(' ', '-')}-{seed}"
        if not kept.exists():
            situation, out = SITUATIONS[name], self.run_folder(name)
            recipe = {**situation.recipe(), **({"seed": seed} if seed else {})}
            remove(out)
            outcome = self.server.run(recipe, out, die_in=(*KILL_POINTS[situation.place], situation.call))
            assert outcome.code == -9, outcome.text
            copy(out, kept)
        return kept

    def run_folder(self, name: str) -> Path:
        """Returns the folder of a run. A stage finds the one before it by its path."""
        return self.folder / name.replace(" ", "-")

    def straight(self, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """Fingerprints and results of the killed run, continued without any damage."""
        if name not in self._straight:
            out = self.restore(name)
            outcome = self.server.run(SITUATIONS[name].recipe(), out)
            assert outcome.code == 0, outcome.text
            self._straight[name] = fingerprints(out), results(out)
        return self._straight[name]

    def restore(self, name: str) -> Path:
        """Puts the killed run where it was."""
        kept, out = self.killed(name), self.run_folder(name)
        remove(out)
        copy(kept, out)
        return out

    def draw(self) -> str:
        """Damages a run and continues it; returns a line about it, which ends with one of `OUTCOMES`. Raises
        AssertionError if something is lost, or differs without a message."""
        name = self.stream.choice(self.situations)
        self.straight(name)
        self.killed(name, 1)
        out = self.restore(name)
        kind, target, what = self.damage(name, out)
        outcome = self.server.run(SITUATIONS[name].recipe(), out)
        line = f"{name}: {kind} {what}"
        return f"{line}: {self.check(out, kind, target, outcome, line)}"

    def damage(self, name: str, out: Path) -> tuple[str, Path, str]:
        """Damages a drawn file or checkpoint; returns the kind of damage, the path, and its name for a line."""
        path = self.stream.choice(self.stream.choice(groups_of(out)))
        kind = self.stream.choice(["delete", "swap"] if path.is_dir() else [*DAMAGES, "swap"])
        label = str(path.relative_to(self.folder))
        if kind != "swap":
            DAMAGES[kind](path, self.stream)
            return kind, path, label
        others = partners_of(path, out, self.killed(name, 1))
        if not others:
            return self.damage(name, out)
        other = self.stream.choice(others)
        if other.is_relative_to(out):
            swap(path, other)
        else:
            shutil.copyfile(other, path)
        return kind, path, f"{label} with {other.relative_to(self.folder)}"

    def check(self, out: Path, kind: str, target: Path, outcome: Outcome, line: str) -> str:
        """Checks the continued run; returns one of `OUTCOMES`."""
        wanted, wanted_results = self.straight(next(name for name in SITUATIONS if self.run_folder(name) == out))
        assert "Traceback" not in outcome.text and "internal error" not in outcome.text, f"{line}: {outcome.text}"
        assert leftovers(out, cache_of(out)) == [], line
        if outcome.code != 0:
            assert outcome.code == 2 and str(out) in outcome.message, f"{line}: {outcome.code}: {outcome.message}"
            assert "checkpoints" not in target.parts, f"{line}: an older checkpoint was there: {outcome.message}"
            return "refused"
        newest = max(checkpoints_of(stages_of(out)[-1]).items())[1]
        assert is_whole(newest), f"{line}: a broken checkpoint stays"
        if LOST_BEST in outcome.text:
            return "best checkpoint reported as lost"
        assert results(out) == wanted_results, f"{line}: another result: {outcome.text}"
        if fingerprints(out) != wanted:
            assert target.name == "events.jsonl", f"{line}: other figures"
            # a digit of a log that became another digit is not a broken line
            assert "is damaged" in outcome.text or kind in ("flip", "swap"), (
                f"{line}: a log with gaps, without a message"
            )
            return "equal but for the log"
        return "set aside, equal" if list(out.rglob("broken-*")) else "equal"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--situations", nargs="*", choices=sorted(SITUATIONS), default=[])
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        sweep(Corruptions(CommandServer(), Path(scratch), chosen.seed, chosen.situations).draw, chosen.seconds)

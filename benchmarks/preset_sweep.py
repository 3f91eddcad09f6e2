"""Learning rate and LoRA rank on the tiny base: SFT by both, a reward model, DPO and GRPO by learning rate.

    PYTHONPATH=. python benchmarks/preset_sweep.py                   # all four; prints a Markdown table for each
    PYTHONPATH=. python benchmarks/preset_sweep.py sft dpo           # some of them
    PYTHONPATH=. python benchmarks/preset_sweep.py --json FILE       # appends one JSON line for each run

Every run is a `tiny-*` preset, shortened, in this process. Rates are multiples of the preset's own. `lora_alpha` is 32
at every rank. What is measured is always on rows that are not trained on: for SFT the loss on 200 answers, for a
reward model the share of 200 pairs in the right order, for DPO and GRPO (both on top of one SFT adapter, which is their
reference) the exact answers to 100 questions, two sampled for each.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lowrank_tune import Recipe, run
from lowrank_tune.events import Evaluated, Event, StepEnd

FACTORS = (0.1, 0.3, 1.0, 3.0)
RANKS = (4, 16, 64)
MEASURES = {
    "sft": "held-out loss",
    "reward": "pairs in the right order",
    "dpo": "exact answers",
    "grpo": "exact answers",
}
ANSWERS = {"evaluate.num_prompts": 100, "evaluate.num_samples": 2, "evaluate.num_completions_to_print": 0}
NO_ANSWERS = {
    "evaluate.eval_dataset": "null",
    "evaluate.num_prompts": "null",
    "evaluate.num_samples": "null",
    "evaluate.max_new_tokens": "null",
    "evaluate.num_completions_to_print": 0,
}
ROWS = {"data.validation": "[{dataset: builtin:arithmetic, split: heldout, max_samples: 200}]"}
SHORT: dict[str, dict[str, Any]] = {
    "sft": {"train.num_train_epochs": 2, **ROWS, **NO_ANSWERS},
    "reward": {
        "train.num_train_epochs": 1,
        "data.train.0.max_samples": 800,
        "evaluate.num_completions_to_print": 0,
    },
    "dpo": {"train.num_train_epochs": 1, **ANSWERS},
    "grpo": {"train.max_steps": 12, **ANSWERS},
}
ONE_EVALUATION = {"evaluate.eval_steps": 1000, "train.load_best_model_at_end": "false"}
TINY = {"train.max_steps": 2, "data.train.0.max_samples": 64}


@dataclass(frozen=True)
class Cell:
    """One run: what was set, and what it reached."""

    algorithm: str
    learning_rate: float
    r: int
    lora_alpha: float
    steps: int
    before: float | None
    after: float
    kl: float | None
    cpu_seconds: float


def recipe_of(algorithm: str, factor: float, rank: int, sft: Path | None, tiny: bool) -> Recipe:
    """The shortened preset with this rate and rank; on top of the adapter of `sft` where that is given."""
    preset = Recipe.load(f"tiny-{algorithm}")
    overrides = {**SHORT[algorithm], **ONE_EVALUATION, **(TINY if tiny else {})}
    if tiny:
        overrides.pop("train.num_train_epochs", None)  # `train.max_steps` contradicts it
    recipe = Recipe.load(
        f"tiny-{algorithm}",
        *(f"{key}={value}" for key, value in overrides.items()),
        f"train.learning_rate={preset.train.learning_rate * factor:.3g}",
        f"adapters.{preset.trained_adapter}.r={rank}",
    )
    if sft is None:
        return recipe
    data = recipe.to_dict()
    # the frozen adapter comes first: adapters are stacked in this order
    return Recipe.from_dict({**data, "adapters": {"sft": {"path": str(sft)}, **data["adapters"]}})


def measure(recipe: Recipe, folder: Path) -> Cell:
    """Trains, and reads the held-out measure of the algorithm."""
    events: list[Event] = []
    started = time.process_time()
    outcome = run(recipe, out=folder, ui="none", on_event=events.append)
    if outcome.status != "done":
        raise SystemExit(f"{recipe.algorithm}: {outcome.status}")
    adapter = recipe.adapters[recipe.trained_adapter]
    last_step = [event for event in events if isinstance(event, StepEnd)][-1]
    before, after = _held_out(recipe, outcome.summary, [event for event in events if isinstance(event, Evaluated)])
    return Cell(
        recipe.algorithm,
        recipe.train.learning_rate,
        adapter.r,
        adapter.lora_alpha,
        last_step.step,
        before,
        after,
        outcome.summary["last"].get("kl"),
        time.process_time() - started,
    )


def _held_out(recipe: Recipe, summary: dict[str, Any], evaluations: list[Evaluated]) -> tuple[float | None, float]:
    if recipe.algorithm == "sft":
        return None, float(evaluations[-1].stats["eval_loss"])
    if recipe.algorithm == "reward":
        return None, float(summary["heldout_pairs"]["accuracy"])
    before, after = list(summary["heldout"].values())[-2:]
    return float(before), float(after)


def cells(algorithms: list[str], folder: Path, tiny: bool) -> Iterator[Cell]:
    """Every run of the sweep, one after the other."""
    sft = None
    if {"dpo", "grpo"} & set(algorithms):
        sft = folder / "sft-below"
        settings = {**NO_ANSWERS, **(TINY if tiny else {})}
        below = Recipe.load("tiny-sft", *(f"{key}={value}" for key, value in settings.items()))
        if run(below, out=sft, ui="none").status != "done":
            raise SystemExit("the SFT adapter below DPO and GRPO was not trained")
    for algorithm in algorithms:
        for rank in RANKS if algorithm == "sft" else (16,):
            for factor in FACTORS:
                top = sft if algorithm in ("dpo", "grpo") else None
                recipe = recipe_of(algorithm, factor, rank, top, tiny)
                yield measure(recipe, folder / f"{algorithm}-{rank}-{factor}")


def table(algorithm: str, found: list[Cell]) -> str:
    """Markdown: for SFT ranks down and rates across, else a row for each rate."""
    rates = sorted({cell.learning_rate for cell in found})
    if algorithm == "sft":
        by_place = {(cell.r, cell.learning_rate): cell.after for cell in found}
        lines = [f"| {MEASURES[algorithm]} | {' | '.join(f'{rate:g}' for rate in rates)} |"]
        lines += ["|---|" + "---|" * len(rates)]
        for rank in sorted({cell.r for cell in found}):
            lines.append(f"| r {rank} | {' | '.join(f'{by_place[rank, rate]:.3f}' for rate in rates)} |")
        return "\n".join(lines)
    if algorithm == "reward":
        lines = [f"| learning rate | {MEASURES[algorithm]} |", "|---|---|"]
        return "\n".join([*lines, *(f"| {cell.learning_rate:g} | {cell.after:.1%} |" for cell in found)])
    lines = [f"| learning rate | {MEASURES[algorithm]}: SFT | after {algorithm} | KL to SFT |", "|---|---|---|---|"]
    for cell in found:
        lines.append(f"| {cell.learning_rate:g} | {cell.before:.1%} | {cell.after:.1%} | {cell.kl:.4f} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("algorithms", nargs="*", metavar="ALGORITHM", help=f"of {', '.join(MEASURES)}; default: all")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append a JSON line for each run")
    parser.add_argument("--tiny", action="store_true", help="two steps each: checks that it runs, not what it measures")
    options = parser.parse_args(arguments)
    if unknown := set(options.algorithms) - set(MEASURES):
        parser.error(f"no such algorithm: {', '.join(sorted(unknown))}")
    algorithms = [name for name in MEASURES if name in options.algorithms or not options.algorithms]
    found: list[Cell] = []
    with tempfile.TemporaryDirectory() as folder:
        for cell in cells(algorithms, Path(folder), options.tiny):
            found.append(cell)
            print(json.dumps(asdict(cell)), flush=True)
            if options.json is not None:
                with options.json.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(asdict(cell)) + "\n")
    for algorithm in algorithms:
        rows = [cell for cell in found if cell.algorithm == algorithm]
        seconds = sum(cell.cpu_seconds for cell in rows)
        print(f"\n{algorithm}, {rows[0].steps} steps each, {seconds:.0f} CPU s\n\n{table(algorithm, rows)}")


if __name__ == "__main__":
    main()

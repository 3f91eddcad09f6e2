"""A control for GRPO: the demo's second stage with its rewards dealt out at random among the completions of each step.
Nothing may improve.

`python benchmarks/shuffled_rewards.py RUN` where RUN is a finished `make demo`: its SFT stage is what both runs begin
from.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from lowrank_tune import Recipe, run
from lowrank_tune.assembly.rl import RewardScorer


class Shuffled(RewardScorer):
    """The same rewards for other completions."""

    dealt = 0

    def collect(self) -> Mapping[int, Sequence[float]]:
        scores = dict(super().collect())
        values = list(scores.values())
        random.Random(f"shuffled-{Shuffled.dealt}").shuffle(values)
        Shuffled.dealt += 1
        return dict(zip(scores, values, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    arguments = parser.parse_args()
    from lowrank_tune.assembly import sources

    sources.RewardScorer = Shuffled  # type: ignore[misc]
    recipe = Recipe.load("tiny-grpo", "name=shuffled", "train.load_best_model_at_end=false").to_dict()
    recipe["adapters"] = {"sft": {"path": str(arguments.run / "1-sft")}, **recipe["adapters"]}
    with tempfile.TemporaryDirectory() as folder:
        outcome = run(Recipe.from_dict(recipe), out=Path(folder) / "shuffled", ui="plain")
    print({name: f"{share:.1%}" for name, share in outcome.summary["heldout"].items()})


if __name__ == "__main__":
    main()

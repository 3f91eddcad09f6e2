"""The presets as a person looks for them: by the size of their base, then by base, then by what is done to it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from lowrank_tune.config.chain import Chain
from lowrank_tune.config.extends import find_preset, preset_names, read_recipe
from lowrank_tune.config.recipe import Recipe

MODEL_SIZE_GROUPS = (
    (1.0, "Tiny: the base that ships with the package, on any CPU"),
    (5.0, "3B and 4B"),
    (10.0, "7B and 8B"),
    (20.0, "14B"),
    (float("inf"), "32B"),
)
"""Bases with fewer than so many billion weights, and what they are called together."""
ALGORITHM_ORDER = ("sft", "reward", "dpo", "grpo", "ppo")
SIZE = re.compile(r"(\d+(?:\.\d+)?)B\b")
PEAK = re.compile(r"^# Planned peak: (\d+(?:\.\d+)?) GiB", re.MULTILINE)


@dataclass(frozen=True)
class Preset:
    """One preset. `algorithms` are those of its stages, one where it is no chain; `billions` is the size of its base, 0
    for the tiny one.

    `peak_gib` is the planned peak of memory that its file tells, None where it tells none.
    """

    name: str
    description: str
    algorithms: tuple[str, ...]
    base: str
    billions: float
    peak_gib: float | None

    @property
    def group(self) -> str:
        """What bases of this size are called together."""
        return next(title for limit, title in MODEL_SIZE_GROUPS if self.billions < limit)


def list_presets() -> list[Preset]:
    """Every preset, the smallest base first; of one base, single algorithms before chains."""
    return sorted((_load_preset(name) for name in preset_names()), key=_sort_key)


def _load_preset(name: str) -> Preset:
    tree, problems, stem = read_recipe(name)
    loaded = (
        Chain.from_tree(tree, problems, stem, ())
        if "stages" in tree.value
        else Recipe.from_tree(tree, problems, stem, ())
    )
    stages = loaded.stages if isinstance(loaded, Chain) else (loaded,)
    base = stages[0].base.model
    size = SIZE.search(base)
    peak = PEAK.search(find_preset(name).read_text(encoding="utf-8"))
    return Preset(
        name,
        loaded.description,
        tuple(stage.algorithm for stage in stages),
        base,
        float(size.group(1)) if size else 0.0,
        float(peak.group(1)) if peak else None,
    )


def _sort_key(preset: Preset) -> tuple[float, str, int, list[int], str]:
    # so that a chain over a pretrained base stands behind what is done to its chat model
    family = preset.name.rpartition("-")[0]
    return (
        preset.billions,
        family,
        len(preset.algorithms),
        [ALGORITHM_ORDER.index(algorithm) for algorithm in preset.algorithms],
        preset.name,
    )

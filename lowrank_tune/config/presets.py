"""The list of presets, sorted by the size of their base, then by base and by algorithm."""

from __future__ import annotations

import re
from dataclasses import dataclass

from lowrank_tune.config.extends import find_preset, preset_names
from lowrank_tune.config.loading import load_any

MODEL_SIZE_GROUPS = (
    (1.0, "Tiny: the base that ships with the package, on any CPU"),
    (5.0, "3B and 4B"),
    (10.0, "7B to 9B"),
    (20.0, "14B"),
    (float("inf"), "32B"),
)
"""Groups of bases by billions of weights: the upper limit, and the title."""
ALGORITHM_ORDER = ("sft", "reward", "dpo", "kto", "grpo", "ppo")
SIZE = re.compile(r"(\d+(?:\.\d+)?)B\b")
BILLIONS_BY_BASE = {
    "google/gemma-4-E4B-it": 7.5,
    "ibm-granite/granite-4.0-micro": 3.4,
    "microsoft/Phi-4-mini-instruct": 3.8,
}
"""Billions of weights of bases whose names do not have them: E4B is without the embeddings of layers."""
PEAK = re.compile(r"^# Planned peak: (\d+(?:\.\d+)?) GiB", re.MULTILINE)


@dataclass(frozen=True)
class Preset:
    """One preset."""

    name: str
    description: str
    algorithms: tuple[str, ...]
    """The algorithms of its stages; one if it is a single recipe."""
    base: str
    billions: float
    """Weights of its base; 0 for the tiny one."""
    peak_gib: float | None
    """The planned peak of memory that its file states, if it states one."""

    @property
    def group(self) -> str:
        """The title of bases of this size."""
        return next(title for limit, title in MODEL_SIZE_GROUPS if self.billions < limit)


def list_presets() -> list[Preset]:
    """Returns every preset, the smallest base first; of one base, single algorithms before chains."""
    return sorted((_load_preset(name) for name in preset_names()), key=_sort_key)


def _load_preset(name: str) -> Preset:
    loaded = load_any(name)
    base = loaded.stages[0].base.model
    size = SIZE.search(base)
    billions = BILLIONS_BY_BASE.get(base, float(size[1]) if size else 0.0)
    peak = PEAK.search(find_preset(name).read_text(encoding="utf-8"))
    return Preset(
        name,
        loaded.description,
        tuple(stage.algorithm for stage in loaded.stages),
        base,
        billions=billions,
        peak_gib=float(peak[1]) if peak else None,
    )


def _sort_key(preset: Preset) -> tuple[float, str, int, list[int], str]:
    # a chain over a pretrained base is listed after the presets of its chat model
    family = preset.name.rpartition("-")[0]
    order = [ALGORITHM_ORDER.index(algorithm) for algorithm in preset.algorithms]
    return preset.billions, family, len(preset.algorithms), order, preset.name


def presets() -> list[tuple[str, str, str]]:
    """Returns name, description and algorithm of every preset, by name; of a chain, all its algorithms."""
    return sorted((preset.name, preset.description, " -> ".join(preset.algorithms)) for preset in list_presets())

"""The run-time estimate of `plan` against published and measured speeds; no weights, no network, no GPU.

    PYTHONPATH=. python benchmarks/run_time_estimates.py    # a row for each figure, as Markdown

The estimate is of this kit with plain layers, as those that were measured; most published speeds are of
other programs with fused or compiled kernels. Errors are printed as they are: no constant of the estimate is adapted to
them. Published and measured figures and their conditions are in docs/time-and-cost.md and docs/benchmarks.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from lowrank_tune.config import RecipeConfig, load_any
from lowrank_tune.memory_planner.gpu_specs import LAUNCH_SECONDS
from lowrank_tune.memory_planner.planned_gpu import gpu_named
from lowrank_tune.memory_planner.planner import recomputed_of
from lowrank_tune.memory_planner.roofline import phase_time
from lowrank_tune.memory_planner.specs import simulation_specs
from lowrank_tune.memory_planner.step_costs import OPTIMIZER, UPDATE, step_costs
from lowrank_tune.memory_planner.update_speed import estimated_update_speed

SETTINGS = (
    "train.torch_compile=false",
    "train.micro_batch_tokens=null",
    "train.gradient_checkpointing=all",
    "train.num_train_epochs=null",
    "train.max_steps=100",
)
ACCUMULATION = 4


@dataclass(frozen=True)
class Figure:
    """Tokens per second of the update, of `rows` full rows in a micro-batch, as measured by `source`."""

    source: str
    gpu: str
    preset: str
    rows: int
    tokens_per_second: float
    length: int = 2048
    accumulation: int = ACCUMULATION
    launches: int = 0
    """Launches of a step, where they were measured."""

    def recipe(self) -> RecipeConfig:
        loaded = load_any(
            self.preset,
            *SETTINGS,
            f"data.max_length={self.length}",
            f"train.micro_batch_size={self.rows}",
            f"train.global_batch_size={self.rows * self.accumulation}",
        )
        assert isinstance(loaded, RecipeConfig)
        return loaded


PUBLISHED = (
    Figure("torchtune, compiled", "4090", "llama-3.1-8b-sft", 2, 2413),
    Figure("Unsloth", "5090", "qwen3-8b-sft", 2, 3400),
    Figure("Unsloth", "h100", "qwen3-8b-sft", 2, 8200),
    Figure("Unsloth", "h200", "qwen3-8b-sft", 2, 8400),
)
OURS = (
    Figure("this kit, measured", "h200", "llama-3.1-8b-sft", 4, 8230, accumulation=2, launches=26290),
    Figure("this kit, measured", "h200", "qwen3-8b-sft", 2, 5803, launches=66152),
    Figure("this kit, measured", "h200", "llama-3.1-8b-dpo", 2, 6842, length=1024, accumulation=2),
    Figure("this kit, measured", "h200", "llama-3.1-8b-reward", 2, 6399, length=1024, accumulation=2),
)
"""All layers are recomputed in all of them; Unsloth's page does not name its setting."""


def rows_of(figures: tuple[Figure, ...]) -> Iterator[str]:
    for figure in figures:
        estimated = estimated_update_speed(figure.recipe(), gpu_named(figure.gpu))
        error = estimated / figure.tokens_per_second - 1
        yield (
            f"| {figure.source} | {figure.gpu} | {figure.preset} | {figure.rows} x {figure.length:,} "
            f"| {figure.tokens_per_second:,.0f} | {estimated:,.0f} | {error:+.0%} |"
        )


def counted_launches(figure: Figure) -> float:
    """Kernels of a step: of each micro-batch, and of the optimizer."""
    (spec,) = simulation_specs(figure.recipe(), "cuda")
    costs = step_costs(spec, recomputed_of(spec), {})
    gpu = gpu_named(figure.gpu)
    seconds = figure.accumulation * phase_time(costs[UPDATE].kernels, gpu).host_seconds
    seconds += phase_time(costs[OPTIMIZER].kernels, gpu).host_seconds
    return seconds / LAUNCH_SECONDS


def main() -> None:
    print("| source | GPU | preset | micro-batch | tokens/s, source | estimate | error |")
    print("|---|---|---|---|---|---|---|")
    for row in rows_of((*PUBLISHED, *OURS)):
        print(row, flush=True)
    for figure in OURS:
        if figure.launches:
            counted = counted_launches(figure)
            error = counted / figure.launches - 1
            print(
                f"launches of a step, {figure.preset}: "
                f"counted {counted:,.0f}, measured {figure.launches:,}, {error:+.0%}"
            )


if __name__ == "__main__":
    main()

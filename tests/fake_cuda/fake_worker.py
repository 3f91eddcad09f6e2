"""Counts one group of workloads on the fake GPU, and writes the counts as JSON: `fake_worker.py GROUP FILE`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fake_gpu
from fake_guard import exit_with_result

fake_gpu.install()

from counter_checks import run_checks  # noqa: E402  (the fake GPU must be installed first)
from fake_base import fake_base  # noqa: E402
from fake_workloads import count_decode_step, count_step, count_training_step, stacked_roles  # noqa: E402
from kernel_counter import KernelCounter  # noqa: E402

LAYERS = 1
ALGORITHMS = ("sft", "reward", "dpo", "grpo", "ppo")
FAMILIES = ("qwen2.5-7b", "qwen3-8b", "mistral-7b")
PLANNED_LAYERS = 2
PLANNED_ROWS = 4
PLANNED_LENGTH = 2048
WIDTH = 64
TIMED_WIDTH = 768
"""Columns of a decoding step."""


def count_training(counter: KernelCounter) -> dict[str, Any]:
    """All algorithms on one family, with all layers recomputed and with none, and SFT with offloaded activations."""
    base = fake_base("llama-3.1-8b", LAYERS)
    counts: dict[str, Any] = {}
    for algorithm in ALGORITHMS:
        counts[algorithm] = {}
        for checkpointing in ("all", "none"):
            step = count_training_step(
                counter,
                base,
                algorithm,
                checkpointing,
            )
            counts[algorithm][checkpointing] = step.to_json()
    counts["sft"]["offloaded"] = count_training_step(
        counter,
        base,
        "sft",
        "all",
        offload=True,
    ).to_json()
    return counts


def count_families(counter: KernelCounter) -> dict[str, Any]:
    """A step of GRPO on each other family: rollouts, reference, shared prompts and update."""
    counts = {}
    for family in FAMILIES:
        base = fake_base(family, LAYERS)
        counts[family] = count_training_step(
            counter,
            base,
            "grpo",
            "all",
        ).to_json()
    return counts


def count_decoding(counter: KernelCounter) -> dict[str, Any]:
    base = fake_base("llama-3.1-8b", LAYERS)
    counts = {}
    with stacked_roles(base) as roles:
        counts["1 row"] = count_decode_step(counter, roles, 1, WIDTH)
        counts["16 rows"] = count_decode_step(counter, roles, 16, WIDTH)
        counts["chat"] = count_decode_step(
            counter,
            roles,
            1,
            WIDTH,
            stream=True,
        )
    with stacked_roles(base, ["sft"]) as roles:
        counts["stack"] = count_decode_step(counter, roles, 1, WIDTH)
    return {name: totals.to_json() for name, totals in counts.items()}


def count_step_times(counter: KernelCounter) -> dict[str, Any]:
    """Decoding steps of models of one and of two layers, whose difference is a layer."""
    counts: dict[str, Any] = {}
    for layers in (1, 2):
        base = fake_base("llama-3.1-8b", layers)
        for stack, frozen, batches in (("one adapter", [], (1, 16, 64)), ("two adapters", ["sft"], (64,))):
            with stacked_roles(base, frozen) as roles:
                for batch in batches:
                    totals = count_decode_step(counter, roles, batch, TIMED_WIDTH)
                    counts.setdefault(f"{batch} rows, {stack}", []).append(totals.to_json())
    return counts


def count_plain_steps(counter: KernelCounter) -> dict[str, Any]:
    """Micro-batches of SFT that the memory planner simulates too."""
    base = fake_base("llama-3.1-8b", PLANNED_LAYERS)
    counts = {}
    for checkpointing in ("all", "none"):
        counts[checkpointing] = count_step(
            counter,
            base,
            checkpointing,
            PLANNED_ROWS,
            PLANNED_LENGTH,
        ).to_json()
    return counts


GROUPS: dict[str, Callable[[KernelCounter], dict[str, Any]]] = {
    "training": count_training,
    "families": count_families,
    "decoding": count_decoding,
    "step times": count_step_times,
    "planned": count_plain_steps,
    "checks": run_checks,
}


def main() -> None:
    group, file = sys.argv[1:]
    with fake_gpu.fake_gpu() as counter:
        counts = GROUPS[group](counter)
    exit_with_result(Path(file), counts)


if __name__ == "__main__":
    main()

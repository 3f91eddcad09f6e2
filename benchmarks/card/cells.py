"""Cells: an algorithm at fixed sizes, with the memory that was planned beside what it took, and how fast it was."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch

from card import course
from card.course import Course, mean
from card.machine import free, reserved_gib, reset_peak
from card.made import STEPS, Size, Train, full_rows
from card.makers import ALGORITHMS, ONLINE, PAIRED, TRAINED, make_roles
from card.work import stored_bytes, work
from lowrank_tune.errors import UserError
from lowrank_tune.model.base import Base
from lowrank_tune.model.memory import Checkpointing, layers_recomputed
from lowrank_tune.model.roles import Roles

PLAN_OFF = 0.05


@dataclass(frozen=True)
class Cell:
    """`units` of a step, `micro` of them at once: rows, pairs, or completions, each row `length` tokens; of these, `prompt` are the prompt
    where completions are drawn, `group` of each."""

    algorithm: str
    units: int
    micro: int
    length: int
    prompt: int | None = None
    group: int | None = None
    checkpointing: Checkpointing = "all"
    offload: bool = False
    optimizer: str = "adamw"

    @property
    def name(self) -> str:
        extras = [f"recompute {self.checkpointing}"] if self.checkpointing != "all" else []
        extras += ["offloaded"] if self.offload else []
        extras += [self.optimizer] if self.optimizer != "adamw" else []
        return " ".join([self.algorithm, f"{self.micro}x{self.length}", *extras])

    @property
    def together(self) -> int:
        return 2 if self.algorithm in PAIRED else 1

    @property
    def size(self) -> Size:
        return Size(self.units * self.together, self.micro * self.together, self.length, self.prompt, self.group)


CELLS = (
    Cell("sft", 8, 4, 2048),
    Cell("sft", 2, 1, 1024, checkpointing="none"),
    Cell("sft", 4, 2, 1024, checkpointing=16),
    Cell("sft", 2, 2, 4096, offload=True, optimizer="paged_adamw_8bit"),
    Cell("reward", 4, 2, 1024),
    Cell("dpo", 4, 2, 1024),
    Cell("grpo", 16, 8, 384, prompt=256, group=8),
    Cell("ppo", 16, 8, 384, prompt=256, group=8),
)
"""On a card of 24 GB, with a base of 7 to 8 billion parameters in NF4."""
TINY_CELLS = (
    Cell("sft", 4, 2, 48), Cell("sft", 2, 1, 48, checkpointing="none"), Cell("sft", 2, 2, 64, checkpointing=1, offload=True),
    Cell("reward", 2, 1, 48), Cell("dpo", 2, 1, 48), Cell("grpo", 4, 2, 24, prompt=16, group=2), Cell("ppo", 4, 2, 24, prompt=16, group=2),
)  # fmt: skip


def measure(cell: Cell, base: Base, roofs: tuple[float, float], planned: float | None = None) -> dict[str, Any]:
    """One record: what the cell is, what was planned and what it took in GiB, tokens a second, shares of the roofs (TFLOP/s, GB/s)."""
    record: dict[str, Any] = {"cell": cell.name, **asdict(cell), "planned GiB": planned}
    trained = TRAINED.get(cell.algorithm, ("policy",))
    roles = make_roles(base, trained, cell.checkpointing, offload=cell.offload)
    try:
        algorithm = ALGORITHMS[cell.algorithm](roles, lambda step: full_rows(cell.size, base.model.config.vocab_size, cell.together), cell.size)
        parameters = [parameter for each in trained for parameter in roles.parameters(each)]
        free(base.device)
        reset_peak(base.device)
        ran = course.run(algorithm, roles, parameters, Train(micro_batch_size=cell.micro, optimizer=cell.optimizer), STEPS)
        record |= figures(cell, base, roles, ran, roofs)
        if planned is not None:
            record["the plan is within 5 %"] = abs(record["measured GiB"] / planned - 1) <= PLAN_OFF
    except (torch.OutOfMemoryError, UserError) as error:
        record["failed"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    finally:
        roles.release()
    free(base.device)  # outside the handler, whose traceback holds the tensors
    return record


def figures(cell: Cell, base: Base, roles: Roles, ran: Course, roofs: tuple[float, float]) -> dict[str, Any]:
    """What the timed steps took: all but the first and the last, which measure KL too."""
    timed, trained, layers = slice(1, -1), TRAINED.get(cell.algorithm, ("policy",)), base.model.config.num_hidden_layers
    batch = ran.batches[1]
    micros = list(batch.split(cell.size.micro, together=cell.together))
    done = sum(work(base, roles, role, micros, layers_recomputed(cell.checkpointing, layers) / layers) for role in trained)
    seconds, collecting = mean(ran.updating[timed]), mean(ran.collecting[timed])
    found: dict[str, Any] = {
        "measured GiB": ran.peak, **{f"{phase} GiB": gib for phase, gib in ran.peaks.items()}, "reserved GiB": reserved_gib(base.device),
        "update tokens/s": int(batch.attended.sum()) / seconds, "update TFLOP/s": done / seconds / 1e12,
        "share of roof": done / seconds / 1e12 / roofs[0], "seconds a step": seconds + collecting,
        "memory sufficed": ran.short == 0, "loss is finite": all(math.isfinite(event.stats["loss"]) for event in ran.events)}  # fmt: skip
    if cell.algorithm in ONLINE:
        drawing = mean([event.stats["rollout_seconds"] for event in ran.events[timed]])
        found |= {"rollout tokens/s": int(batch.says.sum()) / drawing, "rollout seconds": drawing,
                  # Each new token of all sequences together reads the whole base once.
                  "share of bandwidth": cell.size.new * stored_bytes(base.model) / drawing / 1e9 / roofs[1]}  # fmt: skip
    return found

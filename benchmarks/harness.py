"""Contenders that do the same training steps in turns, each in a process of its own, and what is said of them.

They work a block of steps at a time, in changing order, so that whatever else the machine does hits all of them; a
ratio is between blocks of one turn. Memory of a contender is told three ways: the peak of its whole process; how far
the resident memory rose above what the process held when it was loaded and ready for its first step; and how far the
tensors of one plain step rose above what was alive before it (torch's CPU allocator, byte by byte: not subject to the
moods of malloc).
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from common import memory_mib

WARM_UP, COOL_DOWN = 2, 2
"""Steps outside the timed blocks. The first of the cool-down is measured by torch's profiler, the last one may be a
logging step."""


@dataclass(frozen=True)
class Task:
    """What a contender is told."""

    folder: str
    nf4: bool
    steps: int
    block: int
    threads: int


@dataclass
class Memory:
    """MiB: the peak of the process, its rise since the start of the first step, and that of the tensors of one step."""

    peak: float = 0.0
    rise: float = 0.0
    tensors: float = 0.0


@dataclass
class Turns:
    """Told by a contender when it is `loaded`, and called after each of its steps: at the border of a block it hands
    over its time and waits for its next turn."""

    pipe: Connection
    task: Task
    done: int = 0
    cpu: float = 0.0
    wall: float = 0.0
    held: float = 0.0
    memory: Memory = field(default_factory=Memory)
    profiler: Any = None

    def loaded(self) -> None:
        """Everything is in memory and the first step begins. The peak of the process is counted from here."""
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        self.memory.peak = memory_mib()
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        self.held = memory_mib("VmRSS")

    def __call__(self) -> None:
        self.done += 1
        if self.done == self.task.steps - COOL_DOWN + 1:
            self.memory.tensors = peak_of_tensors(self.profiler)
        timed = self.done - WARM_UP
        if timed < 0 or timed % self.task.block or self.done > self.task.steps - COOL_DOWN:
            return
        self.pipe.send((time.process_time() - self.cpu, time.perf_counter() - self.wall))
        if self.done < self.task.steps - COOL_DOWN:
            self.pipe.recv()
        else:
            self.memory.rise = memory_mib() - self.held
            self.memory.peak = max(self.memory.peak, memory_mib())
            self.profiler = profile_memory()
        self.cpu, self.wall = time.process_time(), time.perf_counter()


def profile_memory() -> Any:
    from torch.profiler import ProfilerActivity, profile

    profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    profiler.__enter__()
    return profiler


def peak_of_tensors(profiler: Any) -> float:
    """MiB by which the CPU allocator's tensors rose at most since the profiler began. What was alive before is not
    counted."""
    profiler.__exit__(None, None, None)
    changes = []

    def visit(event: Any) -> None:
        if event.name == "[memory]":
            changes.append((event.start_time_ns, event.extra_fields.alloc_size))
        for child in event.children:
            visit(child)

    for event in profiler.profiler.kineto_results.experimental_event_tree():
        visit(event)
    now = peak = 0
    for _, size in sorted(changes, key=lambda change: change[0]):
        now += size
        peak = max(peak, now)
    return peak / 2**20


Contender = Callable[[Task, Turns], list[float]]
"""Takes all steps of the task, and gives the loss of each."""


def prepare_process(threads: int) -> None:
    """Sets what every process of a comparison has: no network, no messages, so many threads."""
    import os
    import warnings

    os.environ.update(
        HF_HUB_OFFLINE="1",
        TOKENIZERS_PARALLELISM="false",
        HF_DATASETS_OFFLINE="1",
        TRANSFORMERS_VERBOSITY="error",
        TQDM_DISABLE="1",
        TORCH_CPP_LOG_LEVEL="ERROR",
        KINETO_LOG_LEVEL="99",
    )
    warnings.filterwarnings("ignore")

    import torch

    # an optimizer or a checkpoint would import it within a step, and its memory would count as the step's
    import torch._dynamo
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_num_threads(threads)


def work(contender: Contender, task: Task, pipe: Connection) -> None:
    """A contender's process."""
    import contextlib
    import os

    prepare_process(task.threads)
    turns = Turns(pipe, task)
    with Path(os.devnull).open("w") as nothing, contextlib.redirect_stdout(nothing):  # the trainer prints its log lines
        losses = contender(task, turns)
    pipe.send((losses, turns.memory))


@dataclass
class Record:
    """What a contender did: CPU and wall seconds a step of each block, losses, memory."""

    cpu: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    memory: Memory = field(default_factory=Memory)

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "memory": vars(self.memory)}


def compete(contenders: dict[str, Contender], task: Task, repeats: int) -> dict[str, Record]:
    context = multiprocessing.get_context("spawn")
    names, pipes, processes = list(contenders), {}, []
    records = {name: Record() for name in names}
    for name, contender in contenders.items():
        pipes[name], there = context.Pipe()
        process = context.Process(target=work, args=(contender, task, there), daemon=True)
        process.start()
        there.close()
        processes.append(process)
    for pipe in pipes.values():
        pipe.recv()  # the warm-up is over, and the process waits
    for repeat in range(repeats):
        for name in names[repeat % len(names) :] + names[: repeat % len(names)]:
            pipes[name].send(None)
            cpu, wall = pipes[name].recv()
            records[name].cpu.append(cpu / task.block)
            records[name].wall.append(wall / task.block)
            if repeat == repeats - 1:
                records[name].losses, records[name].memory = pipes[name].recv()
    for process in processes:
        process.join()
    return records


def load_model(task: Task) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    from lowrank_tune.model.base import nf4_config

    extra = {"quantization_config": nf4_config(torch.device("cpu"))} if task.nf4 else {}
    return AutoModelForCausalLM.from_pretrained(task.folder, dtype=torch.float32, attn_implementation="sdpa", **extra)


def same_adapters(model: Any) -> None:
    """Fills the LoRA matrices with the same numbers whoever made them, and makes them fp32."""
    import torch

    for number, (name, parameter) in enumerate((n, p) for n, p in model.named_parameters() if "lora_" in n):
        parameter.data = parameter.data.float()
        if "lora_A" in name:
            bound = parameter.shape[1] ** -0.5
            parameter.data.uniform_(-bound, bound, generator=torch.Generator().manual_seed(number))
        else:
            parameter.data.zero_()


def pad(rows: list[tuple[list[int], list[bool]]]) -> tuple[Any, Any, Any]:
    """Ids, attention mask, completion mask; padded on the right."""
    import torch

    width = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([row + [0] * (width - len(row)) for row, _ in rows])
    completion_mask = torch.tensor([row + [False] * (width - len(row)) for _, row in rows])
    attended = torch.arange(width) < torch.tensor([len(row) for row, _ in rows])[:, None]
    return ids, attended, completion_mask


def words() -> Any:
    """A tokenizer for a trainer that wants one; nothing is tokenized."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<pad>": 0, "<end>": 1}, "<end>")),
        pad_token="<pad>",
        eos_token="<end>",
    )


def worst_difference(records: dict[str, Record]) -> float:
    """The largest difference of two loss curves at any step."""
    curves = [record.losses for record in records.values()]
    return max(max(losses) - min(losses) for losses in zip(*curves, strict=True))


def show_table(records: dict[str, Record], targets: dict[str, float], memory_targets: dict[str, float]) -> None:
    print(
        f"{'':<14}{'CPU s a step':>16}{'wall s a step':>16}{'peak':>7}{'rise':>6}{'tensors':>9}   ours / it: CPU   "
        f"wall   rise  tensors"
    )
    for name, record in records.items():
        cells = [f"{min(times):.3f} / {statistics.median(times):.3f}" for times in (record.cpu, record.wall)]
        memory = record.memory
        print(
            f"{name:<14}{cells[0]:>16}{cells[1]:>16}{memory.peak:>7.0f}{memory.rise:>6.0f}{memory.tensors:>9.1f}"
            f"   {'':<11}{against(records, name)}{wanted(targets, name, 'time')}{wanted(memory_targets, name, 'rise')}"
        )
    print(
        "(seconds: least / median; memory in MiB: peak of the process, rise since the first step began, tensors of a "
        "plain step; "
        "ratios of time: median of turns)"
    )


def against(records: dict[str, Record], name: str) -> str:
    """Ours divided by theirs; nothing for our own row."""
    if "ours" not in records or name == "ours":
        return ""
    mine, other = records["ours"], records[name]
    times = [
        statistics.median(a / b for a, b in zip(x, y, strict=True))
        for x, y in ((mine.cpu, other.cpu), (mine.wall, other.wall))
    ]
    memory = [a / b if b else float("nan") for a, b in zip(_rises(mine), _rises(other), strict=True)]
    return "".join(f"{ratio:>7.2f}" for ratio in (*times, *memory))


def _rises(record: Record) -> Iterator[float]:
    yield record.memory.rise
    yield record.memory.tensors


def wanted(targets: dict[str, float], name: str, what: str) -> str:
    return f"  ({what}: at most {targets[name]:.2f})" if name in targets else ""

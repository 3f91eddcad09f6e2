"""Peak memory of log-probs, forward and backward, at a vocabulary of 151,936: it does not grow with vocabulary x
length.

    PYTHONPATH=. python benchmarks/logps_memory.py           # under 2 minutes
    PYTHONPATH=. python benchmarks/logps_memory.py --quick   # V = 65,536, the two shorter lengths

Each cell is a process of its own; its figure is the rise of peak resident memory over what was resident before, once
the head and the hidden states were there and a product had been taken. `full` is what a plain loop does: logits of all
positions, cross_entropy, backward. Exit code 0 where ours stays under four chunks of logits (and the d-sized tensors)
at every length, and the gradients agree.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from common import memory_mib

WIDTH, LENGTHS = 128, (256, 1024, 4096)
BOUND_MIB = 256
"""Four chunks of `model.logprobs.CHUNK_LOGITS` logits in fp32."""
FULL_LIMIT_MIB = 9000
"""Full logits are not tried where they would take more: logits, their log-softmax and its gradient, each V x T in
fp32."""


def ours(hidden: Any, targets: Any, weight: Any) -> None:
    from lowrank_tune.model.logprobs import Head, chunked_logps

    logps, _, _ = chunked_logps(Head(weight), hidden, targets)
    (-logps.mean()).backward()


def full(hidden: Any, targets: Any, weight: Any) -> None:
    import torch.nn.functional as F

    F.cross_entropy(hidden @ weight.T, targets).backward()


WAYS: dict[str, Callable[[Any, Any, Any], None]] = {"ours": ours, "full": full}


def work(way: str, length: int, vocabulary: int, pipe: Connection) -> None:
    import torch

    import lowrank_tune.model.logprobs  # noqa: F401  (its libraries must be resident before the measurement starts)

    torch.set_num_threads(1)
    torch.manual_seed(0)
    weight = torch.randn(vocabulary, WIDTH) * 0.05
    hidden, targets = torch.randn(length, WIDTH, requires_grad=True), torch.randint(0, vocabulary, (length,))
    small, few = torch.randn(4, WIDTH, requires_grad=True), torch.zeros(4, dtype=torch.long)
    WAYS[way](small, few, weight[:64])
    before, started = memory_mib("VmRSS"), time.process_time()
    WAYS[way](hidden, targets, weight)
    seconds = time.process_time() - started
    pipe.send((memory_mib("VmHWM") - before, seconds, float(hidden.grad.norm())))


def measure(way: str, length: int, vocabulary: int) -> tuple[float, float, float]:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=work, args=(way, length, vocabulary, there))
    process.start()
    there.close()
    result: tuple[float, float, float] = here.recv()
    process.join()
    return result


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--quick", action="store_true", help="65,536 words, the two shorter lengths")
    options = parser.parse_args(arguments)
    vocabulary, lengths = (65_536, LENGTHS[:2]) if options.quick else (options.vocabulary, LENGTHS)
    print(
        f"V {vocabulary:,}, d {WIDTH}, fp32, 1 thread: rise of peak memory in MiB (CPU seconds); one V x T tensor "
        f"beside it"
    )
    peaks, agree = [], True
    for length in lengths:
        tensor = vocabulary * length * 4 / 2**20
        rise, seconds, norm = measure("ours", length, vocabulary)
        peaks.append(rise - 4 * length * WIDTH * 4 / 2**20)  # hidden states' slope and gradient are allowed
        line = f"T {length:>5}   V x T {tensor:>6.0f}   ours {rise:>6.0f} ({seconds:.2f})"
        if 3 * tensor < FULL_LIMIT_MIB:
            full_rise, full_seconds, full_norm = measure("full", length, vocabulary)
            agree &= abs(norm - full_norm) <= 1e-4 * full_norm
            line += (
                f"   full {full_rise:>6.0f} ({full_seconds:.2f})   gradient norms differ by "
                f"{abs(norm - full_norm) / full_norm:.0e}"
            )
        print(line, flush=True)
    right = max(peaks) <= BOUND_MIB
    print(f"ours stays {'under' if right else 'NOT under'} {BOUND_MIB} MiB at every length, the d-sized tensors apart")
    return 0 if right and agree else 1


if __name__ == "__main__":
    sys.exit(main())

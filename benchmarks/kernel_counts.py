"""What one micro-batch, and one decoding step, of an 8B model make a GPU do: kernel launches, host waits, copies, bytes
and FLOPs. Counted on a fake CUDA device (`tests/fake_cuda`) at the true shapes, not measured: no GPU is needed or used.

    PYTHONPATH=. python benchmarks/kernel_counts.py                # 32 layers, some minutes
    PYTHONPATH=. python benchmarks/kernel_counts.py --layers 1     # seconds, for the tests
    PYTHONPATH=. python benchmarks/kernel_counts.py --only decode  # one of the two tables
    PYTHONPATH=. python benchmarks/kernel_counts.py --places       # also the lines at which the host waits
    PYTHONPATH=. python benchmarks/kernel_counts.py --json FILE    # also all counts, by operation and by line

A launch is one operation that computes; allocations and views launch nothing. Bytes are those of each operation's
inputs and outputs, without caches. The fake GPU has the properties of an RTX 4090, by which bitsandbytes selects its
kernels. GPU milliseconds are the sum over all kernels of the time of its bytes or FLOPs, at least 2 us, with the
constants of `lowrank_tune/memory_planner/gpu_specs.py`. Tokens/s are those of a step that is replayed as a CUDA graph:
its GPU time and one launch. Python calls are those of the step that is captured, and of one that is replayed. A
decoding step is counted with one and with two layers, and each further layer as the second.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

FAKE_CUDA = Path(__file__).parents[1] / "tests" / "fake_cuda"
sys.path.append(str(FAKE_CUDA))

from fake_guard import exit_with_result, run_on_fake_gpu, unavailable  # noqa: E402  (from the folder above)

from lowrank_tune.memory_planner.gpu_specs import LAUNCH_SECONDS  # noqa: E402

SHAPE = "llama-3.1-8b"
DECODE_WIDTH = 768
PARTS = ("micro", "decode")
COUNT = "--count"
"""The option of the process that has the fake GPU."""
MICRO_HEADER = "| one micro-batch | launches | host waits: micro-batch + step | copies to the GPU | GB | TFLOP |"
DECODE_HEADER = (
    "| one decoding step | launches | of these casts | host waits | copies to the GPU | GB | GPU ms | tokens/s "
    "| Python calls | replayed |"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32, help="layers of the model")
    parser.add_argument("--only", choices=PARTS, help="count one table")
    parser.add_argument("--places", action="store_true", help="print the lines at which the host waits")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all counts")
    options = parser.parse_args()
    reason = unavailable()
    if reason is not None:
        sys.exit(f"kernel_counts.py: {reason}")
    with tempfile.TemporaryDirectory() as folder:
        counts = run_on_fake_gpu(Path(folder), Path(__file__), COUNT, str(options.layers), options.only or "")
    if options.json is not None:
        options.json.write_text(json.dumps(counts, indent=1), encoding="utf-8")
    print(*report(counts, options.layers, options.places), sep="\n")


def report(counts: dict[str, Any], layers: int, places: bool) -> Iterator[str]:
    """Yield the tables as Markdown."""
    yield f"Counted, not measured: {SHAPE}, NF4, LoRA r 16 on all linears, {layers} layers.\n"
    for part, header, row in (("micro", MICRO_HEADER, micro_row), ("decode", DECODE_HEADER, decode_row)):
        if part in counts:
            yield from table(header, [row(name, each) for name, each in counts[part].items()])
            yield ""
    if places:
        for name, each in {**counts.get("micro", {}), **counts.get("decode", {})}.items():
            for kind in ("host_syncs", "copies_to_device"):
                for place, count in each[kind].items():
                    yield f"{name}: {kind} {count} x {place}"


def table(header: str, rows: list[list[str]]) -> Iterator[str]:
    yield header
    yield "|---" * (header.count("|") - 1) + "|"
    for row in rows:
        yield f"| {' | '.join(row)} |"


def micro_row(name: str, totals: dict[str, Any]) -> list[str]:
    return [
        name,
        f"{totals['launches']:,}",
        f"{total(totals['host_syncs'])} + {totals['step_waits']}",
        f"{total(totals['copies_to_device'])}",
        f"{total(totals['bytes_by_kind']) / 1e9:,.2f}",
        f"{total(totals['flops_by_kind']) / 1e12:,.1f}",
    ]


def decode_row(name: str, totals: dict[str, Any]) -> list[str]:
    return [
        name,
        f"{totals['launches']:,}",
        f"{totals['launches_by_op'].get('_to_copy', 0):,}",
        f"{total(totals['host_syncs'])}",
        f"{total(totals['copies_to_device'])}",
        f"{total(totals['bytes_by_kind']) / 1e9:,.2f}",
        f"{totals['gpu_seconds'] * 1e3:.2f}",
        f"{totals['tokens_per_second']:,.0f}",
        f"{totals['python_calls']:,}",
        f"{totals['replayed_calls']:,}",
    ]


def total(counter: dict[str, float]) -> float:
    return sum(counter.values())


def count(layers: int, only: str) -> dict[str, Any]:
    """Count in a process with the fake GPU: both tables, or one."""
    import fake_gpu

    fake_gpu.install()
    from fake_base import fake_base
    from fake_workloads import count_training_step

    counts: dict[str, Any] = {}
    with fake_gpu.fake_gpu() as counter:
        if only != "decode":
            small = fake_base(SHAPE, 1)
            step_waits = {
                name: count_training_step(counter, small, name, "all").rest.num_host_syncs
                for name in ("sft", "dpo", "grpo")
            }
            counts["micro"] = {
                name: {**totals, "step_waits": step_waits[name.split()[0].lower()]}
                for name, totals in micro_counts(counter, fake_base(SHAPE, layers))
            }
        if only != "micro":
            counts["decode"] = decode_counts(counter, layers)
    return counts


def micro_counts(counter: Any, base: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the counts of a micro-batch of SFT, DPO and GRPO; the last two with and without shared prompts."""
    from fake_workloads import (
        count_micro_batch,
        count_step,
        group_rows,
        micro_batch_algorithm,
        pair_rows,
        stacked_roles,
    )

    for checkpointing in ("all", "none"):
        yield f"SFT 4 x 2048, recompute {checkpointing}", count_step(counter, base, checkpointing, 4, 2048).to_json()
    with stacked_roles(base) as roles:
        for name, batch, described in (
            ("dpo", pair_rows(2, 512, 512), "DPO 2 pairs of 512 + 512"),
            ("grpo", group_rows(8, 256, 400), "GRPO group of 8, 256 + 400"),
        ):
            algorithm = micro_batch_algorithm(name, roles)
            for roles.decoder.share_prefixes in (False, True):
                how = "prompts shared" if roles.decoder.share_prefixes else "whole rows"
                yield f"{described}, {how}", count_micro_batch(counter, algorithm, batch).to_json()


def of_layers(layers: int, one: Any, two: Any) -> Any:
    """Return the counts of a model of `layers` layers, from those of one and of two."""
    if isinstance(one, dict):
        return {key: of_layers(layers, one.get(key, 0), two[key]) for key in two}
    return one + (layers - 1) * (two - one)


def decode_counts(counter: Any, layers: int) -> dict[str, dict[str, Any]]:
    """Return the counts of decoding steps, from those with one layer and with two. For one layer, which the tests
    count, they are of 16 sequences at once."""
    from fake_base import fake_base

    batches = (16,) if layers == 1 else (1, 16, 64)
    one = dict(counts_of_steps(counter, fake_base(SHAPE, 1), batches))
    two = one if layers == 1 else dict(counts_of_steps(counter, fake_base(SHAPE, 2), batches))
    counts = {name: of_layers(layers, one[name], two[name]) for name in one}
    calls = dict(calls_of_graphed_steps(fake_base(SHAPE, 1), batches))
    for name, each in counts.items():
        batch, stream = each["batch"], name == "chat"
        each["tokens_per_second"] = batch / (each["gpu_seconds"] + LAUNCH_SECONDS)
        each["replayed_calls"] = calls[batch, stream]
    return counts


def calls_of_graphed_steps(base: Any, batches: Sequence[int]) -> Iterator[tuple[tuple[int, bool], int]]:
    """Yield the Python calls of a step that is replayed, by its number of sequences and whether it is one of a chat.
    They do not depend on the modules, which a replay does not call."""
    from fake_workloads import count_calls_of_graphed_step, stacked_roles

    with stacked_roles(base) as roles:
        for batch in batches:
            yield (batch, False), count_calls_of_graphed_step(roles, batch, False)
        yield (1, True), count_calls_of_graphed_step(roles, 1, True)


def counts_of_steps(
    counter: Any,
    base: Any,
    batches: Sequence[int],
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the counts of a step of a rollout, with plain modules and with few launches, for stacks of one and two
    adapters, and of a chat."""
    from fake_workloads import stacked_roles

    for frozen in ([], ["sft"]):
        stack = ", adapters [sft, policy]" if frozen else ""
        for few_launches in (False, True):
            modules = "" if few_launches else ", plain modules"
            with stacked_roles(base, frozen) as roles:
                roles.decoding.few_launches = few_launches
                for batch in batches:
                    yield f"rollout, {batch} at once{stack}{modules}", decode_count(counter, roles, batch)
                if few_launches and not frozen:
                    yield "chat", decode_count(counter, roles, 1, stream=True)


def decode_count(
    counter: Any,
    roles: Any,
    batch: int,
    stream: bool = False,
) -> dict[str, Any]:
    from fake_workloads import count_decode_step

    totals = count_decode_step(counter, roles, batch, DECODE_WIDTH, stream)
    return {**totals.to_json(), "batch": batch}


if __name__ == "__main__":
    if sys.argv[1:2] == [COUNT]:
        exit_with_result(Path(sys.argv[4]), count(int(sys.argv[2]), sys.argv[3]))
    else:
        main()

"""The kit on a real card: NF4 models of 7-8B shapes with random weights, what must hold, planned against measured memory, and speed.

    PYTHONPATH=. python benchmarks/gpu.py                        # the proof: all of it, under 10 minutes on a card
    PYTHONPATH=. python benchmarks/gpu.py smoke dpo --checkpointing off
    PYTHONPATH=. python benchmarks/gpu.py cells --shape qwen2.5-7b
    PYTHONPATH=. python benchmarks/gpu.py plan --out plans.json  # for a machine without pydantic: `proof --plans plans.json`
    PYTHONPATH=. python benchmarks/gpu.py table card.jsonl       # Markdown for RESULTS.md of what was measured
    PYTHONPATH=. python benchmarks/gpu.py proof --tiny           # the same code on the CPU, in a minute

Memory is capped to 24 GB where the card has more. `smoke` runs every algorithm and every way to save memory and checks what it promises;
`cells` puts memory planned beside memory measured, tokens a second, and the share of what a plain bf16 matrix product reaches in the same
run; `trl` runs TRL's trainers over the same cells, where it is installed. Each is a process of its own in `proof`, which adds all figures
to one file of JSON lines.

It needs torch, transformers, peft, accelerate and bitsandbytes, and nothing else: no network, no `datasets`, no pydantic. So it brings
stand-ins for the settings that it needs, and makes up its rows. Exit code 0 where every check held, 1 where one did not, 2 without a card.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from card import beside, cells, planned, tables
from card.base import SHAPES, TINY, random_base
from card.features import features
from card.machine import cap_memory, describe, free, peak_gib, reset_peak, synchronise
from card.made import Size
from card.makers import ALGORITHMS
from card.smoke import Result, smoke

from lowrank_tune.model.base import Base, pick_device

MEMORY = "memory"
"""What `smoke` also takes as a name: the ways to save memory."""


def no_card() -> int:
    print("There is no CUDA card here. `--tiny` runs the same code on the CPU.", file=sys.stderr)
    return 2


def open_card(options: argparse.Namespace, what: str) -> tuple[torch.device, dict[str, Any], str]:
    """The device under its cap, what there is to say of it, and the shape. Exits with 2 where there is no card."""
    device = torch.device("cpu") if options.tiny else pick_device()
    if device.type == "cpu" and not options.tiny:
        raise SystemExit(no_card())
    if options.tiny:
        torch.set_num_threads(1)  # two threads over such small matrices mostly wait for each other
    # PEFT asks transformers by a name that is deprecated there.
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*", category=FutureWarning)
    shape = TINY if options.tiny else options.shape
    machine = describe(device, cap_memory(device, options.cap_gb))
    machine = {"kind": "machine", "run": f"{what} {shape} {time.time():.0f}", "what": what, "shape": shape, **machine}
    tables.print_machine({name: value for name, value in machine.items() if name not in ("kind", "run")})
    return device, machine, shape


def timed_base(shape: str, device: torch.device, machine: dict[str, Any], bf16: bool) -> Base:
    free(device)
    reset_peak(device)
    begun = time.perf_counter()
    base = random_base(shape, device, bf16)
    synchronise(device)
    machine |= {"seconds to build": time.perf_counter() - begun, "GiB while building": peak_gib(device)}
    return base


def run_smoke(options: argparse.Namespace) -> int:
    device, machine, shape = open_card(options, "smoke")
    size = Size(4, 2, 48) if options.tiny else Size(options.rows, options.micro_batch, options.length)
    base = timed_base(shape, device, machine, options.bf16)
    print(f"{size.rows} rows of at most {size.length} tokens a step, {size.micro} at once, 2 where activations are kept")
    results = []
    for result in smoked(options, base, size, machine["memory cap GiB"]):
        if "teraflop/s" in result.figures:
            result.figures["share of the roof"] = result.figures["teraflop/s"] / float(machine["roof TFLOP/s"])
        if machine["memory cap GiB"] is not None and "peak GiB" in result.figures:
            result.checks["peak is under the cap"] = result.figures["peak GiB"] <= machine["memory cap GiB"]
        tables.print_result(result)
        results.append(result)
    tables.write(options.json, [machine, *({"kind": "smoke", "run": machine["run"], **asdict(result)} for result in results)])
    return 0 if all(all(result.checks.values()) for result in results) else 1


def smoked(options: argparse.Namespace, base: Base, size: Size, cap: float | None) -> Iterator[Result]:
    """All stand on one base, one after the other."""
    for name in options.algorithms or [*ALGORITHMS, MEMORY]:
        if name == MEMORY:
            yield features(base, size, cap)
            continue
        for checkpointing in {"on": [True], "off": [False], "both": [True, False]}[options.checkpointing]:
            # Where activations are kept, a pair at most goes through at once.
            yield smoke(name, base, size if checkpointing else replace(size, micro=min(size.micro, 2)), checkpointing)


def run_cells(options: argparse.Namespace) -> int:
    device, machine, shape = open_card(options, "cells")
    wanted = [cell for cell in (cells.TINY_CELLS if options.tiny else cells.CELLS)
              if not options.algorithms or cell.algorithm in options.algorithms]  # fmt: skip
    plans = planned.plans(shape, options.plans)
    base = timed_base(shape, device, machine, options.bf16)
    roofs = (float(machine["roof TFLOP/s"]), float(machine["roof GB/s"]))
    tables.write(options.json, [machine])
    good = True
    for cell in wanted:
        record = {"kind": "cell", "run": machine["run"], **cells.measure(cell, base, roofs, plans.get(cell.name))}
        tables.write(options.json, [record])
        print(f"\n{cell.name}")
        for name, value in record.items():
            if isinstance(value, (float, str)) and name not in ("kind", "run", "cell", "algorithm", "checkpointing", "optimizer"):
                print(f"  {name:<48} {tables.show(value):>14}")
        held = {name: value for name, value in record.items() if isinstance(value, bool) and name != "offload"}
        for name, value in held.items():
            print(f"  {name:<48} {'yes' if value else 'NO':>14}")
        good &= "failed" not in record and all(held.values())
    return 0 if good else 1


def run_trl(options: argparse.Namespace) -> int:
    """One cell for each base: TRL leaves its adapter in it."""
    if missing := beside.missing():
        print(f"not compared with TRL: {' and '.join(missing)} not installed")
        return 0
    device, machine, shape = open_card(options, "trl")
    wanted = cells.TINY_CELLS if options.tiny else cells.CELLS
    tables.write(options.json, [machine])
    for name in beside.TRAINERS:
        cell = next(cell for cell in wanted if cell.algorithm == name)
        base = timed_base(shape, device, machine, options.bf16)
        record = {"kind": "cell", "run": machine["run"], **beside.measure(cell, base)}
        del base
        tables.write(options.json, [record])
        print(f"TRL, {cell.name}: " + "; ".join(f"{key} {tables.show(value)}" for key, value in record.items() if isinstance(value, float)
                                               or key == "failed"))  # fmt: skip
    return 0


def run_proof(options: argparse.Namespace) -> int:
    """Each part in a process of its own: what one leaves in the card's memory must not be another's."""
    if not options.tiny and not torch.cuda.is_available():
        return no_card()
    begun, worst = time.perf_counter(), 0
    file = options.json or f"card-{TINY if options.tiny else options.shape}.jsonl"
    Path(file).unlink(missing_ok=True)
    plans = options.plans or f"{Path(file).with_suffix('')}-plans.json"
    if not options.plans and not options.tiny:  # what is planned is a card's memory
        Path(plans).unlink(missing_ok=True)
        words = [sys.executable, __file__, "plan", "--shape", options.shape, "--cap-gb", str(options.cap_gb), "--out", plans]
        print("== plan", flush=True)
        worst = subprocess.run(words).returncode
    passed_on = ["--shape", options.shape, "--cap-gb", str(options.cap_gb), "--json", file, *(["--tiny"] if options.tiny else []),
                 *(["--bf16"] if options.bf16 else [])]  # fmt: skip
    for part, more in (("smoke", []), ("cells", ["--plans", plans] if Path(plans).exists() else []), ("trl", [])):
        print(f"\n== {part}", flush=True)
        worst = max(worst, subprocess.run([sys.executable, __file__, part, *passed_on, *more]).returncode)
        if worst == 2:
            return 2
    print(f"\n{tables.markdown(tables.read(file))}\n{file}: all figures; {time.perf_counter() - begun:.0f} s in all; "
          f"{'every check held' if worst == 0 else 'NOT every check held'}")  # fmt: skip
    return worst


def run_plan(options: argparse.Namespace) -> int:
    """Where the whole kit is: the plans of the cells, also for a machine without it."""
    if missing := planned.missing():
        print(f"nothing is planned here: {' and '.join(missing)} not installed; --plans takes what `plan` wrote elsewhere")
        return 0
    text = planned.written(cells.CELLS, options.shape, options.cap_gb)
    Path(options.out).write_text(text, encoding="utf-8")
    print(text, end="")
    return 0


def run_table(options: argparse.Namespace) -> int:
    print(tables.markdown([record for file in options.files for record in tables.read(file)]), end="")
    return 0


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = made.add_subparsers(required=True)
    kinds: dict[str, tuple[Any, str]] = {
        "proof": (run_proof, "smoke, cells and trl, one after the other, and the tables"), "smoke": (run_smoke, "what must hold"),
        "cells": (run_cells, "memory and speed"), "trl": (run_trl, "TRL over the same cells"),
        "plan": (run_plan, "what the memory planner says of the cells: the whole kit, and no card"),
        "table": (run_table, "Markdown of JSON lines")}  # fmt: skip
    for name, (work, told) in kinds.items():
        command = commands.add_parser(name, help=told)
        command.set_defaults(run=work)
        if name == "table":
            command.add_argument("files", nargs="+", metavar="FILE")
            continue
        command.add_argument("--shape", choices=list(SHAPES), default="llama-3.1-8b")
        command.add_argument("--cap-gb", type=float, default=24.0, help="memory that may be used, in gigabytes of 1e9 bytes")
        if name == "plan":
            command.add_argument("--out", required=True, metavar="FILE")
            continue
        command.add_argument("--tiny", action="store_true", help="a tiny shape on the CPU")
        command.add_argument("--bf16", action="store_true", help="with --tiny: bf16 weights under bf16 autocast, as on a card")
        command.add_argument("--json", metavar="FILE", help="add all figures to this file, a JSON object a line")
        if name in ("proof", "cells"):
            command.add_argument("--plans", metavar="FILE", help="what `plan` wrote, where the planner cannot run")
        if name in ("smoke", "cells"):
            also = f", {MEMORY}" if name == "smoke" else ""
            command.add_argument("algorithms", nargs="*", help=f"which ones; all where none is named: {', '.join(ALGORITHMS)}{also}")
        if name == "smoke":
            command.add_argument("--checkpointing", choices=("on", "off", "both"), default="both", help="recompute activations")
            command.add_argument("--rows", type=int, default=8, help="rows of an optimizer step")
            command.add_argument("--micro-batch", type=int, default=4, help="rows at once")
            command.add_argument("--length", type=int, default=1024, help="tokens of a row")
    return made


def main(arguments: list[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else arguments
    options = parser().parse_args(given or ["proof"])
    known = [*ALGORITHMS, *([MEMORY] if options.run is run_smoke else [])]
    if unknown := set(getattr(options, "algorithms", ())) - set(known):
        print(f"no algorithm {', '.join(sorted(unknown))}; there are {', '.join(known)}", file=sys.stderr)
        return 2
    return int(options.run(options))


if __name__ == "__main__":
    sys.exit(main())

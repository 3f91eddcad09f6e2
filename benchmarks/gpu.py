"""The kit on a real GPU: NF4 models of 7-8B shapes with random weights, what must hold, memory and speed.

    PYTHONPATH=. python benchmarks/gpu.py                        # the proof: all parts, at most 9 minutes
    PYTHONPATH=. python benchmarks/gpu.py proof --parts facts,sft --seconds 120
    PYTHONPATH=. python benchmarks/gpu.py proof --tiny           # the same code on the CPU, in some minutes
    PYTHONPATH=. python benchmarks/gpu.py parts                  # the parts, in their order
    PYTHONPATH=. python benchmarks/gpu.py plan --out plans.json  # the planned memory, for `--plans plans.json`
    PYTHONPATH=. python benchmarks/gpu.py table FILE             # Markdown for docs/benchmarks.md

Memory is limited to 24 GB where the GPU has more; shares are of the device's own matrix product rate and bandwidth,
measured in the same run. Each record is on disk before the next measurement starts. A part that fails, hangs or kills
its process costs only itself. A part is started only where its time limit is left of `--seconds`.

It needs torch, transformers, peft, accelerate and bitsandbytes, and no network; the part `product` needs the whole kit,
the part `trl` TRL and `datasets`. `benchmarks/gpu_pack.sh` packs all of them for a machine without network. Exit code 0
where every check passed, 1 where a check or a part failed, 2 without a GPU or with wrong arguments, 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

# Before torch: the package requests an allocator whose segments grow, which torch reads once.
import lowrank_tune  # noqa: F401  # isort: skip

import torch
from gpu_proof import plans, records, tables
from gpu_proof.base import SHAPES, TINY
from gpu_proof.cells import PLANNED, REFERENCE
from gpu_proof.parts import PARTS, REFERENCE_SHAPE, Context, NoGpu, passed, select
from gpu_proof.supervisor import Supervisor, worker_command
from gpu_proof.worker import Worker, end_with_parent

DEFAULT_SECONDS = 540.0
SCRIPT = Path(__file__)
"""What the worker processes run."""
CARRIED_PLANS = Path(".gpu/plans.json")
"""Where `gpu_pack.sh` writes the plans."""


def no_gpu() -> int:
    print("There is no CUDA device here. `--tiny` runs the same code on the CPU.", file=sys.stderr)
    return 2


def run_proof(options: argparse.Namespace) -> int:
    """Run the parts in worker processes, and print the tables of what they measured."""
    if not options.tiny and not torch.cuda.is_available():
        return no_gpu()
    start = time.time()
    path = options.json or Path(f"gpu-proof-{TINY if options.tiny else options.shape}.jsonl")
    before = len(records.read(path)) if path.exists() else 0
    if options.plans is None and CARRIED_PLANS.exists():
        options.plans = CARRIED_PLANS
    if options.plans is None and not options.tiny:
        print("No file of plans: planned memory is not compared. `gpu.py plan --out FILE` writes one.")
    command = worker_command(SCRIPT, worker_options(options), path)
    supervisor = Supervisor(path, command, start + options.seconds, options.tiny, options.limit_factor)
    interrupted = False
    try:
        supervisor.run(options.parts)
    except KeyboardInterrupt:
        interrupted = True
    measured = records.read(path)[before:] if path.exists() else []
    done = [record["part"] for record in measured if record.get("status") == "done"]
    good = bool(done) and all(passed(record) for record in measured)
    verdict = "every check passed" if good else "NOT every check passed" if done else "no part was completed"
    verdict = f"interrupted; {verdict}" if interrupted else verdict
    counts = f"{len(done)} of {len(options.parts)} parts in {time.time() - start:.0f} s"
    print(f"\n{tables.markdown(measured)}\n{path}: all records; {counts}; {verdict}")
    return 130 if interrupted else int(not good)


def worker_options(options: argparse.Namespace) -> list[str]:
    """Return the options that a worker shares with the proof."""
    words = ["--shape", options.shape, "--cap-gb", str(options.cap_gb), "--limit-factor", str(options.limit_factor)]
    words += ["--tiny"] if options.tiny else []
    words += ["--bf16"] if options.bf16 else []
    return words + (["--plans", str(options.plans)] if options.plans is not None else [])


def run_worker(options: argparse.Namespace) -> int:
    if options.parent is not None:
        end_with_parent(options.parent)
    try:
        context = Context(options.tiny, options.bf16, options.shape, options.cap_gb, options.plans)
    except NoGpu:
        return no_gpu()
    deadline = options.deadline or time.time() + options.seconds
    return Worker(context, options.parts, options.json, deadline, options.limit_factor).run()


def run_plan(options: argparse.Namespace) -> int:
    """Write the planned memory of all cells: needs the whole kit, and no GPU."""
    if missing := plans.missing_packages():
        print(f"The planner needs {' and '.join(missing)}: write the file where they are installed.", file=sys.stderr)
        return 1
    shapes = options.shapes or ["llama-3.1-8b"]
    cells = [(shape, cell) for shape in shapes for cell in PLANNED]
    text = json.dumps(plans.make_plans([*cells, (REFERENCE_SHAPE, REFERENCE)], options.cap_gb), indent=2) + "\n"
    Path(options.out).write_text(text, encoding="utf-8")
    print(text, end="")
    return 0


def run_table(options: argparse.Namespace) -> int:
    for path in options.files:
        print(tables.markdown(records.read(path)), end="")
    return 0


def run_parts(options: argparse.Namespace) -> int:
    for part in PARTS:
        process = "own process" if part.isolated else ""
        print(f"{part.name:<14} at most {part.limit_s:>4.0f} s  {process:<12} {part.description}".rstrip())
    return 0


def add_shared(command: argparse.ArgumentParser) -> None:
    """Options of `proof` and of its workers."""
    command.add_argument(
        "--parts", type=parse_parts, default=list(PARTS), help="which parts, separated by commas; default: all"
    )
    command.add_argument("--seconds", type=float, default=DEFAULT_SECONDS, help="time for all parts together")
    command.add_argument(
        "--json",
        type=writable_file,
        metavar="PATH",
        help="file of JSON lines to append to; default: gpu-proof-SHAPE.jsonl",
    )
    command.add_argument("--shape", choices=list(SHAPES), default="llama-3.1-8b")
    command.add_argument(
        "--cap-gb", type=float, default=24.0, help="memory that may be used, in gigabytes of 1e9 bytes"
    )
    plans_help = f"what `plan` wrote; default: {CARRIED_PLANS} where it exists"
    command.add_argument("--plans", type=existing_file, metavar="FILE", help=plans_help)
    command.add_argument("--tiny", action="store_true", help="a tiny shape on the CPU")
    command.add_argument(
        "--bf16", action="store_true", help="with --tiny: bf16 weights under bf16 autocast, as on a GPU"
    )
    command.add_argument(
        "--limit-factor", type=float, default=1.0, help="multiplies all time limits, for a slow machine"
    )


def existing_file(text: str) -> Path:
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"there is no file {text}")
    return Path(text)


def writable_file(text: str) -> Path:
    path = Path(text)
    try:
        path.open("a").close()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot write {text}: {error.strerror}") from None
    return path


def parse_parts(text: str) -> object:
    try:
        return select(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def parser() -> argparse.ArgumentParser:
    root = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = root.add_subparsers(required=True)
    proof = commands.add_parser("proof", help="all parts within a time budget, and the tables")
    proof.set_defaults(run=run_proof)
    add_shared(proof)
    worker = commands.add_parser("worker", help="parts in this process, as `proof` starts it")
    worker.set_defaults(run=run_worker)
    add_shared(worker)
    worker.add_argument("--deadline", type=float, help="seconds since the epoch after which no part may run")
    worker.add_argument("--parent", type=int, help="process with which this one ends")
    plan = commands.add_parser("plan", help="write the planned memory of all cells; needs the whole kit, and no GPU")
    plan.set_defaults(run=run_plan)
    plan.add_argument("--shapes", nargs="+", choices=list(SHAPES), metavar="SHAPE", help=f"some of {', '.join(SHAPES)}")
    plan.add_argument("--cap-gb", type=float, default=24.0, help="memory that may be used, in gigabytes of 1e9 bytes")
    plan.add_argument("--out", required=True, metavar="FILE")
    table = commands.add_parser("table", help="Markdown of files of records")
    table.set_defaults(run=run_table)
    table.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parts = commands.add_parser("parts", help="list the parts in their order")
    parts.set_defaults(run=run_parts)
    return root


def main(arguments: list[str] | None = None) -> int:
    words = sys.argv[1:] if arguments is None else arguments
    options = parser().parse_args(words or ["proof"])
    return int(options.run(options))


if __name__ == "__main__":
    sys.exit(main())

"""Wall time of what people wait for before anything happens: the import, the help, and the report of a faulty recipe.

    PYTHONPATH=. python benchmarks/startup.py            # target: about 1 second each, and torch is not imported
    PYTHONPATH=. python benchmarks/startup.py --quick

Each run is a fresh interpreter; the runs take turns, and a bare interpreter runs beside them. Exit code 0 where none
imports torch and each does what it should; the times are only shown, for they are the machine's as well as ours.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

FAULTY = "algorithm: sft\ndata: {train: [{dataset: builtin:arithmetic}]}\ntrain: {max_steps: ten, learning_rat: 1e-4}\n"


def commands(recipe: Path) -> dict[str, tuple[list[str], int]]:
    """Name -> what runs, and its exit code."""
    return {
        "bare interpreter": (["-c", "pass"], 0),
        "import lowrank_tune": (["-c", "import lowrank_tune"], 0),
        "from lowrank_tune import Recipe": (["-c", "from lowrank_tune import Recipe"], 0),
        "lowrank-tune --help": (["-m", "lowrank_tune", "--help"], 0),
        "lowrank-tune run faulty.yaml": (["-m", "lowrank_tune", "run", str(recipe)], 2),
    }


def imports_torch(words: list[str]) -> bool:
    """Whether the interpreter's own list of what it imported names torch."""
    done = subprocess.run([sys.executable, "-X", "importtime", *words], capture_output=True, text=True)
    return any(line.rsplit("|", 1)[-1].strip() == "torch" for line in done.stderr.splitlines())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="once each")
    options = parser.parse_args(arguments)
    right = True
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "faulty.yaml"
        recipe.write_text(FAULTY, encoding="utf-8")
        runs = commands(recipe)
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(1 if options.quick else options.repeats):
            for name, (words, code) in runs.items():
                started = time.perf_counter()
                done = subprocess.run([sys.executable, *words], capture_output=True, text=True)
                seconds[name].append(time.perf_counter() - started)
                if done.returncode != code:
                    right = False
                    print(f"{name}: exit code {done.returncode} instead of {code}\n{done.stderr}")
        print(f"{'':<34}{'least s':>9}{'median s':>10}   torch imported")
        for name, times in seconds.items():
            torch = imports_torch(runs[name][0])
            right &= not torch
            print(f"{name:<34}{min(times):>9.2f}{statistics.median(times):>10.2f}   {'YES' if torch else 'no'}")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())

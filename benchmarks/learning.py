"""Time to accuracy against TRL: GRPO and DPO on the bundled tiny base, from the same SFT adapter.

    PYTHONPATH=. python benchmarks/learning.py --out DIR --picture docs/learning.svg    # 3 seeds
    PYTHONPATH=. python benchmarks/learning.py dpo --seeds 1 --out DIR                  # a part; DIR is continued
    PYTHONPATH=. python benchmarks/learning.py --tiny                                   # for the tests: no figures

Both sides begin with the same base in fp32, the same SFT adapter (preset tiny-sft, seed 0) and the same fresh LoRA (r
16 on all linears, its A from the seed), take the same prompts or pairs in the same order, and have the settings of
tiny-grpo and tiny-dpo: AdamW, learning rate, schedule, clipping, KL or beta, rows of a micro-batch, one update for
each batch. Groups with equal rewards stay in the update (`zero_std_groups: keep`), as in TRL. Ours keeps the SFT
adapter frozen below the policy; for TRL it is merged into the base, which is the same function with fewer products.
TRL has its fast settings of `grpo.py` and `dpo.py`. Two differences remain: TRL divides advantages by the standard
deviation of the sample (n - 1) and ours by that of the population, so ours are 1.07 times as large; and completions
are drawn with different random numbers.

The adapters after the same steps are saved, and the kit's engine answers 200 held-out questions with each of them
(greedy, and 4 sampled answers; of DPO also 200 held-out pairs), the same for both sides. CPU seconds are of the steps,
with rollouts and rewards, and of DPO's log-probs of the reference; not of loading, saving and evaluation. One thread
each (`--threads`), one at a time, in turns from one saved adapter to the next.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from learning_curves import accuracy, setup
from learning_curves.curves import Curve, Curves
from learning_curves.picture import TITLES, picture
from learning_curves.tables import agreement, step_table, time_table
from learning_curves.task import SETTINGS, Task, tiny
from learning_curves.turns import compete, in_process

NAMES = ("ours", "trl")


def options_of(arguments: list[str] | None) -> argparse.Namespace:
    """Returns the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("algorithms", nargs="*", help=f"which ones; all by default: {', '.join(SETTINGS)}")
    parser.add_argument("--contenders", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--seeds", type=int, default=3, help="runs of each contender")
    parser.add_argument("--threads", type=int, default=1, help="threads of each contender; only one works at a time")
    parser.add_argument("--out", type=Path, help="where adapters and figures stay; finished runs there are kept")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="an SVG of the curves")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there too")
    parser.add_argument("--tiny", action="store_true", help="two steps and one seed: that it runs, not what it shows")
    options = parser.parse_args(arguments)
    options.algorithms = options.algorithms or list(SETTINGS)
    if set(options.algorithms) - set(SETTINGS):
        parser.error(f"there are {', '.join(SETTINGS)}")
    return options


def tasks_of(options: argparse.Namespace, root: Path) -> dict[str, list[Task]]:
    """Returns the comparisons of each algorithm, one for each seed."""
    found = {}
    for algorithm in options.algorithms:
        settings = tiny(SETTINGS[algorithm]) if options.tiny else SETTINGS[algorithm]
        seeds = range(1 if options.tiny else options.seeds)
        found[algorithm] = [Task(root, settings, seed, options.threads) for seed in seeds]
    return found


def run_task(task: Task, options: argparse.Namespace) -> None:
    """Runs a comparison, and evaluates its adapters, unless both are done."""
    if not task.merged.exists():
        in_process(setup.make_shared, task.threads, task, options.tiny)
    if not task.folder.exists():
        in_process(setup.make_task, task.threads, task)
        compete(task, options.contenders)
    if not all((task.of(name) / "accuracy.json").exists() for name in options.contenders):
        in_process(accuracy.evaluate, task.threads, task, options.contenders, options.tiny)


def report(tasks: list[Task], curves: Curves) -> None:
    """Prints the tables of an algorithm."""
    settings = tasks[0].settings
    print(f"\n{TITLES[settings.algorithm]}, {len(tasks)} seed(s), {tasks[0].threads} thread(s)\n")
    print(time_table(settings, curves))
    for metric in settings.thresholds:
        print(f"\n{step_table(curves, metric)}")
    print(f"\n{agreement(settings, curves)}")


def main(arguments: list[str] | None = None) -> int:
    """Runs what is missing, prints the tables, and writes the files."""
    options = options_of(arguments)
    results: dict[str, Curves] = {}
    with tempfile.TemporaryDirectory() as scratch:
        root = options.out or Path(scratch)
        root.mkdir(parents=True, exist_ok=True)
        for algorithm, tasks in tasks_of(options, root).items():
            for task in tasks:
                run_task(task, options)
            results[algorithm] = {name: [Curve.read(task, name) for task in tasks] for name in options.contenders}
            report(tasks, results[algorithm])
    if options.json:
        document = {
            algorithm: {name: [curve.to_dict() for curve in found] for name, found in curves.items()}
            for algorithm, curves in results.items()
        }
        options.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    if options.picture:
        rows = [(name, metric, curves) for name, curves in results.items() for metric in SETTINGS[name].thresholds]
        options.picture.write_text(picture(rows), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

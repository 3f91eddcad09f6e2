"""How long verifiers take: the start of a check in each sandbox that this machine offers, and checks a second of whole
rewards.

A check starts two confined processes, for the code and for its tests; `start` is the time until one of them is ready.
The rows are a few functions with two or three tests each, and answers as mathematics writes them; the workers are those
of a run.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

from lowrank_tune.config import RewardConfig
from lowrank_tune.errors import UserError
from lowrank_tune.rewards import RewardInput, WorkerPool, build_rewards
from lowrank_tune.rewards.sandbox.isolation import LEVELS, probe_level
from lowrank_tune.rewards.sandbox.launch import Confined

CODE = [
    ("def f(x):\n    return x * x", ["assert f(3) == 9", "assert f(-2) == 4", "assert f(0) == 0"]),
    ("def f(s):\n    return s[::-1]", ["assert f('abc') == 'cba'", "assert f('') == ''", "assert f('a') == 'a'"]),
    (
        "import math\ndef f(n):\n    return [k for k in range(2, n) if math.gcd(k, n) == 1]",
        ["assert f(9) == [2, 4, 5, 7, 8]", "assert f(6) == [5]"],
    ),
    ("def f(d):\n    return sorted(d, key=d.get)", ["assert f({'a': 2, 'b': 1}) == ['b', 'a']", "assert f({}) == []"]),
]
EXACT = [("1,234", r"\boxed{1234}"), ("3/4", r"so \boxed{0.75}"), ("50\\%", r"\boxed{50}"), ("7", "It is 7.")]
ALGEBRA = [
    (r"\frac{\sqrt{8}}{2}", r"\boxed{\sqrt{2}}"),
    (r"x^2+2x+1", r"\boxed{(x+1)^2}"),
    (r"(-\infty, 2)", r"\boxed{x < 2}"),
]


def starts(count: int) -> None:
    """Time until a confined process is ready, at each level."""
    for level in LEVELS:
        offer = probe_level(level)
        if offer.fault:
            print(f"{level:<12} is not offered here: {offer.fault}")
            continue
        seconds = []
        for _ in range(count):
            started = time.perf_counter()
            solver = Confined("solver", level)
            solver.ready()
            seconds.append(time.perf_counter() - started)
            solver.end()
        print(
            f"{level:<12} start {1e3 * statistics.median(seconds):.0f} ms (median of {count}; longest "
            f"{1e3 * max(seconds):.0f})"
        )


def rate(use: str, items: list[RewardInput], workers: int) -> None:
    try:
        [weighted] = build_rewards([RewardConfig(name=use)], Path())
    except UserError as error:
        print(error)
        return
    with WorkerPool[int]([weighted.reward], workers) as scorer:
        for number, item in enumerate(items[: 2 * workers]):
            scorer.submit(number, item)
        scorer.collect()  # warm
        started = time.perf_counter()
        for number, item in enumerate(items):
            scorer.submit(number, item)
        scores = [score for [score] in scorer.collect().values()]
    seconds = time.perf_counter() - started
    passed = sum(score.verdict == "pass" for score in scores)
    print(
        f"{use:<12} {len(items) / seconds:8.1f} a second, "
        f"{1e3 * statistics.median(score.seconds for score in scores):.2f} ms each "
        f"(median; {workers} workers; {passed} of {len(items)} pass)"
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100, help="checks of each kind")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args(arguments)
    starts(max(3, options.count // 4))
    code = [
        RewardInput("", f"```python\n{text}\n```", None, {"code": text, "test_list": tests}, True, 9)
        for text, tests in CODE
    ]
    rate("python_tests", [code[i % len(code)] for i in range(options.count)], options.workers)
    for label, pairs in (("exact", EXACT), ("algebra", ALGEBRA)):
        items = [RewardInput("", text, gold, {}, True, 9) for gold, text in pairs]
        print(f"{label}:", end=" ")
        rate("math_answer", [items[i % len(items)] for i in range(10 * options.count)], options.workers)
    return 0


if __name__ == "__main__":
    sys.exit(main())

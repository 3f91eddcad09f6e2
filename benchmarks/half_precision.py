"""float16 against bfloat16: held-out accuracy of SFT and of GRPO after it, on the tiny base, for several seeds.

    PYTHONPATH=. python benchmarks/half_precision.py --out DIR    # 3 seeds; DIR is continued

Each run is under autocast of one dtype: `base.dtype`. SFT is tiny-sft with 2,000 rows and the adapter of the last step:
with 400 rows, and the best step by 20 validation rows, seeds differ by more than ten points. GRPO is the second stage
of tiny-rlvr. Accuracy is the share of exact answers, 8 sampled ones to each of 200 held-out questions; the interval is
that of Student's t over the seeds. CPUs have no fast product of float16, so here such a product is summed in float32
and rounded to float16, as a GPU computes it.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.library import Library

from lowrank_tune import run
from lowrank_tune.config import load_any

DTYPES = ("bfloat16", "float16")
RUNS = {"SFT": "", "GRPO": "2-grpo"}
"""Titles, and the folder in that of a run which has the summary."""
LONG_SFT = ("data.train.0.max_samples=2000", "train.load_best_model_at_end=false")
T_QUANTILES = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571}
"""Quantile 0.975 of Student's t for the mean of so many values."""
TINY = ("train.max_steps=2", "evaluate.num_prompts=8", "evaluate.max_new_tokens=8")

Product = Callable[..., Tensor]


def fast_half_products(library: Library) -> None:
    """Replaces torch's products of float16 on the CPU while the library exists."""
    aten = torch.ops.aten
    matrix_product, batch_product, sum_product = aten.mm.out, aten.bmm.out, aten.addmm.out

    def mm(a: Tensor, b: Tensor) -> Tensor:
        return _product(matrix_product, (a.shape[0], b.shape[1]), a, b)

    def bmm(a: Tensor, b: Tensor) -> Tensor:
        return _product(batch_product, (a.shape[0], a.shape[1], b.shape[2]), a, b)

    def addmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
        return _product(sum_product, (a.shape[0], b.shape[1]), bias, a, b, beta=beta, alpha=alpha)

    def addmm_(total: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
        return total.copy_(addmm(total, a, b, beta=beta, alpha=alpha))

    for name, kernel in (("mm", mm), ("bmm", bmm), ("addmm", addmm), ("addmm_", addmm_)):
        library.impl(name, kernel, "CPU")


def _product(product: Product, shape: tuple[int, ...], *factors: Tensor, **scales: float) -> Tensor:
    dtype = factors[0].dtype
    if dtype != torch.float16:
        return product(*factors, **scales, out=factors[0].new_empty(shape))
    exact = product(*(factor.float() for factor in factors), **scales, out=torch.empty(shape))
    return exact.half()


def summaries_of(out: Path, dtype: str, seed: int, is_tiny: bool) -> list[dict[str, Any]]:
    """Returns the summaries of `RUNS`, which are made unless they are finished."""
    changes = [f"base.dtype={dtype}", f"seed={seed}", *(TINY if is_tiny else ())]
    recipes = {
        "SFT": load_any("tiny-sft", *changes, *(() if is_tiny else LONG_SFT)),
        "GRPO": load_any("tiny-rlvr", *(f"stages.{stage}.{change}" for change in changes for stage in ("sft", "grpo"))),
    }
    found = []
    for title, subfolder in RUNS.items():
        folder = out / f"{title}-{dtype}-{seed}"
        summary = folder / subfolder / "summary.json"
        if not summary.is_file():
            run(recipes[title], out=folder, ui="none", device=torch.device("cpu"))
        found.append(json.loads(summary.read_text(encoding="utf-8")))
    return found


def final_accuracy(summary: dict[str, Any]) -> float:
    """Returns the accuracy of the policy, the last one of a summary."""
    return float(list(summary["heldout"].values())[-1])


def interval_of(values: list[float]) -> tuple[float, float]:
    """Returns the 95 % interval of the mean; of one value there is none."""
    mean = statistics.fmean(values)
    if len(values) == 1:
        return math.nan, math.nan
    half = T_QUANTILES[len(values)] * statistics.stdev(values) / math.sqrt(len(values))
    return mean - half, mean + half


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, choices=range(1, 1 + max(T_QUANTILES)))
    parser.add_argument("--out", type=Path, help="where runs stay; finished ones there are kept")
    parser.add_argument("--tiny", action="store_true", help="two steps: that it runs, not what it shows")
    options = parser.parse_args(arguments)
    library = Library("aten", "IMPL")
    fast_half_products(library)
    with tempfile.TemporaryDirectory() as scratch:
        out = options.out or Path(scratch)
        found = {
            dtype: [summaries_of(out, dtype, seed, options.tiny) for seed in range(options.seeds)] for dtype in DTYPES
        }
    print("| run | dtype | exact answers of each seed | mean | 95 % interval | overflowed steps |")
    print("|---|---|---|---|---|---|")
    for index, title in enumerate(RUNS):
        for dtype in DTYPES:
            summaries = [run_summaries[index] for run_summaries in found[dtype]]
            shares = [100 * final_accuracy(summary) for summary in summaries]
            low, high = interval_of(shares)
            overflows = [int(summary["last"].get("overflowed_steps", 0)) for summary in summaries]
            print(
                f"| {title} | {dtype} | {', '.join(f'{share:.1f}' for share in shares)} | "
                f"{statistics.fmean(shares):.1f} % | {low:.1f} to {high:.1f} | {sum(overflows)} |"
            )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""A mixture of 900,000 made-up rows of five true shapes through the data floor: rows a second, memory by rows, and the
second start.

    PYTHONPATH=. python benchmarks/data_scale.py --tokenizer DIR  # writes about 2 GB of rows, and as much cache
    PYTHONPATH=. python benchmarks/data_scale.py --rows 9000      # the same, small; tiny-tutor's own tokenizer

The recipe is the preset `myllm-sft` with its five sources swapped for files of as many rows of the same columns;
everything else is kept. Each start is a process of its own. Memory is what the kernel counts: `anon`, which is the
process's own, and `file`, pages of mapped files that the kernel can drop at any time.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Row = dict[str, Any]
PRESET = "myllm-sft"
THINGS = ["apples", "boxes", "tickets", "marbles", "pages", "coins", "bottles", "seats", "stamps", "bricks"]
PEOPLE = ["Ava", "Ben", "Carla", "Deepa", "Emil", "Farah", "Goran", "Hana", "Ivo", "Jin"]
SENTENCES = (
    "{who} has {a} {what} and gets {b} more, so there are ${a} + {b} = {c}$ of them.",
    "Each of the {a} {what} costs {b} dollars.",
    "Let $x$ be the number of {what}; then ${a}x + {b} = {c}$.",
    "We multiply both sides by {a} and subtract {b}.",
    "The series \\[ \\sum_{{n=1}}^{{{a}}} \\frac{{n}}{{n + {b}}} \\] has a value of at most {c}.",
    "That is why {who} keeps the {what} apart.",
    "{who} asks whether the {what} could be shared by {a} people without any being left over.",
    "In short: {c} {what}.",
)


def make_story(numbers: random.Random, words: float) -> str:
    """Sentences of about so many words, give or take; no two texts are equal."""
    wanted, sentences, count = words * numbers.lognormvariate(-0.18, 0.6), [], 0
    while not sentences or count < wanted:
        a, b = numbers.randint(2, 9999), numbers.randint(2, 999)
        sentences.append(
            numbers.choice(SENTENCES).format(who=numbers.choice(PEOPLE), what=numbers.choice(THINGS), a=a, b=b, c=a + b)
        )
        count += 13
    return " ".join(sentences)


def numina(n: random.Random) -> Row:
    problem, solution = make_story(n, 35), f"{make_story(n, 110)} The answer is $\\boxed{{{n.randint(1, 999)}}}$."
    turns = [{"content": problem, "role": "user"}, {"content": solution, "role": "assistant"}]
    return {"source": "synthetic_math", "problem": problem, "solution": solution, "messages": turns}


def open_math(n: random.Random) -> Row:
    answer = str(n.randint(1, 999))
    return {
        "problem": make_story(n, 35),
        "generated_solution": f"{make_story(n, 90)} So it is \\boxed{{{answer}}}.",
        "expected_answer": answer,
        "problem_source": "augmented_math",
    }


def ultrachat(n: random.Random) -> Row:
    roles = ("user", "assistant") * n.randint(2, 3)
    turns = [{"content": make_story(n, 40 if role == "user" else 170), "role": role} for role in roles]
    return {"prompt": turns[0]["content"], "prompt_id": f"{n.getrandbits(256):064x}", "messages": turns}


def orca(n: random.Random) -> Row:
    return {"question": make_story(n, 35), "answer": make_story(n, 70)}


def metamath(n: random.Random) -> Row:
    query, answer = make_story(n, 35), n.randint(1, 999)
    tail = (
        f"\n#### {answer}\nThe answer is: {answer}"
        if n.random() < 0.6
        else f" That is $\\boxed{{{answer}}}$.\nThe answer is: {answer}"
    )
    return {"type": "GSM_Rephrased", "query": query, "original_question": query, "response": make_story(n, 60) + tail}


MAKERS: dict[str, Callable[[random.Random], Row]] = {
    "AI-MO/NuminaMath-CoT": numina,
    "nvidia/OpenMathInstruct-2": open_math,
    "HuggingFaceH4/ultrachat_200k": ultrachat,
    "microsoft/orca-math-word-problems-200k": orca,
    "meta-math/MetaMathQA": metamath,
}


def recipe_of(folder: Path, rows: int, tokenizer: str) -> Any:
    """The preset over local files: each source with its columns, and its share of so many rows."""
    from lowrank_tune.config import Recipe  # after the environment is set

    preset = Recipe.load(PRESET)
    total = sum(source.max_samples or 0 for source in preset.data.train)
    sources = [
        {
            **source.model_dump(mode="json", exclude={"config_name", "split"}, exclude_none=True),
            "dataset": str(file_of(folder, source.dataset)),
            "max_samples": max(1, round((source.max_samples or 0) * rows / total)),
        }
        for source in preset.data.train
    ]
    written = json.dumps(sources)
    validation = max(1, round((preset.data.eval_rows or 0) * rows / total))
    return Recipe.load(
        PRESET,
        f"data.train={written}",
        f"data.eval_rows={validation}",
        f"base.model={tokenizer}",
        "evaluate.eval_dataset=null",
        "evaluate.num_prompts=null",
    )


def file_of(folder: Path, dataset: str) -> Path:
    return folder / f"{dataset.split('/')[1]}.jsonl"


def make(folder: Path, rows: int) -> None:
    """Writes a tenth more rows of each source than the mixture takes, as a draw has more to choose from."""
    from lowrank_tune.config import Recipe

    sources = Recipe.load(PRESET).data.train
    total = sum(source.max_samples or 0 for source in sources)
    for source in sources:
        numbers = random.Random(source.dataset)
        count = 1 + round((source.max_samples or 0) * rows / total * 1.1)
        with file_of(folder, source.dataset).open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(MAKERS[source.dataset](numbers)) + "\n" for _ in range(count))


def memory() -> tuple[int, int]:
    """MiB of the process's own, and of mapped files."""
    found = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines())
    own, mapped = (int(found[name].split()[0]) // 1024 for name in ("RssAnon", "RssFile"))
    return own, mapped


def start(folder: Path, rows: int, tokenizer: str, picture: bool) -> None:
    """One start, in this process: what `lowrank-tune data` does, with memory told on the way."""
    from rich.console import Console

    from lowrank_tune.data import ChatTemplate, load
    from lowrank_tune.data_report import report_rows
    from lowrank_tune.model.base import load_tokenizer
    from lowrank_tune.ui.views.data import show

    recipe = recipe_of(folder, rows, tokenizer)
    template = ChatTemplate.from_tokenizer(load_tokenizer(recipe.base))
    before, points = memory(), list(watched(rows))
    started, seen, base = time.perf_counter(), 0, 0

    def emit(event: Any) -> None:
        nonlocal seen, base
        if type(event).__name__ == "Progress":
            base += seen if event.done == 0 else 0
            seen = event.done
            while points and base + seen >= points[0]:
                own, mapped = memory()
                print(
                    f"  {points.pop(0):>9,} rows read  {time.perf_counter() - started:8.1f} s   anon {own:>5,} MiB   "
                    f"file {mapped:>5,} MiB",
                    flush=True,
                )

    print(f"  {'before':>14}                       anon {before[0]:>5,} MiB   file {before[1]:>5,} MiB")
    data = load(recipe.data, template, recipe.seed, emit, folder / "cache")
    seconds, loaded = time.perf_counter() - started, memory()
    found = report_rows(recipe, data, template)
    surveyed, after = time.perf_counter() - started, memory()
    read = sum(source.read for source in data.report.train)
    tokens = sum(source.tokens for source in data.report.train)
    print(
        f"  {'loaded':>14}            {seconds:8.1f} s   anon {loaded[0]:>5,} MiB   file {loaded[1]:>5,} MiB   "
        f"{read / seconds:,.0f} rows/s, {tokens / seconds:,.0f} tokens/s"
    )
    print(
        f"  {'surveyed':>14}            {surveyed:8.1f} s   anon {after[0]:>5,} MiB   file {after[1]:>5,} MiB   "
        f"{(after[0] - before[0]) * 2**20 / max(1, read):,.0f} bytes of its own a row"
    )
    if picture:
        show(found, PRESET, Console(highlight=False, width=100))


def watched(rows: int) -> Iterator[int]:
    """At how many rows memory is told."""
    yield from (rows // 100, rows // 10, *(rows * tenth // 10 for tenth in (2, 4, 6, 8)), rows)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=899_907)
    parser.add_argument(
        "--tokenizer", metavar="DIR", default="tiny-tutor", help="a folder with a tokenizer and config.json"
    )
    parser.add_argument(
        "--folder", type=Path, help="where rows and cache are put, and kept; a temporary folder where it is not given"
    )
    parser.add_argument("--start", choices=("first", "second"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    os.environ["HF_HUB_OFFLINE"] = "1"
    if options.start:
        start(options.folder, options.rows, options.tokenizer, picture=options.start == "first")
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        started = time.perf_counter()
        if not file_of(folder, "meta-math/MetaMathQA").exists():
            make(folder, options.rows)
        size = sum(file.stat().st_size for file in folder.glob("*.jsonl")) / 2**30
        print(f"rows written: {size:.2f} GiB, {time.perf_counter() - started:.0f} s", flush=True)
        for name in ("first", "second"):
            print(f"{name} start, a process of its own", flush=True)
            subprocess.run(
                [
                    sys.executable,
                    __file__,
                    "--start",
                    name,
                    "--folder",
                    str(folder),
                    "--rows",
                    str(options.rows),
                    "--tokenizer",
                    options.tokenizer,
                ],
                check=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Rollouts side by side: the engine, and transformers' `generate` on a PEFT model, over the same base and adapter.

    PYTHONPATH=. python benchmarks/rollout.py            # about 5 minutes
    PYTHONPATH=. python benchmarks/rollout.py --tiny     # seconds; figures mean little

Bases: `small` (random, the shape of the other benchmarks) and the package's tiny base with prompts of its own problems,
in fp32 and NF4, a LoRA of r 16 on all linears. 16 prompts with 8 samples each at temperature 1; 32 sequences at once:
the engine's slots, and 4 prompts a call of `generate`, padded on the left. Two workloads: `full`, where every
completion has the same length, which shows the decoding alone; and `ends`, where a completion ends with one of some
tokens as real ones do, and a batch of `generate` runs on to its longest row. Tokens count up to the end. The two take
turns; a ratio is between the rates of one turn. Before that, the greedy words of both are compared.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import small_config

SLOTS, SAMPLES, RANK, ALPHA = 32, 8, 16, 32
TARGETS = {"nf4": 3.0, "fp32": 1.5}
BASES = ("small-fp32", "small-nf4", "tiny-fp32", "tiny-nf4")


@dataclass(frozen=True)
class Work:
    """What both are asked for."""

    prompts: list[list[int]]
    ends: frozenset[int]
    tokens: int
    greedy: bool = False


@dataclass
class Record:
    """Tokens a CPU second and a wall second, of each turn."""

    cpu: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)
    mean_length: float = 0.0


Contender = Callable[[Work, int], list[list[int]]]


def fill(model: Any) -> None:
    """Fills the LoRA matrices with the same numbers whoever made them."""
    import torch

    for number, (_, parameter) in enumerate((name, p) for name, p in model.named_parameters() if "lora_" in name):
        parameter.data = 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))


def ours(folder: str, bits: int) -> Contender:
    import torch

    from lowrank_tune.config import AdapterConfig, BaseConfig
    from lowrank_tune.generation import Engine
    from lowrank_tune.generation.sampling_params import SamplingParams
    from lowrank_tune.model.adapters import lora_config
    from lowrank_tune.model.base import load_base
    from lowrank_tune.model.roles import Roles

    base = load_base(BaseConfig(model=folder, bits=bits), tokenizer=None, device=torch.device("cpu"))
    config = lora_config(AdapterConfig(r=RANK, lora_alpha=ALPHA), base.model)
    roles = Roles(base, {"policy": config}, ["policy"], {"policy": ["policy"], "reference": []})
    fill(base.model)

    def run(work: Work, seed: int) -> list[list[int]]:
        sampling = SamplingParams(work.tokens, work.ends, 0.0 if work.greedy else 1.0, seed)
        samples = 1 if work.greedy else SAMPLES
        found = sorted(
            Engine(roles, "policy", SLOTS).generate(work.prompts, samples, sampling),
            key=lambda one: (one.prompt, one.sample),
        )
        return [one.token_ids for one in found]

    return run


def generate(folder: str, bits: int) -> Contender:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from lowrank_tune.model.base import nf4_config

    extra = {"quantization_config": nf4_config(torch.device("cpu"))} if bits == 4 else {}
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **extra)
    # as for ours: on some CPUs bitsandbytes would repack its weights in bf16, and compute other numbers
    for module in plain.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    model = get_peft_model(
        plain, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    fill(model)
    model.eval()

    def run(work: Work, seed: int) -> list[list[int]]:
        torch.manual_seed(seed)
        samples, completions = 1 if work.greedy else SAMPLES, []
        # as kind to the padding as ours is
        ordered = sorted(range(len(work.prompts)), key=lambda index: len(work.prompts[index]))
        for start in range(0, len(ordered), SLOTS // SAMPLES):
            completions += batch(work, ordered[start : start + SLOTS // SAMPLES], samples)
        return [ids for _, ids in sorted(completions, key=lambda one: one[0])]

    def batch(work: Work, chosen: list[int], samples: int) -> list[tuple[int, list[int]]]:
        prompts = [work.prompts[index] for index in chosen]
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
        attended = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        how: dict[str, Any] = (
            {"do_sample": False} if work.greedy else {"do_sample": True, "top_k": 0, "num_return_sequences": samples}
        )
        with torch.no_grad():
            out = model.generate(
                input_ids=ids,
                attention_mask=attended,
                max_new_tokens=work.tokens,
                eos_token_id=sorted(work.ends) or None,
                pad_token_id=0,
                use_cache=True,
                **how,
            )[:, width:].tolist()
        return [(chosen[row // samples], until(ids, work.ends)) for row, ids in enumerate(out)]

    return run


def until(ids: list[int], ends: frozenset[int]) -> list[int]:
    """Up to the first end, which belongs to it."""
    return next((ids[: place + 1] for place, token in enumerate(ids) if token in ends), ids)


def save_small(folder: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(small_config()).save_pretrained(folder)


def works_of(name: str, tokens: int, count: int) -> dict[str, Work]:
    """The two workloads of a base. The ends of `small` are one id in 32, those of the tiny base the tokens with a full
    stop or a line's end."""
    numbers = random.Random(0)
    if name == "small":
        prompts = [[numbers.randrange(2, 8192) for _ in range(numbers.randint(24, 72))] for _ in range(count)]
        ends = frozenset(range(5, 8192, 32))
    else:
        from importlib.resources import files

        from transformers import AutoTokenizer

        from lowrank_tune.toy.problems import rows

        tokenizer = AutoTokenizer.from_pretrained(str(files("lowrank_tune.toy") / "base"))
        prompts = [tokenizer(next(iter(row.values()))).input_ids for row in rows(count, seed=0)]
        ends = frozenset(token for token in range(len(tokenizer)) if set(tokenizer.decode([token])) & set(".\n"))
    return {"full": Work(prompts, frozenset(), tokens), "ends": Work(prompts, ends, tokens)}


def compete(contenders: dict[str, Contender], work: Work, repeats: int) -> dict[str, Record]:
    records = {name: Record() for name in contenders}
    for repeat in range(repeats + 1):
        for name, run in contenders.items():
            cpu, wall = time.process_time(), time.perf_counter()
            completions = run(work, repeat)
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
            count = sum(map(len, completions))
            records[name].mean_length = count / len(completions)
            if repeat:  # the first turn warms up
                records[name].cpu.append(count / cpu)
                records[name].wall.append(count / wall)
    return records


def agreement(contenders: dict[str, Contender], work: Work) -> float:
    """The share of prompts whose greedy words are the same."""
    greedy = Work(work.prompts, work.ends, work.tokens, greedy=True)
    mine, theirs = (run(greedy, 0) for run in contenders.values())
    return sum(a == b for a, b in zip(mine, theirs, strict=True)) / len(mine)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bases", nargs="*", help=f"which ones; all where none is named: {', '.join(BASES)}")
    parser.add_argument("--repeats", type=int, default=7, help="turns")
    parser.add_argument(
        "--prompts", type=int, default=32, help="with more, the last sequences, which speak alone, weigh less"
    )
    parser.add_argument("--tokens", type=int, default=64, help="most tokens of a completion")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tiny", action="store_true", help="the tiny base in NF4 only, one turn, short completions")
    parser.add_argument("--json", metavar="FILE", help="write all figures there too")
    options = parser.parse_args(arguments)
    if set(options.bases) - set(BASES):
        parser.error(f"no base {', '.join(set(options.bases) - set(BASES))}; there are {', '.join(BASES)}")
    quieten(options.threads)
    bases = [tuple(base.split("-")) for base in options.bases or (["tiny-nf4"] if options.tiny else BASES)]
    tokens, count, repeats = (12, 4, 1) if options.tiny else (options.tokens, options.prompts, options.repeats)
    print(
        f"{count} prompts, {SAMPLES} samples each, {SLOTS} at once, {options.threads} thread(s), {repeats} turns; "
        "tokens a second: median of turns"
    )
    figures, agreed = {}, []
    for name, kind in bases:
        with tempfile.TemporaryDirectory() as place:
            contenders = build(name, 4 if kind == "nf4" else 16, place)
            works = works_of(name, tokens, count)
            agreed.append(agreement(contenders, works["full"]))
            for what, work in works.items():
                records = compete(contenders, work, repeats)
                figures[f"{name} {kind} {what}"] = {who: vars(record) for who, record in records.items()}
                print_results(f"{name} {kind} {what}", records, TARGETS[kind])
        del contenders
        gc.collect()
    print(f"greedy words equal for {min(agreed):.0%} of the prompts or more (near-ties may part)")
    if options.json:
        Path(options.json).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 0 if min(agreed) >= 0.75 else 1


def build(name: str, bits: int, place: str) -> dict[str, Contender]:
    from importlib.resources import files

    if name == "small":
        save_small(place)
    folder = place if name == "small" else str(files("lowrank_tune.toy") / "base")
    return {"ours": ours(folder, bits), "generate": generate(folder, bits)}


def print_results(what: str, records: dict[str, Record], target: float) -> None:
    mine, other = records["ours"], records["generate"]
    cpu, wall = (
        statistics.median(a / b for a, b in zip(x, y, strict=True))
        for x, y in ((mine.cpu, other.cpu), (mine.wall, other.wall))
    )
    rates = "   ".join(
        f"{name} {statistics.median(one.cpu):6.0f} / {statistics.median(one.wall):6.0f} ({one.mean_length:.0f} tokens)"
        for name, one in records.items()
    )
    print(f"{what:<16} CPU / wall: {rates}   ratio {cpu:.2f} / {wall:.2f} (target {target})", flush=True)


def quieten(threads: int) -> None:
    warnings.filterwarnings("ignore")
    import torch
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(threads)


if __name__ == "__main__":
    sys.exit(main())

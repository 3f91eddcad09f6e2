"""A DPO step side by side: lowrank_tune's own loop with and without prompt sharing, hand-written loops, and TRL's
DPOTrainer.

    PYTHONPATH=. python benchmarks/dpo.py --pairs hh.jsonl.gz --tokenizer DIR     # fp32, without and with
                                                                                  # checkpointing; about 10 minutes
    PYTHONPATH=. python benchmarks/dpo.py           # made-up pairs with the lengths of such
    PYTHONPATH=. python benchmarks/dpo.py --tiny    # seconds, for the tests; figures mean nothing

All train the same base from the same adapters on the same pairs in the same order: 4 pairs a step, all at once, sigmoid
loss, beta 0.1, the log-probs of the reference (the base) computed before, AdamW fused, linear schedule, clipping at 1,
in turns (`harness.py`). Collating is part of a step. Ours logs its first and last step (KL to the reference is measured
there): neither is in a block, but the memory that they take counts. The loss curves must agree to 1e-5 at every step.

    ours         trainer.Trainer, algorithms.dpo.DPO, model.roles.Roles, the kit's store of pairs, chosen and rejected
                 sharing the prompt's work
    ours-apart   the same with `Decoder.share_prefixes` off: every row goes through whole
    hand         model(ids, attention_mask).logits at all positions, log_softmax and gather
    hand-lean    the best simple one: no attention mask (rows are padded on the right), the head on answers' tokens only
    trl          DPOTrainer as fast as its settings go: precompute_ref_log_probs, fp32 adapters, no padding to a
                 multiple, logging every 10
    trl-compact  the same, made to score the answers' tokens alone, as TRL 1.16 does where Triton runs; on a CPU it
                 scores every position
"""

from __future__ import annotations

import argparse
import gzip
import json
import multiprocessing
import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import harness
from common import VOCABULARY, small_config
from harness import COOL_DOWN, WARM_UP, Contender, Record, Turns, load_model, pad, same_adapters, worst_difference

PAIRS, BETA, RATE, RANK, ALPHA = 4, 0.1, 1e-4, 16, 32
LONGEST, TINY_VOCABULARY = 512, 512
CURVE = 1e-5
TARGETS, MEMORY_TARGETS = {"trl": 0.5}, {"trl": 0.8}
LENGTHS = [
    (19, 13, 13),
    (16, 26, 15),
    (46, 11, 10),
    (46, 25, 4),
    (17, 54, 13),
    (29, 24, 37),
    (17, 38, 43),
    (18, 31, 59),
    (20, 51, 46),
    (19, 38, 67),
    (29, 62, 38),
    (105, 10, 19),
    (110, 9, 25),
    (101, 11, 41),
    (132, 17, 11),
    (138, 22, 5),
    (118, 35, 20),
    (26, 124, 32),
    (137, 32, 21),
    (162, 14, 22),
    (157, 23, 26),
    (105, 40, 71),
    (86, 111, 28),
    (99, 71, 66),
    (54, 98, 94),
    (157, 57, 40),
    (63, 65, 137),
    (199, 32, 42),
    (146, 97, 40),
    (102, 96, 95),
    (17, 240, 46),
    (235, 25, 61),
    (230, 16, 93),
    (230, 88, 38),
    (137, 114, 128),
    (319, 58, 24),
    (350, 53, 21),
    (339, 53, 52),
    (341, 83, 57),
    (93, 261, 168),
]
"""Tokens of prompt, chosen and rejected answer: every 29th pair of HH-RLHF helpful-base's test split (SmolLM2's
tokenizer), by total length."""


class Pair(NamedTuple):
    prompt: list[int]
    chosen: list[int]
    rejected: list[int]

    def rows(self) -> list[tuple[list[int], list[bool]]]:
        return [
            (self.prompt + answer, [False] * len(self.prompt) + [True] * len(answer))
            for answer in (self.chosen, self.rejected)
        ]


def made_up(count: int, vocabulary: int = VOCABULARY, shrink: int = 1) -> list[Pair]:
    """Pairs of random tokens, low ids common, with the lengths of HH-RLHF, divided by `shrink`."""
    numbers = random.Random(0)

    def ids(length: int) -> list[int]:
        return [int(2 * (vocabulary / 2) ** numbers.random()) for _ in range(-(-length // shrink))]

    lengths = [length for _ in range(-(-count // len(LENGTHS))) for length in numbers.sample(LENGTHS, len(LENGTHS))]
    return [Pair(ids(prompt), ids(chosen), ids(rejected)) for prompt, chosen, rejected in lengths[:count]]


def real(file: str, tokenizer: str, count: int) -> list[Pair]:
    """Random pairs of a file of HH-RLHF, of those that fit; ids are folded into the small vocabulary, so that equal
    tokens stay equal."""
    from transformers import AutoTokenizer

    encode, mark, found = AutoTokenizer.from_pretrained(tokenizer).encode, "\n\nAssistant:", []
    with (
        gzip.open(file, "rt", encoding="utf-8") if file.endswith(".gz") else Path(file).open(encoding="utf-8") as lines
    ):
        sides = [(row["chosen"], row["rejected"]) for row in map(json.loads, lines)]
    random.Random(0).shuffle(sides)
    for chosen, rejected in sides:
        prompt = chosen[: chosen.rfind(mark) + len(mark)]
        if not rejected.startswith(prompt) or mark in rejected[len(prompt) :]:
            continue
        parts = [
            [2 + token % (VOCABULARY - 2) for token in encode(text)]
            for text in (prompt, chosen[len(prompt) :], rejected[len(prompt) :])
        ]
        pair = Pair(parts[0], parts[1] + [1], parts[2] + [1])
        if parts[1] and parts[2] and len(pair.prompt) + max(len(pair.chosen), len(pair.rejected)) <= LONGEST:
            found.append(pair)
        if len(found) == count:
            return found
    raise SystemExit(
        f"{file} has {len(found)} pairs of at most {LONGEST} tokens a side, {count} are needed: take fewer turns"
    )


class Task(harness.Task):
    """Its folder holds `pairs.json` beside the base; the name says whether activations are recomputed."""

    @property
    def checkpointing(self) -> bool:
        return (Path(self.folder) / "checkpointing").exists()

    def pairs(self) -> list[Pair]:
        return [Pair(*pair) for pair in json.loads((Path(self.folder) / "pairs.json").read_text(encoding="utf-8"))]

    def batches(self) -> Iterator[list[Pair]]:
        pairs = self.pairs()
        return (pairs[start : start + PAIRS] for start in range(0, len(pairs), PAIRS))


def ours(task: Task, turn: Turns, share: bool = True) -> list[float]:
    import torch

    from lowrank_tune.algorithms.base import AlgorithmContext
    from lowrank_tune.algorithms.dpo import DPO
    from lowrank_tune.algorithms.reference_logps import reference_logps
    from lowrank_tune.batch import PairBatch, Row
    from lowrank_tune.config import AdapterConfig, BaseConfig, DPOConfig, TrainingConfig
    from lowrank_tune.data import collate_units
    from lowrank_tune.data.store_writer import Entry, StoreWriter
    from lowrank_tune.events import StepEnd
    from lowrank_tune.model.adapters import lora_config
    from lowrank_tune.model.base import load_base
    from lowrank_tune.model.roles import Roles
    from lowrank_tune.training.trainer import Trainer, make_optimizer

    device = torch.device("cpu")
    base = load_base(BaseConfig(model=task.folder, bits=16), tokenizer=None, device=device)
    config = lora_config(AdapterConfig(r=RANK, lora_alpha=ALPHA), base.model)
    roles = Roles(
        base, {"policy": config}, ["policy"], {"policy": ["policy"], "reference": []}, checkpointing=task.checkpointing
    )
    roles.decoder.share_prefixes = share
    same_adapters(base.model)
    train = TrainingConfig(
        max_steps=task.steps,
        global_batch_size=PAIRS,
        micro_batch_size=PAIRS,
        learning_rate=RATE,
        lr_scheduler_type="linear",
        gradient_checkpointing=task.checkpointing,
        logging_steps=1_000_000,
    )
    losses: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        with StoreWriter(Path(folder) / "store", rows_per_unit=2) as writer:
            entries = [
                Entry(tuple(Row(*row) for row in pair.rows()), (2 * place, 2 * place + 1))
                for place, pair in enumerate(task.pairs())
            ]
            writer.add(entries, 0, [(0, place) for place in range(len(entries))])
            store = writer.finish(["pairs.json"], [])
        sums = reference_logps(
            roles, store, lambda units: collate_units(store, units, 0), 4096, "small", Path(folder), lambda event: None
        )

        def rows(step: int) -> PairBatch:
            batch = collate_units(store, range(step * PAIRS, step * PAIRS + PAIRS), 0)
            assert isinstance(batch, PairBatch)
            batch.reference_sequence_logps = sums[2 * step * PAIRS : 2 * (step + 1) * PAIRS]
            return batch

        def emit(event: Any) -> None:
            if isinstance(event, StepEnd):
                losses.append(event.stats["loss"])

        algorithm, parameters = DPO(AlgorithmContext(roles, rows), DPOConfig(beta=BETA)), roles.parameters("policy")
        optimizer = make_optimizer(parameters, train, device)
        loop = Trainer(algorithm, parameters, optimizer, train, task.steps, 0, device, emit, lambda *_: turn())
        turn.loaded()
        loop.run()
    return losses


def ours_apart(task: Task, turn: Turns) -> list[float]:
    return ours(task, turn, share=False)


def hand(task: Task, turn: Turns, lean: bool = False) -> list[float]:
    import torch
    import torch.nn.functional as F
    from peft import LoraConfig, get_peft_model
    from torch import Tensor

    model = get_peft_model(
        load_model(task), LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    same_adapters(model)
    model.train()
    plain = model.get_base_model()
    if task.checkpointing:
        plain.gradient_checkpointing_enable({"use_reentrant": False})

    def sums(pairs: list[Pair]) -> Tensor:
        """log p(answer | prompt) of all chosen answers, then of all rejected ones."""
        ids, attended, mask = pad([pair.rows()[side] for side in (0, 1) for pair in pairs])
        if lean:
            hidden = plain.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
            mask, targets = mask[:, 1:], ids[:, 1:][mask[:, 1:]]
            logps = -F.cross_entropy(plain.lm_head(hidden[mask]), targets, reduction="none")
            return torch.zeros(mask.shape).masked_scatter(mask, logps).sum(dim=1)
        logits = model(input_ids=ids, attention_mask=attended.long(), use_cache=False).logits[:, :-1]
        logps = logits.log_softmax(dim=-1).gather(2, ids[:, 1:, None]).squeeze(2)
        return torch.where(mask[:, 1:], logps, 0.0).sum(dim=1)

    with torch.no_grad(), model.disable_adapter():
        references = [sums(pairs) for pairs in task.batches()]
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 - step / task.steps)
    losses = []
    turn.loaded()
    for pairs, reference in zip(task.batches(), references, strict=True):
        chosen, rejected = (sums(pairs) - reference).chunk(2)
        loss = -F.logsigmoid(BETA * (chosen - rejected)).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        turn()
    return losses


def hand_lean(task: Task, turn: Turns) -> list[float]:
    return hand(task, turn, lean=True)


def trl(task: Task, turn: Turns) -> list[float]:
    import datasets
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import DPOConfig, DPOTrainer

    class Turn(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            turn.loaded()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            turn()

    class Kept(DPOTrainer):  # type: ignore[misc]
        kept: list[Any] = []

        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset  # it is tokenized

        def compute_loss(self, *arguments: Any, **named: Any) -> Any:
            loss = super().compute_loss(*arguments, **named)
            self.kept.append(loss.detach())
            return loss

    rows = [
        {"prompt_ids": pair.prompt, "chosen_ids": pair.chosen, "rejected_ids": pair.rejected} for pair in task.pairs()
    ]
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as out:
        config = DPOConfig(
            output_dir=out,
            max_steps=task.steps,
            per_device_train_batch_size=PAIRS,
            learning_rate=RATE,
            lr_scheduler_type="linear",
            warmup_steps=0,
            weight_decay=0.0,
            max_grad_norm=1.0,
            optim="adamw_torch_fused",
            gradient_checkpointing=task.checkpointing,
            bf16=False,
            use_cpu=True,
            logging_steps=10,
            report_to="none",
            save_strategy="no",
            train_sampling_strategy="sequential",
            max_length=None,
            pad_to_multiple_of=None,
            dataloader_pin_memory=False,
            disable_tqdm=True,
            beta=BETA,
            precompute_ref_log_probs=True,
        )
        lora = LoraConfig(
            r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM", lora_dropout=0.0
        )
        trainer = Kept(
            load_model(task),
            args=config,
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=harness.words(),
            peft_config=lora,
            callbacks=[Turn()],
        )
        same_adapters(trainer.model)
        trainer.train()
    return [float(loss) for loss in trainer.kept]


def trl_compact(task: Task, turn: Turns) -> list[float]:
    from trl.trainer import utils

    utils._use_triton = lambda device: True  # there it decides only whether positions are picked before the head
    return trl(task, turn)


CONTENDERS: dict[str, Contender] = {
    "ours": ours,
    "ours-apart": ours_apart,
    "hand": hand,
    "hand-lean": hand_lean,
    "trl": trl,
    "trl-compact": trl_compact,
}


def save_base(folder: str, tiny: bool) -> None:
    """In a process of its own, so that this one stays small."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    config = small_config()
    if tiny:
        config.update(
            {"vocab_size": TINY_VOCABULARY, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2}
        )
        config.layer_types = config.layer_types[:2]
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("contenders", nargs="*", help=f"which ones; all where none is named: {', '.join(CONTENDERS)}")
    parser.add_argument(
        "--pairs", metavar="FILE", help="JSON lines of HH-RLHF, .gz too; made-up pairs where it is not given"
    )
    parser.add_argument("--tokenizer", metavar="DIR", help="the tokenizer for them")
    parser.add_argument("--checkpointing", choices=("off", "on", "both"), default="both", help="recompute activations")
    parser.add_argument("--repeats", type=int, default=9, help="turns")
    parser.add_argument("--block", type=int, default=3, help="steps of a turn")
    parser.add_argument("--threads", type=int, default=1, help="threads of each contender; only one works at a time")
    parser.add_argument(
        "--tiny",
        action="store_true",
        help="a tiny shape, 2 turns of 2 steps, without TRL and checkpointing unless asked for",
    )
    parser.add_argument("--json", metavar="FILE", help="write all figures there too")
    options = parser.parse_args(arguments)
    if bool(options.pairs) != bool(options.tokenizer):
        parser.error("--pairs and --tokenizer go together")
    if options.tiny:
        options.repeats, options.block = 2, 2
        options.checkpointing = "off" if options.checkpointing == "both" else options.checkpointing
    names = options.contenders or [name for name in CONTENDERS if not (options.tiny and name.startswith("trl"))]
    if set(names) - set(CONTENDERS):
        parser.error(f"no contender {', '.join(set(names) - set(CONTENDERS))}; there are {', '.join(CONTENDERS)}")
    steps, figures, agree = WARM_UP + options.repeats * options.block + COOL_DOWN, {}, True
    if options.pairs:
        pairs = real(options.pairs, options.tokenizer, steps * PAIRS)
    else:
        pairs = made_up(steps * PAIRS, TINY_VOCABULARY if options.tiny else VOCABULARY, 4 if options.tiny else 1)
    describe(pairs, options)
    for checkpointing in {"off": [False], "on": [True], "both": [False, True]}[options.checkpointing]:
        with tempfile.TemporaryDirectory() as folder:
            saving = multiprocessing.get_context("spawn").Process(target=save_base, args=(folder, options.tiny))
            saving.start()
            saving.join()
            (Path(folder) / "pairs.json").write_text(json.dumps(pairs), encoding="utf-8")
            if checkpointing:
                (Path(folder) / "checkpointing").touch()
            task = Task(folder, False, steps, options.block, options.threads)
            records = harness.compete({name: CONTENDERS[name] for name in names}, task, options.repeats)
        report(records, checkpointing)
        agree = agree and curves_agree(records, steps)
        figures["with checkpointing" if checkpointing else "without checkpointing"] = {
            n: record.to_dict() for n, record in records.items()
        }
    if options.json:
        Path(options.json).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 0 if agree else 1


def curves_agree(records: dict[str, Record], steps: int) -> bool:
    return min(len(record.losses) for record in records.values()) == steps and worst_difference(records) <= CURVE


def describe(pairs: list[Pair], options: argparse.Namespace) -> None:
    prompt, chosen, rejected = (sum(map(len, parts)) / len(pairs) for parts in zip(*pairs, strict=True))
    origin = "HH-RLHF, ids folded into the vocabulary" if options.pairs else "random tokens, lengths of HH-RLHF"
    print(
        f"{PAIRS} pairs a step ({origin}): {prompt:.0f} tokens of prompt, {chosen:.0f} chosen, {rejected:.0f} "
        f"rejected in the mean, "
        f"prompt to answer {2 * prompt / (chosen + rejected):.2f}; fp32, {options.threads} thread(s), "
        f"{options.repeats} turns of "
        f"{options.block} steps"
    )


def report(records: dict[str, Record], checkpointing: bool) -> None:
    print(
        f"\nactivations "
        f"{'recomputed (gradient checkpointing)' if checkpointing else 'kept (no gradient checkpointing)'}"
    )
    harness.show_table(records, TARGETS, MEMORY_TARGETS)
    curve = next(iter(records.values())).losses
    print(
        f"loss {curve[0]:.6f} -> {curve[-1]:.6f} over {len(curve)} steps; the curves differ by at most "
        f"{worst_difference(records):.1e}: "
        + ("equal to 1e-5" if curves_agree(records, len(curve)) else f"NOT shown equal to {CURVE:.0e}")
    )


if __name__ == "__main__":
    sys.exit(main())

"""A GRPO step side by side: rollout, scoring and update of lowrank_tune's own loop, and of TRL's GRPOTrainer with
transformers' `generate`.

    PYTHONPATH=. python benchmarks/grpo.py               # fp32, the `small` shape; some minutes
    PYTHONPATH=. python benchmarks/grpo.py ours --tiny   # seconds, for the tests; figures mean nothing

Both train the same base from the same adapters on the same prompts in the same order: 4 prompts a step, 8 completions
each at temperature 1, every one of the same number of tokens (the end token is an id that the model does not have, so
both look for it and none finds it). The same reward function, the share of even ids; loss `grpo`, clip 0.2, KL 0.05 to
the base in the loss (k3 times the ratio), 32 rows at once (`--micro`), one update a rollout batch, no gradient
checkpointing, AdamW fused, linear schedule, clipping at 1, in turns (`harness.py`). TRL's adapters are put back to
fp32, its dropout is off, it logs every 10 steps. Completions are sampled, so the curves cannot be equal; the reward
that both reach is told. The shares are of CPU seconds: rollout (prompts to completions, text included), scoring
(rewards, and the log-probs of the reference), update (everything else).

    ours    slots for all sequences; rewards scored in the process itself, so that their time is counted
    trl     GRPOTrainer; with `--micro` it accumulates gradients as ours does
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import harness
from common import VOCABULARY, small_config
from harness import COOL_DOWN, WARM_UP, Contender, Record, Turns, load_model, same_adapters

PROMPTS, GROUP, KL, RATE, RANK, ALPHA = 4, 8, 0.05, 1e-3, 16, 32
TARGETS = {"trl": 0.40}
PARTS = ("rollout", "scoring", "update")


def even(completions: Sequence[Sequence[int]]) -> list[float]:
    """The reward: the share of even ids."""
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completions]


def words(size: int) -> Any:
    """A tokenizer whose words are numbers; its end is an id after all that the model can say."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, **{str(token): token for token in range(1, size)}, "<end>": size}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, "<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>")


@dataclass
class Clock:
    """CPU seconds of each step's parts. `part` wraps what belongs to one; parts within parts are counted once, as the
    inner one."""

    task: harness.Task
    name: str
    spent: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    steps: list[dict[str, float]] = field(default_factory=list)
    started: float = 0.0

    def part(self, name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **named: Any) -> Any:
            started, inner = time.process_time(), sum(self.spent.values())
            found = work(*arguments, **named)
            self.spent[name] += time.process_time() - started - (sum(self.spent.values()) - inner)
            return found

        return timed

    def start(self) -> None:
        self.started = time.process_time()

    def __call__(self) -> None:
        """A step is over. All that was timed of it, but warm-up and profiled steps, is written down at the end."""
        spent = time.process_time() - self.started
        self.steps.append(self.spent | {"update": spent - sum(self.spent.values())})
        self.spent = dict.fromkeys(PARTS, 0.0)
        if len(self.steps) == self.task.steps:
            (Path(self.task.folder) / f"split-{self.name}.json").write_text(
                json.dumps(self.steps[WARM_UP:-COOL_DOWN]), encoding="utf-8"
            )


@dataclass(frozen=True)
class Task(harness.Task):
    """Its folder holds `work.json` beside the base: prompts, tokens of a completion, the size of the vocabulary, rows
    at once."""

    def work(self) -> tuple[list[list[int]], int, int, int]:
        found = json.loads((Path(self.folder) / "work.json").read_text(encoding="utf-8"))
        return found["prompts"], found["new"], found["vocabulary"], found["micro"]


@dataclass(frozen=True)
class PromptExample:
    """Stands for `data.PromptExample`."""

    input_ids: list[int]
    text: str = ""
    ground_truth: None = None


class Scoring:
    """The reward, in this process, when all have been drawn."""

    def __init__(self) -> None:
        self.completions: dict[int, Sequence[int]] = {}

    def submit(self, key: int, prompt: Any, text: str, completion: Any) -> None:
        self.completions[key] = completion.token_ids

    def collect(self) -> Mapping[int, Sequence[float]]:
        completions, self.completions = self.completions, {}
        return {key: [value] for key, value in zip(completions, even(list(completions.values())), strict=True)}


def ours(task: Task, turn: Turns) -> list[float]:
    import torch

    from lowrank_tune.algorithms.base import AlgorithmContext
    from lowrank_tune.algorithms.grpo import GRPO
    from lowrank_tune.algorithms.rollouts import RolloutCollector
    from lowrank_tune.config import AdapterConfig, BaseConfig, GRPOConfig, TrainingConfig
    from lowrank_tune.events import StepEnd
    from lowrank_tune.functional import step_seed
    from lowrank_tune.model.adapters import lora_config
    from lowrank_tune.model.base import load_base
    from lowrank_tune.model.roles import Roles
    from lowrank_tune.training.trainer import Trainer, make_optimizer

    prompts, new, vocabulary, micro = task.work()
    device, tokenizer, clock, scoring = torch.device("cpu"), words(vocabulary), Clock(task, "ours"), Scoring()
    base = load_base(BaseConfig(model=task.folder, bits=16), tokenizer=None, device=device)
    config = lora_config(AdapterConfig(r=RANK, lora_alpha=ALPHA), base.model)
    roles = Roles(base, {"policy": config}, ["policy"], {"policy": ["policy"], "reference": []}, checkpointing=False)
    same_adapters(base.model)
    train = TrainingConfig(
        max_steps=task.steps,
        global_batch_size=PROMPTS,
        micro_batch_size=micro,
        learning_rate=RATE,
        lr_scheduler_type="linear",
        gradient_checkpointing=False,
        logging_steps=1_000_000,
    )
    rewards: list[float] = []

    def next_prompts(step: int, draw: int, count: int | None) -> list[Any]:
        return [
            PromptExample(tokenizer(" ".join(map(str, ids))).input_ids)
            for ids in prompts[step * PROMPTS : (step + 1) * PROMPTS]
        ]

    def emit(event: Any) -> None:
        if isinstance(event, StepEnd):
            assert event.stats["completions/mean_length"] == new
            rewards.append(event.stats["reward"])

    def at_border(*_: Any) -> None:
        clock()
        turn()
        clock.start()

    collector = RolloutCollector(
        roles=roles,
        prompts=next_prompts,
        reward_client=scoring,
        reward_names=["even"],
        reward_weights=[1.0],
        decode=tokenizer.decode,
        stop_ids=frozenset([vocabulary]),
        pad_id=0,
        num_generations=GROUP,
        max_new_tokens=new,
        temperature=1.0,
        max_num_seqs=PROMPTS * GROUP,
        micro_tokens=1 << 15,
        seed_of=lambda number: step_seed(0, number),
    )
    timed: Any = collector
    timed.collect, timed.logps = clock.part("rollout", collector.collect), clock.part("scoring", collector.logps)
    scoring.collect = clock.part("scoring", scoring.collect)  # type: ignore[method-assign]
    algorithm = GRPO(AlgorithmContext(roles), GRPOConfig(beta=KL, zero_std_groups="keep"), collector)
    parameters = roles.parameters("policy")
    loop = Trainer(
        algorithm, parameters, make_optimizer(parameters, train, device), train, task.steps, 0, device, emit, at_border
    )
    turn.loaded()
    clock.start()
    loop.run()
    return rewards


def trl(task: Task, turn: Turns) -> list[float]:
    import datasets
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    prompts, new, vocabulary, micro = task.work()
    clock, rewards = Clock(task, "trl"), []

    class Turn(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            turn.loaded()
            clock.start()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock()
            turn()
            clock.start()

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        assert {len(ids) for ids in completion_ids} == {new} and len(completion_ids) == PROMPTS * GROUP
        scores = even(completion_ids)
        rewards.append(statistics.mean(scores))
        return scores

    model = load_model(task)
    model.generation_config.eos_token_id = vocabulary
    rows = [{"prompt": " ".join(map(str, ids))} for ids in prompts]
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as out:
        config = GRPOConfig(
            output_dir=out,
            max_steps=task.steps,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=PROMPTS * GROUP // micro,
            num_generations=GROUP,
            max_completion_length=new,
            learning_rate=RATE,
            lr_scheduler_type="linear",
            warmup_steps=0,
            weight_decay=0.0,
            max_grad_norm=1.0,
            optim="adamw_torch_fused",
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            logging_steps=10,
            report_to="none",
            save_strategy="no",
            shuffle_dataset=False,
            pad_to_multiple_of=None,
            dataloader_pin_memory=False,
            disable_tqdm=True,
            disable_dropout=True,
            temperature=1.0,
            beta=KL,
            loss_type="grpo",
            epsilon=0.2,
        )
        lora = LoraConfig(
            r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM", lora_dropout=0.0
        )
        trainer = GRPOTrainer(
            model,
            reward,
            args=config,
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=words(vocabulary),
            peft_config=lora,
            callbacks=[Turn()],
        )
        same_adapters(trainer.model)
        trainer._generate = clock.part("rollout", trainer._generate)
        trainer._generate_and_score_completions = clock.part("scoring", trainer._generate_and_score_completions)
        trainer.train()
    return rewards


CONTENDERS: dict[str, Contender] = {"ours": ours, "trl": trl}  # type: ignore[dict-item]


def save_base(folder: str, shape: Mapping[str, int]) -> None:
    """In a process of its own, so that this one stays small."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    config = small_config()
    config.update(dict(shape))
    config.layer_types = config.layer_types[: config.num_hidden_layers]
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def made_up(count: int, vocabulary: int, longest: int) -> list[list[int]]:
    numbers = random.Random(0)
    return [
        [numbers.randrange(1, vocabulary) for _ in range(numbers.randint(longest // 3, longest))] for _ in range(count)
    ]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("contenders", nargs="*", help=f"which ones; all where none is named: {', '.join(CONTENDERS)}")
    parser.add_argument("--repeats", type=int, default=7, help="turns")
    parser.add_argument("--block", type=int, default=2, help="steps of a turn")
    parser.add_argument("--new", type=int, default=64, help="tokens of every completion")
    parser.add_argument(
        "--micro", type=int, choices=(4, 8, 16, 32), default=PROMPTS * GROUP, help="rows at once (TRL's scoring too)"
    )
    parser.add_argument("--threads", type=int, default=1, help="threads of each contender; only one works at a time")
    parser.add_argument("--tiny", action="store_true", help="a tiny shape, 2 turns of 1 step, short completions")
    parser.add_argument("--json", metavar="FILE", help="write all figures there too")
    options = parser.parse_args(arguments)
    names = options.contenders or list(CONTENDERS)
    if set(names) - set(CONTENDERS):
        parser.error(f"no contender {', '.join(set(names) - set(CONTENDERS))}; there are {', '.join(CONTENDERS)}")
    shape, longest = {"vocab_size": VOCABULARY}, 72
    if options.tiny:
        options.repeats, options.block, options.new, longest = 2, 1, 6, 12
        shape = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2}
    steps = WARM_UP + options.repeats * options.block + COOL_DOWN
    prompts = made_up(steps * PROMPTS, shape["vocab_size"], longest)
    print(
        f"{PROMPTS} prompts a step of {statistics.mean(map(len, prompts)):.0f} tokens in the mean, {GROUP} "
        f"completions each of {options.new} "
        f"tokens, {options.micro} rows at once; fp32, {options.threads} thread(s), {options.repeats} turns of "
        f"{options.block} "
        "steps"
    )
    with tempfile.TemporaryDirectory() as folder:
        saving = multiprocessing.get_context("spawn").Process(target=save_base, args=(folder, shape))
        saving.start()
        saving.join()
        work = {"prompts": prompts, "new": options.new, "vocabulary": shape["vocab_size"], "micro": options.micro}
        (Path(folder) / "work.json").write_text(json.dumps(work), encoding="utf-8")
        task = Task(folder, False, steps, options.block, options.threads)
        records = harness.compete({name: CONTENDERS[name] for name in names}, task, options.repeats)
        splits = {name: json.loads((Path(folder) / f"split-{name}.json").read_text(encoding="utf-8")) for name in names}
    report(records, splits)
    if options.json:
        document = {name: {**record.to_dict(), "split": splits[name]} for name, record in records.items()}
        Path(options.json).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return 0 if all(len(record.losses) == steps for record in records.values()) else 1


def report(records: dict[str, Record], splits: dict[str, list[dict[str, float]]]) -> None:
    harness.show_table(records, TARGETS, {})
    means = {
        name: {part: statistics.median(step[part] for step in steps) for part in PARTS}
        for name, steps in splits.items()
    }
    for name, parts in means.items():
        whole = sum(parts.values())
        columns = "   ".join(f"{part} {seconds:.3f} ({seconds / whole:.0%})" for part, seconds in parts.items())
        few = max(1, len(records[name].losses) // 4)
        first, last = (statistics.mean(some) for some in (records[name].losses[:few], records[name].losses[-few:]))
        print(f"{name:<14}CPU s, median: {columns}   reward {first:.3f} -> {last:.3f}")
        if "ours" in means and name != "ours":
            print(
                f"{'':<14}ours / it:     "
                + "   ".join(f"{part} {means['ours'][part] / seconds:.2f}" for part, seconds in parts.items())
            )


if __name__ == "__main__":
    sys.exit(main())

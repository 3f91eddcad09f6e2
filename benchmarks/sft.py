"""An SFT step side by side: lowrank_tune's own loop, hand-written loops on the same PEFT model, and TRL's SFTTrainer.

    PYTHONPATH=. python benchmarks/sft.py                # fp32; about 5 minutes
    PYTHONPATH=. python benchmarks/sft.py --nf4          # an NF4 base
    PYTHONPATH=. python benchmarks/sft.py --quick        # a minute; figures mean little

All train the same base from the same adapters on the same batches in the same order, gradient checkpointing off, AdamW
fused, linear schedule, clipping at 1, in turns (`harness.py`). Ours logs its first and last step (KL to the base is
measured there): neither is in a block. The loss curves must agree to 1e-4 at every step.

    ours           trainer.Trainer, algorithms.sft.SFT, model.roles.Roles, 8 rows at once as the others
    ours-micro4    the same with the kit's default of 4 rows at once, sorted by length
    ours-logging   as `ours`, but every step is a logging step (the default of `train.logging_steps`)
    hand           model(ids, attention_mask).logits at all positions, cross_entropy over them
    hand-lean      the best simple one: no attention mask (rows are padded on the right), the head on scored tokens only
    trl            SFTTrainer as fast as its settings go: no checkpointing, fp32 adapters, no padding to a multiple,
                   logging every 10
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import harness
from common import MEAN_LENGTH, ragged_rows, small_config
from harness import COOL_DOWN, WARM_UP, Contender, Record, Turns, load_model, pad, same_adapters, worst_difference

ROWS, RATE, RANK, ALPHA = 8, 1e-3, 16, 32
CURVE, CURVE_STEPS = 1e-4, 20
TARGETS = {"hand": 1.10, "hand-lean": 1.10, "trl": 0.6}


class Task(harness.Task):
    def batches(self) -> Iterator[list[tuple[list[int], list[bool]]]]:
        rows = ragged_rows(self.steps * ROWS)
        return (rows[start : start + ROWS] for start in range(0, len(rows), ROWS))


def ours(task: Task, turn: Turns, micro: int = ROWS, log_every: int = 1_000_000) -> list[float]:
    import torch

    from lowrank_tune.algorithms.base import AlgorithmContext
    from lowrank_tune.algorithms.sft import SFT
    from lowrank_tune.batch import Batch
    from lowrank_tune.config import AdapterConfig, BaseConfig, TrainingConfig
    from lowrank_tune.events import StepEnd
    from lowrank_tune.model.adapters import lora_config
    from lowrank_tune.model.base import load_base
    from lowrank_tune.model.roles import Roles
    from lowrank_tune.training.trainer import Trainer, make_optimizer

    device = torch.device("cpu")
    base = load_base(BaseConfig(model=task.folder, bits=4 if task.nf4 else 16), tokenizer=None, device=device)
    config = lora_config(AdapterConfig(r=RANK, lora_alpha=ALPHA), base.model)
    roles = Roles(base, {"policy": config}, ["policy"], {"policy": ["policy"], "reference": []})
    same_adapters(base.model)
    train = TrainingConfig(
        max_steps=task.steps,
        global_batch_size=ROWS,
        micro_batch_size=micro,
        learning_rate=RATE,
        lr_scheduler_type="linear",
        gradient_checkpointing=False,
        logging_steps=log_every,
    )
    batches, losses = task.batches(), []
    algorithm = SFT(AlgorithmContext(roles, lambda step: Batch(*pad(next(batches)))))
    parameters = roles.parameters("policy")

    def emit(event: Any) -> None:
        if isinstance(event, StepEnd):
            losses.append(event.stats["loss"])

    loop = Trainer(
        algorithm,
        parameters,
        make_optimizer(parameters, train, device),
        train,
        task.steps,
        0,
        device,
        emit,
        lambda *_: turn(),
    )
    turn.loaded()
    loop.run()
    return losses


def ours_micro4(task: Task, turn: Turns) -> list[float]:
    return ours(task, turn, micro=4)


def ours_logging(task: Task, turn: Turns) -> list[float]:
    return ours(task, turn, log_every=1)


def hand(task: Task, turn: Turns, lean: bool = False) -> list[float]:
    import torch
    import torch.nn.functional as F
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        load_model(task), LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    same_adapters(model)
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 - step / task.steps)
    plain = model.get_base_model()
    losses = []
    turn.loaded()
    for rows in task.batches():
        ids, attended, mask = pad(rows)
        if lean:
            hidden = plain.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
            logits, targets = plain.lm_head(hidden[mask[:, 1:]]), ids[:, 1:][mask[:, 1:]]
        else:
            logits = model(input_ids=ids, attention_mask=attended.long(), use_cache=False).logits[:, :-1].flatten(0, 1)
            targets = torch.where(mask, ids, -100)[:, 1:].flatten()
        loss = F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum") / mask[:, 1:].sum()
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
    from trl import SFTConfig, SFTTrainer

    class Turn(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            turn.loaded()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            turn()

    class Kept(SFTTrainer):  # type: ignore[misc]
        kept: list[Any] = []

        def compute_loss(self, *arguments: Any, **named: Any) -> Any:
            loss = super().compute_loss(*arguments, **named)
            self.kept.append(loss.detach())
            return loss

    rows = [
        {"input_ids": ids, "labels": [token if trained else -100 for token, trained in zip(ids, mask, strict=True)]}
        for batch in task.batches()
        for ids, mask in batch
    ]
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as out:
        config = SFTConfig(
            output_dir=out,
            max_steps=task.steps,
            per_device_train_batch_size=ROWS,
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
            train_sampling_strategy="sequential",
            max_length=None,
            pad_to_multiple_of=None,
            dataloader_pin_memory=False,
            disable_tqdm=True,
            dataset_kwargs={"skip_prepare_dataset": True},
        )
        lora = LoraConfig(
            r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM", lora_dropout=0.0
        )
        trainer = Kept(
            load_model(task),
            config,
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=harness.words(),
            peft_config=lora,
            callbacks=[Turn()],
        )
        same_adapters(trainer.model)
        trainer.train()
    return [float(loss) for loss in trainer.kept]


CONTENDERS: dict[str, Contender] = {
    "ours": ours,
    "ours-micro4": ours_micro4,
    "ours-logging": ours_logging,
    "hand": hand,
    "hand-lean": hand_lean,
    "trl": trl,
}


def save_base(folder: str) -> None:
    """In a process of its own, so that this one stays small."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(small_config()).save_pretrained(folder)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("contenders", nargs="*", help=f"which ones; all where none is named: {', '.join(CONTENDERS)}")
    parser.add_argument("--nf4", action="store_true", help="an NF4 base, double-quantized")
    parser.add_argument("--repeats", type=int, default=7, help="turns")
    parser.add_argument("--block", type=int, default=4, help="steps of a turn")
    parser.add_argument("--threads", type=int, default=1, help="threads of each contender; only one works at a time")
    parser.add_argument(
        "--quick", action="store_true", help="5 turns of 4 steps, ours and hand-lean only: enough for the curves"
    )
    parser.add_argument("--json", metavar="FILE", help="write all figures there too")
    options = parser.parse_args(arguments)
    repeats, names = (5, ["ours", "hand-lean"]) if options.quick else (options.repeats, list(CONTENDERS))
    names = options.contenders or names
    if set(names) - set(CONTENDERS):
        parser.error(f"no contender {', '.join(set(names) - set(CONTENDERS))}; there are {', '.join(CONTENDERS)}")
    with tempfile.TemporaryDirectory() as folder:
        saving = multiprocessing.get_context("spawn").Process(target=save_base, args=(folder,))
        saving.start()
        saving.join()
        task = Task(folder, options.nf4, WARM_UP + repeats * options.block + COOL_DOWN, options.block, options.threads)
        records = harness.compete({name: CONTENDERS[name] for name in names}, task, repeats)
    report(records, task, {} if task.nf4 else TARGETS)
    if options.json:
        figures = {name: record.to_dict() for name, record in records.items()}
        Path(options.json).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 0 if curves_agree(records) else 1


def curves_agree(records: dict[str, Record]) -> bool:
    return min(len(record.losses) for record in records.values()) >= CURVE_STEPS and worst_difference(records) <= CURVE


def report(records: dict[str, Record], task: Task, targets: dict[str, float]) -> None:
    print(
        f"{ROWS} rows a step, {MEAN_LENGTH} tokens a row in the mean, {'NF4' if task.nf4 else 'fp32'} base, "
        f"{task.threads} thread(s), "
        f"{len(next(iter(records.values())).cpu)} turns of {task.block} steps"
    )
    harness.show_table(records, targets, {})
    curve = next(iter(records.values())).losses
    print(
        f"loss {curve[0]:.6f} -> {curve[-1]:.6f} over {len(curve)} steps; the curves differ by at most "
        f"{worst_difference(records):.1e}: "
        + ("equal to 1e-4" if curves_agree(records) else f"NOT shown equal to {CURVE:.0e} over {CURVE_STEPS} steps")
    )


if __name__ == "__main__":
    sys.exit(main())

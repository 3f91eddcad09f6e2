"""TRL 1.16's DPOTrainer and RewardTrainer compared with whole runs: 20 optimizer steps on the same pairs in the
same order, from the same adapter, in fp32; the losses and the final adapters must be equal.

Everything of a run takes part: file, chat template, order, micro-batches, reference, optimizer, schedule, clipping,
`final/`. Pairs are text on both sides, and the token ids that each side trains on are compared.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_preference_trl import lora, place
from torch import Tensor

from lowrank_tune.config import Recipe
from lowrank_tune.events import StepEnd
from lowrank_tune.runner import run
from lowrank_tune.training import stage as stage_module

trl = pytest.importorskip("trl")
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]
STEPS, PAIRS, MICRO = 20, 8, 4
RATE, DECAY, BETAS, BETA = 2e-4, 0.05, (0.9, 0.98), 0.3
MAX_NORM = {"dpo": 4.0, "reward": 0.5}
"""Some of the 20 gradients are clipped, and some are not."""
TOLERANCE = 1e-5
TINY_BASE = str(files("lowrank_tune.toy") / "base")
Pair = tuple[list[int], list[int]]
"""Token ids of the chosen and of the rejected conversation."""


def pair_texts() -> list[dict[str, str]]:
    """One epoch of pairs: no question twice, answers of one to some thirty words."""
    stream = random.Random(3)
    sums = stream.sample([(a, b) for a in range(11, 99) for b in range(11, 99)], STEPS * PAIRS)
    right = ("{s}", "It is {s}.", "{a} + {b} = {s}. So it is {s}.", "First {a}, then {b} more. That makes {s} in all.")
    wrong = ("{w}", "It is {w}.", "Let me think about it.", "{a} + {b} = {w}. So it is {w}. So it is {w}.")
    rows = []
    for a, b in sums:
        numbers = {"a": a, "b": b, "s": a + b, "w": a + b + stream.choice((-10, -1, 1, 10))}
        answers = [stream.choice(kind).format(**numbers) for kind in (right, wrong)]
        rows.append({"prompt": f"What is {a} + {b}?", "chosen": answers[0], "rejected": answers[1]})
    return rows


@dataclass
class Run:
    """The initial adapter of a run, its rows, and its result."""

    initial: dict[str, Tensor] = field(default_factory=dict)
    pairs: list[Pair] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    final: dict[str, Tensor] = field(default_factory=dict)


def kit_run(folder: Path, monkeypatch: pytest.MonkeyPatch, algorithm: str, **section: Any) -> Run:
    """Runs a recipe, and watches its adapter and its batches from outside."""
    data, seen, name = folder / "pairs.jsonl", Run(), "reward" if algorithm == "reward" else "policy"
    data.write_text("".join(json.dumps(row) + "\n" for row in pair_texts()))
    recipe = {
        "algorithm": algorithm,
        "base": {"model": "tiny-tutor", "bits": 16},
        "adapters": {name: {"r": 4, "lora_alpha": 16}},
        "data": {"train": [{"dataset": str(data)}], "max_length": 256, "eval_fraction": 0.0},
        algorithm: section,
        "train": {
            "num_train_epochs": 1,
            "global_batch_size": PAIRS,
            "micro_batch_size": MICRO,
            "learning_rate": RATE,
            "weight_decay": DECAY,
            "adam_beta1": BETAS[0],
            "adam_beta2": BETAS[1],
            "max_grad_norm": MAX_NORM[algorithm],
            "gradient_checkpointing": False,
        },
    }
    train = stage_module.Stage.train

    def watched(stage: Any, set_training: Any) -> Any:
        seen.initial = {key: tensor.clone() for key, tensor in stage.built.roles.adapter_tensors(name).items()}
        collect = stage.built.algorithm.collect

        def recorded(step: int) -> Any:
            step_batch = collect(step)
            seen.pairs += pairs_of(step_batch.batch)
            return step_batch

        stage.built.algorithm.collect = recorded
        return train(stage, set_training)

    def keep(event: Any) -> None:
        if isinstance(event, StepEnd):
            seen.losses.append(event.stats["loss"])
            seen.grad_norms.append(event.stats["grad_norm"])

    monkeypatch.setenv("LOWRANK_TUNE_CACHE", str(folder / "cache"))
    monkeypatch.setattr(stage_module.Stage, "train", watched)
    result = run(Recipe.from_dict(recipe), out=folder / "run", ui="none", on_event=keep)
    seen.final = load_file(result.folder / "final" / "adapter_model.safetensors")
    return seen


def pairs_of(batch: Any) -> Iterator[Pair]:
    rows = [batch.input_ids[i][batch.attention_mask[i]].tolist() for i in range(len(batch))]
    yield from zip(rows[::2], rows[1::2], strict=True)


def in_order(ours: Run, tokenizer: Any) -> list[dict[str, str]]:
    """Returns the pairs as plain text with the control tokens of the template, in the order of our steps. TRL itself
    appends the end token to an answer."""
    texts = {row["prompt"]: row for row in pair_texts()}
    rows = []
    for chosen, _ in ours.pairs:
        question = tokenizer.decode(chosen).partition("<|user|>")[2].partition("<|end_of_turn|>")[0]
        row = texts.pop(question)
        prompt = f"<|begin_of_text|><|user|>{question}<|end_of_turn|><|assistant|>"
        rows.append({"prompt": prompt, **{side: f"{row[side]}<|end_of_turn|>" for side in ("chosen", "rejected")}})
    assert not texts, "an epoch is every pair once"
    return rows


def arguments(kind: Any, folder: Path, **more: Any) -> Any:
    """The same training in TRL's words; rows as they come, nothing truncated, every adapter in fp32."""
    return kind(
        output_dir=str(folder / "trl"),
        num_train_epochs=1,
        per_device_train_batch_size=MICRO,
        gradient_accumulation_steps=PAIRS // MICRO,
        train_sampling_strategy="sequential",
        max_length=None,
        learning_rate=RATE,
        lr_scheduler_type="cosine",
        warmup_steps=0,
        optim="adamw_torch",
        weight_decay=DECAY,
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        adam_epsilon=1e-8,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **more,
    )


def trl_run(trainer: Any, initial: dict[str, Tensor]) -> tuple[list[float], dict[str, Tensor]]:
    """Trains our adapter with TRL. Returns the loss of each step and the adapter under the names of PEFT's files."""
    place(trainer.model, initial)
    micro_losses: list[float] = []
    compute_loss: Callable[..., Any] = trainer.compute_loss

    def watched(*given: Any, **more: Any) -> Any:
        found = compute_loss(*given, **more)
        micro_losses.append(float(found[0] if isinstance(found, tuple) else found))
        return found

    trainer.compute_loss = watched
    trainer.train()
    count = PAIRS // MICRO
    losses = [sum(micro_losses[i : i + count]) / count for i in range(0, len(micro_losses), count)]
    final = {
        name.replace(".default", "").replace(".modules_to_save", ""): parameter.detach().clone()
        for name, parameter in trainer.model.named_parameters()
        if parameter.requires_grad
    }
    return losses, final


def compare(ours: Run, losses: list[float], final: dict[str, Tensor], max_norm: float) -> None:
    assert len(ours.losses) == len(losses) == STEPS and ours.final.keys() == final.keys()
    worst_loss = max(abs(a - b) for a, b in zip(ours.losses, losses, strict=True))
    worst_weight = max(float((ours.final[key] - final[key]).abs().max()) for key in final)
    moved = {key: float((final[key] - ours.initial[key]).abs().max()) for key in final}
    print(f"losses {losses[0]:.4f} to {losses[-1]:.4f}, apart by {worst_loss:.1e}; weights by {worst_weight:.1e}")
    assert worst_loss <= TOLERANCE and worst_weight <= TOLERANCE
    # what would make the comparison empty: a matrix that stayed where it was, gradients that were never clipped
    assert min(moved.values()) > 100 * TOLERANCE
    assert min(ours.grad_norms) < max_norm < max(ours.grad_norms)


def test_dpo_run_equals_trl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ours = kit_run(tmp_path, monkeypatch, "dpo", loss_type="sigmoid", beta=BETA)
    tokenizer = AutoTokenizer.from_pretrained(TINY_BASE)
    trainer = trl.DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(TINY_BASE, dtype=torch.float32),
        args=arguments(trl.DPOConfig, tmp_path, max_grad_norm=MAX_NORM["dpo"], beta=BETA, loss_type=["sigmoid"]),
        train_dataset=Dataset.from_list(in_order(ours, tokenizer)),
        processing_class=tokenizer,
        peft_config=lora("CAUSAL_LM"),
    )
    rows = trainer.train_dataset
    assert [
        (row["prompt_ids"] + row["chosen_ids"], row["prompt_ids"] + row["rejected_ids"]) for row in rows
    ] == ours.pairs
    losses, final = trl_run(trainer, ours.initial)
    assert losses[0] == pytest.approx(0.693147, abs=1e-6), "policy and reference are equal at the first step"
    compare(ours, losses, final, MAX_NORM["dpo"])


def test_reward_run_equals_trl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    ours = kit_run(tmp_path, monkeypatch, "reward", center_rewards_coefficient=0.0)
    tokenizer = AutoTokenizer.from_pretrained(TINY_BASE)
    trainer = trl.RewardTrainer(
        model=AutoModelForSequenceClassification.from_pretrained(TINY_BASE, num_labels=1, dtype=torch.float32),
        args=arguments(trl.RewardConfig, tmp_path, max_grad_norm=MAX_NORM["reward"], center_rewards_coefficient=None),
        train_dataset=Dataset.from_list(in_order(ours, tokenizer)),
        processing_class=tokenizer,
        peft_config=lora("SEQ_CLS", modules_to_save=["score"]),
    )
    assert [(row["chosen_ids"], row["rejected_ids"]) for row in trainer.train_dataset] == ours.pairs
    losses, final = trl_run(trainer, ours.initial)
    assert any(key.endswith("score.weight") for key in final), "the head is compared too"
    compare(ours, losses, final, MAX_NORM["reward"])

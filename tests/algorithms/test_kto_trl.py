"""TRL 1.16 as an oracle: its KTOTrainer on the same rows, the same base and the same fp32 adapter, one step and a whole
run.

TRL pairs a prompt with the answer of the row before it, and the kit, like the paper, with that of the row after it: TRL
gets the rows of each step in reverse. Its estimate is one of a micro-batch, so that a step is one micro-batch here.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from algorithm_helpers import KTO_BETA, KTO_WEIGHTS, accumulated, by_key, error_against, kto_over, labeled_batch
from models import llama_roles, perturb, saved_model, zero_grad
from oracles import PlainModel
from safetensors.torch import load_file
from test_preference_trl import COMMON, ended_rows, lora, place, tokenizer, trained, word
from test_preference_trl_run import BETAS, DECAY, RATE, TINY_BASE
from torch import Tensor

from lowrank_tune.config import Recipe
from lowrank_tune.events import StepEnd
from lowrank_tune.model.roles import Roles
from lowrank_tune.runner import run
from lowrank_tune.training import stage as stage_module

trl = pytest.importorskip("trl")
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]
LABELS = [True, False, False, True, True, True, False, True, False, True]


def policy(seed: int) -> Roles:
    roles = llama_roles(16)
    perturb(roles, "policy", size=0.05, seed=seed)
    return roles


def text(row: list[int], mask: list[bool], answer: bool) -> str:
    words = [word(token) for token, in_answer in zip(row, mask, strict=True) if in_answer == answer]
    return " ".join(words) if answer else "".join(f"{one} " for one in words)


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
@pytest.mark.parametrize("seed", [4, 5, 6])
def test_step_equals_trl(tmp_path: Path, loss_type: str, seed: int) -> None:
    """Loss, gradient and metrics of one step are those of TRL's KTOTrainer."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM

    roles = policy(seed)
    rows, masks = ended_rows(inside_pads=True)
    order = range(len(rows) - 1, -1, -1)
    data = {
        "prompt": [text(rows[i], masks[i], False) for i in order],
        "completion": [text(rows[i], masks[i], True) for i in order],
        "label": [LABELS[i] for i in order],
    }
    arguments = trl.KTOConfig(
        output_dir=str(tmp_path),
        loss_type=loss_type,
        beta=KTO_BETA,
        desirable_weight=KTO_WEIGHTS[0],
        undesirable_weight=KTO_WEIGHTS[1],
        **{**COMMON, "per_device_train_batch_size": len(rows)},
    )
    trainer = trl.KTOTrainer(
        model=AutoModelForCausalLM.from_pretrained(saved_model(), dtype=torch.float32),
        args=arguments,
        train_dataset=Dataset.from_dict(data),
        processing_class=tokenizer(),
        peft_config=lora("CAUSAL_LM"),
    )
    seen = [[*row["prompt_ids"], *row["completion_ids"]] for row in trainer.train_dataset]
    assert seen == rows[::-1], "TRL reads other rows than these"
    place(trainer.model, roles.adapter_tensors("policy"))
    theirs, gradients = trained(trainer)
    plain = PlainModel()
    with torch.no_grad():
        reference = [float(plain.sequence_logp(row, mask, policy=False)) for row, mask in zip(rows, masks, strict=True)]
    zero_grad(roles)
    algorithm = kto_over(roles, loss_type)
    batch = labeled_batch(rows, masks, reference, LABELS)
    loss, _, stats = accumulated(algorithm, batch, rows=4)
    stats |= algorithm.derived_metrics(stats)
    stats["kl"] = float(algorithm.collect(0).batch.kl_estimate[0])  # type: ignore[index]
    logged = next(entry for entry in trainer.state.log_history if "rewards/margins" in entry)
    assert loss == pytest.approx(theirs, abs=1e-5) and error_against(by_key(roles, "policy"), gradients) < 1e-4
    for name in ("kl", "rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected"):
        assert stats[name] == pytest.approx(logged[name], abs=1e-3), name
    assert (stats["kl"] > 0) == (loss_type == "kto" and seed in POSITIVE_SEEDS)


POSITIVE_SEEDS = (5, 6)
"""Policies with a positive estimate, which the clamp at 0 does not hide."""

# --- a whole run ------------------------------------------------------------------------------------------------------

STEPS, ROWS = 12, 8
Answer = tuple[list[int], bool]
"""Token ids of a conversation, and its label."""


def answer_rows() -> list[dict[str, Any]]:
    """One epoch of answers: no question twice, answers of one to some twenty words."""
    stream = random.Random(3)
    sums = stream.sample([(a, b) for a in range(11, 99) for b in range(11, 99)], STEPS * ROWS)
    right = ("{s}", "It is {s}.", "{a} + {b} = {s}. So it is {s}.", "First {a}, then {b} more. That makes {s} in all.")
    wrong = ("{w}", "It is {w}.", "Let me think about it.", "{a} + {b} = {w}. So it is {w}. So it is {w}.")
    rows = []
    for a, b in sums:
        numbers = {"a": a, "b": b, "s": a + b, "w": a + b + stream.choice((-10, -1, 1, 10))}
        label = stream.random() < 0.6
        completion = stream.choice(right if label else wrong).format(**numbers)
        rows.append({"prompt": f"What is {a} + {b}?", "completion": completion, "label": label})
    return rows


class KitRun:
    """A run of the kit: its initial adapter, its rows in the order of the steps, losses and final adapter."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.initial: dict[str, Tensor] = {}
        self.steps: list[list[Answer]] = []
        self.losses: list[float] = []
        self.kls: list[float] = []
        data = folder / "answers.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in answer_rows()))
        recipe = {
            "algorithm": "kto",
            "base": {"model": "tiny-tutor", "bits": 16},
            "adapters": {"policy": {"r": 4, "lora_alpha": 16}},
            "data": {"train": [{"dataset": str(data)}], "max_length": 256, "eval_fraction": 0.0},
            "kto": {"beta": KTO_BETA, "desirable_weight": 1.25, "undesirable_weight": 1.0},
            "train": {
                "num_train_epochs": 1,
                "global_batch_size": ROWS,
                "micro_batch_size": 3,
                "learning_rate": RATE,
                "weight_decay": DECAY,
                "adam_beta1": BETAS[0],
                "adam_beta2": BETAS[1],
                "gradient_checkpointing": False,
            },
        }
        train = stage_module.Stage.train

        def watched(stage: Any, set_training: Any) -> Any:
            tensors = stage.built.roles.adapter_tensors("policy")
            self.initial = {key: tensor.clone() for key, tensor in tensors.items()}
            collect = stage.built.algorithm.collect

            def recorded(step: int) -> Any:
                step_batch = collect(step)
                batch = step_batch.batch
                rows = [batch.input_ids[i][batch.attention_mask[i]].tolist() for i in range(len(batch))]
                self.steps.append(list(zip(rows, batch.labels.tolist(), strict=True)))
                return step_batch

            stage.built.algorithm.collect = recorded
            return train(stage, set_training)

        def keep(event: Any) -> None:
            if isinstance(event, StepEnd):
                self.losses.append(event.stats["loss"])
                self.kls.append(event.stats["kl"])

        monkeypatch.setenv("LOWRANK_TUNE_CACHE", str(folder / "cache"))
        monkeypatch.setattr(stage_module.Stage, "train", watched)
        result = run(Recipe.from_dict(recipe), out=folder / "run", ui="none", on_event=keep)
        self.final = load_file(result.folder / "final" / "adapter_model.safetensors")


def reversed_rows(ours: KitRun, decode: Any) -> list[dict[str, Any]]:
    """Returns the rows as plain text with the control tokens of the template, each step in reverse. TRL itself appends
    the end token to an answer."""
    rows = {row["prompt"]: row for row in answer_rows()}
    found = []
    for step in ours.steps:
        for ids, label in reversed(step):
            question = decode(ids).partition("<|user|>")[2].partition("<|end_of_turn|>")[0]
            row = rows.pop(question)
            assert row["label"] is label
            found.append(
                {
                    "prompt": f"<|begin_of_text|><|user|>{question}<|end_of_turn|><|assistant|>",
                    "completion": f"{row['completion']}<|end_of_turn|>",
                    "label": label,
                }
            )
    assert not rows, "an epoch is every row once"
    return found


def test_run_equals_trl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss of each step of a run, and the final adapter, are those of TRL."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ours = KitRun(tmp_path, monkeypatch)
    tokenizer_of_base = AutoTokenizer.from_pretrained(TINY_BASE)
    trainer = trl.KTOTrainer(
        model=AutoModelForCausalLM.from_pretrained(TINY_BASE, dtype=torch.float32),
        args=trl.KTOConfig(
            output_dir=str(tmp_path / "trl"),
            num_train_epochs=1,
            per_device_train_batch_size=ROWS,
            max_length=None,
            learning_rate=RATE,
            lr_scheduler_type="cosine",
            warmup_steps=0,
            optim="adamw_torch",
            weight_decay=DECAY,
            adam_beta1=BETAS[0],
            adam_beta2=BETAS[1],
            adam_epsilon=1e-8,
            max_grad_norm=1.0,
            beta=KTO_BETA,
            desirable_weight=1.25,
            undesirable_weight=1.0,
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(reversed_rows(ours, tokenizer_of_base.decode)),
        processing_class=tokenizer_of_base,
        peft_config=lora("CAUSAL_LM"),
    )
    seen = [[*row["prompt_ids"], *row["completion_ids"]] for row in trainer.train_dataset]
    assert seen == [ids for step in ours.steps for ids, _ in reversed(step)]
    place(trainer.model, ours.initial)
    losses: list[float] = []
    compute_loss = trainer.compute_loss

    def watched(*given: Any, **more: Any) -> Any:
        losses.append(float(found := compute_loss(*given, **more)))
        return found

    trainer.compute_loss = watched
    trainer.train()
    final = {
        name.replace(".default", ""): parameter.detach().clone()
        for name, parameter in trainer.model.named_parameters()
        if parameter.requires_grad
    }
    assert len(losses) == STEPS and ours.final.keys() == final.keys()
    worst_loss = max(abs(a - b) for a, b in zip(ours.losses, losses, strict=True))
    worst_weight = max(float((ours.final[key] - final[key]).abs().max()) for key in final)
    print(f"losses {losses[0]:.4f} to {losses[-1]:.4f}, apart by {worst_loss:.1e}; weights by {worst_weight:.1e}")
    assert worst_loss <= 1e-5 and worst_weight <= 1e-5
    moved = {key: float((final[key] - ours.initial[key]).abs().max()) for key in final}
    assert min(moved.values()) > 50 * 1e-5 and max(ours.kls) > 0

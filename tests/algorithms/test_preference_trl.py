"""TRL 1.16 as an oracle: its RewardTrainer and DPOTrainer on the same pairs, the same base and the same fp32 adapters.

What would make the comparison unfair is set here by hand: their adapters are put back to the kit's weights in fp32
after the trainer is built (so that their reference is the base with adapters off), dropout is 0, rows end in the end
token already so that none is added, and all pairs are one micro-batch, because theirs is a mean of means.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from algorithm_helpers import accumulated, by_key, error_against, pair_batch, pair_rows
from models import VOCAB, llama_roles, load_base_of, perturb, reward_roles, saved_model, zero_grad
from oracles import PlainModel
from peft import LoraConfig
from torch import Tensor

from lowrank_tune.algorithms.base import AlgorithmContext
from lowrank_tune.algorithms.dpo import DPO
from lowrank_tune.algorithms.reward_model import RewardModeling
from lowrank_tune.config import DPOConfig, RewardModelConfig
from lowrank_tune.model.roles import Roles

trl = pytest.importorskip("trl")
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]
COMMON: dict[str, Any] = {
    "per_device_train_batch_size": 5,
    "bf16": False,
    "use_cpu": True,
    "report_to": "none",
    "gradient_checkpointing": False,
    "max_length": None,
    "learning_rate": 0.0,
    "max_grad_norm": 0.0,
    "max_steps": 1,
    "save_strategy": "no",
    "disable_tqdm": True,
    "dataloader_drop_last": False,
    "logging_steps": 1,
}


def tokenizer() -> Any:
    """Word for word: token 7 is the word `t07`, so that text and ids are the same thing."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(WordLevel({word(i): i for i in range(VOCAB)}, unk_token=word(3)))
    inner.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=word(1), pad_token=word(0), bos_token=word(2))


def word(token: int) -> str:
    return f"t{token:02d}"


def ended_rows(inside_pads: bool = False) -> tuple[list[list[int]], list[list[bool]]]:
    """Ragged pairs that end in the end token. TRL finds the last token by its id, so its rows hold no pad id inside."""
    rows, masks = pair_rows([(4, 3, 6), (2, 5, 2), (7, 2, 1), (3, 9, 4), (9, 2, 8)], seed=5)
    for row in rows:
        row[:] = [token if token > 2 or inside_pads else token + 50 for token in row]
        row[-1] = 1
    for i in range(0, len(rows), 2):  # a chosen and a rejected answer of the end token alone begin alike
        assert rows[i] != rows[i + 1]
    return rows, masks


def lora(kind: str, **more: Any) -> LoraConfig:
    """Returns our adapter as a configuration of PEFT."""
    return LoraConfig(r=4, lora_alpha=16, lora_dropout=0.0, target_modules="all-linear", task_type=kind, **more)


def place(model: Any, tensors: dict[str, Tensor]) -> None:
    """Copies our weights to TRL's model, in fp32. Returns their number."""
    found = 0
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key = name.replace(".default", "").replace(".modules_to_save", "")
            parameter.data = tensors[key].clone()
            found += 1
            assert parameter.dtype == torch.float32
    assert found == len(tensors)


def trained(trainer: Any) -> tuple[float, dict[str, Tensor]]:
    """One step of TRL's at rate 0: the loss that it logs, and the gradients, under the names of PEFT's files."""
    kept: dict[str, Tensor] = {}
    losses: list[float] = []

    class Keep(trl.trainer.dpo_trainer.TrainerCallback):  # type: ignore[misc,name-defined]
        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            for name, parameter in trainer.model.named_parameters():
                if parameter.grad is not None:
                    kept[name.replace(".default", "").replace(".modules_to_save", "")] = parameter.grad.clone()

    real = trainer.compute_loss

    def watched(*given: Any, **more: Any) -> Any:
        found = real(*given, **more)
        losses.append(float(found[0] if isinstance(found, tuple) else found))
        return found

    trainer.compute_loss = watched
    trainer.add_callback(Keep())
    trainer.train()
    assert len(losses) == 1, "more than one micro-batch"
    return losses[0], kept


# --- reward -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reward() -> Roles:
    roles = reward_roles(load_base_of(16))
    perturb(roles, "reward", size=0.05)
    roles.heads["reward"].weight.data.mul_(0.2)
    return roles


@pytest.mark.parametrize(("centering", "margins"), [(None, (0.0,) * 5), (0.1, (0.0, 0.5, 1.5, 0.0, 0.25))])
def test_reward_equals_trl(tmp_path: Path, reward: Roles, centering: float | None, margins: tuple[float, ...]) -> None:
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification

    rows, masks = ended_rows()
    data = {"chosen_ids": rows[::2], "rejected_ids": rows[1::2], "margin": list(margins)}
    model = AutoModelForSequenceClassification.from_pretrained(saved_model(), num_labels=1, dtype=torch.float32)
    arguments = trl.RewardConfig(output_dir=str(tmp_path), center_rewards_coefficient=centering, **COMMON)
    trainer = trl.RewardTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_dict(data),
        processing_class=tokenizer(),
        peft_config=lora("SEQ_CLS", modules_to_save=["score"]),
    )
    place(trainer.model, reward.adapter_tensors("reward"))
    theirs, gradients = trained(trainer)
    algorithm = RewardModeling(AlgorithmContext(reward), RewardModelConfig(center_rewards_coefficient=centering or 0.0))
    loss, _, stats = accumulated(algorithm, pair_batch(rows, masks, margins=margins), "reward", rows=4)
    logged = next(entry for entry in trainer.state.log_history if "accuracy" in entry)
    assert loss == pytest.approx(theirs, rel=1e-5) and error_against(by_key(reward, "reward"), gradients) < 1e-4
    assert stats["accuracy"] == pytest.approx(logged["accuracy"]) and stats["margin"] == pytest.approx(
        logged["margin"], abs=1e-4
    )


# --- DPO --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def policy() -> Roles:
    roles = llama_roles(16)
    perturb(roles, "policy", size=0.05)
    return roles


def dpo_trainer(
    tmp_path: Path, roles: Roles, kind: str, s: float, rows: list[list[int]], masks: list[list[bool]]
) -> Any:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM

    def text(place: int, answer: bool) -> str:
        return "".join(
            f"{word(token)} "
            for token, in_completion in zip(rows[place], masks[place], strict=True)
            if in_completion == answer
        )

    places = range(0, len(rows), 2)
    data = {
        "prompt": [text(i, False) for i in places],
        "chosen": [text(i, True).strip() for i in places],
        "rejected": [text(i + 1, True).strip() for i in places],
    }
    arguments = trl.DPOConfig(
        output_dir=str(tmp_path),
        loss_type=[kind, "sft"] if s else [kind],
        loss_weights=[1.0, s] if s else None,
        beta=0.3,
        label_smoothing=0.2,
        **COMMON,
    )
    model = AutoModelForCausalLM.from_pretrained(saved_model(), dtype=torch.float32)
    trainer = trl.DPOTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_dict(data),
        processing_class=tokenizer(),
        peft_config=lora("CAUSAL_LM"),
    )
    seen = [
        [*row["prompt_ids"], *row[side]] for row in trainer.train_dataset for side in ("chosen_ids", "rejected_ids")
    ]
    assert seen == rows, "TRL reads other rows than these"
    place(trainer.model, roles.adapter_tensors("policy"))
    return trainer


@pytest.mark.parametrize(
    ("kind", "s"),
    [
        ("sigmoid", 0.0),
        ("ipo", 0.0),
        ("hinge", 0.0),
        ("robust", 0.0),
        ("apo_zero", 0.0),
        ("sigmoid_norm", 0.0),
        ("sigmoid", 0.7),
    ],
)
def test_dpo_equals_trl(tmp_path: Path, policy: Roles, kind: str, s: float) -> None:
    rows, masks = ended_rows(inside_pads=True)
    plain = PlainModel()
    with torch.no_grad():
        reference = [float(plain.sequence_logp(row, mask, policy=False)) for row, mask in zip(rows, masks, strict=True)]
    trainer = dpo_trainer(tmp_path, policy, kind, s, rows, masks)
    theirs, gradients = trained(trainer)
    zero_grad(policy)
    settings = DPOConfig(loss_type=kind, beta=0.3, label_smoothing=0.2, sft_coef=s)
    algorithm = DPO(AlgorithmContext(policy), settings)
    loss, _, stats = accumulated(algorithm, pair_batch(rows, masks, reference), rows=4)
    logged = next(entry for entry in trainer.state.log_history if "rewards/margins" in entry)
    assert (
        loss == pytest.approx(theirs, rel=1e-5, abs=1e-5) and error_against(by_key(policy, "policy"), gradients) < 1e-4
    )
    for ours, name in (
        ("rewards/margins", "margins"),
        ("rewards/chosen", "chosen"),
        ("rewards/rejected", "rejected"),
        ("rewards/accuracies", "accuracies"),
    ):
        assert stats[ours] == pytest.approx(logged[f"rewards/{name}"], abs=1e-4)


def test_a_side_by_side_can_fail(tmp_path: Path, policy: Roles, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same comparison with the label smoothing on plain sigmoid, which TRL does not do, and without the last
    token."""
    from lowrank_tune.algorithms import dpo as dpo_module

    real = dpo_module.dpo_loss
    monkeypatch.setattr(dpo_module, "dpo_loss", lambda kind, *given: real("robust", *given))
    with pytest.raises(AssertionError):
        test_dpo_equals_trl(tmp_path, policy, "sigmoid", 0.0)
    monkeypatch.undo()
    logps = Roles.logps

    def short(self: Roles, role: str, batch: Any, *rest: Any) -> Any:
        batch.completion_mask = batch.completion_mask & torch.cat(
            [batch.attention_mask[:, 1:], torch.zeros(len(batch), 1, dtype=torch.bool)], dim=1
        )
        return logps(self, role, batch, *rest)

    monkeypatch.setattr(Roles, "logps", short)
    with pytest.raises(AssertionError):
        test_dpo_equals_trl(tmp_path, policy, "sigmoid", 0.0)

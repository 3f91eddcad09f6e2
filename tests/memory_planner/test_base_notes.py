"""Plans of bases with experts, which are not quantized, and with layers that keep a state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support_matrix import CONFIG, FAMILIES
from transformers import AutoConfig

from lowrank_tune.config import load_any
from lowrank_tune.memory_planner import plan
from lowrank_tune.memory_planner.plan_report import GIB, Plan

QWEN3_30B_A3B: dict[str, Any] = {
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": False,
}


def planned(folder: Path, config: Any, *changes: str, vram: float = 80.0, device: str = "cuda") -> Plan:
    config.save_pretrained(folder)
    settings = ["train.torch_compile=false", "train.micro_batch_size=2", "train.gradient_checkpointing=all", *changes]
    (found,) = plan(load_any("tiny-sft", f"base.model={folder}", "evaluate={}", *settings), vram, device)
    return found


def update_bytes(plan: Plan) -> int:
    return next(phase.total for phase in plan.phases if phase.name == "update")


def tiny(model_type: str) -> Any:
    family = next(family for family in FAMILIES if family.model_type == model_type)
    return AutoConfig.for_model(model_type, **CONFIG | dict(family.changes))


@pytest.mark.parametrize(
    ("model_type", "num_weights"),
    [
        ("qwen3_moe", 2 * 4 * 3 * 32 * 64),
        ("gpt_oss", 2 * 4 * 3 * 64 * 64),
    ],
)
def test_experts_are_planned_unquantized(tmp_path: Path, model_type: str, num_weights: int) -> None:
    found = planned(tmp_path / "few", tiny(model_type))
    (note,) = found.notes
    share = 2 * num_weights / found.peak_phase.bytes["weights"]
    assert note.startswith(f"the experts stay in 16 bits: 0.00 GiB, {share:.0%} of the base's bytes")
    twice = tiny(model_type)
    name = "num_experts" if model_type == "qwen3_moe" else "num_local_experts"
    setattr(twice, name, 8)
    more = planned(tmp_path / "more", twice)
    added = more.peak_phase.bytes["weights"] - found.peak_phase.bytes["weights"]
    # The routers, and the biases of gpt-oss, are the rest.
    assert 2 * num_weights <= added < 2.1 * num_weights


def test_a_plan_for_the_cpu(tmp_path: Path) -> None:
    (note,) = planned(tmp_path, tiny("qwen3_moe"), device="cpu").notes
    assert note.startswith("the experts stay in 32 bits")


def test_the_experts_of_a_real_base(tmp_path: Path) -> None:
    """Qwen3-30B-A3B: its experts alone do not fit a GPU with 24 GiB."""
    found = planned(tmp_path, AutoConfig.for_model("qwen3_moe", **QWEN3_30B_A3B), vram=24.0)
    experts = 48 * 128 * 3 * 768 * 2048 * 2
    assert experts / GIB == pytest.approx(54.0, abs=0.005)
    assert any(note.startswith("the experts stay in 16 bits: 54.00 GiB, 97% of") for note in found.notes)
    # Attention in 4 bits and their scales, and the embedding and the head in 16 bits.
    attention = 48 * 2048 * 128 * (32 + 4 + 4 + 32)
    rest = attention * (0.5 + 1 / 64 + 4 / (64 * 256)) + 2 * 151936 * 2048 * 2
    assert found.peak_phase.bytes["weights"] == pytest.approx(experts + rest, rel=0.002)
    assert not found.fits


def test_layers_with_a_state_are_noted(tmp_path: Path) -> None:
    (note,) = planned(tmp_path, tiny("lfm2")).notes
    assert note.startswith("lfm2 layers keep a state in place of keys and values: rows are padded")


def test_a_dense_base_has_no_note(tmp_path: Path) -> None:
    assert planned(tmp_path, tiny("llama")).notes == ()


@pytest.mark.slow
def test_the_loss_of_routers_is_planned(tmp_path: Path) -> None:
    """Probabilities of each token and layer are kept for the backward pass."""
    with_loss = "train.router_aux_loss_coef=0.01"
    plain = update_bytes(planned(tmp_path / "plain", tiny("qwen3_moe")))
    found = update_bytes(planned(tmp_path / "loss", tiny("qwen3_moe"), with_loss))
    # Those of 4 experts in 2 layers, in 32 bits, and less than twice as much.
    tokens = 2 * load_any("tiny-sft").max_train_length
    least = tokens * 2 * 4 * 4
    assert plain + least <= found < plain + 2 * least
    # Some chunks are not simulated, and the loss is not planned.
    assert planned(tmp_path / "chunks", tiny("qwen3_moe"), with_loss, "train.mlp_chunks=2").peak > 0

"""What the planner simulates is what a run on a GPU has: PEFT's 4-bit layers, and flash attention's own buffers."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.bnb import Linear4bit

from lowrank_tune.config import load_any
from lowrank_tune.memory_planner.allocation_tracker import AllocationTracker
from lowrank_tune.memory_planner.fake_device import fake_device_mode
from lowrank_tune.memory_planner.flash_backward import flash_backward_buffers
from lowrank_tune.memory_planner.meta_model import layers_of
from lowrank_tune.memory_planner.simulation import _SimulatedStage
from lowrank_tune.memory_planner.specs import simulation_specs


def test_adapters_are_on_pefts_4bit_layers() -> None:
    (spec,) = simulation_specs(load_any("qwen3-8b-sft"), "cuda")
    tracker = AllocationTracker("cuda", spec.config.vocab_size)
    with tracker, fake_device_mode(spec.device) as mode:
        stage = _SimulatedStage(spec, layers_of(spec.config, 1)[:1], tracker, mode)
    layers = stage.roles.lora_layers
    assert len(layers) == 7 and all(isinstance(layer, Linear4bit) for layer in layers)


def attention(heads: int, kv_heads: int, length: int, width: int) -> list[torch.Tensor]:
    shapes = [(1, heads, length, width), (1, kv_heads, length, width)]
    return [torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in shapes]


def test_buffers_of_flash_attention_by_hand() -> None:
    """100 queries are padded to 128, width 80 to 96."""
    query, key = attention(8, 2, 100, 80)
    found = [buffer.nbytes for buffer in flash_backward_buffers(query, key)]
    assert found == [4 * 8 * 128, 4 * 8 * 128 * 96, 2 * 8 * 100 * 80, 2 * 8 * 100 * 80]
    query, key = attention(8, 8, 128, 192)
    assert [buffer.nbytes for buffer in flash_backward_buffers(query, key)] == [4 * 8 * 128, 4 * 8 * 128 * 192]


def backward_peak() -> int:
    query, key = (tensor.requires_grad_() for tensor in attention(8, 2, 256, 128))
    tracker = AllocationTracker("cuda", 1)
    with tracker:
        outputs = torch.ops.aten._scaled_dot_product_flash_attention(query, key, key, 0.0, True)
        gradient = torch.empty_like(outputs[0])
        tracker.move_to("backward")
        outputs[0].backward(gradient)
    return sum(tracker.peaks["backward",].values())


def test_buffers_of_flash_attention_are_in_the_peak(monkeypatch: Any) -> None:
    query, key = attention(8, 2, 256, 128)
    expected = sum(buffer.nbytes for buffer in flash_backward_buffers(query, key))
    with_buffers = backward_peak()
    monkeypatch.setattr("lowrank_tune.memory_planner.allocation_tracker.flash_backward_buffers", lambda *_: [])
    without = backward_peak()
    assert with_buffers - without >= expected - 2 * 256 * 2 * 128 * 2
    assert with_buffers - without <= expected

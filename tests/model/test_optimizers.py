"""Laws of `model/optimizers.py`: 8-bit states follow AdamW, and every optimizer's state comes back from a checkpoint to
the bit."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from crash import run_fingerprint, small_recipe
from models import CPU, relative_error, same_bytes
from torch import Tensor, nn

from lowrank_tune import Recipe, run
from lowrank_tune.checkpoint import Snapshot, flatten_optimizer, load, restore_optimizer, write_atomically
from lowrank_tune.config import TrainingConfig
from lowrank_tune.errors import UserError
from lowrank_tune.model.optimizers import load_optimizer, make_optimizer

SHAPES = ((80, 128), (5, 7), (9000,))  # two of them have 8-bit states, one too small for that


def trained(optimizer: str, steps: int, seed: int = 0) -> tuple[list[nn.Parameter], torch.optim.Optimizer]:
    stream = torch.Generator().manual_seed(seed)
    parameters = [nn.Parameter(torch.randn(shape, generator=stream)) for shape in SHAPES]
    groups = [{"params": parameters[:2], "share": 1.0}, {"params": parameters[2:], "share": 0.5}]
    made = make_optimizer(groups, TrainingConfig(optim=optimizer, learning_rate=1e-2, weight_decay=0.1), CPU)  # type: ignore[arg-type]
    walk(parameters, made, range(steps))
    return parameters, made


def walk(parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        stream = torch.Generator().manual_seed(step)
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=stream)
        optimizer.step()


def test_8_bit_states_are_8_bit_and_follow_adamw() -> None:
    (eight, optimizer), (full, _) = trained("adamw_8bit", 20), trained("adamw", 20)
    assert [optimizer.state[parameter]["state1"].dtype for parameter in eight] == [
        torch.uint8,
        torch.float32,
        torch.uint8,
    ]
    for parameter, other, start in zip(eight, full, trained("adamw", 0)[0], strict=True):
        assert relative_error(parameter.detach() - start.detach(), other.detach() - start.detach()) < 0.05
    assert torch.allclose(eight[1], full[1], atol=1e-6)


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
def test_saved_state_is_restored_bit_for_bit(tmp_path: Path, name: str) -> None:
    parameters, optimizer = trained(name, 5)
    names = ["a", "b", "c"]
    tensors, document = flatten_optimizer(optimizer.state_dict(), names)
    write_atomically(tmp_path / "step-5", Snapshot({"optimizer.safetensors": tensors}, {"optimizer.json": document}))
    found = load(tmp_path / "step-5")
    others, again = trained(name, 0, seed=9)
    for parameter, other in zip(parameters, others, strict=True):
        other.data.copy_(parameter.detach())
    load_optimizer(
        again, restore_optimizer(found.tensors["optimizer.safetensors"], found.documents["optimizer.json"], names)
    )
    assert [group["share"] for group in again.param_groups] == [1.0, 0.5]
    for parameter, other in zip(parameters, others, strict=True):
        mine, theirs = optimizer.state[parameter], again.state[other]
        assert mine.keys() == theirs.keys()
        for key, value in mine.items():
            assert same_bytes(value, theirs[key]) if isinstance(value, Tensor) else value == theirs[key], key
    walk(parameters, optimizer, range(5, 9))
    walk(others, again, range(5, 9))
    assert all(
        same_bytes(parameter.detach(), other.detach()) for parameter, other in zip(parameters, others, strict=True)
    )


@pytest.mark.parametrize("name", ["paged_adamw", "paged_adamw_8bit"])
def test_paged_optimizers_need_a_gpu_and_name_the_alternative(name: str) -> None:
    with pytest.raises(
        UserError,
        match=f"^train.optim: {name} moves its states between GPU and host memory, and there is no GPU"
        f"; use {name.removeprefix('paged_')}$",
    ):
        make_optimizer([nn.Parameter(torch.zeros(2))], TrainingConfig(optim=name), CPU)  # type: ignore[arg-type]


def test_paged_states_are_paged_again_after_load() -> None:
    """bitsandbytes pages states when it creates them, and loads them into ordinary memory. A buffer of this test
    replaces a paged one."""
    parameters, optimizer = trained("adamw_8bit", 3)
    _, again = trained("adamw_8bit", 0)
    made: list[Tensor] = []

    def paged(parameter: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        made.append(torch.zeros(parameter.shape, dtype=dtype))
        return made[-1]

    again.is_paged, again.get_state_buffer = True, paged  # type: ignore[attr-defined]
    load_optimizer(again, optimizer.state_dict())
    found = [entry[name] for entry in again.state.values() for name in ("state1", "state2")]
    assert len(made) == 6 and all(one is other for one, other in zip(found, made, strict=True))
    wanted = [optimizer.state[parameter][name] for parameter in parameters for name in ("state1", "state2")]
    assert all(same_bytes(one, other) for one, other in zip(found, wanted, strict=True))


def test_continued_run_with_8_bit_states_is_bit_identical(tmp_path: Path) -> None:
    recipe: dict[str, Any] = small_recipe(max_steps=4, save_steps=2, optim="adamw_8bit")
    recipe["adapters"] = {"policy": {"r": 64}}
    straight = run(Recipe.from_dict(recipe), out=tmp_path / "straight", ui="none").folder
    saved = load(straight / "checkpoints" / "step-2")
    assert any(tensor.dtype == torch.uint8 for tensor in saved.tensors["optimizer.safetensors"].values())
    shutil.copytree(straight, tmp_path / "half")
    for left in ("summary.json", "final", "checkpoints/step-4"):
        path = tmp_path / "half" / left
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    again = run(Recipe.from_dict(recipe), out=tmp_path / "half", ui="none").folder
    assert run_fingerprint(again) == run_fingerprint(straight)

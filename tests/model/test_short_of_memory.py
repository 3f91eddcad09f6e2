"""Runs on a GPU that is too small: what is printed, what is kept for later steps, and the advice if a single row does
not fit."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from crash import small_recipe
from models import llama_roles
from test_recovery import short_of_memory
from test_run import lowrank_tune, write_recipe
from torch import Tensor

from lowrank_tune import Recipe, run
from lowrank_tune.cli.common import report_user_errors
from lowrank_tune.config import TrainingConfig, load
from lowrank_tune.config.memory import suggestions
from lowrank_tune.events import Event, from_json
from lowrank_tune.generation import Engine, cache_memory
from lowrank_tune.model import oom
from lowrank_tune.model.decoder import Decoder
from lowrank_tune.model.packed_rows import PackedRows
from lowrank_tune.ui.state import State
from lowrank_tune.ui.terminal.panes import View
from lowrank_tune.ui.terminal.render import render
from lowrank_tune.ui.terminal.text_layout import plain_text

TOKENS_THAT_FIT = {"sft": 120, "reward": 200, "dpo": 200, "kto": 200, "grpo": 100, "ppo": 100}
"""Tokens of an update that fit: a micro-batch of six does not and is halved, a single unit does."""
FEW = [pytest.param(name, marks=() if name == "sft" else pytest.mark.slow) for name in TOKENS_THAT_FIT]


def recipe_of(algorithm: str, **train: Any) -> dict[str, Any]:
    """Without dropout, which another split draws anew."""
    name = "reward" if algorithm == "reward" else "policy"
    return {
        **small_recipe(algorithm, **{"max_steps": 3, "save_steps": 1, "micro_batch_size": 6, **train}),
        "adapters": {name: {"r": 4}},
    }


@contextmanager
def small_gpu(update: float = float("inf"), forward: float = float("inf")) -> Iterator[list[tuple[bool, int]]]:
    """Refuses memory to passes over more than some number of tokens with padding, with gradient (`update`) and without
    (`forward`). Yields those that were refused."""
    real, refused = Decoder.run, list[tuple[bool, int]]()

    def decode(self: Decoder, ids: Tensor, *more: Any) -> Tensor:
        if ids.numel() > (update if torch.is_grad_enabled() else forward):
            refused.append((torch.is_grad_enabled(), ids.numel()))
            raise short_of_memory()
        return real(self, ids, *more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Decoder, "run", decode)
        # whole rows, so that a batch has the tokens that it is counted by
        patch.setattr(Decoder, "max_shareable_length", 0)
        patch.setattr(PackedRows, "hidden", lambda *_: None)
        # compared by a forward pass, which is not one of the run
        patch.setattr(Decoder, "runs_without_masks", True)
        yield refused


def events_of(folder: Path) -> list[Event]:
    return [
        event for line in (folder / "events.jsonl").read_text().splitlines() if (event := from_json(json.loads(line)))
    ]


def figures(folder: Path) -> list[dict[str, float]]:
    # The exact KL is that of one micro-batch, which is smaller here.
    unsteady = ["memory_gib", "tokens_per_second", "rollout_seconds", "reward_seconds", "oom_retries"]
    found = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    steps = [each["stats"] for each in found if each["event"] == "step_end"]
    unsteady.append("kl_per_token" if "kl_per_token" in steps[-1] else "kl")
    return [{key: value for key, value in stats.items() if key not in unsteady} for stats in steps]


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """An SFT run that ran short in its first step, and what it printed."""
    folder = tmp_path_factory.mktemp("short")
    with small_gpu(update=150):
        done = lowrank_tune(
            "run", write_recipe(folder, recipe_of("sft")), "--out", str(folder / "run"), "--ui", "plain"
        )
    assert done.exit_code == 0, done.output
    return folder / "run", done.output


def test_it_is_reported_in_the_console_the_log_the_summary_and_the_report(short: tuple[Path, str]) -> None:
    folder, output = short
    words = "out of memory with a micro-batch of"
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"] == "done" and any(f"step 1: {words}" in warning for warning in summary["warnings"])
    assert f"warning: step 1: {words}" in " ".join(output.split()) and "short of memory" in output
    assert words in (folder / "report.html").read_text()
    notes = [event for event in events_of(folder) if words in getattr(event, "message", "")]
    assert notes and all(event.level == "warning" for event in notes)  # type: ignore[attr-defined]


@pytest.mark.parametrize("size", [(80, 24), (120, 40)])
def test_it_is_shown_on_the_dashboard(short: tuple[Path, str], size: tuple[int, int]) -> None:
    state = State()
    for event in events_of(short[0]):
        state.apply(event)
        if "out of memory" in getattr(event, "message", ""):
            break
    frame = " ".join(plain_text(render(state, View(), *size)).split())
    assert "out of memory" in frame and "step 1" in frame


@pytest.mark.slow
def test_memory_limit_is_kept_when_the_run_continues(short: tuple[Path, str], tmp_path: Path) -> None:
    """Resumed, it does not try again what did not fit; with more room, it does."""
    folder, _ = short
    state = json.loads((folder / "checkpoints" / "step-3" / "state.json").read_text())
    assert 0 < state["limits"]["update_tokens"] <= 150 and state["limits"]["num_ooms"] >= 1
    for train, fails in (({}, False), ({"gradient_checkpointing": 1}, True)):
        again = tmp_path / f"again-{fails}"
        shutil.copytree(folder, again)
        (again / "summary.json").unlink()
        with small_gpu(update=150) as refused:
            assert run(Recipe.from_dict(recipe_of("sft", max_steps=5, **train)), out=again, ui="none").status == "done"
        assert bool(refused) is fails


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", FEW)
def test_a_run_with_too_little_memory_learns_the_same(tmp_path: Path, algorithm: str) -> None:
    """Updates, validation, the reference and what a harvest is judged by all run short, and no figure of any step hangs
    on it."""
    recipe = Recipe.from_dict(recipe_of(algorithm, max_steps=2))
    whole = run(recipe, out=tmp_path / "whole", ui="none").folder
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOWRANK_TUNE_CACHE", str(tmp_path / "cache"))  # where no reference was computed yet
        with small_gpu(update=TOKENS_THAT_FIT[algorithm], forward=1.75 * TOKENS_THAT_FIT[algorithm]) as refused:
            outcome = run(recipe, out=tmp_path / "short", ui="none")
    assert outcome.status == "done" and {True, False} == {grad for grad, _ in refused}
    first, *_ = pair = list(zip(figures(outcome.folder), figures(whole), strict=True))
    # The policy of the first step is its reference: which of two rewards is larger depends on rounding.
    for each in first:
        each.pop("rewards/accuracies", None)
    for one, other in pair:
        assert one.keys() == other.keys()
        for key, value in other.items():
            assert one[key] == pytest.approx(value, rel=2e-3, abs=2e-5), key


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", FEW)
def test_a_row_that_does_not_fit_ends_with_3_and_what_to_type(tmp_path: Path, algorithm: str) -> None:
    file = write_recipe(tmp_path, recipe_of(algorithm))
    with small_gpu(update=12):
        done = lowrank_tune("run", file, "--out", str(tmp_path / "run"), "--ui", "plain")
    message = done.output.strip().splitlines()[-1]
    unit = "a pair" if algorithm in ("reward", "dpo") else "a row"
    assert done.exit_code == 3 and message.startswith(f"out of memory: {unit} of "), done.output
    assert "the same command with train.gradient_checkpointing=true continues; a new run (--out) may have " in message
    overrides = re.findall(r"[a-z_.]+=[a-z0-9_]+", message)
    assert len(overrides) >= 2 and all(load(file, [override]) for override in overrides), "what is advised can be typed"
    last = events_of(tmp_path / "run")[-1]
    assert last.status == "failed" and last.message == message  # type: ignore[attr-defined]
    typed = lowrank_tune(
        "run", file, "train.gradient_checkpointing=true", "--out", str(tmp_path / "run"), "--ui", "plain"
    )
    assert typed.exit_code == 0, "and the same command continues"


@pytest.mark.parametrize(
    ("changes", "kind", "has_gpu", "words"),
    [
        (
            {},
            "update_tokens",
            True,
            "the same command with train.activation_offloading=true continues; a new run (--out) may have "
            "train.optim=paged_adamw_8bit or data.max_length=512",
        ),
        (
            {"train": {"activation_offloading": True, "optim": "adamw_8bit", "memory_budget_gib": 8.0}},
            "update_tokens",
            True,
            "the same command with a larger train.memory_budget_gib continues; a new run (--out) may have "
            "data.max_length=512",
        ),
        (
            {"train": {"gradient_checkpointing": 3}, "base": {"bits": 16}},
            "update_tokens",
            False,
            "the same command with train.gradient_checkpointing=true continues; a new run (--out) may have "
            "base.bits=4 or data.max_length=512",
        ),
        ({}, "cache_tokens", False, "a new run (--out) may have evaluate.max_new_tokens=32"),
        ({}, "forward_tokens", False, "a new run (--out) may have data.max_length=512"),
        (
            {},
            "",
            False,
            "the same command with train.micro_batch_size=1 continues; a new run (--out) may have data.max_length=512",
        ),
    ],
)
def test_advice_by_hand(changes: dict[str, Any], kind: str, has_gpu: bool, words: str) -> None:
    recipe = {
        "algorithm": "sft",
        "data": {"train": [{"dataset": "builtin:arithmetic"}]},
        **changes,
        "train": {"max_steps": 1, **changes.get("train", {})},
    }
    assert suggestions(Recipe.from_dict(recipe), kind, 0 if kind == "" else 1500, has_gpu) == words


@pytest.mark.parametrize(("tokens", "chunks"), [(4096, 1), (20_000, 8)])
def test_a_long_row_that_does_not_fit_needs_mlp_chunks(tokens: int, chunks: int) -> None:
    train = {"max_steps": 1, "activation_offloading": True}
    recipe = Recipe.from_dict(
        {"algorithm": "sft", "data": {"train": [{"dataset": "builtin:arithmetic"}]}, "train": train}
    )
    words = suggestions(recipe, "update_tokens", tokens, True)
    assert ("the same command with train.mlp_chunks=8 continues" in words) == (chunks > 1)


def test_any_other_lack_of_memory_ends_with_3_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def step(*_: Any, **__: Any) -> None:
        raise short_of_memory()

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    done = lowrank_tune(
        "run", write_recipe(tmp_path, recipe_of("sft")), "--out", str(tmp_path / "run"), "--ui", "plain"
    )
    message = done.output.strip().splitlines()[-1]
    assert (
        done.exit_code == 3
        and message.startswith("out of memory: CUDA out of memory. Tried to allocate 2.00 GiB.")
        and "continues" in message
    )


def test_other_commands_end_with_3_too() -> None:
    for error, code, words in (
        (short_of_memory(), 3, "out of memory: CUDA out of memory. Tried"),
        (MemoryError(), 3, "out of memory: "),
        (RuntimeError("shape"), 1, "internal error: RuntimeError: shape"),
    ):
        output = io.StringIO()
        with redirect_stderr(output), pytest.raises(typer.Exit) as caught, report_user_errors(debug=False):
            raise error
        assert caught.value.exit_code == code and output.getvalue().startswith(words)


# --- the budget, and the allocator ------------------------------------------------------------------------------------


def test_budget_limits_the_number_of_decoded_sequences(tmp_path: Path) -> None:
    """Of a recipe: without a GPU the budget is the memory for keys and values."""
    requested: list[tuple[int, int]] = []
    real = Engine.__init__

    def watched(self: Engine, *arguments: Any, **named: Any) -> None:
        real(self, *arguments, **named)
        requested.append((self.cache_bytes, self.slots))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "__init__", watched)
        run(Recipe.from_dict(recipe_of("sft", max_steps=1, memory_budget_gib=0.5)), out=tmp_path / "run", ui="none")
    assert requested and {size for size, _ in requested} == {1 << 29}


def test_cache_budget_is_the_budget_minus_resident_bytes() -> None:
    """By hand: of 16 GB, 8 stay."""

    class There:
        class base:
            device = torch.device("cuda", 0)

        limits = oom.MemoryLimits(budget_bytes=16 << 30)

        def resident_bytes(self) -> int:
            return 8 << 30

    assert cache_memory.default_cache_bytes(There()) == pytest.approx((16 * 0.92 - 8 - 1.5) * 2**30, abs=2)  # type: ignore[arg-type]
    There.limits = oom.MemoryLimits(budget_bytes=8 << 30)
    assert cache_memory.default_cache_bytes(There()) == 1 << 29, "never nothing"  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, ("expandable_segments:True", None)),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, ("max_split_size_mb:64", None)),
        ({"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, (None, "backend:native")),
    ],
)
def test_segments_can_grow_unless_the_user_has_set_otherwise(
    before: dict[str, str], after: tuple[str | None, str | None]
) -> None:
    """It is set before torch is imported: torch reads it once."""
    code = (
        "import os, sys, lowrank_tune; assert 'torch' not in sys.modules; "
        "print([os.environ.get(name) for name in ('PYTORCH_ALLOC_CONF', 'PYTORCH_CUDA_ALLOC_CONF')])"
    )
    clean = {name: value for name, value in os.environ.items() if "ALLOC_CONF" not in name}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**clean, **before}
    )
    assert done.stdout.strip() == str(
        list(after) if sys.platform == "linux" else [before.get("PYTORCH_ALLOC_CONF"), None]
    )


@pytest.mark.parametrize("head", [False, True])
def test_resident_bytes_are_those_after_a_step_of_adamw(head: bool) -> None:
    """Weights, buffers, heads, and the tensors of the optimizer without its step counts."""
    stacks = {"policy": ["policy"], "value": ["value"]}
    value = {"extra": ["value"], "trainable": ["policy", "value"], "stacks": stacks, "heads": ["value"]}
    roles = llama_roles(16, **(value if head else {}))
    parameters = [parameter for role in sorted(roles.trainable) for parameter in roles.parameters(role)]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer = torch.optim.AdamW(parameters)
    optimizer.step()
    made = [tensor for state in optimizer.state.values() for tensor in state.values() if tensor.ndim]
    heads = [scalar_head.weight for scalar_head in roles.heads.values()]
    kept = [*roles.base.model.parameters(), *roles.base.model.buffers(), *heads]
    assert roles.resident_bytes() == sum(tensor.nbytes for tensor in (*kept, *made))


def test_a_base_in_4_bits_holds_less() -> None:
    roles = llama_roles(16)
    four = llama_roles(4).resident_bytes()
    assert four < 0.6 * roles.resident_bytes()
    assert TrainingConfig().memory_budget_gib is None

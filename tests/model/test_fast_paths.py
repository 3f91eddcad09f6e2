"""The start-up comparison of fast paths: a path that computes something else, or raises, is disabled with one
warning."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from models import llama_roles
from torch import Tensor

from lowrank_tune.batch import Batch
from lowrank_tune.events import Event, LogMessage, is_warning
from lowrank_tune.model.decoder import Decoder
from lowrank_tune.model.fast_paths import largest_difference, made_up_rows
from lowrank_tune.model.roles import Roles


@dataclass
class PlantedPath:
    """Adds `error` to all hidden states, multiplies their gradient by `gradient_factor`, and raises `exception`."""

    name: str = "a planted path"
    enabled: bool = True
    error: float = 0.0
    gradient_factor: float = 1.0
    exception: Exception | None = None
    calls: int = 0

    def apply(self, hidden: Tensor) -> Tensor:
        self.calls += 1
        if self.exception is not None:
            raise self.exception
        scaled = hidden * self.gradient_factor
        return hidden.detach() + self.error * hidden.detach().cos() + scaled - scaled.detach()


@contextmanager
def planted(*paths: PlantedPath) -> Iterator[tuple[Roles, list[Event]]]:
    """Yields roles with these paths, and the events of their comparison."""
    events: list[Event] = []
    roles = llama_roles()
    roles.limits.emit = events.append
    roles.fast_paths += paths
    roles.verified = False
    plain = Decoder.hidden

    def hidden(self: Decoder, batch: Batch) -> Tensor:
        states = plain(self, batch)
        for path in paths:
            if path.enabled:
                states = path.apply(states)
        return states

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Decoder, "hidden", hidden)
        yield roles, events
    roles.unload_adapters()


def run(roles: Roles) -> Tensor:
    return roles.logps("policy", made_up_rows(20, torch.device("cpu"))).logps


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ({"error": 1e-2}, "another result than on the plain path"),
        ({"gradient_factor": 1.001}, "another result than on the plain path"),
        ({"error": float("nan")}, "another result than on the plain path"),
        ({"exception": ValueError("no compiler")}, "an error (no compiler)"),
    ],
    ids=["values", "gradients", "nan", "exception"],
)
def test_a_wrong_path_is_disabled_with_one_warning(fault: dict[str, Any], words: str) -> None:
    wrong = PlantedPath(**fault)
    right = PlantedPath("a right path")
    with planted(wrong, right) as (roles, events):
        run(roles)
        run(roles)
    assert (wrong.enabled, right.enabled) == (False, True)
    messages = [event.message for event in events]  # type: ignore[attr-defined]
    assert len(messages) == 1 and words in messages[0] and messages[0].startswith("a planted path:")


def test_paths_run_after_the_comparison_and_only_if_they_are_enabled() -> None:
    used = PlantedPath()
    unused = PlantedPath(enabled=False)
    with planted(used, unused) as (roles, events):
        run(roles)
        compared = used.calls
        run(roles)
    assert (used.calls, unused.calls) == (compared + 1, 0)
    assert not events


def test_a_comparison_that_runs_out_of_memory_disables_all_paths() -> None:
    short = PlantedPath(exception=torch.OutOfMemoryError("CUDA out of memory"))
    later = PlantedPath("a later path")
    with planted(short, later) as (roles, events):
        run(roles)
        run(roles)
    assert not any(path.enabled for path in roles.fast_paths)
    (event,) = events
    assert is_warning(event) and isinstance(event, LogMessage)
    assert "a planted path, a later path: memory ran out while they were compared" in event.message


def test_rows_with_and_without_a_shared_beginning_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[bool] = []
    with planted(PlantedPath()) as (roles, _):
        hidden = roles.decoder.hidden

        def record(batch: Batch) -> Tensor:
            if not roles.decoder.packed_rows.enabled:
                compared.append(batch.shared_prefix is not None)
            return hidden(batch)

        monkeypatch.setattr(roles.decoder, "hidden", record)
        run(roles)
    assert set(compared) == {True, False}


def test_the_comparison_changes_no_state() -> None:
    with planted(PlantedPath()) as (roles, _):
        parameters = roles.parameters("policy")
        before = [parameter.detach().clone() for parameter in parameters]
        roles.base.model.eval()
        random_state = torch.get_rng_state()
        run(roles)
        assert torch.equal(torch.get_rng_state(), random_state)
        assert not roles.base.model.training
    assert all(torch.equal(now, then) for now, then in zip(parameters, before, strict=True))
    assert all(parameter.grad is None for parameter in parameters)


def test_differences_are_relative_and_nan_is_infinite() -> None:
    ones = torch.ones(3, 4)
    assert largest_difference({"a": ones * 1.5, "b": ones}, {"a": ones, "b": ones}) == pytest.approx(0.5)
    assert largest_difference({"a": ones * 0}, {"a": ones * 0}) == 0.0
    assert largest_difference({"a": ones * float("nan")}, {"a": ones}) == float("inf")

"""Killed anywhere, a run goes on as if nothing had happened: same steps, same figures, same final adapter, bit for bit."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from crash import Nursery, continue_to_the_end, small_recipe, trace


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    one = Nursery()
    yield one
    one.close()


@pytest.fixture(scope="module")
def straight(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    out = tmp_path_factory.mktemp("straight") / "run"
    continue_to_the_end(nursery, small_recipe(), out)
    return trace(out)


@pytest.mark.parametrize("seed", range(3))
def test_killed_at_a_random_moment(nursery: Nursery, straight: dict[str, object], tmp_path: Path, seed: int) -> None:
    out = tmp_path / "run"
    status = nursery.run(small_recipe(), out, kill_after=random.Random(seed).uniform(0.1, 3.0))
    if status != 0:
        continue_to_the_end(nursery, small_recipe(), out)
    assert trace(out) == straight


@pytest.mark.parametrize("die_at", [60, 97])
def test_dies_in_a_write(nursery: Nursery, straight: dict[str, object], tmp_path: Path, die_at: int) -> None:
    out = tmp_path / "run"
    assert nursery.run(small_recipe(), out, die_at=die_at) != 0, "it should have died"
    continue_to_the_end(nursery, small_recipe(), out)
    assert trace(out) == straight


def test_a_changed_seed_would_be_noticed(nursery: Nursery, straight: dict[str, object], tmp_path: Path) -> None:
    continue_to_the_end(nursery, {**small_recipe(), "seed": 1}, tmp_path / "run")
    assert trace(tmp_path / "run") != straight

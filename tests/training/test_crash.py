"""Killed anywhere, a run goes on as if nothing had been: same steps, figures, completions, scores and final adapter,
bit for bit."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from crash import KILL_POINTS, ForkServer, continue_to_the_end, rounds, run_fingerprint, small_recipe

Straight = Callable[[str], dict[str, object]]


@pytest.fixture(scope="module")
def fork_server() -> Iterator[ForkServer]:
    one = ForkServer()
    yield one
    one.close()


def recipe_of(algorithm: str) -> dict[str, Any]:
    return small_recipe() if algorithm == "sft" else small_recipe(algorithm, max_steps=6)


@pytest.fixture(scope="module")
def straight(fork_server: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Straight:
    """What an undisturbed run of an algorithm leaves."""
    known: dict[str, dict[str, object]] = {}

    def of(algorithm: str) -> dict[str, object]:
        if algorithm not in known:
            out = tmp_path_factory.mktemp("straight") / "run"
            continue_to_the_end(fork_server, recipe_of(algorithm), out)
            known[algorithm] = run_fingerprint(out)
        return known[algorithm]

    return of


def slow(*values: Any) -> Any:
    """The same on the slower tier."""
    return pytest.param(*values, marks=pytest.mark.slow)


MOMENTS = [
    ("sft", 0),
    slow("sft", 1),
    slow("sft", 2),
    slow("reward", 3),
    slow("dpo", 4),
    slow("kto", 7),
    slow("grpo", 5),
    slow("ppo", 6),
]
WRITES = [
    slow("sft", 60),
    slow("sft", 97),
    slow("reward", 70),
    slow("dpo", 20),
    slow("dpo", 70),
    slow("kto", 50),
    slow("grpo", 70),
    slow("ppo", 70),
]
GRPO_CALLS = [slow("rollout", 70), slow("scoring", 4), slow("update", 9), slow("between passes", 5)]
PPO_CALLS = [
    slow("rollout", 40),
    slow("scoring", 3),
    slow("valuing", 4),
    slow("update of ppo", 13),
    slow("between passes of ppo", 7),
]


def in_rounds(cases: list[Any], vary: Callable[[int, int], int]) -> list[Any]:
    """The cases, and in the further rounds of `LOWRANK_TUNE_TEST_ROUNDS` other ones: `vary(value, round)`."""
    values = [getattr(case, "values", case) for case in cases]
    further = [slow(name, vary(value, number)) for number in range(1, rounds()) for name, value in values]
    return cases + further


def other_seed(seed: int, number: int) -> int:
    return seed + 100 * number


def earlier(call: int, number: int) -> int:
    """Another call up to this one in each round."""
    return (call - number * 11) % (call + 1)


@pytest.mark.parametrize(("algorithm", "seed"), in_rounds(MOMENTS, other_seed))
def test_killed_at_a_random_moment(
    fork_server: ForkServer, straight: Straight, tmp_path: Path, algorithm: str, seed: int
) -> None:
    wanted, recipe, out = straight(algorithm), recipe_of(algorithm), tmp_path / "run"
    status = fork_server.run(
        recipe, out, kill_after=random.Random(seed).uniform(0.1, 3.0 if algorithm in ("sft", "grpo", "ppo") else 1.5)
    )
    if status != 0:
        continue_to_the_end(fork_server, recipe, out)
    assert run_fingerprint(out) == wanted


@pytest.mark.parametrize(("algorithm", "die_at"), in_rounds(WRITES, earlier))
def test_crash_in_a_write(
    fork_server: ForkServer, straight: Straight, tmp_path: Path, algorithm: str, die_at: int
) -> None:
    wanted, recipe, out = straight(algorithm), recipe_of(algorithm), tmp_path / "run"
    assert fork_server.run(recipe, out, die_at=die_at) != 0, "it should have died"
    continue_to_the_end(fork_server, recipe, out)
    assert run_fingerprint(out) == wanted


@pytest.mark.parametrize(("phase", "call"), in_rounds(GRPO_CALLS, earlier))
def test_killed_in_each_phase_of_grpo(
    fork_server: ForkServer, straight: Straight, tmp_path: Path, phase: str, call: int
) -> None:
    wanted, recipe, out = straight("grpo"), recipe_of("grpo"), tmp_path / "run"
    assert fork_server.run(recipe, out, die_in={"where": KILL_POINTS[phase], "call": call}) == 9, (
        "it should have been killed"
    )
    assert not (out / "final").exists()
    continue_to_the_end(fork_server, recipe, out)
    assert run_fingerprint(out) == wanted


@pytest.mark.parametrize(("phase", "call"), in_rounds(PPO_CALLS, earlier))
def test_killed_in_each_phase_of_ppo(
    fork_server: ForkServer, straight: Straight, tmp_path: Path, phase: str, call: int
) -> None:
    wanted, recipe, out = straight("ppo"), recipe_of("ppo"), tmp_path / "run"
    assert fork_server.run(recipe, out, die_in={"where": KILL_POINTS[phase], "call": call}) == 9, (
        "it should have been killed"
    )
    assert not (out / "final").exists()
    continue_to_the_end(fork_server, recipe, out)
    assert run_fingerprint(out) == wanted


@pytest.mark.slow
def test_what_is_compared_of_ppo(straight: Straight) -> None:
    """Both adapters, and a coefficient that moved: a state that was not saved would show."""
    found = straight("ppo")
    assert set(found["final"]) == {"final/adapter_model.safetensors", "final/value/adapter_model.safetensors"}  # type: ignore[call-overload]
    assert len({stats["kl_coef"] for _, stats in found["steps"]}) == 6  # type: ignore[attr-defined]


def test_a_changed_seed_would_be_noticed(fork_server: ForkServer, straight: Straight, tmp_path: Path) -> None:
    continue_to_the_end(fork_server, {**small_recipe(), "seed": 1}, tmp_path / "run")
    assert run_fingerprint(tmp_path / "run") != straight("sft")


@pytest.mark.slow
def test_scores_are_compared(straight: Straight) -> None:
    assert straight("sft")["scores"] is None and straight("grpo")["groups"].keys() == set(range(1, 7))  # type: ignore[attr-defined]
    for algorithm in ("reward", "dpo"):
        scores = straight(algorithm)["scores"]
        assert isinstance(scores, bytes) and b'"reliability"' in scores

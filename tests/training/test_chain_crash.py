"""Classical RLHF killed at and between its stages (SIGKILL, in a process of its own) goes on as if nothing had been,
bit for bit."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from crash import KILL_POINTS, ForkServer, continue_to_the_end, rounds, run_fingerprint, seed

pytestmark = pytest.mark.slow
STAGES = ("1-sft", "2-reward", "3-ppo")
WRITES = 450
"""The chain below has more calls that write than these."""


def rlhf() -> dict[str, Any]:
    """SFT, a reward model, PPO against it with a value that begins as the reward model; three steps each, each of them
    saved."""
    steps = {
        "max_steps": 3,
        "micro_batch_size": 6,
        "logging_steps": 1,
        "save_steps": 1,
        "learning_rate": 3e-3,
        "gradient_checkpointing": False,
    }
    evaluate = {
        "eval_steps": 2,
        "num_completions_to_print": 1,
        "eval_dataset": {"dataset": "builtin:arithmetic", "split": "heldout"},
        "num_prompts": 3,
        "max_new_tokens": 8,
    }
    return {
        "name": "rlhf",
        "base": {"model": "tiny-tutor"},
        "stages": [
            {
                "name": "sft",
                "algorithm": "sft",
                "adapters": {"policy": {"r": 4, "lora_dropout": 0.1}},
                "evaluate": evaluate,
                "data": {"train": [{"dataset": "builtin:arithmetic", "max_samples": 40}], "eval_fraction": 0.1},
                "train": {**steps, "global_batch_size": 8},
            },
            {
                "name": "reward",
                "algorithm": "reward",
                "adapters": {"reward": {"r": 4, "lora_dropout": 0.1}},
                "evaluate": {"eval_steps": 2, "num_completions_to_print": 1},
                "data": {
                    "train": [{"dataset": "builtin:arithmetic-preferences", "max_samples": 24}],
                    "eval_fraction": 0.2,
                },
                "train": {**steps, "global_batch_size": 6},
            },
            {
                "name": "ppo",
                "algorithm": "ppo",
                "reference": "sft",
                "adapters": {"policy": {"r": 4}},
                "evaluate": evaluate,
                "data": {"train": [{"dataset": "builtin:arithmetic", "max_samples": 10}]},
                "rewards": [{"name": "reward_model"}],
                "rollout": {"num_generations": 2, "max_new_tokens": 8},
                "ppo": {
                    "critic_init": "reward",
                    "num_ppo_epochs": 2,
                    "num_mini_batches": 2,
                    "kl_target": 0.01,
                    "value_learning_rate": 1e-2,
                },
                "train": {**steps, "prompts_per_step": 3},
            },
        ],
    }


@pytest.fixture(scope="module")
def fork_server() -> Iterator[ForkServer]:
    one = ForkServer()
    yield one
    one.close()


@pytest.fixture(scope="module")
def straight(fork_server: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("straight") / "run"
    continue_to_the_end(fork_server, rlhf(), out)
    return left_by(out)


def left_by(out: Path) -> dict[str, Any]:
    """What each stage left, and what the chain measured."""
    summary = json.loads((out / "summary.json").read_bytes())
    assert summary["status"] == "done"
    return {
        **{stage: run_fingerprint(out / stage) for stage in STAGES},
        "heldout": summary["heldout"],
        "details": summary["heldout_details"],
        "last": [
            {key: value for key, value in stage["last"].items() if not key.endswith(("_seconds", "_gib", "per_second"))}
            for stage in summary["stages"]
        ],
    }


PLACES = [
    ("start of a stage", 2, "3-ppo"),
    ("a step", 1, "1-sft"),
    ("end of a stage", 0, "1-sft"),
    ("start of a stage", 1, "2-reward"),
    ("a step", 4, "2-reward"),
    ("end of a stage", 1, "2-reward"),
    ("rollout", 8, "3-ppo"),
    ("update of ppo", 7, "3-ppo"),
    ("a step", 8, "3-ppo"),
    ("end of a stage", 2, "3-ppo"),
]


@pytest.mark.parametrize(("phase", "call", "stage"), PLACES)
def test_rlhf_killed_in_and_between_its_stages(
    fork_server: ForkServer, straight: dict[str, Any], tmp_path: Path, phase: str, call: int, stage: str
) -> None:
    out, place = tmp_path / "run", STAGES.index(stage)
    assert fork_server.run(rlhf(), out, die_in={"where": KILL_POINTS[phase], "call": call}) == 9, (
        "it should have been killed"
    )
    assert (out / stage).is_dir() and not (out / stage / "final").exists(), "it was killed in another stage"
    assert all((out / earlier / "summary.json").is_file() for earlier in STAGES[:place])
    ended = {earlier: (out / earlier / "events.jsonl").read_bytes() for earlier in STAGES[:place]}
    continue_to_the_end(fork_server, rlhf(), out)
    assert all((out / earlier / "events.jsonl").read_bytes() == events for earlier, events in ended.items()), (
        "an ended stage ran again"
    )
    assert left_by(out) == straight


@pytest.mark.parametrize("number", range(len(PLACES) * (rounds() - 1) or 1))
def test_crash_of_rlhf_in_a_write(
    fork_server: ForkServer, straight: dict[str, Any], tmp_path: Path, number: int
) -> None:
    """At a random write, fsync or rename of any stage; in the further rounds of `LOWRANK_TUNE_TEST_ROUNDS` at more."""
    die_at, out = random.Random(seed() + number).randrange(WRITES), tmp_path / "run"
    assert fork_server.run(rlhf(), out, die_at=die_at) != 0, "it should have died"
    continue_to_the_end(fork_server, rlhf(), out)
    assert left_by(out) == straight


def test_what_is_compared(straight: dict[str, Any]) -> None:
    """Figures of all stages, all adapters of PPO, and a weight of the KL that moved: a state that was not saved would
    show."""
    assert [len(straight[stage]["steps"]) for stage in STAGES] == [3, 3, 3] and list(straight["heldout"]) == [
        "base",
        "sft",
        "ppo",
    ]
    adapters = {
        "final/adapter_model.safetensors",
        "final/policy/adapter_model.safetensors",
        "final/value/adapter_model.safetensors",
    }
    assert set(straight["3-ppo"]["final"]) == adapters, (
        "the policy as it was trained, folded with what lies below it, and the value"
    )
    assert len({stats["kl_coef"] for _, stats in straight["3-ppo"]["steps"]}) == 3
    assert straight["2-reward"]["scores"] is not None

"""The crash harness: runs are killed at random moments, or die at the k-th write, fsync or rename, and must go on as if
nothing had been.

A nursery process imports everything once and forks a child for each run, so that a run costs seconds. `python
tests/crash.py --kills 30` is the long sweep.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

FORK_SERVER_SCRIPT = r"""
import importlib, json, os, signal, sys
from lowrank_tune.config import Chain, Recipe
from lowrank_tune.runner import run

for line in sys.stdin:
    order = json.loads(line)
    child = os.fork()
    if child == 0:
        if order["cache"] is not None:
            os.environ["LOWRANK_TUNE_CACHE"] = order["cache"]
        if order["die_at"] is not None:
            calls = {"left": order["die_at"]}
            def dying(real):
                def call(*arguments, **keywords):
                    calls["left"] -= 1
                    if calls["left"] < 0:
                        os._exit(9)
                    return real(*arguments, **keywords)
                return call
            for name in ("write", "fsync", "replace", "rename"):
                setattr(os, name, dying(getattr(os, name)))
        if order["die_in"] is not None:
            (module, kind, method), count = order["die_in"]["where"], {"left": order["die_in"]["call"]}
            owner = getattr(importlib.import_module(module), kind)
            def last(*arguments, real=getattr(owner, method), **keywords):
                count["left"] -= 1
                if count["left"] < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*arguments, **keywords)
            setattr(owner, method, last)
        try:
            kind = Chain if "stages" in order["recipe"] else Recipe
            run(kind.from_dict(order["recipe"]), out=order["out"], ui="none")
        except BaseException as error:
            sys.stderr.write(f"{type(error).__name__}: {error}\n")
            sys.stderr.flush()
            os._exit(1)
        os._exit(0)
    print(json.dumps({"pid": child}), flush=True)
    _, status = os.waitpid(child, 0)
    print(json.dumps({"status": status}), flush=True)
"""


def rounds() -> int:
    """How many times as many draws the seeded tests make."""
    return int(os.environ.get("LOWRANK_TUNE_TEST_ROUNDS", "1"))


def seed() -> int:
    """What the draws of the seeded tests begin from."""
    return int(os.environ.get("LOWRANK_TUNE_TEST_SEED", "0"))


NONDETERMINISTIC_STATS = {"tokens_per_second", "memory_gib", "rollout_seconds", "reward_seconds"}


class ForkServer:
    """Starts runs quickly, and kills them."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", FORK_SERVER_SCRIPT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(
        self,
        recipe: dict[str, Any],
        out: Path,
        die_at: int | None = None,
        kill_after: float | None = None,
        die_in: dict[str, Any] | None = None,
    ) -> int:
        """One run or chain; returns its wait status. `kill_after` seconds after its first event it gets SIGKILL, or in
        a call of `where`, after `call` others.

        A run on pairs has a cache of its own, kept over its starts, so that it may also die while that is written.
        """
        assert self.process.stdin and self.process.stdout
        cache = None if recipe.get("algorithm") in ("sft", "grpo", "ppo") else str(out) + "-cache"
        self.process.stdin.write(
            json.dumps({"recipe": recipe, "out": str(out), "die_at": die_at, "cache": cache, "die_in": die_in}) + "\n"
        )
        self.process.stdin.flush()
        child = json.loads(self.process.stdout.readline())["pid"]
        if kill_after is not None:
            deadline = time.time() + 120
            before = _size(out / "events.jsonl")
            while _size(out / "events.jsonl") == before and _alive(child) and time.time() < deadline:
                time.sleep(0.002)
            time.sleep(kill_after)
            if _alive(child):
                os.kill(child, signal.SIGKILL)
        return int(json.loads(self.process.stdout.readline())["status"])

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait(30)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def logged_events(path: Path) -> list[dict[str, Any]]:
    """The events of a log. A damaged line, or a file that is missing, has none: the fingerprint then differs."""
    events = []
    for line in path.read_bytes().splitlines() if path.exists() else ():
        with suppress(ValueError):
            events.append(json.loads(line))
    return events


def run_fingerprint(folder: Path) -> dict[str, Any]:
    """What must be equal: each step's figures once, validation, and the bytes of the final adapter."""
    events = logged_events(folder / "events.jsonl")
    steps = [
        (e["step"], {k: v for k, v in e["stats"].items() if k not in NONDETERMINISTIC_STATS})
        for e in events
        if e["event"] == "step_end"
    ]
    evaluations = [(e["step"], e["stats"]) for e in events if e["event"] == "evaluated"]
    samples = [(e["step"], e["role"], e["prompt"], e["completion"]) for e in events if e["event"] == "sample_logged"]
    groups = {e["step"]: (e["prompt"], e["completions"]) for e in events if e["event"] == "group_logged"}
    # The scores of held-out pairs.
    scores = folder / "scores.json"
    final = {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted((folder / "final").rglob("adapter_model.safetensors"))
    }
    return {
        "steps": steps,
        "validated": evaluations,
        "samples": samples,
        "groups": groups,
        "final": final,
        "scores": scores.read_bytes() if scores.exists() else None,
    }


def small_recipe(algorithm: str = "sft", **train: Any) -> dict[str, Any]:
    """A real QLoRA run of seconds: the tiny base in NF4, dropout on where it may be, ragged last steps, validation,
    samples, scores."""
    if algorithm in ("grpo", "ppo"):
        return _prompt_recipe(algorithm, train)
    if algorithm != "sft":
        return _preference_recipe(algorithm, train)
    return {
        "name": "crash",
        "algorithm": "sft",
        "base": {"model": "tiny-tutor"},
        "adapters": {"policy": {"r": 4, "lora_dropout": 0.1}},
        "data": {"train": [{"dataset": "builtin:arithmetic", "max_samples": 60}], "eval_fraction": 0.1},
        "train": {
            "max_steps": 10,
            "global_batch_size": 8,
            "micro_batch_size": 4,
            "learning_rate": 2e-3,
            "save_steps": 2,
            "logging_steps": 2,
            "gradient_checkpointing": False,
            **train,
        },
        "evaluate": {
            "eval_steps": 4,
            "num_completions_to_print": 1,
            "eval_dataset": {"dataset": "builtin:arithmetic", "split": "heldout"},
            "num_prompts": 3,
            "max_new_tokens": 8,
        },
    }


def _preference_recipe(algorithm: str, train: dict[str, Any]) -> dict[str, Any]:
    reward = algorithm == "reward"
    own = {
        "reward": {"center_rewards_coefficient": 0.01},
        "dpo": {"beta": 0.2, "sft_coef": 0.3},
        "kto": {"beta": 0.2},
    }
    generation = (
        {}
        if reward
        else {
            "eval_dataset": {"dataset": "builtin:arithmetic", "split": "heldout"},
            "num_prompts": 3,
            "max_new_tokens": 8,
        }
    )
    return {
        "name": "crash",
        "algorithm": algorithm,
        "base": {"model": "tiny-tutor"},
        "adapters": {"reward": {"r": 4, "lora_dropout": 0.1}} if reward else {"policy": {"r": 4}},
        "data": {
            "train": [{"dataset": "builtin:arithmetic-preferences", "max_samples": 40}],
            "eval_fraction": 0.15,
            "max_length": 256,
        },
        algorithm: own[algorithm],
        "train": {
            "max_steps": 10,
            "global_batch_size": 6,
            "micro_batch_size": 4,
            "learning_rate": 2e-3,
            "save_steps": 2,
            "logging_steps": 2,
            "gradient_checkpointing": False,
            **train,
        },
        "evaluate": {"eval_steps": 4, "num_completions_to_print": 1, **generation},
    }


def _prompt_recipe(algorithm: str, train: dict[str, Any]) -> dict[str, Any]:
    """Returns a recipe of GRPO or PPO with different rewards for different completions, several epochs of prompts and
    two passes over a batch of rollouts; GRPO resamples groups of equal rewards, PPO has minibatches, an adaptive
    coefficient of the KL, and passes that end early."""
    own = {
        "grpo": {"num_iterations": 2, "zero_std_groups": "resample"},
        "ppo": {
            "num_ppo_epochs": 2,
            "num_mini_batches": 2,
            "kl_target": 0.01,
            "target_kl": 0.002,
            "value_learning_rate": 1e-2,
        },
    }
    return {
        "name": "crash",
        "algorithm": algorithm,
        "base": {"model": "tiny-tutor"},
        "adapters": {"policy": {"r": 4}},
        "data": {"train": [{"dataset": "builtin:arithmetic", "max_samples": 10}]},
        "rewards": [{"name": "answer"}, {"name": "length", "target_tokens": 6, "weight": 0.5}],
        "rollout": {"num_generations": 4, "max_new_tokens": 10, "max_num_seqs": 8},
        algorithm: own[algorithm],
        "train": {
            "max_steps": 8,
            "prompts_per_step": 3,
            "micro_batch_size": 5,
            "learning_rate": 2e-3,
            "save_steps": 2,
            "logging_steps": 2,
            "gradient_checkpointing": False,
            **train,
        },
        "evaluate": {
            "eval_steps": 4,
            "num_completions_to_print": 1,
            "eval_dataset": {"dataset": "builtin:arithmetic", "split": "heldout"},
            "num_prompts": 3,
            "max_new_tokens": 8,
        },
    }


KILL_POINTS = {
    "rollout": ("lowrank_tune.assembly.rl", "RewardScorer", "submit"),  # as a completion ends, others still decode
    "scoring": ("lowrank_tune.assembly.rl", "RewardScorer", "collect"),
    "update": ("lowrank_tune.algorithms.grpo", "GRPO", "compute_losses"),
    "between passes": ("lowrank_tune.algorithms.grpo", "GRPO", "should_continue"),
    "valuing": ("lowrank_tune.algorithms.ppo", "PPO", "_values"),
    # the policy's gradient is there, the value's is not
    "update of ppo": ("lowrank_tune.algorithms.ppo", "PPO", "_value_term"),
    "between passes of ppo": ("lowrank_tune.algorithms.ppo", "PPO", "should_continue"),
    # the stage before has left all that it leaves
    "start of a stage": (
        "lowrank_tune.training.stage",
        "Stage",
        "__init__",
    ),
    "a step": ("lowrank_tune.training.trainer", "Trainer", "_step"),
    # all steps are done and saved, and final/ is not there
    "end of a stage": ("lowrank_tune.training.stage", "Stage", "finish"),
}
"""Where a run or a chain can be killed: module, class and method. Saving is where writes, fsyncs and renames are."""


def continue_to_the_end(fork_server: ForkServer, recipe: dict[str, Any], out: Path) -> None:
    status = fork_server.run(recipe, out)
    assert status == 0, f"the continued run ended with wait status {status}"


def sweep(kills: int, exits: int, seed: int, algorithm: str) -> None:
    """Kills at random moments (two in a row at times) and deaths at random calls; prints a line for each."""
    rng, fork_server = random.Random(seed), ForkServer()
    with tempfile.TemporaryDirectory() as scratch:
        recipe, straight = small_recipe(algorithm), Path(scratch) / "straight"
        continue_to_the_end(fork_server, recipe, straight)
        times = [json.loads(line)["time"] for line in (straight / "events.jsonl").read_text().splitlines()]
        seconds, wanted = times[-1] - times[0], run_fingerprint(straight)
        print(f"the straight run: {seconds:.1f} s from its first event to its last", flush=True)
        for number in range(kills + exits):
            out, results = Path(scratch) / f"run-{number}", []
            for _ in range(rng.choice((1, 1, 2))):
                how = (
                    {"kill_after": rng.uniform(0, seconds)}
                    if number < kills
                    else {"die_at": rng.randrange(rng.choice((40, 220)))}
                )
                results.append((how, fork_server.run(recipe, out, **how)))
                if (out / "summary.json").exists():
                    break
            if not (out / "summary.json").exists():
                continue_to_the_end(fork_server, recipe, out)
            same = run_fingerprint(out) == wanted
            print(f"{number}: {results}: {'equal' if same else 'DIFFERENT'}", flush=True)
            assert same
    fork_server.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=15)
    parser.add_argument("--exits", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--algorithm", choices=("sft", "reward", "dpo", "kto", "grpo", "ppo"), default="sft")
    sweep(**vars(parser.parse_args()))

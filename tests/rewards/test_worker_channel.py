"""A function that writes to its worker's channel, or closes it, has no score: the failure names it."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from lowrank_tune.config import RewardConfig
from lowrank_tune.rewards import RewardInput, WorkerPool, build_rewards
from lowrank_tune.rewards.base import Reward

FILE = """
import json, os, sys, threading

CHANNEL = int(sys.argv[1])

def write(text):
    data = text if isinstance(text, bytes) else text.encode()
    while data:
        data = data[os.write(CHANNEL, data):]

FORGED = {"reply": {"value": 9.0, "seconds": 0.0}}
KINDS = {
    "part": lambda: write("x"),
    "line": lambda: write("x\\n"),
    "empty line": lambda: write("\\n"),
    "bytes": lambda: write(b"\\xff\\xfe\\n"),
    "object": lambda: write("{}\\n"),
    "list": lambda: write("[1, 2]\\n"),
    "number": lambda: write("3\\n"),
    "null": lambda: write("null\\n"),
    "deep": lambda: write("[" * 100_000 + "\\n"),
    "long number": lambda: write("1" * 10_000 + "\\n"),
    "forged": lambda: write(json.dumps(FORGED) + "\\n"),
    "forged token": lambda: write(json.dumps({**FORGED, "token": "0" * 16}) + "\\n"),
    "half": lambda: write(json.dumps(FORGED)),
    "huge": lambda: write("x" * 200_000_000),
    "closes": lambda: os.close(CHANNEL),
}

def rude(completion, row):
    KINDS.get(completion, int)()
    return 1.0

def late(completion, row):
    threading.Timer(0.05, write, ["x"]).start()
    return 1.0

def loud(completion, row):
    os.write(1, b"{}\\n" * 1000)
    os.write(2, b"x" * 100_000)
    return 1.0
"""
WRITES = (
    "part",
    "object",
    "forged token",
    "line",
    "empty line",
    "bytes",
    "list",
    "number",
    "null",
    "deep",
    "long number",
    "forged",
    "half",
)


def own(folder: Path, function: str) -> Reward:
    (folder / "mine.py").write_text(FILE, encoding="utf-8")
    return build_rewards([RewardConfig(name=f"./mine.py:{function}")], folder)[0].reward


def score_all(reward: Reward, completions: list[str]) -> list[tuple[float | None, str]]:
    with WorkerPool[int]([reward], 1, timeout_seconds=10.0) as pool:
        for number, completion in enumerate(completions):
            pool.submit(number, RewardInput("Q", completion, None, {}, True, 5))
        return [(scores[0].value, scores[0].reason) for scores in pool.collect().values()]


@pytest.mark.parametrize("kinds", [WRITES[:3], pytest.param(WRITES[3:], marks=pytest.mark.slow)], ids=["some", "all"])
def test_what_a_function_writes_to_the_channel_is_no_score(tmp_path: Path, kinds: tuple[str, ...]) -> None:
    """And the next completion is graded by a new worker."""
    found = score_all(own(tmp_path, "rude"), [*kinds, "fine"])
    assert found.pop() == (1.0, "")
    for kind, (value, reason) in zip(kinds, found, strict=True):
        assert value is None and "./mine.py:rude wrote to the channel of its worker" in reason, kind


def test_a_function_that_closes_the_channel_is_named(tmp_path: Path) -> None:
    (value, reason), after = score_all(own(tmp_path, "rude"), ["closes", "fine"])
    assert value is None and after == (1.0, "")
    assert reason.startswith("./mine.py:rude ") and "process" in reason


@pytest.mark.slow
def test_a_huge_line_does_not_fill_the_main_process(tmp_path: Path) -> None:
    (value, reason), after = score_all(own(tmp_path, "rude"), ["huge", "fine"])
    assert value is None and after == (1.0, "") and "wrote to the channel" in reason


def test_what_a_thread_writes_later_is_found_at_the_next_completion(tmp_path: Path) -> None:
    with WorkerPool[int]([own(tmp_path, "late")], 1, timeout_seconds=10.0) as pool:
        pool.submit(0, RewardInput("Q", "x", None, {}, True, 5))
        assert pool.collect()[0][0].value == 1.0
        time.sleep(0.3)
        pool.submit(1, RewardInput("Q", "x", None, {}, True, 5))
        score = pool.collect()[1][0]
    assert score.value is None and "channel of its worker" in score.reason


def test_output_of_a_function_is_no_reply(tmp_path: Path) -> None:
    assert score_all(own(tmp_path, "loud"), ["x", "y"]) == [(1.0, ""), (1.0, "")]

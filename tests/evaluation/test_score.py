"""`lowrank-tune score PRESET|FILE`: responses of any shape are scored as a run would score them, and failures,
disagreements and times are reported."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from lowrank_tune.cli import app
from lowrank_tune.config import from_dict
from lowrank_tune.errors import UserError
from lowrank_tune.evaluation import CompletionScores, score_completions
from lowrank_tune.rewards import RewardInput, Score, WeightedReward, WorkerPool
from lowrank_tune.rewards.text.length import LengthReward
from lowrank_tune.rewards.verdicts import (
    CHUNK_SIZE,
    exceeds_failure_limit,
    find_disagreements,
    score_all,
    summarize_verdicts,
)

MINE = """
import time
def odd(completion, row):
    if completion == "boom":
        raise ValueError("it went boom")
    return len(completion) % 2
def seen(completion, row):
    return 1.0 if set(row) == {"question", "gold", "worth"} and row["worth"] == 3 else 0.0
def slow(completion, row):
    time.sleep(0.2)
    return 1.0
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LOWRANK_TUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(MINE)
    return tmp_path


def recipe(*rewards: dict[str, Any], data: dict[str, Any] | None = None, **more: Any) -> Any:
    return from_dict(
        {
            "name": "v",
            "algorithm": "grpo",
            "data": {"train": [data or {"dataset": "builtin:arithmetic", "max_samples": 30}]},
            "rewards": list(rewards) or [{"name": "answer"}],
            "train": {"max_steps": 1},
            **more,
        }
    )


def write(rows: list[Any], name: str = "r.jsonl") -> str:
    Path(name).write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return name


def scored(rows: list[Any], *rewards: dict[str, Any], limit: int | None = None, **more: Any) -> CompletionScores:
    return score_completions(recipe(*rewards, **more), write(rows), limit, lambda event: None)


def score_command(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["score", *arguments])


# --- what is read -----------------------------------------------------------------------------------------------------

SHAPES: list[tuple[dict[str, Any], str, str | None]] = [
    ({"question": "2+3?", "gold": "5", "completion": "It is 5."}, "2+3?", "5"),
    ({"question": "2+3?", "answer": "So.\n#### 5", "response": "It is 5."}, "2+3?", "5"),
    ({"prompt": "2+3?", "gold": 5, "completion": "It is 5."}, "2+3?", "5"),
    ({"problem": "2+3?", "expected_answer": "5", "completions": ["It is 5."]}, "2+3?", "5"),
    (
        {
            "messages": [{"role": "user", "content": "2+3?"}],
            "gold": "5",
            "responses": [{"text": "It is 5.", "finish_reason": "stop"}],
        },
        "2+3?",
        "5",
    ),
    ({"gold": "5", "completion": "It is 5."}, "", "5"),
    ({"completion": "It is 5."}, "", None),
]


def test_rows_of_many_shapes(place: Path) -> None:
    found = scored([row for row, _, _ in SHAPES])
    assert [(one.reward_input.prompt, one.reward_input.ground_truth) for one in found.responses] == [
        (prompt, gold) for _, prompt, gold in SHAPES
    ]
    assert all(one.reward_input.completion == "It is 5." and one.reward_input.stopped for one in found.responses)
    assert [scores[0].verdict for scores in found.scores] == ["pass"] * 6 + ["error"]


def test_the_ground_truth_is_never_taken_from_the_response(place: Path) -> None:
    r"""A response that looks like a reference (`\boxed{}`, `####`) would otherwise be right by itself."""
    found = scored(
        [
            {"prompt": "2+3?", "completion": r"\boxed{6}"},
            {"question": "2+3?", "response": "#### 6"},
            {"prompt": "2+3?", "gold": "5", "completion": "#### 6"},
        ]
    )
    assert [one.reward_input.ground_truth for one in found.responses] == [None, None, "5"]
    assert [scores[0].verdict for scores in found.scores] == ["error", "error", "fail"]


def test_rows_are_read_with_the_columns_of_the_recipe(place: Path) -> None:
    source = {"dataset": "none.jsonl", "columns": {"question": "ask", "answer": "told"}, "ground_truth": "last_number"}
    found = scored([{"ask": "2+3?", "told": "of 2 and 3 it is 5", "completion": "5"}], data=source)
    assert (
        found.responses[0].reward_input.prompt,
        found.responses[0].reward_input.ground_truth,
        found.scores[0][0].verdict,
    ) == (
        "2+3?",
        "5",
        "pass",
    )


def test_user_functions_get_the_row_of_the_data(place: Path) -> None:
    found = scored([{"question": "q", "gold": "5", "worth": 3, "completions": ["a", "b"]}], {"name": "./mine.py:seen"})
    assert [scores[0].value for scores in found.scores] == [1.0, 1.0]


def test_several_completions_their_ends_and_their_lengths(place: Path) -> None:
    row = {
        "question": "q",
        "gold": "5",
        "completions": ["5", {"text": "5", "finish_reason": "length"}, {"content": "5", "stopped": False}],
    }
    found = scored(
        [row, {"question": "q", "gold": "5", "completion": "5", "finish_reason": "length"}],
        {"name": "answer"},
        {"name": "length", "target_tokens": 1},
    )
    assert [(one.index, one.reward_input.stopped) for one in found.responses] == [
        (1, True),
        (2, False),
        (3, False),
        (1, False),
    ]
    assert [scores[0].value for scores in found.scores] == [1.0, 0.0, 0.0, 0.0]
    assert [one.reward_input.tokens for one in found.responses] == [2, 1, 1, 1], "the end token is one too, as in a run"


def test_invalid_rows_are_reported_with_their_lines(place: Path) -> None:
    rows = [
        {"question": "q", "gold": "5", "completion": "5"},
        {"question": "q"},
        "no json",
        {"gold": "5", "completion": 7},
        {"gold": "5", "completions": []},
        [1],
        {"question": "q", "gold": "", "completion": "5"},
    ]
    found = scored(rows, {"name": "math_answer"})
    lines = {reason: [place.rpartition(":")[2] for place in gone.locations] for reason, gone in found.dropped.items()}
    assert len(found.scores) == 1 and sorted(line for several in lines.values() for line in several) == [
        "2",
        "3",
        "4",
        "5",
        "6",
        "7",
    ]
    assert any("no response: expected one of the columns" in reason for reason in lines)
    with pytest.raises(UserError, match="none of its rows can be scored: no response"):
        scored([{"question": "q"}])


def test_limit_is_respected_and_reference_answers_pass(place: Path) -> None:
    assert len(scored([{"gold": "5", "completion": "5"}] * 9, limit=4).scores) == 4
    own = score_completions(recipe(), None, 12, lambda event: None)
    assert len(own.scores) == 12 and all(scores[0].verdict == "pass" for scores in own.scores)


# --- what is reported -------------------------------------------------------------------------------------------------


def test_summary_of_verdicts_equals_hand_computed_values() -> None:
    scores = [Score(1.0, "pass", "", 0.001 * n) for n in range(1, 20)] + [Score(None, "timeout", "", 9.0)]
    found = summarize_verdicts("x", True, scores)
    assert found.counts == {"pass": 19, "timeout": 1} and (found.mean, found.std) == (1.0, 0.0)
    assert (found.median_seconds, found.p95_seconds, found.max_seconds) == pytest.approx((0.010, 0.019, 9.0))


@pytest.mark.parametrize(
    ("seconds", "median", "p95"), [([3.0, 1.0, 2.0], 2.0, 3.0), ([*range(1, 11)], 5.0, 10.0), ([7.0], 7.0, 7.0)]
)
def test_median_and_p95_by_hand(seconds: list[float], median: float, p95: float) -> None:
    found = summarize_verdicts("x", True, [Score(1.0, "pass", "", float(one)) for one in seconds])
    assert (found.median_seconds, found.p95_seconds) == (median, p95)


@given(st.lists(st.integers(0, 30), min_size=1, max_size=120))
def test_a_percentile_is_the_least_time_within_which_so_many_are_done(seconds: list[int]) -> None:
    found = summarize_verdicts("x", True, [Score(1.0, "pass", "", float(one)) for one in seconds])
    for percent, value in ((50, found.median_seconds), (95, found.p95_seconds), (100, found.max_seconds)):
        within, faster = sum(one <= value for one in seconds), sum(one < value for one in seconds)
        assert 100 * within >= percent * len(seconds) > 100 * faster


class StubVerifier:
    name, is_verifier = "stub", True

    def __init__(self, values: list[float | None]) -> None:
        self.values = values

    def score(self, items: list[RewardInput]) -> list[Score]:  # type: ignore[override]
        return [
            Score(value := self.values[item.tokens], "error" if value is None else "graded", "because")
            for item in items
        ]


def test_disagreements_and_failure_limit_equal_hand_computed_values() -> None:
    weighted = [
        WeightedReward("a", 1.0, StubVerifier([1.0, 0.0, 0.5, None, 1.0])),
        WeightedReward("b", 1.0, StubVerifier([0.0, 0.9, 0.4, 1.0, 1.0])),
        WeightedReward("l", 1.0, LengthReward("l", 3)),
    ]
    items = [RewardInput("", "", None, {}, True, tokens) for tokens in range(5)]
    progress: list[int] = []
    with WorkerPool[int]([each.reward for each in weighted]) as scorer:
        rows = list(score_all(scorer, items, progress.append))
    [clash] = find_disagreements(weighted, rows)
    assert (clash.first, clash.second, clash.num_both_scored, clash.only_first, clash.only_second) == (
        "a",
        "b",
        4,
        [0, 2],
        [1],
    ) and progress == [5]
    assert exceeds_failure_limit(weighted, rows, 0.01) is None and "1 of 5" in (
        exceeds_failure_limit(weighted, rows, 0.01, min_failures=1) or ""
    )
    assert (
        "3 of 15" in (exceeds_failure_limit(weighted, rows * 3, 0.01) or "")
        and exceeds_failure_limit(weighted, rows * 3, 0.2) is None
    )
    stopping = [WeightedReward("a", 1.0, weighted[0].reward, "stop"), *weighted[1:]]
    assert "`a` stops a run" in (exceeds_failure_limit(stopping, rows, 1.0) or "")


def preset(place: Path, *rewards: str) -> str:
    (place / "my.yaml").write_text(
        "algorithm: grpo\ndata: {train: [{dataset: builtin:arithmetic}]}\ntrain: {max_steps: 1}\nrewards:\n"
        + "".join(f"  - {{{reward}}}\n" for reward in rewards)
    )
    return "my.yaml"


def test_score_command_prints_and_writes_all_scores(place: Path) -> None:
    rows = [{"question": f"{n}?", "gold": "5", "completion": "5" if n % 2 else "66 \x1b[31m"} for n in range(40)]
    rows[8]["completion"] = "boom"
    made = preset(
        place, "name: answer", "name: './mine.py:odd', on_error: drop, kind: verifier", "name: length, target_tokens: 3"
    )
    result = score_command(made, "--file", write(rows), "--out", "o.jsonl")
    assert result.exit_code == 0 and "40 responses scored" in result.output and "\x1b" not in result.output
    assert (
        "`answer` and `odd` disagree on" in result.output
        and "`odd` failed on 1; a run would drop them" in result.output
    )
    assert "r.jsonl:9: error: ./mine.py:odd raised ValueError: it went boom (mine.py:5" in result.output
    lines = [json.loads(line) for line in Path("o.jsonl").read_text().splitlines()]
    assert len(lines) == 40 and lines[8]["reward"] is None and lines[8]["rewards"]["odd"]["verdict"] == "error"
    assert (
        lines[1]["location"].endswith("r.jsonl:2")
        and lines[1]["reward"] == 1.0 + 1.0 + 1.0
        and "length" in lines[1]["rewards"]
    )

    made = preset(place, "name: './mine.py:odd'")
    result = score_command(made, "--file", "r.jsonl")
    assert result.exit_code == 1 and "a run would stop: `odd` stops a run at its first failure" in result.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("tiny-sft",), "has no rewards"),
        (("no-such",), "no preset is called"),
        (("my.yaml", "--file", "none.jsonl"), "no such file"),
        (("my.yaml", "--file", "r.jsonl"), "none of its rows can be scored"),
        (("my.yaml", "--out", "no/o.jsonl"), "no such folder"),
        (("my.yaml", "--out", "."), "is a folder"),
        (("my.yaml", "--file", "e.jsonl"), "empty"),
        (("broken.yaml",), "mine.py has no function"),
        (("stages.yaml",), "needs the adapter of an earlier stage"),
    ],
)
def test_wrong_input_ends_with_a_sentence(place: Path, arguments: tuple[str, ...], words: str) -> None:
    preset(place, "name: './mine.py:nothing'")
    (place / "my.yaml").rename("broken.yaml")
    preset(place, "name: answer")
    write([{"question": "q"}])
    write([], "e.jsonl")
    (place / "stages.yaml").write_text(
        "train: {max_steps: 1}\nstages:\n"
        "  - {algorithm: reward, data: {train: [{dataset: builtin:arithmetic-preferences}]}}\n"
        "  - {algorithm: grpo, data: {train: [{dataset: builtin:arithmetic}]}, rewards: [{name: reward_model}]}\n"
    )
    result = score_command(*arguments)
    assert result.exit_code == 2 and "Traceback" not in result.output
    assert words in result.output or ("function" in words and "has no function `nothing`" in result.output), (
        result.output
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--file", "r.jsonl"), "is not a run"),
        ((), "--file is required"),
        (("--file", "r.jsonl", "--limit", "3"), "leave out: --limit"),
        (("base.bits=16", "--file", "r.jsonl", "--limit", "3"), "leave out: --limit, base.bits=16"),
        (("--file", "r.jsonl", "--out", "no/o.jsonl"), "no such folder"),
    ],
)
def test_wrong_use_with_a_folder_ends_with_a_sentence(place: Path, arguments: tuple[str, ...], words: str) -> None:
    (place / "folder").mkdir()
    write([{"question": "q", "completion": "5"}])
    result = score_command("folder", *arguments)
    assert result.exit_code == 2 and words in result.output and result.output.count("\n") == 1, result.output


def test_interrupted_score_command_writes_the_scores_so_far(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = WorkerPool.collect, [0]

    def collect(self: WorkerPool[int]) -> Any:
        calls[0] += 1
        if calls[0] == 3:
            raise KeyboardInterrupt
        return real(self)

    monkeypatch.setattr(WorkerPool, "collect", collect)
    made = preset(place, "name: answer")
    result = score_command(made, "--file", write([{"gold": "5", "completion": "5"}] * 99), "--out", "o.jsonl")
    done = 2 * CHUNK_SIZE
    assert result.exit_code == 130 and f"{done} responses scored of 99, interrupted" in result.output
    assert len(Path("o.jsonl").read_text().splitlines()) == done


@pytest.mark.slow
def test_ctrl_c_prints_and_writes_the_scores_so_far(place: Path) -> None:
    made = preset(place, "name: './mine.py:slow'")
    write([{"gold": "5", "completion": str(n)} for n in range(400)])
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]),
    }
    # Whoever runs the tests in the background ignores SIGINT, and children inherit that.
    start = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from lowrank_tune.cli import "
        "main; main()"
    )
    command = [sys.executable, "-c", start, "score", made, "--file", "r.jsonl", "--out", "o.jsonl"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, text=True)
    began = time.monotonic()
    while time.monotonic() - began < 60:
        if any("rewards.workers.worker" in line for line in children(child.pid)):
            break
        time.sleep(0.1)
    time.sleep(4.0)
    child.send_signal(signal.SIGINT)
    out, errors = child.communicate(timeout=120)
    assert child.returncode == 130 and "of 400, interrupted" in out and "Traceback" not in errors, (out, errors)
    assert 16 <= len(Path("o.jsonl").read_text().splitlines()) < 400


def children(pid: int) -> list[str]:
    """Command lines of a process's children."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for each in task.read_text().split():
            found.append(Path(f"/proc/{each}/cmdline").read_bytes().replace(b"\0", b" ").decode())
    return found

"""Scores on worker processes: user functions that hang, raise, end their process, return no number or print."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import pytest
from scoring import score_items

from lowrank_tune.assembly.rl import RewardScorer, check_reference_rewards
from lowrank_tune.config import RecipeConfig, RewardConfig
from lowrank_tune.data import ChatTemplate, PromptDataset, PromptExample
from lowrank_tune.data.prompts import PromptReport
from lowrank_tune.errors import ConfigError, UserError
from lowrank_tune.rewards import (
    RewardInput,
    Score,
    WorkerPool,
    build_rewards,
    make_negative_samples,
    sanity_check_rewards,
    weighted_sum,
)
from lowrank_tune.rewards.base import Reward
from lowrank_tune.rewards.math.answer import AnswerReward

FILE = """
import os, random, signal, subprocess, sys, threading, time

def length(completion, row): return len(completion)
def column(completion, row): return row["worth"]
def yes(completion, row): return completion == "yes"
def raises(completion, row):
    if completion == "bad":
        return 1 / 0
    return 1
def nothing(completion, row): pass
def text(completion, row): return "1"
def nan(completion, row): return float("nan")
def huge(completion, row): return 10 ** 400
def sleeps(completion, row):
    if completion == "sleep":
        time.sleep(1000)
    return 1
def spins(completion, row):
    while completion == "spin":
        pass
    return 1
def stubborn(completion, row):
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM):
        signal.signal(number, signal.SIG_IGN)
    time.sleep(1000)
def leaves(completion, row): os._exit(7)
def ends(completion, row): sys.exit(0)
def crashes(completion, row): os.kill(os.getpid(), signal.SIGSEGV)
def interrupts(completion, row): raise KeyboardInterrupt
def starts_child(completion, row):
    child = subprocess.Popen(["sleep", "1000"])
    open(row["file"], "w").write(str(child.pid))
    time.sleep(1000)
def prints(completion, row):
    print("x" * 1_000_000); sys.stderr.write("y" * 1_000_000)
    return 1
def asks(completion, row): return len(input())
def draws(completion, row): return random.random()
def hashes(completion, row): return hash(completion)
def escapes(completion, row): raise ValueError("\\x1b]0;hello\\x07")
def message_raises(completion, row):
    class Mute(Exception):
        def __str__(self): raise RuntimeError
    raise Mute
def torch(completion, row): return "torch" in sys.modules
def pid(completion, row): return os.getpid()
def wrong_arguments(completion): return 1
async def later(completion, row): return 1
def deep(completion, row): return deep(completion, row)
no_function = 3
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(FILE)
    return tmp_path


def item(completion: str, **row: Any) -> RewardInput:
    return RewardInput("What is 40 + 32?", completion, "72", row, True, 5)


def own(folder: Path, function: str) -> Reward:
    return build_rewards([RewardConfig(name=f"./mine.py:{function}")], folder)[0].reward


def score(reward: Reward, scored: RewardInput, timeout: float = 10.0) -> Score:
    return score_items(reward, [scored], timeout)[0]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def within(seconds: float, true: Callable[[], bool]) -> bool:
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.02)
    return true()


def test_values_and_rows_reach_the_function_and_are_returned(folder: Path) -> None:
    assert score(own(folder, "length"), item("a\n\x00\ud800\u00e9\u202e")).value == 6.0
    assert score(own(folder, "length"), item("x" * 3_000_000)).value == 3_000_000.0
    assert (
        score(own(folder, "column"), item("", worth=-0.25, day=date(2026, 1, 2), raw=b"\xff", at=(1, 2))).value == -0.25
    )
    assert [one.value for one in score_items(own(folder, "yes"), [item("yes"), item("no")])] == [1.0, 0.0]


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("raises", "ZeroDivisionError: division by zero (mine.py:9: return 1 / 0)"),
        ("nothing", "returned None"),
        ("text", "returned '1'"),
        ("nan", "returned nan"),
        ("huge", "returned inf"),
        ("leaves", "ended its process with code 7"),
        ("ends", "SystemExit"),
        ("crashes", "was killed by SIGSEGV"),
        ("interrupts", "KeyboardInterrupt"),
        ("asks", "EOFError"),
        ("escapes", "x1b]0;hello"),
        ("message_raises", "Mute"),
        ("later", "coroutine"),
        ("deep", "RecursionError"),
        ("column", "KeyError: 'worth'"),
    ],
)
def test_a_broken_function_stops_the_run_and_names_row_function_and_line(
    folder: Path, function: str, words: str
) -> None:
    found = score(own(folder, function), item("bad"))
    assert (found.value, found.verdict) == (None, "error")
    assert weighted_sum([found.value], [1.0]) is None
    message = found.reason
    assert (
        words in message
        and f"./mine.py:{function} " in message
        and "'bad'" in message
        and "'What is 40 + 32?'" in message
        and message.isprintable()
    )


@pytest.mark.parametrize("function", ["sleeps", "spins", "stubborn"])
def test_a_function_that_hangs_ends_in_time_and_the_pool_works_on(folder: Path, function: str) -> None:
    word = {"sleeps": "sleep", "spins": "spin"}.get(function, "")
    with WorkerPool[int]([own(folder, function)], workers=1, timeout_seconds=0.5) as scorer:
        before = scorer.pids
        start = time.monotonic()
        scorer.submit(0, item(word))
        [found] = scorer.collect()[0]
        # others may keep one that spins from its time
        assert 0.45 < time.monotonic() - start < (10.0 if function == "spins" else 1.0)
        assert (found.value, found.verdict, found.seconds) == (None, "timeout", 0.5) and not is_running(before[0])
        if function != "stubborn":
            scorer.submit(1, item("fine"))
            assert scorer.collect()[1][0].value == 1.0 and len(scorer.pids) == 1 and scorer.pids != before
    assert (
        f"mine.py:{function} did not return within 0.5 s on the completion '{word}' of the prompt 'What" in found.reason
    )


def test_a_function_that_hangs_does_not_delay_other_completions(folder: Path) -> None:
    with WorkerPool[int]([own(folder, "sleeps"), AnswerReward()], workers=2, timeout_seconds=1.0) as scorer:
        for number in range(40):
            scorer.submit(number, item("sleep" if number == 3 else f"It is {60 + number}."))
        found = scorer.collect()
    assert list(found) == list(range(40))
    assert [scores[0].verdict for scores in found.values()] == [
        "timeout" if number == 3 else "graded" for number in range(40)
    ]
    assert [number for number, scores in found.items() if scores[1].value == 1.0] == [12]


def test_the_pool_keeps_its_size(folder: Path) -> None:
    with WorkerPool[int]([own(folder, "leaves")], workers=2) as scorer:
        for number in range(12):
            scorer.submit(number, item(""))
        assert all(scores[0].verdict == "error" for scores in scorer.collect().values())
        assert within(10.0, lambda: sum(map(is_running, scorer.pids)) == 2)
        # the terminal's Ctrl-C is for the run alone
        assert all(os.getpgid(pid) != os.getpgid(0) for pid in scorer.pids)
        assert len([pid for pid in children(os.getpid()) if "workers.worker" in command(pid)]) == 2


def children(parent: int) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            state, pid = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if int(pid) == parent and state != "Z":
            found.append(int(entry.name))
    return found


def command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def test_scores_do_not_depend_on_order_or_number_of_workers(folder: Path) -> None:
    rewards = [own(folder, function) for function in ("length", "draws", "hashes")]
    items = {number: item("word" * number) for number in range(30)}
    tables = []
    for workers, seed in ((1, 0), (3, 1)):
        order = list(items)
        random.Random(seed).shuffle(order)
        with WorkerPool[int](rewards, workers) as scorer:
            for number in order:
                scorer.submit(number, items[number])
            found = scorer.collect()
        assert list(found) == order
        tables.append({number: [one.value for one in scores] for number, scores in found.items()})
    assert tables[0] == tables[1] and len({values[1] for values in tables[0].values()}) == 30


def test_workers_import_no_torch_and_start_fast(folder: Path) -> None:
    start = time.monotonic()
    with WorkerPool[int]([own(folder, "torch")], workers=1) as scorer:
        warm = time.monotonic() - start
        scorer.submit(0, item(""))
        assert scorer.collect()[0][0].value == 0.0
    assert warm < 3.0  # 0.1 s on a quiet machine


def test_cheap_rewards_need_no_worker() -> None:
    with WorkerPool[str]([AnswerReward()], workers=2) as scorer:
        assert scorer.pids == []
        scorer.submit("a", item("It is 72."))
        assert scorer.collect()["a"][0].value == 1.0 and scorer.collect() == {}


def test_a_key_in_use_is_refused() -> None:
    with WorkerPool[str]([AnswerReward()]) as scorer:
        scorer.submit("a", item("72"))
        with pytest.raises(ValueError, match="before"):
            scorer.submit("a", item("73"))


def test_output_is_discarded_and_started_processes_end_with_the_worker(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert score(own(folder, "prints"), item("")).value == 1.0
    file = folder / "child"
    assert score(own(folder, "starts_child"), item("", file=str(file)), 1.0).verdict == "timeout"
    assert within(2.0, lambda: not is_running(int(file.read_text())))
    assert capfd.readouterr() == ("", "")


def test_functions_are_found_by_any_path_and_files_of_one_name_stay_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, place in enumerate(("a", "b")):
        (tmp_path / place).mkdir()
        (tmp_path / place / "mine.py").write_text(
            f"from dataclasses import dataclass\n@dataclass\nclass A:\n    x: int = {number}\n"
            "def grade(completion, row): return A().x\n"
        )
    (tmp_path / "a" / "helper.py").write_text("value = 5\n")
    (tmp_path / "a" / "uses.py").write_text("import helper\ndef grade(completion, row): return helper.value\n")
    monkeypatch.chdir(tmp_path / "a")
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
    uses = [
        RewardConfig(name=use)
        for use in ("./mine.py:grade", f"{tmp_path}/b/mine.py:grade", "../b/mine.py:grade", "uses.py:grade")
    ]
    made = build_rewards(uses, Path())
    assert [each.name for each in made] == ["grade", "grade-2", "grade-3", "grade-4"]
    with WorkerPool[int]([each.reward for each in made], workers=1) as scorer:
        scorer.submit(0, item(""))
        assert [one.value for one in scorer.collect()[0]] == [0.0, 1.0, 1.0, 5.0]
    assert not list(tmp_path.rglob("__pycache__"))


def test_files_that_cannot_be_loaded_are_reported_all_at_once(folder: Path) -> None:
    (folder / "syntax.py").write_text("def f(completion, row):\n    return (\n")
    (folder / "imports.py").write_text("import nothing_of_the_kind\ndef f(completion, row): return 1\n")
    (folder / "leaves.py").write_text("raise SystemExit(0)\n")
    uses = [
        "syntax.py:f",
        "imports.py:f",
        "leaves.py:f",
        "mine.py:missing",
        "mine.py:no_function",
        "mine.py:wrong_arguments",
        "mine.py:length",
    ]
    rewards = [each.reward for each in build_rewards([RewardConfig(name=use) for use in uses], folder)]
    with pytest.raises(ConfigError) as caught:
        WorkerPool[int](rewards)
    errors = [(fault.key, fault.message) for fault in caught.value.problems]
    words = [
        "SyntaxError",
        "No module named 'nothing_of_the_kind' (imports.py:1",
        "SystemExit",
        "no function `missing`",
        "no function `no_function`",
        "(completion, row)",
    ]
    assert [key for key, _ in errors] == uses[:6] and all(
        word in message for word, (_, message) in zip(words, errors, strict=True)
    ), errors


def test_a_file_that_hangs_or_exits_at_its_import_is_refused(folder: Path) -> None:
    for text, words in (("while True: pass\n", "not ready within 0.7 s"), ("import os; os._exit(3)\n", "code 3")):
        (folder / "slow.py").write_text(text + "def f(completion, row): return 1\n")
        with pytest.raises(UserError, match=f"slow.py:f.*{words}"):
            WorkerPool[int]([build_rewards([RewardConfig(name="slow.py:f")], folder)[0].reward], start_seconds=0.7)


def test_reward_file_that_changes_during_the_run_has_no_effect(folder: Path) -> None:
    reward = own(folder, "sleeps")
    with WorkerPool[int]([reward], workers=1, timeout_seconds=0.5) as scorer:
        (folder / "mine.py").write_text("def sleeps(completion, row): return 99")
        for number, word in enumerate(("a", "sleep", "b")):
            scorer.submit(number, item(word))
        assert [scores[0].value for scores in scorer.collect().values()] == [1.0, None, 1.0]


def test_close_does_not_wait_for_what_hangs(folder: Path) -> None:
    scorer = WorkerPool[int]([own(folder, "sleeps")], workers=2, timeout_seconds=600.0)
    for number in range(10):
        scorer.submit(number, item("sleep"))
    time.sleep(0.2)
    pids, start = scorer.pids, time.monotonic()
    scorer.close()
    assert time.monotonic() - start < 1.0 and not any(map(is_running, pids)) and scorer.pids == []


RUN = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # who runs the tests in the background may ignore it
from pathlib import Path
from lowrank_tune.rewards import RewardInput, WorkerPool, build_rewards
from lowrank_tune.config import RewardConfig
rewards = build_rewards([RewardConfig(name=f"mine.py:{sys.argv[1]}")], Path())
scorer = WorkerPool([each.reward for each in rewards], workers=2, timeout_seconds=600)
for number in range(4):
    scorer.submit(number, RewardInput("p", sys.argv[2], None, {}, True, 1))
print(*scorer.pids, flush=True)
%s
"""
ENDS = {
    "left open": ("time.sleep(0.5)", None),
    "killed": ("scorer.collect()", signal.SIGKILL),
    "terminated": ("scorer.collect()", signal.SIGTERM),
    "interrupted": ("with scorer: scorer.collect()", signal.SIGINT),
}


@pytest.mark.slow
def test_no_worker_outlives_the_run(folder: Path) -> None:
    """However a run ends, also while its workers run a function. The runs are started together, because each imports
    torch."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", RUN % last, "spins", "spin"],
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
            start_new_session=True,
        )
        for last, _ in ENDS.values()
    ]
    workers = [[int(pid) for pid in run.stdout.readline().split()] for run in runs if run.stdout is not None]
    outlived = []
    for run, pids, (end, (_, number)) in zip(runs, workers, ENDS.items(), strict=True):
        if number is not None:
            assert len(pids) == 2 and all(map(is_running, pids)), end
            os.killpg(run.pid, number)  # as a terminal does: to the whole group
        try:
            run.wait(20.0)
        except subprocess.TimeoutExpired:
            outlived.append(f"the run itself, {end}")
            run.kill()
        if run.stdout is not None:
            run.stdout.close()
        if not within(3.0, lambda pids=pids: not any(map(is_running, pids))):  # type: ignore[misc]
            outlived.append(end)
            for pid in filter(is_running, pids):
                os.kill(pid, signal.SIGKILL)
    assert outlived == []


def test_sanity_check_of_user_functions_uses_kind_and_weighted_sum(folder: Path) -> None:
    (folder / "mine.py").write_text(
        "import random\ndef exact(completion, row): return completion.endswith(f\"{row['worth']}.\")\n"
        "def same(completion, row): return 1\ndef lot(completion, row): return random.random()\n"
    )
    right = [RewardInput(f"What is {n} + 0?", f"So it is {n}.", str(n), {"worth": n}, True, 5) for n in range(10, 26)]

    def fault(*functions: str, kind: Literal["verifier", "shaping"] | None = None) -> str:
        made = build_rewards([RewardConfig(name=f"mine.py:{function}", kind=kind) for function in functions], folder)
        return sanity_check_rewards(made, right, make_negative_samples(right)).fault() or ""

    assert fault("exact") == "" and "`same`" in fault("same") and "`lot`" in fault("lot")
    # The weighted sum decides, unless the recipe calls each of them a verifier.
    assert fault("exact", "same") == ""
    assert "`same`" in fault("exact", "same", kind="verifier")
    assert fault("same", kind="shaping") == ""
    # The README's example: a function that shapes, beside a verifier.
    polite = build_rewards([RewardConfig(name="answer"), RewardConfig(name="mine.py:same", weight=0.1)], folder)
    assert [reward.is_verifier for reward in polite] == [True, False]
    assert sanity_check_rewards(polite, right, make_negative_samples(right)).fault() is None
    broken = [RewardInput("Which row?", "So it is 5.", "5", {}, True, 5), *right]
    report = sanity_check_rewards(
        build_rewards([RewardConfig(name="mine.py:exact")], folder), broken, make_negative_samples(right)
    )
    assert "KeyError: 'worth'" in (report.fault() or "") and "Which row?" in (report.fault() or "")
    assert report.rewards[0].verdict_counts == {"error": 1, "graded": 96} and "1 error" in "\n".join(report.lines())


@pytest.mark.parametrize("rewards_check", ["strict", "warn", "off"])
def test_rewards_check_refuses_warns_or_is_off(folder: Path, rewards_check: Literal["strict", "warn", "off"]) -> None:
    (folder / "mine.py").write_text("def same(completion, row): return 1\n")
    recipe = RecipeConfig.model_validate(
        {
            "algorithm": "grpo",
            "base": {"model": "x"},
            "data": {"train": [{"dataset": "builtin:arithmetic"}]},
            "rewards": [{"name": str(folder / "mine.py:same")}],
            "rewards_check": rewards_check,
            "train": {"max_steps": 1},
        }
    )
    examples = [PromptExample([1], f"What is {n} + 0?", str(n), {"n": n}, str(n)) for n in range(16)]
    prompts = PromptDataset(examples, [], np.zeros(16, np.int32), np.ones(16, np.int64), PromptReport([]))
    events: list[Any] = []
    scorer = RewardScorer(recipe, cast(ChatTemplate, None))
    try:
        if rewards_check == "strict":
            with pytest.raises(UserError, match="`same` does not separate.*`rewards_check: warn`"):
                check_reference_rewards(scorer, prompts, recipe.rewards_check, 0, events.append)
        else:
            check_reference_rewards(scorer, prompts, recipe.rewards_check, 0, events.append)
    finally:
        scorer.close()
    warnings = [event.message for event in events if event.level == "warning"]
    assert [("does not separate" in message) for message in warnings] == ([True] if rewards_check == "warn" else [])
    assert any("were not tried" in event.message for event in events) == (rewards_check == "off")

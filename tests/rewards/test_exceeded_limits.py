"""Completions that exceed the limits of a verifier: 0 if the row's own answer does not exceed them, and no score if it
does, or if there is none."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lowrank_tune.config import RewardConfig
from lowrank_tune.processes import charged_time
from lowrank_tune.processes.process_tree import ProcessTree
from lowrank_tune.rewards import RewardInput, Score, WorkerPool, build_rewards, weighted_sum
from lowrank_tune.rewards.base import Reward, WorkerReward
from lowrank_tune.rewards.sandbox import isolation
from lowrank_tune.rewards.workers.process import Worker

LIMIT = 0.3


@dataclass(frozen=True)
class GreedyReward(WorkerReward):
    """The grade of `greedy.py` for the word in a box."""

    name: str = "greedy"
    is_verifier = True

    def worker_spec(self) -> dict[str, Any]:
        return {"kind": "verifier", "module": "greedy"}

    def build_request(self, item: RewardInput) -> dict[str, Any]:
        return {"completion": item.completion.removeprefix("\\boxed{").removesuffix("}")}

    def parse_reply(self, item: RewardInput, reply: Any) -> Score:
        return Score(reply["value"], "graded")


@pytest.fixture(scope="module")
def greedy() -> Iterator[WorkerPool[int]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))
        with WorkerPool[int]([GreedyReward()], 1, LIMIT) as pool:
            yield pool


def score(pool: WorkerPool[int], completion: str, ground_truth: str | None = None, **row: Any) -> Score:
    pool.submit(0, RewardInput("Solve it.", completion, ground_truth, row, True, 9))
    return pool.collect()[0][0]


def one(name: str, folder: Path | None = None, **settings: Any) -> Reward:
    return build_rewards([RewardConfig(name=name, **settings)], folder or Path())[0].reward


@pytest.mark.parametrize(
    ("word", "limit"), [("spins", "0.3 s"), ("deaf", "0.3 s"), ("memory", "the memory that the verifier may use")]
)
def test_a_completion_that_alone_exceeds_a_limit_is_wrong(greedy: WorkerPool[int], word: str, limit: str) -> None:
    """Interrupted in time, or killed; afterwards the pool still works."""
    found = score(greedy, word, "fine")
    assert (found.value, found.verdict, found.reason) == (0.0, "fail", f"grading it takes more than {limit}")
    assert score(greedy, "fine", "fine").value == 1.0 and len(greedy.pids) == 1


@pytest.mark.parametrize(("word", "verdict"), [("spins", "timeout"), ("deaf", "timeout"), ("memory", "error")])
@pytest.mark.parametrize("has_reference", [True, False])
def test_where_the_reference_exceeds_it_too_there_is_no_score(
    greedy: WorkerPool[int], word: str, verdict: str, has_reference: bool
) -> None:
    found = score(greedy, word, word if has_reference else None)
    assert (found.value, found.verdict) == (None, verdict)
    assert score(greedy, "fine", "fine").value == 1.0 and len(greedy.pids) == 1


def test_the_reference_of_a_row_is_graded_once(greedy: WorkerPool[int], monkeypatch: pytest.MonkeyPatch) -> None:
    requested: list[str] = []
    request = Worker.request

    def counted_request(worker: Worker, message: Any, seconds: float) -> dict[str, Any]:
        # The message of another worker's start is a list.
        if isinstance(message, dict):
            requested.append(message["completion"])
        return request(worker, message, seconds)

    monkeypatch.setattr(Worker, "request", counted_request)
    for completion in ("spins", "memory", "spins"):
        assert score(greedy, completion, "another").value == 0.0
    assert requested == ["spins", "another", "memory", "spins"]


def test_a_user_s_function_that_hangs_is_never_a_zero(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def f(completion, row):\n    while completion != 'fine': pass\n    return 1.0\n")
    with WorkerPool[int]([one("mine.py:f", tmp_path)], 1, LIMIT) as pool:
        assert [score(pool, text, "fine").verdict for text in ("fine", "hangs")] == ["graded", "timeout"]


def test_a_deep_fraction_is_a_wrong_answer() -> None:
    pytest.importorskip("math_verify")
    deep = "\\frac{1}{" * 20 + "x" + "}" * 20
    with WorkerPool[int]([one("math_answer")], 1, 1.0) as pool:
        assert (score(pool, f"so \\boxed{{{deep}}}", "\\sqrt{2}").verdict) == "fail"
        assert score(pool, "\\boxed{\\frac{2}{\\sqrt{2}}}", "\\sqrt{2}").verdict == "pass"


FERMAT = "(exists ((a Int)(b Int)(c Int)) (and (> a 2) (> b 2) (> c 2) (= (+ (* a a a) (* b b b)) (* c c c))))"


@pytest.mark.slow
def test_a_witness_on_which_z3_takes_too_long_is_wrong_where_it_decides_the_row() -> None:
    pytest.importorskip("z3")
    with WorkerPool[int]([one("smt", answer_type="witness")], 1, LIMIT) as pool:
        easy = "(declare-const p Bool)(assert p)"
        assert score(pool, f"(define-fun p () Bool {FERMAT})", smt=easy).verdict == "fail"
        assert score(pool, "p = true", smt=easy).verdict == "pass"
        hard = f"(declare-const p Bool)(assert p)(assert {FERMAT})"
        assert score(pool, "p = true", smt=hard).verdict == "timeout"


@pytest.mark.slow
def test_an_invariant_on_which_z3_takes_too_long_is_wrong_where_it_decides_the_row() -> None:
    pytest.importorskip("z3")
    easy = {"smt": "(declare-const i Int)", "init": "(= i 0)", "transition": "(= i! (+ i 1))", "property": "(>= i 0)"}
    with WorkerPool[int]([one("smt", answer_type="invariant")], 1, LIMIT) as pool:
        assert score(pool, f"(and (>= i 0) (not {FERMAT}))", **easy).verdict == "fail"
        assert score(pool, "(>= i 0)", **easy).verdict == "pass"
        assert score(pool, "(>= i 0)", **{**easy, "init": FERMAT}).verdict == "timeout"


@pytest.mark.skipif(isolation.best_available() is None, reason="this machine has no sandbox for code")
def test_tests_that_exceed_their_limit_are_an_error_of_the_row() -> None:
    """Also if the row's own solution takes too long; without a solution the cause is not known."""
    slow = "def f(x):\n    while x: pass\n    return x"
    tests = ["assert f(1) == 1"]
    with WorkerPool[int]([one("python_tests")], 1, LIMIT) as pool:
        found = [
            score(pool, slow, code="def f(x): return x", test_list=tests),
            score(pool, slow, test_list=tests),
            score(pool, slow, code=slow, test_list=tests),
            score(pool, "def f(x): return x", code="def f(x): return x", test_list=["while 1: pass", *tests]),
        ]
    assert [each.verdict for each in found] == ["fail", "fail", "error", "error"]
    assert "its own solution did not end within 0.18 s" in found[2].reason


@pytest.fixture
def starving_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other programs use all processors: a worker that has not replied can run, and never does."""
    monkeypatch.setattr(charged_time, "read_tree", lambda roots: ProcessTree(0.0, runnable=True))
    monkeypatch.setattr(charged_time, "MAX_WALL_FACTOR", 4)


@pytest.mark.usefixtures("starving_machine")
@pytest.mark.parametrize("ground_truth", ["fine", "deaf", None])
def test_a_completion_that_a_busy_machine_did_not_grade_has_no_score(
    greedy: WorkerPool[int], ground_truth: str | None
) -> None:
    """Whether its row's own answer would be graded or not; afterwards the pool still works."""
    found = score(greedy, "deaf", ground_truth)
    assert (found.value, found.verdict, found.seconds) == (None, "timeout", LIMIT)
    assert "the machine is too busy" in found.reason and "'deaf'" in found.reason
    assert weighted_sum([found.value], [1.0]) is None
    assert score(greedy, "fine", "fine").value == 1.0 and len(greedy.pids) == 1


@pytest.mark.usefixtures("starving_machine")
def test_a_user_s_function_that_a_busy_machine_did_not_run_has_no_score(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def f(completion, row):\n    while completion != 'fine': pass\n    return 1.0\n")
    with WorkerPool[int]([one("mine.py:f", tmp_path)], 1, LIMIT) as pool:
        found = [score(pool, text) for text in ("late", "fine")]
    assert [(each.value, each.verdict) for each in found] == [(None, "timeout"), (1.0, "graded")]
    assert "the machine is too busy" in found[0].reason

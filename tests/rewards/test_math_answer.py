"""`math_answer`: exact comparison without a worker, algebra in a worker, and no completion makes it hang, run out of
memory or pass a wrong answer."""

from __future__ import annotations

import gzip
import importlib.util
import json
import re
import resource
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from malformed_yaml import MAX_CPU_SECONDS

from lowrank_tune.config import RewardConfig
from lowrank_tune.data.ground_truth import extract_answer
from lowrank_tune.errors import UserError
from lowrank_tune.processes.limits import CallTimeout
from lowrank_tune.rewards import RewardInput, Score, WorkerPool, build_rewards
from lowrank_tune.rewards.base import WorkerReward
from lowrank_tune.rewards.math.answer_parsing import compare_exact
from lowrank_tune.rewards.math.final_answer import extract_final_answer
from lowrank_tune.rewards.math.latex_syntax import too_large_reason
from lowrank_tune.rewards.math.math_answer import MathAnswerReward, make_math_answer
from lowrank_tune.rewards.user_function import UserFunctionReward
from lowrank_tune.rewards.workers.budget import time_limit
from lowrank_tune.rewards.workers.worker import LimitedGrader

sys.path.insert(0, str(Path(__file__).parent))
from resource_bombs import RESOURCE_BOMBS, boxed  # noqa: E402

pytest.importorskip("math_verify")
DATA = Path(__file__).parents[2].parent / "shared" / "data"
ROWS = 60  # of each data set in the fast tests
LIMIT = 1.0  # seconds, which do not pass while other programs run
HANGING = 20 * LIMIT  # of the wall clock
BUSY = 3.0  # seconds that a busy machine may need for what is quick
MEGABYTES = 1024  # that no worker may exceed
SAMPLE = (
    "power of three",
    "tower of 200",
    "factorial of a factorial",
    "power of a polynomial",
    "sum over a billion",
    "deeper brackets",
    "a million spaces",
    "arabic digits",
    "null byte",
    "lone surrogate",
    "python",
    "text without end",
)


def item(completion: str, gold: str | None, stopped: bool = True) -> RewardInput:
    return RewardInput("What is it?", completion, gold, {"id": 7}, stopped, 10)


@pytest.fixture(scope="module")
def scorer() -> Iterator[WorkerPool[Any]]:
    with WorkerPool[Any]([MathAnswerReward()], 1, LIMIT) as warm:
        yield warm


def scores(scorer: WorkerPool[Any], items: Sequence[RewardInput]) -> list[Score]:
    for number, each in enumerate(items):
        scorer.submit(number, each)
    return [found[0] for found in scorer.collect().values()]


SAME = [
    ("1,234", "1234"),
    ("0.75", r"\frac{3}{4}"),
    ("50%", "0.5"),
    (r"10\text{ cm}", "10"),
    (r"90^\circ", "90"),
    (r"\text{B}", "(B)"),
    (r"\textbf{(C)}\ 15", "C"),
    ("C", r"\text{C: } 15"),
    ("15", r"\textbf{(C)}\ 15"),
    ("D, A", "A and D"),
    ("evelyn", r"\text{Evelyn}"),
    ("(1, -2)", "(1,-2)"),
    ("2, 1", "1,2"),
    (r"\{2,1\}", "1, 2"),
    (r"\lt", "<"),
    ("x = 5", "5"),
    ("a", "(A)"),
    ("20_8", "20_{8}"),
    ("20", "20_8"),
    ("20_8", "16"),
    (r"12{,}500", "12500"),
]
DIFFERENT = [
    ("1234.5", "1234"),
    ("2c", "C"),
    ("(2,1)", "(1,2)"),
    ("[1,2]", r"\text{B}"),
    ("1,2,3", "1,2"),
    ("B", "C"),
    ("17", "C"),
    (r"\text{odd}", r"\text{even}"),
    ("dod", r"\text{odd}"),
    (">", r"\lt"),
    ("20_9", "20_8"),
    ("20_8", "20"),
    ("19_8", "17"),
    ("5", ".5"),
    ("(3,1)", "(5,2)"),
]


@pytest.mark.parametrize(
    ("found", "gold", "right"), [(*each, True) for each in SAME] + [(*each, False) for each in DIFFERENT]
)
def test_exact_cases_are_decided_without_a_worker(found: str, gold: str, right: bool) -> None:
    assert compare_exact(found, gold) is right
    score = MathAnswerReward().score_without_worker(item(boxed(found), gold))
    assert score is not None and score.verdict == ("pass" if right else "fail")


ALGEBRA = [
    (r"10\text{ cm}^2", "10", True),
    (r"\frac{\sqrt{8}}{2}", r"\sqrt{2}", True),
    (r"\sqrt3/2", r"\dfrac{\sqrt{3}}{2}", True),
    ("x^2+2x+1", "(x+1)^2", True),
    (r"2\pi", r"\pi \cdot 2", True),
    ("x>1", r"(1,\infty)", True),
    (r"(1,\infty)", "x>1", True),
    ("5 > x", "x < 5", True),
    (r"-3, 3", r"\pm 3", True),
    ("3", r"\pm 3", False),
    ("2x", "y = 2x", True),
    (r"\frac \pi4", r"\frac{\pi}{4}", True),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{bmatrix}1 \\ 2\end{bmatrix}", True),
    (r"3\sqrt{2} \text{ cm}", r"3\sqrt{2}", True),
    (r"\{x \mid 0 < x \leqslant 2\}", r"0 < x \le 2", True),
    ("2.236068", r"\sqrt{5}", True),
    ("2.2361", r"\sqrt{5}", False),
    ("x^2+2x", "(x+1)^2", False),
    ("1", "2x+z=1", False),
    ("2^{0.5}", r"\sqrt{2}", True),
    (r"0 \le x \le 1", "[0,1]", True),
    ("0.333333x", r"\frac{x}{3}", False),
    ("infinity", r"\infty", True),
    ("7", r"\infty", False),
    (r"-\infty", r"\infty", False),
    (r"\frac{0}{0}", r"\sqrt{2}", False),
    ("2y", "2x", False),
    ("X", "x", False),
    ("0.0", "e^{-20}", False),
    ("0", "e^{-50}", False),
    ("e^{-60}", "e^{-50}", False),
    (r"\frac{1}{e^{50}}", "e^{-50}", True),
    ("3x + 2d", "3x+2", False),
    ("[1,2]", "(1,2)", False),
    ("1-2i", "1+2i", False),
    ("2i+1", "1+2i", True),
    (r"(4,5)\cup(0,3)", r"(0,3)\cup(4,5)", True),
]


def test_algebraic_cases_are_decided_by_the_worker(scorer: WorkerPool[Any]) -> None:
    """math-verify accepts 2x + z = 1 for a gold answer 1, and not the other way round."""
    found = scores(scorer, [item(boxed(answer), gold) for answer, gold, _ in ALGEBRA])
    wrong = [
        (each, score)
        for each, score in zip(ALGEBRA, found, strict=True)
        if score.verdict != ("pass" if each[2] else "fail")
    ]
    assert not wrong
    # a wrong answer is compared, not given up
    assert not [score for score in found if "takes more than" in score.reason]


def test_a_wrong_answer_that_sympy_cannot_simplify_is_decided_by_its_value(scorer: WorkerPool[Any]) -> None:
    hard = r"(\sqrt{2}+\sqrt{3}+\sqrt{5}+\sqrt{7}+\sqrt{11})^{40}"
    assert [
        score.verdict
        for score in scores(scorer, [item(boxed(hard), r"2\sqrt{3}"), item(boxed("(x+y+z+w)^{500}"), "x+1")])
    ] == ["fail"] * 2


def test_final_answer_is_the_box_or_marker_or_formula_or_last_number() -> None:
    expected = {
        r"so \boxed{1} and \boxed{\frac{1}{2}}.": r"1, \frac{1}{2}",
        r"so \boxed{1}. Then it is \boxed{\frac{1}{2}}.": r"\frac{1}{2}",
        "#### 1\n#### 72": "72",
        "The answer is $x=3$ apples.": "x=3",
        "Answer: 12.5.": "12.5",
        r"So it is $\sqrt{5}$.": r"\sqrt{5}",
        "It is $5$ or 7": "7",
        r"Thus \(y^2\).": "y^2",
        "72": "72",
    }
    assert {text: extract_final_answer(text) for text in expected} == expected


def test_a_completion_that_did_not_stop_fails_without_a_worker() -> None:
    assert MathAnswerReward().score_without_worker(item(boxed("5"), "5", stopped=False)) == Score(
        0.0, "fail", "did not stop"
    )


@pytest.mark.parametrize(
    "gold", [None, "", "  ", "Part (b):", "Part 2 of it", r"\text{Yes, it is possible to win}", "9" * 300, "x" * 1001]
)
def test_an_invalid_reference_answer_is_an_error_without_a_worker(gold: str | None) -> None:
    score = MathAnswerReward().score_without_worker(item(boxed("5"), gold))
    assert (
        score is not None
        and score.value is None
        and score.verdict == "error"
        and (MathAnswerReward().row_rejection_reason(item("", gold)) or "?") in score.reason
    )


def test_a_reference_answer_that_algebra_cannot_read_is_an_error_even_where_the_texts_agree(
    scorer: WorkerPool[Any],
) -> None:
    gold = r"\begin{cases} 1 & n=1 \\ 2 & n>1 \end{cases}"
    right, wrong = scores(scorer, [item(boxed(gold), gold), item(boxed("5"), gold)])
    for score in (right, wrong):
        assert (score.value, score.verdict) == (None, "error")
        assert (
            "the gold answer" in score.reason
            and "is not read as mathematics" in score.reason
            and "cases" in score.reason
        )


def test_an_answer_that_algebra_cannot_read_is_wrong(scorer: WorkerPool[Any]) -> None:
    [score] = scores(scorer, [item(boxed(r"\begin{cases} 1 & n=1 \end{cases}"), r"\sqrt{2}")])
    assert (score.value, score.verdict) == (0.0, "fail") and "is not read as mathematics" in score.reason


def test_exact_cases_and_algebra_take_little_time(scorer: WorkerPool[Any]) -> None:
    reward, start = MathAnswerReward(), time.process_time()
    for number in range(300):
        reward.score_without_worker(item(f"It is #### {number}", "17"))
    assert time.process_time() - start < MAX_CPU_SECONDS
    seconds = sorted(
        score.seconds for score in scores(scorer, [item(boxed(rf"{n}\sqrt{{2}}"), r"7\sqrt{2}") for n in range(20)])
    )
    assert seconds[10] < LIMIT / 2


REPEATED = {
    "commas": "1" + "," * 985 + "x!",
    "small spaces": "1" + r",\!" * 328 + "x!",
    "dots": "1" + "." * 985 + "x!",
    "open boxes": "\\boxed{" * 570 + "\\boxed{5}" + "x" * 3980,
    "escaped braces": "\\boxed{" + "\\{" * 3990,
}


@pytest.mark.parametrize("text", REPEATED.values(), ids=REPEATED.keys())
def test_repeated_text_is_read_in_linear_time(text: str) -> None:
    """There is no time limit for this: it runs in the process that trains."""
    completion = text if "boxed" in text else boxed(text)
    reward, start = MathAnswerReward(), time.process_time()
    for _ in range(5):
        reward.score_without_worker(item(completion, "x+1"))
        reward.build_request(item(completion, "x+1"))
    assert time.process_time() - start < 1.0


def test_a_comparison_that_fails_for_any_answer_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer is wrong if a library fails only with it; if it fails with the gold answer too, there is no score."""
    from lowrank_tune.rewards.math import math_worker as worker

    compare = worker.answers_are_equal
    request = {"gold": "x+1", "found": "x+2", "seconds": 5.0}

    def fails_for(answers: set[str]) -> Any:
        def compare_or_fail(ground_truth: Any, answer: Any, is_set: bool) -> bool:
            if str(answer) in answers:
                raise KeyError("Unequality")
            return compare(ground_truth, answer, is_set)

        return compare_or_fail

    monkeypatch.setattr(worker, "answers_are_equal", fails_for({"x + 2"}))
    assert worker.grade(request) == {"found": "cannot be compared (KeyError)"}
    monkeypatch.setattr(worker, "answers_are_equal", fails_for({"x + 1", "x + 2"}))
    with pytest.raises(KeyError):
        worker.grade(request)


def test_too_large_answers_are_refused_and_large_ones_are_not() -> None:
    assert too_large_reason(r"\frac{\sqrt{2}}{2^{x^{2}}}") is None and too_large_reason("1" * 200) is None
    assert all(
        too_large_reason(text) for text in ("1" * 201, "(" * 31, "2^{2^{2^{2^{2}}}}", "x" * 1001, "5!!!", "\x00")
    )


def test_recipes_name_it_and_a_missing_package_has_a_cure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    [made] = build_rewards([RewardConfig(name="math_answer")], tmp_path)
    assert made.reward == MathAnswerReward("math_answer") and made.name == "math_answer"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"`math_answer` needs .*math_verify.*pip install 'lowrank-tune\[verifiers\]'"):
        make_math_answer("math_answer")


# hostile answers


def peak(pid: int) -> float:
    """Returns the peak memory of a process in MB."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def detonate(reward: WorkerReward, gold: str, bombs: Sequence[tuple[str, str]], warm: RewardInput) -> list[str]:
    """Returns the bombs that took too long or too much memory, passed, or got no score."""
    faults = []
    with WorkerPool[str]([reward], 1, LIMIT) as scorer:
        for name, text in bombs:
            scorer.submit("warm", warm)
            [before] = scorer.collect()["warm"]
            [pid] = scorer.pids
            start = time.monotonic()
            scorer.submit(name, item(boxed(text), gold))
            [score] = scorer.collect()[name]
            took = time.monotonic() - start
            held = peak(pid) if Path(f"/proc/{pid}/status").exists() else 0.0
            if (
                before.verdict != "pass"
                or took > HANGING
                or held > MEGABYTES
                or (score.value, score.verdict) != (0.0, "fail")
            ):
                faults.append(f"{name}: {score}, {took:.2f} s, {held:.0f} MB, before it {before}")
    return faults


def from_a_thread(call: Any) -> Any:
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(call()))
    thread.start()
    thread.join()
    return results[0]


WARM = item(boxed(r"\frac{\sqrt{8}}{2}"), r"\sqrt{2}")


@pytest.mark.parametrize("threaded", [False, True])
def test_hostile_answers_end_in_time(threaded: bool) -> None:
    bombs = [each for each in RESOURCE_BOMBS if each[0] in SAMPLE][threaded::2]
    assert bombs
    call = lambda: detonate(MathAnswerReward(), "x+1", bombs, WARM)  # noqa: E731
    assert (from_a_thread(call) if threaded else call()) == []


@pytest.mark.slow
@pytest.mark.parametrize("threaded", [False, True])
@pytest.mark.parametrize("gold", ["x+1", "12"])
def test_all_hostile_answers_end_in_time(threaded: bool, gold: str) -> None:
    assert len(RESOURCE_BOMBS) >= 60 and len(dict(RESOURCE_BOMBS)) == len(RESOURCE_BOMBS)
    call = lambda: detonate(MathAnswerReward(), gold, RESOURCE_BOMBS, WARM)  # noqa: E731
    assert (from_a_thread(call) if threaded else call()) == []


# the limits around a verifier


@dataclass(frozen=True)
class Greedy(MathAnswerReward):
    def worker_spec(self) -> dict[str, Any]:
        return {"kind": "verifier", "module": "greedy"}

    def score_without_worker(self, item: RewardInput) -> Score | None:
        return None

    def build_request(self, item: RewardInput) -> dict[str, Any]:
        return {"completion": item.completion}

    def parse_reply(self, item: RewardInput, reply: Any) -> Score:
        return Score(reply["value"], "graded", "steep" if reply["steep"] else "")


@pytest.fixture(scope="module")
def greedy() -> Iterator[WorkerPool[Any]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))
        own = UserFunctionReward(
            "own",
            "own.py:f",
            Path("/own.py"),
            "import mmap\ndef f(completion, row): return len(mmap.mmap(-1, 800 << 20)) >> 20",
            "f",
        )
        with WorkerPool[Any]([Greedy(), own], 1, BUSY) as scorer:
            yield scorer


def serve(scorer: WorkerPool[Any], word: str) -> tuple[Score, Score, bool]:
    """Returns the scores of the verifier and of the user's function, and whether the worker was replaced."""
    before = scorer.pids
    scorer.submit(0, item(word, "1"))
    verifier, own = scorer.collect()[0]
    scorer.submit(1, item("fine", "1"))
    assert [score.value for score in scorer.collect()[1]] == [1.0, 800.0]
    assert len(scorer.pids) == 1
    return verifier, own, scorer.pids != before


@pytest.mark.slow
def test_a_verifier_has_limits_and_a_user_s_function_keeps_its_memory(greedy: WorkerPool[Any]) -> None:
    score, own, replaced = serve(greedy, "memory")
    assert (score.value, score.verdict) == (0.0, "fail") and "memory" in score.reason and not replaced
    assert own.value == 800.0
    score, _, replaced = serve(greedy, "spins")  # its own alarm clock ends it: the process lives on
    assert (score.value, score.verdict) == (0.0, "fail") and "3 s" in score.reason and not replaced
    score, _, replaced = serve(greedy, "deaf")
    assert (score.value, score.verdict) == (0.0, "fail") and replaced
    score, _, replaced = serve(greedy, "hidden")
    assert score.value == 1.0 and score.reason == "steep"


def test_a_worker_that_a_verifier_left_large_is_replaced(greedy: WorkerPool[Any]) -> None:
    score, _, replaced = serve(greedy, "keeps")
    assert score.value == 1.0 and replaced


def test_a_wrong_answer_that_met_the_limit_of_memory_is_an_error() -> None:
    reply = {"value": {"same": False}, "steep": True, "seconds": 0.1}
    assert MathAnswerReward().parse_reply(item(boxed("x"), "y+1"), reply).verdict == "error"
    assert MathAnswerReward().parse_reply(item(boxed("x"), "y+1"), {**reply, "steep": False}).verdict == "fail"


def test_limits_are_removed_after_the_call() -> None:
    def spin(request: Any) -> None:
        while True:
            pass

    before = resource.getrlimit(resource.RLIMIT_AS)
    old = signal.getsignal(signal.SIGPROF)
    try:
        start = time.process_time()
        with pytest.raises(CallTimeout):
            LimitedGrader(spin, 512)({"seconds": 0.2})
        assert 0.15 < time.process_time() - start < 0.3
        assert resource.getrlimit(resource.RLIMIT_AS) == before and signal.getitimer(signal.ITIMER_PROF) == (0.0, 0.0)
        inner: list[Any] = []
        with pytest.raises(CallTimeout):  # a part that gives up early leaves the clock of the whole call running
            LimitedGrader(lambda request: [inner.append(time_limit(0.1, lambda: spin(None))), spin(None)], 512)(
                {"seconds": 0.4}
            )
        assert inner == [None] and 0.45 < time.process_time() - start < 0.8
    finally:
        signal.signal(signal.SIGPROF, old)


def test_a_worker_does_not_load_torch(scorer: WorkerPool[Any]) -> None:
    assert "libtorch" not in Path(f"/proc/{scorer.pids[0]}/maps").read_text()


# real rows


def rows(name: str) -> Iterator[tuple[str, str, str | None]]:
    """Yields (problem, solution, gold answer) of a data set; the solution of SVAMP is its equation."""
    if name == "svamp":
        for row in json.loads((DATA / "svamp" / "SVAMP.json").read_text()):
            yield f"{row['Body']} {row['Question']}", f"{row['Equation']} = {row['Answer']}", str(row["Answer"])
        return
    file, problem, solution = {
        "gsm8k": ("gsm8k/train", "question", "answer"),
        "gsm8k-test": ("gsm8k/test", "question", "answer"),
        "math": ("math/test", "problem", "solution"),
        "numinamath": ("numinamath_cot_1k/train_first1000", "problem", "solution"),
    }[name]
    for line in gzip.decompress((DATA / f"{file}.jsonl.gz").read_bytes()).decode().split("\n"):
        if line:
            row = json.loads(line)
            yield row[problem], row[solution], extract_answer(row, {}, "auto", row[solution], accept_bare_number=False)


ALLOWED = {"gsm8k": 0, "gsm8k-test": 0, "svamp": 0.001, "math": 0, "numinamath": 0.11}
"""The share of rows without a gold answer, or with another one than the solution: proofs, headings, statements in
prose, and an equation that does not hold, `((4.0 - 2.0) + 3.0) = 1.0`."""


def sweep(scorer: WorkerPool[Any], name: str, most: int | None) -> tuple[list[str], list[str]]:
    """Returns the solutions of a data set that fail, and the answers of the next row that pass."""
    found = list(islice(rows(name), most))
    for number, (problem, solution, gold) in enumerate(found):
        if gold is not None:
            scorer.submit((number, "own"), RewardInput(problem, solution, gold, {}, True, 1))
            scorer.submit(
                (number, "next"), RewardInput(problem, found[(number + 1) % len(found)][1], gold, {}, True, 1)
            )
    results = scorer.collect()
    misses = [
        f"{number}: {score}" for (number, kind), [score] in results.items() if kind == "own" and score.verdict != "pass"
    ]
    false = [
        f"{found[number][2]} | {extract_final_answer(found[(number + 1) % len(found)][1])}"
        for (number, kind), [score] in results.items()
        if kind == "next" and score.verdict == "pass"
    ]
    return misses, [each for each in false if not _alike(*each.split(" | ", 1))]


def _alike(one: str, other: str) -> bool:
    """Returns whether two answers are obviously equal: the same text, letter or number."""
    last_sides = (text.rpartition(" = ")[2] for text in (one, other))
    plain = [re.sub(r"\\textbf|\\text|[ {}(),$\\%]", "", text) for text in last_sides]
    try:
        return float(plain[0]) == float(plain[1])
    except ValueError:
        return plain[0][:1] == plain[1][:1] and plain[0][:1].isupper() or plain[0] == plain[1]


@pytest.mark.skipif(not DATA.exists(), reason="the real rows are not here")
@pytest.mark.parametrize("name", list(ALLOWED))
def test_solutions_verify_against_their_own_answers(scorer: WorkerPool[Any], name: str) -> None:
    misses, false = sweep(scorer, name, ROWS)
    assert len(misses) <= ALLOWED[name] * ROWS and not false, (misses, false)


@pytest.mark.slow
@pytest.mark.skipif(not DATA.exists(), reason="the real rows are not here")
@pytest.mark.parametrize("name", list(ALLOWED))
def test_all_solutions_verify_against_their_own_answers(name: str) -> None:
    count = sum(1 for _ in rows(name))
    with WorkerPool[Any]([MathAnswerReward()], 2) as patient:
        misses, false = sweep(patient, name, None)
    assert len(misses) <= ALLOWED[name] * count, misses
    assert len(false) <= 0.002 * count, false


def test_the_packages_are_those_of_the_extra() -> None:
    assert all(importlib.util.find_spec(name) for name in ("math_verify", "latex2sympy2_extended", "sympy"))

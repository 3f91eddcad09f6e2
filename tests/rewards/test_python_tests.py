"""`python_tests`: right programs pass, wrong programs and reward hacks fail, and faults of rows and of the sandbox are
errors and never 0."""

from __future__ import annotations

import gzip
import json
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import reward_hacks
from malformed_yaml import MAX_CPU_SECONDS
from scoring import score_items

from lowrank_tune import doctor
from lowrank_tune.config import UNSAFE_CODE, RewardConfig
from lowrank_tune.errors import ConfigError, UserError
from lowrank_tune.processes.charged_time import ChargedTime, Starved
from lowrank_tune.rewards import RewardInput, Score, WorkerPool, build_rewards
from lowrank_tune.rewards.code import python_tests as reward_module
from lowrank_tune.rewards.code.python_tests import PythonTestsReward
from lowrank_tune.rewards.code.python_tests_worker import InvalidTests, extract_code, row_tests
from lowrank_tune.rewards.sandbox import check as check_module
from lowrank_tune.rewards.sandbox import isolation
from lowrank_tune.rewards.sandbox.check import SandboxPair

DATA = Path(__file__).parents[3] / "shared" / "data"
needs_sandbox = pytest.mark.skipif(isolation.best_available() is None, reason="this machine has no sandbox for code")


def item(completion: str, row: Mapping[str, Any] = reward_hacks.FUNCTION_TASK, stopped: bool = True) -> RewardInput:
    return RewardInput("Write it.", completion, None, row, stopped, 5)


def judged(items: list[RewardInput], timeout: float = 10.0, workers: int = 2) -> list[Score]:
    with WorkerPool[int]([PythonTestsReward()], workers, timeout) as scorer:
        for number, each in enumerate(items):
            scorer.submit(number, each)
        return [scores[0] for scores in scorer.collect().values()]


def verdicts(*items: RewardInput) -> list[str]:
    return [score.verdict for score in judged(list(items))]


def row(*tests: str, code: str = "def f(x):\n    return x", **more: Any) -> dict[str, Any]:
    return {"code": code, "test_list": list(tests), **more}


@needs_sandbox
def test_right_programs_pass() -> None:
    fence = f"Here:\n```python\n{reward_hacks.CORRECT_PROGRAM}```\nIt is right."
    body = "    return max(numbers)\n"
    assert (
        verdicts(*[item(text, each) for each in reward_hacks.ROWS for text in (reward_hacks.CORRECT_PROGRAM, fence)])
        == ["pass"] * 4
    )
    assert verdicts(item(body), item(f"```\n{body}```"), item("return max(numbers)")) == ["pass"] * 3


@needs_sandbox
@pytest.mark.parametrize("kind", ["cheats", "wrong"])
def test_some_reward_hacks_and_wrong_programs_fail(kind: str) -> None:
    """A third of each on one shape of row; the slow test runs all of them on both."""
    texts = (
        list(reward_hacks.REWARD_HACKS.values())[::3]
        if kind == "cheats"
        else [reward_hacks.body(text) for text in list(reward_hacks.WRONG_BODIES.values())[::3]]
    )
    assert [score.verdict for score in judged([*map(item, texts)], timeout=2.5)] == ["fail"] * len(texts)


@pytest.fixture(params=isolation.LEVELS)
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each level of the sandbox in turn, as if it were the strongest one of this machine."""
    available = isolation.probe_level(request.param)
    if available.fault:
        pytest.skip(str(available))
    monkeypatch.setattr(reward_module, "best_available", lambda: available)
    return str(available.level)


def test_right_programs_pass_and_wrong_ones_fail_at_each_level(level: str) -> None:
    assert PythonTestsReward().worker_spec()["level"] == level
    assert verdicts(item(reward_hacks.CORRECT_PROGRAM), item(reward_hacks.ZERO)) == ["pass", "fail"]


@pytest.mark.slow
@pytest.mark.parametrize("shape", reward_hacks.ROWS, ids=["function", "list"])
def test_every_reward_hack_and_wrong_program_fails(shape: dict[str, Any], level: str) -> None:
    assert len(reward_hacks.REWARD_HACKS) >= 30 and len(reward_hacks.WRONG_BODIES) >= 30
    texts = (
        reward_hacks.REWARD_HACKS
        | {name: reward_hacks.body(text) for name, text in reward_hacks.WRONG_BODIES.items()}
        | reward_hacks.NOT_CODE
    )
    scores = dict(zip(texts, judged([item(text, shape) for text in texts.values()]), strict=True))
    assert {name: score for name, score in scores.items() if score.verdict != "fail" or score.value != 0.0} == {}


CASES = [
    ("True is not 1", "assert f(1) == True", "def f(x): return x", "fail"),
    ("nor is it in a list", "assert f(1) == [True]", "def f(x): return [x]", "fail"),
    ("a whole float is its number", "assert f(1) == 1", "def f(x): return 1.0", "pass"),
    ("a list is no tuple", "assert f(1) == (1,)", "def f(x): return [1]", "fail"),
    ("unequal", "assert f(1) != 2", "def f(x): return 2", "fail"),
    ("unequal, and is", "assert f(1) != 2", "def f(x): return 1", "pass"),
    ("an object is not unequal either", "assert f(1) != 2", "def f(x): return object()", "fail"),
    ("an object is not true", "assert f(1)", "def f(x): return object()", "fail"),
    ("sets", "assert set(f(1)) == {1, 2}", "def f(x): return [2, 1, 1]", "pass"),
    ("a generator, through list", "assert list(f(3)) == [0, 1, 2]", "def f(x): yield from range(x)", "pass"),
    ("a generator itself", "assert f(3) == [0, 1, 2]", "def f(x): yield from range(x)", "fail"),
    ("in place", "x = [3, 1]\nf(x)\nassert x == [1, 3]", "def f(x): x.sort()", "pass"),
    ("not in place", "x = [3, 1]\nf(x)\nassert x == [1, 3]", "def f(x): return sorted(x)", "fail"),
    (
        "a dict in place",
        "x = {'a': [1]}\nf(x)\nassert x == {'a': [1, 2], 'b': 3}",
        "def f(x):\n    x['a'].append(2)\n    x['b'] = 3",
        "pass",
    ),
    ("the same object", "x = [1]\nassert f(x) is x", "def f(x): return x", "pass"),
    ("a copy", "x = [1]\nassert f(x) is not x", "def f(x): return x", "fail"),
    ("nan", "import math\nassert math.isnan(f(1))", "def f(x): return float('nan')", "pass"),
    ("infinity", "assert f(1) == float('-inf')", "def f(x): return -float('inf')", "pass"),
    ("near", "import math\nassert math.isclose(f(1), 0.3)", "def f(x): return 0.1 + 0.2", "pass"),
    ("a great number", "assert f(10) == 10 ** 20000", "def f(x): return x ** 20000", "pass"),
    ("a text of surrogates", "assert f('\\ud800') == '\\ud800\\x00'", "def f(x): return x + '\\x00'", "pass"),
    (
        "an exception that is expected",
        "try:\n    f(1)\n    assert False\nexcept ValueError as e:\n    assert str(e) == 'no'",
        "def f(x): raise ValueError('no')",
        "pass",
    ),
    (
        "of a class below it",
        "try:\n    f(1)\n    assert False\nexcept LookupError:\n    pass",
        "class Mine(KeyError): pass\ndef f(x): raise Mine('no')",
        "pass",
    ),
    (
        "another exception",
        "try:\n    f(1)\n    assert False\nexcept ValueError:\n    pass",
        "def f(x): raise TypeError('no')",
        "fail",
    ),
    (
        "none where one is expected",
        "try:\n    f(1)\n    assert False\nexcept ValueError:\n    pass",
        "def f(x): pass",
        "fail",
    ),
    (
        "an end of all loops",
        "assert [1] == list(map(f, [1, 2])) or all(map(f, [1]))",
        "def f(x): raise StopIteration",
        "fail",
    ),
    (
        "objects of the solution",
        "p = P(3)\np.x = 4\nassert f(p) == 4 and p.x == 4 and p.twice() == 8",
        "class P:\n    def __init__(self, x): self.x = x\n    def twice(self): return 2 * self.x\ndef f(x): return x.x",
        "pass",
    ),
    ("types as arguments", "assert f(int) == 0", "def f(x): return x()", "pass"),
    ("named arguments", "assert f(x=2) == 2", "def f(x): return x", "pass"),
    ("deep recursion", "assert f(800) == 800", "def f(x): return 1 + f(x - 1) if x else 0", "pass"),
    (
        "prints and reads",
        "assert f(1) == 1",
        "def f(x):\n    print('x' * 1000000)\n    try: input()\n    except EOFError: return x",
        "pass",
    ),
    (
        "a main part that is not run",
        "assert f(1) == 1",
        "def f(x): return x\nif __name__ == '__main__':\n    1 / 0",
        "pass",
    ),
    ("crashes", "assert f(1) == 1", "import ctypes\ndef f(x): return ctypes.string_at(0)", "fail"),
    ("too much memory", "assert f(1) == 1", "def f(x): return len(bytearray(4 << 30)) and 1", "fail"),
    ("an endless value", "assert f(1) == 1", "def f(x): return 'x' * (64 << 20)", "fail"),
    ("missing", "assert f(1) == 1", "def g(x): return 1", "fail"),
]


@needs_sandbox
def test_tests_have_their_meaning_in_python() -> None:
    items = [item(code, row(test, code="def f(x): pass\nclass P: pass")) for _, test, code, _ in CASES]
    assert {
        case[0]: (score.verdict, score.reason)
        for case, score in zip(CASES, judged(items), strict=True)
        if score.verdict != case[3]
    } == {}


@needs_sandbox
def test_types_count_as_far_as_the_reference_minds_them() -> None:
    """If a row's own solution returns 0 for False, a completion may too; all other differences of types count."""
    tests = ("assert f(1) == True", "assert f(0) == False", "assert f(2) == [False]")
    loose, strict = (
        row(*tests, code=f"def f(x): return {back}")
        for back in ("[0] if x == 2 else x", "[False] if x == 2 else x == 1")
    )
    codes = [
        "def f(x): return [0] if x == 2 else x",
        "def f(x): return [0] if x == 2 else 0",
        "def f(x): return (0,) if x == 2 else x",
        "def f(x): return [False] if x == 2 else x == 1",
    ]
    assert verdicts(*(item(code, loose) for code in codes)) == ["pass", "fail", "fail", "pass"]
    assert verdicts(*(item(code, strict) for code in codes)) == ["fail", "fail", "fail", "pass"]
    assert verdicts(item(codes[0], {"test_list": list(tests), "test_setup_code": ""})) == ["fail"]


@needs_sandbox
def test_reasons_describe_what_happened() -> None:
    texts = [
        "def f(x): return 2",
        "def f(x): return 1 / 0",
        "import os\nos._exit(3)",
        "import ctypes\nctypes.string_at(0)",
        "f = \x1b",
        "import time\ntime.sleep(1000)",
        reward_hacks.REWARD_HACKS["speaks for the tester at once"],
    ]
    scores = judged([item(text, row("assert f(1) == 1")) for text in texts], timeout=2.5)
    expected = [
        "assert f(1) == 1: got 2",
        "raised ZeroDivisionError: division by zero",
        "the code ended its process with code 3",
        "the code was killed by SIGSEGV",
        "raised SyntaxError: ",
        "did not end within 1.5 s",
        "wrote to the stream of its results",
    ]
    assert all(
        score.verdict == "fail" and score.reason.startswith(words)
        for score, words in zip(scores, expected, strict=True)
    ), scores
    assert "\x1b" not in "".join(score.reason for score in scores)


FAULTY = [
    ({}, "it has neither `test` with `entry_point` nor a `test_list`"),
    ({"test_list": []}, "it has neither `test` with `entry_point` nor a `test_list`"),
    (row("f(1)"), "its tests assert nothing"),
    (row("assert f(1 == 1"), "its `test_list` is not Python"),
    (row("assert 1 == 1"), "its tests use nothing of the solution"),
    ({**reward_hacks.FUNCTION_TASK, "test": "assert largest([1]) == 1"}, "its `test` has no function `check`"),
    ({**reward_hacks.FUNCTION_TASK, "test": "def check(candidate):\n    candidate([1])"}, "its tests assert nothing"),
    ({**reward_hacks.FUNCTION_TASK, "entry_point": "1largest"}, "its `entry_point` is not a name"),
]


@pytest.mark.parametrize(("bad", "why"), FAULTY)
def test_rows_without_tests_are_faults_of_the_data(bad: dict[str, Any], why: str) -> None:
    reward = PythonTestsReward()
    assert reward.row_rejection_reason(item("", bad)) == why
    score = reward.score_without_worker(item("def f(x): return x", bad))
    assert score is not None and score.value is None and score.verdict == "error" and why in score.reason
    assert (
        reward.row_rejection_reason(item("", reward_hacks.FUNCTION_TASK)) is None
        and reward.row_rejection_reason(item("", reward_hacks.LIST_TASK)) is None
    )


@needs_sandbox
def test_tests_that_cannot_run_are_errors_and_not_zeros() -> None:
    rows = [
        row("assert f(1) == unknown_name"),
        row("import no_such_module", "assert f(1) == 1"),
        row("assert f(lambda: 1) == 1"),
        row("if False:\n    assert f(1) == 1"),
        row("x = 1 / 0", "assert f(1) == 1"),
    ]
    scores = judged([item("def f(x): return x", each) for each in rows])
    assert [(score.value, score.verdict) for score in scores] == [(None, "error")] * len(rows), scores


@needs_sandbox
def test_a_sandbox_that_does_not_start_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from lowrank_tune.rewards.sandbox import launch

    monkeypatch.setattr(launch, "python", lambda level: ("/bin/false",))
    ended = SandboxPair("landlock").check("", "x = 1", "", "assert 1", 1.0)
    assert ended.outcome == "error" and ended.reason.startswith(
        "the sandbox did not start: it ended its process with code 1"
    )
    score = PythonTestsReward().parse_reply(
        item("x"), {"value": {"outcome": "error", "reason": ended.reason}, "seconds": 0.1}
    )
    assert score.value is None and score.verdict == "error"


class StarvedTime(ChargedTime):
    """The charged time of code that has waited for a processor all the time."""

    def check(self, replied: bool = False) -> None:
        raise Starved("in 12 s other programs left it 0.1 s of the 0.6 s that it has")


@needs_sandbox
def test_a_machine_that_is_too_busy_is_not_the_codes_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine a program gets less than a twentieth of a processor; else the code could have used its time."""
    strongest = isolation.best_available()
    assert strongest is not None
    monkeypatch.setattr(check_module, "ChargedTime", StarvedTime)
    found = {}
    for share in (0.04, 0.06):
        monkeypatch.setattr(check_module, "computing_share", lambda seconds, share=share: share)
        found[share] = SandboxPair(strongest.level).check("", "import time\ntime.sleep(100)", "", "assert 1", 0.6)
    assert (found[0.04].outcome, found[0.06].outcome) == ("late", "fail")
    assert found[0.04].reason == (
        "the machine is too busy to run the code: in 12 s other programs left it 0.1 s of the 0.6 s that it has"
    )
    score = PythonTestsReward().parse_reply(
        item("x"), {"value": {"outcome": "late", "reason": "too busy"}, "seconds": 6.0}
    )
    assert score.value is None and score.verdict == "timeout"


def test_a_missing_answer_of_the_worker_is_an_error_or_a_timeout() -> None:
    late = PythonTestsReward().worker_failure(item("x"), "timeout", "did not return within 3 s")
    assert (late.value, late.verdict) == (None, "timeout") and "within 3 s" in late.reason
    killed = PythonTestsReward().worker_failure(item("x"), "error", "was killed by SIGKILL")
    assert (killed.value, killed.verdict) == (None, "error") and "SIGKILL" in killed.reason


def test_a_completion_that_did_not_stop_fails() -> None:
    score = PythonTestsReward().score_without_worker(item(reward_hacks.CORRECT_PROGRAM, stopped=False))
    assert score is not None and (score.value, score.verdict, score.reason) == (0.0, "fail", "did not stop")


@pytest.mark.parametrize(
    ("completion", "code"),
    [
        ("x = 1", "x = 1"),
        ("a\n```python\nx = 1\n```\nb", "x = 1\n"),
        ("```py\nx = 1\n```\n```text\nout\n```", "x = 1\n"),
        ("```\nx = 1\n```\n```\nx = 2\n```", "x = 2\n"),
        ("```Python\nx = 1\n```\n```python\nx = 2\n```", "x = 2\n"),
        ("```python\nx = 1", "x = 1\n"),
        ("```python title=a\n    x = 1\n    ```", "    x = 1\n"),
        ("", ""),
    ],
)
def test_the_code_is_the_last_python_fence_or_the_last_fence_or_all(completion: str, code: str) -> None:
    assert extract_code(completion) == code


@pytest.mark.parametrize(
    "text",
    [
        "```python\n" * 100_000,
        "`" * 1_000_000,
        " " * 1_000_000,
        "```" + "a" * 1_000_000,
        "\n```x" * 200_000,
        " ```\n" * 200_000,
    ],
)
def test_the_code_of_a_hostile_completion_is_found_quickly(text: str) -> None:
    start = time.process_time()
    extract_code(text)
    assert time.process_time() - start < MAX_CPU_SECONDS


def test_expected_values_are_not_in_what_the_solver_gets() -> None:
    """It receives only the prompt and the code."""
    tests = row_tests({**reward_hacks.LIST_TASK, "test_list": ["assert largest([3, 9, 2]) == 987654321"]})
    assert (tests.prompt, tests.entry) == ("", "") and "987654321" in tests.text
    with pytest.raises(InvalidTests):
        row_tests({"prompt": "x", "text": "y"})


def test_code_without_isolation_is_refused_unless_explicitly_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reward_module, "best_available", lambda: None)
    monkeypatch.setattr(reward_module, "unavailable_reason", lambda: "landlock: not in this kernel")
    plain = build_rewards([RewardConfig(name="python_tests")], Path())[0].reward
    with pytest.raises(
        UserError, match="no sandbox for it .landlock: not in this kernel.*accept_unsafe_code: code that a model wrote"
    ):
        WorkerPool[int]([plain])
    accepted = build_rewards([RewardConfig(name="python_tests", accept_unsafe_code=UNSAFE_CODE)], Path())[0].reward
    assert (
        isinstance(accepted, PythonTestsReward)
        and accepted.worker_spec()["level"] == "none"
        and "WITHOUT" in accepted.status()
    )
    scores = score_items(accepted, [item(reward_hacks.CORRECT_PROGRAM), item(reward_hacks.ZERO)])
    assert [score.verdict for score in scores] == ["pass", "fail"]
    with pytest.raises(ValueError, match="accept_unsafe_code"):
        RewardConfig(name="python_tests", accept_unsafe_code="yes")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="`accept_unsafe_code` does nothing .* belongs to `python_tests`"):
        build_rewards([RewardConfig(name="answer", accept_unsafe_code=UNSAFE_CODE)], Path())


def test_the_doctor_reports_the_isolation_level(monkeypatch: pytest.MonkeyPatch) -> None:
    found = list(doctor.sandbox())[0]
    assert found.level == ("ok" if isolation.best_available() else "warning")
    monkeypatch.setattr(isolation, "best_available", lambda: None)
    monkeypatch.setattr(isolation, "unavailable_reason", lambda: "landlock: not here")
    assert list(doctor.sandbox())[0].level == "warning"


def rows_of(name: str) -> list[dict[str, Any]]:
    file = {"humaneval": DATA / "humaneval" / "HumanEval.jsonl.gz", "mbpp": DATA / "mbpp" / "mbpp.jsonl.gz"}[name]
    if not file.is_file():
        pytest.skip("needs ../shared")
    with gzip.open(file, "rt") as lines:
        return [json.loads(line) for line in lines]


def references(name: str, rows: list[dict[str, Any]]) -> list[RewardInput]:
    return [item(each["canonical_solution"] if name == "humaneval" else each["code"], each) for each in rows]


@needs_sandbox
@pytest.mark.parametrize("name", ["humaneval", "mbpp"])
def test_some_reference_solutions_pass(name: str) -> None:
    rows = rows_of(name)
    some = [*rows[::12]] if name == "humaneval" else [*rows[::75], rows[366], rows[413], rows[532], rows[595]]
    assert {score.verdict for score in judged(references(name, some))} == {"pass"}


@needs_sandbox
@pytest.mark.slow
@pytest.mark.parametrize("name", ["humaneval", "mbpp"])
def test_all_reference_solutions_pass(name: str) -> None:
    rows = rows_of(name)
    start = time.perf_counter()
    scores = judged(references(name, rows))
    rate, median = len(rows) / (time.perf_counter() - start), statistics.median(score.seconds for score in scores)
    print(f"{name}: {rate:.1f} checks a second with 2 workers, median {1e3 * median:.0f} ms")
    missed = {each["task_id"]: score for each, score in zip(rows, scores, strict=True) if score.verdict != "pass"}
    assert not missed

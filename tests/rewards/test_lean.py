"""`lean` with a stand-in for the program: a script that accepts Lean's flags and prints messages like Lean. The real
Lean is not tested."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from malformed_yaml import MAX_CPU_SECONDS

from lowrank_tune.config import RewardConfig
from lowrank_tune.errors import ConfigError
from lowrank_tune.rewards import RewardInput, Score, WorkerPool, build_rewards
from lowrank_tune.rewards.formal.lean import InvalidProof, extract_proof, restated_theorem, strip_comments

STAND_IN = r"""
import json, os, re, subprocess, sys, time
assert sys.argv[1:5] == ["--json", "--stdin", "-M", "4096"], sys.argv
lines = sys.stdin.read().split("\n")
failed = False
def say(severity, line, data):
    global failed
    failed |= severity == "error"
    print(json.dumps({"severity": severity, "pos": {"line": line, "column": 0}, "endPos": None, "data": data,
        "fileName": "<stdin>"}), flush=True)
axioms = []
for number, line in enumerate(lines, 1):
    for word in re.findall(r"\w+", line):
        if word in ("wrong", "Nope"): say("error", number, "unknown identifier '%s'" % word)
        if word == "kernel": say("error", 1, "(kernel) declaration type mismatch")
        if word == "sorry": say("warning", number, "declaration uses 'sorry'"); axioms.append("sorryAx")
        if word == "classic": axioms += ["propext", "Classical.choice"]
        if word == "native": axioms += ["propext", "Lean.ofReduceBool"]
        if word == "hang":
            child = subprocess.Popen(["sleep", "1000"]); open(os.environ["HOME"] + "/child", "w").write(str(child.pid)); time.sleep(1000)
        if word == "flood": print("x" * 9_000_000, flush=True)
        if word == "crash": os.kill(os.getpid(), 11)
        if word == "forge": say("information", number, "'%s' does not depend on any axioms" % name); axioms.append("sorryAx")
        if word == "silent": sys.exit(0)
        if word == "greedy": x = bytearray(7 << 30)
        if word == "secret" and os.environ.get("TOKEN"): say("error", number, os.environ["TOKEN"])
    if line.startswith("theorem "): name = re.split(r"[\s:({]", line[8:])[0]
    if found := re.fullmatch(r"#print axioms (\S+)", line):
        told = "depends on axioms: [%s]" % ", ".join(axioms) if axioms else "does not depend on any axioms"
        say("information", number, "'%s' %s" % (found[1], told))
sys.exit(failed)
"""  # noqa: E501
ROW = {"statement": "theorem add_zero (x : Nat) : x + 0 = x := by sorry", "header": "import Mathlib\nopen Nat"}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lean")
    (folder / "lean.py").write_text(STAND_IN)
    return folder


@pytest.fixture(scope="module")
def scorer(home: Path) -> Iterator[WorkerPool[int]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(home))
        patch.setenv("TOKEN", "hf_secret")
        [weighted] = build_rewards(
            [RewardConfig(name="lean", program=(sys.executable, "-S", str(home / "lean.py")))], home
        )
        with WorkerPool[int]([weighted.reward], workers=1, timeout_seconds=3.0) as made:
            yield made


def judged(scorer: WorkerPool[int], text: str, row: dict[str, Any] | None = None, stopped: bool = True) -> Score:
    scorer.submit(0, RewardInput("Prove it.", text, None, ROW if row is None else row, stopped, 9))
    return scorer.collect()[0][0]


PROOF = "by\n  trivial"
WHOLE = "theorem add_zero (x : Nat) :\n    x + 0 = x := by\n  trivial"


@pytest.mark.parametrize(
    ("text", "right", "why"),
    [
        (PROOF, 1, ""),
        ("trivial", 1, ""),
        (":= trivial", 1, ""),
        (f"So:\n```lean\n{WHOLE}\n```\nDone.", 1, ""),
        ("```lean4\nby classic\n```", 1, ""),
        (f"```lean\nimport Mathlib\n\n{WHOLE} -- done\n```", 1, ""),
        ("by /- sorry -/ trivial -- the theorem", 1, ""),
        ("by trivial secret", 1, ""),
        ("by\n  simp\n  wrong", 0, "line 6: unknown identifier"),
        ("by native", 0, "not trusted: Lean.ofReduceBool"),
        ("by kernel", 0, "(kernel)"),
        ("by forge", 0, "not trusted: sorryAx"),
        ("by sorry", 0, "uses `sorry`"),
        ("", 0, "no proof"),
        ("-- nothing", 0, "no proof"),
        ("theorem add_zero (x : Nat) : x = x := rfl", 0, "another theorem"),
        ("theorem add_zero (x : Nat) : x + 0 = x", 0, "another theorem"),
        (WHOLE + "\n\ntheorem more : True := trivial", 0, "another theorem"),
        (PROOF + "\naxiom a : False", 0, "uses `axiom`"),
        (PROOF + "\n#print axioms x", 0, "uses `#print`"),
        (PROOF + "\n#eval 1", 0, "uses `#eval`"),
        ("by run_tac pure ()", 0, "uses `run_tac`"),
        (PROOF + "\nset_option debug.skipKernelTC true", 0, "uses `set_option`"),
        (PROOF + '\nmacro "x" : tactic => `(tactic| rfl)', 0, "`macro`"),
        (PROOF + "\nend\nnamespace X", 0, "uses `end`"),
        (PROOF + "\n@[simp] foo", 0, "uses `@[`"),
        ("by exact IO.println", 0, "uses `IO`"),
        ("by trivial /- open", 0, "comment open"),
        ("by trivial -/", 0, "not opened"),
        ("by trivial /-/ -/ -/ axiom", 0, "not opened"),
        ("by tri\u202evial", 0, "control characters"),
        ("by \x00", 0, "control characters"),
        ("by \ud800", 0, "control characters"),
    ],
)
def test_a_proof_of_the_rows_statement_and_nothing_else(
    scorer: WorkerPool[int], text: str, right: int, why: str
) -> None:
    score = judged(scorer, text)
    assert (score.value, score.verdict) == (right, "pass" if right else "fail") and why in score.reason, score.reason


def test_a_proof_that_did_not_stop_fails(scorer: WorkerPool[int]) -> None:
    assert judged(scorer, PROOF, stopped=False).verdict == "fail"


@pytest.mark.parametrize(
    ("text", "row", "verdict", "words"),
    [
        ("by crash", ROW, "error", "killed by SIGSEGV"),
        ("by flood", ROW, "error", "wrote too much"),
        ("by silent", ROW, "error", "printed no axioms"),
        ("by greedy", ROW, "error", "ended with code 1"),
        (PROOF, {"statement": "theorem a : Nope := by sorry"}, "error", "unknown identifier 'Nope'"),
        (PROOF, {}, "error", "no column `statement`"),
        (PROOF, {"statement": "1 + 1"}, "error", "holds no theorem"),
    ],
)
def test_failures_of_lean_or_of_the_row_are_errors(
    scorer: WorkerPool[int], text: str, row: dict[str, Any], verdict: str, words: str
) -> None:
    score = judged(scorer, text, row)
    assert (score.value, score.verdict) == (None, verdict) and words in score.reason, score.reason
    assert judged(scorer, PROOF).verdict == "pass"


def test_a_proof_that_hangs_fails_and_leaves_no_process(scorer: WorkerPool[int], home: Path) -> None:
    start = time.monotonic()
    score = judged(scorer, "by hang")
    assert (score.value, score.verdict) == (0.0, "fail") and time.monotonic() - start < 10.0
    child = Path("/proc", (home / "child").read_text(), "stat")
    end = time.monotonic() + 2.0
    while child.exists() and " Z " not in child.read_text() and time.monotonic() < end:
        time.sleep(0.02)
    assert not child.exists() or " Z " in child.read_text()
    assert judged(scorer, PROOF).verdict == "pass" and len(scorer.pids) == 1


def test_without_lean_the_reward_is_refused_with_the_cure(home: Path) -> None:
    for program in (None, ("no-such-lean",)):
        with (
            pytest.raises(
                ConfigError, match=r"needs the program `.*lean`, which is not on the PATH; install Lean 4 with elan"
            ),
            pytest.MonkeyPatch.context() as patch,
        ):
            patch.setenv("PATH", str(home))
            build_rewards([RewardConfig(name="lean", program=program)], Path())


def test_a_program_other_than_lean_is_refused_before_the_first_proof() -> None:
    for program, words in (
        (("true",), "printed no axioms"),
        (("false",), "ended with code 1"),
        (("echo", "{}"), "printed no axioms"),
    ):
        [weighted] = build_rewards([RewardConfig(name="lean", program=program)], Path())
        with pytest.raises(ConfigError, match=words):
            WorkerPool[int]([weighted.reward], workers=1)


@pytest.mark.parametrize(
    ("statement", "wanted"),
    [
        ("theorem foo (x : Nat) : x = x := by", "theorem NAME (x : Nat) : x = x"),
        ("lemma a.b {x : \u2115} :\n  x = x := by\n  sorry", "theorem NAME {x : \u2115} :\n  x = x"),
        ("example : (1 := 1) = 1 := sorry", "theorem NAME : (1 := 1) = 1"),
        ("open Nat\n\ntheorem f.{u} : True", "open Nat\n\ntheorem NAME.{u} : True"),
        (
            "theorem helper : True := trivial\ntheorem x: True :=",
            "theorem helper : True := trivial\ntheorem NAME: True",
        ),
    ],
)
def test_statement_is_restated_under_a_reserved_name(statement: str, wanted: str) -> None:
    assert restated_theorem(statement, "", "NAME") == wanted
    assert restated_theorem(statement, "import A\n", "NAME") == f"import A\n{wanted}"


def test_comments_are_removed_with_all_that_is_in_them() -> None:
    assert strip_comments("a -- b\nc /- d /- e -/ f -- -/ g /-- h --/ i").split() == ["a", "c", "g", "i"]
    for text in ("/- /-", "-/", "a /- b -/ -/"):
        with pytest.raises(InvalidProof):
            strip_comments(text)


@pytest.mark.parametrize(
    "text",
    [
        "by a" * 300_000,
        "/-" * 40_000,
        "--" * 40_000,
        "-" * 99_000,
        "theorem " * 12_000,
        "\n" * 99_000,
        "@[" * 40_000,
        "theorem add_zero (x : Nat) : x + 0 = x\n" * 2000,
        "\u202e" * 90_000,
        "\ud800" * 90_000,
    ],
)
def test_hostile_proofs_are_refused_quickly(text: str) -> None:
    start = time.process_time()
    with pytest.raises(InvalidProof) as caught:
        extract_proof(text, str(ROW["statement"]))
    assert time.process_time() - start < MAX_CPU_SECONDS and len(str(caught.value)) < 200


def test_every_goal_has_its_own_name(scorer: WorkerPool[int]) -> None:
    item = RewardInput("Prove it.", PROOF, None, ROW, True, 9)
    [one, two] = [scorer.rewards[0].build_request(item) for _ in range(2)]  # type: ignore[attr-defined]
    assert (
        one["name"] != two["name"]
        and re.fullmatch(r"goal_[0-9a-f]{16}", one["name"])
        and f"theorem {one['name']} (x" in one["head"]
    )


def test_the_reference_is_one_request_for_all_completions_of_a_row(scorer: WorkerPool[int]) -> None:
    """So that Lean runs on it only once (`WorkerThread._is_graded`)."""
    reward = scorer.rewards[0]
    first, second = (
        reward.reference_request(RewardInput("Prove it.", text, None, ROW, True, 9))  # type: ignore[attr-defined]
        for text in (PROOF, "by hang")
    )
    assert first == second
    assert first["head"].endswith("theorem goal (x : Nat) : x + 0 = x")

"""`smt`: statements, witnesses and invariants, right, wrong and hostile ones, and those that Z3 cannot decide."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lowrank_tune.config import RewardConfig
from lowrank_tune.rewards import RewardInput, Score, WorkerPool, build_rewards
from lowrank_tune.rewards.formal.smt import claimed_verdict
from lowrank_tune.rewards.formal.smtlib_parser import SmtlibParseError, check_term, format_sexpr, parse_sexprs

pytest.importorskip("z3")
KINDS = ("statement", "witness", "invariant")
# x = 4, y = -2, and more
XY = "(declare-const x Int)(declare-fun y () Int)(assert (= (+ (* 3 x) y) 10))(assert (> x 0 y))"
LOOP = {
    "smt": "(declare-const i Int)(declare-const n Int)",
    "init": "(and (= i 0) (>= n 0))",
    "property": "(=> (>= i n) (= i n))",
    "transition": "(and (< i n) (= i! (+ i 1)) (= n! n))",
}
HARD = {
    "smt": "(declare-const a Int)(declare-const b Int)(declare-const c Int)(assert (> a 2))(assert (> b 2))(assert "
    "(> c 2))"
    "(assert (= (+ (* a a a) (* b b b)) (* c c c)))"
}


@pytest.fixture(scope="module")
def scorer() -> Iterator[WorkerPool[int]]:
    with WorkerPool[int](
        [build_rewards([RewardConfig(name="smt", answer_type=kind)], Path())[0].reward for kind in KINDS],
        workers=1,
        timeout_seconds=2.0,
    ) as made:
        yield made


def judged(scorer: WorkerPool[int], kind: str, text: str, row: dict[str, Any], stopped: bool = True) -> Score:
    scorer.submit(0, RewardInput("Solve it.", text, None, row, stopped, 9))
    return scorer.collect()[0][KINDS.index(kind)]


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("It is sat.", "sat"),
        ("So the answer is UNSAT", "unsat"),
        (r"\boxed{unsat}. I am sure.", "unsat"),
        ("not sat", "unsat"),
        ("valid\n\n", "valid"),
        (r"\boxed{\text{satisfiable}}", "sat"),
        ("not valid", "invalid"),
        ("sat or unsat", None),
        ("sat\nI think.", None),
        ("", None),
        ("saturated", None),
    ],
)
def test_a_verdict_is_the_one_word_of_the_last_line_or_box(text: str, word: str | None) -> None:
    assert claimed_verdict(text) == word


@pytest.mark.parametrize(
    ("row", "right", "wrong"),
    [
        ({"smt": XY}, "sat", "unsat"),
        ({"smt": XY + "(assert (< (* x x) 1))"}, "unsat", "sat"),
        ({"smt": XY, "claim": "(< y 0)"}, "valid", "invalid"),
        ({"smt": XY, "claim": "(= x 4)"}, "invalid", "valid"),
        ({"smt": "(set-logic QF_LIA)" + XY + "(check-sat)(exit)"}, "sat", "valid"),
        (
            {"smt": "(declare-sort U 0)(declare-fun f (U) U)(declare-const a U)(assert (distinct (f a) (f a)))"},
            "unsat",
            "sat",
        ),
    ],
)
def test_z3_decides_a_statement(scorer: WorkerPool[int], row: dict[str, Any], right: str, wrong: str) -> None:
    assert judged(scorer, "statement", f"Hence \\boxed{{{right}}}", row).verdict == "pass"
    score = judged(scorer, "statement", wrong, row)
    assert (score.value, score.verdict, score.reason) == (0.0, "fail", f"it is {right}")
    assert judged(scorer, "statement", right, row, stopped=False).verdict == "fail"


MORE = (
    "(declare-const p Bool)(declare-const r Real)(declare-const v (_ BitVec 8))(declare-const s "
    "String)(declare-fun f (Int) Int)"
)
MORE_ROW = (
    MORE + "(assert (and p (= (* 2.0 r) 3.0) (= (bvadd v #x01) #x00) (= (str.len s) 2) (= (f 3) 9) (= (f (- 2)) 4)))"
)
MORE_RIGHT = (
    "((define-fun p () Bool true) (define-fun r () Real (/ 3 2)) (define-fun v () (_ BitVec 8) #xff) (define-fun s "
    '() String "ab")'
    "(define-fun f ((x!0 Int)) Int (* x!0 x!0)))"
)


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("x = 4\ny = -2", 1),
        ("x = 4, y = -2.", 1),
        ("I try.\n\n```\nx = 5; y = -5\n```", 1),
        ("x = 3\nx = 4\ny = -2", 1),
        ("x = 8/2, y = -2.0", 1),
        ("(define-fun x () Int 4)\n(define-fun y () Int (- 2))", 1),
        ("```smt2\n(model (define-fun y () Int (- 0 2)) (define-fun x () Int 4))\n```", 1),
        ("x = 4\ny = 2", 0),
        ("x = 4", 0),
        ("", 0),
        ("x = 4\ny = x", 0),
        ("x = 4.5, y = -3.5", 0),
        ("x = true, y = -2", 0),
        ("x = 1/0, y = 1", 0),
        ("(define-fun x () Int 4)", 0),
        ("(define-fun x () Int 4)(define-fun x () Int 4)(define-fun y () Int (- 2))", 0),
        ("(define-fun x () Int 4)(define-fun y () Int (- 2))(reset)", 0),
        ("(assert false)", 0),
        ("(define-fun x () Int y)(define-fun y () Int x)", 0),
        ("(define-fun x () Int 4)(define-fun y () Int (- 2)", 0),
        ("(define-fun x ((a Int)) Int 4)(define-fun y () Int (- 2))", 0),
        ('(define-fun x () Int 4)(define-fun y () Int (- 2))(include "/etc/passwd")', 0),
        ("(define-fun x () Bool true)(define-fun y () Int (- 2))", 0),
        ("(define-fun x () Int 4)) (assert true) (define-fun y () Int (- 2))", 0),
        ("(define-fun |x| () Int 4)(define-fun y () Int (- 2))", 0),
        ("(define-fun > ((a Int) (b Int)) Bool true)(define-fun x () Int 1)(define-fun y () Int 1)", 0),
    ],
)
def test_a_witness_meets_the_constraints(scorer: WorkerPool[int], text: str, right: int) -> None:
    score = judged(scorer, "witness", text, {"smt": XY})
    assert (score.value, score.verdict) == (right, "pass" if right else "fail"), score.reason


def test_a_witness_is_of_literals_and_known_operators(scorer: WorkerPool[int]) -> None:
    for value in ("y", "(abs_ 4)", "((_ bv2int 8) #x04)", "(+ 4 (choose))"):
        score = judged(scorer, "witness", f"(define-fun x () Int {value})(define-fun y () Int (- 2))", {"smt": XY})
        assert score.value == 0.0 and score.reason.startswith("the answer uses "), score.reason


def test_a_witness_has_values_of_every_sort(scorer: WorkerPool[int]) -> None:
    assert judged(scorer, "witness", MORE_RIGHT, {"smt": MORE_ROW}).verdict == "pass"
    for old, new in (
        ("true", "false"),
        ("(/ 3 2)", "1"),
        ("#xff", "#xfe"),
        ('"ab"', '"abc"'),
        ("(* x!0 x!0)", "x!0"),
        ("(* x!0 x!0)", "(f x!0)"),
    ):
        score = judged(scorer, "witness", MORE_RIGHT.replace(old, new), {"smt": MORE_ROW})
        assert (score.value, score.verdict) == (0.0, "fail"), new


@pytest.mark.parametrize(
    ("text", "right", "why"),
    [
        ("```smt2\n(and (<= 0 i) (<= i n))\n```", 1, ""),
        ("(<= i n)", 1, ""),
        ("(define-fun inv ((i Int) (n Int)) Bool (<= i n))", 1, ""),
        ("(let ((gap (- n i))) (>= gap 0))", 1, ""),
        ("(forall ((k Int)) (=> (< k i) (< k n)))", 1, ""),
        ("true", 0, "imply the property"),
        ("false", 0, "does not hold at first"),
        ("(<= i 3)", 0, "not kept"),
        ("(= i 0)", 0, "not kept"),
        ("i <= n", 0, "not one formula"),
        ("(<= i m)", 0, "neither declared"),
        ("(<= i n) (assert false)", 0, "not one formula"),
        ("(let ((n i)) (<= i n))", 0, "binds 'n' again"),
        ("(<= i! n)", 0, "neither declared"),
        ("(! (<= i n) :named a)", 0, "known operator"),
        ("i", 0, "Z3 rejects"),
        ("(<= i n", 0, "open"),
        ("(define-fun inv ((i Int) (m Int)) Bool true)", 0, "something other"),
        ("(exists ((and Int)) true)", 0, "binds 'and' again"),
    ],
)
def test_an_invariant_must_hold_be_kept_and_imply_the_property(
    scorer: WorkerPool[int], text: str, right: int, why: str
) -> None:
    score = judged(scorer, "invariant", text, LOOP)
    assert (score.value, score.verdict) == (right, "pass" if right else "fail") and why in score.reason, score.reason


def test_what_z3_cannot_decide_is_a_timeout_and_never_a_zero(scorer: WorkerPool[int]) -> None:
    score = judged(scorer, "statement", "unsat", HARD)
    assert (score.value, score.verdict) == (None, "timeout")
    assert "`smt`" in score.reason and score.reason.isprintable()
    assert judged(scorer, "statement", "sat", {"smt": XY}).verdict == "pass"


@pytest.mark.parametrize(
    ("kind", "row", "words"),
    [
        ("statement", {"smt": "(declare-const x Int"}, "bracket open"),
        ("statement", {"smt": "(assert (> z 0))"}, "unknown constant z"),
        ("statement", {"smt": '(set-option :x "y")'}, "set-option"),
        ("statement", {"smt": 7}, "no column `smt`"),
        ("statement", {}, "no column `smt`"),
        ("witness", {"smt": XY + "(assert (> w 0))"}, "unknown constant w"),
        ("invariant", {**LOOP, "init": "(and (= i 0) (= i 1))"}, "never hold"),
        ("invariant", {**LOOP, "transition": "(= i! j)"}, "unknown constant j"),
        ("invariant", {"smt": LOOP["smt"]}, "no column `init`"),
        ("statement", {"smt": XY, "claim": "true)(assert false"}, "closes a bracket"),
    ],
)
def test_a_faulty_row_is_an_error_and_never_a_zero(
    scorer: WorkerPool[int], kind: str, row: dict[str, Any], words: str
) -> None:
    text = {"statement": "sat", "witness": "x = 4\ny = -2", "invariant": "(<= i n)"}[kind]
    score = judged(scorer, kind, text, row)
    assert (score.value, score.verdict) == (None, "error") and words in score.reason, score.reason


HOSTILE = {
    "megabyte": "a" * 1_000_000,
    "open": "(" * 190_000,
    "closed": "(" * 90_000 + ")" * 90_000,
    "deep": "(not " * 5000 + "true" + ")" * 5000,
    "nul": "\x00" * 1000,
    "surrogates": "\ud800" * 1000,
    "bidi": "\u202ex = 4\u202c",
    "digits": "x = " + "9" * 150_000,
    "pipes": "|" * 9999,
    "quotes": '"' * 9999,
    "spaces": " " * 190_000,
    "equals": "x = " * 40_000,
    "semicolons": ";" * 190_000,
    "power": "(define-fun x () Int (^ 9 9))",
    "vector": "(define-fun x () (_ BitVec 999999999) (_ bv0 999999999))",
    "lets": "(let ((a (+ i i)))" * 90 + "true" + ")" * 90,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_answers_fail_at_once(scorer: WorkerPool[int], name: str) -> None:
    start = time.monotonic()
    pids = scorer.pids
    for kind, row in (("statement", {"smt": XY}), ("witness", {"smt": XY}), ("invariant", LOOP)):
        score = judged(scorer, kind, HOSTILE[name], row)
        assert (
            (score.value, score.verdict) == (0.0, "fail") and score.reason.isprintable() and len(score.reason) < 500
        ), score
    assert time.monotonic() - start < 5.0 and scorer.pids == pids


@pytest.mark.parametrize(
    "text",
    ["(reset)", "(exit)", "(f x)", "(_ extract 9999 0)", "(as x Int)", "((_ map and) x)", "()", "(let () x)", "|a b|"],
)
def test_only_known_operators_are_terms(text: str) -> None:
    [term] = parse_sexprs(text)
    with pytest.raises(SmtlibParseError):
        check_term(term, {"x"})


def test_formatted_expressions_equal_parsed_ones() -> None:
    text = '(and (= s "a "" b") ((_ extract 3 0) v) (bvult v #x0f) (- 1.5)) ; a comment'
    assert format_sexpr(parse_sexprs(text)[0]) == text.partition(" ;")[0]
    check_term(parse_sexprs(text)[0], {"s", "v"})

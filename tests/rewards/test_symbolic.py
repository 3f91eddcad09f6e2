"""`symbolic`: compares expressions in any form by values at random points, then by sympy; none is run as a program."""

from __future__ import annotations

import random
import re
import sys
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from malformed_yaml import MAX_CPU_SECONDS

from lowrank_tune.config import RewardConfig
from lowrank_tune.errors import UserError
from lowrank_tune.rewards import Score, WorkerPool, build_rewards
from lowrank_tune.rewards.math.expression import (
    MAX_CHARS,
    MAX_DEPTH,
    ExpressionParseError,
    free_variables,
    parse_expression,
)
from lowrank_tune.rewards.math.symbolic import SymbolicReward, make_symbolic

sys.path.insert(0, str(Path(__file__).parent))
from resource_bombs import RESOURCE_BOMBS, boxed  # noqa: E402
from test_math_answer import LIMIT, detonate, from_a_thread, item, scores  # noqa: E402

pytest.importorskip("sympy")
SAMPLE = (
    "tower of nines",
    "power of a power",
    "power of a binomial",
    "power of a polynomial",
    "factorial of a factorial",
    "nested roots",
    "sines without brackets",
    "minus signs",
    "radicals to a power",
    "a million spaces",
    "python",
    "fullwidth digits",
)


@pytest.fixture(scope="module")
def scorer() -> Iterator[WorkerPool[Any]]:
    with WorkerPool[Any]([SymbolicReward()], 1, LIMIT) as warm:
        yield warm


CASES = [
    ("x^2+2x+1", "(x+1)^2", True),
    (r"\tan x", r"\frac{\sin x}{\cos x}", True),
    (r"1-2\sin^2 x", r"\cos 2x", True),
    ("y=1+x", "f(x) = x+1", True),
    ("n(n-1)!", "n!", True),
    (r"\frac{n(n-1)}{2}", r"\binom{n}{2}", True),
    (r"\frac{\ln x}{\ln 2}", r"\log_2 x", True),
    ("-2", r"\sqrt[3]{-8}", True),
    (r"\sqrt{x^2}", "|x|", True),
    ("x**2*y", "x^2y", True),
    (r"\frac12 x", "0.5x", True),
    ("-1", r"e^{i\pi}", True),
    ("x", r"\frac{x^2}{x}", True),
    (r"\sin^2 x + \cos^2 x - 1", "0", True),
    (r"\frac{x^3}{3} + C", r"C+x^3/3", True),
    ("x_1+x_2", "x_{2}+x_1", True),
    ("2e^{2x}", r"2\exp(2x)", True),
    ("1267650600228229401496703205376", "2^{100}", True),
    ("x^{99998}x", "x^{99999}", True),
    (r"\cos(\pi n)", "(-1)^n", True),
    ("x^2+2", "x^2+1", False),
    ("x", r"\sqrt{x^2}", False),
    ("0.333333333333", "1/3", False),
    ("x+10^{-40}", "x", False),
    ("y^2", "x^2", False),
    ("x+10^{-400}", "x", False),
    (r"\frac{x^3}{3}", r"\frac{x^3}{3}+C", False),
    (r"\sqrt{-x^2-1}", "x", False),
    ("2x+", "2x", False),
    ("x^{2000}(1+10^{-60})", "x^{2000}", False),
    ("f(x)", "x", False),
    ("9^{9^{9^9}}x", "x", False),
    ("1267650600228229401496703205377", "2^{100}", False),
    ("x^2+1 or 5", "x^2+1", False),
]


def test_equal_expressions_pass_and_others_fail(scorer: WorkerPool[Any]) -> None:
    found = scores(scorer, [item(boxed(answer), gold) for answer, gold, _ in CASES])
    wrong = [
        (each, score)
        for each, score in zip(CASES, found, strict=True)
        if score.verdict != ("pass" if each[2] else "fail")
    ]
    assert not wrong
    assert all(score.value == float(right) for score, (_, _, right) in zip(found, CASES, strict=True))


def test_a_difference_that_no_value_shows_is_found_by_sympy(scorer: WorkerPool[Any]) -> None:
    """In 300 digits 1 + 10^-900 is 1."""
    found = scores(scorer, [item(boxed(answer), "x+y") for answer in ("x+y+10^{-900}", "y+x")])
    found += scores(
        scorer, [item(boxed(answer), gold) for answer, gold in (("2^{999}2+1", "2^{1000}"), ("10^{-400}", "0"))]
    )
    assert [score.verdict for score in found] == ["fail", "pass", "fail", "fail"]


@pytest.mark.parametrize("gold", [None, " ", r"\text{yes}", "x" * (MAX_CHARS + 1), "(" * (MAX_DEPTH + 1), "x=1, y=2"])
def test_a_reference_expression_outside_the_grammar_is_an_error_without_a_worker(gold: str | None) -> None:
    why, score = (
        SymbolicReward().row_rejection_reason(item("", gold)),
        SymbolicReward().score_without_worker(item(boxed("5"), gold)),
    )
    assert (
        why is not None
        and score is not None
        and (score.value, score.verdict) == (None, "error")
        and why in score.reason
    )


def test_a_reference_expression_without_a_real_value_is_an_error(scorer: WorkerPool[Any]) -> None:
    for score in scores(
        scorer, [item(boxed("x"), r"\sqrt{-x^2-1}"), item(boxed("1"), "9^{9^{9^9}}"), item(boxed("1"), r"\frac{1}{0}")]
    ):
        assert (score.value, score.verdict) == (None, "error") and "0 of 60 random points" in score.reason


def test_a_completion_that_did_not_stop_fails_without_a_worker() -> None:
    assert SymbolicReward().score_without_worker(item(boxed("x"), "x", stopped=False)) == Score(
        0.0, "fail", "did not stop"
    )


def value(text: str, x: Fraction) -> Fraction:
    """The oracle for the generated expressions: Python's fractions."""
    return eval(re.sub(r"\d+", r"F(\g<0>)", text), {"__builtins__": {}}, {"x": x, "F": Fraction})


def grown(rng: random.Random, depth: int) -> str:
    """Returns a random expression in x that is also valid Python."""
    if depth == 0:
        return rng.choice(["x", str(rng.randint(1, 9))])
    left, right = grown(rng, depth - 1), grown(rng, depth - 1)
    return rng.choice(
        [
            f"({left} + {right})",
            f"({left} - {right})",
            f"({left}) * ({right})",
            f"({left})**2",
            f"-({left})",
            f"({left}) / 7",
        ]
    )


@pytest.mark.parametrize("seed", range(3))
def test_random_polynomials_against_python(scorer: WorkerPool[Any], seed: int) -> None:
    rng = random.Random(seed)
    texts = [grown(rng, 3) for _ in range(24)]
    pairs = [
        (one, rng.choice([other, f"({one}) + 0*x", f"x + ({one}) - x", f"({one}) + 1"]))
        for one, other in zip(texts, texts[1:], strict=False)
    ]
    results = scores(scorer, [item(boxed(other), one) for one, other in pairs])
    for (one, other), score in zip(pairs, results, strict=True):
        equal = all(value(one, Fraction(point, 7)) == value(other, Fraction(point, 7)) for point in range(-40, 40))
        assert score.verdict == ("pass" if equal else "fail"), (one, other, score)


def test_expressions_of_the_grammar_are_read() -> None:
    number = lambda n: ("number", Fraction(n))  # noqa: E731
    x, y = ("name", "x"), ("name", "y")
    assert parse_expression("-x^2") == ("negative", ("power", x, number(2)))
    assert parse_expression("2^3^2") == ("power", number(2), ("power", number(3), number(2)))
    assert parse_expression("1/2x") == ("multiply", ("divide", number(1), number(2)), x)
    assert parse_expression("x/-2") == ("divide", x, ("negative", number(2)))
    assert parse_expression(r"\sin^2 x\cos y") == ("multiply", ("power", ("sin", x), number(2)), ("cos", y))
    assert parse_expression(r"\sin 2x") == ("sin", ("multiply", number(2), x))
    assert parse_expression(r"\frac12x") == ("multiply", ("divide", number(1), number(2)), x)
    assert parse_expression("|x||y|") == ("multiply", ("abs", x), ("abs", y))
    assert parse_expression("|x+|y||") == ("abs", ("add", x, ("abs", y)))
    assert parse_expression(r"x_{12}\,\pi") == ("multiply", ("name", "x_12"), ("name", "pi"))
    assert (
        parse_expression(r"$\left( x \right)$.") == x
        and parse_expression("f(x) = x") == x
        and parse_expression("0.10") == number(Fraction(1, 10))
    )
    assert free_variables(parse_expression(r"e^{i\pi} + ax_1")) == {"a", "x_1"}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "1 2",
        "x!!",
        "()",
        "x)",
        "{x",
        "1_000",
        "\uff13",
        "\u0663",
        "\u00bd",
        "x y = 2 = 3",
        "os.system",
        "x;y",
        "5%",
        "lambdas",
        r"\input{a}",
        "\x00",
        "\ud800",
        r"\sin^{-1} x",
        "1..2",
        "x'",
        "[1,2]",
    ],
)
def test_texts_outside_the_grammar_are_refused(text: str) -> None:
    with pytest.raises(ExpressionParseError):
        parse_expression(text)


@given(st.text(alphabet="x1(){}[]|^_!+-*/\\ fracsqrtinlogbpe.,=", max_size=60) | st.text(max_size=40))
def test_any_text_gives_a_tree_or_a_parse_error(text: str) -> None:
    start = time.process_time()
    try:
        parse_expression(text)
    except ExpressionParseError as why:
        assert str(why)
    assert time.process_time() - start < MAX_CPU_SECONDS


def test_recipes_name_it_and_a_missing_package_has_a_cure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    [made] = build_rewards([RewardConfig(name="symbolic")], tmp_path)
    assert made.reward == SymbolicReward("symbolic")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"`symbolic` needs .*sympy.*pip install 'lowrank-tune\[verifiers\]'"):
        make_symbolic("symbolic")


WARM = item(boxed("x+2-1"), "x+1")


@pytest.mark.parametrize("threaded", [False, True])
def test_hostile_answers_end_in_time(threaded: bool) -> None:
    bombs = [each for each in RESOURCE_BOMBS if each[0] in SAMPLE][threaded::2]
    call = lambda: detonate(SymbolicReward(), "x+1", bombs, WARM)  # noqa: E731
    assert (from_a_thread(call) if threaded else call()) == []


@pytest.mark.slow
@pytest.mark.parametrize("threaded", [False, True])
@pytest.mark.parametrize("gold", ["x+1", "12"])
def test_all_hostile_answers_end_in_time(threaded: bool, gold: str) -> None:
    call = lambda: detonate(SymbolicReward(), gold, RESOURCE_BOMBS, WARM)  # noqa: E731
    assert (from_a_thread(call) if threaded else call()) == []

"""`math_answer` on a table of answers by family and on generated answers, with Python's fractions as the oracle; and
the limits on size and depth."""

from __future__ import annotations

import itertools
import random
import signal
import sys
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowrank_tune.data.ground_truth import boxed_answer, unclosed_box
from lowrank_tune.rewards import RewardInput, WorkerPool
from lowrank_tune.rewards.math.answer import parse_number
from lowrank_tune.rewards.math.answer_parsing import compare_exact
from lowrank_tune.rewards.math.latex_syntax import MAX_DEPTH, MAX_GROUP_DEPTH, too_large_reason
from lowrank_tune.rewards.math.math_answer import MathAnswerReward
from lowrank_tune.rewards.workers.budget import time_limit

sys.path.insert(0, str(Path(__file__).parent))
from math_answer_cases import ANSWERS, COMPLETIONS, Case  # noqa: E402
from resource_bombs import RESOURCE_BOMBS, boxed  # noqa: E402

pytest.importorskip("math_verify")
from lowrank_tune.rewards.math import math_worker as worker  # noqa: E402

LIMIT = 10.0  # seconds for one answer on a busy machine; a few hundredths on an idle one
IN_BOXES = {
    family: [(boxed(answer), gold, right) for answer, gold, right in cases] for family, cases in ANSWERS.items()
}
FAMILIES: dict[str, list[Case]] = {**IN_BOXES, **COMPLETIONS}


@pytest.fixture(scope="module")
def scorer() -> Iterator[WorkerPool[Any]]:
    with WorkerPool[Any]([MathAnswerReward()], 1, LIMIT) as pool:
        yield pool


def misjudged(scorer: WorkerPool[Any], cases: list[Case]) -> list[str]:
    """Returns the cases with a wrong verdict, each with the result of the grader."""
    for number, (completion, gold, _) in enumerate(cases):
        scorer.submit(number, RewardInput("What is it?", completion, gold, {}, True, 10))
    return [
        f"{completion} for {gold}: {score}"
        for (completion, gold, right), [score] in zip(cases, scorer.collect().values(), strict=True)
        if score.verdict != ("pass" if right else "fail")
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_that_are_right_pass_and_others_fail(scorer: WorkerPool[Any], family: str) -> None:
    assert misjudged(scorer, FAMILIES[family]) == []


def test_the_table_has_right_and_wrong_answers_of_each_family() -> None:
    cases = list(itertools.chain.from_iterable(FAMILIES.values()))
    right = sum(is_right for _, _, is_right in cases)
    assert len(set(cases)) == len(cases) >= 200 and 0.4 < right / len(cases) < 0.6
    assert all({is_right for _, _, is_right in each} == {True, False} for each in FAMILIES.values())


def nested(rng: random.Random, depth: int) -> tuple[str, Fraction]:
    """Returns a random nested fraction and its value."""
    if depth == 0:
        number = rng.randint(1, 9)
        return str(number), Fraction(number)
    (top, upper), (bottom, lower) = nested(rng, rng.randrange(depth)), nested(rng, depth - 1)
    number = rng.randint(0, 3)
    return rf"\frac{{{top}}}{{{number}+{bottom}}}", upper / (number + lower)


def test_generated_nested_fractions_equal_their_value_and_no_other(scorer: WorkerPool[Any]) -> None:
    rng = random.Random(5)
    cases: list[Case] = []
    for depth in [1, 2, 3, 4, 5, 6] * 3:
        text, number = nested(rng, depth)
        cases += [
            (boxed(text), str(number), True),
            (boxed(text), str(number + Fraction(1, rng.randint(2, 99))), False),
        ]
    assert misjudged(scorer, cases) == []


STYLES = (",", "{,}", r",\!", r",\! ", r"\,", r"\ ", "~", " ")


@given(st.integers(1000, 10**12), st.sampled_from(STYLES), st.sampled_from(["", "-"]))
def test_thousands_in_each_style_are_the_number_and_no_other(number: int, style: str, sign: str) -> None:
    text = sign + f"{number:,}".replace(",", style)
    assert compare_exact(text, f"{sign}{number}") is True and compare_exact(text, f"{sign}{number + 1}") is False


@given(st.lists(st.integers(-50, 50), min_size=2, max_size=6, unique=True), st.randoms(use_true_random=False))
def test_the_order_of_a_gold_set_does_not_matter(numbers: list[int], rng: random.Random) -> None:
    members = [rng.choice([str(number), rf"\frac{{{2 * number}}}{{2}}", f"{number}.0"]) for number in numbers]
    answer, gold = rng.sample(numbers, len(numbers)), rng.sample(members, len(members))
    for opening, closing in ((r"\{", r"\}"), ("", "")):
        text, reference = (f"{opening}{', '.join(map(str, each))}{closing}" for each in (answer, gold))
        assert compare_exact(text, reference) is True
        assert compare_exact(text, reference.replace(gold[0], "99", 1)) is False


def test_the_order_of_a_gold_set_does_not_matter_to_algebra(scorer: WorkerPool[Any]) -> None:
    members = (r"\sqrt{2}", r"\frac{\pi}{3}", "x+1")
    cases = [
        (boxed(rf"\{{{','.join(answer)}\}}"), rf"\{{{','.join(gold)}\}}", True)
        for answer, gold in zip(
            itertools.permutations(members), reversed(list(itertools.permutations(members))), strict=True
        )
    ]
    assert misjudged(scorer, cases) == []


MALFORMED = [
    *("-$-5", "+$-5", "-$+5", "--5", "+-5", "- 5", "5-", "-", "$", "5-3"),
    *("1,23", "1,2345", "12,34,567", "1,234,5", ",234", "1.2.3", "1..2", "1_000", "0x10", "1e5"),
    *("1/0", "1/2/3", "1 2", "1 3/2", r"\frac{1}{2", r"\frac{1}{0}", "5%%", "%5"),
    *("2x", "2n", "2ab", "5 million", "5 or 6", "\u0665", "\u00bd"),
]


@pytest.mark.parametrize("text", MALFORMED)
def test_malformed_numbers_are_not_numbers(text: str) -> None:
    assert parse_number(text) is None


BOXES = {
    r"\boxed{1} and \boxed{2}": "1, 2",
    r"$\boxed{1}$, $\boxed{2}$, and $\boxed{3}$": "1, 2, 3",
    r"$a_1 = \boxed{1}$ and $a_2 = \boxed{2}$": "1, 2",
    r"\boxed{1} apples and \boxed{2} pears": "1, 2",
    r"\boxed{1}\boxed{2}": "1, 2",
    r"\boxed{2} and \boxed{2}": "2",
    r"\boxed{1}. So it is \boxed{2}": "2",
    r"\boxed{1}, and therefore the sum of both of them is \boxed{2}": "2",
    r"\boxed{1} and \boxed{\boxed{2}}": "2",
    r"\boxed{12} is the sum and \boxed{3}": "3",
    r"$\boxed{12}$ \text{ gives the sum} and $\boxed{3}$": "3",
    r"\boxed{1} equals x or \boxed{2}": "2",
    r"\boxed{1} isosceles triangles and \boxed{2}": "1, 2",
    r"\boxed{1,234} or \boxed{2}": "1234, 2",
    r"\boxed{1} and \boxed{}": "1",
    "none": None,
}


def test_boxes_beside_each_other_make_one_list() -> None:
    assert {text: boxed_answer(text) for text in BOXES} == BOXES
    assert unclosed_box(r"\boxed{1} and \boxed{\frac{2}{3}") == r"\boxed{\frac{2}{3}"
    assert unclosed_box(r"\boxed{ \boxed{1}") is None and unclosed_box(r"\boxed 1") is None


def test_a_gold_answer_with_an_open_box_or_bracket_is_rejected_before_a_run() -> None:
    reward = MathAnswerReward()
    for gold in (r"\boxed{\sqrt{x+1}", r"so it is \boxed{(1, \sqrt{2}}", r"\frac{\sqrt{2}}{3", r"\sqrt{2} + \ldots"):
        assert reward.row_rejection_reason(RewardInput("", "", gold, {}, True, 0)) is not None
    long_solution = "Adding both sides gives it. " * 100 + r"So it is \boxed{\sqrt{5}}."
    assert reward.row_rejection_reason(RewardInput("", "", long_solution, {}, True, 0)) is None


AT_THE_LIMIT = {
    "fractions": "\\frac{1}{1+" * MAX_DEPTH + "x" + "}" * MAX_DEPTH,
    "roots": "\\sqrt{2+" * MAX_DEPTH + "2" + "}" * MAX_DEPTH,
    "brackets": "(" * MAX_GROUP_DEPTH + "x" + "+1)" * MAX_GROUP_DEPTH,
    "sines": "\\sin(" * MAX_GROUP_DEPTH + "x" + ")" * MAX_GROUP_DEPTH,
    "sets": "\\{" * MAX_GROUP_DEPTH + "1" + "\\}" * MAX_GROUP_DEPTH,
    "indices": "x_{" * MAX_GROUP_DEPTH + "1" + "}" * MAX_GROUP_DEPTH,
}


@pytest.mark.parametrize("name", AT_THE_LIMIT)
def test_answers_at_the_depth_limit_are_compared_quickly(name: str) -> None:
    text, start = AT_THE_LIMIT[name], time.process_time()
    assert too_large_reason(text) is None and "gold" not in worker.grade({"gold": "1", "found": text, "seconds": 5.0})
    assert time.process_time() - start < 2.5


@pytest.mark.parametrize("command", ["\\frac{1}{", "\\sqrt{", "(", "\\sin(", "\\{", "x_{"])
def test_answers_beyond_the_depth_limit_are_refused(command: str) -> None:
    assert "deep" in (too_large_reason(command * (MAX_DEPTH + 1)) or "")


def test_an_answer_that_takes_too_much_computing_is_wrong_while_the_gold_one_is_readable() -> None:
    bombs = dict(RESOURCE_BOMBS)
    for name in ("binomial", "product over a billion"):
        reply = worker.grade({"gold": "x+1", "found": bombs[name], "seconds": 0.5})
        assert reply == {"found": "takes more than 0.25 s, or too much memory, to compute"}


def test_a_limit_on_computing_time_leaves_the_clock_of_the_whole_call_running() -> None:
    def spin() -> None:
        while True:
            pass

    handler, start = signal.getsignal(signal.SIGVTALRM), time.process_time()
    signal.setitimer(signal.ITIMER_PROF, 100.0)
    try:
        assert time_limit(0.1, spin) is None
        assert 0.05 < time.process_time() - start < 1.0
        assert time_limit(5.0, lambda: 7) == 7
        with pytest.raises(ZeroDivisionError):
            time_limit(5.0, lambda: 1 // 0)
        assert worker.grade({"gold": "x+1", "found": "1+x", "seconds": 5.0}) == {"same": True}
        assert 50.0 < signal.getitimer(signal.ITIMER_PROF)[0] < 100.0
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0.0)
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0) and signal.getsignal(signal.SIGVTALRM) == handler

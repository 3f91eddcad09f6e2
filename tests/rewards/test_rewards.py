"""`answer`, `length`, the rewards of a recipe, their weighted sum, and the check before training."""

from __future__ import annotations

import math
import random
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from malformed_yaml import MAX_CPU_SECONDS

from lowrank_tune.config import RewardConfig
from lowrank_tune.errors import ConfigError, UserError
from lowrank_tune.evaluation.grading import is_exact
from lowrank_tune.rewards import (
    RewardInput,
    Score,
    WeightedReward,
    build_rewards,
    make_negative_samples,
    sanity_check_rewards,
    weighted_sum,
    zero_std_fraction,
)
from lowrank_tune.rewards.base import InProcessReward
from lowrank_tune.rewards.math.answer import TAIL_CHARS, AnswerReward, answers_match, extract_final_answer
from lowrank_tune.rewards.sanity_check import auc, required_auc
from lowrank_tune.toy.problems import sample_problem


def item(
    completion: str, gold: str | None = "72", stopped: bool = True, tokens: int = 10, prompt: str = "What is 40 + 32?"
) -> RewardInput:
    return RewardInput(prompt, completion, gold, {"question": prompt, "answer": gold}, stopped, tokens)


def one(reward: InProcessReward, scored: RewardInput) -> Score:
    [score] = reward.score([scored])
    return score


@pytest.mark.parametrize(
    ("completion", "gold"),
    [
        ("40+30=70, 70+2=72. So it is 72.", "72"),
        ("It is 1,234.", "1234"),
        ("1234", "1,234"),
        ("It is 12.50.", "12.5"),
        ("12.5", "12.50"),
        ("It is 3/4.", "0.75"),
        ("0.75", "3/4"),
        (r"\boxed{\frac{3}{4}}", "0.75"),
        ("6/8", "3/4"),
        ("1 1/2", "1.5"),
        ("50%", "50"),
        ("50%", "50%"),
        ("50 %", "0.5"),
        ("0.5", "50%"),
        (r"\boxed{5\%}", "5"),
        ("-5", "-5"),
        ("x = \u22125", "-5"),
        ("10-3", "3"),
        ("It is $18.", "18"),
        ("-$5", "-5"),
        (r"\boxed{x = 5}", "5"),
        (r"\boxed{72 \text{ apples}}", "72"),
        ("#### 72 apples", "72"),
        (r"1{,}234", "1234"),
        (r"first \boxed{1}, then \boxed{72}", "72"),
        (r"$\boxed{1}$ and $\boxed{2}$", "1, 2"),
        (r"\boxed{72}. " + "word " * 1000, "72"),
        (r"-\frac{10}{9}", "-10/9"),
        (r"\boxed{72 \text{ m}}", "72"),
        ("#### 1\n#### 72", "72"),
        (r"\boxed{72} and 5 more words", "72"),
        (r"\boxed{Paris}.", "paris"),
        (r"\boxed{\text{(B)}}", "B"),
        ("Paris", "Paris."),
        ("wait...5", "5"),
        (".5", "0.5"),
        ("+5", "5"),
        (r"\boxed{2kg}", "2"),
        ("007", "7"),
        ("0.10", "1/10"),
        ("33.3333333333333333333333333333", "33.3333333333333333333333333333"),
    ],
)
def test_answer_passes_equal_numbers_and_texts(completion: str, gold: str) -> None:
    assert one(AnswerReward(), item(completion, gold)) == Score(1.0, "pass")


@pytest.mark.parametrize(
    ("completion", "gold"),
    [
        ("It is 73.", "72"),
        ("72, no, 73", "72"),
        ("", "72"),
        ("I do not know.", "72"),
        ("\uff13", "3"),
        ("7\uff12", "72"),
        ("\u00bd", "0.5"),
        ("\u0663", "3"),
        ("1e5", "5"),
        ("1,2", "2"),
        ("1.2.3", "3"),
        (r"\boxed{2x}", "2"),
        (r"\boxed{2n}", "2"),
        (r"\boxed{2ab}", "2"),
        (r"\boxed{\frac{7}{x}", "7"),
        (r"\boxed{" + r"\frac{1}{" * 500 + "x" + "}" * 501, "1"),
        (r"\boxed{72} and \boxed{73}", "73"),
        ("1 3/2", "2.5"),
        (r"\boxed{5 million}", "5"),
        ("1 1/2", "1/2"),
        ("1/0", "0"),
        ("0.5%", "50%"),
        ("5", "-5"),
        ("-5", "5"),
        ("0.3333333333333333", "1/3"),
        ("72.0000000000000000001", "72"),
        ("9" * 200, "9" * 200 + "1"),
        (r"\boxed{72} \boxed{73}", "72"),
        (r"\boxed{71 or 72}", "72"),
        ("#### 72\n#### 73", "72"),
        ("nan", "72"),
        ("inf", "72"),
        ("7_2", "72"),
        ("1,23", "123"),
        ("Paris or Rome", "Paris"),
        (r"\boxed{70+2}", "72"),
        ("12,50", "12.50"),
    ],
)
def test_answer_fails_other_numbers_and_texts(completion: str, gold: str) -> None:
    score = one(AnswerReward(), item(completion, gold))
    assert (score.value, score.verdict) == (0.0, "fail") and score.reason


def test_answer_fails_a_completion_that_did_not_stop() -> None:
    assert one(AnswerReward(), item("It is 72.", stopped=False)) == Score(0.0, "fail", "did not stop")


@pytest.mark.parametrize("gold", [None, "", " "])
def test_a_row_without_ground_truth_is_an_error_that_names_it(gold: str | None) -> None:
    score = one(AnswerReward(), item("It is 72.", gold))
    assert score.value is None and score.verdict == "error" and "What is 40 + 32?" in score.reason
    assert weighted_sum([score.value], [1.0]) is None


@given(st.fractions(max_denominator=10_000), st.integers(1, 9))
def test_equal_fractions_are_equal_and_near_ones_are_not(number: object, factor: int) -> None:
    top, bottom = number.numerator, number.denominator  # type: ignore[attr-defined]
    assert answers_match(f"{top * factor}/{bottom * factor}", f"{top}/{bottom}")
    assert not answers_match(f"{top * 10**12 + 1}/{bottom * 10**12}", f"{top}/{bottom}")


@given(st.integers(-(10**9), 10**9))
def test_thousands_separators_do_not_change_a_number(number: int) -> None:
    assert (
        answers_match(f"{number:,}", str(number))
        and answers_match(f"{number:,}.00", str(number))
        and not answers_match(f"{number + 1:,}", str(number))
    )


def test_answer_and_evaluation_agree_on_the_tutor() -> None:
    rng = random.Random(3)
    for _ in range(300):
        problem = sample_problem(rng)
        reply = problem.answer_without_steps(rng, p_correct=0.5) if rng.random() < 0.5 else problem.answer_with_steps()
        assert one(AnswerReward(), item(reply, str(problem.answer))).value == is_exact(reply, str(problem.answer))


HOSTILE = {
    "boxes": "\\boxed{" * 100_000,
    "digits": "9" * 300_000,
    "spaces": " " * 1_000_000,
    "fractions": "1/" * 200_000,
    "latex": r"\frac{" * 100_000,
    "dollars": "$" * 300_000,
    "braces": "{" * 300_000,
    "commas": "1,1" * 100_000,
    "hashes": "#" * 300_000,
    "minus": "-" * 300_000,
    "mixed": "1 1 1/" * 50_000,
    "escapes": "\x1b]52;c;AAAA\x07" * 10_000,
    "nul": "\x00" * 300_000,
    "surrogates": "\ud800" * 100_000,
    "text": r"\text{a}" * 60_000,
    "percent": r"1\%" * 60_000,
    "backslashes": "\\" * 300_000,
    "bidi": "\u202e5" * 100_000,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_completions_are_answered_at_once(name: str) -> None:
    start = time.process_time()
    for gold in ("72", "Paris"):
        score = one(AnswerReward(), item(HOSTILE[name], gold))
        assert score.value == 0.0 and score.reason.isprintable()
    assert time.process_time() - start < MAX_CPU_SECONDS


def test_a_number_far_before_the_end_is_not_the_answer() -> None:
    assert extract_final_answer("72 " + "word " * TAIL_CHARS) is None


def test_length_falls_in_a_straight_line() -> None:
    [weighted] = build_rewards([RewardConfig(name="length", target_tokens=100)], Path())
    values = [one(weighted.reward, item("", tokens=tokens)).value for tokens in (0, 100, 125, 150, 200, 300)]
    assert values == [1.0, 1.0, 0.75, 0.5, 0.0, 0.0]


def test_rewards_of_one_name_get_unique_names(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def answer(completion, row): return 1")
    uses = [
        RewardConfig(name="answer"),
        RewardConfig(name="answer", weight=0.5),
        RewardConfig(name="./mine.py:answer"),
        RewardConfig(name="format", pattern=".*"),
    ]
    made = build_rewards(uses, tmp_path)
    assert [(each.name, each.weight, each.reward.name) for each in made] == [
        ("answer", 1.0, "answer"),
        ("answer-2", 0.5, "answer-2"),
        ("answer-3", 1.0, "answer-3"),
        ("format", 1.0, "format"),
    ]


def test_build_rewards_reports_all_faults_at_once(tmp_path: Path) -> None:
    (tmp_path / "bytes.py").write_bytes(b"\xff\xfe\xff")
    uses = [
        RewardConfig(name="anwser"),
        RewardConfig(name="format"),
        RewardConfig(name="format", pattern="("),
        RewardConfig(name="length"),
        RewardConfig(name="answer", target_tokens=3),
        RewardConfig(name="./none.py:f"),
        RewardConfig(name="mine.py"),
        RewardConfig(name="bytes.py:f"),
        RewardConfig(name="answer", weight=0.0),
    ]
    with pytest.raises(ConfigError) as caught:
        build_rewards(uses, tmp_path)
    errors = [(fault.key, fault.message) for fault in caught.value.problems]
    wanted = [
        "`anwser` is not a reward; did you mean `answer`",
        "`pattern` is missing: the regular expression",
        "`pattern` is not a regular expression of RE2: missing )",
        "`target_tokens` is missing: up to how many tokens",
        "`target_tokens` does nothing for this reward; it belongs to `length`",
        "No such file",
        "./file.py:function",
        "not UTF-8",
        "weight 0",
    ]
    assert [key for key, _ in errors] == [f"rewards.{place}" for place in range(9)]
    assert all(words in message for words, (_, message) in zip(wanted, errors, strict=True)), errors
    with pytest.raises(UserError, match="empty"):
        build_rewards([], tmp_path)


def test_weighted_sum_is_none_if_a_reward_failed_and_never_counts_it_as_zero() -> None:
    assert weighted_sum([1.0, 0.5, 0.0], [1.0, -0.5, 3.0]) == 0.75
    assert weighted_sum([1.0, None], [1.0, 0.0]) is None
    assert math.isnan(weighted_sum([1.0, math.nan], [1.0, 0.0]) or 0.0)
    assert weighted_sum([], []) == 0
    for values in ([1.0, 0.5, 0.0], [None, 1.0]):
        with pytest.raises(ValueError):
            weighted_sum(values, [1.0])


class Fixed:
    """A reward in this process with a fixed value."""

    name, is_verifier = "fixed", True

    def __init__(self, value: object) -> None:
        self.value = value

    def score(self, items: list[RewardInput]) -> list[Score]:  # type: ignore[override]
        return [Score(self.value(each) if callable(self.value) else self.value, "graded") for each in items]  # type: ignore[arg-type]


def references(count: int) -> list[RewardInput]:
    return [
        item(f"So it is {number}.", str(number), prompt=f"What is {number} + 0?") for number in range(10, 10 + count)
    ]


@pytest.mark.parametrize("count", [3, 8, 32])
def test_sanity_check_passes_a_correct_verifier(count: int) -> None:
    right = references(count)
    report = sanity_check_rewards([WeightedReward("answer", 1.0, AnswerReward())], right, make_negative_samples(right))
    assert report.fault() is None and report.rewards[0].reference_mean == 1.0 and report.rewards[0].negative_mean < 0.3
    assert len(list(report.lines())) == 1


def test_sanity_check_refuses_a_constant_verifier_even_beside_a_correct_one() -> None:
    right = references(16)
    weighted = [WeightedReward("answer", 1.0, AnswerReward()), WeightedReward("fixed", 1.0, Fixed(0.7))]
    fault = sanity_check_rewards(weighted, right, make_negative_samples(right)).fault() or ""
    assert "`fixed` does not separate" in fault and "kind: shaping" in fault and "rewards_check: warn" in fault
    assert "every answer gets 0.7" in (
        sanity_check_rewards(weighted[1:], right, make_negative_samples(right)).fault() or ""
    )
    shaping = [weighted[0], replace(weighted[1], kind="shaping")]
    assert sanity_check_rewards(shaping, right, make_negative_samples(right)).fault() is None


@pytest.mark.parametrize("count", [3, 8, 32])
def test_sanity_check_refuses_random_and_inverted_rewards(count: int) -> None:
    right = references(count)
    rng = random.Random(count)
    refused = [
        sanity_check_rewards(
            [WeightedReward("fixed", 1.0, Fixed(lambda _: rng.random()))], right, make_negative_samples(right, seed)
        ).fault()
        for seed in range(50)
    ]
    assert sum(fault is not None for fault in refused) >= 49
    # a punished right answer
    assert (
        sanity_check_rewards(
            [WeightedReward("answer", -1.0, AnswerReward())], right, make_negative_samples(right)
        ).fault()
        is not None
    )


def test_sanity_check_reports_rows_without_ground_truth_and_references_that_fail() -> None:
    right = references(8)
    lost = [*right, item("So it is 5.", None, prompt="Which row?")]
    assert "Which row?" in (
        sanity_check_rewards(
            [WeightedReward("answer", 1.0, AnswerReward())], lost, make_negative_samples(right)
        ).fault()
        or ""
    )
    missed = [*right, item("So it is 6.", "5", prompt="Which one?")]
    report = sanity_check_rewards([WeightedReward("answer", 1.0, AnswerReward())], missed, make_negative_samples(right))
    assert (
        report.fault() is None
        and "1 reference answer" in "\n".join(report.lines())
        and "Which one?" in "\n".join(report.lines())
    )


def test_shaping_rewards_alone_are_a_warning_and_beside_a_verifier_the_sum_decides() -> None:
    right = references(8)
    length = build_rewards([RewardConfig(name="length", target_tokens=50)], Path())
    alone = sanity_check_rewards(length, right, make_negative_samples(right))
    assert alone.fault() is None
    assert "`length` does not separate" in (alone.warning() or "")
    answer = WeightedReward("answer", 1.0, AnswerReward())
    beside = sanity_check_rewards([*length, answer], right, make_negative_samples(right))
    assert beside.fault() is None and beside.warning() is None
    # The verifier separates by itself, and a heavier reward that likes short answers outweighs it.
    outweighed = [replace(length[0], weight=9.0, reward=Fixed(lambda each: 1.0 / each.tokens)), answer]
    fault = sanity_check_rewards(
        [replace(outweighed[0], kind="shaping"), answer], right, make_negative_samples(right)
    ).fault()
    assert "the weighted sum does not separate" in (fault or "")


def test_a_reward_without_any_score_is_refused_with_the_reason() -> None:
    """If a recipe allows all failures, no failure ends the check, and there is nothing to compare."""
    without_answers = [item("So it is 5.", None, prompt=f"Row {number}?") for number in range(8)]
    report = sanity_check_rewards(
        [WeightedReward("answer", 1.0, AnswerReward())], without_answers, without_answers, max_failure_rate=1.0
    )
    fault = report.fault() or ""
    assert "has no score for any reference answer" in fault
    assert "needs a gold answer" in fault
    assert "nan" not in fault


def test_auc_and_required_auc_equal_values_by_hand() -> None:
    assert auc([1.0, 0.0], [0.0, 0.0]) == 0.75 and auc([1.0], [1.0]) == 0.5 and auc([0.0], [1.0]) == 0.0
    assert required_auc(1000, 5000) == 0.6 and required_auc(2, 10) == 0.9


def test_negative_samples_are_never_the_answer() -> None:
    right = [each for each in references(100) for _ in range(2)]  # neighbors share their answer
    wrong = make_negative_samples(right)
    kinds = [wrong[place::5] for place in range(5)]
    assert len(wrong) == 1000 and [each.completion for each in kinds[3]] == [each.prompt for each in right]
    assert all(each.completion == "" for each in kinds[0]) and {each.ground_truth for each in wrong} == {
        each.ground_truth for each in right
    }
    for kind in (kinds[0], kinds[1], kinds[2], kinds[4]):
        assert all(score.value == 0.0 for score in AnswerReward().score(kind))


def test_zero_std_fraction_is_the_chance_that_all_pass_or_all_fail() -> None:
    assert (
        zero_std_fraction([0.0, 1.0], 8) == 1.0
        and zero_std_fraction([0.5], 2) == 0.5
        and zero_std_fraction([0.5, 1.0], 2) == 0.75
    )
    assert zero_std_fraction([0.3], 1) == pytest.approx(1.0) and zero_std_fraction([0.2], 4) == pytest.approx(
        0.2**4 + 0.8**4
    )


def test_zero_std_fraction_from_few_samples_is_not_overestimated() -> None:
    """Rates of many prompts, each estimated from 4 samples: the plain formula overestimates the share, the one with the
    prior does not."""
    rng = random.Random(0)
    rates = [rng.betavariate(0.5, 0.5) for _ in range(4000)]
    seen = [sum(rng.random() < rate for _ in range(4)) / 4 for rate in rates]
    truth = zero_std_fraction(rates, 8)
    assert zero_std_fraction(seen, 8) > truth + 0.1 and abs(zero_std_fraction(seen, 8, samples=4) - truth) < 0.02

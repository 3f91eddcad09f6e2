"""Rows with scores: the best and the worst response are a pair, and the difference of scores is a margin on request."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import dropped_rows
from test_pairs import loaded, write
from tokenizers_for_tests import SHARED

from lowrank_tune.config import RecipeConfig, SourceConfig
from lowrank_tune.config.validate import findings
from lowrank_tune.data import InvalidRow, detect_format, read_source, to_pair
from lowrank_tune.data.message import Message
from lowrank_tune.errors import UserError

Q, A, B, C = "What is 2 + 3?", "It is 5.", "It is 6.", "It is 55."
ASK, YES, NO = ({"role": role, "content": text} for role, text in (("user", Q), ("assistant", A), ("assistant", B)))
COMPLETIONS = [
    {
        "model": "m",
        "response": C,
        "overall_score": 6.5,
        "fine-grained_score": 1.0,
        "annotations": {"x": {"Rating": "N/A"}},
    },
    {"model": "n", "response": A, "overall_score": 8.0, "fine-grained_score": 4.5, "annotations": None},
    {"model": "o", "response": B, "overall_score": 2.0, "fine-grained_score": 2.5, "annotations": None},
]
NECTAR = [
    {"answer": B, "model": "m", "rank": 3.0},
    {"answer": A, "model": "n", "rank": 1.0},
    {"answer": C, "rank": 2.0},
]
HELPSTEER2 = {"prompt": Q, "response_1": A, "response_2": B, "preference_strength": -2, "preference_statement": "x"}
HELPSTEER3 = {"context": [ASK], "response1": B, "response2": A, "overall_preference": 3, "domain": "stem"}
MULTI_TURN = f"{Q}\n<extra_id_1>Assistant\n4.\n<extra_id_1>User\nAgain?\n<extra_id_1>Assistant\n"
SHAPES: list[tuple[dict[str, Any], float]] = [
    ({"instruction": Q, "completions": COMPLETIONS, "source": "x", "models": ["m"], "correct_answers": ["None"]}, 6.0),
    ({"prompt": f"\n\nHuman: {Q}\n\nAssistant: ", "answers": NECTAR, "num_responses": 3}, 2.0),
    (HELPSTEER2, 2.0),
    ({**HELPSTEER2, "response_1": B, "response_2": A, "preference_strength": 2}, 2.0),
    (HELPSTEER3, 3.0),
    ({"prompt": Q, "responses": [B, C, A], "scores": [0.25, 1, "1.5"]}, 1.25),
    ({"prompt": [ASK], "responses": [NO, YES], "scores": [1, 2]}, 1.0),
    ({"messages": [ASK], "responses": [[NO], [YES]], "scores": [1, 2]}, 1.0),
    ({"instruction": Q, "generations": [A, B], "ratings": ["5", "1"], "generation_models": ["m", "n"]}, 4.0),
    ({"prompt": Q, "responses": [{"text": B, "score": -1}, {"text": A, "score": 1}]}, 2.0),
    ({"prompt": Q, "completions": [A, B], "scores": [1, 0]}, 1.0),
    ({"prompt": Q, "responses": [C, A, B, C], "scores": [None, 2, 1, float("nan")]}, 1.0),
]


@pytest.mark.parametrize(("row", "difference"), SHAPES)
def test_each_shape_is_found_and_becomes_the_same_pair(row: dict[str, Any], difference: float) -> None:
    assert detect_format(row, None, pairs=True) == "preference"
    assert detect_format(row) == ("messages" if "messages" in row else "preference")
    made = to_pair(row, {})
    assert [message.content for message in made.prompt] == [Q] and made.margin == 0.0
    assert (made.chosen, made.rejected) == ((Message("assistant", A),), (Message("assistant", B),))
    assert to_pair(row, {}, 0.5).margin == difference / 2
    assert to_pair({**row, "margin": 7}, {}, 0.5).margin == 7.0


def test_prompts_of_several_turns_are_read() -> None:
    for row in (
        {**HELPSTEER3, "context": [ASK, NO, {**ASK, "content": "Again?"}]},
        {**HELPSTEER2, "prompt": MULTI_TURN},
    ):
        made = to_pair(row, {})
        assert [message.role for message in made.prompt] == ["user", "assistant", "user"]
        assert made.prompt[0].content == Q and made.prompt[2].content == "Again?"


def test_columns_name_the_responses_and_the_scores() -> None:
    row = {"prompt": Q, "outputs": [B, A], "reward": [0, 1]}
    columns = {"responses": "outputs", "scores": "reward"}
    assert detect_format(row, columns, pairs=True) == "preference" and to_pair(row, columns).chosen[0].content == A
    with pytest.raises(UserError, match="`prompt`, `responses` and `scores`"):
        detect_format(row, None, pairs=True)
    fine = {"instruction": Q, "completions": COMPLETIONS}
    assert to_pair(fine, {"scores": "fine-grained_score"}, 1.0).rejected[0].content == C
    named = {**HELPSTEER2, "strength": 1, "preference_strength": None}
    assert to_pair(named, {"preference_strength": "strength"}).chosen[0].content == B


def scored(*scores: Any, **columns: Any) -> dict[str, Any]:
    return {"prompt": Q, "responses": [A, B, C][: len(scores)], "scores": list(scores), **columns}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (scored(1, 1.0, "1"), "all responses have the same score"),
        ({**HELPSTEER2, "preference_strength": 0}, "all responses have the same score"),
        (scored(1), "fewer than two responses with a score"),
        (scored(1, None, "N/A"), "fewer than two responses with a score"),
        (scored(float("nan"), float("inf"), 10**400), "fewer than two responses with a score"),
        (scored(True, False, [1]), "fewer than two responses with a score"),
        ({"prompt": Q, "responses": [A, B]}, "fewer than two responses with a score"),
        ({"prompt": Q, "responses": [], "scores": []}, "fewer than two responses with a score"),
        (scored(1, 2, responses=[A]), "not as many scores as responses"),
        (scored(1, 2, responses=[A, A]), "both answers are equal"),
        (scored(1, 2, responses=[A, " "]), "empty answer"),
        (scored(1, 2, responses=[A, {"model": "m"}]), "a response has no text"),
        (scored(1, 2, responses=[A, "\ud800"]), "surrogate"),
        (scored(1, 2, responses=[A, None]), "is not text"),
        (scored(1, 2, prompt=None), "no prompt"),
        (scored(1, 2, prompt=[ASK, YES]), "does not end with a question"),
        ({**HELPSTEER2, "preference_strength": "better"}, "the preference is not a number"),
        ({**HELPSTEER2, "response_1": None}, "no column `chosen`"),
    ],
)
def test_a_row_without_two_scores_has_a_reason(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(InvalidRow, match=reason):
        to_pair(row, {})


PAIR = {"prompt": Q, "chosen": A, "rejected": B}


def test_scores_of_sides_are_a_margin_only_on_request() -> None:
    for high, low in (
        ("score_chosen", "score_rejected"),
        ("chosen_score", "rejected_score"),
        ("chosen-rating", "rejected-rating"),
    ):
        row = {**PAIR, high: 8.0, low: "5"}
        assert [to_pair(row, {}, scale).margin for scale in (0.0, 1.0, 0.25)] == [0.0, 3.0, 0.75]
        assert to_pair({**row, low: 8}, {}, 1.0).margin == 0.0
        for wrong, reason in (
            (9, "the rejected side has the higher score"),
            ("N/A", "score of a side is not a number"),
        ):
            assert to_pair({**row, low: wrong}, {}).margin == 0.0
            with pytest.raises(InvalidRow, match=reason):
                to_pair({**row, low: wrong}, {}, 1.0)
    mapped = {"score_chosen": "c", "score_rejected": "r"}
    assert to_pair({**PAIR, "c": 2, "r": 1}, mapped, 1.0).margin == 1.0
    assert to_pair(PAIR, {}, 1.0).margin == 0.0
    with pytest.raises(InvalidRow, match="the margin is not a number"):
        to_pair({**PAIR, "score_chosen": 1e39, "score_rejected": 0}, {}, 1.0)


def test_sides_of_a_row_count_and_not_its_responses() -> None:
    assert to_pair({**scored(1, 2), "chosen": A, "rejected": C}, {}).rejected[0].content == C
    with pytest.raises(InvalidRow, match="no column `rejected`"):
        to_pair({**scored(1, 2), "chosen": A}, {})


@pytest.mark.parametrize(
    ("row", "format_name"),
    [
        ({"question": Q, "answer": A, "answers": ["5", "five"]}, "question_answer"),
        ({"question": Q, "answer": A, "answers": NECTAR}, "question_answer"),
        ({"instruction": Q, "output": A, "responses": [A, B], "scores": [1, 2]}, "alpaca"),
    ],
)
def test_other_formats_with_lists_stay_what_they_are(row: dict[str, Any], format_name: str) -> None:
    assert detect_format(row) == format_name
    for other in ({"question": Q, "answers": ["5", "five"]}, {"question": Q, "answers": {"text": ["5"]}}):
        with pytest.raises(UserError, match="are not a preference pair"):
            detect_format(other, None, pairs=True)


def test_scored_rows_are_loaded_and_margins_counted(tmp_path: Path) -> None:
    rows = [{"prompt": f"{n}?", "responses": [A, B], "scores": [n, 3]} for n in range(20)]
    path = write(tmp_path / "a.jsonl", rows)
    plain = loaded(tmp_path, path)
    assert plain.train.units == 19 and not plain.train.margins.any()
    assert [(fault.line, fault.message) for fault in dropped_rows(plain.train)] == [
        (4, "all responses have the same score")
    ]
    scaled = loaded(tmp_path, SourceConfig(dataset=path, score_margin_scale=0.5)).train
    assert scaled.margins[::2].tolist() == [abs(n - 3) / 2 for n in range(20) if n != 3]
    with pytest.raises(UserError, match="these rows are preference pairs"):
        loaded(tmp_path, path, pairs=False)


@pytest.mark.parametrize(("algorithm", "is_used"), [("reward", True), ("dpo", False), ("sft", False)])
def test_the_scale_is_a_finding_where_no_margin_is_used(algorithm: str, is_used: bool) -> None:
    data = {"train": [{"dataset": "a.jsonl", "score_margin_scale": 0.5}]}
    recipe = RecipeConfig.model_validate({"algorithm": algorithm, "base": {"model": "tiny-tutor"}, "data": data})
    found = [path for path, _ in findings(recipe)]
    assert (("data", "train", 0, "score_margin_scale") in found) is not is_used


numbers = st.none() | st.booleans() | st.integers(-(10**400), 10**400) | st.floats() | st.sampled_from(["1", "N/A", ""])
texts = st.sampled_from([A, B, C, "", "\ud800", "<|im_end|>"])
responses = (
    texts
    | numbers
    | st.fixed_dictionaries({}, optional={"response": texts, "overall_score": numbers, "rank": numbers, "role": texts})
)


@settings(max_examples=300)
@given(
    row=st.fixed_dictionaries(
        {"prompt": st.just(Q)},
        optional={
            "responses": st.lists(responses, max_size=4) | texts,
            "scores": st.lists(numbers, max_size=4) | numbers,
            "completions": st.lists(responses, max_size=3),
            "response_1": responses,
            "response_2": responses,
            "preference_strength": numbers,
            "score_chosen": numbers,
        },
    ),
    scale=st.sampled_from([0.0, 0.5]),
)
def test_random_scores_become_pairs_or_reasons(row: dict[str, Any], scale: float) -> None:
    try:
        made = to_pair(row, {}, scale)
    except InvalidRow as fault:
        assert len(fault.reason) < 100
        return
    assert made.chosen != made.rejected and 0.0 <= made.margin < 3.5e38
    assert scale or not made.margin


def test_the_published_row_of_ultrafeedback_binarized_is_a_pair() -> None:
    path = SHARED / "data" / "hub_samples" / "ultrafeedback_binarized.jsonl"
    if not path.exists():
        pytest.skip("needs ../shared")
    ((_, raw),) = read_source(SourceConfig(dataset=str(path)), 0)
    assert isinstance(raw, dict)
    made = to_pair(raw, {}, 1.0)
    assert len(made.prompt) == 1 and made.margin == raw["score_chosen"] - raw["score_rejected"]

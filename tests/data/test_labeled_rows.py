"""Answers with a label: read from every shape and from pairs, tokenized alone, kept together in a split, and every
faulty one counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stores import dropped_rows

from lowrank_tune.assembly.labels import label_counts
from lowrank_tune.config import DataConfig, Recipe, SourceConfig
from lowrank_tune.data import ChatTemplate, InvalidRow, TokenizedSplits, detect_format, load
from lowrank_tune.data.collate import collate_units, with_labels
from lowrank_tune.data.labeled_rows import INVALID_LABEL, detect_labeled_format, labeled_answers, read_label
from lowrank_tune.data.message import Message
from lowrank_tune.data_report import inspect_data
from lowrank_tune.errors import ConfigError, UserError
from lowrank_tune.events import ignore_event
from lowrank_tune.model.base import load_tokenizer

Q, A, B = "What is 2 + 3?", "It is 5.", "It is 6."
ASK, YES = ({"role": role, "content": text} for role, text in (("user", Q), ("assistant", A)))
PLAIN = {"prompt": Q, "completion": A, "label": True}
SHAPES: list[tuple[dict[str, Any], dict[str, str]]] = [
    (PLAIN, {}),
    ({"prompt": [ASK], "completion": [YES], "label": 1}, {}),
    ({"prompt": [ASK], "completion": A, "label": "true"}, {}),
    ({"messages": [ASK, YES], "label": True}, {}),
    ({"conversations": [{"from": "human", "value": Q}, {"from": "gpt", "value": A}], "label": True}, {}),
    ({"instruction": Q, "output": A, "label": True}, {}),
    ({"question": Q, "answer": A, "label": "thumbs_up"}, {}),
    ({"q": Q, "reply": A, "rating": "\N{THUMBS UP SIGN}"}, {"prompt": "q", "completion": "reply", "label": "rating"}),
    ({"chat": [ASK, YES], "liked": 1.0, "label": "spam"}, {"messages": "chat", "label": "liked"}),
    ({**PLAIN, "chosen": A, "rejected": B}, {"label": "label"}),
]


@pytest.mark.parametrize(("row", "columns"), SHAPES)
def test_every_shape_gives_the_same_answer(row: dict[str, Any], columns: dict[str, str]) -> None:
    source = SourceConfig(dataset="x.jsonl", columns=columns)
    assert detect_labeled_format(row, columns) == "unpaired_preference"
    (answer,) = labeled_answers(row, source, "unpaired_preference", None)
    assert (answer.prompt, answer.completion) == ((Message("user", Q),), (Message("assistant", A),))
    assert answer.label is True


def test_a_completion_of_several_turns_is_trained_as_a_whole() -> None:
    more = [YES, {"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "Yes."}]
    row = {"prompt": [ASK], "completion": more, "label": False}
    (answer,) = labeled_answers(row, SourceConfig(dataset="x.jsonl"), "unpaired_preference", "Be short.")
    assert [message.role for message in answer.prompt] == ["system", "user"] and len(answer.completion) == 3


CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"function": {"name": "add", "arguments": {"a": 2}}}],
}
RESULT = {"role": "tool", "content": "5"}


def test_an_answer_may_follow_the_result_of_a_tool() -> None:
    source = SourceConfig(dataset="x.jsonl")
    for row in (
        {"messages": [ASK, CALL, RESULT, YES], "label": True},
        {"prompt": [ASK, CALL, RESULT], "completion": [YES], "label": True},
        {"prompt": [ASK, CALL, RESULT], "completion": A, "label": True},
    ):
        (answer,) = labeled_answers(row, source, "unpaired_preference", None)
        assert [message.role for message in answer.prompt] == ["user", "assistant", "tool"], row
        assert answer.completion == (Message("assistant", A),)


def test_turns_of_a_completion_that_become_one_message_leave_the_prompt_as_it_is() -> None:
    earlier = [ASK, {"role": "assistant", "content": "Hm."}, ASK]
    turns = [{"role": "assistant", "content": "I add."}, CALL, RESULT, YES]
    row = {"prompt": earlier, "completion": turns, "label": True}
    for system in (None, "Be short."):
        (answer,) = labeled_answers(row, SourceConfig(dataset="x.jsonl"), "unpaired_preference", system)
        roles = [message.role for message in answer.prompt if message.role != "system"]
        assert roles == ["user", "assistant", "user"]
        assert [message.role for message in answer.completion] == ["assistant", "tool", "assistant"]


def test_responses_with_scores_are_pairs() -> None:
    row = {"prompt": Q, "responses": [A, B], "scores": [5, 1]}
    assert detect_labeled_format(row, {}) == "preference"
    good, bad = labeled_answers(row, SourceConfig(dataset="x.jsonl"), "preference", None)
    assert (good.completion[0].content, good.label) == (A, True)
    assert (bad.completion[0].content, bad.label) == (B, False)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (
            (
                True,
                1,
                1.0,
                "true",
                "True",
                " TRUE ",
                "1",
                "1.0",
                "yes",
                "Thumbs-Up",
                "thumbs up",
                "\U0001f44d\U0001f3fd",
            ),
            True,
        ),
        ((False, 0, 0.0, "false", "0", "0.0", "no", "thumbs_down", "Down", "\U0001f44e", "undesirable"), False),
    ],
)
def test_labels_are_read(values: tuple[Any, ...], expected: bool) -> None:
    assert [read_label({"label": value}, {}) for value in values] == [expected] * len(values)


@pytest.mark.parametrize(
    "value",
    [
        2,
        -1,
        0.5,
        float("nan"),
        float("inf"),
        "",
        "maybe",
        "truee",
        "-1",
        "-0",
        "_1",
        "1-",
        [True],
        {"value": True},
        10**400,
        "\ud800",
    ],
)
def test_a_hostile_label_has_a_reason(value: Any) -> None:
    with pytest.raises(InvalidRow) as fault:
        read_label({"label": value}, {})
    assert fault.value.reason == INVALID_LABEL


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": Q, "completion": A}, "no column `label`"),
        ({**PLAIN, "label": None}, "column `label` is null"),
        ({"prompt": Q, "label": True}, "no answer with its prompt"),
        ({**PLAIN, "completion": " "}, "empty answer"),
        ({**PLAIN, "prompt": ""}, "empty question"),
        ({**PLAIN, "completion": []}, "no assistant turn"),
        ({"messages": [ASK], "label": True}, "no assistant turn"),
        ({"messages": [YES], "label": True}, "the first turn is the assistant's"),
        ({"prompt": [ASK, YES], "completion": [YES], "label": True}, "two assistant turns"),
    ],
)
def test_a_row_without_a_labeled_answer_has_a_reason(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(InvalidRow, match=reason):
        labeled_answers(row, SourceConfig(dataset="x.jsonl"), "unpaired_preference", None)


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def loaded(folder: Path, *sources: SourceConfig, **data: Any) -> TokenizedSplits:
    template = ChatTemplate.from_tokenizer(load_tokenizer(Recipe.load("tiny-kto").base))
    config = DataConfig(train=sources, **{"max_invalid_fraction": 1.0, "max_length": 256, **data})
    return load(config, template, 0, ignore_event, folder / "cache", labels=True)


def test_rows_are_stored_with_their_labels(tmp_path: Path) -> None:
    rows = [{**PLAIN, "prompt": f"What is {number}?", "label": number % 3 == 0} for number in range(9)]
    rows[4] = {**PLAIN, "label": "perhaps"}
    splits = loaded(tmp_path, SourceConfig(dataset=write(tmp_path / "a.jsonl", rows)), eval_fraction=0.0)
    train = splits.train
    assert train.labels.tolist() == [1, 0, 0, 1, 0, 1, 0, 0] and train.is_labeled
    assert [problem.line for problem in dropped_rows(train)] == [5]
    (report,) = splits.report.train
    assert (report.used, report.desirable, report.undesirable, report.num_dropped) == (8, 3, 5, 1)
    assert "3 desirable and 5 undesirable answers" in splits.report.lines()[0]
    batch = with_labels(collate_units(train, [0, 1], 0), train, np.array([0, 1]))
    assert batch.labels is not None and batch.labels.tolist() == [True, False]
    (again,) = loaded(tmp_path, SourceConfig(dataset=str(tmp_path / "a.jsonl")), eval_fraction=0.0).report.train
    assert again == report, "from the cache"


def test_only_the_answer_is_trained(tmp_path: Path) -> None:
    rows = [{"prompt": [ASK, YES, {"role": "user", "content": "And 3 + 4?"}], "completion": "It is 7.", "label": True}]
    train = loaded(tmp_path, SourceConfig(dataset=write(tmp_path / "a.jsonl", rows)), eval_fraction=0.0).train
    template = ChatTemplate.from_tokenizer(load_tokenizer(Recipe.load("tiny-kto").base))
    row = train[0]
    trained = [int(token) for token, mask in zip(row.input_ids, row.completion_mask, strict=True) if mask]
    assert template.decode(trained) == "It is 7."
    start = list(row.completion_mask).index(True)
    assert all(row.completion_mask[start:]), "with its end tokens"


def pairs(count: int) -> list[dict[str, str]]:
    return [
        {"prompt": f"What is {number}?", "chosen": f"It is {number}.", "rejected": "No."} for number in range(count)
    ]


def test_a_pair_gives_a_desirable_and_an_undesirable_row(tmp_path: Path) -> None:
    rows = pairs(6)
    rows[2] = {"prompt": Q, "chosen": A, "rejected": A}
    source = SourceConfig(dataset=write(tmp_path / "p.jsonl", rows))
    splits = loaded(tmp_path, source, eval_fraction=0.0)
    assert splits.train.labels.tolist() == [1, 0] * 5 and splits.train.rows_per_unit == 1
    (report,) = splits.report.train
    assert (report.read, report.used, report.desirable, report.undesirable) == (6, 5, 5, 5)
    assert splits.report.unit == "row" and splits.report.duplicates == 0


@pytest.mark.parametrize("seed_of_rows", range(5))
def test_answers_to_one_prompt_are_on_one_side_of_the_split(tmp_path: Path, seed_of_rows: int) -> None:
    """Both sides of a pair, and rows of equal conversations, whatever the order and the shape of the rows."""
    stream = np.random.default_rng(seed_of_rows)
    first = [pairs(30)[number] for number in stream.permutation(30)]
    second = [
        {"prompt": f"What is {number % 12}?", "completion": f"It is {number % 12}.", "label": bool(number % 2)}
        for number in stream.permutation(40).tolist()
    ]
    sources = (
        SourceConfig(dataset=write(tmp_path / "p.jsonl", first)),
        SourceConfig(dataset=write(tmp_path / "q.jsonl", second)),
    )
    splits = loaded(tmp_path, *sources, eval_fraction=0.3)
    assert splits.validation is not None and splits.validation.units > 5
    sides = [set(part.unit_split_hashes.tolist()) for part in (splits.train, splits.validation)]
    assert not sides[0] & sides[1] and len(sides[0] | sides[1]) == 30
    conversations = [set(part.conversation_hashes.tolist()) for part in (splits.train, splits.validation)]
    assert not conversations[0] & conversations[1] and splits.report.shared == 0


def test_long_rows_are_dropped_or_lose_their_oldest_turns(tmp_path: Path) -> None:
    turns = [ASK, YES] * 20 + [{"role": "user", "content": "And 1 + 1?"}]
    rows = [{"prompt": turns, "completion": "It is 2.", "label": False}, {**PLAIN, "completion": "word " * 300}]
    source = SourceConfig(dataset=write(tmp_path / "a.jsonl", [*rows, PLAIN]))
    dropped = loaded(tmp_path, source, eval_fraction=0.0)
    assert dropped.report.train[0].num_dropped == 2
    kept = loaded(tmp_path, source, eval_fraction=0.0, truncation="truncate")
    assert kept.report.train[0].truncated == 1 and len(kept.train) == 2
    assert kept.train.lengths[0] <= 256
    (reason,) = kept.report.train[0].dropped
    assert reason.endswith("its last question and its answer included")


@pytest.mark.parametrize("row", [PLAIN, {"messages": [ASK, YES], "label": False}, {**PLAIN, "label": "junk"}])
def test_a_label_does_not_change_how_other_algorithms_read_a_row(row: dict[str, Any]) -> None:
    without = {name: value for name, value in row.items() if name != "label"}
    assert detect_format(row) == detect_format(without)


def test_data_without_labels_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"prompt": Q, "completion": A}] * 3)
    with pytest.raises(
        UserError, match=r"a.jsonl: the columns completion, prompt have no label.*columns: \{completion"
    ):
        loaded(tmp_path, SourceConfig(dataset=path))
    with pytest.raises(UserError, match="`format: messages` has no labels"):
        loaded(tmp_path, SourceConfig(dataset=path, format="messages"))


@pytest.mark.parametrize(
    ("algorithm", "source", "message"),
    [
        ("kto", {"dataset": "builtin:arithmetic"}, "contains single answers, and kto learns from answers with a label"),
        ("kto", {"dataset": "a.jsonl", "format": "alpaca"}, "write `unpaired_preference`, or `preference` for pairs"),
        ("sft", {"dataset": "a.jsonl", "format": "unpaired_preference"}, "means answers with a label, and sft learns"),
        ("dpo", {"dataset": "a.jsonl", "format": "unpaired_preference"}, "means answers with a label, and dpo learns"),
    ],
)
def test_recipes_with_other_rows_are_refused(algorithm: str, source: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Recipe.from_dict({"algorithm": algorithm, "data": {"train": [source]}})


def test_recipe_of_one_row_a_step_is_refused() -> None:
    with pytest.raises(ConfigError, match="train.global_batch_size: must be at least 2"):
        Recipe.load("tiny-kto", "train.global_batch_size=1")
    assert Recipe.load("tiny-kto", "train.global_batch_size=1", "kto.loss_type=apo_zero_unpaired").uses_labels
    with pytest.raises(ConfigError, match="lora_dropout: must be 0 with kto"):
        Recipe.load("tiny-kto", "adapters.policy.lora_dropout=0.1")


def test_weighted_sources_are_counted_as_they_are_drawn(tmp_path: Path) -> None:
    good = write(tmp_path / "good.jsonl", [{**PLAIN, "prompt": f"a{number}?"} for number in range(30)])
    bad = write(tmp_path / "bad.jsonl", [{**PLAIN, "prompt": f"b{number}?", "label": False} for number in range(10)])
    sources = tuple(SourceConfig(dataset=path, weight=0.5) for path in (good, bad))
    train = loaded(tmp_path, *sources, eval_fraction=0.0).train
    assert label_counts(train, sources) == pytest.approx((20.0, 20.0))
    plain = tuple(SourceConfig(dataset=path) for path in (good, bad))
    assert label_counts(train, plain) == (30.0, 10.0)


def test_report_counts_labels_and_contradictions(tmp_path: Path) -> None:
    rows = [{**PLAIN, "prompt": f"What is {number}?", "label": number < 3} for number in range(12)]
    rows[7] = {**rows[1], "label": False}
    recipe = Recipe.load(
        "tiny-kto", f"data.train=[{{dataset: {write(tmp_path / 'a.jsonl', rows)}}}]", "data.eval_fraction=0"
    )
    found = inspect_data(recipe, ignore_event, tmp_path / "cache")
    assert found.labels is not None
    assert (found.labels.desirable, found.labels.undesirable) == (3, 9)
    assert (found.labels.desirable_weight, found.labels.undesirable_weight) == (3.0, 1.0)
    counts = {issue.description: issue.count for issue in found.issues}
    assert counts["contradicting: the same conversation has both labels"] == 2
    assert [example.location.rpartition(", ")[2] for example in found.examples] == ["desirable"] * 3

"""Prompts that completions are drawn for: every row gives one or is reported, and any step from nothing but its
number."""

from __future__ import annotations

import itertools
import json
from array import array
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers_for_tests import CHATML, LLAMA3, NO_SYSTEM, SHARED, tiny, tokenizer

from lowrank_tune.config import DataConfig, SourceConfig, TrainingConfig
from lowrank_tune.data import (
    ChatTemplate,
    InvalidRow,
    PromptDataset,
    PromptExample,
    PromptReport,
    PromptSampler,
    RowLocation,
    load,
    load_heldout_prompts,
    load_prompts,
    tokenize,
)
from lowrank_tune.data.message import Message
from lowrank_tune.data.prompts import MISSING_ANSWER
from lowrank_tune.data.templates.render_process import RenderProcess, RenderRequest, Template
from lowrank_tune.errors import UserError
from lowrank_tune.evaluation.questions import render_questions
from lowrank_tune.events import Event, LogMessage, Progress

TEMPLATE = ChatTemplate.from_tokenizer(tiny())
ROWS = [{"question": f"What is {n} + 1?", "answer": f"It is {n + 1}.\n#### {n + 1}", "level": n} for n in range(12)]


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def loaded(
    *sources: SourceConfig | str, template: ChatTemplate = TEMPLATE, judge: bool = True, **data: Any
) -> PromptDataset:
    made = tuple(SourceConfig(dataset=source) if isinstance(source, str) else source for source in sources)
    return load_prompts(DataConfig(**{"train": made, **data}), template, 0, lambda event: None, judge)


def test_a_row_becomes_a_prompt(tmp_path: Path) -> None:
    made = loaded(write(tmp_path / "a.jsonl", ROWS))
    assert [one.text for one in made.examples] == [row["question"] for row in ROWS] and [
        one.row for one in made.examples
    ] == ROWS
    assert [one.ground_truth for one in made.examples] == [str(n + 1) for n in range(12)]
    for one, length in zip(made.examples, made.lengths, strict=True):
        assert list(one.input_ids) == TEMPLATE.prompt([Message("user", one.text)]) and len(one.input_ids) == length
    assert [str(place) for place in made.locations] == [f"{tmp_path}/a.jsonl:{line}" for line in range(1, 13)]
    report = made.report.train[0]
    assert (report.read, report.used, report.num_dropped, report.ground_truths, report.format) == (
        12,
        12,
        0,
        12,
        "question_answer",
    )
    assert (
        report.tokens == made.lengths.sum()
        and report.longest == made.lengths.max()
        and made.report.train_rows == len(made) == 12
    )


CONVERSATIONS: dict[str, tuple[Any, list[Message]]] = {
    "the last assistant turn goes": (
        ["u:a", "a:b", "u:c", "a:d"],
        [Message("user", "a"), Message("assistant", "b"), Message("user", "c")],
    ),
    "the last turn is the user's": (
        ["u:a", "a:b", "u:c"],
        [Message("user", "a"), Message("assistant", "b"), Message("user", "c")],
    ),
    "a question alone": (["u:a"], [Message("user", "a")]),
    "the row's system prompt": (["s:x", "u:a", "a:b"], [Message("system", "x"), Message("user", "a")]),
}


@pytest.mark.parametrize("case", CONVERSATIONS)
def test_the_prompt_of_a_conversation_ends_with_the_user(tmp_path: Path, case: str) -> None:
    turns, messages = CONVERSATIONS[case]
    roles = {"u": "user", "a": "assistant", "s": "system"}
    row = {"messages": [{"role": roles[turn[0]], "content": turn[2:]} for turn in turns]}
    for system in (None, "Be brief."):
        made = loaded(write(tmp_path / "a.jsonl", [row]), system_prompt=system)
        behind = [Message("system", system), *messages] if system and messages[0].role != "system" else messages
        assert (
            list(made.examples[0].input_ids) == TEMPLATE.prompt(behind)
            and made.examples[0].text == messages[-1].content
        )


def test_what_gives_no_prompt_is_dropped_with_its_line(tmp_path: Path) -> None:
    rows: list[Any] = [
        *ROWS,
        {"question": " ", "answer": "1"},
        {"question": "x", "answer": None},
        7,
        {"question": "long " * 60, "answer": "1"},
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{broken\n")
    made = loaded(str(path), judge=False, max_prompt_length=40)
    report = made.report.train[0]
    assert (report.read, report.used, report.num_dropped, report.ground_truths) == (
        17,
        12,
        5,
        12,
    ) and report.longest > 40 >= made.lengths.max()
    lines_by_reason = {reason: dropped.locations for reason, dropped in report.dropped.items()}
    assert lines_by_reason["empty question"] == [f"{path}:13"] and lines_by_reason["column `answer` is null"] == [
        f"{path}:14"
    ]
    assert (
        lines_by_reason["longer than data.max_prompt_length (40 tokens)"] == [f"{path}:16"]
        and sum(map(len, lines_by_reason.values())) == 5
    )
    with pytest.raises(UserError, match=r"a.jsonl: 5 of 17 rows cannot be used: .*raise `data.max_invalid_fraction`"):
        loaded(str(path), max_prompt_length=40)
    assert len(loaded(str(path), max_prompt_length=40, max_invalid_fraction=0.3)) == 12


def test_the_limit_itself_fits(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", ROWS[:1])
    length = int(loaded(path).lengths[0])
    assert len(loaded(path, max_prompt_length=length)) == 1
    with pytest.raises(
        UserError, match=f"none of its 1 rows can be used: 1: longer than data.max_prompt_length .{length - 1} tokens"
    ):
        loaded(path, max_prompt_length=length - 1, max_invalid_fraction=1.0)


REFUSING = LLAMA3.replace(
    "{{ bos_token }}",
    "{{ bos_token }}{% if 'forbidden' in messages[-1]['content'] %}{{ raise_exception('not this') }}{% endif %}",
)


@pytest.mark.parametrize(
    ("template", "bad"),
    [("words", "Hm.\n\nAssistant: b"), (REFUSING, "forbidden")],
    ids=["plain words", "own template"],
)
def test_prompts_that_the_template_cannot_render_are_dropped(tmp_path: Path, template: str, bad: str) -> None:
    made = ChatTemplate.from_tokenizer(tokenizer("words") if template == "words" else tiny(template))
    reason = made.validate_messages([Message("user", bad)])
    assert reason
    loaded_set = loaded(write(tmp_path / "a.jsonl", [*ROWS, {"question": bad, "answer": "1"}]), template=made)
    dropped = {why: gone.locations for why, gone in loaded_set.report.train[0].dropped.items()}
    assert len(loaded_set) == 12 and dropped == {reason: [f"{tmp_path}/a.jsonl:13"]}


@pytest.mark.parametrize("made", [TEMPLATE, ChatTemplate.from_tokenizer(tiny(REFUSING))], ids=["kit", "own"])
def test_many_prompts_are_those_of_one_call_each(made: ChatTemplate) -> None:
    texts = ["a", "forbidden", "b", "\ud800", "c <|eot|>"]
    conversations = [[Message("user", text)] for text in texts]
    found = made.prompt_many(conversations)
    for messages, ids in zip(conversations, found, strict=True):
        reason = made.validate_messages(messages)
        if isinstance(ids, InvalidRow):
            assert ids.reason == reason
        else:
            assert reason is None and ids == made.prompt(messages)
    assert isinstance(found[3], InvalidRow)


def test_prompts_are_rendered_in_one_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request for each would wait for the worker each time."""
    template = ChatTemplate.from_tokenizer(tiny(CHATML))
    counts: list[int] = []
    render_some = RenderProcess.render_some

    def count(process: RenderProcess, made: Template, requests: Sequence[RenderRequest]) -> list[str | InvalidRow]:
        counts.append(len(requests))
        return render_some(process, made, requests)

    monkeypatch.setattr(RenderProcess, "render_some", count)
    path = write(tmp_path / "a.jsonl", ROWS)
    loaded(path, template=template)
    assert counts == [12]
    render_questions(load_heldout_prompts(SourceConfig(dataset=path), 12, 0), template)
    assert counts == [12, 12]
    pairs = [{"prompt": row["question"], "chosen": "Yes.", "rejected": "No."} for row in ROWS]
    source = SourceConfig(dataset=write(tmp_path / "pairs.jsonl", pairs))
    load(DataConfig(train=(source,)), template, 0, lambda event: None, tmp_path / "cache", pairs=True)
    assert counts == [12, 12, 48, 12]


@pytest.mark.parametrize("own", [CHATML, NO_SYSTEM])
def test_a_prompt_is_what_held_out_questions_are(tmp_path: Path, own: str) -> None:
    template, path = ChatTemplate.from_tokenizer(tiny(own)), write(tmp_path / "a.jsonl", ROWS)
    examples = loaded(path, template=template, system_prompt="Be brief.").examples
    for one, other in zip(examples, load_heldout_prompts(SourceConfig(dataset=path), 12, 0, "Be brief."), strict=True):
        assert list(one.input_ids) == template.prompt(other.messages)
        assert (one.text, one.ground_truth, one.row) == (other.messages[-1].content, other.ground_truth, other.row)


def test_several_sources_in_their_order(tmp_path: Path) -> None:
    one, other = (
        write(tmp_path / "a.jsonl", ROWS[:3] * 2),
        write(tmp_path / "b.jsonl", [{**row, "answer": "?"} for row in ROWS[2:6]]),
    )
    made = loaded(one, SourceConfig(dataset=other), SourceConfig(dataset="builtin:arithmetic", max_samples=5))
    assert (
        made.source_of.tolist() == [0] * 6 + [1] * 4 + [2] * 5
        and made.source_of.dtype == np.int32
        and made.lengths.dtype == np.int64
    )
    # One more row is in both.
    assert [part.duplicates for part in made.report.train] == [3, 0, 0] and made.report.duplicates == 4
    assert [part.ground_truths for part in made.report.train] == [6, 0, 5]
    assert [one.ground_truth is None for one in made.examples] == [False] * 6 + [True] * 4 + [False] * 5
    assert (
        made.examples[10].row["gold"] == made.examples[10].ground_truth
        and str(made.locations[10]) == "builtin:arithmetic:1"
    )
    lines = made.report.lines()
    assert lines[0].startswith(f"{one} (question_answer): prompts of 6 of 6 rows, ") and lines[0].endswith(
        " tokens, 6 with a gold answer"
    )
    assert lines[-1] == (
        f"15 prompts to draw completions for, 4 of them repeat an earlier one; mixed by prompt counts: {one} 40 %, "
        f"{other} 26.7 %, builtin:arithmetic 33.3 %"
    )
    assert json.loads(json.dumps(made.report.to_dict()))["train_rows"] == 15


def test_rows_without_a_needed_gold_answer_are_dropped(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [*ROWS, {"question": "Why?", "answer": "So."}])
    assert len(loaded(path)) == 13
    data = DataConfig(train=(SourceConfig(dataset=path),))
    made = load_prompts(data, TEMPLATE, 0, lambda event: None, needs_ground_truth=True)
    assert len(made) == 12 and {why: gone.locations for why, gone in made.report.train[0].dropped.items()} == {
        MISSING_ANSWER: [f"{path}:13"]
    }
    with pytest.raises(UserError, match="1 of 13 rows cannot be used: 1: no gold answer"):
        load_prompts(
            data.model_copy(update={"max_invalid_fraction": 0.05}),
            TEMPLATE,
            0,
            lambda event: None,
            needs_ground_truth=True,
        )


def test_preference_rows_are_refused_as_prompts(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    with pytest.raises(UserError, match="these rows are preference pairs"):
        loaded(path)


def test_progress_and_log_lines_are_emitted(tmp_path: Path) -> None:
    events: list[Event] = []
    load_prompts(
        DataConfig(train=(SourceConfig(dataset=write(tmp_path / "a.jsonl", ROWS)),)), TEMPLATE, 0, events.append
    )
    assert [event.done for event in events if isinstance(event, Progress)] == [0, 12]
    assert [event.message for event in events if isinstance(event, LogMessage)] == [
        f"{tmp_path}/a.jsonl: 12 rows in format `question_answer`"
    ]


def test_progress_counts_the_rows_that_replace_dropped_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenize, "CHUNK", 1)
    faulty = [{"question": f"Faulty {number}?", "answer": "no number"} for number in range(12)]
    source = SourceConfig(dataset=write(tmp_path / "a.jsonl", [*ROWS, *faulty]), max_samples=6)
    events: list[Event] = []
    data = DataConfig(train=(source,))
    made = load_prompts(data, TEMPLATE, 0, events.append, raise_on_invalid=False, needs_ground_truth=True)
    progress = [(event.done, event.total) for event in events if isinstance(event, Progress)]
    assert made.report.train[0].read > 6, "some rows were replaced"
    assert all(done < total for done, total in progress[:-1]) and progress[-1][0] == progress[-1][1]


def prompt_dataset(*counts: int) -> PromptDataset:
    """So many prompts of each source."""
    size = sum(counts)
    source_of = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    examples = [PromptExample(array("i", [1] * (1 + n % 7)), str(n), None, {}) for n in range(size)]
    return PromptDataset(
        examples,
        [RowLocation("a", n + 1) for n in range(size)],
        source_of,
        np.array([len(one.input_ids) for one in examples]),
        PromptReport(()),
    )


def data_of(*weights: float | None) -> DataConfig:
    return DataConfig(train=tuple(SourceConfig(dataset="a.jsonl", weight=weight) for weight in weights))


@given(count=st.integers(1, 60), size=st.integers(1, 20), seed=st.integers(0, 3))
def test_every_prompt_once_an_epoch(count: int, size: int, seed: int) -> None:
    # Settings that a recipe of GRPO does not have are ignored here.
    train = TrainingConfig(prompts_per_step=size, global_batch_size=3, length_window=4)
    made = PromptSampler(prompt_dataset(count), data_of(None), train, seed)
    steps = [made.rows(step) for step in range(made.steps_per_epoch)]
    assert sorted(itertools.chain(*steps)) == list(range(count))
    assert all(len(step) == size for step in steps[:-1] if size <= count and count % size == 0)
    assert made.steps_per_epoch == -(-count // size) and made.steps_of(2.0) == 2 * made.steps_per_epoch
    fresh = PromptSampler(prompt_dataset(count), data_of(None), train, seed)
    assert fresh.rows(5 * made.steps_per_epoch) == made.rows(5 * made.steps_per_epoch)


@given(
    count=st.integers(1, 40),
    size=st.integers(1, 12),
    wanted=st.integers(0, 60),
    step=st.integers(0, 30),
    draw=st.integers(1, 3),
)
def test_replacements_are_not_of_the_step_while_there_are_enough(
    count: int, size: int, wanted: int, step: int, draw: int
) -> None:
    made = PromptSampler(prompt_dataset(count), data_of(None), TrainingConfig(prompts_per_step=size), 1)
    own, others = set(made.rows(step)), made.replacement_prompts(step, draw, wanted)
    enough = count - len(own)
    assert len(others) == wanted and not own & set(others[:enough]) and len(set(others[:count])) == min(wanted, count)
    assert set(others[enough:count]) <= own
    fresh = PromptSampler(prompt_dataset(count), data_of(None), TrainingConfig(prompts_per_step=size), 1)
    assert (
        fresh.replacement_prompts(step, draw, wanted) == others
        and made.replacement_prompts(step, draw, wanted + 3)[:wanted] == others
    )


def test_replacements_differ_by_seed_step_and_draw() -> None:
    made = [PromptSampler(prompt_dataset(300), data_of(None), TrainingConfig(), seed) for seed in (0, 1)]
    drawn = [tuple(order.replacement_prompts(step, draw, 8)) for order in made for step in (3, 4) for draw in (1, 2)]
    assert len(set(drawn)) == 8


def test_replacements_are_drawn_by_weight() -> None:
    weighted = PromptSampler(prompt_dataset(900, 100), data_of(0.2, 0.8), TrainingConfig(prompts_per_step=10), 0)
    counts = Counter(other >= 900 for step in range(400) for other in weighted.replacement_prompts(step, 1, 4))
    assert abs(counts[True] / 1600 - 0.8) < 0.05
    assert sum(row >= 900 for step in range(100) for row in weighted.rows(step)) == 800
    plain = PromptSampler(prompt_dataset(900, 100), data_of(None, None), TrainingConfig(prompts_per_step=10), 0)
    assert Counter(other >= 900 for step in range(400) for other in plain.replacement_prompts(step, 1, 4))[
        True
    ] / 1600 == pytest.approx(0.1, abs=0.03)


SVAMP = {"format": "alpaca", "columns": {"instruction": "Body", "input": "Question", "output": "Answer"}}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "more", "read", "least_used", "least_golds"),
    [
        ("gsm8k/train.jsonl.gz", {}, 5000, 5000, 5000),
        ("math/test.jsonl.gz", {}, 2500, 2475, 2475),
        ("svamp/SVAMP.json", SVAMP, 1000, 1000, 1000),
        ("numinamath_cot_1k/train_first1000.jsonl.gz", {}, 1000, 995, 950),
    ],
    ids=["gsm8k", "math", "svamp", "numinamath"],
)
def test_prompts_of_real_files_are_used_or_have_a_reason(
    path: str, more: dict[str, Any], read: int, least_used: int, least_golds: int
) -> None:
    if not (SHARED / "data" / path).is_file():
        pytest.skip("needs ../shared")
    template = ChatTemplate.from_tokenizer(tokenizer("tokenizers/gpt2"))
    made = loaded(SourceConfig(dataset=str(SHARED / "data" / path), **more), template=template)
    report = made.report.train[0]
    assert (
        (report.read, report.used + report.num_dropped) == (read, read)
        and report.used >= least_used
        and report.ground_truths >= least_golds
    )
    assert (
        report.ground_truths == sum(one.ground_truth is not None for one in made.examples) and made.lengths.max() <= 512
    )
    if report.dropped:
        assert list(report.dropped) == ["longer than data.max_prompt_length (512 tokens)"]
    assert all(template.decode(list(one.input_ids)).count(one.text.strip()) == 1 for one in made.examples[:50])

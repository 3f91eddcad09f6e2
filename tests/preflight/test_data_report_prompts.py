"""The preflight of prompts that completions are drawn for: counts against counts made by hand, and text that tries to
break the screen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from code_rows import HUMANEVAL, MBPP, MBPP_SANITIZED
from malformed_yaml import HOSTILE_TEXTS, is_inert
from test_data_report import ROWS, counts, printed, write
from typer.testing import CliRunner

from lowrank_tune import Recipe
from lowrank_tune.cli import app
from lowrank_tune.data import ChatTemplate, PromptSampler, load_prompts
from lowrank_tune.data_report import DataReport, inspect_data
from lowrank_tune.model.base import load_tokenizer


def recipe(*sources: str | dict[str, Any], heldout: str | None = None, rewards: str = "answer", **data: Any) -> Recipe:
    train = [{"dataset": each} if isinstance(each, str) else each for each in sources]
    return Recipe.from_dict(
        {
            "algorithm": "grpo",
            "data": {"train": train, "max_prompt_length": 60, **data},
            "rewards": [{"name": rewards}],
            "train": {"max_steps": 9, "prompts_per_step": 8},
            "rollout": {"num_generations": 5, "max_new_tokens": 70},
            "evaluate": {"eval_dataset": {"dataset": heldout}} if heldout else {},
        }
    )


def examined(*sources: str | dict[str, Any], **more: Any) -> DataReport:
    return inspect_data(recipe(*sources, **more), lambda event: None)


def test_every_issue_of_prompts_is_counted_with_its_lines(tmp_path: Path) -> None:
    rows: list[Any] = list(ROWS)
    rows[3], rows[4], rows[5] = (
        "{broken",
        {"question": "Well?", "answer": "Well."},
        {"question": "a " * 400, "answer": "1"},
    )
    rows[9] = rows[10] = rows[0]
    path, heldout = (
        write(tmp_path / "a.jsonl", rows),
        write(tmp_path / "c.jsonl", [ROWS[20], {"question": "Who?", "answer": "1"}]),
    )
    found = examined(path, heldout=heldout)
    usual = {
        "malformed JSON": (1, [4]),
        "too long: longer than data.max_prompt_length (60 tokens)": (1, [6]),
        "repeating an earlier prompt": (2, [10, 11]),
        "asking a held-out question": (1, [21]),
    }
    assert counts(found) == {**usual, "no gold answer, which a reward compares with": (1, [5])}
    assert counts(examined(path, heldout=heldout, rewards="./mine.py:f")) == {
        **usual,
        "without a gold answer": (1, [5]),
    }
    assert not found.faults and found.ends is None and found.lengths.over == 1 and found.lengths.longest > 400
    assert sum(found.lengths.counts) == found.report.train_rows == 37 and found.lengths.limit == 60


def test_the_mixture_is_what_is_drawn(tmp_path: Path) -> None:
    made = recipe(
        {"dataset": write(tmp_path / "a.jsonl", ROWS), "weight": 0.25},
        {"dataset": "builtin:arithmetic", "max_samples": 20, "weight": 0.75},
    )
    found = inspect_data(made, lambda event: None)
    prompts = load_prompts(
        made.data, ChatTemplate.from_tokenizer(load_tokenizer(made.base)), made.seed, lambda event: None
    )
    order = PromptSampler(prompts, made.data, made.train, made.seed)
    drawn = [row for step in range(order.steps_per_epoch) for row in order.rows(step)]
    assert [(part.rows, part.weight, part.ground_truths, part.trained) for part in found.parts] == [
        (40, 0.25, 40, 0),
        (20, 0.75, 20, 0),
    ]
    by_source = [[int(prompts.lengths[row]) for row in drawn if prompts.source_of[row] == number] for number in (0, 1)]
    assert list(map(len, by_source)) == [15, 45] and [part.drawn_tokens for part in found.parts] == list(
        map(sum, by_source)
    )
    assert [part.tokens for part in found.parts] == [int(prompts.lengths[prompts.source_of == n].sum()) for n in (0, 1)]
    assert (found.epoch.rows, found.epoch.steps, found.epoch.all_steps) == (
        60,
        8,
        9,
    ) and found.epoch.tokens == prompts.lengths[drawn].sum()


def test_prompts_are_shown_with_their_gold_answers(tmp_path: Path) -> None:
    found = examined(write(tmp_path / "a.jsonl", ROWS), {"dataset": "builtin:arithmetic", "max_samples": 4})
    text = " ".join(printed(found, 160).split())
    for words in (
        "40 of 40 prompts used, 40 with a gold answer",
        "Prompts",
        "an epoch has 44 prompts",
        "in 6 steps of about 7.3 prompts",
        "it draws 5 completions of each prompt, of up to 70 tokens",
        "a.jsonl:1, ",
        " tokens, gold answer 1 ",
        "What is 0 + 1?",
        "builtin:arithmetic:1, ",
        "0 without a gold answer",
        "fit to train on",
        "prompt counts: no source has a weight",
    ):
        assert words in text, words
    assert not [word for word in ("trained", "End token", "⟦", "validate", "rows") if word in text]
    assert json.loads(json.dumps(found.to_dict()))["examples"][0]["ground_truth"] == "1"
    ascii_only = " ".join(printed(found, encoding="ascii").split())
    assert ascii_only.isascii() and "gold answer 1" in ascii_only


def test_too_few_usable_prompts_are_a_fault_and_an_exit_code(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [*ROWS[:6], *[{"question": "Why?", "answer": "So."}] * 4])
    found = examined(path)
    assert len(found.faults) == 1 and "4 of 10 rows cannot be used: 4: no gold answer" in found.faults[0]
    file = tmp_path / "my.yaml"
    file.write_text(json.dumps({key: value for key, value in recipe(path).to_dict().items() if key != "name"}))
    done = CliRunner().invoke(app, ["data", str(file)])
    assert done.exit_code == 2 and "not fit to train on" in done.output and "my: grpo of tiny-tutor" in done.output


@pytest.mark.parametrize("weight", [None, 0.5])
def test_a_report_without_usable_prompts_is_shown(tmp_path: Path, weight: float | None) -> None:
    """No prompt at all; or, with weights, none of one source, so that the mixture cannot be drawn."""
    gone = write(tmp_path / "a.jsonl", [{"question": "Why?", "answer": "So."}])
    found = (
        examined(gone)
        if weight is None
        else examined({"dataset": gone, "weight": weight}, {"dataset": "builtin:arithmetic", "weight": weight})
    )
    assert len(found.faults) == 1 and found.epoch.steps == 0 and "none: there is nothing to train on" in printed(found)
    assert len(found.examples) == (0 if weight is None else 3)


def test_control_characters_in_prompts_are_escaped(tmp_path: Path) -> None:
    rows = [{"question": text[:3000], "answer": "x", "gold": text[:3000]} for text in HOSTILE_TEXTS]
    for start in range(0, len(rows), 3):
        path = write(tmp_path / f"a\u202e{start}.jsonl", [*rows[start : start + 3], ROWS[0]])
        found = examined(path, max_invalid_fraction=1.0, max_prompt_length=8192)
        assert found.report.train[0].used >= 2
        for encoding, width in (("utf-8", 100), ("ascii", 50)):
            assert is_inert(printed(found, width, encoding=encoding))


def test_published_rows_with_unit_tests_need_no_columns(tmp_path: Path) -> None:
    sources = [write(tmp_path / "humaneval.jsonl", [HUMANEVAL]), write(tmp_path / "mbpp.jsonl", [MBPP, MBPP_SANITIZED])]
    found = examined(*sources, rewards="python_tests", max_prompt_length=200)
    assert not found.faults and [source.format for source in found.report.train] == ["humaneval", "mbpp"]
    assert [source.used for source in found.report.train] == [1, 2]

"""The preflight: counts against counts by hand, all difficulties of the real rows, exit codes, and text with control
characters."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from malformed_yaml import HOSTILE_TEXTS, is_inert
from rich.console import Console
from typer.testing import CliRunner

from lowrank_tune import Recipe
from lowrank_tune.cli import app
from lowrank_tune.data import BatchSampler, ChatTemplate, load
from lowrank_tune.data.stats import compute_token_stats
from lowrank_tune.data_report import DataReport, inspect_data
from lowrank_tune.model.base import load_tokenizer
from lowrank_tune.ui.views.data import show

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
ROWS = [{"question": f"What is {n} + 1?", "answer": f"It is {n + 1}.\n#### {n + 1}"} for n in range(40)]
SVAMP = {"instruction": "Body", "input": "Question", "output": "Answer"}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOWRANK_TUNE_CACHE", str(tmp_path / "cache"))


def write(path: Path, rows: list[Any]) -> str:
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
    )
    return str(path)


def recipe(*sources: str | dict[str, Any], heldout: str | None = None, **data: Any) -> Recipe:
    made = Recipe.load("tiny-sft").to_dict()
    made["data"] = {
        "train": [{"dataset": each} if isinstance(each, str) else each for each in sources],
        "max_length": 256,
        **data,
    }
    made["train"]["load_best_model_at_end"] = False
    made["evaluate"] = {"eval_dataset": {"dataset": heldout}} if heldout else {}
    return Recipe.from_dict(made)


def examined(*sources: str | dict[str, Any], **data: Any) -> DataReport:
    return inspect_data(recipe(*sources, **data), lambda event: None)


def printed(found: DataReport, width: int = 100, color: bool = False, encoding: str = "utf-8") -> str:
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding, newline="")
    system: Any = "truecolor" if color else None
    show(found, "a title", Console(file=file, width=width, force_terminal=color, color_system=system, highlight=False))
    file.flush()
    return file.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined, no-any-return]


def counts(found: DataReport) -> dict[str, tuple[int, list[int]]]:
    """By trouble: how many rows, and the lines of the first."""
    return {
        each.description: (each.count, [int(location.rpartition(":")[2]) for location in each.locations])
        for each in found.issues
        if each.count
    }


def test_every_issue_of_rows_is_counted_with_its_lines(tmp_path: Path) -> None:
    rows: list[Any] = list(ROWS)
    rows[3] = "{broken"
    rows[4] = {"question": "Well?", "answer": " "}
    rows[5] = {"question": "a" * 4000, "answer": "b"}
    rows[9] = rows[10] = rows[0]
    made = examined(
        write(tmp_path / "a.jsonl", rows),
        validation=[{"dataset": write(tmp_path / "b.jsonl", [ROWS[1], ROWS[2], ROWS[1]])}],
        heldout=write(tmp_path / "c.jsonl", [ROWS[20], {"question": "Who?", "answer": "Me 1"}]),
    )
    assert counts(made) == {
        "malformed JSON": (1, [4]),
        "without a target: empty answer": (1, [5]),
        "too long: longer than data.max_length (256 tokens)": (1, [6]),
        "repeating an earlier row": (2, [10, 11]),
        "in both splits": (3, [1, 2, 3]),
        "asking a held-out question": (1, [21]),
    }
    assert made.report.shared == 3 and not made.faults and made.lengths.over == 1 and made.lengths.longest > 4000 // 2
    assert sum(made.lengths.counts) == made.report.train_rows + made.report.validation_rows == 40


def test_rows_that_are_too_long_have_a_bar_to_scale_and_a_cure(tmp_path: Path) -> None:
    long = [{"question": "a" * 4000, "answer": "b"}] * 40
    made = examined(write(tmp_path / "a.jsonl", [*ROWS[:20], *long]))
    lines = [line.split() for line in printed(made).splitlines()]
    bars = {tuple(line[:-2]): len(line[-2]) for line in lines if len(line) > 3 and "█" in line[-2]}
    assert bars["over", "256"] == 40 == 2 * max(size for name, size in bars.items() if "to" in name)
    used, rows = made.parts[0].used, made.parts[0].rows
    words = f"20 of 60 rows used, {used - rows} set aside to validate with"
    assert used > rows and words in " ".join(printed(made).split())
    (fault,) = made.faults
    cure = f"raise `data.max_length` (the longest row has {made.lengths.longest:,} tokens), or raise `data.max_invalid"
    assert cure in fault and "mend" not in fault
    (fault,) = examined(write(tmp_path / "b.jsonl", ["{broken"] * 3 + ROWS[:5])).faults
    assert "; correct them, or raise" in fault and "max_length" not in fault


def test_truncated_rows_are_named(tmp_path: Path) -> None:
    conversation = [{"role": role, "content": text} for text in ("one", "two " * 60) for role in ("user", "assistant")]
    made = examined(
        write(tmp_path / "a.jsonl", [{"messages": conversation}] + [{"messages": conversation[:2]}] * 3),
        truncation="truncate",
        max_length=64,
    )
    assert counts(made)["too long, shortened to whole turns"] == (1, [1])
    assert made.report.train[0].truncated_locations == [f"{tmp_path}/a.jsonl:1"]


def test_token_stats_equal_those_of_a_loop(tmp_path: Path) -> None:
    conversation = [{"role": role, "content": f"{role} {turn}"} for turn in range(3) for role in ("user", "assistant")]
    path = write(tmp_path / "a.jsonl", [{"messages": conversation[: 2 + 2 * (n % 3)]} for n in range(7)])
    template = ChatTemplate.from_tokenizer(load_tokenizer(recipe(path).base))
    train = load(recipe(path, eval_fraction=0.0).data, template, 0, lambda event: None).train.select_rows(
        np.array([6, 0, 5, 1])
    )
    end = max(template.end_ids)
    for end_ids in (template.end_ids, {end}, set()):
        found = compute_token_stats(train, end_ids)
        for number, row in enumerate(train):
            mask = list(row.completion_mask)
            spans = "".join("x" if trained else " " for trained in mask).split()
            assert (
                found.trained[number] == sum(mask)
                and found.prompt[number] == mask.index(True)
                and found.answers[number] == len(spans)
            )
            closed = sum(
                1
                for place, trained in enumerate(mask)
                if trained
                and int(row.input_ids[place]) in end_ids
                and not any(
                    mask[earlier] and int(row.input_ids[earlier]) in end_ids and all(mask[earlier:place])
                    for earlier in range(place)
                )
            )
            assert found.unended[number] == len(spans) - closed
        pairs = [pair for row in train for pair in zip(row.input_ids, row.completion_mask, strict=True)]
        assert sum(found.eos_counts.values()) == sum(trained and int(token) in end_ids for token, trained in pairs)
    assert not len(compute_token_stats(train.select_rows(np.zeros(0, np.int64)), {end}).trained)


@pytest.mark.parametrize("weights", [(None, None), (0.25, 0.75)])
def test_the_mixture_is_what_the_loop_draws(tmp_path: Path, weights: tuple[float | None, float | None]) -> None:
    others = [{"question": "Q" + row["question"], "answer": "x"} for row in ROWS[:8]]
    paths = [write(tmp_path / "a.jsonl", ROWS), write(tmp_path / "b.jsonl", others)]
    sources = [
        {"dataset": path} | ({"weight": weight} if weight else {}) for path, weight in zip(paths, weights, strict=True)
    ]
    wanted = recipe(*sources, eval_fraction=0.0)
    found = inspect_data(wanted, lambda event: None)
    assert sum(part.weight for part in found.parts) == pytest.approx(1.0)
    assert [part.weight for part in found.parts] == pytest.approx(weights if weights[0] else [40 / 48, 8 / 48])
    assert ("row counts" in found.weighted_by) == (weights[0] is None)
    data = load(wanted.data, ChatTemplate.from_tokenizer(load_tokenizer(wanted.base)), 0, lambda event: None).train
    order = BatchSampler(data.lengths, data.source_of, weights, wanted.train, wanted.seed)
    drawn = [row for step in range(order.steps_per_epoch) for row in order.rows(step)]
    assert found.epoch.rows == len(drawn) == 48 and found.epoch.tokens == sum(data.lengths[drawn])
    assert (
        found.epoch.trained
        == sum(data.num_trained_tokens(row) for row in drawn)
        == sum(part.drawn_trained for part in found.parts)
    )
    assert (found.epoch.steps, found.epoch.all_steps, found.epoch.passes) == (3, 12, 4.0)


REAL: dict[str, tuple[int, int, dict[str, int], int]] = {  # rows, used, issues, exit code; with max_length 4096
    "gsm8k/train.jsonl.gz": (5000, 5000, {}, 0),
    "gsm8k/test.jsonl.gz": (660, 660, {}, 0),
    "math/test.jsonl.gz": (2500, 2500, {}, 0),
    "svamp/SVAMP.json": (1000, 1000, {}, 0),
    "llamafactory_demos/alpaca_en_demo.json.gz": (999, 999, {"repeating an earlier row": 14}, 0),
    "llamafactory_demos/glaive_toolcall_en_demo.json.gz": (
        300,
        298,
        {"too long: longer than data.max_length (4096 tokens)": 2},
        0,
    ),
    "rasbt_instruction/instruction-data.json": (1100, 1100, {}, 0),
    "rasbt_instruction/instruction-data-with-preference.json": (1100, 1100, {}, 0),
    "open_instruct_samples/sft_sample.jsonl.gz": (100, 93, {}, 0),
    "numinamath_cot_1k/train_first1000.jsonl.gz": (1000, 1000, {}, 0),
    "hub_samples/MetaMathQA.jsonl": (3, 3, {}, 0),
    "hub_samples/OpenMathInstruct-2.jsonl": (3, 3, {}, 0),
    "hub_samples/NuminaMath-CoT.jsonl": (1, 1, {}, 0),
    "hub_samples/ultrachat_200k.jsonl": (1, 1, {}, 0),
    "hub_samples/orca-math-word-problems-200k.jsonl": (2, 2, {}, 0),
}


def real(name: str) -> dict[str, Any]:
    if not (SHARED / name).exists():
        pytest.skip("needs ../shared")
    return {"dataset": str(SHARED / name)} | ({"columns": SVAMP} if "svamp" in name else {})


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_the_report_of_real_rows_has_their_counts(name: str) -> None:
    found = examined(real(name), max_length=4096)
    read, used, issues, code = REAL[name]
    part = found.parts[0]
    assert (part.read, part.used) == (read, used) and bool(found.faults) == bool(code)
    assert {what: count for what, (count, _) in counts(found).items()}.items() >= issues.items()
    assert (
        found.report.train[0].num_dropped
        == read - used
        == sum(each.count for each in found.issues if each.done.startswith("dropped"))
    )
    assert found.ends.trained and found.ends.rows == found.ends.total == found.report.train_rows
    assert all(segment for example in found.examples for _, segment in example.segments)
    assert any("<|end_of_turn|>" in segment for trained, segment in found.examples[0].segments if trained)


@pytest.mark.slow
def test_gold_answers_of_real_rows_with_commas_boxes_and_floats() -> None:
    """GSM8K's thousands commas, MATH's last box, rows of NuminaMath without one, SVAMP's integers as floats."""
    golds = {
        name: examined(real(name), max_length=4096).parts[0].ground_truths
        for name in (
            "gsm8k/train.jsonl.gz",
            "math/test.jsonl.gz",
            "svamp/SVAMP.json",
            "numinamath_cot_1k/train_first1000.jsonl.gz",
        )
    }
    assert list(golds.values())[:3] == [5000, 2500, 1000] and 900 < list(golds.values())[3] < 1000
    assert any(
        ".0" not in text and "Each pack" in text
        for _, text in examined(real("svamp/SVAMP.json")).examples[0].segments[:1]
    )


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("gsm8k/derived_pairs.jsonl.gz", "these rows are preference pairs"),
        ("hh_rlhf/helpful-base_test.jsonl.gz", "these rows are preference pairs"),
        ("llamafactory_demos/dpo_en_demo.json.gz", "these rows are preference pairs"),
        ("aqua/dev.json", "no known format"),
    ],
)
def test_rows_of_unknown_formats_are_one_sentence(name: str, sentence: str) -> None:
    made = CliRunner().invoke(app, ["data", "tiny-sft", f"data.train={json.dumps([real(name)])}"])
    assert made.exit_code == 2 and sentence in made.output and "Traceback" not in made.output


def test_data_command_exit_codes(tmp_path: Path) -> None:
    def code(rows: list[Any], *overrides: str) -> tuple[int, str]:
        path = write(tmp_path / "a.jsonl", rows)
        train = f"data.train={json.dumps([{'dataset': path}])}"
        made = CliRunner().invoke(app, ["data", "tiny-sft", train, *overrides])
        return made.exit_code, made.output

    bad = ["{"] * 6
    assert code(ROWS)[0] == 0
    result = code(ROWS + bad)
    assert result[0] == 2 and "6 of 46 rows cannot be used" in " ".join(result[1].split()) and "Mixture" in result[1], (
        "it is shown all the same"
    )
    assert code(ROWS + bad, "data.max_invalid_fraction=0.2")[0] == 0
    result = code([{"question": "a", "answer": ""}] * 3)
    assert result[0] == 2 and "none of its 3 rows" in " ".join(result[1].split()) and "nothing to train on" in result[1]
    assert code(ROWS, "train.nonsense=1")[0] == 2


def test_rows_that_cannot_be_cut_are_reported_with_their_reason_and_cure(tmp_path: Path) -> None:
    long = "word " * 300
    long_question = {"question": long, "answer": "5"}
    long_answer = {"question": "Well?", "answer": long}
    turns = [*(("user", "Well?"), ("assistant", "5")), *(("user", "And?"), ("assistant", long))]
    conversation = {"messages": [{"role": role, "content": content} for role, content in turns]}
    paths = [
        write(tmp_path / "a.jsonl", [long_question, long_answer, *ROWS]),
        write(tmp_path / "b.jsonl", [conversation]),
    ]
    found = examined(*paths, truncation="truncate", max_invalid_fraction=0.01)
    issues = {issue.description: issue for issue in found.issues}
    limit = "longer than data.max_length (256 tokens)"
    assert issues[f"too long: {limit}, its first question alone"].done == "dropped; raise `data.max_length`"
    uncut = issues[f"too long: {limit}, its first answer included"]
    assert uncut.done == "dropped; no answer is cut: raise `data.max_length`" and uncut.count == 1
    assert issues["too long, shortened to whole turns"].count == 1, "all that can be truncated is"
    (fault,) = found.faults
    assert "raise `data.max_length` (the longest row has" in fault
    dropping = examined(paths[1], max_invalid_fraction=0.5)
    assert any(issue.done == "dropped; raise `data.max_length`" for issue in dropping.issues)


def test_a_weighted_source_without_a_usable_row_is_shown(tmp_path: Path) -> None:
    found = examined(
        {"dataset": write(tmp_path / "a.jsonl", ROWS), "weight": 0.5},
        {"dataset": write(tmp_path / "b.jsonl", [{"question": "a", "answer": ""}]), "weight": 0.5},
    )
    assert found.faults and found.epoch.steps == 0 and "nothing to train on" in printed(found)


def test_an_end_token_that_is_not_trained_is_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "lowrank_tune.data_report.rows.compute_token_stats", lambda rows, end_ids: compute_token_stats(rows, ())
    )
    found = examined(write(tmp_path / "a.jsonl", ROWS))
    assert not found.ends.trained and "learn to stop" in found.faults[0] and "NO:" in printed(found)
    assert counts(found)["without an end token behind an answer"][0] == found.report.train_rows


def test_the_mask_is_shown_in_color_and_without(tmp_path: Path) -> None:
    found = examined(write(tmp_path / "a.jsonl", ROWS), eval_fraction=0.0)
    plain, ascii_only, color = printed(found), printed(found, encoding="ascii"), printed(found, color=True)
    assert "\x1b" not in plain + ascii_only and "\x1b[1;32m⟦" in color
    assert "<|assistant|>⟦It is 1.\n    #### 1<|end_of_turn|><|end_of_text|>⟧" in plain
    assert ascii_only.isascii() and "[[It is 1." in ascii_only and "#### " in ascii_only


def test_control_characters_in_rows_are_escaped(tmp_path: Path) -> None:
    rows = [{"question": text[:3000], "answer": text[:3000]} for text in HOSTILE_TEXTS]
    path = write(tmp_path / "a\u202eb.jsonl", rows)
    found = examined({"dataset": path}, max_length=8192, max_invalid_fraction=1.0, eval_fraction=0.0)
    for encoding in ("utf-8", "ascii"):
        assert is_inert(printed(found, encoding=encoding))
    assert found.report.train[0].used >= len(HOSTILE_TEXTS) - 3, "only lone surrogates are no text"


def of_pairs(*sources: str | dict[str, Any], algorithm: str = "dpo", **data: Any) -> Recipe:
    made = recipe(*sources, **data).to_dict()
    name = {"reward": "reward"}.get(algorithm, "policy")
    adapters = {name: made["adapters"]["policy"]}
    return Recipe.from_dict(
        {
            **{key: value for key, value in made.items() if key not in ("dpo", "reward", "reference")},
            "algorithm": algorithm,
            "adapters": adapters,
        }
    )


def pair(number: int, chosen: str = "Yes, surely.", rejected: str = "No.", **more: Any) -> dict[str, Any]:
    return {"prompt": f"Is it {number}?", "chosen": chosen, "rejected": rejected, **more}


def test_pairs_are_counted_as_pairs(tmp_path: Path) -> None:
    rows: list[Any] = [pair(number, margin=number % 2) for number in range(30)]
    rows[3] = rows[0]
    rows[7], rows[8] = pair(5, "No.", "Yes, surely."), pair(9, "a", "b")
    rows[10], rows[11], rows[12] = pair(1, "Tie.", "Tie."), pair(2, "", "b"), pair(2, "a " * 900)
    rows[13] = {"prompt": "word " * 900, "chosen": "a", "rejected": "b"}
    wanted = of_pairs(write(tmp_path / "a.jsonl", rows), eval_fraction=0.0, max_invalid_fraction=0.2)
    found = inspect_data(wanted, lambda event: None)
    too_long = "too long: longer than data.max_length (256 tokens)"
    assert counts(found) == {
        "both answers are equal": (1, [11]),
        "without a target: empty answer": (1, [12]),
        too_long: (1, [13]),
        f"{too_long}, its prompt alone": (1, [14]),
        "repeating an earlier pair": (1, [4]),
        "contradicting: the same answers also occur the other way round": (2, [6, 8]),
    }
    assert found.sides is not None and (
        found.sides.pairs,
        found.sides.longer,
        found.sides.shorter,
        found.sides.equal,
    ) == (26, 24, 1, 1)
    template = ChatTemplate.from_tokenizer(load_tokenizer(wanted.base))
    data = load(wanted.data, template, wanted.seed, lambda event: None, pairs=True).train
    lengths = [[data.num_trained_tokens(row) for row in range(side, 52, 2)] for side in (0, 1)]
    assert (found.sides.chosen, found.sides.rejected) == pytest.approx((np.mean(lengths[0]), np.mean(lengths[1])))
    assert found.sides.margins == sum(
        bool(row.get("margin")) for number, row in enumerate(rows) if number not in (10, 11, 12, 13)
    )
    assert "in 92 % of the pairs the chosen answer is the longer one" in found.sides.warning
    assert not found.faults and found.lengths.over == 2 and sum(found.lengths.counts) == 52
    part = found.parts[0]
    assert (part.read, part.used, part.rows, part.format) == (
        30,
        26,
        26,
        "preference",
    ) and part.tokens == data.lengths.sum()
    assert (found.epoch.rows, found.epoch.tokens) == (26, data.lengths.sum())
    assert found.epoch.trained == sum(map(sum, lengths)) == part.drawn_trained
    assert (found.ends.rows, found.ends.total) == (26, 26) and found.epoch.steps == 2


def test_pairs_in_both_splits_and_held_out_questions(tmp_path: Path) -> None:
    rows = [pair(number) for number in range(30)]
    made = of_pairs(
        write(tmp_path / "a.jsonl", rows),
        heldout=write(tmp_path / "c.jsonl", [rows[4], {**pair(99), "gold": "1"}]),
        validation=[{"dataset": write(tmp_path / "b.jsonl", [rows[1], rows[2], pair(77)])}],
    )
    found = inspect_data(made, lambda event: None)
    assert (
        counts(found) == {"in both splits": (2, [1, 2]), "asking a held-out question": (1, [5])}
        and found.report.validation_rows == 3
    )


@pytest.mark.parametrize(
    ("longer", "shorter", "warned"), [(13, 7, True), (12, 8, False), (7, 13, True), (19, 0, False), (9, 9, False)]
)
def test_one_sided_lengths_are_reported(tmp_path: Path, longer: int, shorter: int, warned: bool) -> None:
    rows = [
        pair(number, *(("long answer", "no") if number < longer else ("no", "long answer")))
        for number in range(longer + shorter)
    ]
    found = inspect_data(
        of_pairs(write(tmp_path / "a.jsonl", rows), algorithm="reward", eval_fraction=0.0), lambda event: None
    )
    assert found.sides is not None and bool(found.sides.warning) == warned == ("can look right" in printed(found))
    assert not warned or f"the {'longer' if longer > shorter else 'shorter'} one" in found.sides.warning


def test_truncated_pairs_are_named(tmp_path: Path) -> None:
    conversation = [
        {"role": role, "content": text} for text in ("one " * 9, "two " * 9) for role in ("user", "assistant")
    ]
    rows = [{"prompt": conversation[:3], "chosen": "a", "rejected": "b c"}, pair(1), pair(2)]
    found = inspect_data(
        of_pairs(write(tmp_path / "a.jsonl", rows), truncation="truncate", max_length=48, eval_fraction=0.0),
        lambda event: None,
    )
    assert counts(found) == {"too long, without the oldest turns of the prompt": (1, [1])} and found.lengths.over == 1


def test_answers_of_pairs_are_shown_side_by_side_if_they_fit(tmp_path: Path) -> None:
    found = inspect_data(
        of_pairs(
            write(tmp_path / "a.jsonl", [pair(n, "Right.", "Wrong, I say.") for n in range(3)]), eval_fraction=0.0
        ),
        lambda event: None,
    )
    assert (
        len(found.examples) == 6
        and found.examples[1].location == f"{found.examples[0].location.removesuffix('chosen')}rejected"
    )
    for width, encoding, together in (
        (100, "utf-8", True),
        (100, "ascii", True),
        (60, "utf-8", False),
        (60, "ascii", False),
    ):
        text = printed(found, width=width, encoding=encoding)
        assert (
            " ".join(text.split()).count("Is it 0?") == 1
            and "\x1b" not in text
            and max(map(len, text.split("\n"))) <= width
        )
        assert any("Right." in line and "Wrong" in line for line in text.split("\n")) == together
        assert encoding == "utf-8" or text.isascii()
    text = " ".join(printed(found).split())
    assert "0 pairs to validate" in text and "3 of 3 pairs used" in text


def test_control_characters_in_pairs_are_escaped(tmp_path: Path) -> None:
    rows = [{"prompt": text[:3000], "chosen": text[:3000], "rejected": text[:3000] + "!"} for text in HOSTILE_TEXTS]
    for start in range(0, len(rows), 3):
        path = write(tmp_path / f"a\u202e{start}.jsonl", [*rows[start : start + 3], pair(1)])
        found = inspect_data(
            of_pairs(path, max_length=16384, max_invalid_fraction=1.0, eval_fraction=0.0), lambda event: None
        )
        for encoding, width in (("utf-8", 100), ("ascii", 100), ("utf-8", 50), ("ascii", 50)):
            assert is_inert(printed(found, encoding=encoding, width=width))


def test_the_report_of_pairs_as_json(tmp_path: Path) -> None:
    found = inspect_data(
        of_pairs(write(tmp_path / "a.jsonl", [pair(number) for number in range(30)])), lambda event: None
    )
    data = json.loads(json.dumps(found.to_dict()))
    assert (
        data["sides"]["pairs"] == data["train_rows"]
        and data["sides"]["longer"] == data["train_rows"]
        and data["examples"][0]["segments"]
    )
    assert examined(write(tmp_path / "b.jsonl", ROWS)).to_dict()["sides"] is None


def test_data_command_prints_pairs(tmp_path: Path) -> None:
    def code(rows: list[Any], algorithm: str) -> tuple[int, str]:
        path, file = write(tmp_path / "a.jsonl", rows), tmp_path / "recipe.json"
        file.write_text(json.dumps(of_pairs(path, algorithm=algorithm).to_dict()))
        made = CliRunner().invoke(app, ["data", str(file)])
        return made.exit_code, " ".join(made.output.split())

    good = [pair(number) for number in range(30)]
    for algorithm in ("reward", "dpo"):
        assert code(good, algorithm)[0] == 0
        result = code([*good, *[pair(1, "a", "a")] * 9], algorithm)
        assert (
            result[0] == 2
            and "9 of 39 rows cannot be used: 9: both answers are equal (lines 31, 32" in result[1]
            and "Sides" in result[1]
        )
        result = code(ROWS, algorithm)
        assert result[0] == 2 and "expected `chosen` and `rejected`" in result[1] and "Traceback" not in result[1]


@pytest.mark.parametrize(
    ("name", "used"), [("hh_rlhf/helpful-base_test.jsonl.gz", 1187), ("llamafactory_demos/dpo_en_demo.json.gz", 300)]
)
def test_the_report_of_real_pairs_has_their_counts(name: str, used: int) -> None:
    found = inspect_data(of_pairs(real(name), max_length=16384), lambda event: None)
    assert (
        found.parts[0].used == used
        and not found.faults
        and found.ends.rows == found.ends.total == found.report.train_rows
    )
    assert (
        found.sides is not None
        and found.sides.longer + found.sides.shorter + found.sides.equal == found.report.train_rows
    )


def test_the_printed_report_equals_the_snapshot() -> None:
    expected = (Path(__file__).parents[1] / "snapshots" / "data_tiny_sft.txt").read_text(encoding="utf-8")
    assert printed(inspect_data(Recipe.load("tiny-sft"), lambda event: None), 80) == expected, (
        "look at it, then write it anew"
    )


def test_the_run_writes_the_same_numbers(tmp_path: Path) -> None:
    """`data.json` is this picture; tests/ui/test_report.py reads it in a run."""
    found = examined(write(tmp_path / "a.jsonl", ROWS))
    data = json.loads(json.dumps(found.to_dict()))
    assert {"train", "validation", "train_rows", "duplicates", "mixture"} <= set(data), "what it had before"
    assert {"parts", "lengths", "issues", "ends", "epoch", "examples", "faults"} <= set(data)
    assert data["parts"][0]["weight"] == 1.0 and data["ends"]["trained"] is True

"""The data of the seed recipe: five data sets, each in its own columns, counts that hold, boxed answers, tokens beside
those expected."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hub_fixtures import EXAMPLE_ROWS as ALL_SHAPES
from hub_fixtures import write_rows
from tokenizers_for_tests import CHATML, tiny

from lowrank_tune.config import DataConfig, Recipe, SourceConfig
from lowrank_tune.data import ChatTemplate, load, load_prompts, read_source
from lowrank_tune.data.ground_truth import box_answer, last_boxed
from lowrank_tune.data.load import split_mask
from lowrank_tune.errors import ConfigError
from lowrank_tune.events import Event, LogMessage

TEMPLATE = ChatTemplate.from_tokenizer(tiny(CHATML))
SHAPES = {source.dataset: ALL_SHAPES[source.dataset] for source in Recipe.load("myllm-sft").data.train}


def myllm(folder: Path, *overrides: str, most: int = 4) -> Recipe:
    """The preset over local files of these shapes: of each source the same small share of its rows, and a few more to
    draw from."""
    sources = []
    for source in Recipe.load("myllm-sft").data.train:
        rows = (source.max_samples or 0) * most // 20_000
        file = write_rows(folder, source.dataset, range(2, rows + 12))
        kept = source.model_dump(mode="json", exclude={"name", "split"}, exclude_none=True)
        sources.append({**kept, "dataset": str(file), "max_samples": rows})
    return Recipe.load("myllm-sft", f"data.train={json.dumps(sources)}", "data.eval_rows=7", *overrides)


def prepared(recipe: Recipe, folder: Path, events: list[Event] | None = None) -> Any:
    return load(recipe.data, TEMPLATE, recipe.seed, (events if events is not None else []).append, folder / "cache")


def test_settings_of_the_seed_recipe() -> None:
    recipe = Recipe.load("myllm-sft")
    counts = {source.dataset: source.max_samples for source in recipe.data.train}
    assert counts == dict(zip(SHAPES, (260_085, 228_408, 202_618, 109_618, 99_178), strict=True))
    assert sum(rows or 0 for rows in counts.values()) == 899_907 == 891_122 + 8_785 and recipe.data.eval_rows == 8_785
    assert recipe.data.expected_tokens == 403_406_096 and recipe.data.max_length == 4096
    assert "MyLLM, a math and English tutor for students" in (recipe.data.system_prompt or "") and "\\boxed{}" in (
        recipe.data.system_prompt or ""
    )
    grpo, dpo = Recipe.load("myllm-grpo"), Recipe.load("myllm-dpo")
    assert (grpo.grpo.epsilon, grpo.grpo.beta, grpo.rewards[0].name) == (0.2, 0.05, "math_answer")
    assert {each.base.model for each in (recipe, grpo, dpo)} == {"Qwen/Qwen2.5-7B"}
    assert {each.data.system_prompt for each in (recipe, grpo, dpo)} == {
        recipe.data.system_prompt
    } and grpo.reference == dpo.reference == "sft"


def test_five_formats_make_one_mixture(tmp_path: Path) -> None:
    recipe = myllm(tmp_path)
    made, wanted = prepared(recipe, tmp_path), [source.max_samples for source in recipe.data.train]
    assert [report.used for report in made.report.train] == wanted == [52, 45, 40, 21, 19]
    assert (made.report.train_rows, made.report.validation_rows) == (sum(wanted) - 7, 7)
    assert made.report.lines()[-1].endswith(
        f"tokens measured, 403,406,096 expected ({100 * (tokens_of(made) / 403_406_096 - 1):+.1f} %)"
    )
    texts = [TEMPLATE.decode([int(token) for token in row.input_ids], special_tokens=True) for row in made.train]
    assert all(text.count("MyLLM, a math and English tutor") == 1 for text in texts)
    meta = next(text for text in texts if "Twice" in text)
    assert "The answer is $\\boxed{" in meta and "####" not in meta and "The answer is:" not in meta
    chat = next(number for number, text in enumerate(texts) if "And?" in text)
    trained_text = "".join(
        TEMPLATE.decode(
            [
                int(t)
                for t, trained in zip(made.train[chat].input_ids, made.train[chat].completion_mask, strict=True)
                if trained
            ],
            special_tokens=True,
        )
    )
    assert (
        trained_text.startswith("Hello.<|im_end|>")
        and trained_text.endswith("<|im_end|>")
        and "Hi" not in trained_text
        and "MyLLM" not in trained_text
    )
    prompts = load_prompts(recipe.data, TEMPLATE, recipe.seed, lambda event: None)
    with_gold = {
        int(source)
        for source, example in zip(prompts.source_of, prompts.examples, strict=True)
        if example.ground_truth is not None
    }
    assert with_gold == {0, 1, 4}, "UltraChat has no final answers, Orca Math does not mark them"
    assert {number for number, report in enumerate(made.report.train) if report.ground_truths} == with_gold


def tokens_of(made: Any) -> int:
    return int(made.train.lengths.sum()) + int(made.validation.lengths.sum())


def test_the_mixture_by_weights(tmp_path: Path) -> None:
    shares = (0.4, 0.3, 0.1, 0.1, 0.1)
    recipe = myllm(tmp_path, *(f"data.train.{number}.weight={share}" for number, share in enumerate(shares)))
    assert "mixed by weight" in prepared(recipe, tmp_path).report.mixture


def lines(path: Path, rows: int) -> str:
    path.write_text(
        "".join(json.dumps({"question": f"q{n}", "answer": "" if n % 4 == 0 else f"a{n}"}) + "\n" for n in range(rows))
    )
    return str(path)


def drawn(path: str, rows: int, seed: int, folder: Path, **more: Any) -> tuple[Any, list[Event]]:
    events: list[Event] = []
    data = DataConfig(
        train=(SourceConfig(dataset=path, max_samples=rows, **more),), eval_fraction=0.0, max_invalid_fraction=0.5
    )
    return load(data, TEMPLATE, seed, events.append, folder / "cache"), events


def test_a_count_holds_where_drawn_rows_cannot_be_used(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", 400)
    made, events = drawn(path, 200, 3, tmp_path)
    report = made.report.train[0]
    assert report.used == len(made.train) == 200 and report.read == report.used + report.num_dropped > 240
    places = [made.train.row_location(row) for row in range(200)]
    assert len(set(places)) == 200 and not any((int(place.rpartition(":")[2]) - 1) % 4 == 0 for place in places)
    assert not any(isinstance(event, LogMessage) and event.level == "warning" for event in events)
    again, _ = drawn(path, 200, 3, tmp_path / "other")
    assert [again.train.row_location(row) for row in range(200)] == places
    other, _ = drawn(path, 200, 4, tmp_path)
    assert {other.train.row_location(row) for row in range(200)} != set(places)


def test_too_few_rows_give_a_warning_and_all_are_used(tmp_path: Path) -> None:
    made, events = drawn(lines(tmp_path / "a.jsonl", 400), 350, 0, tmp_path)
    assert len(made.train) == 300 and made.report.train[0].read == 400
    warned = [event.message for event in events if isinstance(event, LogMessage) and event.level == "warning"]
    assert len(warned) == 1 and "sets 350 rows, and 300 of the 400 that there are can be used" in warned[0]
    again = drawn(str(tmp_path / "a.jsonl"), 350, 0, tmp_path)[1]
    assert [event.message for event in again if isinstance(event, LogMessage) and event.level == "warning"] == warned, (
        "from the cache too"
    )


def test_prompts_are_drawn_the_same_way(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(
        "".join(json.dumps({"question": f"q{n}", "answer": f"#### {n}" if n % 3 else "none"}) + "\n" for n in range(90))
    )
    data = DataConfig(train=(SourceConfig(dataset=str(path), max_samples=50),), max_invalid_fraction=0.9)
    found = load_prompts(data, TEMPLATE, 0, [].append, needs_ground_truth=True)
    assert len(found) == found.report.train[0].used == 50 and len({str(place) for place in found.locations}) == 50


def test_a_draw_reads_only_its_rows_in_every_kind_of_file(tmp_path: Path) -> None:
    rows = [{"question": f"q{n}", "answer": f"a{n}"} for n in range(60)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "a.csv").write_text(
        "question,answer\n" + "".join(f"{row['question']},{row['answer']}\n" for row in rows)
    )
    names = ["a.jsonl", "a.json", "a.csv"]
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pytest.importorskip("pyarrow").Table.from_pylist(rows), tmp_path / "a.parquet")
    found = [
        [row for _, row in read_source(SourceConfig(dataset=str(tmp_path / name), max_samples=20), 5)]
        for name in (*names, "a.parquet")
    ]
    assert len(found[0]) == 20 and all(each == found[0] for each in found)
    assert found[0] == [row for row in rows if row in found[0]], "in their own order"


@pytest.mark.parametrize("wanted", [1, 7, 50])
def test_validation_split_by_number_of_rows(wanted: int) -> None:
    keys = np.random.default_rng(0).integers(0, 2**63, size=400, dtype=np.uint64)
    kept = split_mask(keys, wanted, 1)
    assert (
        kept.sum() == wanted
        and (kept == split_mask(keys, wanted, 1)).all()
        and (kept != split_mask(keys, wanted, 2)).any()
    )


def test_a_number_and_a_share_contradict_each_other() -> None:
    made = Recipe.load("myllm-sft", "data.eval_fraction=0.1")
    assert made.data.eval_rows is None, "what is written later replaces it"
    with pytest.raises(ConfigError, match=r"data.eval_fraction: contradicts `data.eval_rows`"):
        Recipe.load("tiny-sft", "data.eval_fraction=0.1", "data.eval_rows=5")
    assert Recipe.from_dict(Recipe.load("myllm-sft").to_dict()) == Recipe.load("myllm-sft")
    with pytest.raises(ConfigError, match=r"data.train.0.final_answer: does nothing for pairs"):
        Recipe.load("myllm-dpo", "data.train.0.final_answer=boxed")


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("a\n#### 1,234\nThe answer is: 1,234", "a\nThe answer is $\\boxed{1,234}$."),
        ("so $\\boxed{\\sqrt{5}}$.\nThe answer is: \\sqrt{5}", "so $\\boxed{\\sqrt{5}}$."),
        ("a \\boxed{3}\nThe answer is: 4", "a \\boxed{3}\nThe answer is $\\boxed{4}$."),
        ("x.\nThe answer is: 5%", "x.\nThe answer is $\\boxed{5\\%}$."),
        ("x.\n#### $5\n", "x.\nThe answer is $\\boxed{5}$."),
        ("Then 4 people are left.", "Then 4 people are left."),
        ("So \\boxed{7}.", "So \\boxed{7}."),
        ("One.\n#### Two\nThree.", "One.\n#### Two\nThree."),
        ("#### 7", "The answer is $\\boxed{7}$."),
    ],
)
def test_final_answers_in_boxes(reply: str, expected: str) -> None:
    assert box_answer(reply) == expected == box_answer(expected)


@pytest.mark.parametrize(
    "file", ["MetaMathQA", "NuminaMath-CoT", "OpenMathInstruct-2", "orca-math-word-problems-200k", "ultrachat_200k"]
)
def test_rows_of_the_authors_data_sets_are_used(file: str, tmp_path: Path) -> None:
    path = Path(__file__).parents[3] / "shared" / "data" / "hub_samples" / f"{file}.jsonl"
    if not path.is_file():
        pytest.skip("the samples are not here")
    source = next(each for each in Recipe.load("myllm-sft").data.train if each.dataset.endswith(file))
    local = source.model_copy(update={"dataset": str(path), "split": "train", "max_samples": None})
    data = DataConfig(train=(local,), eval_fraction=0.0, max_length=4096, max_invalid_fraction=0.9)
    made = load(data, TEMPLATE, 0, [].append, tmp_path)
    written = [json.loads(line) for line in path.read_text().split("\n") if line.strip()]
    answers = [
        row.get("messages", [{}])[-1].get("content")
        if file == "ultrachat_200k"
        else next(row[name] for name in ("response", "generated_solution", "solution", "answer") if name in row)
        for row in written
    ]
    texts = [TEMPLATE.decode([int(token) for token in row.input_ids]) for row in made.train]
    assert len(texts) == len(written), [report.reasons() for report in made.report.train]
    for text, answer in zip(texts, answers, strict=True):
        assert " ".join(box_answer(answer).split())[-40:] in " ".join(text.split())
        assert (last_boxed(text) is None) == (last_boxed(box_answer(answer)) is None)

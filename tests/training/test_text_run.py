"""Continued pretraining from rows of plain text: the report on the data, a run, its evaluation, card and merge."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from lowrank_tune import Recipe, run
from lowrank_tune.cli import app
from lowrank_tune.config import BaseConfig, dump
from lowrank_tune.model.base import load_tokenizer

SUBJECTS = ("The cat", "A small dog", "Lily", "Her brother", "The old man")
VERBS = ("found", "lost", "painted", "carried", "looked for")
OBJECTS = ("a red ball", "the key", "two shells", "a long rope", "the blue hat")


def stories(count: int, seed: int = 0) -> list[str]:
    """Texts of one to twelve sentences of few words, which are easily learned."""
    rng = random.Random(seed)
    found = []
    for number in range(count):
        sentences = [
            f"{rng.choice(SUBJECTS)} {rng.choice(VERBS)} {rng.choice(OBJECTS)}." for _ in range(rng.randint(1, 12))
        ]
        found.append(f"{number}. {' '.join(sentences)}")
    return found


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def recipe_of(*sources: dict[str, Any], data: dict[str, Any] | None = None, **train: Any) -> dict[str, Any]:
    return {
        "algorithm": "sft",
        "base": {"model": "tiny-tutor", "bits": 16},
        "adapters": {"policy": {"r": 16, "lora_alpha": 32}},
        "data": {"train": list(sources), "max_length": 96, "eval_rows": 8, **(data or {})},
        "train": {
            "max_steps": 12,
            "global_batch_size": 4,
            "micro_batch_size": 2,
            "learning_rate": 5e-3,
            "gradient_checkpointing": False,
            "logging_steps": 4,
            **train,
        },
        "evaluate": {"eval_steps": 4, "max_new_tokens": 4, "num_completions_to_print": 2},
    }


def num_rows(texts: list[str]) -> int:
    """Returns how many rows of up to 96 tokens the documents are, each with its end token."""
    tokenizer = load_tokenizer(BaseConfig(model="tiny-tutor"))
    return sum(math.ceil((len(tokenizer(text)["input_ids"]) + 1) / 96) for text in texts)


def lowrank_tune(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def events_of(folder: Path, name: str) -> list[dict[str, Any]]:
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    return [event for event in events if event["event"] == name]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOWRANK_TUNE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    path = write(folder / "stories.jsonl", [{"text": text} for text in stories(80)])
    out = folder / "run"
    assert run(Recipe.from_dict(recipe_of({"dataset": path})), out=out, ui="none").status == "done"
    return out


def test_perplexity_of_held_out_documents_falls(finished: Path) -> None:
    checks = [event["stats"] for event in events_of(finished, "evaluated")]
    assert len(checks) == 3 and checks[-1]["eval_perplexity"] < 0.5 * checks[0]["eval_perplexity"]
    for stats in checks:
        assert stats["eval_perplexity"] == pytest.approx(math.exp(stats["eval_loss"]))
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["best"]["perplexity"] == checks[-1]["eval_perplexity"]


def test_a_step_draws_packs_of_documents(finished: Path) -> None:
    data = json.loads((finished / "data.json").read_text())
    packing = data["packing"]
    assert data["train_rows"] == 72 and data["validation_rows"] == 8 and packing["max_length"] == 96
    assert packing["packs"] < packing["documents"] and data["parts"][0]["packs"] == packing["packs"]
    assert data["epoch"]["rows"] == packing["packs"] and data["parts"][0]["rows"] == 72
    steps = events_of(finished, "step_end")
    assert len(steps) == 12 and all(step["tokens"] <= 4 * 96 for step in steps)
    assert sum(step["tokens"] for step in steps) > 0.85 * 12 * 4 * 96


def test_samples_continue_held_out_documents(finished: Path) -> None:
    samples = [json.loads(line) for line in (finished / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    texts = stories(80)
    assert len(samples) >= 6
    for sample in samples:
        assert sample["prompt"] and any(text.startswith(sample["prompt"]) for text in texts)


def test_eval_measures_perplexity_alone(finished: Path, tmp_path: Path) -> None:
    more = write(tmp_path / "more.jsonl", [{"text": text} for text in stories(10, seed=1)])
    for arguments in ((), ("--dataset", more)):
        found = lowrank_tune("eval", str(finished), *arguments)
        assert found.exit_code == 0 and "perplexity" in found.output and "gold answer, and" not in found.output
    records = [json.loads(line) for line in (finished / "evals.jsonl").read_text().splitlines()]
    trained = json.loads((finished / "data.json").read_text())["packing"]["documents"]
    expected = [num_rows(stories(80)) - trained, num_rows(stories(10, seed=1))]
    assert [record["dataset"]["prompts"] for record in records] == expected
    for record in records:
        for metrics in record["metrics"].values():
            assert set(metrics) == {"loss", "perplexity"}
            for end in ("value", "low", "high"):
                assert metrics["perplexity"][end] == pytest.approx(math.exp(metrics["loss"][end]))
        assert record["deltas"]["sft"]["loss"]["value"] < -0.5
    stats = events_of(finished, "evaluated")[-1]["stats"]
    assert records[0]["metrics"]["sft"]["loss"]["value"] == pytest.approx(stats["eval_loss"], rel=1e-3)


def test_report_card_and_merge(finished: Path, tmp_path: Path) -> None:
    assert "perplexity" in (finished / "report.html").read_text(encoding="utf-8")
    card = (finished / "final" / "README.md").read_text(encoding="utf-8")
    assert "stories.jsonl" in card and "perplexity" in card
    merged = lowrank_tune("merge", str(finished), "--out", str(tmp_path / "merged"))
    assert merged.exit_code == 0, merged.output


def test_the_report_on_the_data_counts_documents_and_packs(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"text": text} for text in stories(40)]
    rows[3] = {"text": " "}
    path = write(tmp_path / "stories.jsonl", rows)
    file = tmp_path / "mine.yaml"
    file.write_text(dump(Recipe.from_dict(recipe_of({"dataset": path}))), encoding="utf-8")
    found = lowrank_tune("data", str(file))
    output = " ".join(found.output.split())
    assert found.exit_code == 0, found.output
    for words in (
        "text, 39 of 40 rows used, 8 set aside to validate with, in",
        "1 empty text (dropped)",
        "too long, cut into rows of data.max_length (kept, no token is lost)",
        "<|end_of_text|> (31 times); behind each document",
        "packs of up to 96 tokens",
        "8 rows to validate with",
        "of them trained (100.0 %)",
    ):
        assert words in output


def test_a_mixture_and_text_to_validate_with(tmp_path: Path) -> None:
    path = write(tmp_path / "stories.jsonl", [{"text": text} for text in stories(30)])
    held_out = write(tmp_path / "held_out.jsonl", [{"text": text} for text in stories(6, seed=2)])
    sources = (
        {"dataset": path, "weight": 0.5},
        {"dataset": "builtin:arithmetic", "max_samples": 12, "weight": 0.5},
    )
    made = recipe_of(*sources, max_steps=2)
    made["data"] = {"train": list(sources), "max_length": 96, "validation": [{"dataset": held_out}]}
    file = tmp_path / "mixed.yaml"
    file.write_text(dump(Recipe.from_dict(made)), encoding="utf-8")
    seen = lowrank_tune("data", str(file))
    output = " ".join(seen.output.split())
    assert seen.exit_code == 0 and "rows and packs" in output and "every answer is closed in 12 of 12 rows" in output
    out = tmp_path / "out"
    ran = lowrank_tune("run", str(file), "--out", str(out), "--ui", "plain")
    assert ran.exit_code == 0, ran.output
    found = lowrank_tune("eval", str(out))
    assert found.exit_code == 0 and "perplexity" in found.output


def test_a_run_of_another_algorithm_refuses_text(tmp_path: Path) -> None:
    path = write(tmp_path / "stories.jsonl", [{"text": text} for text in stories(10)])
    for algorithm, more, words in (
        ("grpo", {"rewards": [{"name": "answer"}]}, "these rows are plain text"),
        ("dpo", {}, "are not a preference pair"),
    ):
        file = tmp_path / f"{algorithm}.yaml"
        made = {"algorithm": algorithm, "data": {"train": [{"dataset": path}]}, "train": {"max_steps": 1}, **more}
        file.write_text(dump(Recipe.from_dict({**made, "base": {"model": "tiny-tutor"}})), encoding="utf-8")
        found = lowrank_tune("run", str(file), "--out", str(tmp_path / "out"), "--ui", "plain")
        assert found.exit_code == 2 and words in " ".join(found.output.split()) and f"{algorithm}.yaml" in found.output

"""Tasks of lm-evaluation-harness on the model in memory: tasks made here, their figures against forward passes by hand;
and the error without it."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from export_fixtures import make_run
from models import CPU
from peft import PeftModel
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from lowrank_tune.cli import app
from lowrank_tune.config import BaseConfig
from lowrank_tune.evaluation import Options, evaluate
from lowrank_tune.model.base import load_tokenizer

CHOICES = ["12", "7", "forty", "one"]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
output_type: {kind}
test_split: test
doc_to_text: "How much is {{{{question}}}}?"
{rest}
metadata: {{version: 1.0}}
"""
CHOOSING = (
    'doc_to_choice: "{{choices}}"\ndoc_to_target: answer\nmetric_list: [{metric: acc, aggregation: mean, '
    "higher_is_better: true}]"
)
WRITING = """doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 4, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]"""


def tasks_in(folder: Path, count: int = 12) -> list[dict[str, object]]:
    folder.mkdir()
    rows: list[dict[str, object]] = [
        {"question": f"{number} + {3 * number}", "choices": CHOICES, "answer": number % 4} for number in range(count)
    ]
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, kind, rest in (("sums_chosen", "multiple_choice", CHOOSING), ("sums_written", "generate_until", WRITING)):
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, file=file, kind=kind, rest=rest))
    return rows


@pytest.mark.slow
def test_tasks_of_a_folder_for_base_and_tuned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Multiple choice is worked out again with PEFT: the likeliest choice, by the sum of its log-probs behind the
    question."""
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    made = make_run(tmp_path / "made", bits=16)
    rows = tasks_in(tmp_path / "tasks")
    options = Options(tasks=("sums_chosen", "sums_written"), tasks_path=tmp_path / "tasks")
    found = evaluate(str(made.run), options, lambda event: None, CPU).record
    tokenizer = load_tokenizer(BaseConfig(model=str(made.base)))
    model = AutoModelForCausalLM.from_pretrained(made.base, dtype=torch.float32).eval()
    tuned = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(made.base, dtype=torch.float32), made.run / "final"
    ).eval()
    for who, one in (("base", model), ("sft", tuned)):
        right = [_chosen(one, tokenizer, f"How much is {row['question']}?") == row["answer"] for row in rows]
        accuracy = found["tasks"][who]["sums_chosen acc"]
        assert accuracy["value"] == pytest.approx(sum(right) / len(right)) and accuracy["prompts"] == len(rows)
        assert accuracy["low"] < accuracy["value"] < accuracy["high"] and "wilson" in accuracy["interval"]
        assert found["tasks"][who]["sums_written exact_match"]["value"] == 0.0
    assert found["metrics"] == {"base": {}, "sft": {}}, "without --dataset, only the tasks"
    again = Options(tasks=("sums_chosen",), tasks_path=tmp_path / "tasks", limit=5, apply_chat_template=True)
    cut = evaluate(str(made.run), again, lambda event: None, CPU).record
    assert cut["tasks"]["sft"]["sums_chosen acc"]["prompts"] == 5


def _chosen(model: torch.nn.Module, tokenizer: object, question: str) -> int:
    sums = []
    for choice in CHOICES:
        start = tokenizer(question)["input_ids"]  # type: ignore[operator]
        ids = tokenizer(f"{question} {choice}")["input_ids"]  # type: ignore[operator]
        assert ids[: len(start)] == start
        with torch.no_grad():
            logps = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(dim=-1)
        sums.append(sum(float(logps[place - 1, ids[place]]) for place in range(len(start), len(ids))))
    return max(range(len(sums)), key=sums.__getitem__)


@pytest.mark.slow
def test_unknown_tasks_are_reported_before_anything_is_loaded(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    tasks_in(tmp_path / "tasks")
    messages = []
    for more in (
        ["--tasks", "sums_chosenn", "--tasks-path", str(tmp_path / "tasks")],
        ["--tasks", "gsm8k", "--tasks-path", "nowhere"],
    ):
        result = CliRunner().invoke(app, ["eval", "tiny-tutor", *more])
        assert result.exit_code == 2, result.output
        messages.append(result.stderr.strip())
    assert "did you mean `sums_chosen`?" in messages[0] and "is not a folder" in messages[1]


def test_without_the_harness_the_error_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "lm_eval" else found(name, *more)
    )
    result = CliRunner().invoke(app, ["eval", "tiny-tutor", "--tasks", "gsm8k"])
    assert result.exit_code == 2 and result.stderr.strip() == (
        "--tasks needs lm-evaluation-harness, which is not installed: pip install 'lowrank-tune[harness]'"
    )
    assert "--tasks is empty" in CliRunner().invoke(app, ["eval", "tiny-tutor", "--tasks", ","]).stderr

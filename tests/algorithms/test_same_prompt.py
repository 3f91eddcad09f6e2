"""One prompt: its ids in training, rollouts, chat, eval and the Modelfile of a run are those that `apply_chat_template`
gives, on any day."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from export_fixtures import FinishedRun, make_run
from models import CPU
from stopped_clock import stop_clock
from tokenizers import processors

import lowrank_tune.evaluation.evaluation as evaluation
from lowrank_tune import Recipe, UserError
from lowrank_tune.assembly.finished_run import load_finished_run
from lowrank_tune.assembly.rl import load_train_prompts
from lowrank_tune.chat import Conversation, load_chat_model
from lowrank_tune.config import BaseConfig
from lowrank_tune.data import ChatTemplate, load
from lowrank_tune.events import Event
from lowrank_tune.export.modelfile import has_bos, modelfile_text
from lowrank_tune.export.ollama import go_template, quoted
from lowrank_tune.export.template_probe import derive_turns
from lowrank_tune.generation import Engine
from lowrank_tune.model.base import load_tokenizer

DAY = "2024-07-26"
SYSTEM, QUESTION = "Be kind.", "What is 2 + 2?"
TURNS = (
    "{% for m in messages %}{% set c = m.content.split('</think>')[-1] if m.role == 'assistant' else m.content %}"
    "{{ '<|' + m.role + '|>' + c + '<|end_of_turn|>' }}{% endfor %}"
)
KEEPING_TURNS = "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end_of_turn|>' }}{% endfor %}"
TEMPLATES = {
    "thought": "{{ bos_token }}" + TURNS + "{% if add_generation_prompt %}{{ '<|assistant|><think>\n' }}{% endif %}",
    "no bos": TURNS + "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}",
    "dated": "{{ bos_token }}{{ strftime_now('%d %b %Y') }}"
    + TURNS
    + "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}",
    "keeps thoughts": "{{ bos_token }}"
    + KEEPING_TURNS
    + "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}",
}


def ignore(event: Event) -> None:
    pass


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    return make_run(tmp_path_factory.mktemp("prompts"))


@pytest.fixture(params=TEMPLATES)
def case(made: FinishedRun, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A run over a base with this template, whose tokenizer puts its BOS before every text of its own; and
    transformers' own ids of the run's prompt on the day of the run."""
    tokenizer = load_tokenizer(BaseConfig(model=str(made.base)))
    tokenizer.chat_template = TEMPLATES[request.param]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{tokenizer.bos_token} $A", special_tokens=[(tokenizer.bos_token, tokenizer.bos_token_id)]
    )
    tokenizer.save_pretrained(made.base)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(2 * (json.dumps({"question": QUESTION, "answer": "4"}) + "\n"))
    stored = json.loads((made.run / "run.json").read_text())["recipe"]
    data = {"train": [{"dataset": str(rows)}], "eval_fraction": 0.5, "system_prompt": SYSTEM}
    if request.param == "dated":
        data["template_date"] = DAY
    recipe = Recipe.from_dict({**stored, "data": data})
    (made.run / "run.json").write_text(json.dumps({"version": 2, "recipe": recipe.to_dict()}))
    monkeypatch.setenv("LOWRANK_TUNE_CACHE", str(tmp_path / "cache"))
    stop_clock(monkeypatch, "2024-07-26")
    tokenizer = load_tokenizer(recipe.base)
    turns = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": QUESTION}]
    stock = list(tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False))
    stop_clock(monkeypatch, "2026-11-28")
    return request.param, made.run, recipe, tokenizer, stock, str(rows)


def undated_modelfile(made: FinishedRun, chat_template: str) -> tuple[str, list[str]]:
    """The Modelfile of a run without a stored date over a base with this template, and the warnings."""
    tokenizer = load_tokenizer(BaseConfig(model=str(made.base)))
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(made.base)
    stored = json.loads((made.run / "run.json").read_text())
    stored["recipe"]["data"].pop("template_date", None)
    (made.run / "run.json").write_text(json.dumps(stored))
    warnings: list[str] = []
    text = modelfile_text(
        load_finished_run(made.run), None, "./m.gguf", None, None, lambda event: warnings.append(event.message)
    )
    return text, warnings


def test_training_and_rollouts(case: Any) -> None:
    _, _, recipe, tokenizer, stock, _ = case
    template = ChatTemplate.from_tokenizer(tokenizer, recipe.data.template_date)
    row = load(recipe.data, template, 0, ignore).train[0]
    untrained = [int(token) for token in row.input_ids[: list(row.completion_mask).index(True)]]
    assert untrained[: len(stock)] == stock
    # An answer without a thought closes at once what the prompt opens, and the empty thought is not trained.
    assert template.decode(untrained[len(stock) :], special_tokens=True).strip() in ("", "</think>")
    assert [list(example.input_ids) for example in load_train_prompts(recipe, template, ignore).examples] == 2 * [stock]


def test_chat(case: Any) -> None:
    _, folder, _, _, stock, _ = case
    chat_model = load_chat_model(str(folder), ignore, device=CPU)
    conversation = Conversation(system_prompt=chat_model.system_prompt)
    assert conversation.truncate("tuned", 0, QUESTION, chat_model.template, None, 8).input_ids == stock


def test_eval(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, folder, _, _, stock, rows = case
    received = []

    class Stopping(Engine):
        def generate(self, prompts: Any, *more: Any) -> Any:
            received.extend(prompts)
            raise UserError("enough")

    monkeypatch.setattr("lowrank_tune.evaluation.evaluator.Engine", Stopping)
    with pytest.raises(UserError, match="enough"):
        evaluation.evaluate(str(folder), evaluation.Options(dataset=rows), ignore, CPU)
    assert received == 2 * [stock]


def test_modelfile(case: Any) -> None:
    name, folder, _, tokenizer, stock, _ = case
    finished, warnings = load_finished_run(folder), []
    text = modelfile_text(finished, None, "./m.gguf", None, None, lambda event: warnings.append(event.message))
    dated = ChatTemplate.from_tokenizer(tokenizer, finished.recipe.data.template_date)
    turns, bos = derive_turns(dated.render), tokenizer.bos_token
    assert turns is not None and f"TEMPLATE {quoted(go_template(turns, bos))}" in text
    written = turns.write([("system", SYSTEM), ("user", QUESTION)])
    assert tokenizer(written, add_special_tokens=False)["input_ids"] == stock
    assert has_bos(finished) == written.startswith(bos) == (name != "no bos")
    assert any(f"Ollama puts {bos} before every prompt" in warning for warning in warnings) == (name == "no bos")
    assert ("here it stays 2024-07-26, as in training" in text) == (name == "dated")
    assert ("drops the thoughts of earlier answers" in text) == (name != "keeps thoughts")


def test_a_modelfile_of_a_run_without_a_stored_date_warns_of_it(
    made: FinishedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_clock(monkeypatch, "2026-11-28")
    text, warnings = undated_modelfile(made, TEMPLATES["dated"])
    assert "as in training" not in text
    remark = "here it stays 2026-11-28, the day of this export, because the run stored no date"
    assert remark in text and any(remark in warning for warning in warnings)


def test_a_modelfile_of_a_template_that_refuses_thoughts(made: FinishedRun) -> None:
    refusing = "{% for m in messages if '<think>' in m.content %}{{ raise_exception('no thoughts') }}{% endfor %}"
    text, warnings = undated_modelfile(made, refusing + TEMPLATES["keeps thoughts"])
    assert "TEMPLATE" in text and "refuses the thoughts of earlier answers; Ollama sends" in text and not warnings


def test_an_export_builds_the_chat_template_once(made: FinishedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    built, from_tokenizer = [], ChatTemplate.from_tokenizer

    def counted(*arguments: Any, **kwargs: Any) -> ChatTemplate:
        built.append(arguments)
        return from_tokenizer(*arguments, **kwargs)

    monkeypatch.setattr(ChatTemplate, "from_tokenizer", counted)
    finished = load_finished_run(made.run)
    modelfile_text(finished, None, "./m.gguf", None, None, ignore)
    has_bos(finished)
    assert len(built) == 1

"""`chat --jsonl` and `ask`: each answer is matched with its question, and is the one that a chat gives."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from export_fixtures import FinishedRun, make_run
from typer.testing import CliRunner, Result

from lowrank_tune import UserError
from lowrank_tune.chat import Answer, Conversation, SamplingOptions, ask
from lowrank_tune.chat.answers import answer_all
from lowrank_tune.chat.questions import Question, parse_question
from lowrank_tune.cli import app
from lowrank_tune.data.formats import InvalidRow
from lowrank_tune.data.message import Message

TALK = [
    {"role": "user", "content": "What is 7 + 8?"},
    {"role": "assistant", "content": "15."},
    {"role": "user", "content": "And 9 * 3?"},
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    return make_run(tmp_path_factory.mktemp("answers"))


def chat(made: FinishedRun, *words: str, typed: str) -> Result:
    return CliRunner().invoke(app, ["chat", str(made.run), "--max-new-tokens", "8", *words], input=typed)


def records(done: Result) -> list[dict[str, Any]]:
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_each_answer_is_matched_with_its_question(made: FinishedRun) -> None:
    questions = ["What is 7 + 8?", "", json.dumps({"id": 7, "prompt": "Why?\nSay it."}), json.dumps({"messages": TALK})]
    done = chat(made, "--jsonl", typed="\n".join(questions))
    assert done.exit_code == 0, done.stderr
    found = records(done)
    assert [record["question"] for record in found] == ["What is 7 + 8?", "Why?\nSay it.", "And 9 * 3?"]
    assert [record["line"] for record in found] == [1, 3, 4] and found[1]["id"] == 7 and "id" not in found[0]
    assert {record["variant"] for record in found} == {"tuned"}
    assert all(record["finish_reason"] in ("stop", "length", "turn") for record in found)
    assert all(1 <= record["tokens"] <= 8 for record in found)
    # each line is a conversation of its own: the same answers as alone, and as in a chat that is reset
    answers = [record["answer"] for record in found[:2]]
    options = SamplingOptions(max_new_tokens=8)
    assert [answer.text for answer in ask(str(made.run), questions[0], "Why?\nSay it.", options=options)] == answers
    plain = chat(made, typed=f'{questions[0]}\n/reset\n"""Why?\nSay it."""\n')
    assert all(text.replace("\t", "    ") in plain.stdout for text in answers)


def test_both_variants_have_a_line_each(made: FinishedRun) -> None:
    found = records(chat(made, "--jsonl", "--variant", "both", typed="Why?\nWho?\n"))
    pairs = [(record["line"], record["variant"]) for record in found]
    assert pairs == [(1, "base"), (1, "tuned"), (2, "base"), (2, "tuned")]
    assert found[0]["answer"] != found[1]["answer"]


def test_answers_before_a_faulty_line_are_written(made: FinishedRun) -> None:
    done = chat(made, "--jsonl", typed='Why?\n{"prompt": 3}\nWho?\n')
    assert done.exit_code == 2 and "line 2: `prompt` is not a text" in done.stderr
    assert [record["line"] for record in records(done)] == [1]
    long = chat(made, "--jsonl", typed="word " * 3000)
    assert long.exit_code == 2 and "line 1: the question takes" in long.stderr


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("{no", "is not a JSON object"),
        ("{}", "either `prompt` or `messages`"),
        ('{"prompt": "x", "messages": []}', "either `prompt` or `messages`"),
        ('{"prompt": " "}', "is not a text"),
        ('{"messages": []}', "ends with a message of the user"),
        ('{"messages": "x"}', "ends with a message of the user"),
        ('{"messages": [{"role": "tool", "content": "x"}]}', "needs a `role`"),
        ('{"messages": [{"role": "user"}]}', "needs a `role`"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}', "ends with a message of the user"),
        ("/reset", "is a command"),
        ("/rese", "did you mean `/reset`"),
    ],
)
def test_a_faulty_line_is_refused(line: str, why: str) -> None:
    with pytest.raises(UserError, match=why.replace("{", r"\{")):
        parse_question(line)


class RefusingTemplate:
    def prompt(self, messages: object) -> list[int]:
        raise InvalidRow("the base's chat template refuses it: no system prompts")


def test_what_the_template_refuses_is_a_sentence() -> None:
    why = "this cannot be rendered: the base's chat template refuses it: no system prompts"
    with pytest.raises(UserError, match=f"^{why}"):
        Conversation().truncate("base", 0, "Why?", RefusingTemplate(), None, 8)  # type: ignore[arg-type]
    chat_model = SimpleNamespace(system_prompt=None, template=RefusingTemplate())
    questions = [Question([Message("user", "Why?")], 7)]
    with pytest.raises(UserError, match=f"^line 7: {why}"):
        list(answer_all(chat_model, questions, ["base"], SamplingOptions(), None))  # type: ignore[arg-type]


def test_a_question_may_begin_with_a_slash() -> None:
    assert parse_question("//etc is what?").messages == [Message("user", "/etc is what?")]


@pytest.mark.parametrize(("encoding", "is_escaped"), [("utf-8", False), ("latin-1", True), ("ascii", True)])
def test_a_line_can_be_written_in_every_encoding(encoding: str, is_escaped: bool) -> None:
    question = Question([Message("user", "7 \u2192 ?")], 1)
    line = Answer(question, "tuned", "\u00e9", "stop", 1).to_json(encoding)
    assert line.encode(encoding) and json.loads(line)["question"] == question.text and line.isascii() == is_escaped
    surrogate = Answer(replace(question, id="\ud800"), "tuned", "x", "stop", 1).to_json(encoding)
    assert surrogate.isascii() and json.loads(surrogate)["id"] == "\ud800"


def test_a_model_without_adapters_has_no_tuned_answers() -> None:
    done = CliRunner().invoke(app, ["chat", "tiny-tutor", "--jsonl", "--variant", "tuned"], input="x\n")
    assert done.exit_code == 2 and "only the base can answer" in done.stderr and Path("tiny-tutor").exists() is False

"""Chat templates that compute without end or fill the memory: a clear error or a dropped row, in time, and nothing of
it in the memory of this process."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers_for_tests import CHATML, tiny

from lowrank_tune import Recipe
from lowrank_tune.config import DataConfig, SourceConfig
from lowrank_tune.data import ChatTemplate, InvalidRow, load, load_prompts
from lowrank_tune.data.load import Prompt
from lowrank_tune.data.message import Message
from lowrank_tune.data.templates import render_process
from lowrank_tune.data.templates.render_process import (
    LimitExceeded,
    RenderLimits,
    RenderProcess,
    RenderRequest,
    Template,
)
from lowrank_tune.data.templates.renderer import Rendering, TemplateRenderer
from lowrank_tune.data_report.common import heldout_ids
from lowrank_tune.errors import UserError
from lowrank_tune.evaluation.responses import ResponseReader
from lowrank_tune.processes.limits import peak_megabytes
from lowrank_tune.processes.worker_process import WorkerProcess, WorkerStarved

LOW = RenderLimits(row_seconds=0.2, megabytes=64, row_chars=1 << 20, batch_seconds=0.1)
DOUBLING = "{% set ns = namespace(x='a') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}"
NESTED = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
POWER = "{% if 7 ** 20000000 %}{% endif %}"
SEARCH = "{% if ('a' * 2000000).rfind('a' * 500000 ~ 'b' ~ 'a' * 500000) %}{% endif %}"
MEMORY = "{{ 'a' * 3000000000 }}"
WORDS = "{% for i in range(99999) %}{{ messages[0]['content'] * 100 }}{% endfor %}"
HANGS = {
    "nested": (NESTED, "exceeds 0.2 s"),
    "power": (POWER, "exceeds 0.2 s"),
    "memory": (MEMORY, "exceeds 64 MB of memory"),
    "doubling": (DOUBLING, "64 MB"),
    "text": ("{{ 'a' * 2000000 }}", "exceeds 1,048,576 characters"),
    "many words": (WORDS, "exceeds "),
}
REFUSED = {
    "range": "{% for i in range(10 ** 9) %}x{% endfor %}",
    "recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import '/etc/passwd' as p %}",
    "syntax": "{% if %}",
    "deep": "{% if 1 %}" * 3000 + "x" + "{% endif %}" * 3000,
    "class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ cycler.__init__.__globals__.os.system('touch PWNED') }}",
    "attr filter": "{{ (''|attr('__class__')).x.y }}",
    "changes messages": "{% set _ = messages.append(messages[0]) %}",
    "huge message": "{{ raise_exception('a' * 1000000) }}",
}
HARMLESS = {
    "long comment": "{# " + "x" * 200_000 + " #}",
    "random": "{{ ['', '']|random }}",
}
AT_WORD = "{% for m in messages %}{% if 'WORD' in m['content'] %}HANG{% endif %}{% endfor %}" + CHATML


@pytest.fixture(scope="module")
def process() -> Iterator[RenderProcess]:
    process = RenderProcess(LOW)
    yield process
    process.close()


def talk(content: str) -> list[Message]:
    return [Message("user", content), Message("assistant", "Fine.")]


@pytest.mark.parametrize("name", HANGS)
def test_a_template_that_exceeds_a_limit_is_refused_when_it_is_loaded(process: RenderProcess, name: str) -> None:
    prefix, fault = HANGS[name]
    tokenizer = tiny(prefix + CHATML)
    tokenizer.name_or_path = "bases/evil"
    before, start = peak_megabytes(), time.process_time()
    with pytest.raises(UserError, match=r"the chat template of bases/evil exceeds .*`chat_template\.jinja`") as caught:
        ChatTemplate.from_tokenizer(tokenizer, process=process)
    assert fault in str(caught.value)
    assert peak_megabytes() - before < 64 and time.process_time() - start < 1.0


@pytest.mark.parametrize("name", REFUSED)
def test_a_template_that_fails_is_refused(process: RenderProcess, name: str) -> None:
    with pytest.raises(UserError, match="the base's chat template renders neither a question and its answer"):
        ChatTemplate.from_tokenizer(tiny(REFUSED[name] + CHATML), process=process)
    assert not Path("PWNED").exists()


@pytest.mark.parametrize("name", HARMLESS)
def test_a_large_template_is_used(name: str) -> None:
    template = ChatTemplate.from_tokenizer(tiny(HARMLESS[name] + CHATML))
    assert (
        template.encode(talk("Hi")).input_ids == ChatTemplate.from_tokenizer(tiny(CHATML)).encode(talk("Hi")).input_ids
    )


@pytest.mark.parametrize("hang", [NESTED, MEMORY, "{{ 'a' * 2000000 }}"], ids=["time", "memory", "text"])
def test_a_row_that_exceeds_a_limit_is_dropped_alone(process: RenderProcess, hang: str) -> None:
    """The others have the ids that they have without it."""
    template = ChatTemplate.from_tokenizer(tiny(AT_WORD.replace("HANG", hang)), process=process)
    rows = [talk(f"Question {number}") for number in range(150)]
    rows[70] = talk("WORD")
    found = template.encode_many(rows)
    fault = found.pop(70)
    assert isinstance(fault, LimitExceeded) and fault.reason.startswith("the base's chat template exceeds ")
    del rows[70]
    assert found == ChatTemplate.from_tokenizer(tiny(CHATML)).encode_many(rows)


@pytest.mark.parametrize("is_answer", [False, True])
def test_a_template_that_hangs_for_every_row_is_given_up_after_three(process: RenderProcess, is_answer: bool) -> None:
    """Also if only an answer hangs: its prompt, which is rendered before, is no success."""
    template = ChatTemplate.from_tokenizer(tiny(AT_WORD.replace("HANG", MEMORY)), process=process)
    question = "Hm" if is_answer else "WORD"
    answer = "WORD" if is_answer else "Hm"
    rows = [[Message("user", question), Message("assistant", answer)] for _ in range(50)]
    with pytest.raises(UserError, match="exceeds 64 MB of memory on 3 conversations in succession"):
        template.encode_many([*[talk("Hi")] * 3, *rows])


def test_calls_of_one_row_each_are_counted_too(process: RenderProcess) -> None:
    template = ChatTemplate.from_tokenizer(tiny(AT_WORD.replace("HANG", MEMORY)), process=process)
    for question in ("WORD", "WORD", "Hi", "WORD", "WORD"):
        reason = template.validate_messages([Message("user", question)])
        assert (reason is not None) == (question == "WORD")
    with pytest.raises(UserError, match="in succession"):
        template.validate_messages([Message("user", "WORD")])


def test_two_answers_of_one_row_count_once(process: RenderProcess) -> None:
    renderer = TemplateRenderer(tiny(CHATML), AT_WORD.replace("HANG", MEMORY), process)
    row = talk("WORD") * 4
    renderings = [Rendering(row[:end], False, 0) for end in range(1, 9)]
    assert all(isinstance(text, LimitExceeded) for text in renderer.render_all(renderings))


@pytest.mark.slow
def test_c_code_is_killed_and_the_row_is_named(process: RenderProcess) -> None:
    """No signal interrupts a search in a text."""
    template = ChatTemplate.from_tokenizer(tiny(AT_WORD.replace("HANG", SEARCH)), process=process)
    rows = [talk(f"Question {number}") for number in range(20)]
    rows[7] = talk("WORD")
    found = template.encode_many(rows)
    faults = [index for index, row in enumerate(found) if isinstance(row, InvalidRow)]
    assert faults == [7]
    with pytest.raises(UserError, match=r"exceeds 0\.2 s on a short conversation"):
        ChatTemplate.from_tokenizer(tiny(SEARCH + CHATML), process=process)


@pytest.mark.slow
def test_the_default_limits_end_a_template_that_hangs() -> None:
    for hang in (NESTED, MEMORY, SEARCH):
        with pytest.raises(UserError, match="the chat template of the base exceeds"):
            ChatTemplate.from_tokenizer(tiny(hang + CHATML))


@pytest.mark.slow
def test_a_slow_template_is_used(process: RenderProcess) -> None:
    """The limit is one of a row: a batch that takes longer than a reply may is continued."""
    slow = "{% for i in range(9999) %}{% set x = i * i %}{% endfor %}" + CHATML
    rows = [talk(f"Question {number}") for number in range(100)]
    found = ChatTemplate.from_tokenizer(tiny(slow), process=process).encode_many(rows)
    assert found == ChatTemplate.from_tokenizer(tiny(CHATML)).encode_many(rows)


def test_rows_that_are_too_slow_for_one_call_are_rendered_several_in_a_reply(process: RenderProcess) -> None:
    """64 rows of this template take longer than a batch may; a reply of one row each would repeat that time."""
    slow = Template("{% for i in range(30000) %}{% set x = i * i %}{% endfor %}x", {})
    requests = [RenderRequest([{"role": "user", "content": str(number)}], False) for number in range(64)]
    assert len(process.render_some(slow, requests)) > 3


# --- the worker -------------------------------------------------------------------------------------------------------


def render(process: RenderProcess, content: str) -> str | InvalidRow:
    request = RenderRequest([{"role": "user", "content": content}], False)
    return process.render_some(Template("{{ messages[0]['content'] }}", {}), [request])[0]


def test_a_worker_that_was_killed_is_replaced(process: RenderProcess) -> None:
    assert render(process, "a") == "a"
    worker = process._worker
    assert worker is not None
    os.kill(worker.pid, 9)
    assert render(process, "b") == "b"
    assert process._worker is not None and process._worker.pid != worker.pid


@pytest.mark.slow
def test_a_worker_ends_with_its_thread_and_the_next_rendering_starts_another(process: RenderProcess) -> None:
    process.close()
    thread = threading.Thread(target=render, args=(process, "a"))
    thread.start()
    thread.join()
    assert render(process, "b") == "b"


def test_threads_share_the_worker(process: RenderProcess) -> None:
    found: dict[str, str | InvalidRow] = {}

    def work(name: str) -> None:
        for number in range(30):
            found[f"{name}{number}"] = render(process, f"{name}{number}")

    assert render(process, "first") == "first"
    threads = [threading.Thread(target=work, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 120 and all(key == text for key, text in found.items())


@pytest.mark.slow
def test_an_interrupted_request_does_not_answer_the_next(
    process: RenderProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert render(process, "a") == "a"

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(WorkerProcess, "_transfer", interrupt)
        with pytest.raises(KeyboardInterrupt):
            render(process, "b")
    assert render(process, "c") == "c"


def test_a_forked_process_has_its_own_worker() -> None:
    """And the parent's continues."""
    shared = render_process.shared_process()
    assert render(shared, "a") == "a"
    worker = shared._worker
    assert worker is not None
    child = os.fork()
    if not child:
        code = 1
        try:
            code = int(render(shared, "b") != "b" or shared._worker is None or shared._worker.pid == worker.pid)
        finally:
            shared.close()
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    assert render(shared, "c") == "c" and shared._worker is worker


def test_a_worker_that_cannot_start_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(render_process, "MODULE", "lowrank_tune.data.templates.missing")
    with pytest.raises(UserError, match="the process that renders the base's chat template could not start: ModuleNot"):
        render(RenderProcess(), "a")


@pytest.mark.parametrize(
    ("owner", "name", "error", "reason"),
    [
        (WorkerProcess, "request", WorkerStarved("in 9 s other programs"), "was not ready, because the machine is too"),
        (subprocess, "Popen", OSError(errno.EAGAIN, "No processes"), "cannot be started: No processes"),
    ],
    ids=["busy", "no process"],
)
def test_a_worker_that_is_not_ready_is_reported_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, error: Exception, reason: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    process = RenderProcess()
    monkeypatch.setattr(owner, name, fail)
    with pytest.raises(UserError, match=f"^the process that renders the base's chat template {reason}"):
        render(process, "a")
    assert process._worker is None


def test_the_worker_imports_no_torch(process: RenderProcess) -> None:
    assert render(process, "a") == "a" and process._worker is not None
    maps = Path(f"/proc/{process._worker.pid}/maps").read_text(encoding="utf-8")
    assert "libtorch" not in maps
    status = Path(f"/proc/{process._worker.pid}/status").read_text(encoding="utf-8")
    assert int(status.partition("VmRSS:")[2].split()[0]) < 150 * 1024


@pytest.mark.parametrize(
    "text", ["", "\0\x01\x7f", "\ud83d\ude00", "\ud800", "\U0001f600\U0010ffff", "a\r\n\u2028\u0085b", '"\\/', "\ufeff"]
)
def test_any_text_is_exact(process: RenderProcess, text: str) -> None:
    assert render(process, text) == text


def test_what_json_would_change_is_refused(process: RenderProcess) -> None:
    for content in ((1, 2), {1: 2}, b"x", {"a": [{"b": (1,)}]}):
        with pytest.raises(TypeError, match="a chat template takes"):
            process.render_some(Template("x", {}), [RenderRequest([{"role": "user", "content": content}], False)])


def test_a_dropped_row_is_reported_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    rows = [{"prompt": "WORD" if number == 3 else f"Question {number}", "completion": "Yes."} for number in range(40)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    data = DataConfig(train=(SourceConfig(dataset=str(file)),), eval_fraction=0.0, max_length=64)
    template = ChatTemplate.from_tokenizer(tiny(AT_WORD.replace("HANG", MEMORY)))
    (report,) = load(data, template, 0, lambda event: None, tmp_path / "cache").report.train
    assert (report.read, report.used) == (40, 39)
    ((reason, dropped),) = report.dropped.items()
    assert reason == "the base's chat template exceeds 512 MB of memory on it" and dropped.lines() == "line 4"


@pytest.mark.parametrize("kind", ["prompts", "pairs", "held-out", "responses"])
def test_a_template_that_hangs_for_every_row_ends_each_way_of_reading_rows(
    process: RenderProcess, tmp_path: Path, kind: str
) -> None:
    """None of them takes the error for that of a row and goes on for hours."""
    template = ChatTemplate.from_tokenizer(tiny(AT_WORD.replace("HANG", MEMORY)), process=process)
    file = tmp_path / "rows.jsonl"
    row = {"prompt": "WORD", "chosen": "Yes.", "rejected": "No.", "completion": "Yes."}
    names = ("prompt", "chosen", "rejected") if kind == "pairs" else ("prompt", "completion")
    file.write_text((json.dumps({name: row[name] for name in names}) + "\n") * 9, encoding="utf-8")
    data = DataConfig(train=(SourceConfig(dataset=str(file)),), eval_fraction=0.0, max_length=64)
    with pytest.raises(UserError, match="^the chat template of .* on 3 conversations in succession"):
        if kind == "prompts":
            load_prompts(data, template, 0, lambda event: None)
        elif kind == "pairs":
            load(data, template, 0, lambda event: None, tmp_path / "cache", pairs=True)
        elif kind == "responses":
            train = {"train": [{"dataset": "builtin:arithmetic"}]}
            recipe = Recipe.from_dict(
                {"algorithm": "grpo", "data": train, "rewards": [{"name": "answer"}], "train": {"max_steps": 1}}
            )
            ResponseReader(recipe, template, with_token_ids=True).responses(str(file), [], {})
        else:
            heldout_ids([Prompt((Message("user", f"WORD {number}"),), None, {}) for number in range(9)], template)

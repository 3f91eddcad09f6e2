"""Chat templates in pieces, and in Go's words for Ollama: they write what the template writes, or are not used."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from lowrank_tune import UserError
from lowrank_tune.config import BaseConfig
from lowrank_tune.data import ChatTemplate, InvalidRow
from lowrank_tune.data.templates.render_process import RenderRequest, Template, shared_process
from lowrank_tune.export.ollama import Modelfile, go_template, quoted
from lowrank_tune.export.template_probe import ProbeMessages, TemplateTurns, derive_turns
from lowrank_tune.model.base import load_tokenizer
from lowrank_tune.model.base_source import BUILTIN_MODEL

CHATML = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are kind.<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}"
    "{{ m['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA31 = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set rule = messages[0]['content'] %}{% set messages = "
    "messages[1:] %}"
    "{% else %}{% set rule = '' %}{% endif %}{{ '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' }}"
    "{{ strftime_now('%d %b %Y') }}{{ '\n\n' + rule + '<|eot_id|>' }}" + LLAMA3.removeprefix("{{ bos_token }}")
)
MISTRAL = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set rule = messages[0]['content'] + '\n\n' %}"
    "{% set talk = messages[1:] %}"
    "{% else %}{% set rule = '' %}{% set talk = messages %}{% endif %}{% for m in talk %}{% if m['role'] == 'user' %}"
    "{{ '[INST] ' + (rule if loop.AT else '') + m['content'] + '[/INST]' }}{% else %}{{ ' ' + m['content'] + "
    "eos_token }}"
    "{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% "
    "endif %}"
    "{% for m in messages %}{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' }}"
    "{{ m['content'] + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
KNOWN = {
    "chatml": CHATML,
    "llama 3": LLAMA3,
    "llama 3.1": LLAMA31,
    "gemma": GEMMA,
    "mistral, last": MISTRAL.replace("AT", "last"),
    "mistral, first": MISTRAL.replace("AT", "first"),
    "braces": CHATML.replace("You are kind.", "{{ x }}"),
}
CONVERSATIONS: list[list[tuple[str, str]]] = [
    [("user", "Hi")],
    [("system", "Be {{ brief }}."), ("user", 'Hi "you"')],
    [("user", "a"), ("assistant", "b\n\nc"), ("user", "d")],
    [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "{{ .Content }}"), ("assistant", "d"), ("user", "e")],
]


def rendered(jinja: str, conversation: ProbeMessages, asks: bool = True) -> str:
    messages = [{"role": role, "content": text} for role, text in conversation]
    texts, _ = render_jinja_template(
        conversations=[messages], chat_template=jinja, add_generation_prompt=asks, bos_token="<s>", eos_token="</s>"
    )
    return str(texts[0])


def pieces(jinja: str) -> TemplateTurns | None:
    variables = {"bos_token": "<s>", "eos_token": "</s>"}

    def render(messages: list[dict[str, str]], asks: bool) -> str:
        (text,) = shared_process().render_some(Template(jinja, variables), [RenderRequest(messages, asks)])
        if isinstance(text, InvalidRow):
            raise text
        return text

    return derive_turns(render)


def from_package(plain: bool) -> str:
    tokenizer = load_tokenizer(BaseConfig(model=BUILTIN_MODEL))
    if plain:
        tokenizer.add_special_tokens({"extra_special_tokens": []})
        return (
            "{{ bos_token }}{% set marks = {'system': '\n\nSystem:\n', 'user': '\n\nUser:\n', 'assistant': "
            "'\n\nAssistant:\n'} %}"
            + (
                "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '\n\nAssistant:\n' + m['content'] + "
                "eos_token }}{% elif loop.first %}"
                "{{ marks[m['role']].lstrip() + m['content'] }}{% else %}{{ marks[m['role']] + m['content'] }}{% "
                "endif %}{% endfor %}"
                "{% if add_generation_prompt %}{{ '\n\nAssistant:\n' }}{% endif %}"
            )
        )
    return ChatTemplate.from_tokenizer(tokenizer).chat_template


@pytest.mark.parametrize("name", [*KNOWN, "kit", "plain words"])
def test_the_pieces_write_what_the_template_writes(name: str) -> None:
    jinja = KNOWN.get(name) or from_package(name == "plain words")
    found = pieces(jinja)
    assert found is not None
    assert (found.system is None) == (name == "gemma") and (found.later is not None) == (name == "mistral, last")
    for conversation in CONVERSATIONS:
        if name != "gemma" or conversation[0][0] != "system":
            assert found.write(conversation) == rendered(jinja, conversation), conversation


@pytest.mark.parametrize(
    "jinja",
    [
        CHATML.replace("m['content']", "m['content'] | upper"),
        CHATML.replace("m['content']", "m['content'] + loop.index | string"),
        CHATML.replace("m['content']", "(m['content'] if loop.last else m['content'][:4])"),
        "{{ raise_exception('no') }}",
        "nothing",
        CHATML.replace("m['content']", "(m['content'] if messages | length < 4 else 'cut')"),
        LLAMA3.replace("'<|start_header_id|>assistant", "messages[0]['role'] + '"),
    ],
)
def test_template_that_does_more_is_refused(jinja: str) -> None:
    assert pieces(jinja) is None


def test_a_modelfile_of_chatml_word_for_word() -> None:
    found = pieces(CHATML.partition("{% endif %}")[2])
    user, answer = "<|im_start|>user\n", "<|im_start|>assistant\n"
    assert found == TemplateTurns(
        user,
        (user, "<|im_end|>\n"),
        (answer, "<|im_end|>\n"),
        answer,
        ("<|im_start|>system\n", "<|im_end|>\n<|im_start|>user\n"),
    )
    text = Modelfile(
        "./m.gguf",
        None,
        found,
        "",
        "Be kind.\nAlways.",
        ["<|im_end|>", 'a "b"'],
        {"temperature": 0.7, "top_k": 20, "do_sample": True},
        512,
        ["mine"],
    ).text()
    assert (
        text
        == '''# mine
FROM ./m.gguf
TEMPLATE """{{ $first := true }}{{ range $i, $m := .Messages }}{{ $last := eq (len (slice $.Messages $i)) 1 }}{{ if eq .Role "user" }}\
{{ if $first }}{{ $first = false }}{{ if $.System }}<|im_start|>system
{{ $.System }}<|im_end|>
<|im_start|>user
{{ else }}<|im_start|>user
{{ end }}{{ else }}<|im_start|>user
{{ end }}{{ .Content }}<|im_end|>
{{ else if eq .Role "assistant" }}<|im_start|>assistant
{{ .Content }}{{ if not $last }}<|im_end|>
{{ end }}{{ end }}{{ if and $last (ne .Role "assistant") }}<|im_start|>assistant
{{ end }}{{ end }}"""
SYSTEM """Be kind.
Always."""
PARAMETER stop "<|im_end|>"
PARAMETER stop """a "b""""
PARAMETER temperature 0.7
PARAMETER top_k 20
PARAMETER num_ctx 512
'''  # noqa: E501
    )
    bare = Modelfile("qwen3:4b", "./a.gguf", None, "", None, [], {}, 40960, []).text()
    assert bare == "FROM qwen3:4b\nADAPTER ./a.gguf\n"
    with pytest.raises(UserError, match="three quotes in a row"):
        quoted('say """')


def test_a_token_that_the_runner_adds_is_not_written_twice() -> None:
    found = pieces(LLAMA3)
    assert found is not None and "<s>" not in go_template(found, "<s>") and go_template(found, "").count("<s>") == 2


GO = """
package main

import ("encoding/json"; "fmt"; "os"; "strings"; "text/template")

type Message struct{ Role, Content string }
type Case struct { Template string; Messages []*Message }

func main() {
	var cases []Case
	if err := json.NewDecoder(os.Stdin).Decode(&cases); err != nil { panic(err) }
	var answers []string
	for _, one := range cases {
		var system []string
		for _, m := range one.Messages { if m.Role == "system" { system = append(system, m.Content) } }
		var out strings.Builder
		t := template.Must(template.New("").Option("missingkey=zero").Parse(one.Template))
		if err := t.Execute(&out, map[string]any{"System": strings.Join(system, "\\n\\n"), "Messages": one.Messages}); err != nil { panic(err) }
		answers = append(answers, out.String())
	}
	encoded, _ := json.Marshal(answers)
	fmt.Println(string(encoded))
}
"""  # noqa: E501


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("go") is None, reason="Go is not installed")
def test_go_itself_writes_the_same(tmp_path: Path) -> None:
    """Go's own template package, given what Ollama gives it."""
    cases: list[dict[str, Any]] = []
    wanted = []
    for name, jinja in {**KNOWN, "kit": from_package(False), "plain words": from_package(True)}.items():
        found = pieces(jinja)
        assert found is not None
        for conversation in CONVERSATIONS:
            if name != "gemma" or conversation[0][0] != "system":
                cases.append(
                    {
                        "Template": go_template(found, "<s>"),
                        "Messages": [{"Role": role, "Content": text} for role, text in conversation],
                    }
                )
                wanted.append(rendered(jinja, conversation).removeprefix("<s>"))
    (tmp_path / "main.go").write_text(GO)
    done = subprocess.run(
        ["go", "run", "main.go"], cwd=tmp_path, input=json.dumps(cases), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for case, text, right in zip(cases, json.loads(done.stdout), wanted, strict=True):
        assert text == right, case
    conversation = [{"Role": "user", "Content": "a"}, {"Role": "assistant", "Content": "unfinished"}]
    found = pieces(CHATML)
    assert found is not None
    done = subprocess.run(
        ["go", "run", "main.go"],
        cwd=tmp_path,
        input=json.dumps([{"Template": go_template(found, ""), "Messages": conversation}]),
        capture_output=True,
        text=True,
    )
    assert re.search(r"unfinished\Z", json.loads(done.stdout)[0]), "an unfinished answer is continued"


@pytest.mark.parametrize(
    ("positions", "minimum", "expected"), [(131072, 8192, 8192), (131072, 300, None), (512, 300, 512), (4096, 0, None)]
)
def test_a_modelfile_sets_a_context_that_selects_the_frequencies_of_training(
    positions: int, minimum: int, expected: int | None
) -> None:
    """Ollama's own context of 4,096 tokens would select the short factors of RoPE type `longrope`."""
    text = Modelfile("./a.gguf", None, None, "", None, [], {}, positions, [], minimum).text()
    assert text.count("num_ctx") == (expected is not None)
    assert expected is None or f"PARAMETER num_ctx {expected}\n" in text

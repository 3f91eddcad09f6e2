"""Modelfiles for Ollama: the weights, the chat template in Go's template language, system prompt, stops and parameters.

Ollama does not read Jinja. Without a TEMPLATE it compares the one in the GGUF with its own, and without a match it
gives the model the question alone. So a TEMPLATE is written whenever the base's template can be translated to Go
(`template_probe.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lowrank_tune.errors import UserError
from lowrank_tune.export.template_probe import TemplateTurns

PARAMETER_NAMES = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
}
"""Names of a generation config -> names of Ollama."""
DEFAULT_CONTEXT = 4096
"""Ollama's own context length, which is too long for models of a shorter context."""


@dataclass(frozen=True)
class Modelfile:
    """Content of a Modelfile. `start` is a file or a name of Ollama's library, `adapter` the file of an adapter over
    it."""

    start: str
    adapter: str | None
    turns: TemplateTurns | None
    bos: str
    """Text that Ollama puts before the prompt by itself, and the template must not repeat."""
    system: str | None
    stops: Sequence[str]
    generation: Mapping[str, Any]
    context_length: int
    remarks: Sequence[str]
    min_context_length: int = 0
    """Tokens below which Ollama would select other rotary frequencies than those of the training; 0 for none."""

    def text(self) -> str:
        """Returns the text of the file."""
        lines = [f"# {remark}" for remark in self.remarks]
        lines.append(f"FROM {self.start}")
        if self.adapter:
            lines.append(f"ADAPTER {self.adapter}")
        if self.turns is not None:
            template = go_template(self.turns, self.bos)
            if '"""' not in template:
                lines.append(f"TEMPLATE {quoted(template)}")
        if self.system:
            lines.append(f"SYSTEM {quoted(self.system)}")
        for stop in self.stops:
            lines.append(f"PARAMETER stop {quoted(stop)}")
        for key, value in self.generation.items():
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if key in PARAMETER_NAMES and is_number:
                lines.append(f"PARAMETER {PARAMETER_NAMES[key]} {value:g}")
        context_length = min(self.context_length, max(DEFAULT_CONTEXT, self.min_context_length))
        if context_length != DEFAULT_CONTEXT:
            lines.append(f"PARAMETER num_ctx {context_length}")
        return "\n".join(lines) + "\n"


def quoted(text: str) -> str:
    """Returns a quoted value of a Modelfile. Quotes cannot be escaped there, so UserError is raised for three in a
    row."""
    if '"""' in text:
        raise UserError(f"an Ollama Modelfile cannot contain three quotes in a row, and {text[:40]!r} does")
    if '"' in text or "\n" in text:
        return f'"""{text}"""'
    return f'"{text}"'


def go_template(turns: TemplateTurns, bos: str) -> str:
    """Returns a Go template that writes the same text as `turns.write`. `.System` is the system prompt, and an
    unfinished answer at the end is continued."""
    opening = _literal(turns.opening.removeprefix(bos))
    if turns.system is not None:
        condition = "and $last $.System" if turns.later else "$.System"
        opening = _if(condition, _system_block(turns.system, bos), opening)
    later = _literal(turns.user[0])
    if turns.later is not None:
        later = _if("and $last $.System", _system_block(turns.later, ""), later)
    before_question = _if("$first", "{{ $first = false }}" + opening, later)
    after_question = _literal(turns.user[1])
    before_answer, after_answer = map(_literal, turns.assistant)
    question = before_question + "{{ .Content }}" + after_question
    answer = before_answer + "{{ .Content }}" + _if("not $last", after_answer)
    generation_prompt = _if('and $last (ne .Role "assistant")', _literal(turns.generation_prompt))
    return (
        "{{ $first := true }}{{ range $i, $m := .Messages }}{{ $last := eq (len (slice $.Messages $i)) 1 }}"
        f'{{{{ if eq .Role "user" }}}}{question}{{{{ else if eq .Role "assistant" }}}}{answer}{{{{ end }}}}'
        f"{generation_prompt}{{{{ end }}}}"
    )


def _if(
    condition: str,
    text: str,
    otherwise: str | None = None,
) -> str:
    """Returns a condition in Go's template language."""
    if otherwise is not None:
        text = text + "{{ else }}" + otherwise
    return "{{ if " + condition + " }}" + text + "{{ end }}"


def _system_block(around: tuple[str, str], bos: str) -> str:
    before, after = around
    return _literal(before.removeprefix(bos)) + "{{ $.System }}" + _literal(after)


def _literal(text: str) -> str:
    """Returns text that a Go template writes without change."""
    return text.replace("{{", '{{ "{{" }}')

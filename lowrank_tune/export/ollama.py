"""Modelfiles for Ollama: the weights, the chat template in Go's template language, system prompt, stops and parameters.

Ollama takes no Jinja. Without a TEMPLATE it compares the one in the GGUF with those that it knows, and where it knows
none it gives the model the bare question, so one is written wherever the base's template can be put into Go's words
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
"""Of a generation config, and Ollama's."""
DEFAULT_CONTEXT = 4096
"""Ollama's own context length; a model made for less must not be given so much."""


@dataclass(frozen=True)
class Modelfile:
    """What goes into one. `start` is a file or a name of Ollama's library, `adapter` a file to lay over it."""

    start: str
    adapter: str | None
    turns: TemplateTurns | None
    bos: str
    """Text that the runner puts before the prompt by itself, and the template must not repeat."""
    system: str | None
    stops: Sequence[str]
    generation: Mapping[str, Any]
    context_length: int
    remarks: Sequence[str]
    min_context_length: int = 0
    """Tokens below which Ollama would select other rotary frequencies than those in training; 0 for none."""

    def text(self) -> str:
        """The file."""
        lines = [*(f"# {remark}" for remark in self.remarks), f"FROM {self.start}"]
        lines += [f"ADAPTER {self.adapter}"] if self.adapter else []
        if self.turns is None:
            template = None
        else:
            template = go_template(self.turns, self.bos)
        if template is not None and '"""' not in template:
            lines.append(f"TEMPLATE {quoted(template)}")
        if self.system:
            lines.append(f"SYSTEM {quoted(self.system)}")
        lines += [f"PARAMETER stop {quoted(stop)}" for stop in self.stops]
        lines += [
            f"PARAMETER {PARAMETER_NAMES[key]} {value:g}"
            for key, value in self.generation.items()
            if key in PARAMETER_NAMES and isinstance(value, (int, float)) and not isinstance(value, bool)
        ]
        context_length = min(self.context_length, max(DEFAULT_CONTEXT, self.min_context_length))
        lines += [f"PARAMETER num_ctx {context_length}"] if context_length != DEFAULT_CONTEXT else []
        return "\n".join(lines) + "\n"


def quoted(text: str) -> str:
    """A value of a Modelfile, which knows quotes, and no escapes inside them. Raises UserError for what it cannot
    hold."""
    if '"""' in text:
        raise UserError(f"an Ollama Modelfile cannot hold three quotes in a row, and {text[:40]!r} does")
    plain = '"' not in text and "\n" not in text
    return f'"{text}"' if plain else f'"""{text}"""'


def go_template(turns: TemplateTurns, bos: str) -> str:
    """The same text as `turns.write`, by Ollama's messages: a turn's content as it is, `.System` all that the system
    says. An unfinished answer at the end is continued."""
    opening = _literal(turns.opening.removeprefix(bos))
    later = _literal(turns.user[0])
    if turns.system is not None:
        here = "and $last $.System" if turns.later else "$.System"
        opening = f"{{{{ if {here} }}}}{_system_block(turns.system, bos)}{{{{ else }}}}{opening}{{{{ end }}}}"
    if turns.later is not None:
        later = f"{{{{ if and $last $.System }}}}{_system_block(turns.later, '')}{{{{ else }}}}{later}{{{{ end }}}}"
    before = f"{{{{ if $first }}}}{{{{ $first = false }}}}{opening}{{{{ else }}}}{later}{{{{ end }}}}"
    end, generation_prompt, (answer, closed) = (
        _literal(turns.user[1]),
        _literal(turns.generation_prompt),
        map(_literal, turns.assistant),
    )
    return (
        "{{ $first := true }}{{ range $i, $m := .Messages }}{{ $last := eq (len (slice $.Messages $i)) 1 }}"
        f'{{{{ if eq .Role "user" }}}}{before}{{{{ .Content }}}}{end}'
        f'{{{{ else if eq .Role "assistant" }}}}{answer}{{{{ .Content }}}}{{{{ if not $last }}}}{closed}{{{{ end '
        f"}}}}{{{{ end }}}}"
        f'{{{{ if and $last (ne .Role "assistant") }}}}{generation_prompt}{{{{ end }}}}{{{{ end }}}}'
    )


def _system_block(around: tuple[str, str], bos: str) -> str:
    return f"{_literal(around[0].removeprefix(bos))}{{{{ $.System }}}}{_literal(around[1])}"


def _literal(text: str) -> str:
    """Text of a Go template that stands for itself."""
    return text.replace("{{", '{{ "{{" }}')

"""The Modelfile of a run, with which Ollama sends the model the tokens that the run trained with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from lowrank_tune import __version__
from lowrank_tune.assembly.finished_run import FinishedRun
from lowrank_tune.events import Emit, LogMessage
from lowrank_tune.export.gguf.lora import gguf_module
from lowrank_tune.export.model_card import slug
from lowrank_tune.export.ollama import Modelfile
from lowrank_tune.export.template_probe import TemplateTurns, derive_turns, keeps_thoughts
from lowrank_tune.model.base import load_config, load_tokenizer
from lowrank_tune.model.rotary import fixed_rope

NO_TEMPLATE = (
    "the base's chat template cannot be written in Ollama's template language: Ollama uses the one in the GGUF "
    "where it supports it, else the text without a template"
)


def modelfile_text(
    run: FinishedRun,
    system: str | None,
    start: str,
    adapter: str | None,
    file: Path | None,
    emit: Emit,
) -> str:
    """The Modelfile that begins with the weights `start`; `file` is the GGUF file of these weights, where the export
    wrote one."""
    template = run.chat_template
    bos = bos_of_runner(template.tokenizer, file)
    turns = derive_turns(template.render)
    positions, min_context_length = _context_lengths(run)
    return Modelfile(
        start,
        adapter,
        turns,
        bos,
        system or run.recipe.data.system_prompt,
        eos_tokens_of(run),
        GenerationConfig.from_pretrained(run.final).to_diff_dict(),
        positions,
        _remarks(run, turns, bos, adapter, emit),
        min_context_length,
    ).text()


def _context_lengths(run: FinishedRun) -> tuple[int, int]:
    """The longest context that the model has, and the one that selects the rotary frequencies of the run; 0 for any."""
    config = load_config(run.base)
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    rope = fixed_rope(config, run.rope_factors)
    if rope is None:
        return int(positions or 1 << 30), 0
    if rope.factors == "long":
        selecting = max(run.recipe.longest_row, rope.original_length + 1)
    else:
        selecting = 0
    return int(rope.max_row_length or positions or 1 << 30), selecting


def _remarks(
    run: FinishedRun,
    turns: TemplateTurns | None,
    bos: str,
    adapter: str | None,
    emit: Emit,
) -> list[str]:
    """How the file is used, and how the text that Ollama sends differs from the trained one; the latter is also logged
    as a warning."""
    name = slug(run.recipe)
    template = run.chat_template
    remarks = [f"{name}, made with lowrank_tune {__version__}:  ollama create {name} -f Modelfile"]
    if adapter is not None:
        remarks.append(
            "FROM is the base model of the adapter: a GGUF file, or a name in Ollama's library. The closer it is to "
            "the weights in training, the better. `--ollama-format merged` writes one merged model and needs no base."
        )
    warnings = []
    if turns is None:
        warnings.append(f"No TEMPLATE: {NO_TEMPLATE}.")
    else:
        if run.recipe.data.template_date is not None:
            remarks.append(
                f"The base's chat template writes a date; here it stays {template.date_written}, as in training."
            )
        elif template.date_written is not None:
            warnings.append(
                f"The base's chat template writes a date; here it stays {template.date_written}, the day of this "
                "export, because the run stored no date."
            )
        kept = keeps_thoughts(template.render, turns)
        if not kept:
            remarks.append(
                f"The base's chat template {'refuses' if kept is None else 'drops'} the thoughts of earlier answers; "
                "Ollama sends an answer as it is given."
            )
    if bos and not template.begins_with_bos:
        warnings.append(
            f"Ollama puts {bos} before every prompt of this base; its chat template does not, so training had none."
        )
    for warning in warnings:
        emit(LogMessage(level="warning", message=f"Modelfile: {warning}"))
    return [*remarks, *warnings]


def has_bos(run: FinishedRun) -> bool:
    """Whether what runs the model is to put the BOS before every prompt: where the tokenizer does, unless the chat
    template writes none, for then no prompt of the run had one."""
    template = run.chat_template
    return bool(bos_of_runner(template.tokenizer, None)) and template.begins_with_bos


def bos_of_runner(tokenizer: Any, file: Path | None) -> str:
    """The text of the token that is put before every prompt: the GGUF file decides where there is one, else the
    tokenizer; empty for none."""
    adds = tokenizer.bos_token_id is not None and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
    if file is not None:
        field = gguf_module().GGUFReader(file).get_field("tokenizer.ggml.add_bos_token")
        adds = adds if field is None else bool(field.contents())
    return str(tokenizer.bos_token) if adds else ""


def eos_tokens_of(run: FinishedRun) -> Sequence[str]:
    """The tokens that end an answer, as strings."""
    tokenizer = load_tokenizer(run.base)
    eos_token_ids = GenerationConfig.from_pretrained(run.final).eos_token_id
    return [
        str(tokenizer.convert_ids_to_tokens(number))
        for number in ([eos_token_ids] if isinstance(eos_token_ids, int) else eos_token_ids or [])
    ]

"""The Modelfile of a run, with which Ollama gives the model the same tokens as the training did."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from lowrank_tune import __version__
from lowrank_tune.assembly.finished_run import FinishedRun
from lowrank_tune.events import Emit, warning
from lowrank_tune.export.gguf.lora import gguf_module
from lowrank_tune.export.model_card import slug
from lowrank_tune.export.model_files import token_strings
from lowrank_tune.export.ollama import Modelfile
from lowrank_tune.export.template_probe import TemplateTurns, derive_turns, keeps_thoughts
from lowrank_tune.model.base import load_config, load_tokenizer
from lowrank_tune.model.rotary import fixed_rope

UNLIMITED = 1 << 30
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
    """Returns the Modelfile for the weights `start`; `file` is the GGUF file of these weights, if the export wrote
    one."""
    template = run.chat_template
    bos = bos_of_runner(template.tokenizer, file)
    turns = derive_turns(template.render)
    context_length, min_context_length = _context_lengths(run)
    modelfile = Modelfile(
        start=start,
        adapter=adapter,
        turns=turns,
        bos=bos,
        system=system or run.recipe.data.system_prompt,
        stops=eos_tokens_of(run),
        generation=GenerationConfig.from_pretrained(run.final).to_diff_dict(),
        context_length=context_length,
        remarks=_remarks(
            run,
            turns,
            bos,
            adapter,
            emit,
        ),
        min_context_length=min_context_length,
    )
    return modelfile.text()


def _context_lengths(run: FinishedRun) -> tuple[int, int]:
    """Returns the maximum context of the model, and the minimum that selects the rotary frequencies of the run, 0 for
    any."""
    config = load_config(run.base)
    max_length = int(getattr(config.get_text_config(), "max_position_embeddings", None) or UNLIMITED)
    rope = fixed_rope(config, run.rope_factors)
    if rope is None:
        return max_length, 0
    if rope.factors == "long":
        return max_length, max(run.recipe.longest_row, rope.original_length + 1)
    return int(rope.max_row_length or max_length), 0


def _remarks(
    run: FinishedRun,
    turns: TemplateTurns | None,
    bos: str,
    adapter: str | None,
    emit: Emit,
) -> list[str]:
    """Returns how to use the file, and how Ollama's text differs from that of the training, which is also logged as a
    warning."""
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
            reaction = "refuses" if kept is None else "drops"
            remarks.append(
                f"The base's chat template {reaction} the thoughts of earlier answers; Ollama sends an answer as it is "
                "given."
            )
    if bos and not template.begins_with_bos:
        warnings.append(
            f"Ollama puts {bos} before every prompt of this base; its chat template does not, so training had none."
        )
    for remark in warnings:
        emit(warning(f"Modelfile: {remark}"))
    return [*remarks, *warnings]


def has_bos(run: FinishedRun) -> bool:
    """Returns whether software must put the BOS before every prompt: if the tokenizer does, and the chat template
    writes one, since otherwise no prompt of the run had one."""
    template = run.chat_template
    return bool(bos_of_runner(template.tokenizer, None)) and template.begins_with_bos


def bos_of_runner(tokenizer: Any, file: Path | None) -> str:
    """Returns the text of the token that software puts before every prompt, empty for none. The GGUF file decides it,
    if given, else the tokenizer."""
    bos_id = tokenizer.bos_token_id
    adds_bos = bos_id is not None and tokenizer("a").input_ids[:1] == [bos_id]
    if file is not None:
        field = gguf_module().GGUFReader(file).get_field("tokenizer.ggml.add_bos_token")
        if field is not None:
            adds_bos = bool(field.contents())
    return str(tokenizer.bos_token) if adds_bos else ""


def eos_tokens_of(run: FinishedRun) -> Sequence[str]:
    """Returns the tokens that end an answer, as strings."""
    eos_token_ids = GenerationConfig.from_pretrained(run.final).eos_token_id or []
    if isinstance(eos_token_ids, int):
        eos_token_ids = [eos_token_ids]
    return token_strings(load_tokenizer(run.base), eos_token_ids)

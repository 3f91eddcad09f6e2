"""`export`: what a run trained, as other software takes it. Every check that can be made before the work is made before
it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import GenerationConfig

from lowrank_tune import __version__
from lowrank_tune.checkpoint import load
from lowrank_tune.data import Template
from lowrank_tune.errors import UserError
from lowrank_tune.events import Emit, Note
from lowrank_tune.export import llama_cpp
from lowrank_tune.export.export_card import lora_card, model_card, slug
from lowrank_tune.export.finished import Finished, adapters_in, check_base, finished_run
from lowrank_tune.export.fold import fold, saved_part, why_not
from lowrank_tune.export.gguf_lora import TYPES, gguf_module, gguf_tensors, shape_of, write_gguf_lora
from lowrank_tune.export.gguf_model import BITS, DIRECT, convert, quantise, room_for
from lowrank_tune.export.hub import LEFT_OUT, Upload, push
from lowrank_tune.export.merge import Kind, merge, merged_before
from lowrank_tune.export.ollama import Modelfile
from lowrank_tune.export.place import check_ours, check_room, export_folder
from lowrank_tune.export.proof import Proof
from lowrank_tune.export.turns import turns_of
from lowrank_tune.model.base import count_weights, load_base, load_config, load_tokenizer, pick_device

To = Literal["gguf", "gguf-lora", "ollama", "peft", "hub"]
USUAL = {"gguf": "f16", "gguf-lora": "f32", "ollama": "q8_0", "adapter": "f32"}


@dataclass(frozen=True)
class Order:
    """What is wanted: `kind` the type of the numbers (None: the usual one), `base` the weights to merge into, `route`
    of Ollama: one model (`merged`), or an `adapter` over `start`."""

    to: To
    out: Path | None = None
    kind: str | None = None
    base: Kind = "dequantized"
    route: Literal["merged", "adapter"] = "merged"
    start: str = "./base.gguf"
    system: str | None = None
    llama_cpp: Path | None = None
    repo: str | None = None
    public: bool = False
    dry_run: bool = False


def export(
    run: Path,
    order: Order,
    emit: Emit,
    show: Callable[[Proof], None],
    show_upload: Callable[[Upload], None],
    device: torch.device | None = None,
) -> str:
    """Exports what a run trained, and returns where it lies: a folder, or an address. `show` hears how a merged model
    compares with what was trained, `show_upload` what will be pushed.

    Raises UserError where it cannot be done, RunFailed where it failed; then nothing half-written stays.
    """
    if idle := _idle(order):
        raise UserError(
            f"{', '.join(idle)} {'does' if len(idle) == 1 else 'do'} nothing with --to {order.to}"
            + (f" --route {order.route}" if order.to == "ollama" else "")
        )
    found = finished_run(run)
    load(found.final, "final")  # every byte of it is verified
    if order.to == "hub":
        if order.repo is None:
            raise UserError("--to hub needs --repo user/name: nothing is pushed anywhere by itself")
        return push(found.final, order.repo, order.public, show_upload, order.dry_run)
    target = order.out or found.path / "export" / order.to
    check_ours(target)
    if order.to == "peft":
        _copy(found, target, emit)
    elif order.to == "gguf-lora" or (order.to == "ollama" and order.route == "adapter"):
        _lora(found, order, target, emit, device)
    else:
        _model(found, order, target, emit, show, device)
    return str(target)


def _idle(order: Order) -> list[str]:
    """Options that were given and would do nothing."""
    usual, model = Order(order.to), order.to == "gguf" or (order.to == "ollama" and order.route == "merged")
    used = {
        "--out": order.to != "hub",
        "--type": order.to not in ("hub", "peft"),
        "--base": model,
        "--llama-cpp": model,
        "--route": order.to == "ollama",
        "--from": order.to == "ollama" and order.route == "adapter",
        "--system": order.to == "ollama",
        "--repo": order.to == "hub",
        "--public": order.to == "hub",
        "--dry-run": order.to == "hub",
    }
    fields = {"--type": "kind", "--from": "start"}
    return [
        option
        for option, does in used.items()
        if not does and getattr(order, name := fields.get(option, option[2:].replace("-", "_"))) != getattr(usual, name)
    ]


def _copy(found: Finished, target: Path, emit: Emit) -> None:
    """The adapter's folder as it is."""
    check_room(target, sum(path.stat().st_size for path in found.final.rglob("*") if path.is_file()), "the copy")
    with export_folder(target, _facts(found, "peft"), emit) as folder:
        shutil.copytree(found.final, folder, ignore=shutil.ignore_patterns(*LEFT_OUT), dirs_exist_ok=True)


def _lora(found: Finished, order: Order, target: Path, emit: Emit, device: torch.device | None) -> None:
    kind = _kind(order, "adapter", TYPES)
    gguf_module()
    shape = shape_of(load_config(found.base))
    parts = [saved_part(adapter.config.to_dict(), adapter.tensors) for adapter in adapters_in(found).values()]
    if (reason := why_not(parts)) is not None:
        raise UserError(f"this adapter cannot be written as GGUF: {reason}")
    config, tensors = fold(parts)
    gguf_tensors(config, tensors, shape)
    check_room(target, sum(4 * tensor.numel() for tensor in tensors.values()), "the adapter")
    _compare_base(found, emit, device)
    file, ends = f"{slug(found.recipe)}-lora-{kind}.gguf", _ends(found)
    with export_folder(target, _facts(found, order.to, type=kind, route="adapter"), emit) as folder:
        write_gguf_lora(folder / file, found.recipe.name or found.recipe.algorithm, config, tensors, shape, kind)
        if order.to == "ollama":
            (folder / "Modelfile").write_text(
                _modelfile(found, order, order.start, f"./{file}", None, emit), encoding="utf-8"
            )
        _write_card(folder, lora_card(found.recipe, file, kind, order.start if order.to == "ollama" else None, ends))


def _compare_base(found: Finished, emit: Emit, device: torch.device | None) -> None:
    """The adapter means nothing over another base than the one that was trained: tensor by tensor, where this machine
    can tell."""
    at = device or pick_device()
    if found.facts.get("device", at.type) != at.type:
        emit(
            Note(
                level="warning",
                message=f"the base was not compared with the trained one: that can be done on "
                f"{found.facts['device']} only",
            )
        )
        return
    check_base(found, load_base(found.base, load_tokenizer(found.base), at))


def _model(
    found: Finished, order: Order, target: Path, emit: Emit, show: Callable[[Proof], None], device: torch.device | None
) -> None:
    kind = _kind(order, order.to, BITS)
    tool = llama_cpp.quantiser(order.llama_cpp)
    if kind not in DIRECT and tool is None:
        raise UserError(
            f"{kind} needs llama.cpp's quantiser, which is not here: name a built llama.cpp with --llama-cpp, or "
            "`pip install llama-cpp-python` (it builds for minutes), or take --type q8_0, which needs none; Ollama "
            "itself "
            "quantises a 16-bit export (`--type f16`) with `ollama create --quantize q4_K_M`"
        )
    before, weights = merged_before(found, order.base), count_weights(found.base)
    check_room(target, room_for(weights, kind) + (0 if before else 2 * weights), f"the model in {kind}")
    converter = llama_cpp.converter_folder(order.llama_cpp, emit)
    architectures = load_config(found.base).architectures or []
    if architectures and not llama_cpp.knows(converter, architectures):
        raise UserError(f"llama.cpp's converter knows no {architectures[0]}; `--to peft` copies the adapter as it is")
    file, ends = f"{slug(found.recipe)}-{kind}.gguf", _ends(found)
    with export_folder(target, _facts(found, order.to, type=kind, merged=order.base), emit) as folder:
        if before is not None:
            emit(Note(message=f"{before.folder} holds this adapter already merged, and is taken"))
            show(before.proof)
        merged = before or merge(found.path, folder / "merged", order.base, emit, show, device)
        _convert(found, converter, tool, merged.folder, folder / file, kind, emit)
        shutil.rmtree(folder / "merged", ignore_errors=True)
        if order.to == "ollama":
            (folder / "Modelfile").write_text(
                _modelfile(found, order, f"./{file}", None, folder / file, emit), encoding="utf-8"
            )
        _write_card(
            folder, model_card(found.recipe, file, kind, order.base, merged.proof.table(), ends, order.to == "ollama")
        )


def _convert(
    found: Finished, converter: Path, tool: llama_cpp.Quantiser | None, merged: Path, file: Path, kind: str, emit: Emit
) -> None:
    """The file of a merged model; the small types by way of one in 16 bits."""
    name, adds_bos = found.recipe.name or found.recipe.algorithm, bool(_bos(load_tokenizer(found.base), None))
    if kind in DIRECT:
        convert(converter, merged, file, kind, name, adds_bos, emit)
        return
    assert tool is not None
    wide = file.with_name("wide.gguf")
    convert(converter, merged, wide, "bf16", name, adds_bos, emit)
    shutil.rmtree(file.with_name("merged"), ignore_errors=True)  # the room is wanted
    quantise(tool, wide, file, kind, emit)
    wide.unlink()


def _kind(order: Order, what: str, known: Mapping[str, object]) -> str:
    kind = (order.kind or USUAL[what]).lower()
    if kind not in known:
        raise UserError(f"--type {kind} is not known for this export; known are {', '.join(known)}")
    return kind


def _modelfile(found: Finished, order: Order, start: str, adapter: str | None, file: Path | None, emit: Emit) -> str:
    tokenizer = load_tokenizer(found.base)
    jinja = Template.of(tokenizer).jinja

    def render(messages: list[dict[str, str]], asks: bool) -> str:
        return str(
            tokenizer.apply_chat_template(messages, chat_template=jinja, tokenize=False, add_generation_prompt=asks)
        )

    turns, name = turns_of(render), slug(found.recipe)
    remarks = [f"{name}, made with lowrank_tune {__version__}:  ollama create {name} -f Modelfile"]
    if adapter is not None:
        remarks.append(
            "FROM is the base that the adapter was trained over: a GGUF file, or a name of Ollama's library; the "
            "nearer to the "
            "weights in training, the better. `--route merged` makes one model of both, and needs no base."
        )
    if turns is None:
        message = (
            "the base's chat template cannot be put into Ollama's words: Ollama takes the one in the GGUF where it "
            "knows it, else the "
            "bare text"
        )
        emit(Note(level="warning", message=message))
        remarks.append(f"No TEMPLATE: {message}.")
    elif (today := date.today().strftime("%d %b %Y")) in turns.opening:
        remarks.append(f"The base's template writes the date of the day; here it stays {today}.")
    config = load_config(found.base).get_text_config()
    return Modelfile(
        start,
        adapter,
        turns,
        _bos(tokenizer, file),
        order.system or found.recipe.data.system,
        _ends(found),
        GenerationConfig.from_pretrained(found.final).to_diff_dict(),
        int(getattr(config, "max_position_embeddings", None) or 1 << 30),
        remarks,
    ).text()


def _bos(tokenizer: Any, file: Path | None) -> str:
    """The text of the token that is put before every prompt, as the GGUF says, or else as the tokenizer does; empty for
    none."""
    adds = tokenizer.bos_token_id is not None and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
    if file is not None:
        field = gguf_module().GGUFReader(file).get_field("tokenizer.ggml.add_bos_token")
        adds = adds if field is None else bool(field.contents())
    return str(tokenizer.bos_token) if adds else ""


def _ends(found: Finished) -> Sequence[str]:
    """The tokens that end an answer, in letters."""
    tokenizer, ends = load_tokenizer(found.base), GenerationConfig.from_pretrained(found.final).eos_token_id
    return [
        str(tokenizer.convert_ids_to_tokens(number)) for number in ([ends] if isinstance(ends, int) else ends or [])
    ]


def _facts(found: Finished, to: str, **more: str) -> dict[str, Any]:
    base = found.recipe.base.model.partition("@")[0]
    return {
        "made_by": f"lowrank_tune {__version__}",
        "to": to,
        "base": base,
        "revision": found.facts.get("revision"),
        "adapter": found.fingerprint(),
        **more,
    }


def _write_card(folder: Path, text: str) -> None:
    (folder / "README.md").write_bytes(text.encode("utf-8", "replace"))

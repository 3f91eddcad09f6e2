"""`final/`, the folder that a user takes away.

At its root lies one adapter in PEFT's format that answers as the run did, whatever it was trained over: the trained
adapter, with the frozen ones below it folded into it (`train.final_stack: folded`). Then the trained one alone lies in
a folder of its name, where later stages and continued runs read it (`stack.json` says so). With `apart` the root is the
trained one alone, each frozen one lies in a folder of its name, and the card says how to load them together. PPO's
value has a folder of its own. Beside them: model card, tokenizer with chat template, and a generation config with every
token that ends an answer. Nothing here names the machine.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from lowrank_tune.build import Built
from lowrank_tune.checkpoint import Snapshot
from lowrank_tune.events import Note
from lowrank_tune.export.card import Adapters, card
from lowrank_tune.export.fold import Part, fold, why_not
from lowrank_tune.model.adapters import CONFIG, STACK, WEIGHTS
from lowrank_tune.model.base import Base
from lowrank_tune.model.roles import PREFIX, Roles
from lowrank_tune.stage import Stage

HERE = {"name_or_path", "special_tokens_map_file", "tokenizer_file", "is_local", "local_files_only"}
"""Entries of a tokenizer's configuration that say where it was loaded from."""


def final_folder(stage: Stage) -> Snapshot:
    """All files of `final/`, of a stage that has ended."""
    roles, built = stage.built.roles, stage.built
    top, *aside = built.trained
    names = [name.removeprefix(PREFIX) for name in roles.stacks[top]]
    parts, reason = [part_of(roles, name) for name in names], None
    folded = len(names) == 1 or stage.recipe.train.final_stack == "folded"
    if folded and (reason := why_not(parts)) is not None:
        if len(names) > 1:
            message = f"the adapters {', '.join(names)} cannot be folded into one ({reason}): final/ holds them apart"
            stage.emit(Note(level="warning", message=message))
        folded = False
    found = Snapshot()
    root = fold(parts) if folded else (dict(parts[-1].config), dict(parts[-1].tensors))
    found.documents[CONFIG], found.tensors[WEIGHTS] = root
    if len(names) > 1:
        below = {name: stage.adapters[name] for name in names[:-1]}
        found.documents[STACK] = {"version": 1, "stack": names, "below": below, "folded": folded}
        for name, part in [(top, parts[-1])] if folded else zip(names[:-1], parts[:-1], strict=True):
            _add(found, name, part)
    for name in aside:
        _add(found, name, part_of(roles, name))
    try:
        found.others |= tokenizer_files(built)
    # what was trained must not be lost over this
    except (OSError, ValueError, TypeError, NotImplementedError, AttributeError) as error:
        message = (
            f"final/ has no tokenizer: the base's cannot save itself ({type(error).__name__}: {error}); use "
            f"the base's own"
        )
        stage.emit(Note(level="warning", message=message))
    if "policy" in built.trained:
        found.documents["generation_config.json"] = generation_config(built.base, built.stop_ids, built.template.pad_id)
    said = Adapters(names, folded, root[0], speaks="policy" in built.trained)
    text = card(stage.recipe, stage.summary, built.base.revision, said, names_of_ends(built))
    found.others["README.md"] = text.encode("utf-8", "replace")
    return found


def part_of(roles: Roles, name: str) -> Part:
    """An adapter of a loaded model, as it would be saved. A head that stands alone has no scales."""
    return Part(roles.adapter_config(name), roles.adapter_tensors(name), roles.scalings(name))


def _add(found: Snapshot, name: str, part: Part) -> None:
    found.documents[f"{name}/{CONFIG}"], found.tensors[f"{name}/{WEIGHTS}"] = dict(part.config), dict(part.tensors)


def tokenizer_files(built: Built) -> dict[str, bytes]:
    """The tokenizer's files with the chat template that was trained with, the kit's own where the base brought none."""
    return files_of_tokenizer(built.template.tokenizer, built.template.jinja)


def files_of_tokenizer(tokenizer: Any, template: str) -> dict[str, bytes]:
    """What the tokenizer saves, by name; without the place that it was loaded from."""
    before = tokenizer.chat_template
    with tempfile.TemporaryDirectory() as place:
        try:
            tokenizer.chat_template = before or template
            tokenizer.save_pretrained(place)
        finally:
            tokenizer.chat_template = before
        files = {
            str(path.relative_to(place)): path.read_bytes() for path in sorted(Path(place).rglob("*")) if path.is_file()
        }
    settings = json.loads(files["tokenizer_config.json"])
    kept = {key: value for key, value in settings.items() if key not in HERE}
    return files | {"tokenizer_config.json": json.dumps(kept, indent=2, ensure_ascii=False).encode()}


def generation_config(base: Base, ends: frozenset[int], pad: int) -> dict[str, Any]:
    """The base's own, with every token that ends an answer: its end tokens and those of the chat template."""
    found = base.model.generation_config.to_diff_dict() if base.model.generation_config is not None else {}
    kept = {key: value for key, value in found.items() if not key.startswith("_")}
    return {**kept, "eos_token_id": sorted(ends), "pad_token_id": pad}


def names_of_ends(built: Built) -> list[str]:
    """The end tokens in letters."""
    return [str(built.template.tokenizer.convert_ids_to_tokens(number)) for number in sorted(built.stop_ids)]

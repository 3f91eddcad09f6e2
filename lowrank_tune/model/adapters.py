"""Adapters on disk, in PEFT's own format at a folder's root, and the LoRA configuration that settings stand for."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from lowrank_tune.errors import UserError
from lowrank_tune.manifest import MANIFEST, changed_file
from lowrank_tune.model.heads import HEAD_WEIGHT_KEY
from lowrank_tune.model.rotary import RopeFactors

if TYPE_CHECKING:  # the model floor must run where pydantic is not installed (benchmarks/gpu.py)
    from lowrank_tune.config import AdapterConfig

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
STACK = "stack.json"
"""Beside a run's final adapter where frozen ones lay below it: `stack` (names, lowest first), `below` (hashes of the
frozen ones by name), and `folded`: whether the root is all of them in one, and the trained one alone lies in a folder
of its name; else the root is the trained one alone, and the others lie in folders of theirs."""
ROPE = "rope.json"
"""Beside a run's final adapter over a base of RoPE type `longrope`: `factors`, the set that it was trained with."""

UNSUPPORTED_PEFT_OPTIONS = (
    "use_dora",
    "use_qalora",
    "alora_invocation_tokens",
    "trainable_token_indices",
    "layer_replication",
    "target_parameters",
    "arrow_config",
)
# PEFT's own class for classifiers always adds both names, and saves what the model has: a causal base's classifier has
# a `score`.
HEADS = {"score", "classifier"}
# PiSSA, OLoRA, CorDA and LoftQ change the base's own weights when they begin, and so does a trained bias.
SUPPORTED_VALUES = {
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),
    "bias": (True, None, "none"),
}


def _is_number(value: Any, minimum: float = 0.0, maximum: float = 1e9) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and minimum <= value <= maximum


def _is_number_map(value: Any) -> bool:
    return value is None or (isinstance(value, dict) and all(_is_number(number) for number in value.values()))


def _is_name_list(value: Any) -> bool:
    return isinstance(value, str) or (
        isinstance(value, list) and bool(value) and all(isinstance(name, str) for name in value)
    )


OPTION_VALIDATORS = {
    "r": lambda value: isinstance(value, int) and _is_number(value, 1),
    "lora_alpha": _is_number,
    "lora_dropout": lambda value: _is_number(value, 0, 0.999),
    "target_modules": _is_name_list,
    "exclude_modules": lambda value: value is None or _is_name_list(value),
    "rank_pattern": _is_number_map,
    "alpha_pattern": _is_number_map,
}


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter as it lay in `folder`: configuration, weights, and the name of the base that it says it was made for.

    `config` is that of the LoRA alone; a scalar head shows in `tensors`.
    """

    folder: Path
    config: LoraConfig
    tensors: dict[str, Tensor]
    base_name: str | None
    frozen_adapters: dict[str, str] = field(default_factory=dict)
    """Frozen adapters that it was trained over and means nothing without, by name, lowest first: hashes of their
    content."""

    @property
    def head(self) -> Tensor | None:
        """(1, d), the scalar head's weight."""
        return self.tensors.get(HEAD_WEIGHT_KEY)


def read_adapter(path: str, key: str, head: bool = False, combined: bool = False) -> SavedAdapter:
    """Reads the adapter in a folder, or in a run's `final/`: one with a scalar head (a reward model's) or, by default,
    without.

    Of a run over frozen adapters it is the trained one alone, to lie over them again; `combined` is all of them folded
    into one, where the run left that. `key` is the setting that named it. Raises UserError in one sentence.
    """
    given = Path(path).expanduser()
    if not given.is_dir():
        raise UserError(f"{key}: there is no folder {path}")
    folder = given / "final" if (given / "final" / CONFIG).exists() else given
    if not (folder / CONFIG).exists():
        unfinished = (given / "run.json").exists()
        if unfinished:
            reason = "is a run that has not ended: let it end first"
        else:
            reason = f"holds no {CONFIG}, so it is no adapter"
        raise UserError(f"{key}: {path} {reason}")
    frozen_adapters = dict[str, str]()
    _check_unchanged(folder, STACK, key)
    if (folder / STACK).exists():
        stack = read_stack(folder, key)
        if combined and not stack.combined:
            raise UserError(
                f"{key}: {folder} holds its adapters apart, and they mean nothing alone: load "
                f"{', '.join(stack.frozen_adapters)} below it"
            )
        frozen_adapters = {} if combined else stack.frozen_adapters
        if stack.combined and not combined:
            folder = folder / stack.names[-1]
    if not (folder / WEIGHTS).exists():
        raise UserError(
            f"{key}: {folder} holds no {WEIGHTS}; other formats can run code when they are read and are not loaded"
        )
    for name in (CONFIG, WEIGHTS):
        _check_unchanged(folder, name, key)
    try:
        raw = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(folder / WEIGHTS)
    except (ValueError, OSError, SafetensorError, RecursionError) as error:
        raise UserError(f"{key}: the adapter in {folder} is broken: {error}") from error
    if strange := sorted(name for name in tensors if "lora_embedding" in name):
        raise UserError(
            f"{key}: {folder} changes the embedding ({strange[0]}), which this kit does not load: only linear modules"
        )
    saved = SavedAdapter(
        folder,
        _config(raw, key, folder),
        tensors,
        raw.get("base_model_name_or_path"),
        frozen_adapters,
    )
    _check_head(saved, raw.get("modules_to_save") or [], key, head)
    return saved


def _check_unchanged(folder: Path, name: str, key: str) -> None:
    """Raises UserError for a file that is missing or has changed, by the manifest of its folder or of the one around
    it. A file that neither of them lists, as in a folder without one, may be missing."""
    for root in (folder, folder.parent):
        relative_name = (folder / name).relative_to(root).as_posix()
        if changed_file(root, [relative_name]) is None:
            continue
        if (folder / name).exists():
            change = "has changed since it was written"
        else:
            change = "is missing"
        raise UserError(
            f"{key}: {folder / name} {change}: restore it from a copy; or, where the change is meant, delete "
            f"{root / MANIFEST}"
        )


def adapter_rope_factors(path: str) -> RopeFactors | None:
    """The factors of RoPE type `longrope` that the adapter in a folder, or in a run's `final/`, was trained with; None
    where the folder names none. Raises UserError for a file that cannot be understood, or is not as it was written."""
    given = Path(path).expanduser()
    folder = given / "final" if (given / "final" / CONFIG).exists() else given
    _check_unchanged(folder, ROPE, path)
    if not (folder / ROPE).exists():
        return None
    try:
        factors = json.loads((folder / ROPE).read_bytes())["factors"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{folder / ROPE} is broken: {type(error).__name__}: {error}") from error
    if factors not in ("short", "long"):
        raise UserError(f"{folder / ROPE} is broken: `factors` is {factors!r}, and must be `short` or `long`")
    return "long" if factors == "long" else "short"


@dataclass(frozen=True)
class AdapterStack:
    """What `STACK` says."""

    names: list[str]
    frozen_adapters: dict[str, str]
    combined: bool


def read_stack(folder: Path, key: str) -> AdapterStack:
    """The stack that a run's final adapter is the top of. Raises UserError for a file that cannot be understood."""
    try:
        data = json.loads((folder / STACK).read_bytes())
        names = [str(name) for name in data["stack"]]
        frozen_adapters = {str(name): str(content) for name, content in data["frozen_adapters"].items()}
        if names[:-1] == list(frozen_adapters) and all(
            name and "/" not in name and name not in (".", "..") for name in names
        ):
            return AdapterStack(names, frozen_adapters, bool(data["combined"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{key}: {folder / STACK} is broken: {type(error).__name__}: {error}") from error
    raise UserError(f"{key}: {folder / STACK} is broken: its names do not fit together")


def _check_head(saved_adapter: SavedAdapter, modules: Any, key: str, expect_head: bool) -> None:
    if not isinstance(modules, list) or not set(map(str, modules)) <= HEADS or (modules and "score" not in modules):
        raise UserError(f"{key}: {saved_adapter.folder} uses modules_to_save {modules}, which this kit does not load")
    if saved_adapter.head is None:
        shape = None
    else:
        shape = tuple(saved_adapter.head.shape)
    if bool(modules) != (shape is not None) or (shape is not None and (len(shape) != 2 or shape[0] != 1)):
        actual = f"one of shape {shape}" if shape else "none"
        expected = "a scalar head" if modules else "no head"
        raise UserError(
            f"{key}: the adapter in {saved_adapter.folder} is broken: it should have {expected} and has {actual}"
        )
    if expect_head and shape is None:
        raise UserError(
            f"{key}: {saved_adapter.folder} is a policy adapter (it has no scalar head), not a reward adapter"
        )
    if shape is not None and not expect_head:
        raise UserError(f"{key}: {saved_adapter.folder} is a reward adapter (it has a scalar head), not a policy")


def _config(raw: Any, key: str, folder: Path) -> LoraConfig:
    if not isinstance(raw, dict) or raw.get("peft_type") != "LORA":
        if isinstance(raw, dict):
            kind = raw.get("peft_type")
        else:
            kind = type(raw).__name__
        raise UserError(f"{key}: {folder} is no LoRA adapter but {kind}")
    for name in UNSUPPORTED_PEFT_OPTIONS:
        if raw.get(name):
            raise UserError(f"{key}: {folder} uses {name}, which this kit does not load")
    for name, supported in SUPPORTED_VALUES.items():
        if raw.get(name, True) not in supported:
            raise UserError(
                f"{key}: {folder} uses {name} {raw[name]}, which this kit does not load: such an adapter goes with "
                f"another base"
            )
    raw = raw | {"lora_dropout": raw.get("lora_dropout") or 0.0}
    for name, is_valid in OPTION_VALIDATORS.items():
        if name in raw and not is_valid(raw[name]):
            raise UserError(f"{key}: the adapter in {folder} is broken: {name} is {raw[name]!r}")
    field_names = {each.name for each in fields(LoraConfig)} - {"runtime_config", "inference_mode", "modules_to_save"}
    lora_kwargs = {name: value for name, value in raw.items() if name in field_names}
    return LoraConfig(**lora_kwargs | {"init_lora_weights": True, "task_type": "CAUSAL_LM"})


def lora_config(adapter_config: AdapterConfig, model: Any) -> LoraConfig:
    """A fresh LoRA for this model. Raises UserError for target modules that it has not."""
    linears = linear_names(model)
    if not linears:
        raise UserError(
            f"base.model: {model.config.model_type} models have no linear modules, so LoRA finds no place in them"
        )
    if adapter_config.target_modules == "all-linear":
        targets = linears
    else:
        targets = sorted(adapter_config.target_modules)
    unknown = sorted(set(targets) - set(linears))
    if unknown:
        raise UserError(
            f"adapters: target_modules: the base has no linear module {', '.join(unknown)}; it has {', '.join(linears)}"
        )
    return LoraConfig(
        r=adapter_config.r,
        lora_alpha=adapter_config.lora_alpha,
        lora_dropout=adapter_config.lora_dropout,
        target_modules=targets,
        use_rslora=adapter_config.use_rslora,
        bias="none",
        task_type="CAUSAL_LM",
    )


def linear_names(model: Any) -> list[str]:
    """Last names of all linear modules but the output head."""
    head = model.get_output_embeddings()
    names = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }
    return sorted(names)

"""Reads adapters from disk, in PEFT's format, and makes LoRA configurations from settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from lowrank_tune.errors import UserError, first_line
from lowrank_tune.json_files import read_json
from lowrank_tune.manifest import MANIFEST, changed_file
from lowrank_tune.model.adapter_options import check_finite, check_options, checked_rank
from lowrank_tune.model.heads import HEAD_WEIGHT_KEY
from lowrank_tune.model.module_patterns import check_patterns
from lowrank_tune.model.rotary import RopeFactors
from lowrank_tune.model.text_model import has_serving_names, text_adapter
from lowrank_tune.offline import offline_variable
from lowrank_tune.regular_files import check_regular_file

if TYPE_CHECKING:  # the model floor must run where pydantic is not installed (benchmarks/gpu.py)
    from lowrank_tune.config import AdapterConfig

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
STACK = "stack.json"
"""Beside a run's final adapter over frozen ones: `stack` (names, lowest first), `frozen_adapters` (hashes of the frozen
ones by name), and `combined`: whether the folder contains all of them merged into one, and a subfolder the trained one
alone. If not, the folder contains the trained one, and subfolders the others."""
ROPE = "rope.json"
"""Beside a run's final adapter over a base of RoPE type `longrope`: `factors`, the set of factors that it was trained
with."""

UNSUPPORTED_PEFT_OPTIONS = (
    "use_dora",
    "use_qalora",
    "alora_invocation_tokens",
    "trainable_token_indices",
    "layer_replication",
    "target_parameters",
    "arrow_config",
)
# PEFT's class for classifiers always adds both names. The classifier of a causal base has a `score`.
HEADS = {"score", "classifier"}
# PiSSA, OLoRA, CorDA and LoftQ change the base's own weights at the start, and so does a trained bias.
SUPPORTED_VALUES = {
    "init_lora_weights": (
        True,
        False,
        None,
        "gaussian",
        "orthogonal",
        "eva",
    ),
    "bias": (True, None, "none"),
}
IGNORED_FIELDS = {"runtime_config", "inference_mode", "modules_to_save"}
"""Fields of PEFT's configuration that are not taken from a file."""


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter in `folder`: configuration of the LoRA, weights (with those of a scalar head), and the name of the
    base that it was made for."""

    folder: Path
    config: LoraConfig
    tensors: dict[str, Tensor]
    base_name: str | None
    frozen_adapters: dict[str, str] = field(default_factory=dict)
    """Frozen adapters that it was trained over and must be used with: hashes of their content by name, lowest first."""

    @property
    def head(self) -> Tensor | None:
        """The weight (1, d) of the scalar head, if present."""
        return self.tensors.get(HEAD_WEIGHT_KEY)


def read_adapter(
    path: str,
    key: str,
    head: bool = False,
    combined: bool = False,
) -> SavedAdapter:
    """Reads the adapter in a folder, or in a run's `final/`: one with a scalar head (of a reward model) or, by default,
    without.

    Of a run over frozen adapters this is the trained one, to be used with them again; with `combined`, all of them
    merged into one, if the run saved that. `key` is the setting that contains the path. Raises UserError.
    """
    folder = _adapter_folder(path, key)
    frozen_adapters = dict[str, str]()
    _check_unchanged(folder, STACK, key)
    if (folder / STACK).exists():
        stack = read_stack(folder, key)
        if combined and not stack.combined:
            raise UserError(
                f"{key}: {folder} contains its adapters separately, and they must be used together: load "
                f"{', '.join(stack.frozen_adapters)} below it",
            )
        if not combined:
            frozen_adapters = stack.frozen_adapters
        if stack.combined and not combined:
            folder = folder / stack.names[-1]
    raw, tensors = _read_files(folder, key)
    config = _config(
        raw,
        tensors,
        key,
        folder,
    )
    if has_serving_names(tensors):
        raw, tensors = text_adapter(raw, tensors)
        config = _config(
            raw,
            tensors,
            key,
            folder,
        )
    saved = SavedAdapter(
        folder,
        config,
        tensors,
        raw.get("base_model_name_or_path"),
        frozen_adapters,
    )
    _check_head(
        saved,
        raw.get("modules_to_save") or [],
        key,
        head,
    )
    return saved


def _final_folder(path: str) -> Path:
    """Returns the folder, or its `final/` if it is a run's."""
    folder = Path(path).expanduser()
    final = folder / "final"
    if (final / CONFIG).exists():
        return final
    return folder


def _adapter_folder(path: str, key: str) -> Path:
    folder = _final_folder(path)
    if not folder.is_dir():
        raise UserError(f"{key}: there is no folder {path}{_hub_adapter_advice(path)}")
    if (folder / CONFIG).exists():
        return folder
    if (folder / "run.json").exists():
        raise UserError(f"{key}: {path} is a run that has not ended: let it end first")
    raise UserError(f"{key}: {path} contains no {CONFIG}, so it is not an adapter")


def _hub_adapter_advice(path: str) -> str:
    """Returns how to get an adapter whose path has the form of a name on the hub."""
    if path.startswith((".", "/", "~")) or path.count("/") != 1:
        return ""
    variable = offline_variable()
    command = f"hf download {path} --local-dir {path}"
    if variable:
        command = f"env -u {variable} {command}"
    return f"; adapters are read from folders: `{command}` fetches this one from the hub"


def _read_files(folder: Path, key: str) -> tuple[Any, dict[str, Tensor]]:
    """Returns the content of the configuration file, and the weights."""
    if not (folder / WEIGHTS).exists():
        raise UserError(
            f"{key}: {folder} contains no {WEIGHTS}; other formats can run code when they are read and are not loaded",
        )
    for name in (CONFIG, WEIGHTS):
        _check_unchanged(folder, name, key)
    try:
        raw = read_json(folder / CONFIG)
    except (ValueError, OSError) as error:
        raise UserError(f"{key}: {folder / CONFIG} is broken: {error}") from error
    try:
        check_regular_file(folder / WEIGHTS)
        tensors = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{key}: {folder / WEIGHTS} is broken: {error}") from error
    for name in sorted(tensors):
        if "lora_embedding" in name:
            raise UserError(
                f"{key}: {folder} changes the embedding ({name}), which this kit does not load: only linear modules",
            )
        check_finite(name, tensors[name], f"{key}: {folder / WEIGHTS}")
    return raw, tensors


def _check_unchanged(
    folder: Path,
    name: str,
    key: str,
) -> None:
    """Raises UserError for a file that is missing or has changed, by the manifest of its folder or of the parent
    folder. A file that is in no manifest may be missing."""
    for root in (folder, folder.parent):
        relative_name = (folder / name).relative_to(root).as_posix()
        if changed_file(root, [relative_name]) is None:
            continue
        if (folder / name).exists():
            change = "has changed since it was written"
        else:
            change = "is missing"
        raise UserError(
            f"{key}: {folder / name} {change}: restore it from a copy, or delete {root / MANIFEST} if the change is "
            "intended",
        )


def adapter_rope_factors(path: str) -> RopeFactors | None:
    """Returns the factors of RoPE type `longrope` that the adapter in a folder, or in a run's `final/`, was trained
    with; None if the folder has no such file. Raises UserError for a file that is broken or has changed."""
    folder = _final_folder(path)
    _check_unchanged(folder, ROPE, path)
    if not (folder / ROPE).exists():
        return None
    try:
        factors = read_json(folder / ROPE)["factors"]
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
    ) as error:
        raise UserError(f"{folder / ROPE} is broken: {type(error).__name__}: {error}") from error
    if factors not in ("short", "long"):
        raise UserError(f"{folder / ROPE} is broken: `factors` is {factors!r}, and must be `short` or `long`")
    return factors  # type: ignore[no-any-return]


@dataclass(frozen=True)
class AdapterStack:
    """The content of the file `STACK`."""

    names: list[str]
    frozen_adapters: dict[str, str]
    combined: bool


def read_stack(folder: Path, key: str) -> AdapterStack:
    """Reads the stack whose top is a run's final adapter. Raises UserError for a broken file."""
    try:
        data = read_json(folder / STACK)
        names = [str(name) for name in data["stack"]]
        frozen_adapters = {str(name): str(content) for name, content in data["frozen_adapters"].items()}
        stack = AdapterStack(names, frozen_adapters, bool(data["combined"]))
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
    ) as error:
        raise UserError(f"{key}: {folder / STACK} is broken: {type(error).__name__}: {error}") from error
    # The names are used as names of folders.
    has_bad_name = any(not name or "/" in name or name in (".", "..") for name in names)
    if has_bad_name or names[:-1] != list(frozen_adapters):
        raise UserError(f"{key}: {folder / STACK} is broken: its names do not fit together")
    return stack


def _check_head(
    saved_adapter: SavedAdapter,
    modules: Any,
    key: str,
    expect_head: bool,
) -> None:
    """Raises UserError unless the adapter has the head that its configuration names and the caller expects."""
    folder = saved_adapter.folder
    if not isinstance(modules, list) or not set(map(str, modules)) <= HEADS or (modules and "score" not in modules):
        raise UserError(f"{key}: {folder} uses modules_to_save {modules}, which this kit does not load")
    head = saved_adapter.head
    actual = "none"
    is_valid = not modules
    if head is not None:
        actual = f"one of shape {tuple(head.shape)}"
        is_valid = bool(modules) and head.ndim == 2 and len(head) == 1
    elif modules:
        is_valid = False
    if not is_valid:
        expected = "a scalar head" if modules else "no head"
        raise UserError(f"{key}: the adapter in {folder} is broken: it should have {expected} and has {actual}")
    if expect_head and head is None:
        raise UserError(f"{key}: {folder} is a policy adapter (it has no scalar head), not a reward adapter")
    if head is not None and not expect_head:
        raise UserError(f"{key}: {folder} is a reward adapter (it has a scalar head), not a policy")


def _config(
    raw: Any,
    tensors: Mapping[str, Tensor],
    key: str,
    folder: Path,
) -> LoraConfig:
    if not isinstance(raw, dict) or raw.get("peft_type") != "LORA":
        kind: Any = type(raw).__name__
        if isinstance(raw, dict):
            kind = raw.get("peft_type")
        raise UserError(f"{key}: {folder} is not a LoRA adapter but {kind}")
    for name in UNSUPPORTED_PEFT_OPTIONS:
        if raw.get(name):
            raise UserError(f"{key}: {folder} uses {name}, which this kit does not load")
    for name, supported in SUPPORTED_VALUES.items():
        if raw.get(name, True) not in supported:
            raise UserError(
                f"{key}: {folder} uses {name} {raw[name]}, which this kit does not load: such an adapter changes the "
                "base",
            )
    raw = raw | {"lora_dropout": raw.get("lora_dropout") or 0.0}
    try:
        check_options(raw)
        check_patterns(raw)
        raw["r"] = checked_rank(raw, tensors)
        field_names = {each.name for each in fields(LoraConfig)} - IGNORED_FIELDS
        lora_kwargs = {name: value for name, value in raw.items() if name in field_names}
        return LoraConfig(**lora_kwargs | {"init_lora_weights": True, "task_type": "CAUSAL_LM"})
    # PEFT's own checks raise the other two.
    except (UserError, ValueError, TypeError) as error:
        raise UserError(f"{key}: the adapter in {folder} is broken: {first_line(error)}") from None


def lora_config(adapter_config: AdapterConfig, model: Any) -> LoraConfig:
    """Returns the configuration of a fresh LoRA for this model. Raises UserError for target modules that it does not
    have."""
    linears = linear_names(model)
    if not linears:
        raise UserError(
            f"base.model: {model.config.model_type} models have no linear modules for LoRA: use another base",
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
    """Returns the last names of all linear modules except the output head."""
    head = model.get_output_embeddings()
    names = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }
    return sorted(names)

"""Where a base comes from: the tiny one, a folder or the hub; and what the libraries raise for it, in one sentence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PretrainedConfig

from lowrank_tune.errors import UserError, first_line
from lowrank_tune.full_disk import HUB_CURE, describe_full_disk, full_disk_reason
from lowrank_tune.model.config_limits import check_config_limits
from lowrank_tune.model.model_config import LOAD_ERRORS
from lowrank_tune.offline import fetch_advice
from lowrank_tune.paths import hub_folder
from lowrank_tune.regular_files import check_regular_file

if TYPE_CHECKING:  # the model floor must run where pydantic is not installed (benchmarks/gpu.py)
    from lowrank_tune.config import BaseConfig

BUILTIN_MODEL = "tiny-tutor"
GATED_WORDS = ("gated", "401", "403")
NOT_FOUND_WORDS = (
    "couldn't connect",
    "offline",
    "can't load",
    "not a local folder",
    "connection",
    "resolve",
)
"""What the hub's error messages contain if a repository is gated or private, or cannot be found."""
MAX_JSON_BYTES = 256 << 20
"""The largest JSON file of a base; published tokenizers have up to 35 MB."""


@contextmanager
def describe_load_errors(base_config: BaseConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the path or id of the model and the arguments for `from_pretrained`. Errors of the libraries inside become
    a UserError."""
    name, _, revision = base_config.model.partition("@")
    if name == BUILTIN_MODEL:
        path_or_id = str(files("lowrank_tune.toy") / "base")
    else:
        path_or_id = _existing_folder(name) or name
    arguments: dict[str, Any] = {"revision": revision or None, "trust_remote_code": base_config.trust_remote_code}
    try:
        _check_raw_config(path_or_id, name, arguments)
        yield path_or_id, arguments
    except LOAD_ERRORS as error:
        raise UserError(_load_error_message(name, revision, error)) from error


def _check_raw_config(
    path_or_id: str,
    name: str,
    arguments: dict[str, Any],
) -> None:
    try:
        raw, _ = PretrainedConfig.get_config_dict(path_or_id, revision=arguments["revision"])
        remote_code = raw.get("auto_map")
    except RecursionError as error:
        raise UserError(f"base.model: {name} cannot be loaded: its config.json is nested too deeply") from error
    except (AttributeError, TypeError) as error:
        raise UserError(f"base.model: {name} cannot be loaded: its config.json is not a JSON object") from error
    try:
        check_config_limits(raw)
    except UserError as error:
        raise UserError(f"base.model: {name} cannot be loaded: {error}") from None
    # transformers would wait for an answer from the user.
    if remote_code and not arguments["trust_remote_code"]:
        raise UserError(
            f"base.model: {name} brings Python code of its own; set base.trust_remote_code: true only if you trust "
            "its author",
        )


def _existing_folder(name: str) -> str | None:
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").exists():
            raise UserError(f"base.model: the folder {name} contains no config.json, so it is not a model")
        _check_json_files(folder)
        return str(folder)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"base.model: there is no folder {name}")
    return None


def _check_json_files(folder: Path) -> None:
    """Raises UserError for a JSON file that is not regular or too large."""
    for file in sorted(folder.glob("*.json")):
        try:
            check_regular_file(file, MAX_JSON_BYTES)
        except OSError as error:
            raise UserError(f"base.model: {file} cannot be read: {error.strerror}") from error


def _load_error_message(
    name: str,
    revision: str,
    error: Exception,
) -> str:
    text = str(error).lower()
    full = full_disk_reason(error)
    if full:
        words = describe_full_disk(hub_folder() / "hub", full, HUB_CURE)
        return f"base.model: {name} cannot be stored: {words}"
    where = name
    if revision:
        where = f"{name} at revision {revision}"
    if any(word in text for word in GATED_WORDS):
        return (
            f"base.model: {where} is gated or private: accept its terms at https://huggingface.co/{name}, then "
            f"`hf auth login`"
        )
    if revision and "revision" in text and "not a valid" in text:
        return f"base.model: {name} has no revision {revision}"
    if "safetensors" in text and "no file named" in text:
        return (
            f"base.model: {where} has no safetensors weights; other formats can run code when they are read and "
            "are not loaded"
        )
    if any(word in text for word in NOT_FOUND_WORDS):
        advice = fetch_advice(name, revision)
        return f"base.model: {where} is not a folder, not in the local cache, and could not be fetched; {advice}"
    return f"base.model: {where} cannot be loaded: {first_line(error):.500}"

"""Files of a base that ask for absurd memory, hang a parser, or lead out of the folder: refused in one sentence, before
memory is allocated."""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import CPU, TOKENIZER, saved_model
from safetensors.torch import load_file

from lowrank_tune.config import BaseConfig
from lowrank_tune.errors import UserError
from lowrank_tune.model import model_config
from lowrank_tune.model.base import load_base, load_config, load_tokenizer, stored_tensors
from lowrank_tune.model.config_limits import MAX_LAYERS, check_config_limits
from lowrank_tune.model.configs import FOLDER
from lowrank_tune.preflight.base import meta_model

LLAMA = Path(saved_model("llama", 0))
TOKENIZER_FOLDER = Path(load_config(BaseConfig()).name_or_path)
CONFIG = json.loads((LLAMA / "config.json").read_text())
DEEP = b"[" * 100_000
DEEP_CLOSED = b'{"a": ' + b"[" * 300 + b"]" * 300 + b"}"


def link_model(folder: Path, source: Path = LLAMA, **files: bytes | None) -> BaseConfig:
    """Makes a folder of links to a saved model, with other files in place of some; `__` in a name is a dot."""
    folder.mkdir()
    for file in source.iterdir():
        (folder / file.name).symlink_to(file)
    for name, data in files.items():
        path = folder / name.replace("__", ".")
        path.unlink(missing_ok=True)
        if data is not None:
            path.write_bytes(data)
    return BaseConfig(model=str(folder), bits=16)


def with_values(folder: Path, **values: Any) -> BaseConfig:
    return link_model(folder, config__json=json.dumps(CONFIG | values).encode())


def message_of(call: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert message.startswith("base.model: ") and "\n" not in message and len(message) < 700, message
    return message


NUMBER = "must be a whole number from"
VALUES: list[tuple[str, Any, str]] = [
    ("hidden_size", 10**9, f"hidden_size is 1000000000, and {NUMBER} 1 to 1000000"),
    ("hidden_size", 0, NUMBER),
    ("hidden_size", -64, NUMBER),
    ("hidden_size", "64", f"hidden_size is '64', and {NUMBER}"),
    ("hidden_size", 64.5, NUMBER),
    ("hidden_size", True, NUMBER),
    ("hidden_size", float("nan"), "config.json: hidden_size is NaN"),
    ("num_hidden_layers", 10**9, f"num_hidden_layers is 1000000000, and {NUMBER} 1 to {MAX_LAYERS}"),
    ("num_hidden_layers", [2], "its config.json is not valid: .*num_hidden_layers"),
    ("vocab_size", 10**12, NUMBER),
    ("num_attention_heads", -1, NUMBER),
    ("num_attention_heads", 3, "num_attention_heads is 3, which is no multiple of num_key_value_heads, 2"),
    ("num_key_value_heads", 0, NUMBER),
    ("head_dim", 10**9, NUMBER),
    ("intermediate_size", -1, NUMBER),
    ("max_position_embeddings", 10**15, NUMBER),
    ("num_local_experts", 10**9, NUMBER),
    ("text_config", {"vision": {"num_layers": 10**9}}, f"num_layers is 1000000000, and {NUMBER}"),
    ("rms_norm_eps", float("nan"), "config.json: rms_norm_eps is NaN"),
    ("rope_parameters", 5, "rope_parameters is 5, and must be an object"),
    ("quantization_config", 5, "quantization_config is 5, and must be an object"),
    ("layer_types", 5, "cannot be loaded: "),
    ("hidden_size", None, "its config.json is not valid: .*hidden_size"),
]


@pytest.mark.parametrize(("key", "value", "message"), VALUES, ids=[f"{key} {value}" for key, value, _ in VALUES])
def test_value_that_no_model_has_is_refused_with_its_key(key: str, value: Any, message: str, tmp_path: Path) -> None:
    base = with_values(tmp_path / "model", **{key: value})
    for call in (lambda: load_base(base, TOKENIZER, CPU), lambda: load_config(base), lambda: meta_model(base)):
        assert re.search(message, message_of(call))


@pytest.mark.parametrize(
    ("values", "described"),
    [
        ({"vocab_size": 10**8}, "12,800,"),
        ({"intermediate_size": 10**6}, "384,"),
        ({"hidden_size": 10**6}, "hidden_size 1000000"),
        ({"head_dim": 10**5}, "head_dim 100000"),
        ({"num_hidden_layers": 40}, "num_hidden_layers 40"),
    ],
    ids=str,
)
def test_configuration_of_far_more_weights_than_the_files_contain_is_refused(
    values: dict[str, int], described: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before transformers, which would allocate them, loads anything."""
    monkeypatch.setattr("lowrank_tune.model.base.AutoModelForCausalLM", None)
    message = message_of(lambda: load_base(with_values(tmp_path / "model", **values), TOKENIZER, CPU))
    assert "its config.json describes " in message and described in message
    stored = sum(tensor.numel() for tensor in load_file(LLAMA / "model.safetensors").values())
    assert f"its files contain {stored:,}: use the config.json that belongs to the weights" in message


def test_a_position_table_is_compared_with_the_files_too(tmp_path: Path) -> None:
    folder = Path(saved_model("gpt2", 0))
    config = json.loads((folder / "config.json").read_text()) | {"n_positions": 10**8}
    base = link_model(tmp_path / "model", folder, config__json=json.dumps(config).encode())
    assert "n_positions 100000000" in message_of(lambda: load_base(base, TOKENIZER, CPU))


def test_model_that_cannot_be_built_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The code of each model finds values that do not fit together, and raises what it likes."""

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no such\nshape")

    monkeypatch.setattr(model_config.AutoModelForCausalLM, "from_config", fail)
    base = with_values(tmp_path / "model")
    for call in (lambda: load_base(base, TOKENIZER, CPU), lambda: meta_model(base)):
        assert "no model can be built from its config.json: RuntimeError: no such shape" in message_of(call)


def test_published_configurations_are_within_the_limits() -> None:
    for file in sorted(FOLDER.glob("*.json")):
        check_config_limits(json.loads(file.read_text()))
    check_config_limits({"num_key_value_heads": None, "num_experts": 0, "time_step_limit": [0.0, float("inf")]})
    check_config_limits({"num_hidden_layers": 61, "n_routed_experts": 256, "intermediate_size": [64, 128]})


def header_of(entries: Any, data: bytes = b"") -> bytes:
    header = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(header)) + header + data


def entry(*offsets: int, shape: tuple[int, ...] = (2,)) -> dict[str, Any]:
    return {"dtype": "F32", "shape": shape, "data_offsets": offsets}


REAL = (LLAMA / "model.safetensors").read_bytes()
FILES: dict[str, tuple[dict[str, bytes | None], str]] = {
    "config deep": ({"config__json": DEEP}, "its config.json is nested too deeply"),
    "config deep value": ({"config__json": b'{"model_type": "llama", "x": ' + DEEP_CLOSED + b"}"}, "deeper than 100"),
    "header of 2^60 bytes": ({"model__safetensors": struct.pack("<Q", 1 << 60) + b"{}"}, "header too large"),
    "truncated": ({"model__safetensors": REAL[: len(REAL) // 2]}, "file not fully covered"),
    "overlapping": (
        {"model__safetensors": header_of({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12))},
        "invalid offset for tensor `b`",
    ),
    "deep header": ({"model__safetensors": header_of(b'{"a":' * 10_000)}, "recursion limit exceeded"),
    "shape of 2^80": (
        {"model__safetensors": header_of({"a": entry(0, 8, shape=(1 << 40, 1 << 40))}, bytes(8))},
        "cannot be loaded",
    ),
    "generation config deep": ({"generation_config__json": DEEP}, "its generation_config.json is not valid"),
    "generation config list": ({"generation_config__json": b"[1]"}, "its generation_config.json is not valid"),
}
INDEX: dict[str, tuple[bytes, str]] = {
    "parent": (b'{"metadata": {}, "weight_map": {"a": "../model.safetensors"}}', "outside of the model's folder"),
    "absolute": (b'{"metadata": {}, "weight_map": {"a": "/etc/x"}}', "a is in '/etc/x', outside of the model's folder"),
    "deep": (DEEP, "nested deeper than 100 levels"),
    "list": (b"[1]", "`weight_map` must give the file of each tensor"),
    "list of files": (b'{"weight_map": ["a"]}', "`weight_map` must give the file of each tensor"),
    "numbers": (b'{"weight_map": {"a": 5}}', "`weight_map` must give the file of each tensor"),
}


@pytest.mark.parametrize("case", FILES)
def test_broken_file_of_a_base_is_refused_in_one_sentence(case: str, tmp_path: Path) -> None:
    files, message = FILES[case]
    base = link_model(tmp_path / "model", **files)
    assert message in message_of(lambda: load_base(base, TOKENIZER, CPU))


@pytest.mark.parametrize("case", INDEX)
def test_index_must_name_files_of_its_folder(case: str, tmp_path: Path) -> None:
    raw, message = INDEX[case]
    base = link_model(tmp_path / "model", model__safetensors=None)
    (tmp_path / "model" / "model.safetensors.index.json").write_bytes(raw)
    (tmp_path / "model.safetensors").symlink_to(LLAMA / "model.safetensors")
    for call in (lambda: load_base(base, TOKENIZER, CPU), lambda: stored_tensors(base)):
        assert message in message_of(call)


TOKENIZER_FILES: dict[str, tuple[str, bytes]] = {
    "config deep": ("tokenizer_config.json", DEEP),
    "config list": ("tokenizer_config.json", b"[1]"),
    "config token": ("tokenizer_config.json", b'{"eos_token": 5}'),
    "special tokens deep": ("special_tokens_map.json", DEEP),
    "added tokens deep": ("added_tokens.json", DEEP),
    "deep": ("tokenizer.json", DEEP),
    "list": ("tokenizer.json", b"[]"),
    "no text": ("tokenizer.json", b"\xff\x00{"),
    "deep rules": (
        "tokenizer.json",
        b'{"version": "1.0", "pre_tokenizer": ' + b'{"type":"Sequence","pretokenizers":[' * 5000 + b"]}" * 5000 + b"}",
    ),
    "huge id": ("tokenizer.json", b'{"version": "1.0", "added_tokens": [{"id": 1000000000000, "content": "x"}]}'),
}


@pytest.mark.parametrize("case", TOKENIZER_FILES)
def test_broken_file_of_a_tokenizer_is_refused_in_one_sentence(case: str, tmp_path: Path) -> None:
    name, data = TOKENIZER_FILES[case]
    base = link_model(tmp_path / "model", TOKENIZER_FOLDER, **{name.replace(".", "__"): data})
    assert "cannot be loaded: " in message_of(lambda: load_tokenizer(base))


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "generation_config.json"])
def test_json_files_of_a_base_are_regular_and_small(name: str, tmp_path: Path) -> None:
    base = link_model(tmp_path / "model", TOKENIZER_FOLDER, **{name.replace(".", "__"): None})
    os.mkfifo(tmp_path / "model" / name)
    assert f"{name} cannot be read: it is a FIFO" in message_of(lambda: load_tokenizer(base))
    (tmp_path / "model" / name).unlink()
    (tmp_path / "model" / name).touch()
    os.truncate(tmp_path / "model" / name, 1 << 40)
    assert f"{name} cannot be read: it has 1,099,511,627,776 bytes" in message_of(lambda: load_tokenizer(base))


def test_base_whose_head_is_tied_or_packed_is_within_the_margin(tmp_path: Path) -> None:
    """A model in 4 bits stores two weights in a byte."""
    base = load_base(BaseConfig(model=str(LLAMA), bits=4), TOKENIZER, CPU)
    base.model.save_pretrained(tmp_path / "packed")
    packed = load_base(BaseConfig(model=str(tmp_path / "packed"), bits=4), TOKENIZER, CPU)
    assert packed.bits == 4
    stored = model_config.num_stored_weights([tmp_path / "packed" / "model.safetensors"])
    described = sum(tensor.numel() for tensor in load_file(LLAMA / "model.safetensors").values())
    assert described <= stored < 1.3 * described
    assert load_base(BaseConfig(bits=16), TOKENIZER, torch.device("cpu")).model.config.tie_word_embeddings

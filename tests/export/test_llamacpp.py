"""Against llama.cpp itself: its converter's tensors, and what its library computes from the files that are written here.

`LLAMA_CPP_DIR` names a folder with the converter (or an earlier export has fetched it into the cache), and `pip install llama-cpp-python`
builds the library in about 20 minutes; a test whose part is missing is skipped.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
from models import random_model, roles_over, shake, whole
from safetensors.torch import save_file

from lowrank_tune import UserError
from lowrank_tune.export.fold import fold
from lowrank_tune.export.folder import part_of
from lowrank_tune.export.gguf_lora import shape_of, write_gguf_lora
from lowrank_tune.export.llama_cpp import LORA_CONVERTER, converter_folder

pytestmark = pytest.mark.llamacpp
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text")


@pytest.fixture(scope="module")
def scripts() -> Path:
    try:
        return converter_folder(None, lambda event: None, fetch=False)
    except UserError as error:
        pytest.skip(str(error))


def their_lora(scripts: Path, adapter: Path, base: Path, out: Path, type: str) -> gguf.GGUFReader:
    """The adapter in a folder by llama.cpp's own converter."""
    command = [sys.executable, str(scripts / LORA_CONVERTER), str(adapter), "--base", str(base), "--outfile", str(out), "--outtype", type]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    return gguf.GGUFReader(out)


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("type", ["f32", "f16", "bf16"])
def test_tensors_are_bit_for_bit_those_of_llama_cpps_converter(scripts: Path, kind: str, type: str, tmp_path: Path) -> None:
    if type != "f32" and kind not in ("llama", "qwen3"):
        pytest.skip("the types are the same code for all")
    random_model(kind).save_pretrained(tmp_path / "base")
    roles = roles_over(whole(kind), lower=["sft"], rslora=True)
    shake(roles, "sft", "policy")
    config, tensors = fold([part_of(roles, name) for name in ("sft", "policy")])
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, adapter / "adapter_model.safetensors")
    write_gguf_lora(tmp_path / "ours.gguf", "mine", config, tensors, shape_of(roles.base.model.config), type)
    ours, theirs = gguf.GGUFReader(tmp_path / "ours.gguf"), their_lora(scripts, adapter, tmp_path / "base", tmp_path / "theirs.gguf", type)
    mine, yours = ({one.name: one for one in reader.tensors} for reader in (ours, theirs))
    assert mine.keys() == yours.keys() and len(mine) == len(tensors)
    for name, tensor in mine.items():
        other = yours[name]
        assert tensor.tensor_type == other.tensor_type and tensor.shape.tolist() == other.shape.tolist(), name
        assert np.array_equal(tensor.data.view(np.uint8), other.data.view(np.uint8)), name
    for key in ("general.architecture", "general.type", "adapter.type", "adapter.lora.alpha"):
        assert ours.get_field(key).contents() == theirs.get_field(key).contents(), key

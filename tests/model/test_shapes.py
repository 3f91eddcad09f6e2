"""The configs that ship with the package: found by hub id without torch, and of the true sizes."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lowrank_tune.model import configs

COUNTS = {
    "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248,
    "meta-llama/Llama-3.2-1B-Instruct": 1_235_814_400,
    "meta-llama/Llama-3.2-3B-Instruct": 3_212_749_824,
    "mistralai/Mistral-7B-Instruct-v0.3": 7_248_023_552,
    "Qwen/Qwen2.5-0.5B-Instruct": 494_032_768,
    "Qwen/Qwen2.5-1.5B-Instruct": 1_543_714_304,
    "Qwen/Qwen2.5-3B-Instruct": 3_085_938_688,
    "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
    "Qwen/Qwen2.5-14B-Instruct": 14_770_033_664,
    "Qwen/Qwen2.5-32B-Instruct": 32_763_876_352,
    "Qwen/Qwen3-0.6B": 596_049_920,
    "Qwen/Qwen3-1.7B": 1_720_574_976,
    "Qwen/Qwen3-4B": 4_022_468_096,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-14B": 14_768_307_200,
    "Qwen/Qwen3-32B": 32_762_123_264,
    "Qwen/Qwen3.5-4B": 4_205_751_296,
    "Qwen/Qwen3.5-9B": 8_953_803_264,
    "google/gemma-4-E4B-it": 7_463_013_376,
    "mistralai/Ministral-3-8B-Instruct-2512-BF16": 8_489_553_920,
    "HuggingFaceTB/SmolLM3-3B": 3_075_098_624,
    "microsoft/Phi-4-mini-instruct": 3_836_021_760,
    "ibm-granite/granite-4.0-micro": 3_402_836_480,
    "allenai/Olmo-3-7B-Instruct": 7_298_011_136,
}
"""As the authors' weight files have them, a tied head once; of a multimodal checkpoint, those of its text model.

The file of Gemma 4 E4B has 55,055,616 more: keys, values and their norms of the 18 layers that use those of another
layer."""


def test_every_config_is_found_by_its_hub_id() -> None:
    found = [file.stem.replace("--", "/", 1) for file in configs.FOLDER.glob("*.json")]
    assert sorted(found) == sorted(COUNTS)


@pytest.mark.parametrize("model", COUNTS)
def test_a_config_builds_the_model_of_its_name(model: str) -> None:
    config = configs.config_of(model)
    assert config is not None
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    assert sum(parameter.numel() for parameter in built.parameters()) == COUNTS[model]


def test_revisions_siblings_and_strangers() -> None:
    assert (
        configs.file_of("Qwen/Qwen2.5-7B-Instruct@main")
        == configs.file_of("Qwen/Qwen2.5-7B")
        == configs.file_of("Qwen/Qwen2.5-7B-Instruct")
    )
    assert all(configs.file_of(model) is not None for model in configs.SAME_CONFIG)
    for stranger in ("tiny-tutor", "Qwen/Qwen9", "../configs/Qwen--Qwen3-8B", "Qwen--Qwen3-8B", "./model", ""):
        assert configs.config_of(stranger) is None


def test_the_lookup_needs_no_torch() -> None:
    code = (
        "import sys; from lowrank_tune.model import configs; configs.config_of('Qwen/Qwen3-8B')['vocab_size']; "
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"

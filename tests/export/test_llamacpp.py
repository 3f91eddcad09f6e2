"""Against llama.cpp itself: its converter's tensors, and what its library computes from the files that are written
here.

`LLAMA_CPP_DIR` names a folder with the converter (or an earlier export has fetched it into the cache), and `pip install
llama-cpp-python` builds the library in about 20 minutes; a test whose part is missing is skipped.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from export_fixtures import make_run
from gguf_families import EXPORTED
from models import CPU, perturb, random_model, roles_over, unquantized_base
from peft import PeftModel
from safetensors.torch import save_file
from support_matrix import Case, Family, is_in_transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowrank_tune import UserError
from lowrank_tune.export.combine_lora import as_lora_adapter, combine_adapters
from lowrank_tune.export.export import ExportOptions, export
from lowrank_tune.export.gguf.llama_cpp import LORA_CONVERTER, converter_folder
from lowrank_tune.export.gguf.lora import Shape, shape_of, write_gguf_lora
from lowrank_tune.export.gguf.model import convert
from lowrank_tune.export.merge import merge

pytestmark = pytest.mark.llamacpp
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text")


def quiet(event: object) -> None:
    pass


@pytest.fixture(scope="module")
def scripts() -> Path:
    try:
        return converter_folder(None, lambda event: None, fetch=False)
    except UserError as error:
        pytest.skip(str(error))


def their_lora(scripts: Path, adapter: Path, base: Path, out: Path, type: str) -> gguf.GGUFReader:
    """The adapter in a folder by llama.cpp's own converter."""
    command = [
        sys.executable,
        "-c",
        RUN_CONVERTER,
        str(scripts / LORA_CONVERTER),
        str(adapter),
        "--base",
        str(base),
        "--outfile",
        str(out),
        "--outtype",
        type,
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    return gguf.GGUFReader(out)


RUN_CONVERTER = """
import pathlib, runpy, sys
del sys.argv[0]
sys.path.insert(0, str(pathlib.Path(sys.argv[0]).parent))
import conversion
original_class, original_hparams = conversion.get_model_class, conversion.ModelBase.load_hparams
def get_model_class(name, *arguments):
    found = original_class(name, *arguments)
    return getattr(found, "Ministral3Model", found)
def load_hparams(*arguments, **options):
    found = original_hparams(*arguments, **options)
    if found["model_type"] == "granitemoehybrid":
        published = {"linear_attention": "mamba", "full_attention": "attention"}
        found["layer_types"] = [published.get(name, name) for name in found["layer_types"]]
    return found
conversion.get_model_class, conversion.ModelBase.load_hparams = get_model_class, staticmethod(load_hparams)
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""Runs llama.cpp's converter with two changes. Its class for Mistral 3 delegates to another one and then reads the base
in place of the adapter, so that the other one is used. And it knows the layer types of Granite 4 by the names of
published configurations, which newer versions of transformers replace when they read them."""


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("type", ["f32", "f16", "bf16"])
def test_tensors_are_bit_for_bit_those_of_llama_cpps_converter(
    scripts: Path, kind: str, type: str, tmp_path: Path
) -> None:
    if type != "f32" and kind not in ("llama", "qwen3"):
        pytest.skip("the types are the same code for all")
    random_model(kind).save_pretrained(tmp_path / "base")
    roles = roles_over(unquantized_base(kind), lower=["sft"], use_rslora=True)
    perturb(roles, "sft", "policy")
    config, tensors = combine_adapters([as_lora_adapter(roles, name) for name in ("sft", "policy")])
    save_adapter(tmp_path / "adapter", config, tensors)
    shape = shape_of(roles.base.model.config)
    assert compare_with_converter(scripts, tmp_path, config, tensors, shape, type) == len(tensors)


@pytest.mark.parametrize("family", EXPORTED, ids=lambda family: family.title)
def test_tensors_of_every_family_are_those_of_llama_cpps_converter(
    scripts: Path, family: Family, tmp_path: Path
) -> None:
    if not is_in_transformers(family):
        pytest.skip(f"the installed transformers has no {family.model_type}")
    case = Case(family)
    roles = case.roles()
    config, tensors = combine_adapters([as_lora_adapter(roles, "policy")])
    case.folder.rename(tmp_path / "base")
    save_adapter(tmp_path / "adapter", config, tensors)
    count = compare_with_converter(scripts, tmp_path, config, tensors, shape_of(roles.base.model.config), "f32")
    # The rows of one module of Granite 4 are those of two tensors.
    assert count == len(tensors) + 2 * sum("shared_mlp.input_linear.lora_A" in name for name in tensors)
    print(f"{family.title}: {count} tensors are equal")


def save_adapter(folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")


def compare_with_converter(
    scripts: Path, root: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor], shape: Shape, type: str
) -> int:
    """Compares our file with that of llama.cpp's converter, from `adapter` and `base` in a folder, and returns the
    number of tensors."""
    write_gguf_lora(root / "ours.gguf", "mine", config, tensors, shape, type)
    ours = gguf.GGUFReader(root / "ours.gguf")
    theirs = their_lora(scripts, root / "adapter", root / "base", root / "theirs.gguf", type)
    mine, yours = ({one.name: one for one in reader.tensors} for reader in (ours, theirs))
    assert mine.keys() == yours.keys()
    for name, tensor in mine.items():
        other = yours[name]
        assert tensor.tensor_type == other.tensor_type and tensor.shape.tolist() == other.shape.tolist(), name
        assert np.array_equal(tensor.data.view(np.uint8), other.data.view(np.uint8)), name
    for key in ("general.architecture", "general.type", "adapter.type", "adapter.lora.alpha"):
        assert ours.get_field(key).contents() == theirs.get_field(key).contents(), key
    return len(mine)


# ---- what llama.cpp's library computes

PROMPTS = 20


def prompts(vocabulary: int) -> list[list[int]]:
    stream = torch.Generator().manual_seed(7)
    return [torch.randint(7, vocabulary, (3 + 4 * number,), generator=stream).tolist() for number in range(PROMPTS)]


def by_llama_cpp(model: Path, prompt_ids: list[list[int]], adapter: Path | None = None) -> torch.Tensor:
    """(prompts, V): logits behind each prompt, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", LLAMA, str(model), str(adapter or ""), str(model) + ".npy"],
        input=json.dumps(prompt_ids),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return torch.tensor(np.load(str(model) + ".npy"))


LLAMA = """
import json, sys
import llama_cpp, numpy
model, adapter, out = sys.argv[1:]
llm = llama_cpp.Llama(
    model_path=model,
    lora_path=adapter or None,
    n_ctx=256,
    n_threads=1,
    verbose=False,
    logits_all=True,
    type_k=0,  # the cache in fp32: the file is what is judged
    type_v=0,
)
logits = []
for ids in json.load(sys.stdin):
    llm.reset()
    llm.eval(ids)
    logits.append(llm.scores[len(ids) - 1].copy())
numpy.save(out, numpy.array(logits))
"""


TOKENS = """
import json, sys, llama_cpp
llm = llama_cpp.Llama(sys.argv[1], vocab_only=True, verbose=False)
print(json.dumps([llm.tokenize(text.encode(), add_bos=False, special=True) for text in json.load(sys.stdin)]))
"""


def by_transformers(model: Any, prompt_ids: list[list[int]]) -> torch.Tensor:
    with torch.no_grad():
        return torch.stack([model.eval()(input_ids=torch.tensor([ids])).logits[0, -1] for ids in prompt_ids])


@pytest.fixture(scope="module")
def library() -> None:
    pytest.importorskip("llama_cpp")


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_files_answer_in_llama_cpp_as_in_transformers(
    library: None, scripts: Path, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The merged model, and the adapter over the base in 16 bits; and what transformers itself reads of the file, where
    it reads rightly."""
    monkeypatch.setenv("LLAMA_CPP_DIR", str(scripts))
    made = make_run(
        tmp_path,
        kind,
        tied=kind in ("qwen2", "gemma3_text"),
        lower=("sft",),
        rslora=True,
        spare=13 if kind == "qwen2" else 0,
    )
    merged = merge(made.run, None, "dequantized", quiet, quiet, CPU).folder
    exported = [
        Path(export(made.run, ExportOptions(to, tmp_path / to, quantization=type), quiet, quiet, quiet, CPU))
        for to, type in (("gguf", "f32"), ("gguf-lora", None))
    ]
    file, adapter = exported[0] / "tried-f32.gguf", exported[1] / "tried-lora-f32.gguf"
    assert b"somebody" not in file.read_bytes() and str(made.run).encode() not in file.read_bytes()
    convert(scripts, made.base, tmp_path / "base.gguf", "f32", "base", False, quiet)
    whole = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    over = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(made.base, dtype=torch.float32), made.run / "final"
    )
    prompt_ids = prompts(whole.config.vocab_size)
    for what, ours, theirs in (
        ("merged", by_transformers(whole, prompt_ids), by_llama_cpp(file, prompt_ids)),
        ("adapter", by_transformers(over, prompt_ids), by_llama_cpp(tmp_path / "base.gguf", prompt_ids, adapter)),
    ):
        far, same = float((ours - theirs).abs().max()), int((ours.argmax(-1) == theirs.argmax(-1)).sum())
        print(
            f"{kind}, {what}: largest difference of two logits {far:.1e} of {float(ours.abs().max()):.1f}, argmax "
            f"{same} of {PROMPTS}"
        )
        assert far < 1e-2 and same == PROMPTS
    assert (
        float((by_llama_cpp(tmp_path / "base.gguf", prompt_ids) - by_transformers(over, prompt_ids)).abs().max()) > 0.5
    ), "the adapter matters"
    if kind in ("llama", "qwen2"):
        read = AutoModelForCausalLM.from_pretrained(exported[0], gguf_file=file.name, dtype=torch.float32)
        far = float((by_transformers(read, prompt_ids) - by_transformers(whole, prompt_ids)).abs().max())
        print(f"{kind}, by transformers from the file: {far:.1e}")
        assert far < 1e-4


def test_quantized_and_tokenized_alike(
    library: None, scripts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAMA_CPP_DIR", str(scripts))
    made = make_run(tmp_path, "llama")
    folder = Path(
        export(
            made.run,
            ExportOptions("ollama", tmp_path / "out", quantization="q4_k_m", system="Be kind."),
            quiet,
            quiet,
            quiet,
            CPU,
        )
    )
    assert {path.name for path in folder.iterdir()} == {"Modelfile", "README.md", "export.json", "tried-q4_k_m.gguf"}
    reader = gguf.GGUFReader(folder / "tried-q4_k_m.gguf")
    assert reader.get_field("general.file_type").contents() == gguf.LlamaFileType.MOSTLY_Q4_K_M
    assert (
        reader.get_field("tokenizer.ggml.pre").contents() == "smollm"
        and not reader.get_field("tokenizer.ggml.add_bos_token").contents()
    )
    assert "FROM ./tried-q4_k_m.gguf" in (folder / "Modelfile").read_text()
    texts = [
        "Hello  world, it's 12345 + 6.7!",
        " a\n\n\tb  ",
        "Zoë's 3 ½ naïve — ok?  ",
        "<|user|>What is 12 + 30?<|end_of_turn|><|assistant|>",
    ]
    done = subprocess.run(
        [sys.executable, "-c", TOKENS, str(folder / "tried-q4_k_m.gguf")],
        input=json.dumps(texts),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    tokenizer = AutoTokenizer.from_pretrained(made.base)
    assert json.loads(done.stdout.splitlines()[-1]) == [
        tokenizer(text, add_special_tokens=False).input_ids for text in texts
    ]

"""What leaves a run, in the software of others: the adapter in plain PEFT, and GGUF files in llama.cpp, against the
model that was trained.

    python benchmarks/export.py RUN --llama-cpp DIR [--types f32 bf16 f16 q8_0 q4_k_m]

The trained model (4-bit base, adapter) answers held-out prompts of the run greedily. Plain PEFT, in a process of its
own that never imports this package, answers the same prompts. Then each GGUF file reads prompts and answers in
llama.cpp (llama-cpp-python), beside transformers, which reads the merged model in fp32, with llama.cpp's cache in fp32
too (its default is f16): the largest difference of two logits, where the likeliest token is another one, KL(merged ||
file).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lowrank_tune.assembly.finished_run import FinishedRun, adapters_in, check_base, load_finished_run, roles_of
from lowrank_tune.data import ChatTemplate
from lowrank_tune.export.export import ExportOptions, export
from lowrank_tune.export.merge import merge
from lowrank_tune.export.merge_check import RecordedOutputs, make_probes, record_outputs
from lowrank_tune.model.base import load_base, load_tokenizer
from lowrank_tune.model.base_source import BUILTIN_MODEL

PROMPTS = 20
PEFT = """
import json, sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GenerationConfig
base, adapter, bits = sys.argv[1:]
four = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.float32,
)
more = {"quantization_config": four} if bits == "4" else {}
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, **more)
for module in model.modules():
    module.support_avx512bf16_for_cpu = False
model = PeftModel.from_pretrained(model, adapter).eval()
ends = GenerationConfig.from_pretrained(adapter)
answers = []
for ids in json.load(sys.stdin):
    out = model.generate(input_ids=torch.tensor([ids]), max_new_tokens=32, do_sample=False, generation_config=ends)
    answers.append(out[0, len(ids):].tolist())
print(json.dumps(answers))
"""
LLAMA = """
import json, sys
import llama_cpp, numpy
from llama_cpp import llama
model, cache, out = sys.argv[1:]
usual = llama_cpp.llama_model_default_params
def plain():  # its AMX kernels end the process on some virtual machines
    options = usual()
    options.use_extra_bufts = False
    return options
llama.llama_cpp.llama_model_default_params = plain
llm = llama_cpp.Llama(
    model, n_ctx=1024, n_threads=1, verbose=False, logits_all=True, type_k=int(cache), type_v=int(cache)
)
logits = []
for ids in json.load(sys.stdin):
    llm.reset()
    llm.eval(ids)
    logits.append(llm.scores[:len(ids)].copy())
numpy.savez(out, *logits)
"""


def child(code: str, arguments: list[str], given: Any) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], input=json.dumps(given), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def quiet(event: object) -> None:
    pass


def trained(found: FinishedRun) -> RecordedOutputs:
    """What the trained model answers."""
    template = ChatTemplate.from_tokenizer(load_tokenizer(found.base))
    base = load_base(found.base, template.tokenizer)
    check_base(found, base)
    return record_outputs(
        roles_of(adapters_in(found), base),
        make_probes(found.recipe, template, quiet),
        base.end_ids | template.end_ids,
        quiet,
    )


def in_plain_peft(found: FinishedRun, recorded: RecordedOutputs) -> None:
    model = found.recipe.base.model
    if model == BUILTIN_MODEL:
        import lowrank_tune.toy

        model = str(Path(lowrank_tune.toy.__file__).parent / "base")
    texts = recorded.texts[: len(recorded.starts)]
    prompts = [text[:start] for text, start in zip(texts, recorded.starts, strict=True)]
    completions = json.loads(
        child(PEFT, [model, str(found.final), str(found.recipe.base.bits)], prompts).splitlines()[-1]
    )
    same = sum(one == text[start:] for one, text, start in zip(completions, texts, recorded.starts, strict=True))
    print(f"plain PEFT: {same} of {len(prompts)} greedy answers are the trained model's, token by token")


def in_llama_cpp(file: Path, cache: str, texts: list[list[int]], starts: list[int], logits: list[torch.Tensor]) -> str:
    with tempfile.TemporaryDirectory() as place:
        child(LLAMA, [str(file), {"f32": "0", "f16": "1"}[cache], f"{place}/logits.npz"], texts)
        with np.load(f"{place}/logits.npz") as read:
            theirs = [torch.tensor(read[name]) for name in read.files]
    last = [(one[start - 1], other[start - 1]) for one, other, start in zip(logits, theirs, starts, strict=True)]
    a, b = torch.cat(logits), torch.cat(theirs)
    p, q = a.log_softmax(-1), b.log_softmax(-1)
    kl = float((p.exp() * (p - q)).sum(-1).mean())
    alike = sum(int(one.argmax() == other.argmax()) for one, other in last)
    far = max(float((one - other).abs().max()) for one, other in last)
    return (
        f"| {file.stat().st_size / 2**20:.2f} | {far:.1e} | {alike} of {len(last)} "
        f"| {float((a - b).abs().max()):.1e} | {int((a.argmax(-1) != b.argmax(-1)).sum())} of {len(a):,} | {kl:.1e} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    parser.add_argument("--llama-cpp", type=Path)
    parser.add_argument("--types", nargs="*", default=["f32", "bf16", "f16", "q8_0", "q4_k_m"])
    options = parser.parse_args()
    found = load_finished_run(options.run)
    recorded = trained(found)
    in_plain_peft(found, recorded)
    with tempfile.TemporaryDirectory() as place:
        for kind in ("original", "dequantized"):
            proof = merge(found.path, Path(place) / kind, kind, quiet, quiet).report
            print(f"merged into the {kind} base: {dict(proof.table())}")
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(Path(place) / "dequantized", dtype=torch.float32).eval()
        texts = recorded.texts[:PROMPTS]
        with torch.no_grad():
            logits = [model(input_ids=torch.tensor([text])).logits[0] for text in texts]
        print(
            f"| type | MiB | logits behind {len(texts)} prompts | argmax | logits everywhere | argmax differs | "
            f"KL(merged, file) |"
        )
        print("|---" * 7 + "|")
        print(f"(logits up to {max(float(one.abs().max()) for one in logits):.0f})")
        for kind in options.types:
            order = ExportOptions("gguf", Path(place) / f"gguf-{kind}", quantization=kind, llama_cpp=options.llama_cpp)
            file = next(Path(export(found.path, order, quiet, quiet, quiet)).glob("*.gguf"))
            for cache in ("f32", "f16") if kind == options.types[0] else ("f32",):
                name = kind if cache == "f32" else f"{kind}, cache f16"
                print(f"| {name} {in_llama_cpp(file, cache, texts, recorded.starts[:PROMPTS], logits)}", flush=True)


if __name__ == "__main__":
    main()

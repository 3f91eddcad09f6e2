"""Greedy answers in a new process without this package: the trained model by plain PEFT over 4 bits, and
merged, in bf16."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from export_fixtures import make_run
from models import CPU

from lowrank_tune.export.merge import merge

CHILD = """
import json, sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
torch.set_num_threads(1)
four = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.float32,
)
stream = torch.Generator().manual_seed(3)
prompts = torch.randint(7, 900, (50, 8), generator=stream)
def answer(model):
    out = model.eval().generate(
        input_ids=prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=24,
        do_sample=False,
        eos_token_id=None,
        output_logits=True,
        return_dict_in_generate=True,
        use_cache=True,
    )
    return out.sequences[:, 8:], torch.stack(out.logits, dim=1).float()
found = {}
for name, base, adapter, merged in json.loads(sys.argv[1]):
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, quantization_config=four)
    for module in model.modules():
        module.support_avx512bf16_for_cpu = False
    trained, logits = answer(PeftModel.from_pretrained(model, adapter))
    taken = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.bfloat16)
    other, own = answer(taken)
    with torch.no_grad():
        text = torch.cat([prompts, trained], dim=1)
        merged_logits = taken(input_ids=text).logits[:, 7:-1].float()
    p, q = logits.log_softmax(-1), merged_logits.log_softmax(-1)
    places = [(row, int(at[0])) for row in range(50) if len(at := (trained[row] != other[row]).nonzero().flatten())]
    gaps = [[float(one[place].topk(2).values.diff().abs()) for one in (own, logits)] for place in places]
    found[name] = {"kl": float((p.exp() * (p - q)).sum(-1).mean()), "gaps": gaps, "most": float(logits.abs().max()),
                   "different": len({tuple(row) for row in trained.tolist()})}
print(json.dumps(found))
"""


@pytest.mark.slow
def test_fifty_greedy_answers_are_the_same_up_to_a_near_tie(tmp_path: Path) -> None:
    orders = []
    for kind in ("llama", "qwen2", "mistral", "gemma2"):
        for tied in (False, True):
            place = tmp_path / f"{kind}-{tied}"
            made = make_run(place, kind, tied, lower=("sft",), rslora=tied)
            folder = merge(
                made.run, place / "merged", "dequantized", lambda event: None, lambda proof: None, CPU
            ).folder
            orders.append(
                (f"{kind}, {'tied' if tied else 'untied'}", str(made.base), str(made.run / "final"), str(folder))
            )
    done = subprocess.run([sys.executable, "-c", CHILD, json.dumps(orders)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for name, facts in json.loads(done.stdout.splitlines()[-1]).items():
        # of the first two choices where two answers part: the merged model's, in bf16, and the trained model's
        parted = facts["gaps"]
        ties = sum(gap < 0.05 for gap, _ in parted)
        print(
            f"{name}: KL(trained || merged, bf16) {facts['kl']:.1e}; {50 - len(parted)} of 50 answers the same, "
            f"{ties} part at a near-tie, "
            f"{len(parted) - ties} elsewhere (widest gap {max(parted, default=0)}, logits up to {facts['most']:.1f})"
        )
        assert facts["kl"] <= 1e-3 and len(parted) - ties <= 2 and facts["different"] > 40, name

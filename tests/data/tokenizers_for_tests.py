"""Tokenizers and templates for the tests: tiny ones made here, and real vocabularies where ../shared has them."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lowrank_tune.toy import text as toy_text

SHARED = Path(__file__).resolve().parents[3] / "shared"
MARKS = ["<s>", "</s>", "<|eot|>", "<|head|>", "<|/head|>", "<|im_start|>", "<|im_end|>"]
TEXT = [
    "What is 12 + 30? It is 42.\n\nuser assistant system answer: $5 $$ :) :(",
    "assistant\nIt is\n\n the end.\n",
    "x.\n\n",
    "a  b   c <think> </think>\n",
]

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|head|>{{ m['role'] }}<|/head|>\n\n{{ m['content'] | trim }}<|eot|>{% "
    "endfor %}"
    "{% if add_generation_prompt %}<|head|>assistant<|/head|>\n\n{% endif %}"
)
THINKING = (
    "{% for m in messages %}{% set c = m['content'] %}<|im_start|>{{ m['role'] }}\n"
    "{% if '</think>' in c and not loop.last %}{{ c.split('</think>')[-1].lstrip('\n') }}{% else %}{{ c }}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_END = (
    "{% for m in messages %}{{ '### ' + m['role'] + ':\n' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant:\n' }}{% endif %}"
)
MERGING = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %}{{ m['content'] }}</s>{% endif %}{% endfor %}"
)
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + LLAMA3
OWN = {
    "chatml": CHATML,
    "llama3": LLAMA3,
    "thinking": THINKING,
    "no end": NO_END,
    "merging": MERGING,
    "no system": NO_SYSTEM,
}


@functools.cache
def _state(split: bool) -> str:
    tokenizer = Tokenizer(models.BPE())
    # Without GPT-2's rule for splitting, merges cross every edge they can.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=460,
        special_tokens=[*MARKS, *toy_text.CONTROL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT * 4, trainer)
    return str(tokenizer.to_str())


def tiny(template: str | None = None, marks: bool = True, split: bool = False) -> Any:
    """Returns a byte-level BPE of some hundred ids; pad == eos. Without `marks` control tokens are ordinary text."""
    state = _state(split) if marks else _state(split).replace("<|user|>", "<|nobody|>")
    ends = {
        LLAMA3: "<|eot|>",
        NO_SYSTEM: "<|eot|>",
        CHATML: "<|im_end|>",
        THINKING: "<|im_end|>",
        None: toy_text.EOS if marks else "</s>",
    }
    end = ends.get(template, "<|im_end|>" if template and "<|im_end|>" in template else "</s>")
    made = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(state), bos_token="<s>", eos_token=end, pad_token=end
    )
    made.chat_template = template
    return made


def real(name: str, template: str | None = None) -> Any:
    """A tokenizer of ../shared, skipped where it is missing."""
    folder = SHARED / "models" / name
    if not folder.is_dir():
        pytest.skip("needs ../shared")
    made = AutoTokenizer.from_pretrained(folder)
    if template:
        made.chat_template = (folder / template).read_text()
    return made


def tokenizer(name: str) -> Any:
    """By name: own templates, `kit`, `words`, and the real ones."""
    if name in OWN:
        return tiny(OWN[name])
    if name in ("kit", "words"):
        return tiny(marks=name == "kit")
    folder, _, template = name.partition(" + ")
    return real(folder, template or None)


TINY = [*OWN, "kit", "words"]
REAL = [
    "tokenizers/smollm2-135m-instruct",
    "tokenizers/gpt2",
    "tokenizers/mistral-7b-v0.2",
    "stories260K",
    "tokenizers/mistral-7b-v0.2 + broken_chat_template.jinja",
]

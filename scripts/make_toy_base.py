"""Makes the tiny base: `python scripts/make_toy_base.py OUT`. Seeded; about half an hour on two cores.

A byte-level BPE with single digits, then a Llama of about 2 M parameters trained from scratch on `text.documents`: Muon
for the matrices, AdamW for the rest, a warm-up, a constant rate, a linear decay to zero. In the last part of the
training the forward pass rounds the weights to NF4 (straight-through), so that the model is as good when it is loaded
in 4 bits.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from itertools import count, islice
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lowrank_tune.toy import text

VOCAB_SIZE = 1024
CONTEXT = 1024
SHORT_ROW = 256
QAT_START_FRACTION = 0.85
"""Share of the steps after which the forward pass has NF4 weights."""
SAVE_EVERY = 400
LOG_EVERY = 50
NF4_LEVELS = (
    -1.0,
    -0.6961928,
    -0.52507305,
    -0.39491749,
    -0.28444138,
    -0.18477343,
    -0.09105004,
    0.0,
    0.0795803,
    0.1609302,
    0.2461123,
    0.33791524,
    0.44070983,
    0.562617,
    0.72295684,
    1.0,
)


def make_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Returns a byte-level BPE (it encodes any text) with single digits, trained on the generated text. Its first ids
    are the control tokens."""
    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(text.CONTROL_TOKENS),
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    plain = islice(text.documents(seed + 1), 20_000)
    tokenizer.train_from_iterator((_without_special_tokens(document) for document in plain), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=text.BOS,
        eos_token=text.EOS,
        pad_token=text.PAD,
        additional_special_tokens=[text.SYSTEM, text.USER, text.ASSISTANT, text.END_OF_TURN],
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def _without_special_tokens(document: str) -> str:
    for token in text.CONTROL_TOKENS:
        document = document.replace(token, "\n")
    return document


def token_stream(tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[int]:
    """Yields the ids of the documents without end."""
    documents = text.documents(seed)
    while True:
        for ids in tokenizer(list(islice(documents, 2_000)), add_special_tokens=False)["input_ids"]:
            yield from ids


@torch.no_grad()
def round_to_nf4(weight: Tensor) -> Tensor:
    """Returns the weight as bitsandbytes dequantizes it from NF4: blocks of 64, scaled by their largest magnitude."""
    levels = torch.tensor(NF4_LEVELS)
    blocks = weight.reshape(-1, 64)
    scale = blocks.abs().amax(dim=1, keepdim=True).clamp_min(1e-12)
    midpoints = (levels[1:] + levels[:-1]) / 2
    nearest = torch.bucketize(blocks / scale, midpoints)
    return (levels[nearest] * scale).view_as(weight)


def learning_rate_at(progress: float) -> float:
    """Returns the factor of the peak at a share of the steps: warm-up over 2 %, linear decay over the last 40 %."""
    return min(1.0, progress / 0.02, (1.0 - progress) / 0.4)


def train(
    model: LlamaForCausalLM, batches: Iterator[Tensor], steps: int, on_step: Callable[[int, float], None]
) -> None:
    """Trains in place. `batches` yields ids, (rows, length)."""
    matrices = []
    others = []
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and "embed" not in name:
            matrices.append(parameter)
        else:
            others.append(parameter)
    optimizers: tuple[torch.optim.Optimizer, ...] = (
        torch.optim.Muon(matrices, lr=0.01, momentum=0.95, weight_decay=0.01),
        torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.98), weight_decay=0.0),
    )
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]

    @torch.compile(dynamic=False)
    def loss_of(ids: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(input_ids=ids, use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())

    for step in range(steps):
        masters = []
        if step >= steps * QAT_START_FRACTION:
            masters = [parameter.detach().clone() for parameter in matrices]
            for parameter in matrices:
                parameter.data.copy_(round_to_nf4(parameter))
        loss = loss_of(next(batches))
        loss.backward()  # type: ignore[no-untyped-call]
        if masters:
            # The gradient at the rounded weights updates the exact ones.
            for parameter, master in zip(matrices, masters, strict=True):
                parameter.data.copy_(master)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * learning_rate_at((step + 1) / steps)
            optimizer.step()
            optimizer.zero_grad()
        on_step(step, loss.item())


def batches_of(tokenizer: PreTrainedTokenizerFast, seed: int, batch_tokens: int) -> Iterator[Tensor]:
    """Yields rows of 256 tokens; each eighth batch has rows of the whole context."""
    stream = token_stream(tokenizer, seed)
    for step in count():
        length = CONTEXT if step % 8 == 7 else SHORT_ROW
        yield torch.tensor(list(islice(stream, batch_tokens))).view(-1, length)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Writes the weights in bfloat16, and the tokenizer, without a chat template, as a base has none."""
    copy = LlamaForCausalLM(model.config)
    copy.load_state_dict(model.state_dict())
    copy.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokens", type=int, default=12_000_000)
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    tokenizer = make_tokenizer(arguments.seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=6,
            num_key_value_heads=6,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            initializer_range=0.03,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    steps = arguments.tokens // arguments.batch_tokens
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{parameters:,} parameters, {len(tokenizer)} tokens in the vocabulary, {steps} steps", flush=True)
    started = time.time()

    def on_step(step: int, loss: float) -> None:
        is_last = step == steps - 1
        if step % LOG_EVERY == 0 or is_last:
            seconds = time.time() - started
            rate = (step + 1) * arguments.batch_tokens / seconds
            print(
                f"step {step} of {steps}: loss {loss:.4f}, {rate:,.0f} tokens/s, {seconds / 60:.1f} minutes", flush=True
            )
        if step % SAVE_EVERY == SAVE_EVERY - 1 or is_last:
            save(model, tokenizer, arguments.out)

    train(model, batches_of(tokenizer, arguments.seed, arguments.batch_tokens), steps, on_step)


if __name__ == "__main__":
    main()

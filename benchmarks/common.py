"""What the benchmarks share: the `small` shape, ragged rows, and memory as the kernel counts it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

VOCABULARY, MEAN_LENGTH = 8192, 97


def small_config() -> Any:
    """Qwen2-shaped: d 256, 4 layers, vocabulary 8,192, untied head; about 8 M parameters."""
    from transformers import Qwen2Config  # seconds, and only the benchmarks that train need it

    return Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )


def ragged_rows(count: int, seed: int = 0, vocabulary: int = VOCABULARY) -> list[tuple[list[int], list[bool]]]:
    """Random rows of 32 to 162 tokens, 97 in the mean, and for each token whether the assistant says it: the last third
    to two thirds.

    Tokens are drawn log-uniformly, so that there is something to learn: low ids are common.
    """
    numbers, rows = random.Random(seed), []
    for _ in range(count):
        length = numbers.randint(MEAN_LENGTH - 65, MEAN_LENGTH + 65)
        prompt = int(length * numbers.uniform(1 / 3, 2 / 3))
        rows.append(
            (
                [int(2 * (vocabulary / 2) ** numbers.random()) for _ in range(length)],
                [place >= prompt for place in range(length)],
            )
        )
    return rows


def memory_mib(name: str = "VmHWM") -> float:
    """Peak (`VmHWM`) or present (`VmRSS`) resident memory. Not `ru_maxrss`: a child inherits that from whoever started
    it."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name + ":")) / 1024

"""Small rows of the true shapes: every column of the hub data sets that the presets name."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any


def chat_turns(n: int, reply: str) -> list[dict[str, str]]:
    return [{"content": f"Say {n}.", "role": "user"}, {"content": reply, "role": "assistant"}]


EXAMPLE_ROWS: dict[str, Callable[[int], dict[str, Any]]] = {
    "AI-MO/NuminaMath-CoT": lambda n: {
        "source": "x",
        "problem": f"Find {n} + 1.",
        "solution": f"It is $\\boxed{{{n + 1}}}$.",
        "messages": [
            {"content": f"Find {n} + 1.", "role": "user"},
            {"content": f"It is $\\boxed{{{n + 1}}}$.", "role": "assistant"},
        ],
    },
    "nvidia/OpenMathInstruct-2": lambda n: {
        "problem": f"Solve x = {n}.",
        "generated_solution": f"So \\boxed{{{n}}}.",
        "expected_answer": str(n),
        "problem_source": "augmented_math",
    },
    "HuggingFaceH4/ultrachat_200k": lambda n: {
        "prompt": f"Hi {n}",
        "prompt_id": f"{n:064x}",
        "messages": [
            {"content": f"Hi {n}", "role": "user"},
            {"content": "Hello.", "role": "assistant"},
            {"content": "And?", "role": "user"},
            {"content": f"That is all, {n}.", "role": "assistant"},
        ],
    },
    "microsoft/orca-math-word-problems-200k": lambda n: {
        "question": f"{n} people, one leaves?",
        "answer": f"Then {n - 1} people are left.",
    },
    "meta-math/MetaMathQA": lambda n: {
        "type": "GSM_AnsAug",
        "query": f"Twice {n}?",
        "original_question": f"Twice {n}?",
        "response": f"It is 2 * {n}.\n#### {2 * n}\nThe answer is: {2 * n}",
    },
    "HuggingFaceH4/ultrafeedback_binarized": lambda n: {
        "prompt": f"Say {n}.",
        "prompt_id": f"{n:064x}",
        "chosen": chat_turns(n, f"{n}, as you wish."),
        "rejected": chat_turns(n, "No."),
        "messages": chat_turns(n, f"{n}, as you wish."),
        "score_chosen": 8.5,
        "score_rejected": 3.0,
    },
    "roneneldan/TinyStories": lambda n: {"text": f"Once there were {n} pens. They wrote {n} stories."},
    "openai/gsm8k": lambda n: {
        "question": f"Ava has {n} pens and buys one. How many?",
        "answer": f"{n} + 1 = <<{n}+1={n + 1}>>{n + 1}.\n#### {n + 1}",
    },
}
"""A row of each data set that the presets name, as its author publishes it, from a number."""


def write_rows(folder: Path, dataset: str, numbers: Iterable[int]) -> Path:
    """A file of such rows."""
    file = folder / f"{dataset.split('/')[1]}.jsonl"
    file.write_text("".join(json.dumps(EXAMPLE_ROWS[dataset](number)) + "\n" for number in numbers), encoding="utf-8")
    return file

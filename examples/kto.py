"""KTO on answers of your own, each marked as good or bad: `python examples/kto.py`. No GPU needed; a minute on two
cores."""

import json
import random
import tempfile
from pathlib import Path

from lowrank_tune import Recipe, run


def write_answers(path: Path, count: int = 320) -> None:
    """Answers as you may have them: one JSON object a line, most of them good."""
    rng = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            a, b = rng.randint(2, 40), rng.randint(2, 40)
            is_good = rng.random() < 0.6
            completion = f"It is {a + b}." if is_good else rng.choice(("Good question.", "I do not know."))
            row = {"prompt": f"What is {a} + {b}?", "completion": completion, "label": is_good}
            file.write(json.dumps(row) + "\n")


with tempfile.TemporaryDirectory() as folder:
    answers = Path(folder) / "answers.jsonl"
    write_answers(answers)
    recipe = Recipe.from_dict(
        {
            "name": "example-kto",
            "algorithm": "kto",
            "base": {"model": "tiny-tutor"},
            "adapters": {"policy": {"r": 8, "lora_alpha": 16}},
            "reference": "base",
            "data": {"train": [{"dataset": str(answers)}], "eval_fraction": 0.1},
            "kto": {"beta": 0.1},
            "train": {
                "num_train_epochs": 2,
                "global_batch_size": 16,
                "micro_batch_size": 16,
                "learning_rate": 1e-3,
                "gradient_checkpointing": False,
            },
            "evaluate": {"num_completions_to_print": 1, "max_new_tokens": 24},
        }
    )
    outcome = run(recipe, out=Path(folder) / "run")
    best = outcome.summary["best"]
    accuracy = best["rewards/accuracies"]
    print(f"{outcome.status}: {accuracy:.0%} of the held-out answers moved in the direction of their label")

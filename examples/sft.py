"""SFT of the tiny base on rows of your own: `python examples/sft.py`. No GPU needed; under a minute on two cores."""

import json
import random
import tempfile
from pathlib import Path

from lowrank_tune import Recipe, run


def write_rows(path: Path, count: int = 200) -> None:
    """Rows as you may have them: one JSON object a line."""
    rng = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            a, b = rng.randint(2, 40), rng.randint(2, 40)
            file.write(json.dumps({"prompt": f"What is {a} + {b}?", "completion": f"It is {a + b}."}) + "\n")


with tempfile.TemporaryDirectory() as folder:
    rows = Path(folder) / "rows.jsonl"
    write_rows(rows)
    recipe = Recipe.from_dict(
        {
            "name": "example-sft",
            "algorithm": "sft",
            "base": {"model": "tiny-tutor"},
            "adapters": {"policy": {"r": 8, "lora_alpha": 16}},
            "data": {"train": [{"dataset": str(rows)}], "eval_fraction": 0.1},
            "train": {
                "num_train_epochs": 2,
                "global_batch_size": 16,
                "micro_batch_size": 16,
                "learning_rate": 2e-3,
                "gradient_checkpointing": False,
            },
            "evaluate": {"num_completions_to_print": 2},
        }
    )
    losses = []
    outcome = run(
        recipe,
        out=Path(folder) / "run",
        on_event=lambda event: losses.append(event.stats["loss"]) if event.kind == "step_end" else None,
    )
    print(
        f"{outcome.status}: loss {losses[0]:.2f} -> {losses[-1]:.2f}, best validation loss "
        f"{outcome.summary['best']['loss']:.2f}"
    )

"""DPO on comparisons of your own: `python examples/dpo.py`. No GPU needed; a minute on two cores."""

import json
import random
import tempfile
from pathlib import Path

from lowrank_tune import Recipe, run


def write_pairs(path: Path, count: int = 160) -> None:
    """Comparisons as you may have them: one JSON object a line."""
    rng = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            a, b = rng.randint(2, 40), rng.randint(2, 40)
            row = {
                "prompt": f"What is {a} + {b}?",
                "chosen": f"It is {a + b}.",
                "rejected": rng.choice(("Good question.", "I do not know.")),
            }
            file.write(json.dumps(row) + "\n")


with tempfile.TemporaryDirectory() as folder:
    pairs = Path(folder) / "pairs.jsonl"
    write_pairs(pairs)
    recipe = Recipe.from_dict(
        {
            "name": "example-dpo",
            "algorithm": "dpo",
            "base": {"model": "tiny-tutor"},
            "adapters": {"policy": {"r": 8, "lora_alpha": 16}},
            "reference": "base",
            "data": {"train": [{"dataset": str(pairs)}], "eval_fraction": 0.1},
            "dpo": {"loss_type": "sigmoid", "beta": 0.1, "sft_coef": 0.2},
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
    last = outcome.summary["last"]
    print(
        f"{outcome.status}: margin {last['rewards/margins']:+.2f}, KL to the reference {last['kl']:.2f} nats a token, "
        f"{outcome.summary['heldout_pairs']['accuracy']:.0%} of the held-out pairs the right way round"
    )

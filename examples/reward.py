"""A reward model from comparisons of your own, then a score for any answer: `python examples/reward.py`. No GPU needed;
a minute."""

import json
import random
import tempfile
from pathlib import Path

from lowrank_tune import Recipe, run
from lowrank_tune.evaluation import score_file


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
    pairs, answers = Path(folder) / "pairs.jsonl", Path(folder) / "answers.jsonl"
    write_pairs(pairs)
    recipe = Recipe.from_dict(
        {
            "name": "example-reward",
            "algorithm": "reward",
            "base": {"model": "tiny-tutor"},
            "adapters": {"reward": {"r": 8, "lora_alpha": 16}},
            "data": {"train": [{"dataset": str(pairs)}], "eval_fraction": 0.1},
            "train": {
                "num_train_epochs": 2,
                "global_batch_size": 16,
                "micro_batch_size": 16,
                "learning_rate": 1e-3,
                "gradient_checkpointing": False,
            },
            "evaluate": {"num_completions_to_print": 0},
        }
    )
    outcome = run(recipe, out=Path(folder) / "run")
    print(f"{outcome.status}: right about {outcome.summary['heldout_pairs']['accuracy']:.0%} of the held-out pairs")

    answers.write_text(
        "".join(
            json.dumps({"prompt": "What is 7 + 5?", "completion": text}) + "\n"
            for text in ("It is 12.", "Good question.")
        )
    )
    scored, _ = score_file(outcome.folder, str(answers), emit=lambda event: None)
    for one in scored:
        print(f"{one.score:+.2f}  {one.text}")

"""A chain, SFT then DPO on top of the frozen SFT adapter, in one call: `python examples/preference.py`. No GPU needed;
two minutes."""

import tempfile
from pathlib import Path

from lowrank_tune import Chain, run

chain = Chain.from_dict(
    {
        "name": "example-preference",
        "base": {"model": "tiny-tutor"},
        "data": {"max_length": 256},
        "train": {
            "epochs": 1,
            "rows_per_step": 16,
            "micro_batch_size": 16,
            "learning_rate": 2e-3,
            "gradient_checkpointing": False,
        },
        "evaluate": {
            "heldout": {"dataset": "tutor", "split": "heldout"},
            "prompts": 50,
            "samples": 4,
            "max_new_tokens": 48,
            "shown": 0,
        },
        "stages": [
            {"name": "sft", "algorithm": "sft", "data": {"train": [{"dataset": "tutor", "rows": 320}]}},
            {
                "name": "dpo",
                "algorithm": "dpo",
                "reference": "sft",
                "data": {"train": [{"dataset": "tutor-preferences", "rows": 320}]},
                "dpo": {"beta": 0.1, "sft": 0.2},
                "train": {"learning_rate": 1e-3},
            },
        ],
    }
)
with tempfile.TemporaryDirectory() as folder:
    outcome = run(chain, out=Path(folder) / "run")
    for name, share in outcome.summary["heldout"].items():
        print(f"{name:5} answers {share:.0%} of the held-out questions exactly")

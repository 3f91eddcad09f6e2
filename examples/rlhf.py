"""Classical RLHF in one call, SFT, a reward model, then PPO against it: `python examples/rlhf.py`. No GPU needed; three
minutes."""

import tempfile
from pathlib import Path

from lowrank_tune import Chain, run

chain = Chain.from_dict(
    {
        "name": "example-rlhf",
        "base": {"model": "tiny-tutor"},
        "train": {"micro_batch_size": 32, "gradient_checkpointing": False},
        "stages": [
            {
                "name": "sft",
                "algorithm": "sft",
                "data": {"train": [{"dataset": "builtin:arithmetic", "max_samples": 320}], "max_length": 256},
                "train": {"num_train_epochs": 1, "global_batch_size": 16, "learning_rate": 2e-3},
            },
            {
                "name": "reward",
                "algorithm": "reward",
                "data": {
                    "train": [{"dataset": "builtin:arithmetic-preferences", "max_samples": 400}],
                    "max_length": 256,
                },
                "train": {"num_train_epochs": 1, "global_batch_size": 16, "learning_rate": 1e-3},
            },
            {
                "name": "ppo",
                "algorithm": "ppo",
                "reference": "sft",
                "data": {"train": [{"dataset": "builtin:arithmetic"}]},
                "rewards": [{"name": "reward_model", "weight": 0.25}],
                "rollout": {"num_generations": 4, "max_new_tokens": 48},
                "ppo": {"critic_init": "reward", "kl_coef": 0.02, "kl_target": 0.1, "num_ppo_epochs": 2},
                "train": {"max_steps": 6, "prompts_per_step": 16, "learning_rate": 5e-4},
            },
        ],
    }
)
with tempfile.TemporaryDirectory() as folder:
    outcome = run(chain, out=Path(folder) / "run")
    for stage in outcome.summary["stages"]:
        print(f"{stage['name']:7} {stage['status']} after step {stage['step']}")
    pairs, last = outcome.summary["stages"][1]["heldout_pairs"], outcome.summary["stages"][2]["last"]
    print(f"held-out pairs that the reward model orders as in the data: {pairs['accuracy']:.0%}")
    print(f"mean reward of PPO's last completions: {last['reward']:.2f}")

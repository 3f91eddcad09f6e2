"""Rewards: functions that return a number for each completion, and report a failure instead of a wrong number.

The first module decides in the main process. If it has a worker module, that grades the completions that the first
cannot decide at once, in a worker process (`workers/`) with limits on time and memory.

| reward | main process | worker process |
|---|---|---|
| `answer` | `math/answer.py` | |
| `math_answer` | `math/math_answer.py` | `math/math_worker.py` |
| `symbolic` | `math/symbolic.py` | `math/symbolic_worker.py` |
| `python_tests` | `code/python_tests.py` | `code/python_tests_worker.py`, which runs the code in `sandbox/` |
| `smt` | `formal/smt.py` | `formal/smt_worker.py` |
| `lean` | `formal/lean.py` | `formal/lean_worker.py` |
| `json_schema` | `text/json_schema.py` | `text/json_schema_worker.py` |
| `format`, `regex` | `text/regex_reward.py` | |
| `length` | `text/length.py` | |
| `repetition` | `text/repetition.py` | |
| `reward_model` | `reward_model.py` | |
| `./file.py:name` | `user_function.py` | `workers/worker.py` |

`base.py` has the interfaces, `registry.py` builds the rewards of a recipe, `weighted.py` adds their values,
`sanity_check.py` checks them before training.
"""

from lowrank_tune.rewards.base import Reward, RewardInput, Score
from lowrank_tune.rewards.negative_samples import make_negative_samples
from lowrank_tune.rewards.registry import build_rewards
from lowrank_tune.rewards.sanity_check import SanityReport, sanity_check_rewards
from lowrank_tune.rewards.verdicts import zero_std_fraction
from lowrank_tune.rewards.weighted import WeightedReward, first_failure, row_rejection_reason, weighted_sum
from lowrank_tune.rewards.workers.pool import WorkerPool

__all__ = [
    "Reward",
    "RewardInput",
    "SanityReport",
    "Score",
    "WeightedReward",
    "WorkerPool",
    "build_rewards",
    "first_failure",
    "make_negative_samples",
    "row_rejection_reason",
    "sanity_check_rewards",
    "weighted_sum",
    "zero_std_fraction",
]

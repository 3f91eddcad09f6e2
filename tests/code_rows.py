"""One row of each published data set of programming tasks with unit tests, shortened."""

from __future__ import annotations

from typing import Any

HUMANEVAL: dict[str, Any] = {
    "task_id": "HumanEval/0",
    "prompt": "def double(x):\n",
    "entry_point": "double",
    "canonical_solution": "    return 2 * x\n",
    "test": "def check(candidate):\n    assert candidate(2) == 4\n",
}
MBPP: dict[str, Any] = {
    "text": "Write a function that doubles.",
    "code": "def double(x):\n    return 2 * x",
    "task_id": 1,
    "test_setup_code": "",
    "test_list": ["assert double(2) == 4", "assert double(3) == 6"],
    "challenge_test_list": [],
}
MBPP_SANITIZED: dict[str, Any] = {
    "source_file": "mbpp.txt",
    "task_id": 1,
    "prompt": MBPP["text"],
    "code": MBPP["code"],
    "test_imports": [],
    "test_list": MBPP["test_list"],
}

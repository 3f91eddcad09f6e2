"""Rewards on final answers: `answer` (exact), `math_answer` (by math-verify) and `symbolic` (by sympy)."""

"""Rewards by an SMT solver and by Lean. `*_worker.py` runs in a worker process."""

"""Rewards on final answers: exact, mathematical and symbolic comparison. `*_worker.py` runs in a worker process."""

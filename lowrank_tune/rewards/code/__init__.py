"""The reward that runs Python tests in the sandbox. `*_worker.py` runs in a worker process."""

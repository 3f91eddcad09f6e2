"""The proof on a real GPU (`benchmarks/gpu.py`): what holds, what it takes, and how fast it is."""

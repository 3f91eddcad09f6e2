"""The kit on a real card (`benchmarks/gpu.py`)."""

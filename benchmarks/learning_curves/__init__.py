"""Time to accuracy against TRL: the parts of `benchmarks/learning.py`."""

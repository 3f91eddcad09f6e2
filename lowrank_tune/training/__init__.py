"""The training loop and what surrounds it in a run: stage, checkpoints, signals, sinks, trackers."""

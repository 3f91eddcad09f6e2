"""Set-up of all tests: no network, reproducible fuzzing, and tests with a GPU only if there is one."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# The models of the tests are tiny. Two threads that wait for each other on a busy machine are ten times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A test module may import what another one defines, also from another folder.
sys.path.extend(str(folder) for folder in sorted(Path(__file__).parent.iterdir()) if folder.is_dir())

from hypothesis import HealthCheck, settings  # noqa: E402  (the environment above must be set first)

settings.register_profile("derandomized", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("derandomized")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` are skipped, not failed, on a machine without a GPU."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    # Only for tests with a GPU, because the import takes seconds.
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))

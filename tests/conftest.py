"""What holds for the whole suite: one thread a process, no network, GPU tests only where there is a GPU."""

from __future__ import annotations

import os
import pathlib

import hypothesis
import pytest

# Before torch is imported: with Ray there are several processes, and two OpenMP threads each on two cores make them
# five times slower. Ray hands these on to its workers.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# A slow moment of the machine is no fault of the code; pytest-timeout ends what really hangs.
hypothesis.settings.register_profile("suite", parent=hypothesis.settings.default, deadline=None)
hypothesis.settings.load_profile("suite")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # With two workers, a file each at a time: the long ones first, so that no worker is left alone with one at the end.
    longest = ("recipes/test_recipes.py", "recipes/test_dpo_extract.py", "recipes/", "actors/")
    tests = pathlib.Path(__file__).parent
    places = {item: item.path.relative_to(tests).as_posix() for item in items}
    items.sort(key=lambda item: next((i for i, start in enumerate(longest) if places[item].startswith(start)), 9))
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not on_gpu:
        return
    import torch

    if not torch.cuda.is_available():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="torch finds no CUDA device on this machine"))

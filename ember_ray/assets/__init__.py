"""Files that come with the package: the tiny models of the CPU demo, one a task."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

TINY_MODELS = {"extract": "qwen3-tiny-extract", "sql": "qwen3-tiny-sql"}


def tiny_model_path(task: Literal["extract", "sql"] = "extract") -> Path:
    """The folder of a task's shipped tiny Qwen3 (Hugging Face format, made by ``recipes/pretrain_tiny.py``)."""
    return Path(__file__).resolve().parent / TINY_MODELS[task]

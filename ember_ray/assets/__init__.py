"""Files that come with the package: the tiny model of the CPU demo."""

from __future__ import annotations

from pathlib import Path

TINY_MODEL = "qwen3-tiny-extract"


def tiny_model_path() -> Path:
    """The folder of the shipped tiny Qwen3 (Hugging Face format, made by ``recipes/pretrain_tiny.py``)."""
    return Path(__file__).resolve().parent / TINY_MODEL

"""Reads single tensors out of a safetensors checkpoint, sharded or not."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from ember_ray.model.qwen3_config import ModelError


class Checkpoint:
    """The tensors of a Hugging Face folder by name; a tensor's bytes are read when it is asked for.

    Raises:
        ModelError: no weights in the folder, or a tensor is missing or has another shape.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._open: dict[str, Any] = {}
        self.names_read: list[str] = []
        index = self.folder / "model.safetensors.index.json"
        if index.is_file():
            try:
                self._file_of: dict[str, str] = json.loads(index.read_text())["weight_map"]
            except (json.JSONDecodeError, KeyError) as fault:
                raise ModelError(f"'{index}' cannot be read: {fault}") from fault
        elif (self.folder / "model.safetensors").is_file():
            handle = self._handle("model.safetensors")
            self._file_of = dict.fromkeys(handle.keys(), "model.safetensors")
        else:
            raise ModelError(f"model folder '{self.folder}' has no model.safetensors and no index of shards")

    def _handle(self, name: str) -> Any:
        from safetensors import SafetensorError, safe_open

        if name not in self._open:
            path = self.folder / name
            try:
                self._open[name] = safe_open(path, framework="pt")
            except (OSError, SafetensorError) as fault:
                raise ModelError(f"weights '{path}' cannot be read: {fault}") from fault
        return self._open[name]

    def read(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
        """One tensor, converted to dtype on the device."""
        if name not in self._file_of:
            raise ModelError(f"model folder '{self.folder}': tensor '{name}' is missing")
        tensor = self._handle(self._file_of[name]).get_tensor(name)
        if tuple(tensor.shape) != shape:
            raise ModelError(
                f"model folder '{self.folder}': tensor '{name}' is {tuple(tensor.shape)}, config.json says {shape}"
            )
        self.names_read.append(name)
        return tensor.to(device=device, dtype=dtype)

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.clear()

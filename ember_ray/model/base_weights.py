"""The base weights of a stage where other processes of the host can map them: one copy for rollout and learning."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ember_ray.model.tensor_handles import TensorHandle, empty_shared, export_tensor, open_tensor

CACHE_LINE = 64
"""Bytes; where a tensor begins decides which code a CPU's matrix product takes, and so the last bits of its results."""

BaseHandles = dict[str, TensorHandle]
"""Name -> where the tensor is, of one stage; names as in ``StageModel.base``."""


def can_share() -> bool:
    """Whether this system has memory for a :class:`SharedRoom`."""
    return hasattr(os, "memfd_create")


def stacked(parts: Sequence[Tensor]) -> Tensor:
    """The parts, one below the other, in memory of this process alone."""
    return torch.cat(list(parts)) if len(parts) > 1 else parts[0]


class SharedRoom:
    """Memory of a CPU that can be exported, to be filled with the weights of a stage; pages are taken when written.

    Args:
        numel, num_tensors: elements of all tensors that will be placed, and how many these are at most.

    Raises:
        HandleError: the system has no such memory.
    """

    def __init__(self, numel: int, num_tensors: int, dtype: torch.dtype) -> None:
        self._line = CACHE_LINE // dtype.itemsize
        self._flat = empty_shared((numel + num_tensors * self._line,), dtype, "cpu")
        self._used = 0

    def place(self, parts: Sequence[Tensor]) -> Tensor:
        """The parts, one below the other, in this room."""
        shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
        count = torch.Size(shape).numel()
        place = self._flat[self._used : self._used + count].view(shape)
        self._used += -(-count // self._line) * self._line
        torch.cat(list(parts), out=place)
        return place


def export_base(base: Mapping[str, Tensor]) -> BaseHandles:
    """Handles of a stage's base weights, which must be complete (on a GPU: synchronized).

    Raises:
        HandleError: the memory is private.
    """
    return {name: export_tensor(tensor) for name, tensor in base.items()}


def open_base(stages: Sequence[BaseHandles]) -> dict[str, Tensor]:
    """The base weights of all stages in this process, each on the device where it lies. To be read, never written.

    Raises:
        HandleError: a stage has ended, is on another host, or on a GPU that this process does not see.
    """
    return {name: open_tensor(handle) for handles in stages for name, handle in handles.items()}

"""Many small host arrays in one copy to the device, without waiting for it.

A copy from ordinary host memory may wait for all that the device has still to do; from pinned memory it does not.
torch's allocator of pinned memory hands a buffer out again only when the copies from it are done.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

_ALIGNMENT = 16
"""Bytes; so that kernels can load vectors."""


def _offsets(sizes: Mapping[str, int]) -> tuple[dict[str, int], int]:
    offsets, total = {}, 0
    for name, size in sizes.items():
        offsets[name] = total
        total += -(-size // _ALIGNMENT) * _ALIGNMENT
    return offsets, max(total, _ALIGNMENT)


def host_tensor(shape: int | torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialized host memory for copies from or to a device: pinned where that is a GPU."""
    return torch.empty(shape, dtype=dtype, pin_memory=device.type == "cuda")


def upload(arrays: Mapping[str, np.ndarray], device: str | torch.device) -> dict[str, Tensor]:
    """New device tensors with the arrays' names, shapes and dtypes."""
    device = torch.device(device)
    offsets, total = _offsets({name: array.nbytes for name, array in arrays.items()})
    staging = host_tensor(total, torch.uint8, device)
    host = staging.numpy()
    for name, array in arrays.items():
        host[offsets[name] : offsets[name] + array.nbytes].view(array.dtype)[:] = array.reshape(-1)
    packed = staging.to(device, non_blocking=True)
    return {
        name: _view(packed, offsets[name], torch.from_numpy(array[:0]).dtype, array.shape)
        for name, array in arrays.items()
    }


def _view(packed: Tensor, offset: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    count = int(np.prod(shape))
    return packed[offset : offset + count * dtype.itemsize].view(dtype).view(shape)


class DeviceBuffers:
    """Named device tensors at fixed places, as a captured CUDA graph needs them, refilled by one copy.

    Args:
        capacities: the most that each can hold, as a shape and a dtype.
        device: where they are.

    Attributes:
        tensors: by name, each of its full capacity.
    """

    def __init__(self, capacities: Mapping[str, tuple[tuple[int, ...], torch.dtype]], device: str) -> None:
        self._device = torch.device(device)
        sizes = {name: int(np.prod(shape)) * dtype.itemsize for name, (shape, dtype) in capacities.items()}
        self._offsets, total = _offsets(sizes)
        self._packed = torch.zeros(total, dtype=torch.uint8, device=self._device)
        self.tensors = {
            name: _view(self._packed, self._offsets[name], dtype, shape) for name, (shape, dtype) in capacities.items()
        }

    def fill(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Puts arrays at the start of their tensors; what lies behind them or is not named becomes undefined."""
        staging = host_tensor(self._packed.numel(), torch.uint8, self._device)
        host = staging.numpy()
        for name, array in arrays.items():
            offset = self._offsets[name]
            host[offset : offset + array.nbytes].view(array.dtype)[:] = array.reshape(-1)
        self._packed.copy_(staging, non_blocking=True)

"""Adapter updates between processes that share no memory, and a stage's answer to any update.

They travel as numpy arrays: Ray hands those to many readers without a copy, torch tensors it pickles.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from ember_ray.model.lora import AdapterUpdate


@dataclass(frozen=True)
class PackedAdapter:
    """An `AdapterUpdate` on the way between processes.

    Attributes:
        arrays: tensor name to its values; bfloat16, which numpy does not know, as the same bits in int16.
        bfloat16: names of the tensors that are bfloat16.
    """

    version: int
    arrays: dict[str, np.ndarray]
    bfloat16: frozenset[str]
    scaling: dict[str, float]


@dataclass(frozen=True)
class Refusal:
    """Why a stage does not take an update.

    Attributes:
        lost: nothing is wrong with the update, but it is not to be had (any more) from who made it.
    """

    text: str
    lost: bool = False


def pack_adapter(update: AdapterUpdate) -> PackedAdapter:
    """Brings the tensors to the host; shapes, dtypes and bits stay as they are, faults included.

    Tensors that are there already share their memory with the result: hand it on (``ray.put``) before they change.
    """
    import torch

    arrays, halves = {}, set()
    for name, tensor in update.tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        if tensor.dtype == torch.bfloat16:
            halves.add(name)
            tensor = tensor.view(torch.int16)
        arrays[name] = tensor.numpy()
    return PackedAdapter(update.version, arrays, frozenset(halves), dict(update.scaling))


def unpack_adapter(packed: PackedAdapter) -> AdapterUpdate:
    """The update again, its tensors owned by the caller (Ray's shared memory is read-only)."""
    import torch

    from ember_ray.model.lora import AdapterUpdate

    tensors = {}
    for name, array in packed.arrays.items():
        tensor = torch.from_numpy(array.copy())
        tensors[name] = tensor.view(torch.bfloat16) if name in packed.bfloat16 else tensor
    return AdapterUpdate(packed.version, tensors, packed.scaling)

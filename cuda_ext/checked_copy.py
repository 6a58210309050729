"""Tensors copied into one flat tensor, and what was written looked at in the same pass."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from cuda_ext.library import launch

_BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
_MASKS = {torch.float32: 0xFFFFFFFF, torch.bfloat16: 0xFFFF, torch.float16: 0xFFFF}


def copy_table(pieces: Sequence[tuple[int, int, int]], device: torch.device | str) -> Tensor:
    """Pieces as :func:`checked_copy` takes them on a device.

    Args:
        pieces: (from, first, count): where a piece begins behind the base, in bytes (an address where there is no
            base), its first element in the flat tensor, and its number of elements.

    Returns:
        [pieces, 3] int64.
    """
    return torch.tensor(pieces, dtype=torch.int64).to(device, non_blocking=True)


def checked_copy(to: Tensor, base: Tensor | None, table: Tensor, dtype: torch.dtype) -> Tensor:
    """``to[first : first + count] = source`` for every piece, on the GPU in one launch.

    Elements of ``to`` that belong to no piece stay as they are.

    Args:
        to: [elements] float32, bfloat16 or float16, contiguous.
        base: a flat tensor of dtype that holds all sources; None where the table has addresses.
        table: from :func:`copy_table`, on the device of ``to``. On a CPU sources need a base.
        dtype: of the sources; values are cast.

    Returns:
        [pieces, 2] int64: how many values of a piece are not finite in the dtype of ``to``, and
        ``sum over i of bits[i] * (2 i + 1)`` modulo 2^64, with the bits that were written as unsigned integers and i
        counted from the beginning of the piece. A single changed value, and two that changed places, change that sum.

    Raises:
        ValueError: tensors that do not fit.
    """
    if table.dtype != torch.int64 or table.dim() != 2 or table.shape[1] != 3 or not table.is_contiguous():
        raise ValueError(f"checked_copy: a table is [pieces, 3] int64, not {tuple(table.shape)} {table.dtype}")
    if not to.is_contiguous() or (base is not None and (base.dtype != dtype or not base.is_contiguous())):
        raise ValueError(f"checked_copy: to and base must be contiguous, and base of {dtype}")
    if not to.is_cuda:
        if base is None:
            raise ValueError("checked_copy: on a CPU sources need a base")
        return checked_copy_reference(to, base, table)
    if table.device != to.device or (base is not None and base.device != to.device):
        raise ValueError(f"checked_copy: to is on {to.device}, so the table and base must be there too")
    seen = torch.zeros(len(table), 2, dtype=torch.int64, device=to.device)
    if len(table):
        launch("checked_copy", to, base, table, len(table), seen, dtype, to.dtype)
    return seen


def on_host(seen: Tensor) -> np.ndarray:
    """What a copy has seen, [pieces, 2] int64 on the host; waits for the current stream."""
    if not seen.is_cuda:
        return seen.numpy()
    host = torch.empty(seen.shape, dtype=seen.dtype, pin_memory=True)
    host.copy_(seen, non_blocking=True)
    torch.cuda.current_stream().synchronize()
    return host.numpy()


def checked_copy_reference(to: Tensor, base: Tensor, table: Tensor) -> Tensor:
    """:func:`checked_copy` from a base in plain torch, on any device."""
    seen = []
    for begin, first, count in table.tolist():
        begin //= base.element_size()
        piece = to[first : first + count]
        piece.copy_(base[begin : begin + count])
        seen.append((int((~piece.isfinite()).sum()), checksum(piece)))
    return torch.tensor(seen, dtype=torch.int64, device=to.device).view(-1, 2)


def checksum(piece: Tensor) -> int:
    """The checksum of one piece, see :func:`checked_copy`; as a signed 64-bit number."""
    flat = piece.contiguous().flatten()
    bits = flat.view(_BITS[flat.dtype]).long() & _MASKS[flat.dtype]
    places = torch.arange(len(bits), dtype=torch.int64, device=bits.device)
    return int((bits * (2 * places + 1)).sum())

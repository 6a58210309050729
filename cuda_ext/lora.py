"""A linear layer with LoRA beside it: the base weight is only ever read."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from cuda_ext.library import launch
from cuda_ext.lora_shrink import lora_shrink

FIRST_ROWS = 1024
"""Rows of x from which an adapter's share of y is computed before the product with the weight."""

MAX_PARTS = 3
MAX_RANK = 256
"""What the kernels take (``csrc/low_rank.cuh``); beyond it the torch reference computes, on any device."""


@dataclass(frozen=True)
class LoraPart:
    """The B side of one projection inside a fused linear layer.

    Attributes:
        first_row, last_row: the projection's rows in the fused output.
        first_rank, last_rank: its rows in the fused A.
        b: [out, r].
        scale: s.
    """

    first_row: int
    last_row: int
    first_rank: int
    last_rank: int
    b: Tensor
    scale: float


class PartStruct(ctypes.Structure):
    """``ember::LoraPart`` of ``csrc/low_rank.cuh``."""

    _fields_ = [
        ("b", ctypes.c_void_p),
        ("first_row", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("first_rank", ctypes.c_int64),
        ("rank", ctypes.c_int64),
        ("scale", ctypes.c_double),
    ]


@dataclass(frozen=True)
class FusedLora:
    """The adapter of one fused linear layer: all A stacked to [sum of r, in], one part a projection.

    The parts stand in the order of their rows and do not overlap.
    """

    a: Tensor
    parts: tuple[LoraPart, ...]

    @cached_property
    def fits_kernels(self) -> bool:
        """Whether there are no more parts and ranks than the kernels take."""
        return len(self.parts) <= MAX_PARTS and all(part.b.shape[1] <= MAX_RANK for part in self.parts)

    def covers(self, rows: int) -> bool:
        """Whether every one of so many rows of the fused output belongs to a part."""
        ends = [0, *(part.last_row for part in self.parts)]
        return ends[-1] == rows and all(part.first_row == end for part, end in zip(self.parts, ends, strict=False))

    @cached_property
    def part_structs(self) -> ctypes.Array[PartStruct]:
        """The parts as the kernels take them; the tensors may change their values, but not their place.

        Raises:
            ValueError: a B that does not fit its rows and ranks, is not whole, or is of another dtype than A.
        """
        structs = []
        for part in self.parts:
            rows, rank = part.last_row - part.first_row, part.last_rank - part.first_rank
            if part.b.shape != (rows, rank) or part.b.dtype != self.a.dtype or not part.b.is_contiguous():
                raise ValueError(
                    f"lora: B of rows {part.first_row} to {part.last_row} and ranks {part.first_rank} to "
                    f"{part.last_rank} must be [{rows}, {rank}] in {self.a.dtype}, not {tuple(part.b.shape)} in "
                    f"{part.b.dtype}"
                )
            structs.append(PartStruct(part.b.data_ptr(), part.first_row, rows, part.first_rank, rank, part.scale))
        return (PartStruct * len(structs))(*structs)


def lora_linear(x: Tensor, weight: Tensor, bias: Tensor | None, lora: FusedLora | None) -> Tensor:
    """``x W^T + bias + s (x A^T) B^T`` (Hu et al. 2021, section 4.1), B per projection of a fused weight.

    Args:
        x: [tokens, in].
        weight: [out, in].
        bias: [out] or None.

    Returns:
        [tokens, out].
    """
    if lora is not None and bias is None and _adapter_first(x, lora) and lora.covers(weight.shape[0]):
        y = x.new_empty(x.shape[0], weight.shape[0])
        lora_expand(y, lora_shrink(x, lora.a), lora, add=False)
        return y.addmm_(x, weight.t())
    y = torch.nn.functional.linear(x, weight, bias)
    if lora is not None:
        lora_expand(y, lora_shrink(x, lora.a), lora)
    return y


def _adapter_first(x: Tensor, lora: FusedLora) -> bool:
    """Whether the product with the weight had better add to the adapter's share: that hides a pass over y behind it."""
    return x.is_cuda and x.shape[0] >= FIRST_ROWS and lora.fits_kernels


def lora_expand(y: Tensor, down: Tensor, lora: FusedLora, *, add: bool = True) -> None:
    """``y[:, rows of a part] += s * down[:, ranks of the part] @ B^T``, in place, for all parts.

    On the GPU all parts are one kernel, which sums over the ranks in float32 and rounds once.

    Args:
        y: [tokens, out]; rows may lie apart.
        down: ``x A^T``, [tokens, sum of r] in y's dtype; rows may lie apart.
        add: False overwrites what is in those columns of y instead of adding to it.
    """
    if not (y.is_cuda and lora.fits_kernels):
        return lora_expand_reference(y, down, lora, add=add)
    tokens, width = y.shape
    ranks = lora.a.shape[0]
    if down.shape != (tokens, ranks) or down.dtype != y.dtype or lora.a.dtype != y.dtype:
        raise ValueError(
            f"lora_expand: y {tuple(y.shape)} {y.dtype} needs down [{tokens}, {ranks}] and A of its dtype, not down "
            f"{tuple(down.shape)} {down.dtype} and A {lora.a.dtype}"
        )
    if y.stride(1) != 1 or down.stride(1) != 1 or (lora.parts and lora.parts[-1].last_row > width):
        raise ValueError(f"lora_expand: y {tuple(y.shape)} and down must have whole rows, and y all rows of the parts")
    if tokens and lora.parts:
        launch(
            "lora_expand",
            *(y, y.stride(0), tokens, down, down.stride(0)),
            *(lora.part_structs, len(lora.parts), int(add), y.dtype),
        )


def lora_expand_reference(y: Tensor, down: Tensor, lora: FusedLora, *, add: bool = True) -> None:
    """:func:`lora_expand` in plain torch, on any device."""
    for part in lora.parts:
        y[:, part.first_row : part.last_row].addmm_(
            down[:, part.first_rank : part.last_rank], part.b.t(), beta=int(add), alpha=part.scale
        )

"""A linear layer with LoRA beside it: the base weight is only ever read."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


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


@dataclass(frozen=True)
class FusedLora:
    """The adapter of one fused linear layer: all A stacked to [sum of r, in], one part a projection."""

    a: Tensor
    parts: tuple[LoraPart, ...]


def lora_linear(x: Tensor, weight: Tensor, bias: Tensor | None, lora: FusedLora | None) -> Tensor:
    """``x W^T + bias + s (x A^T) B^T`` (Hu et al. 2021, section 4.1), B per projection of a fused weight.

    Args:
        x: [tokens, in].
        weight: [out, in].
        bias: [out] or None.

    Returns:
        [tokens, out].
    """
    y = torch.nn.functional.linear(x, weight, bias)
    if lora is not None:
        down = torch.nn.functional.linear(x, lora.a)
        for part in lora.parts:
            y[:, part.first_row : part.last_row].addmm_(
                down[:, part.first_rank : part.last_rank], part.b.t(), alpha=part.scale
            )
    return y

"""RMSNorm (Zhang and Sennrich 2019, section 4), alone and after a residual addition."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalizes the last dimension; the mean square is taken in float32, as Qwen3 does.

    Args:
        x: [..., dim], any float dtype.
        weight: [dim].
        eps: added to the mean square.

    Returns:
        [..., dim] in x's dtype.
    """
    if x.dtype == torch.float32:
        return torch.rms_norm(x, weight.shape, weight, eps)
    x32 = x.float()
    normed = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Adds x to the residual stream and normalizes the sum.

    Args:
        x, residual: [tokens, dim].

    Returns:
        The normalized sum and the sum itself, both [tokens, dim].
    """
    summed = residual + x
    return rms_norm(summed, weight, eps), summed

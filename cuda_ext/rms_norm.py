"""RMSNorm (Zhang and Sennrich 2019, section 4), alone and after a residual addition."""

from __future__ import annotations

import torch
from torch import Tensor

from cuda_ext.library import launch


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalizes the last dimension; the mean square is taken in float32, as Qwen3 does.

    Args:
        x: [..., dim], any float dtype.
        weight: [dim] in x's dtype.
        eps: added to the mean square.

    Returns:
        [..., dim] in x's dtype, rounded to it after the norm and after the weight.
    """
    if not x.is_cuda:
        return rms_norm_reference(x, weight, eps)
    normed = torch.empty_like(x, memory_format=torch.contiguous_format)
    _launch(x.flatten(0, -2) if x.dim() > 2 else x.view(1, -1) if x.dim() == 1 else x, None, weight, eps, normed, None)
    return normed


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """:func:`rms_norm` in plain torch, on any device."""
    if x.dtype == torch.float32:
        return torch.rms_norm(x, weight.shape, weight, eps)
    x32 = x.float()
    normed = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Adds x to the residual stream and normalizes the sum.

    Args:
        x, residual: [tokens, dim] of one dtype; rows may lie apart.

    Returns:
        The normalized sum and the sum itself, both [tokens, dim], the sum rounded to the dtype before the norm.
    """
    if not x.is_cuda:
        return add_rms_norm_reference(x, residual, weight, eps)
    normed = torch.empty_like(x, memory_format=torch.contiguous_format)
    summed = torch.empty_like(normed)
    _launch(x, residual, weight, eps, normed, summed)
    return normed, summed


def add_rms_norm_reference(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """:func:`add_rms_norm` in plain torch, on any device."""
    summed = residual + x
    return rms_norm_reference(summed, weight, eps), summed


def _launch(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, normed: Tensor, summed: Tensor | None
) -> None:
    rows, dim = x.shape
    if weight.shape != (dim,) or weight.dtype != x.dtype or not weight.is_contiguous() or x.stride(1) != 1:
        raise ValueError(
            f"rms_norm: x {tuple(x.shape)} {x.dtype} with whole rows needs a weight [{dim}] of its dtype, "
            f"not {tuple(weight.shape)} {weight.dtype}"
        )
    stride = 0
    if residual is not None:
        if residual.shape != x.shape or residual.dtype != x.dtype or residual.stride(1) != 1:
            raise ValueError(
                f"add_rms_norm: x {tuple(x.shape)} {x.dtype} and residual {tuple(residual.shape)} {residual.dtype} "
                "must be alike, with whole rows"
            )
        stride = residual.stride(0)
    if normed.numel():
        launch("rms_norm", x, x.stride(0), residual, stride, weight, normed, summed, rows, dim, float(eps), x.dtype)

"""Linear layers for few rows of x: a decode step at small batches is one stream of the weights.

The kernel (``csrc/skinny_linear.cuh``) reads each weight once for up to :data:`MAX_ROWS` rows, with the norm before it
and SwiGLU after it in the same launch. A row's result does not depend on the other rows, to the bit.

Weights are read ahead of the stream's order: a kernel fetches its first weights while its predecessors still run. So
weights must not be written by a kernel of this library that stands in the same stream right before a call of these
functions: put a launch by torch, an event or a graph's boundary between.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cuda_ext.library import launch
from cuda_ext.rms_norm import rms_norm_reference
from cuda_ext.swiglu import swiglu_reference

MAX_ROWS = 16
"""Rows of x that one launch takes."""


def can_skinny(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernel takes x [rows, in] and weight [out, in]."""
    return (
        x.is_cuda
        and x.dtype in (torch.bfloat16, torch.float16)
        and x.dim() == 2
        and 1 <= x.shape[0] <= MAX_ROWS
        and x.is_contiguous()
        and x.data_ptr() % 16 == 0
        and _weight_fits(x, weight)
    )


def _weight_fits(x: Tensor, weight: Tensor) -> bool:
    return (
        weight.device == x.device
        and weight.dtype == x.dtype
        and weight.dim() == 2
        and weight.shape[0] > 0
        and weight.shape[1] == x.shape[1]
        and weight.shape[1] % 8 == 0
        and weight.shape[1] > 0
        and weight.is_contiguous()
        and weight.data_ptr() % 16 == 0
    )


def skinny_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``, summed in float32 and rounded once.

    Args:
        x: [rows, in] with up to :data:`MAX_ROWS` rows; on a GPU bfloat16 or float16 and ``in`` a multiple of 8.
        weight: [out, in] in x's dtype.
        bias: [out] in x's dtype.

    Returns:
        [rows, out].

    Raises:
        ValueError: x and weight on a GPU that :func:`can_skinny` refuses.
    """
    if not x.is_cuda:
        return skinny_linear_reference(x, weight, bias)
    return _launch(x, None, None, 0.0, weight, bias, False)[0]


def skinny_linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """:func:`skinny_linear` in plain torch, on any device."""
    return torch.nn.functional.linear(x, weight, bias)


def norm_linear(
    x: Tensor, residual: Tensor | None, norm_weight: Tensor, eps: float, weight: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Adds x to the residual stream, normalizes the sum and multiplies it by a weight.

    Roundings are those of :func:`cuda_ext.rms_norm.add_rms_norm` followed by a linear layer.

    Args:
        x, residual: [rows, in]; no residual means that x is the sum.
        norm_weight: [in] in x's dtype.
        eps: added to the mean square.
        weight, bias: as in :func:`skinny_linear`.

    Returns:
        [rows, out], and the sum [rows, in] (x itself where there is no residual).

    Raises:
        ValueError: as :func:`skinny_linear`.
    """
    if not x.is_cuda:
        return norm_linear_reference(x, residual, norm_weight, eps, weight, bias)
    return _launch(x, residual, norm_weight, eps, weight, bias, False)


def norm_linear_reference(
    x: Tensor, residual: Tensor | None, norm_weight: Tensor, eps: float, weight: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """:func:`norm_linear` in plain torch, on any device."""
    summed = x if residual is None else x + residual
    return torch.nn.functional.linear(rms_norm_reference(summed, norm_weight, eps), weight, bias), summed


def norm_linear_swiglu(
    x: Tensor, residual: Tensor | None, norm_weight: Tensor, eps: float, gate_up_weight: Tensor
) -> tuple[Tensor, Tensor]:
    """:func:`norm_linear` and then ``silu(gate) * up``, gate and up rounded to x's dtype before.

    Args:
        x, residual, norm_weight, eps: as in :func:`norm_linear`.
        gate_up_weight: [2 * ffn, in], the gate's rows first.

    Returns:
        [rows, ffn], and the sum [rows, in] (x itself where there is no residual).

    Raises:
        ValueError: as :func:`skinny_linear`.
    """
    if not x.is_cuda:
        return norm_linear_swiglu_reference(x, residual, norm_weight, eps, gate_up_weight)
    return _launch(x, residual, norm_weight, eps, gate_up_weight, None, True)


def norm_linear_swiglu_reference(
    x: Tensor, residual: Tensor | None, norm_weight: Tensor, eps: float, gate_up_weight: Tensor
) -> tuple[Tensor, Tensor]:
    """:func:`norm_linear_swiglu` in plain torch, on any device."""
    gate_up, summed = norm_linear_reference(x, residual, norm_weight, eps, gate_up_weight)
    return swiglu_reference(gate_up), summed


def _launch(
    x: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    gated: bool,
) -> tuple[Tensor, Tensor]:
    if not can_skinny(x, weight):
        raise ValueError(
            f"skinny_linear: x {tuple(x.shape)} {x.dtype} and weight {tuple(weight.shape)} {weight.dtype} must be "
            f"whole bfloat16 or float16 matrices on one GPU, 16-byte aligned, of one width that is a multiple of 8, "
            f"with at most {MAX_ROWS} rows of x; ask can_skinny first and use torch's linear for others"
        )
    rows, width = x.shape
    out = weight.shape[0]
    if gated:
        if out % 2:
            raise ValueError(f"norm_linear_swiglu: a gate_up_weight of {out} rows cannot be halved into gate and up")
        out //= 2
    for name, vector, size in (("norm_weight", norm_weight, width), ("bias", bias, out)):
        if vector is not None and (vector.shape != (size,) or vector.dtype != x.dtype or not vector.is_contiguous()):
            raise ValueError(
                f"skinny_linear: {name} must be [{size}] in {x.dtype}, not {tuple(vector.shape)} in {vector.dtype}"
            )
    if norm_weight is not None and norm_weight.data_ptr() % 16:
        raise ValueError("skinny_linear: norm_weight must be aligned to 16 bytes; clone it")
    summed = x
    if residual is not None:
        if residual.shape != x.shape or residual.dtype != x.dtype or not residual.is_contiguous():
            raise ValueError(
                f"norm_linear: residual must be like x {tuple(x.shape)} {x.dtype}, "
                f"not {tuple(residual.shape)} {residual.dtype}"
            )
        if residual.data_ptr() % 16:
            raise ValueError("norm_linear: residual must be aligned to 16 bytes; clone it")
        summed = torch.empty_like(x)
    y = x.new_empty(rows, out)
    launch(
        "skinny_linear",
        x,
        residual,
        norm_weight,
        weight,
        bias,
        y,
        None if residual is None else summed,
        x.dtype,
        rows,
        width,
        out,
        int(gated),
        float(eps),
    )
    return y, summed

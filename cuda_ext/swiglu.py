"""SwiGLU's gate (Shazeer 2020, section 2)."""

from __future__ import annotations

import torch
from torch import Tensor

from cuda_ext.library import launch


def swiglu(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up`` of a fused projection.

    Args:
        gate_up: [tokens, 2 * ffn], gate first, any float dtype; rows may lie apart.

    Returns:
        [tokens, ffn].
    """
    if not gate_up.is_cuda:
        return swiglu_reference(gate_up)
    tokens, width = gate_up.shape
    if gate_up.stride(1) != 1 or width % 2:
        raise ValueError(f"swiglu: gate_up {tuple(gate_up.shape)} must have whole rows of an even number of values")
    out = gate_up.new_empty(tokens, width // 2)
    if out.numel():
        launch("swiglu", gate_up, gate_up.stride(0), out, tokens, width // 2, gate_up.dtype)
    return out


def swiglu_reference(gate_up: Tensor) -> Tensor:
    """:func:`swiglu` in plain torch, on any device."""
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up

"""SwiGLU's gate (Shazeer 2020, section 2)."""

from __future__ import annotations

import torch
from torch import Tensor


def swiglu(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up`` of a fused projection.

    Args:
        gate_up: [tokens, 2 * ffn], gate first.

    Returns:
        [tokens, ffn].
    """
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up

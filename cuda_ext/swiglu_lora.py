"""SwiGLU's gate of a fused projection with LoRA beside it, in one read of the projection."""

from __future__ import annotations

import torch
from torch import Tensor

from cuda_ext.library import launch
from cuda_ext.lora import FusedLora, lora_expand, lora_expand_reference
from cuda_ext.swiglu import swiglu, swiglu_reference

MAX_RANK = 64
"""The highest rank of a projection that the kernel takes; beyond it two kernels compute."""


def swiglu_lora(gate_up: Tensor, down: Tensor, lora: FusedLora) -> Tensor:
    """``silu(gate + s_g down_g B_g^T) * (up + s_u down_u B_u^T)``, each sum rounded before it is used.

    It is ``lora_expand`` and ``swiglu``, equal to the bit. What stands in gate_up afterwards is not said.

    Args:
        gate_up: [tokens, 2 * ffn], the base weight's product, gate first, any float dtype; rows may lie apart.
        down: ``x A^T``, [tokens, sum of r] in gate_up's dtype; rows may lie apart.
        lora: the parts of gate, up or both.

    Returns:
        [tokens, ffn].

    Raises:
        ValueError: shapes, dtypes or strides that do not fit each other.
    """
    if not gate_up.is_cuda:
        return swiglu_lora_reference(gate_up, down, lora)
    tokens, width = gate_up.shape
    if width % 2 or not _kernel_takes(gate_up, lora):
        lora_expand(gate_up, down, lora)
        return swiglu(gate_up)
    ranks, ffn = lora.a.shape[0], width // 2
    if down.shape != (tokens, ranks) or down.dtype != gate_up.dtype or lora.a.dtype != gate_up.dtype:
        raise ValueError(
            f"swiglu_lora: gate_up {tuple(gate_up.shape)} {gate_up.dtype} needs down [{tokens}, {ranks}] and A of its "
            f"dtype, not down {tuple(down.shape)} {down.dtype} and A {lora.a.dtype}"
        )
    if gate_up.stride(1) != 1 or down.stride(1) != 1:
        raise ValueError(
            f"swiglu_lora: gate_up {tuple(gate_up.shape)} and down {tuple(down.shape)} must have whole rows"
        )
    out = gate_up.new_empty(tokens, ffn)
    if out.numel():
        launch(
            "swiglu_lora",
            *(gate_up, gate_up.stride(0), down, down.stride(0), out, tokens, ffn),
            *(lora.part_structs, len(lora.parts), gate_up.dtype),
        )
    return out


def _kernel_takes(gate_up: Tensor, lora: FusedLora) -> bool:
    """Whether rows are whole 16-byte pieces and every part is all of gate or all of up, of no high rank."""
    ffn = gate_up.shape[1] // 2
    return (
        gate_up.dtype in (torch.bfloat16, torch.float16)
        and ffn % 8 == 0
        and gate_up.stride(0) % 8 == 0
        and gate_up.data_ptr() % 16 == 0
        and all(
            part.first_row in (0, ffn) and part.last_row == part.first_row + ffn and part.b.shape[1] <= MAX_RANK
            for part in lora.parts
        )
    )


def swiglu_lora_reference(gate_up: Tensor, down: Tensor, lora: FusedLora) -> Tensor:
    """:func:`swiglu_lora` in plain torch, on any device."""
    lora_expand_reference(gate_up, down, lora)
    return swiglu_reference(gate_up)

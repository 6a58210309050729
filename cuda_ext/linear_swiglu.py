"""The gated half of a feed-forward layer (Shazeer 2020, section 2) in one launch: gate and up stay on the chip.

At 16384 tokens of Qwen3-4B gate and up are 0.64 GB that a product would write and :func:`cuda_ext.swiglu.swiglu` would
read again. For few rows see :mod:`cuda_ext.skinny_linear`.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from cuda_ext import library
from cuda_ext.lora import FusedLora
from cuda_ext.swiglu import swiglu
from cuda_ext.swiglu_lora import swiglu_lora

TILES = (128, 160, 192)
"""Tokens that a block of the kernel can take at a time."""

TILE_COST = 12
"""What a tile costs beside its tokens, in tokens; fitted to times on an H200."""

LEAST_SHARE = 0.8
"""Where blocks would spend less of their time on tokens, torch's product and a gate are as fast."""

COLUMNS, DEPTH = 128, 64
"""Columns of the output that a block takes, twice which divide ``ffn``; a stage of its ring, which divides ``in``."""


class Tiling(NamedTuple):
    """How the kernel cuts its work.

    Attributes:
        tile: tokens that a block takes at a time, one of TILES.
        along_tokens: whether the two blocks of a cluster are neighbours along the tokens, and share the weights that
            they load, or along the output's columns, and share the tokens.
        share: of the blocks' time that is spent on tokens, and not on padding, on a tile's own costs or on nothing.
    """

    tile: int
    along_tokens: bool
    share: float


def linear_swiglu(x: Tensor, gate_up_weight: Tensor) -> Tensor:
    """``silu(x @ gate.T) * (x @ up.T)``.

    On Hopper it is one kernel (``csrc/linear_swiglu.cu``) where :func:`fits` says so, which rounds once, at the end;
    elsewhere a product of torch's and then swiglu, which round gate, up and silu(gate) to the dtype too.

    Args:
        x: [tokens, in].
        gate_up_weight: [2 * ffn, in] in x's dtype, the gate's rows first.

    Returns:
        [tokens, ffn].
    """
    if not fits(x, gate_up_weight):
        return linear_swiglu_reference(x, gate_up_weight)
    (tokens, width), ffn = x.shape, gate_up_weight.shape[0] // 2
    out = x.new_empty(tokens, ffn)
    tiling = best_tiling(tokens, ffn, _multiprocessors(x.device.index))
    along = int(tiling.along_tokens)
    shapes = (tokens, ffn, width)
    library.launch("linear_swiglu", x, gate_up_weight, out, *shapes, None, 0, None, 0, tiling.tile, along, x.dtype)
    return out


def linear_swiglu_lora(x: Tensor, gate_up_weight: Tensor, lora: FusedLora) -> Tensor:
    """:func:`linear_swiglu` with an adapter beside gate, up or both.

    The kernel takes it as more of the inner dimension, ``[x | s x A^T] [W | B]^T``; ``s x A^T`` and the result are
    rounded.

    Args:
        x: [tokens, in].
        gate_up_weight: [2 * ffn, in] in x's dtype, the gate's rows first.
        lora: the parts of gate, up or both.

    Returns:
        [tokens, ffn].
    """
    if not (fits(x, gate_up_weight) and _takes(lora, gate_up_weight.shape[0] // 2)):
        linear = torch.nn.functional.linear
        return swiglu_lora(linear(x, gate_up_weight), linear(x, lora.a), lora)
    (tokens, width), ffn, ranks = x.shape, gate_up_weight.shape[0] // 2, lora.a.shape[0]
    down, out = x.new_empty(tokens, ranks), x.new_empty(tokens, ffn)
    down.addmm_(x, lora.a.t(), beta=0, alpha=lora.parts[0].scale)
    tiling = best_tiling(tokens, ffn, _multiprocessors(x.device.index))
    library.launch(
        "linear_swiglu",
        *(x, gate_up_weight, out, tokens, ffn, width, down, ranks, lora.part_structs, len(lora.parts)),
        *(tiling.tile, int(tiling.along_tokens), x.dtype),
    )
    return out


def _takes(lora: FusedLora, ffn: int) -> bool:
    """Whether the kernel takes an adapter: whole halves, one scale, ranks that the copy engine can step by."""
    return (
        len({part.scale for part in lora.parts}) == 1
        and lora.a.shape[0] % 8 == 0
        and all(
            part.first_row in (0, ffn)
            and part.last_row == part.first_row + ffn
            and part.b.shape[1] % 8 == 0
            and part.b.data_ptr() % 16 == 0
            for part in lora.parts
        )
    )


def linear_swiglu_reference(x: Tensor, gate_up_weight: Tensor) -> Tensor:
    """:func:`linear_swiglu` as a product and a gate, on any device."""
    return swiglu(torch.nn.functional.linear(x, gate_up_weight))


def fits(x: Tensor, gate_up_weight: Tensor) -> bool:
    """Whether the kernel takes these, and is the faster way."""
    return (
        x.is_cuda
        and x.dim() == 2
        and x.shape[0] > 0
        and x.dtype in (torch.bfloat16, torch.float16)
        and gate_up_weight.dtype == x.dtype
        and gate_up_weight.shape[0] % (4 * COLUMNS) == 0
        and gate_up_weight.shape[1] == x.shape[1]
        and x.shape[1] % DEPTH == 0
        and all(tensor.is_contiguous() and tensor.data_ptr() % 16 == 0 for tensor in (x, gate_up_weight))
        and _runs_on(x.device.index)
        and best_tiling(x.shape[0], gate_up_weight.shape[0] // 2, _multiprocessors(x.device.index)).share >= LEAST_SHARE
    )


@cache
def best_tiling(tokens: int, ffn: int, multiprocessors: int) -> Tiling:
    """The one with which the blocks end soonest; of equals sharing weights is faster, then larger tiles are."""
    clusters, columns = multiprocessors // 2, ffn // COLUMNS

    def tiling(tile: int, along_tokens: bool) -> Tiling:
        tiles = -(-tokens // tile)
        pairs = -(-tiles // 2) * columns if along_tokens else tiles * (columns // 2)
        busy = -(-pairs // clusters) * (tile + TILE_COST) * clusters * 2
        return Tiling(tile, along_tokens, tokens * columns / busy)

    return max((tiling(tile, along) for tile in TILES for along in (False, True)), key=lambda t: (t.share, t[1], t[0]))


@cache
def _multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def _runs_on(device: int) -> bool:
    return torch.cuda.get_device_capability(device) == (9, 0) and hasattr(library.load(), "ember_linear_swiglu")

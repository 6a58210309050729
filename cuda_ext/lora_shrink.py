"""The A side of adapters for batches of decode steps: a product with few outputs, cut along its inner dimension."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from cuda_ext.library import launch

MAX_TOKENS, MAX_RANKS = 1024, 48
"""Rows of x and of A beyond which the stock product is as fast (measured on an H200)."""


def lora_shrink(x: Tensor, a: Tensor) -> Tensor:
    """``x A^T``, summed in float32 and rounded once.

    On a GPU of compute capability 9.0 and more a batch of up to :data:`MAX_TOKENS` rows and an A of up to
    :data:`MAX_RANKS` are a kernel of our own, in which a row's result does not depend on the other rows.

    Args:
        x: [tokens, in].
        a: [ranks, in] in x's dtype.

    Returns:
        [tokens, ranks].
    """
    if not _kernel_takes(x, a):
        return torch.nn.functional.linear(x, a)
    down = x.new_empty(x.shape[0], a.shape[0])
    launch("lora_shrink", x, x.stride(0), x.shape[0], x.shape[1], a, a.shape[0], down, x.dtype)
    return down


def _kernel_takes(x: Tensor, a: Tensor) -> bool:
    return (
        x.is_cuda
        and x.dtype in (torch.bfloat16, torch.float16)
        and a.dtype == x.dtype
        and x.dim() == 2
        and 1 <= x.shape[0] <= MAX_TOKENS
        and 1 <= a.shape[0] <= MAX_RANKS
        and x.shape[1] == a.shape[1]
        and x.shape[1] % 32 == 0
        and x.stride(1) == 1
        and x.stride(0) % 8 == 0
        and a.is_contiguous()
        and x.data_ptr() % 16 == 0
        and a.data_ptr() % 16 == 0
        and _has_clusters(x.get_device())
    )


@cache
def _has_clusters(device: int) -> bool:
    return torch.cuda.get_device_capability(device) >= (9, 0)

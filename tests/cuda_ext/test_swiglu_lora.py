from __future__ import annotations

import pytest
import torch

from cuda_ext.lora import FusedLora, LoraPart, lora_linear
from cuda_ext.swiglu import swiglu
from cuda_ext.swiglu_lora import swiglu_lora

FFN, HIDDEN = 6, 10


def make_lora(gate_rank: int, up_rank: int, dtype: torch.dtype) -> FusedLora:
    """Rank 0: no part."""
    parts, rank = [], 0
    for first, width, scale in ((0, gate_rank, 0.5), (FFN, up_rank, -2.0)):
        if width:
            b = torch.randn(FFN, width).to(dtype)
            parts.append(LoraPart(first, first + FFN, rank, rank + width, b, scale))
            rank += width
    return FusedLora(torch.randn(rank, HIDDEN).to(dtype), tuple(parts))


@pytest.mark.parametrize("ranks", [(2, 3), (4, 0), (0, 1)])
def test_it_is_the_gate_of_both_halves_with_their_adapters(ranks: tuple[int, int]) -> None:
    x, weight = torch.randn(4, HIDDEN, dtype=torch.float64), torch.randn(2 * FFN, HIDDEN, dtype=torch.float64)
    lora = make_lora(*ranks, torch.float64)
    merged = weight.clone()
    for part in lora.parts:
        merged[part.first_row : part.last_row] += part.scale * part.b @ lora.a[part.first_rank : part.last_rank]
    gate, up = (x @ merged.T).chunk(2, dim=-1)
    torch.testing.assert_close(swiglu_lora(x @ weight.T, x @ lora.a.T, lora), gate * torch.sigmoid(gate) * up)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_rounds_where_its_two_steps_do(dtype: torch.dtype) -> None:
    x, weight = torch.randn(5, HIDDEN).to(dtype), torch.randn(2 * FFN, HIDDEN).to(dtype)
    lora = make_lora(2, 3, dtype)
    base, down = (torch.nn.functional.linear(x, w) for w in (weight, lora.a))
    assert torch.equal(swiglu_lora(base, down, lora), swiglu(lora_linear(x, weight, None, lora)))

"""SwiGLU with LoRA beside its projection on the GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cuda_ext.lora import FusedLora, LoraPart, lora_expand
from cuda_ext.swiglu import swiglu
from cuda_ext.swiglu_lora import swiglu_lora, swiglu_lora_reference

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LIMITS = {torch.float32: 3e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
RANKS = [(16, 16), (64, 64), (8, 0), (0, 16), (4, 33), (1, 7), (48, 16), (100, 16), (0, 256)]
"""Of gate and up; 0: no part."""


def make_lora(ffn: int, ranks: tuple[int, int], dtype: torch.dtype) -> FusedLora:
    parts, rank = [], 0
    for first, width, scale in ((0, ranks[0], 0.5), (ffn, ranks[1], -2.0)):
        if width:
            b = (torch.randn(ffn, width, device="cuda") / width**0.5).to(dtype)
            parts.append(LoraPart(first, first + ffn, rank, rank + width, b, scale))
            rank += width
    return FusedLora(torch.randn(rank, 64, device="cuda").to(dtype), tuple(parts))


def make_rows(tokens: int, width: int, gap: int, dtype: torch.dtype) -> Tensor:
    """Random rows with NaN between them."""
    rows = torch.full((tokens, width + gap), torch.nan, dtype=dtype, device="cuda")[:, :width]
    return rows.copy_(torch.randn(tokens, width, device="cuda"))


def poison(tokens: int, ffn: int, dtype: torch.dtype) -> None:
    """What the allocator hands out next is NaN."""
    torch.full((tokens, ffn), torch.nan, dtype=dtype, device="cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("ffn", [9728, 136, 8, 45])
@pytest.mark.parametrize("tokens", [1, 8, 17, 100, 1030])
def test_it_is_expansion_and_gate_to_the_bit(dtype: torch.dtype, ranks: tuple[int, int], ffn: int, tokens: int) -> None:
    torch.manual_seed(tokens + ffn)
    lora = make_lora(ffn, ranks, dtype)
    gate_up, down = make_rows(tokens, 2 * ffn, 24, dtype), make_rows(tokens, sum(ranks), 8, dtype)
    apart = gate_up.clone()
    lora_expand(apart, down, lora)
    wanted = swiglu(apart)
    again = gate_up.clone()
    exact = swiglu_lora_reference(gate_up.double(), down.double(), as_float64(lora))
    poison(tokens, ffn, dtype)
    found = swiglu_lora(gate_up, down, lora)
    assert found.shape == (tokens, ffn) and found.is_contiguous()
    assert torch.equal(found, wanted), f"{int((found != wanted).sum())} of {found.numel()} differ"
    torch.testing.assert_close(found.double(), exact, rtol=LIMITS[dtype], atol=2 * LIMITS[dtype])
    assert torch.equal(swiglu_lora(again, down, lora), found)


def as_float64(lora: FusedLora) -> FusedLora:
    parts = (LoraPart(p.first_row, p.last_row, p.first_rank, p.last_rank, p.b.double(), p.scale) for p in lora.parts)
    return FusedLora(lora.a.double(), tuple(parts))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_part_of_some_rows_and_no_part_at_all_are_possible(dtype: torch.dtype) -> None:
    gate_up, ffn = make_rows(33, 256, 0, dtype), 128
    none = FusedLora(torch.empty(0, 64, dtype=dtype, device="cuda"), ())
    down = torch.empty(33, 0, dtype=dtype, device="cuda")
    assert torch.equal(swiglu_lora(gate_up.clone(), down, none), swiglu(gate_up))
    b = torch.randn(24, 4, device="cuda").to(dtype)
    some = FusedLora(torch.randn(4, 64, device="cuda").to(dtype), (LoraPart(ffn - 8, ffn + 16, 0, 4, b, 1.5),))
    down, apart = make_rows(33, 4, 0, dtype), gate_up.clone()
    lora_expand(apart, down, some)
    assert torch.equal(swiglu_lora(gate_up, down, some), swiglu(apart))
    assert swiglu_lora(gate_up[:0], down[:0], some).shape == (0, ffn)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ranks", [(16, 16), (64, 64)])
def test_a_token_is_the_same_to_the_bit_alone_and_among_others(dtype: torch.dtype, ranks: tuple[int, int]) -> None:
    lora = make_lora(1536, ranks, dtype)
    gate_up, down = make_rows(5000, 3072, 0, dtype), make_rows(5000, sum(ranks), 0, dtype)
    alone = swiglu_lora(gate_up[4321:4322].clone(), down[4321:4322], lora)
    assert torch.equal(alone[0], swiglu_lora(gate_up, down, lora)[4321])


def test_a_captured_call_takes_new_values_of_b_in_place() -> None:
    lora = make_lora(9728, (16, 16), torch.bfloat16)
    base, down = make_rows(8, 2 * 9728, 0, torch.bfloat16), make_rows(8, 32, 0, torch.bfloat16)
    swiglu_lora(base, down, lora)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = swiglu_lora(base, down, lora)
    for _ in range(3):
        for part in lora.parts:
            part.b.copy_(torch.randn_like(part.b))
        base.copy_(torch.randn_like(base))
        graph.replay()
        assert torch.equal(found, swiglu_lora(base, down, lora))


def test_operands_that_do_not_fit_are_refused() -> None:
    lora = make_lora(64, (16, 16), torch.bfloat16)
    gate_up, down = make_rows(4, 128, 0, torch.bfloat16), make_rows(4, 32, 0, torch.bfloat16)
    with pytest.raises(ValueError, match=r"needs down \[4, 32\]"):
        swiglu_lora(gate_up, down[:, :31], lora)
    with pytest.raises(ValueError, match=r"torch.float16"):
        swiglu_lora(gate_up, down.half(), lora)
    with pytest.raises(ValueError, match="whole rows"):
        swiglu_lora(gate_up, down.t().contiguous().t(), lora)

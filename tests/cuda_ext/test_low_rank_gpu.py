"""LoRA's expansion beside a linear layer and the rebuild of a weight on the GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cuda_ext.lora import FusedLora, LoraPart, lora_expand, lora_linear
from cuda_ext.rebuild import rebuild_weight

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HALF_STEP = {torch.float32: 1e-6, torch.bfloat16: 2**-8 * 1.01, torch.float16: 2**-11 * 1.01}

Layout = tuple[int, int, list[tuple[int, int, int]]]
"""Rows, columns of a weight, and (first row, last row, rank) of its parts."""
LAYOUTS: list[Layout] = [
    (6144, 2560, [(0, 4096, 16), (4096, 5120, 16), (5120, 6144, 16)]),
    (2560, 4096, [(0, 2560, 16)]),
    (768, 96, [(0, 256, 8), (256, 512, 4), (512, 768, 32)]),
    (520, 264, [(0, 256, 64), (264, 520, 64)]),
    (300, 520, [(40, 300, 256)]),
    (300, 136, [(0, 100, 100), (100, 300, 1)]),
    (77, 45, [(3, 20, 3), (21, 50, 7), (50, 76, 17)]),
    (5, 3, [(1, 2, 1)]),
]


def make_lora(layout: Layout, dtype: torch.dtype) -> FusedLora:
    rows, columns, spans = layout
    parts, rank = [], 0
    for number, (first, last, width) in enumerate(spans):
        b = (torch.randn(last - first, width, device="cuda") / width**0.5).to(dtype)
        parts.append(LoraPart(first, last, rank, rank + width, b, (0.5, -2.0, 1.25)[number]))
        rank += width
    return FusedLora((torch.randn(rank, columns, device="cuda") / columns**0.5).to(dtype), tuple(parts))


def expanded(y: Tensor, down: Tensor, lora: FusedLora) -> Tensor:
    """The exact sum in float64."""
    exact = y.double()
    for part in lora.parts:
        product = down[:, part.first_rank : part.last_rank].double() @ part.b.double().t()
        exact[:, part.first_row : part.last_row] += part.scale * product
    return exact


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tokens", [1, 2, 16, 17, 64, 65, 200, 1030])
def test_expand_rounds_the_exact_sum(dtype: torch.dtype, layout: Layout, tokens: int) -> None:
    torch.manual_seed(tokens)
    rows, ranks = layout[0], sum(rank for _, _, rank in layout[2])
    lora = make_lora(layout, dtype)
    pool = torch.full((tokens, rows + 24), torch.nan, dtype=dtype, device="cuda")
    y = pool[:, :rows]
    y.copy_(torch.randn(tokens, rows, device="cuda"))
    down = torch.full((tokens, ranks + 8), torch.nan, dtype=dtype, device="cuda")[:, :ranks]
    down.copy_(torch.randn(tokens, ranks, device="cuda"))
    wanted, kept = expanded(y, down, lora), y.clone()
    lora_expand(y, down, lora)
    torch.testing.assert_close(y.double(), wanted, rtol=HALF_STEP[dtype], atol=2e-5)
    outside = torch.ones(rows, dtype=torch.bool, device="cuda")
    for part in lora.parts:
        outside[part.first_row : part.last_row] = False
    assert torch.equal(y[:, outside], kept[:, outside]) and bool(pool[:, rows:].isnan().all())
    kept_again = kept.clone()
    lora_expand(kept_again, down, lora)
    assert torch.equal(kept_again, y)
    fresh, zeros = torch.full_like(y, torch.nan), torch.zeros_like(y)
    lora_expand(fresh, down, lora, add=False)
    lora_expand(zeros, down, lora)
    assert torch.equal(fresh[:, ~outside], zeros[:, ~outside]) and bool(fresh[:, outside].isnan().all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_is_the_same_to_the_bit_alone_and_among_others(dtype: torch.dtype) -> None:
    layout = LAYOUTS[0]
    lora = make_lora(layout, dtype)
    y, down = torch.randn(1000, layout[0], device="cuda").to(dtype), torch.randn(1000, 48, device="cuda").to(dtype)
    alone = y[613:614].clone()
    lora_expand(y, down, lora)
    lora_expand(alone, down[613:614], lora)
    assert torch.equal(alone[0], y[613])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rebuild_rounds_the_exact_sum_and_forgets_it_to_the_bit(dtype: torch.dtype, layout: Layout) -> None:
    torch.manual_seed(layout[0])
    rows, columns, _ = layout
    golden = torch.randn(rows, columns, device="cuda").to(dtype)
    golden[:, 0] = -0.0
    live, kept = torch.full_like(golden, torch.nan), golden.clone()
    lora = make_lora(layout, dtype)
    rebuild_weight(live, golden, lora)
    exact = golden.double()
    covered = torch.zeros(rows, dtype=torch.bool, device="cuda")
    for part in lora.parts:
        a = lora.a[part.first_rank : part.last_rank].double()
        exact[part.first_row : part.last_row] += part.scale * part.b.double() @ a
        covered[part.first_row : part.last_row] = True
    torch.testing.assert_close(live.double(), exact, rtol=HALF_STEP[dtype], atol=2e-6)
    as_bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(live[~covered].view(as_bits), golden[~covered].view(as_bits))
    again = torch.full_like(golden, torch.nan)
    rebuild_weight(again, golden, lora)
    assert torch.equal(again, live)
    rebuild_weight(live, golden, None)
    assert torch.equal(live.view(as_bits), kept.view(as_bits)) and torch.equal(golden.view(as_bits), kept.view(as_bits))


def test_rebuilds_in_a_row_that_start_early_give_the_same() -> None:
    """Alternating adapters, so that a rebuild that overtook the one before it would leave another weight."""
    weights = [torch.randn(layout[:2], device="cuda").bfloat16() for layout in LAYOUTS]
    lives = [torch.empty_like(weight) for weight in weights]
    adapters = [[make_lora(layout, torch.bfloat16) for layout in LAYOUTS] for _ in range(2)]
    wanted = []
    for adapter in adapters:
        for live, weight, lora in zip(lives, weights, adapter, strict=True):
            rebuild_weight(live, weight, lora)
        wanted.append([live.clone() for live in lives])
    for turn in range(20):
        for number, lora in enumerate(adapters[turn % 2]):
            rebuild_weight(lives[number], weights[number], lora, more=number + 1 < len(lives), after=number > 0)
        found = [live.clone() for live in lives]
        assert all(torch.equal(a, b) for a, b in zip(found, wanted[turn % 2], strict=True))


def test_a_captured_layer_takes_new_values_of_b_in_place() -> None:
    torch.manual_seed(0)
    layout = LAYOUTS[0]
    lora = make_lora(layout, torch.bfloat16)
    x = torch.randn(8, layout[1], device="cuda").bfloat16()
    weight = torch.randn(layout[0], layout[1], device="cuda").bfloat16() / 50
    lora_linear(x, weight, None, lora)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = lora_linear(x, weight, None, lora)
    for _ in range(3):
        for part in lora.parts:
            part.b.copy_(torch.randn_like(part.b))
        lora.a.copy_(torch.randn_like(lora.a) / 50)
        graph.replay()
        assert torch.equal(y, lora_linear(x, weight, None, lora))
        merged = torch.empty(layout[:2], device="cuda")
        as32 = FusedLora(
            lora.a.float(),
            tuple(
                LoraPart(p.first_row, p.last_row, p.first_rank, p.last_rank, p.b.float(), p.scale) for p in lora.parts
            ),
        )
        rebuild_weight(merged, weight.float(), as32)
        wanted = x.float() @ merged.t()
        assert float((y.float() - wanted).norm() / wanted.norm()) < 5e-3


def test_more_than_the_kernels_take_is_still_computed() -> None:
    layout: Layout = (40, 30, [(0, 20, 300), (20, 40, 2)])
    lora = make_lora(layout, torch.float32)
    y, down = torch.randn(5, 40, device="cuda"), torch.randn(5, 302, device="cuda")
    wanted = expanded(y, down, lora)
    lora_expand(y, down, lora)
    torch.testing.assert_close(y.double(), wanted, rtol=1e-5, atol=1e-5)
    golden, live = torch.randn(40, 30, device="cuda"), torch.empty(40, 30, device="cuda")
    rebuild_weight(live, golden, lora)
    torch.testing.assert_close(live[20:], golden[20:] - 2.0 * lora.parts[1].b @ lora.a[300:])


def test_a_b_that_does_not_fit_is_named() -> None:
    lora = FusedLora(torch.zeros(2, 8, device="cuda"), (LoraPart(0, 4, 0, 2, torch.zeros(4, 3, device="cuda"), 1.0),))
    with pytest.raises(ValueError, match=r"must be \[4, 2\] in torch.float32, not \(4, 3\)"):
        lora_expand(torch.zeros(1, 4, device="cuda"), torch.zeros(1, 2, device="cuda"), lora)

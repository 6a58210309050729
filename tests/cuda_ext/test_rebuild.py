from __future__ import annotations

import pytest
import torch

from cuda_ext.lora import FusedLora, LoraPart, lora_linear
from cuda_ext.rebuild import rebuild_weight


def some_lora(dtype: torch.dtype) -> FusedLora:
    """Parts on rows 0 to 3 and 5 to 9 of 11, of ranks 2 and 3."""
    parts = (
        LoraPart(0, 3, 0, 2, torch.randn(3, 2).to(dtype), 0.5),
        LoraPart(5, 9, 2, 5, torch.randn(4, 3).to(dtype), -2.0),
    )
    return FusedLora(torch.randn(5, 10).to(dtype), parts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rebuilt_weight_is_the_base_and_the_product_rounded_once(dtype: torch.dtype) -> None:
    golden, live = torch.randn(11, 10).to(dtype), torch.full((11, 10), torch.nan, dtype=dtype)
    kept, lora = golden.clone(), some_lora(dtype)
    rebuild_weight(live, golden, lora)
    exact = golden.double()
    for part in lora.parts:
        a = lora.a[part.first_rank : part.last_rank].double()
        exact[part.first_row : part.last_row] += part.scale * part.b.double() @ a
    half_step = {torch.float32: 1e-6, torch.bfloat16: 2**-8 * 1.001}[dtype]
    torch.testing.assert_close(live.double(), exact, rtol=half_step, atol=1e-6)
    assert torch.equal(golden, kept)
    assert torch.equal(live[3:5], golden[3:5]) and torch.equal(live[9:], golden[9:])
    assert not torch.equal(live[:3], golden[:3])


def test_any_number_of_adapters_leaves_no_trace() -> None:
    golden = torch.randn(11, 10).bfloat16()
    live = golden.clone()
    for _ in range(50):
        rebuild_weight(live, golden, some_lora(torch.bfloat16))
    lora = some_lora(torch.bfloat16)
    fresh = torch.empty_like(live)
    rebuild_weight(live, golden, lora)
    rebuild_weight(fresh, golden, lora)
    assert torch.equal(live, fresh)
    rebuild_weight(live, golden, None)
    assert torch.equal(live.view(torch.int16), golden.view(torch.int16))


def test_merged_and_beside_give_the_same_layer() -> None:
    golden, live, x, lora = torch.randn(11, 10), torch.empty(11, 10), torch.randn(4, 10), some_lora(torch.float32)
    rebuild_weight(live, golden, lora)
    torch.testing.assert_close(lora_linear(x, live, None, None), lora_linear(x, golden, None, lora))


def test_the_base_is_protected_and_misfits_are_named() -> None:
    golden, lora = torch.randn(11, 10), some_lora(torch.float32)
    with pytest.raises(ValueError, match="the base would be lost"):
        rebuild_weight(golden, golden, lora)
    with pytest.raises(ValueError, match="must be alike"):
        rebuild_weight(torch.empty(10, 10), golden, lora)
    with pytest.raises(ValueError, match=r"with rows up to 9 does not fit a weight \(8, 10\)"):
        rebuild_weight(torch.empty(8, 10), golden[:8].clone(), lora)

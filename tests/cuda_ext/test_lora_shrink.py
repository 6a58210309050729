"""The A side of adapters for batches of decode steps."""

from __future__ import annotations

import pytest
import torch

from cuda_ext import lora_shrink as module
from cuda_ext.lora_shrink import lora_shrink

HALF_STEP = {torch.bfloat16: 2**-8 * 1.01, torch.float16: 2**-11 * 1.01}


def test_it_is_the_product() -> None:
    x, a = torch.randn(5, 64), torch.randn(3, 64)
    torch.testing.assert_close(lora_shrink(x, a), x @ a.t())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(HALF_STEP))
@pytest.mark.parametrize("tokens", [1, 17, 32, 200, 801, 1024])
@pytest.mark.parametrize(
    ("depth", "ranks"), [(2560, 48), (4096, 16), (9728, 33), (2560, 40), (9728, 64), (32, 8), (96, 3), (416, 20)]
)
def test_the_kernel_rounds_the_exact_sum(dtype: torch.dtype, tokens: int, depth: int, ranks: int) -> None:
    torch.manual_seed(tokens + ranks)
    pool = torch.full((tokens, depth + 8), torch.nan, device="cuda", dtype=dtype)
    x, a = pool[:, :depth], (torch.randn(ranks, depth, device="cuda") / depth**0.5).to(dtype)
    x.copy_(torch.randn(tokens, depth, device="cuda"))
    x[:, depth // 2] = 3.0
    assert module._kernel_takes(x, a) == (torch.cuda.get_device_capability() >= (9, 0) and ranks <= 48)
    down = lora_shrink(x, a)
    torch.testing.assert_close(down.double(), x.double() @ a.double().t(), rtol=HALF_STEP[dtype], atol=2e-5)
    if module._kernel_takes(x, a):
        assert torch.equal(lora_shrink(x[tokens // 2 : tokens // 2 + 1], a)[0], down[tokens // 2])
        assert torch.equal(lora_shrink(x, a), down)
    worse = a.clone()
    worse[:, depth // 2] = 0  # a faulty twin: one value along the sum is left out
    assert not torch.allclose(lora_shrink(x, worse).double(), x.double() @ a.double().t(), rtol=1e-2, atol=1e-3)


@pytest.mark.gpu
def test_what_the_kernel_does_not_take_is_still_computed() -> None:
    a = torch.randn(4, 40, device="cuda")
    for x in (torch.randn(3, 40, device="cuda"), torch.randn(40, 3, device="cuda").t()):
        torch.testing.assert_close(lora_shrink(x, a), x @ a.t())
    half = torch.randn(1025, 64, device="cuda").bfloat16()
    assert not module._kernel_takes(half, half[:8])
    assert lora_shrink(half, half[:8]).shape == (1025, 8)

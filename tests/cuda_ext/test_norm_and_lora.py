from __future__ import annotations

import pytest
import torch

from cuda_ext.lora import FusedLora, LoraPart, lora_linear
from cuda_ext.rms_norm import add_rms_norm, rms_norm
from cuda_ext.rope import qk_norm_rope_write, rope_table
from cuda_ext.swiglu import swiglu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rms_norm_is_its_formula(dtype: torch.dtype) -> None:
    x, weight = (3 * torch.randn(5, 32)).to(dtype), torch.rand(32).to(dtype)
    exact = x.double() / (x.double().pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    limits = {torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}
    torch.testing.assert_close(rms_norm(x, weight, 1e-5).double(), exact, rtol=limits[dtype], atol=limits[dtype])
    residual = torch.randn(5, 32).to(dtype)
    normed, summed = add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(summed, residual + x) and torch.equal(normed, rms_norm(summed, weight, 1e-5))


def test_swiglu_puts_the_gate_first() -> None:
    gate, up = torch.randn(2, 7, 6).unbind(0)
    torch.testing.assert_close(swiglu(torch.cat((gate, up), -1)), gate * torch.sigmoid(gate) * up)


def test_lora_parts_reach_only_their_rows() -> None:
    x, weight, bias = torch.randn(4, 10), torch.randn(9, 10), torch.randn(9)
    a = torch.randn(5, 10)
    parts = (LoraPart(0, 3, 0, 2, torch.randn(3, 2), 0.5), LoraPart(5, 9, 2, 5, torch.randn(4, 3), -2.0))
    delta = torch.zeros(9, 10)
    delta[:3] = 0.5 * parts[0].b @ a[:2]
    delta[5:] = -2.0 * parts[1].b @ a[2:]
    torch.testing.assert_close(lora_linear(x, weight, bias, FusedLora(a, parts)), x @ (weight + delta).T + bias)
    torch.testing.assert_close(lora_linear(x, weight, None, None), x @ weight.T)


def test_rotation_keeps_norms_and_depends_on_distance_only() -> None:
    table = rope_table(1.0 / 100.0 ** (torch.arange(0, 8, 2) / 8), 1.0, 64)
    qkv = torch.randn(1, (2 + 2) * 8).expand(4, -1)
    positions = torch.tensor([3, 13, 40, 50])
    k_cache, v_cache = torch.full((2, 9, 1, 8), torch.nan).unbind(0)
    slots = torch.tensor([7, 2, 5, 0])
    ones = torch.ones(8)
    q = qk_norm_rope_write(qkv, ones, ones, 1e-6, table, positions, k_cache, v_cache, slots)
    assert q.shape == (4, 2, 8)
    assert torch.equal(v_cache[slots, 0], qkv[:, -8:])
    assert bool(k_cache[[1, 3, 4, 6, 8]].isnan().all())
    torch.testing.assert_close(q.norm(dim=-1), q[:1].norm(dim=-1).expand(4, -1))
    near, far = (q[0, 0] * k_cache[slots[1], 0]).sum(), (q[2, 0] * k_cache[slots[3], 0]).sum()
    torch.testing.assert_close(near, far)
    assert abs(float(near - (q[0, 0] * k_cache[slots[0], 0]).sum())) > 1e-3

"""The torch side of the linear layers for few rows: what the kernel is held to."""

from __future__ import annotations

import pytest
import torch

from cuda_ext.rms_norm import add_rms_norm_reference
from cuda_ext.skinny_linear import can_skinny, norm_linear, norm_linear_swiglu, skinny_linear
from cuda_ext.swiglu import swiglu_reference

EPS = 1e-6


def _randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_is_torchs(dtype: torch.dtype) -> None:
    x, weight, bias = (_randn(*shape, seed=i, dtype=dtype) for i, shape in enumerate([(3, 64), (17, 64), (17,)]))
    expected = (x.double() @ weight.double().T + bias.double()).float()
    torch.testing.assert_close(skinny_linear(x, weight, bias).float(), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_linear_is_the_separate_ops(dtype: torch.dtype) -> None:
    x, residual, weight = (_randn(*shape, seed=i, dtype=dtype) for i, shape in enumerate([(3, 64), (3, 64), (18, 64)]))
    norm_weight = (1 + 0.3 * _randn(64, seed=9)).to(dtype)
    normed, summed = add_rms_norm_reference(x, residual, norm_weight, EPS)
    y, residual_out = norm_linear(x, residual, norm_weight, EPS, weight)
    assert torch.equal(residual_out, summed) and torch.equal(y, normed @ weight.T)
    act, residual_out = norm_linear_swiglu(x, residual, norm_weight, EPS, weight)
    assert act.shape == (3, 9) and torch.equal(residual_out, summed)
    assert torch.equal(act, swiglu_reference(normed @ weight.T))


def test_without_a_residual_x_is_the_sum() -> None:
    x, weight, norm_weight = _randn(2, 64), _randn(8, 64, seed=1), 1 + _randn(64, seed=2)
    y, residual_out = norm_linear(x, None, norm_weight, EPS, weight)
    assert residual_out is x
    expected = x / x.pow(2).mean(-1, keepdim=True).add(EPS).sqrt() * norm_weight @ weight.T
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


def test_the_kernel_does_not_take_cpu_tensors() -> None:
    x = _randn(2, 64, dtype=torch.bfloat16)
    assert not can_skinny(x, x)

"""Log-probabilities of given tokens against float64, on odd vocabularies and extreme logits."""

from __future__ import annotations

import pytest
import torch

from cuda_ext.logprobs import token_logprobs

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab", [1, 7, 300, 4097, 151936])
def test_equal_to_float64(vocab: int, dtype: torch.dtype) -> None:
    generator = torch.Generator("cuda").manual_seed(vocab)
    logits = (5 * torch.randn(37, vocab, generator=generator, device="cuda")).to(dtype)
    logits[3] += 1000 if dtype != torch.float16 else 100  # far outside what exp can hold
    logits[4, ::2] = -torch.inf
    lines = torch.randint(0, 37, (90,), generator=generator, device="cuda")
    tokens = torch.randint(0, vocab, (90,), generator=generator, device="cuda")
    wanted = logits.double().log_softmax(-1)[lines, tokens]
    found = [token_logprobs(logits, lines, tokens) for _ in range(2)]
    torch.testing.assert_close(found[0].double(), wanted, rtol=1e-6, atol=3e-5, equal_nan=True)
    assert torch.equal(found[0].nan_to_num(7.0), found[1].nan_to_num(7.0))


def test_logits_that_are_not_finite_are_told() -> None:
    logits = torch.zeros(3, 1000, device="cuda")
    logits[0, 999], logits[1, 5] = torch.nan, torch.inf
    lines, tokens = torch.tensor([0, 1, 2], device="cuda"), torch.tensor([1, 1, 1], device="cuda")
    found = token_logprobs(logits, lines, tokens)
    assert found[:2].isnan().all() and abs(float(found[2]) + 6.907755) < 1e-5

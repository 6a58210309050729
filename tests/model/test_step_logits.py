"""A decode step whose products are chained from one attention to the next computes what the layers do one by one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import ember_ray.model.qwen3 as qwen3
from cuda_ext.prefill_attention import PrefillBatch, prefill_attention
from tests.support.qwen3 import make_qwen3, stage_model


@pytest.mark.parametrize("tied", [True, False])
def test_chained_products_equal_the_layers_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tied: bool
) -> None:
    make_qwen3(tmp_path, tie_word_embeddings=tied)
    config, model = stage_model(tmp_path)
    count = 5
    batch = PrefillBatch.build([count], [np.arange(count)], "cpu")

    def attention(q: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        return prefill_attention(q, k_cache, v_cache, batch, config.head_dim**-0.5, "sdpa")

    def logits() -> Tensor:
        cache = torch.full((len(model.layers), 2, 16, config.num_key_value_heads, config.head_dim), torch.nan)
        places = torch.arange(count)
        with torch.inference_mode():
            return model.step_logits(model.embed(places + 3), places, places, cache, attention, {})

    apart = logits()
    chained_calls = []
    chained = qwen3.between_attentions
    monkeypatch.setattr(qwen3, "can_skinny", lambda x, weight: True)  # on a CPU it is never chosen
    monkeypatch.setattr(qwen3, "between_attentions", lambda *a: chained_calls.append(1) or chained(*a))
    torch.testing.assert_close(logits(), apart, rtol=0, atol=1e-4)
    assert len(chained_calls) == config.num_hidden_layers and apart.std() > 2

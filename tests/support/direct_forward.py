"""transformers' own forward pass under any policy version, or a mixture of versions; the oracle for what was served."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, DynamicCache

from ember_ray.model.lora import AdapterUpdate, check_adapter
from ember_ray.model.qwen3_config import read_model_config

Span = tuple[int, int, int]
"""(first position, last position + 1, version)."""


class DirectForward:
    """Weights are merged, in float32.

    Attributes:
        updates: version to adapter; 0 is the base model.
    """

    def __init__(self, folder: str | Path) -> None:
        self.updates: dict[int, AdapterUpdate] = {}
        self._config = read_model_config(folder)
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self._base = {name: weight.clone() for name, weight in self._model.state_dict().items()}
        self._serving = 0

    @torch.inference_mode()
    def logprobs(self, prompt: Sequence[int], answer: Sequence[int], spans: Sequence[Span]) -> list[float]:
        """Log-probabilities of an answer's tokens at temperature 1.

        Args:
            spans: which positions of prompt and answer were computed under which version, in the order in which they
                were. Each span finds the keys and values of those before it; one that begins again at an earlier
                position takes their place from there on. A token's probability is of the first span that computed the
                position before it.
        """
        row = [*prompt, *answer]
        found: dict[int, float] = {}
        cache = DynamicCache(config=self._model.config)
        for first, last, version in spans:
            assert first <= cache.get_seq_length(), "a span does not follow those before it"
            if first < cache.get_seq_length():
                cache = self._beginning(cache, first)
            self._serve(version)
            logits = self._model(torch.tensor([row[first:last]]), past_key_values=cache, use_cache=True).logits[0]
            for place, line in zip(range(first, last), logits.log_softmax(-1), strict=True):
                if place + 1 < len(row):
                    found.setdefault(place + 1, float(line[row[place + 1]]))
        return [found[place] for place in range(len(prompt), len(row))]

    def _beginning(self, cache: DynamicCache, count: int) -> DynamicCache:
        cut = DynamicCache(config=self._model.config)
        if count:
            for place, layer in enumerate(cache.layers):
                cut.update(layer.keys[:, :, :count], layer.values[:, :, :count], place)
        return cut

    def _serve(self, version: int) -> None:
        if version == self._serving:
            return
        config, weights = self._config, self._model.state_dict()
        for name, weight in self._base.items():
            weights[name].copy_(weight)
        if version:
            checked = check_adapter(self.updates[version], config.linear_shapes, config.num_hidden_layers)
            for layer, pairs in checked.items():
                for name, pair in pairs.items():
                    block = "mlp" if name in ("gate_proj", "up_proj", "down_proj") else "self_attn"
                    weights[f"model.layers.{layer}.{block}.{name}.weight"].add_(pair.scale * pair.b @ pair.a)
        self._serving = version

"""Random weights of the right scale in place of a checkpoint, made where they are used: for benchmarks and tests.

With inputs of unit root mean square a linear layer of standard deviation 1 / sqrt(in) keeps that scale (Glorot and
Bengio 2010, section 4.2.1), so activations neither vanish nor blow up; the residual stream grows with the square
root of the depth, and every norm brings it back to about 1. For Qwen3-4B that is 0.02, as in its own initializer.
"""

from __future__ import annotations

from collections.abc import Callable
from hashlib import blake2b

import torch
from torch import Tensor

from ember_ray.model.qwen3_config import Qwen3Config

LOGIT_STD = 3.0
"""Standard deviation of the logits: of a vocabulary of 151,936 some 1,600 tokens are worth drawing."""

NORM_STD = 0.1
"""Spread of the norm weights around 1."""

BIAS_STD = 0.02


def dummy_reader(
    config: Qwen3Config, dtype: torch.dtype, device: str | torch.device, seed: int = 0
) -> Callable[[str, tuple[int, ...]], Tensor]:
    """A function that gives the tensor of a name, as a checkpoint of Hugging Face names would.

    Args:
        config: of the model; its hidden size sets the scale of the LM head.
        dtype, device: of the tensors; they are drawn there, nothing goes through the host.
        seed: another seed gives another model.

    Returns:
        ``read(name, shape)``: a new tensor that depends on seed, name, shape, dtype and the kind of device only,
        never on what was read before. The names of norms end in ``norm.weight``, those of biases in ``.bias``.
    """

    def read(name: str, shape: tuple[int, ...]) -> Tensor:
        key = int.from_bytes(blake2b(f"{seed}:{name}".encode(), digest_size=8).digest(), "little")
        generator = torch.Generator(device).manual_seed(key % 2**63)
        mean = 0.0
        if name.endswith("norm.weight"):
            mean, std = 1.0, NORM_STD
        elif name.endswith(".bias"):
            std = BIAS_STD
        elif name.endswith(("embed_tokens.weight", "lm_head.weight")):
            std = LOGIT_STD / config.hidden_size**0.5
        else:
            std = shape[-1] ** -0.5
        return torch.empty(shape, dtype=dtype, device=device).normal_(mean, std, generator=generator)

    return read

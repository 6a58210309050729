"""GRPO and its variants written from the papers, row by row and without padding, to compare the learner with.

Shao et al. 2024 (2402.03300), equations 3 and 4; Liu et al. 2025 (2503.20783), equation of Dr. GRPO in section 3.2; Yu
et al. 2025 (2503.14476), equation 8.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def logprobs(model: Any, prompt: Sequence[int], answer: Sequence[int], temperature: float = 1.0) -> Tensor:
    """[len(answer)], with gradients."""
    ids = torch.tensor([[*prompt, *answer]])
    logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1] / temperature
    return logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0]


def advantages(rewards: Sequence[float], scale: bool) -> Tensor:
    """[candidates of the group]"""
    known = torch.tensor(rewards)
    centred = known - known.mean()
    return centred / (known.std() + 1e-4) if scale else centred


def policy_loss(now: Tensor, old: Tensor, advantage: Tensor, low: float, high: float) -> Tensor:
    """Per token, to be minimised: minus the clipped objective."""
    ratio = (now - old).exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)


def kl(now: Tensor, reference: Tensor) -> Tensor:
    """Per token, the estimate of equation 4."""
    return (reference - now).exp() - (reference - now) - 1


def total(loss_type: str, per_token: Sequence[Tensor], longest: int) -> Tensor:
    """Rows of losses per token to the loss of all candidates."""
    if loss_type == "grpo":
        return torch.stack([row.mean() for row in per_token]).mean()
    if loss_type == "dr_grpo":
        return torch.stack([row.sum() / longest for row in per_token]).mean()
    assert loss_type == "dapo"
    return torch.cat(list(per_token)).mean()

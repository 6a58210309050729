"""Log-probabilities of given tokens, without a softmax over the vocabulary in memory."""

from __future__ import annotations

import torch
from torch import Tensor


def token_logprobs(logits: Tensor, lines: Tensor, token_ids: Tensor) -> Tensor:
    """Natural log-probability, at temperature 1, of one token of a line of logits for each entry.

    Args:
        logits: [m, vocab] float32, bfloat16 or float16.
        lines: [n] int64, a line of ``logits`` each.
        token_ids: [n] int64, below vocab.

    Returns:
        [n] float32, computed in float32.
    """
    return token_logprobs_reference(logits, lines, token_ids)


def token_logprobs_reference(logits: Tensor, lines: Tensor, token_ids: Tensor) -> Tensor:
    """:func:`token_logprobs` in plain torch."""
    total = torch.logsumexp(logits.float(), dim=-1)
    return logits[lines, token_ids].float() - total[lines]

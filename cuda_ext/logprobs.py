"""Log-probabilities of given tokens, without a softmax over the vocabulary in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from cuda_ext import library


def token_logprobs(logits: Tensor, lines: Tensor, token_ids: Tensor) -> Tensor:
    """Natural log-probability, at temperature 1, of one token of a line of logits for each entry.

    Args:
        logits: [m, vocab] float32, bfloat16 or float16, contiguous.
        lines: [n] int64, a line of ``logits`` each.
        token_ids: [n] int64, below vocab.

    Returns:
        [n] float32, summed in float32; NaN where the line has a logit that is NaN or +inf.
    """
    if not logits.is_cuda:
        return token_logprobs_reference(logits, lines, token_ids)
    if not logits.is_contiguous() or lines.dtype != torch.int64 or token_ids.dtype != torch.int64:
        raise ValueError("token_logprobs takes contiguous logits, and lines and token ids in int64")
    out = torch.empty(lines.shape[0], dtype=torch.float32, device=logits.device)
    if out.numel():
        library.launch(
            "token_logprobs", out, logits, lines.contiguous(), token_ids.contiguous(), out.numel(), logits.shape[1],
            logits.dtype,
        )  # fmt: skip
    return out


def token_logprobs_reference(logits: Tensor, lines: Tensor, token_ids: Tensor) -> Tensor:
    """:func:`token_logprobs` in plain torch, which makes a float32 copy of the logits."""
    total = torch.logsumexp(logits.float(), dim=-1)
    return logits[lines, token_ids].float() - total[lines]

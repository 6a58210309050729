"""Sampling from logits with counter-based random numbers, and both log-probabilities of the drawn token."""

from __future__ import annotations

import torch
from torch import Tensor

_MASK32 = 0xFFFFFFFF


def philox4x32(counter: Tensor, key: Tensor) -> Tensor:
    """Philox4x32-10 (Salmon et al. 2011, section 3.3): random words that depend on counter and key only.

    Args:
        counter: [n, 4] int64, each a 32-bit word.
        key: [n, 2] int64, each a 32-bit word.

    Returns:
        [n, 4] int64, each a 32-bit word.
    """
    c0, c1, c2, c3 = counter.unbind(-1)
    k0, k1 = key.unbind(-1)
    for _ in range(10):
        # int64 products wrap, which keeps all 64 bits; the shift's sign bits are masked away
        low, high = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            ((high >> 32) & _MASK32) ^ c1 ^ k0,
            high & _MASK32,
            ((low >> 32) & _MASK32) ^ c3 ^ k1,
            low & _MASK32,
        )
        k0, k1 = (k0 + 0x9E3779B9) & _MASK32, (k1 + 0xBB67AE85) & _MASK32
    return torch.stack((c0, c1, c2, c3), dim=-1)


def uniforms(seeds: Tensor, prompts: Tensor, candidates: Tensor, positions: Tensor) -> Tensor:
    """One number in (0, 1) per row, fixed by the row's own identity and nothing else.

    Args:
        seeds: [n] int64, the request's seed.
        prompts: [n] int64, a hash of the prompt's tokens.
        candidates: [n] int64, the candidate's index.
        positions: [n] int64, the index of the token to draw.

    Returns:
        [n] float64 with 52 random bits; never 0, which would draw a first token of any probability.
    """
    counter = torch.stack((candidates, positions, prompts & _MASK32, (prompts >> 32) & _MASK32), dim=-1)
    key = torch.stack((seeds & _MASK32, (seeds >> 32) & _MASK32), dim=-1)
    words = philox4x32(counter, key)
    return ((words[:, 0] << 20) | (words[:, 1] >> 12)).double() * 2.0**-52 + 2.0**-53


def filter_logits(scaled: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Masks what min-p, top-k and top-p leave out, in that order; ties at an edge stay in.

    Args:
        scaled: [n, vocab] float32, logits over temperature.
        top_k: [n] int64, 0 for off. top_p: [n] float32, 1 for off. min_p: [n] float32, 0 for off.

    Returns:
        [n, vocab] float32 with -inf for tokens that cannot be drawn.
    """
    floor = scaled.amax(-1, keepdim=True) + min_p.log().unsqueeze(-1)
    kept = scaled.masked_fill(scaled < floor, -torch.inf)
    ordered = kept.sort(dim=-1, descending=True).values
    vocab = scaled.shape[-1]
    kth = torch.where(top_k > 0, top_k.clamp(max=vocab), vocab) - 1
    edge = ordered.gather(-1, kth.unsqueeze(-1))
    ordered = ordered.masked_fill(ordered < edge, -torch.inf)
    probabilities = ordered.double().softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    # the sum may reach 1 before the last token, which top_p = 1 does not leave out
    inside = ((before < top_p.double().unsqueeze(-1)) | (top_p >= 1).unsqueeze(-1)) & (ordered > -torch.inf)
    last = inside.sum(-1, keepdim=True).clamp(min=1) - 1
    return kept.masked_fill(kept < torch.maximum(edge, ordered.gather(-1, last)), -torch.inf)


def sample(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, draws: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Draws one token a row by inverting the cumulative distribution in order of token id.

    Args:
        logits: [n, vocab], any float dtype.
        temperature: [n] float32, 0 for greedy (the lowest id among equals).
        top_k, top_p, min_p: as in :func:`filter_logits`.
        draws: [n] float64 in (0, 1).

    Returns:
        tokens [n] int64; logprob [n] float32, under the model at temperature 1 (NaN in rows with a logit that is
        NaN or +inf); sampling_logprob [n] float32, under the distribution that the token was drawn from (0 for greedy).
    """
    logits = logits.float()
    logprobs = logits.log_softmax(-1)
    greedy = temperature == 0
    if bool(greedy.all()):
        tokens = logits.argmax(-1)
        chosen = logprobs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
        return tokens, chosen, torch.zeros_like(chosen)

    if bool((temperature == 1).all()):
        scaled = logits
    else:
        scaled = logits / torch.where(greedy, 1.0, temperature).unsqueeze(-1)
    if bool((top_k > 0).any() or (top_p < 1).any() or (min_p > 0).any()):
        scaled = filter_logits(scaled, top_k, top_p, min_p)
    sampling_logprobs = logprobs if scaled is logits else scaled.log_softmax(-1)
    cumulative = sampling_logprobs.double().exp().cumsum(-1)
    total = cumulative[:, -1:]
    # u * total may round up to total itself, which no token reaches
    target = torch.minimum(draws.unsqueeze(-1) * total, torch.nextafter(total, torch.zeros_like(total)))
    # where logits are not finite, no token is found; the log-probability then says so
    tokens = torch.searchsorted(cumulative, target, right=True).squeeze(-1).clamp_(max=logits.shape[-1] - 1)
    tokens = torch.where(greedy, logits.argmax(-1), tokens)
    picked = tokens.unsqueeze(-1)
    sampling = torch.where(greedy, 0.0, sampling_logprobs.gather(-1, picked).squeeze(-1))
    return tokens, logprobs.gather(-1, picked).squeeze(-1), sampling

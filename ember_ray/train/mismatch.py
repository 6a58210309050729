"""Train/inference mismatch: what the engine says of its tokens, and what the learner says of the same ones.

Both say the log-probability at temperature 1. A mean hides the few tokens that differ a lot, so the tail is told too.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from ember_ray.data.scored_group import ScoredGroup

if TYPE_CHECKING:
    from torch import Tensor

RATIO_BOUNDS = (0.9, 1.1)
"""Outside of them a token's probability ratio counts as off."""

LOGITS_ROWS = 1024
"""Rows of logits that exist at once."""

Sampled = tuple[tuple[int, ...], tuple[int, ...], tuple[float, ...]]
"""A prompt's tokens, an answer's tokens, and the engine's log-probability of each of these."""


def sampled_answers(groups: Iterable[ScoredGroup], limit: int | None) -> list[Sampled]:
    """Candidates to measure: the first of each group, then the second of each, and so on, up to a limit.

    Args:
        groups: rollouts; aborted candidates and those without a token are passed over.
        limit: most candidates; None takes all.

    Raises:
        ValueError: a candidate has not one log-probability a token.
    """
    groups = list(groups)
    columns = [[s.candidate for s in group.candidates if s.candidate.finish_reason != "abort"] for group in groups]
    found: list[Sampled] = []
    for rank in itertools.zip_longest(*columns):
        for group, candidate in zip(groups, rank, strict=True):
            if limit is not None and len(found) >= limit:
                return found
            if candidate is None or not candidate.token_ids:
                continue
            if len(candidate.logprobs) != len(candidate.token_ids):
                raise ValueError(
                    f"candidate {candidate.index} of prompt '{group.request_id}' has {len(candidate.token_ids)} tokens "
                    f"and {len(candidate.logprobs)} log-probabilities"
                )
            prompt = tuple(group.prompt_token_ids)
            found.append((prompt, tuple(candidate.token_ids), tuple(candidate.logprobs)))
    return found


def mismatch_metrics(engine: Sequence[float], learner: Sequence[float]) -> dict[str, float]:
    """How far two log-probabilities of the same tokens lie apart.

    Args:
        engine, learner: one natural logarithm a token each.

    Returns:
        ``mismatch/mean``, ``mismatch/p95`` (the least value that 95 % of the tokens do not exceed), ``mismatch/max``
        of the absolute difference, ``mismatch/outside`` (share of tokens whose ratio exp(learner - engine) lies
        outside [0.9, 1.1]) and ``mismatch/tokens``; without a token the count alone. A token for which one of them is
        not finite counts as infinitely far off.
    """
    count = len(engine)
    if not count:
        return {"mismatch/tokens": 0}
    low, high = map(math.log, RATIO_BOUNDS)
    apart = [b - a if math.isfinite(b - a) else math.inf for a, b in zip(engine, learner, strict=True)]
    sizes = sorted(map(abs, apart))
    return {
        "mismatch/mean": math.fsum(sizes) / count if math.isfinite(sizes[-1]) else math.inf,
        "mismatch/p95": sizes[math.ceil(0.95 * count) - 1],
        "mismatch/max": sizes[-1],
        "mismatch/outside": sum(not low <= difference <= high for difference in apart) / count,
        "mismatch/tokens": count,
    }


def answer_logprobs(model: Any, rows: Sequence[tuple[Sequence[int], Sequence[int]]], batch_size: int) -> list[Tensor]:
    """Log-probabilities of given answers under a causal model of transformers, with or without a PEFT adapter.

    Dropout is off meanwhile, and nothing is kept for a backward pass. Only rows of logits that predict an answer's
    token are computed, `LOGITS_ROWS` at a time.

    Args:
        rows: (prompt, answer) token ids; both have at least one token.
        batch_size: rows in one forward pass.

    Returns:
        For each row float32 [len(answer)] on the CPU.
    """
    import torch

    network = model.get_base_model() if hasattr(model, "get_base_model") else model
    decoder, head = network.base_model, network.get_output_embeddings()
    device = head.weight.device
    was_training = model.training
    model.eval()
    # rows of like length go together, so that few positions are padding
    order = sorted(range(len(rows)), key=lambda number: len(rows[number][0]) + len(rows[number][1]))
    found: list[Tensor] = [torch.empty(0)] * len(rows)
    try:
        with torch.no_grad():
            for start in range(0, len(order), batch_size):
                part = order[start : start + batch_size]
                ids = [torch.tensor([*rows[number][0], *rows[number][1]]) for number in part]
                tokens = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
                lengths = torch.tensor([len(one) for one in ids])
                mask = (torch.arange(tokens.shape[1]) < lengths[:, None]).long()
                hidden = decoder(
                    input_ids=tokens.to(device), attention_mask=mask.to(device), use_cache=False
                ).last_hidden_state
                for line, number in enumerate(part):
                    first, last = len(rows[number][0]), len(ids[line])
                    predicting = hidden[line, first - 1 : last - 1]
                    answer = ids[line][first:].to(device)
                    pieces = []
                    for states, targets in zip(predicting.split(LOGITS_ROWS), answer.split(LOGITS_ROWS), strict=True):
                        logits = head(states).float()
                        pieces.append(logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(-1))
                    found[number] = torch.cat(pieces).cpu()
    finally:
        model.train(was_training)
    return found

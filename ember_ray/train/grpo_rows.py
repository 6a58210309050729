"""Scored groups as what GRPO learns from: which candidates, in which batches, and what there is to say of them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ember_ray.data.scored_group import ScoredCandidate, ScoredGroup

_ROUNDING = 1e-9  # rewards are sums of decimal weights: 0.1 + 0.2 and 0.3 must count as equal


@dataclass(frozen=True)
class Answer:
    """A candidate that is learnt from.

    Attributes:
        token_ids: the very tokens of the rollout, a stop token included.
        logprobs: one a token, of the rollout's policy, as the engine recorded them.
        reward: the verifier's scalar.
        is_truncated: it ran into the length limit.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    reward: float
    is_truncated: bool


@dataclass(frozen=True)
class AnswerGroup:
    """A prompt with those of its candidates that are learnt from, at least one."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    answers: tuple[Answer, ...]

    @property
    def is_zero_spread(self) -> bool:
        """Fewer than two candidates, or all with the same reward: nothing tells better from worse."""
        return not _has_spread([answer.reward for answer in self.answers])

    @property
    def num_tokens(self) -> int:
        """Tokens of a pass over the group; every candidate has the prompt before it."""
        return sum(len(self.prompt_token_ids) + len(answer.token_ids) for answer in self.answers)


def zero_spread(groups: Sequence[ScoredGroup]) -> tuple[int, ...]:
    """Which groups teach GRPO nothing: the positions of those with no two candidates of different reward.

    Candidates that are left out of learning (`make_groups`) do not count. A recipe may ask for other prompts in their
    place, as DAPO's dynamic sampling does (Yu et al. 2025, section 3.2).
    """
    return tuple(
        position
        for position, group in enumerate(groups)
        if not _has_spread([scored.reward for scored in group.candidates if _fault(scored) is None])
    )


def make_groups(
    groups: Sequence[ScoredGroup], fits: Callable[[int], bool], use_sampling_logprobs: bool = False
) -> tuple[list[AnswerGroup], dict[str, float]]:
    """The groups with the candidates that are learnt from; what has none is left out.

    Left out are candidates that the verifier failed on (reward None, NaN or infinite), that were aborted, that have no
    tokens, and that are too long. The rest of their group is learnt from as if they had not been drawn.

    Args:
        groups: a round's rollouts, in any order; the groups come out in the same one.
        fits: whether a row of so many tokens, prompt and answer, may be learnt from.
        use_sampling_logprobs: take the candidates' ``sampling_logprobs`` instead of their ``logprobs``.

    Returns:
        The groups, and counts: ``groups``, ``candidates`` (all), ``candidates_failed``, ``candidates_aborted``,
        ``candidates_empty``, ``candidates_too_long`` (left out, by the first reason that holds of aborted, failed,
        empty, too long), ``candidates_learnt``.
    """
    counts: dict[str, float] = {
        f"candidates_{name}": 0 for name in ("failed", "aborted", "empty", "too_long", "learnt")
    }
    made = []
    for group in groups:
        answers = []
        for scored in group.candidates:
            candidate = scored.candidate
            fault = _fault(scored)
            if fault is None and not fits(len(group.prompt_token_ids) + len(candidate.token_ids)):
                fault = "too_long"
            counts[f"candidates_{fault or 'learnt'}"] += 1
            if fault is None:
                assert scored.reward is not None
                logprobs = candidate.sampling_logprobs if use_sampling_logprobs else candidate.logprobs
                is_truncated = candidate.finish_reason == "length"
                answers.append(Answer(tuple(candidate.token_ids), tuple(logprobs), scored.reward, is_truncated))
        if answers:
            made.append(AnswerGroup(group.request_id, group.prompt_token_ids, tuple(answers)))
    return made, {"groups": len(groups), "candidates": sum(counts.values()), **counts}


def _fault(scored: ScoredCandidate) -> str | None:
    """Why a candidate cannot be learnt from, whatever its length."""
    if scored.candidate.finish_reason == "abort":
        return "aborted"
    if scored.reward is None or not math.isfinite(scored.reward):
        return "failed"
    return None if scored.candidate.token_ids else "empty"


def _has_spread(rewards: Sequence[float | None]) -> bool:
    known = [reward for reward in rewards if reward is not None]
    return bool(known) and max(known) - min(known) > _ROUNDING


@dataclass(frozen=True)
class Deal:
    """How a round's rows are dealt to optimizer steps.

    Attributes:
        steps: optimizer steps in one use of the round.
        accumulation: forward passes in each.
        size: rows in each forward pass; the last ``steps * accumulation * size - rows`` of the round are empty.
    """

    steps: int
    accumulation: int
    size: int


def deal(num_rows: int, batch_size: int, accumulation: int) -> Deal:
    """Deals rows evenly: as few optimizer steps as the sizes allow, and none much smaller than another.

    TRL wants a round that is a multiple of the batch size and leaves the rest out. Rounds are not: groups are left
    out, and prompts run out at the end of an epoch.

    Args:
        num_rows: candidates of the round, at least 1.
        batch_size: most rows of one forward pass.
        accumulation: most forward passes of one optimizer step.
    """
    steps = math.ceil(num_rows / (batch_size * accumulation))
    passes = math.ceil(num_rows / (steps * batch_size))
    return Deal(steps, passes, math.ceil(num_rows / (steps * passes)))


def round_metrics(groups: Sequence[AnswerGroup]) -> dict[str, float]:
    """TRL's metrics of rewards and completions, over the candidates that are learnt from.

    Returns:
        ``reward``, ``reward_std`` (over all of the round's candidates, the unbiased one), ``frac_reward_zero_std``
        (share of groups), ``completions/{mean,min,max}_length``, ``completions/clipped_ratio`` (share that ran into
        the length limit), ``completions/{mean,min,max}_terminated_length`` (of the others; 0 if there are none), in
        tokens. Empty without a group.
    """
    answers = [answer for group in groups for answer in group.answers]
    if not answers:
        return {}
    rewards = [answer.reward for answer in answers]
    metrics = {
        "reward": statistics.fmean(rewards),
        "reward_std": statistics.stdev(rewards) if len(rewards) > 1 else 0.0,
        "frac_reward_zero_std": sum(group.is_zero_spread for group in groups) / len(groups),
        "completions/clipped_ratio": sum(answer.is_truncated for answer in answers) / len(answers),
    }
    for name, lengths in (
        ("length", [len(answer.token_ids) for answer in answers]),
        ("terminated_length", [len(answer.token_ids) for answer in answers if not answer.is_truncated] or [0]),
    ):
        metrics |= {
            f"completions/mean_{name}": statistics.fmean(lengths),
            f"completions/min_{name}": float(min(lengths)),
            f"completions/max_{name}": float(max(lengths)),
        }
    return metrics

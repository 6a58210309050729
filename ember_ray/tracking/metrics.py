"""Numbers of a round under the names that TRL's trainers log them by."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, pstdev

from ember_ray.data.scored_group import ScoredGroup


def rollout_metrics(groups: Sequence[ScoredGroup]) -> dict[str, float]:
    """What a round's candidates were like.

    Returns:
        ``reward`` (mean over candidates), ``reward_std`` (mean over prompts of the spread inside a
        group), ``frac_reward_zero_std`` (share of groups without spread, which teach nothing),
        ``rewards/<component>/mean``, ``exact_match``, ``completions/mean_length``, ``min_length`` and
        ``max_length`` (tokens), ``completions/clipped_ratio`` (share that ran into max_tokens),
        ``verifier_failures``. Without a judged candidate the reward keys are absent.
    """
    scored = [one for group in groups for one in group.candidates]
    judged = [one for one in scored if one.reward is not None]
    metrics: dict[str, float] = {"verifier_failures": len(scored) - len(judged)}
    if scored:
        lengths = [len(one.candidate.token_ids) for one in scored]
        metrics["completions/mean_length"] = fmean(lengths)
        metrics["completions/min_length"] = min(lengths)
        metrics["completions/max_length"] = max(lengths)
        metrics["completions/clipped_ratio"] = fmean(one.candidate.finish_reason == "length" for one in scored)
    if judged:
        spreads = [
            pstdev(rewards)
            for group in groups
            if (rewards := [one.reward for one in group.candidates if one.reward is not None])
        ]
        metrics["reward"] = fmean(one.reward for one in judged if one.reward is not None)
        metrics["reward_std"] = fmean(spreads)
        metrics["frac_reward_zero_std"] = fmean(spread == 0 for spread in spreads)
        names = sorted({name for one in judged for name in one.components})
        for name in names:
            values = [one.components[name] for one in judged if name in one.components]
            metrics[f"rewards/{name}/mean"] = fmean(values)
        if "rewards/exact_match/mean" in metrics:
            metrics["exact_match"] = metrics["rewards/exact_match/mean"]
    return metrics

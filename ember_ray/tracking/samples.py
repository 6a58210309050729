"""Answers that a run changed: which to show, and what to say of them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from ember_ray.data.scored_group import ScoredCandidate, ScoredGroup
from ember_ray.tracking.rows import prompt_text


@dataclass(frozen=True)
class ChangedSample:
    """One held-out prompt whose greedy answer is another one after the run."""

    request_id: str
    prompt: str
    before: str
    after: str
    before_verdict: str
    after_verdict: str


def changed_samples(before: Sequence[ScoredGroup], after: Sequence[ScoredGroup]) -> list[ChangedSample]:
    """All prompts whose first candidate's text changed, in the order of the prompts.

    Give greedy groups: sampled ones differ by chance.
    """
    later = {group.request_id: group for group in after}
    changed = []
    for group in before:
        other = later.get(group.request_id)
        if other is None or not group.candidates or not other.candidates:
            continue
        old, new = group.candidates[0], other.candidates[0]
        if old.candidate.text != new.candidate.text:
            changed.append(
                ChangedSample(
                    group.request_id,
                    prompt_text(group.prompt),
                    old.candidate.text,
                    new.candidate.text,
                    verdict(old),
                    verdict(new),
                )
            )
    return changed


def draw(samples: Sequence[ChangedSample], count: int, seed: int) -> list[ChangedSample]:
    """Some of them at random, not the best: a reader should see what a run typically does."""
    chosen = sorted(random.Random(seed).sample(range(len(samples)), min(count, len(samples))))
    return [samples[index] for index in chosen]


def verdict(scored: ScoredCandidate) -> str:
    """``exact match``, or the reward and the verifier's reason."""
    return verdict_text(scored.reward, scored.components, scored.reason)


def verdict_text(reward: float | None, components: dict[str, float], reason: str | None) -> str:
    """``verdict`` of the parts, for rows read back from files."""
    if reward is None:
        return f"not judged: {reason}" if reason else "not judged"
    if components.get("exact_match") == 1.0:
        return f"exact match, reward {reward:.2f}"
    return f"reward {reward:.2f}" + (f": {reason}" if reason else "")

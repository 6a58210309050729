"""A scored group as one JSON row: the format of ``rollouts/`` and ``eval/``."""

from __future__ import annotations

from typing import Any

from ember_ray.data.scored_group import ScoredGroup


def group_row(group: ScoredGroup, **extra: Any) -> dict[str, Any]:
    """Prompt, then every candidate with its tokens, log-probabilities, rewards and policy version.

    Log-probabilities keep the nine digits that tell float32 numbers apart.

    Args:
        group: the prompt with its judged candidates.
        extra: further keys of the row, e.g. ``round=3`` or ``kind="greedy"``.
    """
    candidates = []
    for scored in group.candidates:
        made = scored.candidate
        candidates.append(
            {
                "index": made.index,
                "text": made.text,
                "token_ids": list(made.token_ids),
                "logprobs": [float(f"{value:.9g}") for value in made.logprobs],
                "sampling_logprobs": [float(f"{value:.9g}") for value in made.sampling_logprobs],
                "finish_reason": made.finish_reason,
                "reward": scored.reward,
                "rewards": dict(scored.components),
                "reason": scored.reason,
                "policy_version": made.policy_version,
                "cache_exact": made.cache_exact,
                **({"token_versions": made.token_versions, "spans": made.spans} if made.token_versions else {}),
            }
        )
    return {
        **extra,
        "request_id": group.request_id,
        "prompt": group.prompt,
        "prompt_token_ids": list(group.prompt_token_ids),
        "candidates": candidates,
    }


def prompt_text(prompt: list[dict[str, str]] | str) -> str:
    """The last user message of a chat, or the text itself: what a person reads as the prompt."""
    if isinstance(prompt, str):
        return prompt
    users = [message.get("content", "") for message in prompt if message.get("role") == "user"]
    return users[-1] if users else "\n".join(message.get("content", "") for message in prompt)

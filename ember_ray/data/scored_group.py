"""A prompt with its judged candidates: what the coordinator returns and learners and reports read."""

from __future__ import annotations

from dataclasses import dataclass, field

from ember_ray.engine.request import Candidate


@dataclass
class ScoredCandidate:
    """A candidate and what the verifier says of it.

    Attributes:
        candidate: the engine's answer.
        reward: the scalar; None when the verifier failed on it (left out of learning, counted).
        components: by name, e.g. ``parse``, ``schema``, ``fields``, ``f1``, ``exact_match``.
        reason: why it did not get everything, in words; None when there is nothing to say.
    """

    candidate: Candidate
    reward: float | None
    components: dict[str, float] = field(default_factory=dict)
    reason: str | None = None


@dataclass
class ScoredGroup:
    """All candidates of one prompt row, in order of their index.

    Attributes:
        request_id: the id of the row (``Example.id``).
        prompt: the messages or text the row holds, as the user wrote it.
        prompt_token_ids: what the engine was given.
    """

    request_id: str
    prompt: list[dict[str, str]] | str
    prompt_token_ids: tuple[int, ...]
    candidates: list[ScoredCandidate]

"""What a learner's batch may hold beside scored groups: demonstrations and reference log-probabilities."""

from __future__ import annotations

from dataclasses import dataclass

Answer = tuple[tuple[int, ...], tuple[int, ...]]
"""Token ids of a prompt and of an answer to it."""


@dataclass(frozen=True)
class Demonstration:
    """A prompt with an answer that was given, not drawn: to imitate, or the gold answer of `pair_choice` ``oracle``.

    Attributes:
        request_id: the id of the prompt's row.
        prompt_token_ids, completion_token_ids: exactly what is learnt from, stop token included.
        text: the answer for people to read.
        reward: what the verifier gives such an answer.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    completion_token_ids: tuple[int, ...]
    text: str
    reward: float = 1.0


@dataclass(frozen=True)
class ReferenceScore:
    """What the reference policy says of an answer.

    Attributes:
        prompt_token_ids, completion_token_ids: which answer to which prompt.
        logprob: the natural log-probability of the whole answer at temperature 1, summed over its tokens.
    """

    prompt_token_ids: tuple[int, ...]
    completion_token_ids: tuple[int, ...]
    logprob: float

"""What goes into the engine and what comes out: requests and candidates."""

from __future__ import annotations

from dataclasses import dataclass

from ember_ray.engine.sampling_params import SamplingParams


@dataclass(frozen=True)
class GenerationRequest:
    """One prompt and the candidates wanted of it.

    Attributes:
        request_id: the caller's name for it, unique in a batch.
        prompt_token_ids: the prompt, at least one token.
        candidate_indices: which candidates to make, usually ``range(N)``; a retry after a
            crash asks for the missing ones only and gets the same tokens.
        sampling_params: how to draw them.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    candidate_indices: tuple[int, ...]
    sampling_params: SamplingParams


@dataclass
class Candidate:
    """One finished answer.

    Attributes:
        request_id, index: whose answer, and which of its candidates.
        token_ids: generated tokens, a stop token included.
        logprobs: per token, under the model at temperature 1 (what learners use).
        sampling_logprobs: per token, under the distribution it was drawn from.
        text: the tokens decoded without special tokens, cut before a stop string.
        finish_reason: ``stop``, ``length``, ``stop_sequence`` or ``abort``.
        policy_version: the adapter version that made every token of it, or the first where ``token_versions`` is given.
        cache_exact: no KV entry of another version was read while making it.
        token_versions: where the policy changed in the middle, the version that drew each token.
        spans: with them, what it was computed from: (first, last, version), positions of prompt and answer, the last
            excluded, in the order in which they were computed; one that begins again at an earlier position takes the
            place of what was there.
    """

    request_id: str
    index: int
    token_ids: list[int]
    logprobs: list[float]
    sampling_logprobs: list[float]
    text: str
    finish_reason: str
    policy_version: int
    cache_exact: bool = True
    token_versions: list[int] | None = None
    spans: list[tuple[int, int, int]] | None = None


@dataclass
class RequestOutput:
    """A prompt with all its candidates, in order of their index."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    candidates: list[Candidate]

"""Scored groups made by hand, and by the engine on the shipped model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ember_ray.data.scored_group import ScoredCandidate, ScoredGroup
from ember_ray.engine.request import Candidate
from ember_ray.engine.sampling_params import SamplingParams


def scored(
    index: int,
    reward: float | None,
    tokens: Sequence[int] = (5, 6, 2),
    logprobs: Sequence[float] | None = None,
    finish_reason: str = "stop",
    row: str = "row",
) -> ScoredCandidate:
    """A candidate with its reward; the log-probabilities are -1 each if none are given."""
    known = list(logprobs) if logprobs is not None else [-1.0] * len(tokens)
    candidate = Candidate(row, index, list(tokens), known, known, "text", finish_reason, 0)
    return ScoredCandidate(candidate, reward)


def group(*candidates: ScoredCandidate, prompt: Sequence[int] = (10, 11, 12), row: str = "row") -> ScoredGroup:
    return ScoredGroup(row, "prompt", tuple(prompt), list(candidates))


def extraction_groups(llm: Any, num_prompts: int, num_candidates: int, seed: int) -> list[ScoredGroup]:
    """The engine's own candidates of easy extraction prompts, judged by the verifier."""
    from ember_ray.data.extraction import generate_examples
    from verifiers.json_extraction import RewardDesign, verify

    examples = generate_examples("train", "easy", num_prompts, seed)
    params = [SamplingParams(max_tokens=96, seed=1000 * seed + number) for number in range(num_prompts)]
    outputs = llm.generate([example.messages for example in examples], num_candidates, params)
    groups = []
    for example, output in zip(examples, outputs, strict=True):
        judged = [
            verify(candidate.text, example.gold, example.schema, RewardDesign("decomposed"))
            for candidate in output.candidates
        ]
        candidates = [
            ScoredCandidate(candidate, verdict.reward, verdict.components, verdict.reason)
            for candidate, verdict in zip(output.candidates, judged, strict=True)
        ]
        groups.append(ScoredGroup(example.id, example.messages, output.prompt_token_ids, candidates))
    return groups

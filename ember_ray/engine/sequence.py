"""A prompt group and its candidates while they run."""

from __future__ import annotations

from dataclasses import dataclass, field
from hashlib import blake2b

from ember_ray.engine.request import Candidate
from ember_ray.engine.sampling_params import SamplingParams

FINISH_REASONS = (None, "stop", "length", "stop_sequence", "abort")
"""Finish codes as they travel between stages; 0 goes on."""

ABORT = FINISH_REASONS.index("abort")


def prompt_hash(token_ids: tuple[int, ...]) -> int:
    """A signed 64-bit number that stands for the prompt in the counters of random numbers."""
    text = b"".join(token.to_bytes(8, "little") for token in token_ids)
    return int.from_bytes(blake2b(text, digest_size=8).digest(), "little", signed=True)


@dataclass(eq=False)
class PromptGroup:
    """One prompt, computed once for all its candidates, also those of other requests with the same tokens.

    Attributes:
        block_table: KV blocks of the prompt while any candidate is admitted, else empty.
        num_computed: prompt tokens whose K and V are in those blocks (or will be, by a step already scheduled).
        has_last_hidden: the last stage keeps the hidden state behind the last prompt token, from which the first
            token of a candidate that is admitted later is drawn without another pass.
        lane: the micro-batch that runs it.
        num_admitted: candidates that hold the block table.
    """

    token_ids: tuple[int, ...]
    number: int
    keys: list[bytes]
    hash: int
    candidates: list[Sequence] = field(default_factory=list)
    block_table: list[int] = field(default_factory=list)
    num_computed: int = 0
    was_computed: bool = False
    has_last_hidden: bool = False
    lane: int = -1
    num_admitted: int = 0

    @property
    def prompt_done(self) -> bool:
        return self.num_computed == len(self.token_ids)


@dataclass(eq=False)
class Sequence:
    """One candidate in the making.

    Attributes:
        order: its place among all candidates of the batch; later ones are preempted first.
        block_table: its own KV blocks; generated token j lies at slot j of them (the prompt lies in the group's).
        num_computed: generated tokens whose K and V are there; while it decodes, all but the last.
    """

    group: PromptGroup
    request_number: int
    request_id: str
    index: int
    order: int
    params: SamplingParams
    seed: int
    max_tokens: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    sampling_logprobs: list[float] = field(default_factory=list)
    block_table: list[int] = field(default_factory=list)
    num_computed: int = 0
    finish_code: int = 0
    was_admitted: bool = False

    def candidate(self, text: str, policy_version: int) -> Candidate:
        reason = FINISH_REASONS[self.finish_code]
        assert reason is not None
        return Candidate(
            self.request_id,
            self.index,
            self.token_ids,
            self.logprobs,
            self.sampling_logprobs,
            text,
            reason,
            policy_version,
        )

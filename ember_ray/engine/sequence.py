"""A prompt group and its candidates while they run."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b

from ember_ray.engine.block_pool import prefix_keys
from ember_ray.engine.request import Candidate
from ember_ray.engine.sampling_params import SamplingParams

Span = tuple[int, int, int]
"""(first, last, version): positions of prompt and answer, the last excluded, computed under a policy version."""

FINISH_REASONS = (None, "stop", "length", "stop_sequence", "abort")
"""Finish codes as they travel between stages; 0 goes on."""

ABORT = FINISH_REASONS.index("abort")


def prompt_hash(token_ids: tuple[int, ...]) -> int:
    """A signed 64-bit number that stands for the prompt in the counters of random numbers."""
    return int.from_bytes(blake2b(array("q", token_ids).tobytes(), digest_size=8).digest(), "little", signed=True)


@dataclass(eq=False)
class PromptGroup:
    """One prompt, computed once for all its candidates, also those of other requests with the same tokens.

    Attributes:
        block_size: of the KV blocks.
        policy_version: under which the prompt is computed.
        is_shared: its blocks can be found and used by others.
        block_table: KV blocks of the prompt while any candidate is admitted, else empty.
        num_computed: prompt tokens whose K and V are in those blocks (or will be, by a step already scheduled).
        has_last_hidden: the last stage keeps the hidden state behind the last prompt token, from which the first
            token of a candidate that is admitted later is drawn without another pass.
        lane: the micro-batch that runs it.
        num_admitted: candidates that hold the block table.
        spans: what of it was computed under which policy, as far as that is written down: ``num_spanned`` tokens.
    """

    token_ids: tuple[int, ...]
    number: int
    block_size: int
    policy_version: int
    is_shared: bool
    candidates: list[Sequence] = field(default_factory=list)
    block_table: list[int] = field(default_factory=list)
    num_computed: int = 0
    was_computed: bool = False
    has_last_hidden: bool = False
    lane: int = -1
    num_admitted: int = 0
    spans: list[Span] = field(default_factory=list)
    num_spanned: int = 0

    @property
    def prompt_done(self) -> bool:
        return self.num_computed == len(self.token_ids)

    # hashing long prompts takes a while; done when a group's turn comes, the device is busy with those before it

    @cached_property
    def keys(self) -> list[bytes]:
        """Where its blocks stand in the prefix index; empty where they are not shared."""
        return prefix_keys(self.token_ids, self.block_size, self.policy_version) if self.is_shared else []

    @cached_property
    def hash(self) -> int:
        return prompt_hash(self.token_ids)

    def close_span(self, version: int) -> None:
        """Writes down that all that is computed, and not written down yet, was under this version."""
        if self.num_computed > self.num_spanned:
            self.spans.append((self.num_spanned, self.num_computed, version))
            self.num_spanned = self.num_computed

    def restart(self, version: int) -> None:
        """Nothing of it is computed (any more); from here on it is a prompt of this version."""
        self.policy_version = version
        self.__dict__.pop("keys", None)
        self.has_last_hidden = False

    def mix(self) -> None:
        """The policy changes in the middle of it: what is computed from here on is found by nobody."""
        self.policy_version = -1
        self.__dict__["keys"] = []


@dataclass(eq=False)
class Sequence:
    """One candidate in the making.

    Attributes:
        order: its place among all candidates of the batch; later ones are preempted first.
        block_table: its own KV blocks; generated token j lies at slot j of them (the prompt lies in the group's).
        num_computed: generated tokens whose K and V are there; while it decodes, all but the last.
        num_pending: tokens that are planned (or drawn) but not known here yet; 0 where results are awaited.
        slot: its place among those admitted, from 0 to max_num_seqs - 1; -1 while it waits.
        spans: what was computed for it under which policy, in that order; a preemption begins anew. Written down when
            it leaves its place and when the policy changes: ``num_spanned`` generated tokens of those that are there,
            and with ``has_prompt_spans`` the prompt.
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
    num_pending: int = 0
    slot: int = -1
    finish_code: int = 0
    was_admitted: bool = False
    spans: list[Span] = field(default_factory=list)
    num_spanned: int = 0
    has_prompt_spans: bool = False

    @property
    def num_tokens(self) -> int:
        """Generated tokens, those included that are not known yet."""
        return len(self.token_ids) + self.num_pending

    def close_span(self, version: int) -> None:
        """Writes down that all that is computed, and not written down yet, was under this version."""
        group, prompt = self.group, len(self.group.token_ids)
        group.close_span(version)
        if not group.prompt_done:  # none of its own tokens can be computed before
            return
        if not self.has_prompt_spans:
            self.spans += group.spans
            self.has_prompt_spans = True
        if self.num_computed > self.num_spanned:
            self.spans.append((prompt + self.num_spanned, prompt + self.num_computed, version))
            self.num_spanned = self.num_computed

    def candidate(self, text: str, policy_version: int) -> Candidate:
        """What it has become; its spans are written down.

        Args:
            policy_version: that of a candidate that has no token.
        """
        reason = FINISH_REASONS[self.finish_code]
        assert reason is not None
        prompt = len(self.group.token_ids)
        end = prompt + len(self.token_ids) - 1  # nothing follows from the last token; steps behind an end are dropped
        spans = [(first, min(last, end), version) for first, last, version in self.spans if first < end]
        mixed = len({version for _, _, version in spans}) > 1
        versions = _token_versions(spans, prompt, end) if mixed else None
        if versions:
            policy_version = versions[0]
        elif spans:
            policy_version = spans[0][2]
        return Candidate(
            self.request_id,
            self.index,
            self.token_ids,
            self.logprobs,
            self.sampling_logprobs,
            text,
            reason,
            policy_version,
            not mixed,
            versions,
            spans if mixed else None,
        )


def _token_versions(spans: list[Span], prompt: int, end: int) -> list[int]:
    """The version that drew each token: of the first span that computed the position before it."""
    drawn: dict[int, int] = {}
    for first, last, version in spans:
        for place in range(max(first, prompt - 1), last):
            drawn.setdefault(place, version)
    return [drawn[place] for place in range(prompt - 1, end)]

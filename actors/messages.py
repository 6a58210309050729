"""What travels between the driver and the coordinator: settings, prompt rows, results."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

from verifiers.reward_functions import RewardFunction

if TYPE_CHECKING:
    from ember_ray.data.example import Example
    from ember_ray.data.scored_group import ScoredGroup
    from ember_ray.engine.options import EngineOptions


@dataclass(frozen=True)
class Limits:
    """How long a wait may last, in seconds, and how many failures in a row are borne.

    Attributes:
        start: to create the stages and load the model.
        call: for a short call to a stage (publication, counters).
        transport: for one wait of a stage for its peer.
        stall: for a rollout in which no stage takes a step.
        verify: for all reward functions on one candidate.
        failures: pipelines lost one after the other without a new candidate before the run gives up.
    """

    start: float = 300.0
    call: float = 60.0
    transport: float = 120.0
    stall: float = 180.0
    verify: float = 5.0
    failures: int = 3


@dataclass(frozen=True)
class VerifierSettings:
    """Which reward functions judge, and by how many actors.

    Attributes:
        functions: their weighted sum is the reward.
        actors: size of the pool.
    """

    functions: tuple[RewardFunction, ...] = (RewardFunction("json_extraction"),)
    actors: int = 1


@dataclass(frozen=True)
class CoordinatorSettings:
    """Everything the coordinator needs to make its children.

    Attributes:
        engine: the engine's options; ``layer_split`` says how many stages there are.
        threads: torch threads of each stage; None shares the node's cores among the stages on it.
        seed: the run's seed; the random numbers of a round come from (seed, round, prompt, candidate, position).
    """

    engine: EngineOptions
    verifier: VerifierSettings = VerifierSettings()
    seed: int = 0
    threads: int | None = None
    limits: Limits = Limits()


@dataclass(frozen=True)
class PromptRow:
    """A row of the data set and the tokens that the engine is given for it."""

    example: Example
    prompt_token_ids: tuple[int, ...]


@dataclass
class RolloutStats:
    """What a rollout cost.

    Attributes:
        seconds: the whole call.
        seconds_generating: from the first request to the last candidate, recoveries included.
        seconds_verifying: what verification added after the last candidate had come.
        candidates: scored candidates returned.
        generated_tokens: of the returned candidates.
        prefill_tokens, prefix_hit_tokens, preemptions: counted by the first stage; what a stage that died had
            counted since the last look at it is missing.
        verifier_failures: candidates whose reward is None.
        recoveries: pipelines that were lost and made anew.
    """

    seconds: float = 0.0
    seconds_generating: float = 0.0
    seconds_verifying: float = 0.0
    candidates: int = 0
    generated_tokens: int = 0
    prefill_tokens: int = 0
    prefix_hit_tokens: int = 0
    preemptions: int = 0
    verifier_failures: int = 0
    recoveries: int = 0
    policy_version: int = 0

    @property
    def tokens_per_s(self) -> float:
        """Tokens of the returned candidates per second of generation."""
        return self.generated_tokens / self.seconds_generating if self.seconds_generating > 0 else 0.0

    @property
    def prefix_hit_rate(self) -> float:
        """Share of prompt tokens that came from the cache, 0 to 1."""
        asked = self.prefill_tokens + self.prefix_hit_tokens
        return self.prefix_hit_tokens / asked if asked else 0.0


def added(total: RolloutStats, more: RolloutStats) -> RolloutStats:
    """What two rollouts cost together; the policy version is the second one's."""
    summed = {
        field.name: getattr(total, field.name) + getattr(more, field.name)
        for field in dataclasses.fields(RolloutStats)
        if field.name != "policy_version"
    }
    return RolloutStats(**summed, policy_version=more.policy_version)


@dataclass
class RolloutResult:
    """Scored groups in the order of the rows, and what they cost."""

    groups: list[ScoredGroup]
    stats: RolloutStats


@dataclass(frozen=True)
class Progress:
    """A look at the coordinator while it works.

    ``phase`` is ``idle``, ``starting``, ``generating``, ``verifying``, ``recovering``, ``scoring`` or ``publishing``;
    ``reward_mean`` is over the candidates scored so far in this rollout, None before the first.
    """

    phase: str = "idle"
    candidates_done: int = 0
    candidates_total: int = 0
    candidates_scored: int = 0
    generated_tokens: int = 0
    reward_mean: float | None = None
    recoveries: int = 0
    policy_version: int = 0

"""What a step gave, as the engine takes it, whoever computed it."""

from __future__ import annotations

from dataclasses import dataclass, field

from ember_ray.engine.scheduler import StepPlan


@dataclass
class StepResult:
    """Results of a plan, one entry a sample.

    Attributes:
        tokens: new tokens of each sample, up to its end.
        finish_codes: of each sample behind its last new token.
        logprobs, sampling_logprobs: of the new tokens; empty lists on stages that do not sample.
        aborts: numbers of requests that end now.
        switch_to: policy version under which plans are run from here on; -1 leaves it.
    """

    plan: StepPlan
    tokens: list[list[int]]
    finish_codes: list[int]
    logprobs: list[list[float]] = field(default_factory=list)
    sampling_logprobs: list[list[float]] = field(default_factory=list)
    aborts: list[int] = field(default_factory=list)
    switch_to: int = -1

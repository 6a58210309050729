"""GRPO on JSON extraction: ``python -m recipes.grpo_extract [--config PATH] [key=value ...]``.

Each round: N candidates of some prompts from the engine, scored by the verifier; each candidate's advantage is how far
it is above the mean of its prompt's; the learner follows them; its adapter becomes the engine's policy, in place.
Held-out prompts, which are never learnt from, are measured before the first and after the last round.
"""

from __future__ import annotations

from collections import deque

from ember_ray.config.schema import GrpoExtractConfig
from recipes.command import recipe_main
from recipes.learners import GRPO
from recipes.run import Run
from recipes.session import PendingRollout


def loop(run: Run) -> None:
    """Rollout, learning, publication; the rollout may run some rounds ahead of learning."""
    settings = run.config.grpo  # type: ignore[attr-defined]
    ahead: deque[tuple[int, PendingRollout]] = deque()
    for number, rows in run.rounds():
        spare = run.spare_rows(rows, number) if settings.refill else ()
        ahead.append((number, run.start_rollout(rows, number, spare)))
        if len(ahead) > settings.async_steps:
            learn(run, *ahead.popleft())
    while ahead:
        learn(run, *ahead.popleft())


def learn(run: Run, number: int, pending: PendingRollout) -> None:
    """One round, from the candidates on."""
    rollout = pending.result()
    learnt = run.learn(rollout.groups)
    run.publish(number)
    run.record(number, learnt, rollout)


if __name__ == "__main__":
    recipe_main(GrpoExtractConfig, GRPO, loop, "grpo_extract", "GRPO on JSON extraction", __doc__)

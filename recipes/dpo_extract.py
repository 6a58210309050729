"""DPO on JSON extraction: ``python -m recipes.dpo_extract [--config PATH] [key=value ...]``.

Each round: N candidates of some prompts from the engine, scored by the verifier; the best and the worst of each prompt
make a pair; the learner takes the pairs; its adapter becomes the engine's policy, in place. Held-out prompts, which
are never learnt from, are measured before the first and after the last round.
"""

from __future__ import annotations

from ember_ray.config.schema import DpoExtractConfig
from recipes.command import recipe_main
from recipes.learners import DPO
from recipes.run import Run


def loop(run: Run) -> None:
    """Rollout, learning, publication."""
    for number, rows in run.rounds():
        rollout = run.rollout(rows, number)
        learnt = run.learn(run.with_reference(rollout.groups, rows))  # makes the pairs, see ember_ray/train/pairs.py
        if learnt["pairs"]:
            run.publish(number)
        run.record(number, learnt, rollout)


if __name__ == "__main__":
    recipe_main(DpoExtractConfig, DPO, loop, "dpo_extract", "DPO on JSON extraction", __doc__)

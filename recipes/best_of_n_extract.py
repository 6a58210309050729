"""Best-of-N on JSON extraction: ``python -m recipes.best_of_n_extract [--config PATH] [key=value ...]``.

Each round: N candidates of some prompts from the engine, scored by the verifier; the best of each prompt, if it is good
enough, is learnt from as a demonstration (rejection-sampling fine-tuning); the adapter becomes the engine's policy, in
place. Held-out prompts are measured before the first and after the last round; `python -m recipes.evaluate` shows what
choosing among N candidates gives without learning.
"""

from __future__ import annotations

from ember_ray.config.schema import BestOfNExtractConfig
from recipes.command import recipe_main
from recipes.learners import BEST_OF_N
from recipes.run import Run


def loop(run: Run) -> None:
    """Rollout, choice of the best, learning, publication."""
    for number, rows in run.rounds():
        rollout = run.rollout(rows, number)
        learnt = run.learn(rollout.groups)  # keeps the best, see ember_ray/train/best_of_n.py
        if learnt["rows"]:
            run.publish(number)
        run.record(number, learnt, rollout)


if __name__ == "__main__":
    recipe_main(BestOfNExtractConfig, BEST_OF_N, loop, "best_of_n_extract", "Best-of-N on JSON extraction", __doc__)

"""SFT on JSON extraction: ``python -m recipes.sft_extract [--config PATH] [key=value ...]``.

Each round: demonstrations of the training rows, which the learner learns to give (its loss is on the answers only); its
adapter becomes the engine's policy, in place. Generated rows get answers of mixed quality, as people write them;
sft.faults=0 gives clean ones. Held-out prompts are measured before the first and after the last round.
"""

from __future__ import annotations

from ember_ray.config.schema import SftExtractConfig
from recipes.command import recipe_main
from recipes.learners import SFT
from recipes.run import Run


def loop(run: Run) -> None:
    """Demonstrations, learning, publication."""
    for number, rows in run.rounds():
        learnt = run.learn(run.demonstrations(rows))
        run.publish(number)
        run.record(number, learnt)


if __name__ == "__main__":
    recipe_main(SftExtractConfig, SFT, loop, "sft_extract", "SFT on JSON extraction", __doc__)

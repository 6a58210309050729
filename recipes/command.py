"""The command line of a training recipe."""

from __future__ import annotations

import sys
from collections.abc import Callable

from ember_ray.config.cli import run_cli
from ember_ray.config.schema import LearnConfig
from ember_ray.tracking.console import Console
from recipes.learners import Algorithm
from recipes.run import Run
from recipes.setup import plan


def recipe_main(
    config_class: type[LearnConfig], algorithm: Algorithm, loop: Callable[[Run], None], name: str, title: str, doc: str
) -> None:
    """The command line of a training recipe; what was learnt until Ctrl-C or a failure is kept and reported.

    Args:
        name: of the module, which is also that of the shipped configuration.
        title: the first line on the console.
        doc: the module's docstring; what stands behind its first paragraph describes the recipe in ``--help``.
    """

    def main(config: LearnConfig) -> None:
        with Console() as console:
            console.title(title, config.name)
            run = Run(config, algorithm, console)
            status = "failed"
            try:
                run.run(loop)
                status = "finished"
            except KeyboardInterrupt:
                status = "interrupted"
                raise
            finally:
                if hasattr(run, "session"):
                    run.finish(status)

    sys.exit(
        run_cli(
            config_class,
            prog=f"python -m recipes.{name}",
            description=doc.split("\n\n", 1)[1],
            main=main,
            default_config=name,
            plan=lambda config: plan(config, algorithm),
            user_errors=(
                "ember_ray.model.qwen3_config:ModelError",
                "ember_ray.engine.scheduler:RequestError",
                "ember_ray.train.errors:LearnerError",
            ),
        )
    )

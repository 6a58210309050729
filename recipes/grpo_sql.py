"""GRPO on text-to-SQL: ``python -m recipes.grpo_sql [--config PATH] [key=value ...]``.

The loop is that of ``recipes/grpo_extract.py``: candidates, advantages within each prompt, learning, publication.
Queries are judged by what they return on SQLite databases (``verifiers/sql.py``).
"""

from __future__ import annotations

from ember_ray.config.schema import GrpoSqlConfig
from recipes.command import recipe_main
from recipes.grpo_extract import loop
from recipes.learners import GRPO

if __name__ == "__main__":
    recipe_main(GrpoSqlConfig, GRPO, loop, "grpo_sql", "GRPO on text-to-SQL", __doc__)

"""DPO on text-to-SQL: ``python -m recipes.dpo_sql [--config PATH] [key=value ...]``.

The loop is that of ``recipes/dpo_extract.py``: candidates, pairs of the best and the worst, learning, publication.
Queries are judged by what they return on SQLite databases (``verifiers/sql.py``).
"""

from __future__ import annotations

from ember_ray.config.schema import DpoSqlConfig
from recipes.command import recipe_main
from recipes.dpo_extract import loop
from recipes.learners import DPO

if __name__ == "__main__":
    recipe_main(DpoSqlConfig, DPO, loop, "dpo_sql", "DPO on text-to-SQL", __doc__)

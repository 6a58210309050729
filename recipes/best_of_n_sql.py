"""Best-of-N on text-to-SQL: ``python -m recipes.best_of_n_sql [--config PATH] [key=value ...]``.

The loop is that of ``recipes/best_of_n_extract.py``: candidates, the best of each prompt, learning, publication.
Queries are judged by what they return on SQLite databases (``verifiers/sql.py``).
"""

from __future__ import annotations

from ember_ray.config.schema import BestOfNSqlConfig
from recipes.best_of_n_extract import loop
from recipes.command import recipe_main
from recipes.learners import BEST_OF_N

if __name__ == "__main__":
    recipe_main(BestOfNSqlConfig, BEST_OF_N, loop, "best_of_n_sql", "Best-of-N on text-to-SQL", __doc__)

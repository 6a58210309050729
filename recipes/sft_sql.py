"""SFT on text-to-SQL: ``python -m recipes.sft_sql [--config PATH] [key=value ...]``.

The loop is that of ``recipes/sft_extract.py``: demonstrations of the training rows, learning, publication.
Queries are judged by what they return on SQLite databases (``verifiers/sql.py``).
"""

from __future__ import annotations

from ember_ray.config.schema import SftSqlConfig
from recipes.command import recipe_main
from recipes.learners import SFT
from recipes.sft_extract import loop

if __name__ == "__main__":
    recipe_main(SftSqlConfig, SFT, loop, "sft_sql", "SFT on text-to-SQL", __doc__)

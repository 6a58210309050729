"""The extraction task: seeded documents in, chat prompts with gold JSON out."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Literal, get_args

from ember_ray.data.document import Document
from ember_ray.data.easy_documents import easy_document
from ember_ray.data.example import Example
from ember_ray.data.hard_documents import hard_document
from ember_ray.data.rule_documents import rule_document
from ember_ray.data.splits import SPLITS, Split, split_of

Difficulty = Literal["easy", "hard", "hard_rule"]
DIFFICULTIES: tuple[Difficulty, ...] = get_args(Difficulty)

_BUILDERS: dict[str, Callable[[random.Random], Document]] = {
    "easy": easy_document,
    "hard": hard_document,
    "hard_rule": rule_document,
}


def generate_examples(split: Split, difficulty: Difficulty, count: int, seed: int) -> list[Example]:
    """Makes ``count`` different examples, the same ones on every machine.

    The first n of a longer call are those of a shorter one. No document subject occurs in two splits
    (see ``splits.split_of``), so no (template, values) instance does either.

    Raises:
        ValueError: an unknown split or difficulty, or a negative count.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split '{split}' (known: {', '.join(SPLITS)})")
    if difficulty not in DIFFICULTIES:
        raise ValueError(f"unknown difficulty '{difficulty}' (known: {', '.join(DIFFICULTIES)})")
    if count < 0:
        raise ValueError(f"count must be at least 0, not {count}")
    rng = random.Random(f"extraction/{split}/{difficulty}/{seed}")  # a string seed goes through SHA-512
    build = _BUILDERS[difficulty]
    examples: list[Example] = []
    seen: set[str] = set()
    while len(examples) < count:
        document = build(rng)
        if split_of(document.identity) != split or document.text in seen:
            continue
        seen.add(document.text)
        examples.append(
            Example(
                id=f"{split}-{difficulty}-{seed}-{len(examples)}",
                messages=[{"role": "user", "content": f"{document.instruction}\n\n{document.text}"}],
                gold=document.gold,
                schema=document.schema,
                template=document.template,
                difficulty=difficulty,
            )
        )
    return examples

"""Which rows are for training and which are held out."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from typing import Literal, get_args

from ember_ray.data.example import Example

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)


def split_of(identity: str) -> Split:
    """Deals identities to splits, 8 : 1 : 1, by SHA-256, so the same on every machine.

    The identity of a document is the values that name its subject (an invoice number, a person's name). It is
    part of the document and of the gold answer, so two splits share no instance, whatever the template or the
    seed, and the names asked for in validation and test never occur as such in training.
    """
    bucket = int.from_bytes(hashlib.sha256(identity.encode()).digest()[:8], "big") % 10
    return "validation" if bucket == 0 else "test" if bucket == 1 else "train"


def hold_out(rows: Sequence[Example], most: int, seed: int) -> tuple[list[Example], list[Example]]:
    """Splits a user's own rows where there is no file of held-out ones.

    A fifth of the distinct prompts, at most ``most`` and at least one, drawn by the seed; all rows of a prompt go to
    the same side, and of a held-out prompt the first row is measured.

    Returns:
        Training and held-out rows, each in the order in which they came.

    Raises:
        ValueError: fewer than two distinct prompts.
    """
    first: dict[str, Example] = {}
    for row in rows:
        first.setdefault(_prompt_key(row), row)
    if len(first) < 2:
        raise ValueError("there is only one distinct prompt, so none can be held out; give data.eval")
    drawn = set(random.Random(f"hold out/{seed}").sample(sorted(first), max(1, min(most, len(first) // 5))))
    held_out = [row for key, row in first.items() if key in drawn]
    return [row for row in rows if _prompt_key(row) not in drawn], held_out


def _prompt_key(row: Example) -> str:
    return "\x1f".join(f"{message['role']}\x1e{message['content']}" for message in row.messages)

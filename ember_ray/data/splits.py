"""Which split a generated document belongs to."""

from __future__ import annotations

import hashlib
from typing import Literal, get_args

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

"""A generated document with what is asked of it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Document:
    """Attributes:
    kind: ``invoice``, ``order``, ``event`` or ``person``.
    template: name of the template that wrote the text.
    identity: the values that name its subject; they decide the split.
    instruction: what the user asks for, rules included.
    text: the document itself.
    gold: the right answer.
    schema: JSON Schema of an answer.
    """

    kind: str
    template: str
    identity: str
    instruction: str
    text: str
    gold: object
    schema: dict

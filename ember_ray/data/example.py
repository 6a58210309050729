"""One row of a dataset: what the policy is asked, and what the verifier alone may see."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Example:
    """A prompt with its gold answer.

    Attributes:
        id: the row's name, unique in its dataset.
        messages: the chat, ``{"role": ..., "content": ...}`` each; it ends with the user's turn and
            never holds the gold answer.
        gold: the JSON value that the verifier compares with.
        schema: the JSON Schema that an answer must satisfy; None where there is none.
        template: the template of a generated row; None for a user's own.
        difficulty: ``easy``, ``hard`` or ``hard_rule`` of a generated row; None for a user's own.
    """

    id: str
    messages: list[dict[str, str]]
    gold: object
    schema: dict | None = None
    template: str | None = None
    difficulty: str | None = None

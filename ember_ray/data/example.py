"""One row of a dataset: what the policy is asked, and what the verifier and the learners alone may see."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Example:
    """A prompt with what is known of good and bad answers to it.

    Attributes:
        id: the row's name, unique in its dataset.
        messages: the chat, ``{"role": ..., "content": ...}`` each; it ends with the user's turn and
            never holds the gold answer.
        gold: what the verifier compares with (a JSON value, a SQL query); None where there is nothing to compare with.
        schema: the JSON Schema that an answer must satisfy; None where there is none.
        template: the template of a generated row; None for a user's own.
        difficulty: ``easy``, ``hard`` or ``hard_rule`` of a generated row; None for a user's own.
        columns: every further column of the row by name, for reward functions, e.g. ``databases`` of a SQL row.
        completion: a demonstration, the text that SFT learns to answer; None where there is none.
        chosen: the better answer of a preference; None where there is none.
        rejected: the worse answer of a preference; None where there is none.
        is_text: the row had a plain text as prompt; ``messages`` is then that text as the only turn, the user's.
    """

    id: str
    messages: list[dict[str, str]]
    gold: object = None
    schema: dict | None = None
    template: str | None = None
    difficulty: str | None = None
    columns: Mapping[str, object] = field(default_factory=dict)
    completion: str | None = None
    chosen: str | None = None
    rejected: str | None = None
    is_text: bool = False

    def reward_columns(self) -> dict[str, object]:
        """What reward functions get of the row beside prompt and answer, by column name.

        ``gold`` and ``schema`` (None where the row has none), then ``id``, ``template`` and ``difficulty`` where the
        row has them, then all of ``columns``, which may not carry one of those names.
        """
        named = {"id": self.id, "template": self.template, "difficulty": self.difficulty}
        known = {name: value for name, value in named.items() if value is not None}
        return {"gold": self.gold, "schema": self.schema, **known, **self.columns}

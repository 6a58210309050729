"""What is wrong with a dataset, told all at once."""

from __future__ import annotations

from ember_ray.config.errors import UserError

MAX_FAULTS = 20


class DataError(UserError):
    """A dataset that cannot be used.

    Attributes:
        faults: ``file:row: what is wrong`` each, all of them; the text shows the first 20.
    """

    def __init__(self, faults: list[str]) -> None:
        self.faults = faults
        more = len(faults) - MAX_FAULTS
        super().__init__("; ".join(faults[:MAX_FAULTS]) + (f"; and {more} more" if more > 0 else ""))


def kind_of(value: object) -> str:
    """A value's kind in words, for faults."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a boolean"
    if isinstance(value, int | float):
        return "a number"
    if isinstance(value, str):
        return "a string" if value.strip() else "an empty string"
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    return "an object" if isinstance(value, dict) else f"a value of type {type(value).__name__}"

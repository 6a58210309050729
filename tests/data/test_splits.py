"""Rows held out of a user's own file: no prompt on both sides, the same ones for the same seed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ember_ray.data.example import Example
from ember_ray.data.splits import hold_out


def row(number: int, prompt: int) -> Example:
    return Example(f"row {number}", [{"role": "user", "content": f"prompt {prompt}"}], gold=number)


@given(st.lists(st.integers(0, 40), min_size=2).filter(lambda prompts: len(set(prompts)) > 1), st.integers(1, 9))
def test_no_prompt_is_on_both_sides_and_no_row_of_training_is_lost(prompts: list[int], most: int) -> None:
    rows = [row(number, prompt) for number, prompt in enumerate(prompts)]
    train, held_out = hold_out(rows, most, seed=3)
    assert (train, held_out) == hold_out(rows, most, seed=3)
    left, kept = ({one.messages[0]["content"] for one in side} for side in (train, held_out))
    assert not left & kept and left | kept == {f"prompt {prompt}" for prompt in prompts}
    assert 1 <= len(held_out) == len(kept) <= most and len(kept) <= max(1, len(set(prompts)) // 5)
    assert train == [one for one in rows if one.messages[0]["content"] in left]
    first = {one.messages[0]["content"]: one for one in reversed(rows)}
    assert held_out == [one for one in rows if first[one.messages[0]["content"]] is one and one not in train]


def test_another_seed_holds_out_others() -> None:
    rows = [row(number, number) for number in range(100)]
    assert hold_out(rows, 20, 0)[1] != hold_out(rows, 20, 1)[1]


def test_a_single_prompt_cannot_be_split() -> None:
    with pytest.raises(ValueError, match="only one distinct prompt"):
        hold_out([row(0, 1), row(1, 1)], 5, 0)

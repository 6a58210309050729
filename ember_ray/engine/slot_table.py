"""What the host knows of the candidates in each slot, as arrays from which the rows of a step are picked."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np

from cuda_ext.decode_state import MAX_STOP_IDS
from ember_ray.engine.sequence import Sequence
from ember_ray.engine.stop_check import StopCheck

_FIELDS = {
    "prompt_len": np.int32,
    "max_tokens": np.int32,
    "temperature": np.float32,
    "top_k": np.int32,
    "top_p": np.float32,
    "min_p": np.float32,
    "seed": np.int64,
    "prompt_hash": np.int64,
    "candidate": np.int32,
}


class SlotTable:
    """The constant part of each slot's candidate; names and dtypes are those of cuda_ext.decode_state.RowParams."""

    def __init__(self, slots: int, stop_check: StopCheck) -> None:
        self._stop_check = stop_check
        self._arrays: dict[str, np.ndarray] = {name: np.zeros(slots, dtype) for name, dtype in _FIELDS.items()}
        self._arrays["stop_ids"] = np.full((slots, MAX_STOP_IDS), -1, dtype=np.int32)
        self._owners: list[Sequence | None] = [None] * slots

    def owns(self, sequence: Sequence) -> bool:
        """Whether the candidate was admitted to the slot that it has now."""
        return self._owners[sequence.slot] is sequence

    def forget_owners(self) -> None:
        self._owners = [None] * len(self._owners)

    def admit(self, sequences: Seq[Sequence]) -> None:
        """Notes candidates in their slots."""
        arrays = self._arrays
        for sequence in sequences:
            slot, params = sequence.slot, sequence.params
            self._owners[slot] = sequence
            arrays["prompt_len"][slot] = len(sequence.group.token_ids)
            arrays["max_tokens"][slot] = sequence.max_tokens
            arrays["temperature"][slot] = params.temperature
            arrays["top_k"][slot] = min(params.top_k, 2**31 - 1)
            arrays["top_p"][slot] = params.top_p
            arrays["min_p"][slot] = params.min_p
            arrays["seed"][slot] = sequence.seed
            arrays["prompt_hash"][slot] = sequence.group.hash
            arrays["candidate"][slot] = sequence.index
            stop_ids = self._stop_ids(sequence)[:MAX_STOP_IDS]
            arrays["stop_ids"][slot] = stop_ids + [-1] * (MAX_STOP_IDS - len(stop_ids))

    def rows(self, sequences: Seq[Sequence]) -> dict[str, np.ndarray]:
        """The RowParams arrays of a step with these candidates as its rows."""
        slots = np.array([sequence.slot for sequence in sequences], dtype=np.int32)
        return {"slot": slots} | {name: array[slots] for name, array in self._arrays.items()}

    def needs_host(self, sequence: Sequence) -> bool:
        """Whether the candidate may end by something that the device does not look for."""
        return bool(sequence.params.stop) or len(self._stop_ids(sequence)) > MAX_STOP_IDS

    def _stop_ids(self, sequence: Sequence) -> list[int]:
        """Those that can be drawn at all; a request may name any number."""
        return sorted(token for token in self._stop_check.stop_ids(sequence.params) if 0 <= token < 2**31)

"""The device arrays that captured decode steps read: who the rows are, and where their K and V lie."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from cuda_ext.decode_groups import (
    FEW_ROWS_SPLIT_TOKENS,
    SPLIT_TOKENS,
    DecodeArrays,
    DecodeCapacity,
    DecodeGroups,
    build_decode_groups,
)
from cuda_ext.decode_state import MAX_STOP_IDS, RowParams
from ember_ray.engine.sequence import Sequence
from ember_ray.engine.step_inputs import decode_group_arrays
from ember_ray.engine.upload import DeviceBuffers

_ROW_DTYPES = {
    "slot": torch.int32,
    "prompt_len": torch.int32,
    "max_tokens": torch.int32,
    "stop_ids": torch.int32,
    "temperature": torch.float32,
    "top_k": torch.int32,
    "top_p": torch.float32,
    "min_p": torch.float32,
    "seed": torch.int64,
    "prompt_hash": torch.int64,
    "candidate": torch.int32,
}


ROWS_AND_SPLITS = ((8, FEW_ROWS_SPLIT_TOKENS), (32, 256))
MANY_ROWS_SPLIT = 1024


def split_tokens(rows: int, block_size: int) -> int:
    """Tokens of a piece of attention's work in an engine of at most ``rows`` rows.

    Long pieces leave few partial results to merge, short ones let many multiprocessors share a few sequences. Fixed for
    an engine, so that a row's result never depends on what else is in the batch. On an H200, prompts of 2048 tokens, a
    layer with its rotation takes 8.1 us for one row and 10.7 for a group of 8 in pieces of 128, which one launch does,
    and 11.3 and 11.9 in pieces of 256; for 4 groups of 8 it is 27.9 against 25.7.
    """
    split = next((split for most, split in ROWS_AND_SPLITS if rows <= most), MANY_ROWS_SPLIT)
    return SPLIT_TOKENS if split % block_size else split


def _grown(have: DecodeCapacity, need: DecodeCapacity) -> DecodeCapacity:
    """Twice the need where it is more than there is."""
    fields = ("prefix_blocks", "suffix_blocks", "items", "partials")
    more = {name: 2 * getattr(need, name) for name in fields if getattr(need, name) > getattr(have, name)}
    return replace(have, **more)


class DecodeBuffers:
    """Row parameters and decode groups at fixed places.

    Args:
        rows: most rows of a step.
        share: query heads of a KV head.
    """

    def __init__(self, rows: int, block_size: int, share: int, device: str) -> None:
        self._rows, self._block_size, self._share, self._device = rows, block_size, share, device
        self._split = split_tokens(rows, block_size)
        shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            name: ((rows, MAX_STOP_IDS) if name == "stop_ids" else (rows,), dtype)
            for name, dtype in _ROW_DTYPES.items()
        }
        self._buffers = DeviceBuffers(shapes | {"step": ((1,), torch.int32)}, device)
        self._make_groups(DecodeCapacity(rows, rows, 64 * rows, 32 * rows, 8 * rows, 8 * rows))
        self._next: DecodeArrays | None = None
        self.clear()

    def _make_groups(self, capacity: DecodeCapacity) -> None:
        empty = build_decode_groups(
            [], [], [], [], [], block_size=self._block_size, heads_per_kv_head=self._share, capacity=capacity,
            split_tokens=self._split,
        )  # fmt: skip
        # on a CPU the first shares the memory of the arrays that it is made of
        self._groups, self._padding = empty.to(self._device), empty.laid_out(capacity)

    @property
    def step(self) -> Tensor:
        """[1] int32, the step within a plan; 0 after each fill."""
        return self._buffers.tensors["step"]

    def clear(self) -> None:
        """Makes all rows padding."""
        self._fill({"slot": np.empty(0, np.int32)}, self._padding)

    def prepare(self, decodes: Seq[Sequence], counts: Seq[int]) -> bool:
        """Arranges the groups of a plan for :meth:`fill`.

        Args:
            counts: decode steps that are planned for each.

        Returns:
            Whether the buffers had to be made anew, at other places, because they were too small.
        """
        arrays = decode_group_arrays(decodes, self._block_size, self._share, counts, self._split)
        moved = not self._groups.capacity.holds(arrays.capacity)
        if moved:
            self._make_groups(_grown(self._groups.capacity, arrays.capacity))
        self._next = arrays.laid_out(self._groups.capacity)
        return moved

    def fill(self, rows: dict[str, np.ndarray]) -> None:
        """Uploads a plan's rows and the groups that :meth:`prepare` arranged."""
        assert self._next is not None
        self._fill(rows, self._next)
        self._next = None

    def _fill(self, rows: dict[str, np.ndarray], groups: DecodeArrays) -> None:
        slot = np.full(self._rows, -1, dtype=np.int32)
        slot[: len(rows["slot"])] = rows["slot"]
        self._buffers.fill(rows | {"slot": slot, "step": np.zeros(1, np.int32)})
        # A row that ended in the plan before may have left counts: its suffix shrinks then, and a launch that still saw
        # the long one has counted pieces that nobody waits for. The row's next owner must not take them for its own.
        self._groups.arrivals.zero_()
        staging = torch.from_numpy(groups.storage)
        if self._groups.storage.is_cuda:
            staging = staging.pin_memory()
        self._groups.storage.copy_(staging, non_blocking=True)

    def params(self, rows: int) -> RowParams:
        """The first rows' parameters."""
        return RowParams(**{name: self._buffers.tensors[name][:rows] for name in _ROW_DTYPES})

    @property
    def groups(self) -> DecodeGroups:
        """Of the plan that was filled in last; a new object each time: it remembers what is made of them."""
        return replace(self._groups)

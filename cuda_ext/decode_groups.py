"""Which KV blocks the candidates of a decode step read, arranged by group: built on the host, read by the kernels.

The arrays are in the form of compressed sparse rows. Work is cut over the sequence in pieces of ``split_tokens``
tokens, which depend on the sequence alone; partial results are merged in an order that their number fixes. So a row's
result does not depend on what else is in the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

SPLIT_TOKENS = 512
"""Tokens of a piece where nothing else is asked for."""

FEW_ROWS_SPLIT_TOKENS = 128
"""Tokens of a piece for which one launch does all: it answers soonest where rows are few."""

MAX_KV_HEADS = 64
"""KV heads that the kernel of that launch counts arrivals for."""

ITEM_QUERY_ROWS = 64
"""Query rows of one KV head (candidates times query heads) that the kernel takes at once."""

ITEM_FIELDS = 8
"""int32 fields of an item, as ``csrc/decode_attention.cuh`` names them."""


@dataclass(frozen=True)
class DecodeCapacity:
    """Sizes of the arrays; a captured graph keeps them while their contents change.

    Attributes:
        rows, groups: of the batch, padding included.
        prefix_blocks, suffix_blocks: KV blocks over all groups, and over all rows.
        items: pieces of work.
        partials: partial results.
    """

    rows: int
    groups: int
    prefix_blocks: int
    suffix_blocks: int
    items: int
    partials: int

    @property
    def sizes(self) -> dict[str, int]:
        """Length of each array, in the order in which they lie in one storage (items first: they want alignment)."""
        return {
            "items": self.items * ITEM_FIELDS,
            "num_items": 1,
            "row_group": self.rows,
            "suffix_starts": self.rows,
            "suffix_lens": self.rows,
            "partial_starts": self.rows,
            "prefix_starts": self.groups,
            "prefix_lens": self.groups,
            "prefix_blocks": self.prefix_blocks,
            "suffix_blocks": self.suffix_blocks,
        }

    def holds(self, other: DecodeCapacity) -> bool:
        return all(size <= self.sizes[name] for name, size in other.sizes.items()) and other.partials <= self.partials


@dataclass(frozen=True)
class PaddedGroups:
    """The same as rectangles, for matrix products over whole batches.

    Attributes:
        rows: [real rows] int64, the rows that are no padding; None where all are real.
        group_rows: [groups, most candidates] int64, places among the real rows; padded with any valid one.
        row_group, row_place: [real rows] int64, where each stands in group_rows.
        prefix_slots: [groups, longest prefix] int64, padded with any valid slot.
        prefix_mask: [groups, longest prefix] float32, 0 or -inf where padded.
        suffix_slots: [real rows, longest suffix] int64, the current token's slot included.
        suffix_mask: [real rows, longest suffix] float32, 0 or -inf where padded.
    """

    rows: Tensor | None
    group_rows: Tensor
    row_group: Tensor
    row_place: Tensor
    prefix_slots: Tensor
    prefix_mask: Tensor
    suffix_slots: Tensor
    suffix_mask: Tensor


@dataclass(frozen=True)
class DecodeGroups:
    """Candidates that decode one token each; those of a group are consecutive rows.

    All tensors are int32 on the device of the KV cache and may be longer than what is used. But for ``suffix_lens``
    the kernels read them before their predecessors have ended: fill them by copies or torch operations.

    Attributes:
        row_group: [rows], -1 for padding rows, whose output is zero.
        prefix_blocks: KV blocks of all groups' prefixes, one group after another.
        prefix_starts, prefix_lens: [groups], where in them each group begins, and its tokens (at least 1).
        suffix_blocks: KV blocks of all rows' suffixes, one row after another.
        suffix_starts, suffix_lens: [rows], the same; the length counts the current token and may grow, on the device,
            as far as the arrays were built for; 0 only for padding.
        partial_starts: [rows], index of the row's first partial result.
        items: [n, 8], the kernel's pieces of work, the longest first; see ``csrc/decode_attention.cuh``.
        num_items: [1].
        storage: the one tensor that all of the above are parts of, in the layout of ``capacity``.
        arrivals: [rows, MAX_KV_HEADS], how many pieces of a row are done while a launch runs that does all in one; zero
            between launches. Two launches at the same time need groups of their own. Empty for pieces of other lengths.
        capacity: the sizes.
        block_size: tokens of a KV block.
        heads_per_kv_head: query heads that share a KV head; items were cut for no more.
        split_tokens: tokens of a piece.
    """

    row_group: Tensor
    prefix_blocks: Tensor
    prefix_starts: Tensor
    prefix_lens: Tensor
    suffix_blocks: Tensor
    suffix_starts: Tensor
    suffix_lens: Tensor
    partial_starts: Tensor
    items: Tensor
    num_items: Tensor
    storage: Tensor
    arrivals: Tensor
    capacity: DecodeCapacity
    block_size: int
    heads_per_kv_head: int
    split_tokens: int = SPLIT_TOKENS

    @property
    def num_partials(self) -> int:
        return self.capacity.partials

    @cached_property
    def padded(self) -> PaddedGroups:
        """As rectangles, with the suffix lengths of now: made once, so they must not change afterwards."""
        return _padded(self)


@dataclass(frozen=True)
class DecodeArrays:
    """:class:`DecodeGroups` on the host: one int32 array whose parts the capacity lays out."""

    storage: np.ndarray
    capacity: DecodeCapacity
    block_size: int
    heads_per_kv_head: int
    split_tokens: int = SPLIT_TOKENS

    def parts(self) -> dict[str, np.ndarray]:
        """The named arrays, as views."""
        return _cut(self.storage, self.capacity)

    def laid_out(self, capacity: DecodeCapacity) -> DecodeArrays:
        """The same in arrays of other sizes; rows beyond those given are padding.

        Raises:
            ValueError: the capacity is too small.
        """
        if not capacity.holds(self.capacity):
            raise ValueError(f"{self.capacity} is needed, more than the given {capacity}")
        storage = np.zeros(sum(capacity.sizes.values()), dtype=np.int32)
        target = _cut(storage, capacity)
        target["row_group"][:] = -1
        for name, values in self.parts().items():
            target[name][: len(values)] = values
        return DecodeArrays(storage, capacity, self.block_size, self.heads_per_kv_head, self.split_tokens)

    def to(self, device: str | torch.device) -> DecodeGroups:
        """On a device, in one copy, which the host does not wait for."""
        host = torch.from_numpy(self.storage)
        storage = (host.pin_memory() if torch.device(device).type == "cuda" else host).to(device, non_blocking=True)
        counted = self.capacity.rows if self.split_tokens == FEW_ROWS_SPLIT_TOKENS else 0
        return DecodeGroups(
            **_cut(storage, self.capacity),
            storage=storage,
            arrivals=torch.zeros(counted, MAX_KV_HEADS, dtype=torch.int32, device=device),
            capacity=self.capacity,
            block_size=self.block_size,
            heads_per_kv_head=self.heads_per_kv_head,
            split_tokens=self.split_tokens,
        )


_Array = TypeVar("_Array", np.ndarray, Tensor)


def _cut(storage: _Array, capacity: DecodeCapacity) -> dict[str, _Array]:
    parts: dict[str, _Array] = {}
    begin = 0
    for name, size in capacity.sizes.items():
        parts[name] = storage[begin : begin + size]
        begin += size
    parts["items"] = parts["items"].reshape(-1, ITEM_FIELDS)
    return parts


def _flat(tables: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """All entries one after another, and the number of each table's."""
    counts = np.fromiter(map(len, tables), dtype=np.int32, count=len(tables))
    return np.fromiter(chain.from_iterable(tables), dtype=np.int32, count=int(counts.sum())), counts


def _starts(counts: np.ndarray) -> np.ndarray:
    return np.cumsum(counts, dtype=np.int32) - counts


def _enumerate(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For counts (2, 3): owners (0, 0, 1, 1, 1) and places (0, 1, 0, 1, 2)."""
    owners = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    return owners, np.arange(len(owners), dtype=np.int32) - _starts(counts)[owners]


def build_decode_groups(
    prefix_blocks: Sequence[Sequence[int]],
    prefix_lens: Sequence[int],
    num_rows: Sequence[int],
    suffix_blocks: Sequence[Sequence[int]],
    suffix_lens: Sequence[int],
    *,
    block_size: int,
    heads_per_kv_head: int,
    steps: int = 1,
    capacity: DecodeCapacity | None = None,
    split_tokens: int = SPLIT_TOKENS,
) -> DecodeArrays:
    """Arranges decoding candidates for attention that reads each group's prefix once.

    Args:
        prefix_blocks: per group, the KV blocks of its prefix.
        prefix_lens: per group, tokens of its prefix.
        num_rows: per group, how many rows it has; they follow one another.
        suffix_blocks: per row, the KV blocks of its suffix, for all steps.
        suffix_lens: per row, tokens of its suffix in the first step, the current one included.
        block_size: tokens of a KV block.
        heads_per_kv_head: query heads that share a KV head.
        steps: for how many decode steps the arrays stay valid, each one token longer than the one before.
        capacity: sizes of the arrays; rows beyond those given are padding. By default what is needed.
        split_tokens: tokens of a piece.

    Raises:
        ValueError: a length is below 1, blocks are missing, the numbers of rows do not match, or the capacity is too
            small.
    """
    prefix_flat, prefix_counts = _flat(prefix_blocks)
    suffix_flat, suffix_counts = _flat(suffix_blocks)
    prefix, suffix, rows_of = (np.asarray(values, dtype=np.int32) for values in (prefix_lens, suffix_lens, num_rows))
    if not len(prefix) == len(prefix_counts) == len(rows_of) or not len(suffix) == len(suffix_counts) == rows_of.sum():
        raise ValueError(
            f"{len(prefix_counts)} prefixes with {len(prefix)} lengths and {len(rows_of)} numbers of rows, "
            f"{len(suffix_counts)} suffixes with {len(suffix)} lengths for {int(rows_of.sum())} rows do not match"
        )
    if (prefix < 1).any() or (suffix < 1).any() or (rows_of < 1).any() or steps < 1:
        raise ValueError("every prefix, suffix and group must hold at least 1 token or row, for at least 1 step")
    if (prefix_counts * block_size < prefix).any() or (suffix_counts * block_size < suffix + (steps - 1)).any():
        raise ValueError(f"a block table of blocks of {block_size} is too short for its tokens after {steps} steps")

    row_group = np.repeat(np.arange(len(prefix), dtype=np.int32), rows_of)
    prefix_starts, suffix_starts, first_rows = _starts(prefix_counts), _starts(suffix_counts), _starts(rows_of)
    prefix_splits = (prefix + split_tokens - 1) // split_tokens
    own_splits = (suffix + (steps - 2)) // split_tokens  # full pieces before the last one, at the last step
    partials = prefix_splits[row_group] + own_splits

    # a group with more candidates than the kernel takes at once is cut evenly; parts of one piece stay neighbours
    most_rows = max(1, ITEM_QUERY_ROWS // heads_per_kv_head)
    parts = (rows_of + most_rows - 1) // most_rows
    group, place = _enumerate(prefix_splits * parts)
    split, part = place // parts[group], place % parts[group]
    base, extra = (rows_of // parts)[group], (rows_of % parts)[group]
    row, own_split = _enumerate(own_splits)
    columns = (
        (first_rows[group] + part * base + np.minimum(part, extra), row),
        (base + (part < extra), 1),
        (split, prefix_splits[row_group[row]] + own_split),
        (0, 1),
        (
            prefix_starts[group] + split * split_tokens // block_size,
            suffix_starts[row] + own_split * split_tokens // block_size,
        ),
        (np.minimum(split_tokens, prefix[group] - split * split_tokens), split_tokens),
        (-1, (own_split + 1) * split_tokens),
        (0, 0),
    )
    items = np.empty((len(group) + len(row), ITEM_FIELDS), dtype=np.int32)
    for field, (of_prefix, of_suffix) in enumerate(columns):
        items[: len(group), field] = of_prefix
        items[len(group) :, field] = of_suffix
    items = items[np.argsort(-items[:, 5], kind="stable")]

    needed = DecodeCapacity(
        len(suffix), len(prefix), len(prefix_flat), len(suffix_flat), len(items), int(partials.sum())
    )
    capacity = capacity or needed
    if not capacity.holds(needed):
        raise ValueError(f"{needed} is needed, more than the given {capacity}")
    storage = np.zeros(sum(capacity.sizes.values()), dtype=np.int32)
    target = _cut(storage, capacity)
    target["row_group"][len(suffix) :] = -1
    target["num_items"][0] = len(items)
    for name, values in {
        "items": items,
        "row_group": row_group,
        "suffix_starts": suffix_starts,
        "suffix_lens": suffix,
        "partial_starts": _starts(partials),
        "prefix_starts": prefix_starts,
        "prefix_lens": prefix,
        "prefix_blocks": prefix_flat,
        "suffix_blocks": suffix_flat,
    }.items():
        target[name][: len(values)] = values
    return DecodeArrays(storage, capacity, block_size, heads_per_kv_head, split_tokens)


def _rectangle(blocks: np.ndarray, starts: np.ndarray, lens: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Slots of each sequence, padded with its first, and the float32 mask of the padding."""
    width = int(lens.max(initial=1))
    places = np.minimum(np.arange(-(-width // size)), (lens[:, None] - 1) // size)
    tables = blocks[starts[:, None] + places].astype(np.int64)
    slots = (tables[:, :, None] * size + np.arange(size)).reshape(len(lens), places.shape[1] * size)[:, :width]
    inside = np.arange(width) < lens[:, None]
    # positions behind the end point at the first token: never at a slot that nothing was written to
    return np.where(inside, slots, slots[:, :1]), np.where(inside, 0.0, -np.inf).astype(np.float32)


def _padded(groups: DecodeGroups) -> PaddedGroups:
    device = groups.storage.device
    arrays = {name: part.numpy() for name, part in _cut(groups.storage.cpu(), groups.capacity).items()}
    of_row, size = arrays["row_group"], groups.block_size
    rows = np.flatnonzero(of_row >= 0)
    names, row_group = np.unique(of_row[rows], return_inverse=True)
    counts = np.bincount(row_group)
    row_place = np.arange(len(rows)) - _starts(counts)[row_group]
    group_rows = np.zeros((len(names), int(counts.max(initial=0))), dtype=np.int64)
    group_rows[row_group, row_place] = np.arange(len(rows))

    def tensor(array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device)

    prefix = _rectangle(arrays["prefix_blocks"], arrays["prefix_starts"][names], arrays["prefix_lens"][names], size)
    suffix = _rectangle(arrays["suffix_blocks"], arrays["suffix_starts"][rows], arrays["suffix_lens"][rows], size)
    return PaddedGroups(
        None if len(rows) == len(of_row) else tensor(rows),
        tensor(group_rows),
        tensor(row_group.astype(np.int64)),
        tensor(row_place.astype(np.int64)),
        *map(tensor, prefix),
        *map(tensor, suffix),
    )

"""Turns a step plan into the tensors of one forward pass."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cuda_ext.attention import DecodeGroups, PrefillChunk
from ember_ray.engine.scheduler import StepPlan
from ember_ray.engine.sequence import PromptGroup, Sequence


@dataclass(frozen=True)
class StepInputs:
    """Rows of one forward pass: the decodes first, then prompt chunks, then suffix chunks.

    Attributes:
        token_ids, positions, slots: [tokens] int64.
        num_decodes: how many rows decode.
        decode_groups: None where nothing decodes.
        prefill_chunks: row ranges over all rows, decodes included.
        hidden_rows: [unique] int64, rows whose hidden state behind the last layer is needed.
        last_prompt_groups: the groups whose last prompt token is in the batch; their rows end hidden_rows.
        num_prefill_tokens: rows that are not decodes.
    """

    token_ids: Tensor
    positions: Tensor
    slots: Tensor
    num_decodes: int
    decode_groups: DecodeGroups | None
    prefill_chunks: list[PrefillChunk]
    hidden_rows: Tensor
    last_prompt_groups: list[PromptGroup]

    @property
    def num_prefill_tokens(self) -> int:
        return self.token_ids.shape[0] - self.num_decodes


def slots_of(block_table: list[int], block_size: int, first: int, last: int) -> np.ndarray:
    """KV slots of positions first to last - 1 of a block table, [last - first] int64."""
    places = np.arange(first, last)
    return np.asarray(block_table, dtype=np.int64)[places // block_size] * block_size + places % block_size


def _padded(rows: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """[rows, longest] of int64 padded with each row's first entry, and the float32 mask of the padding."""
    lengths = np.array([len(row) for row in rows])
    width = int(lengths.max())
    padded = np.empty((len(rows), width), dtype=np.int64)
    for place, row in enumerate(rows):
        padded[place, : len(row)] = row
        padded[place, len(row) :] = row[0]
    mask = np.where(np.arange(width) < lengths[:, None], 0.0, -np.inf).astype(np.float32)
    return padded, mask


def decode_groups(decodes: list[Sequence], block_size: int, device: str) -> DecodeGroups:
    """Arranges decoding candidates, ordered by group, for attention that reads each group's prefix once."""
    groups: list[PromptGroup] = []
    row_group, row_place = [], []
    for sequence in decodes:
        if not groups or groups[-1] is not sequence.group:
            groups.append(sequence.group)
            row_place.append(0)
        else:
            row_place.append(row_place[-1] + 1)
        row_group.append(len(groups) - 1)
    group_rows = np.zeros((len(groups), max(row_place) + 1), dtype=np.int64)
    group_rows[row_group, row_place] = np.arange(len(decodes))
    prefix, prefix_mask = _padded([slots_of(g.block_table, block_size, 0, len(g.token_ids)) for g in groups])

    lengths = np.array([sequence.num_computed for sequence in decodes])
    most_blocks = max(len(sequence.block_table) for sequence in decodes)
    tables = np.array([s.block_table + s.block_table[:1] * (most_blocks - len(s.block_table)) for s in decodes])
    width = int(lengths.max())
    suffix = (tables[:, :, None] * block_size + np.arange(block_size)).reshape(len(decodes), -1)[:, :width]
    inside = np.arange(width) < lengths[:, None]
    # positions behind the end point at the first token: never at a slot that nothing was written to
    suffix = np.where(inside, suffix, suffix[:, :1])
    suffix_mask = np.where(inside, 0.0, -np.inf).astype(np.float32)

    def tensor(array: np.ndarray | list[int]) -> Tensor:
        return torch.as_tensor(array, device=device)

    return DecodeGroups(
        tensor(group_rows),
        tensor(row_group),
        tensor(row_place),
        tensor(prefix),
        tensor(prefix_mask),
        tensor(suffix),
        tensor(suffix_mask),
    )


def build_step_inputs(plan: StepPlan, block_size: int, device: str) -> StepInputs:
    """Builds the inputs of a planned step (on CPU arrays, then moved to the device in one go each)."""
    decodes = plan.decodes
    token_ids = [sequence.token_ids[-1] for sequence in decodes]
    positions = [len(s.group.token_ids) + s.num_computed - 1 for s in decodes]
    last = [s.num_computed - 1 for s in decodes]
    slots = [
        np.array(
            [s.block_table[j // block_size] * block_size + j % block_size for s, j in zip(decodes, last, strict=True)],
            dtype=np.int64,
        )
    ]
    chunks: list[PrefillChunk] = []
    hidden_rows = list(range(len(decodes)))
    group_rows: list[int] = []
    groups: list[PromptGroup] = []

    def add_chunk(tokens: list[int] | tuple[int, ...], first_position: int, context: np.ndarray) -> int:
        first = len(token_ids)
        token_ids.extend(tokens)
        positions.extend(range(first_position, first_position + len(tokens)))
        slots.append(context[len(context) - len(tokens) :])
        chunks.append(PrefillChunk(first, len(token_ids), torch.as_tensor(context, device=device)))
        return len(token_ids) - 1

    for chunk in plan.prompt_chunks:
        group = chunk.group
        context = slots_of(group.block_table, block_size, 0, chunk.last)
        end = add_chunk(group.token_ids[chunk.first : chunk.last], chunk.first, context)
        if chunk.last == len(group.token_ids):
            group_rows.append(end)
            groups.append(group)
    for piece in plan.suffix_chunks:
        sequence, prompt = piece.sequence, piece.sequence.group.token_ids
        context = np.concatenate(
            (
                slots_of(sequence.group.block_table, block_size, 0, len(prompt)),
                slots_of(sequence.block_table, block_size, 0, piece.last),
            )
        )
        end = add_chunk(sequence.token_ids[piece.first : piece.last], len(prompt) + piece.first, context)
        if piece.last == len(sequence.token_ids):
            hidden_rows.append(end)
    return StepInputs(
        token_ids=torch.tensor(token_ids, dtype=torch.int64, device=device),
        positions=torch.tensor(positions, dtype=torch.int64, device=device),
        slots=torch.as_tensor(np.concatenate(slots), device=device),
        num_decodes=len(decodes),
        decode_groups=decode_groups(decodes, block_size, device) if decodes else None,
        prefill_chunks=chunks,
        hidden_rows=torch.tensor(hidden_rows + group_rows, dtype=torch.int64, device=device),
        last_prompt_groups=groups,
    )

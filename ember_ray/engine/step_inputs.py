"""Turns a step plan into the tensors of one forward pass."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from cuda_ext.decode_groups import SPLIT_TOKENS, DecodeArrays, DecodeGroups, build_decode_groups
from cuda_ext.prefill_attention import PrefillBatch
from ember_ray.engine.scheduler import StepPlan
from ember_ray.engine.sequence import PromptGroup, Sequence
from ember_ray.engine.upload import upload


@dataclass(frozen=True)
class StepInputs:
    """Rows of one forward pass: the decodes first, then prompt chunks, then suffix chunks.

    Attributes:
        token_ids, positions, slots: [tokens] int64.
        num_decodes: how many rows decode.
        decode_groups: None where nothing decodes.
        prefill: the other rows; None where there are none.
        hidden_rows: [unique] int64, rows whose hidden state behind the last layer is needed.
        last_prompt_groups: the groups whose last prompt token is in the batch; their rows end hidden_rows.
    """

    token_ids: Tensor
    positions: Tensor
    slots: Tensor
    num_decodes: int
    decode_groups: DecodeGroups | None
    prefill: PrefillBatch | None
    hidden_rows: Tensor
    last_prompt_groups: list[PromptGroup]


def slots_of(block_table: list[int], block_size: int, first: int, last: int) -> np.ndarray:
    """KV slots of positions first to last - 1 of a block table, [last - first] int64."""
    places = np.arange(first, last)
    return np.asarray(block_table, dtype=np.int64)[places // block_size] * block_size + places % block_size


def decode_group_arrays(
    decodes: Seq[Sequence], block_size: int, share: int, counts: Seq[int], split_tokens: int = SPLIT_TOKENS
) -> DecodeArrays:
    """Arranges decoding candidates, ordered by group, for attention that reads each group's prefix once.

    Args:
        share: query heads of a KV head.
        counts: decode steps that are planned for each candidate; it holds for as many as the most of them.
        split_tokens: tokens of a piece of work.
    """
    groups: list[PromptGroup] = []
    sizes: list[int] = []
    for sequence in decodes:
        if groups and groups[-1] is sequence.group:
            sizes[-1] += 1
        else:
            groups.append(sequence.group)
            sizes.append(1)
    num_steps = max(counts)
    lengths = [s.num_computed - count + 1 for s, count in zip(decodes, counts, strict=True)]
    tables = []
    for sequence, length in zip(decodes, lengths, strict=True):
        # one that ends before the last step has no blocks for the rest, and reads none then
        missing = -(-(length + num_steps - 1) // block_size) - len(sequence.block_table)
        table = sequence.block_table
        tables.append(table + table[-1:] * missing if missing > 0 else table)
    return build_decode_groups(
        [group.block_table for group in groups],
        [len(group.token_ids) for group in groups],
        sizes,
        tables,
        lengths,
        block_size=block_size,
        heads_per_kv_head=share,
        split_tokens=split_tokens,
        steps=num_steps,
    )


def build_step_inputs(
    plan: StepPlan, block_size: int, share: int, device: str, split_tokens: int = SPLIT_TOKENS
) -> StepInputs:
    """Builds the inputs of a planned step (on CPU arrays, then moved to the device in one go each).

    Args:
        share: query heads of a KV head.
        split_tokens: tokens of a piece of decode attention's work.
    """
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
    lengths: list[int] = []
    contexts: list[np.ndarray] = []
    hidden_rows = list(range(len(decodes)))
    group_rows: list[int] = []
    groups: list[PromptGroup] = []

    def add_chunk(tokens: list[int] | tuple[int, ...], first_position: int, context: np.ndarray) -> int:
        token_ids.extend(tokens)
        positions.extend(range(first_position, first_position + len(tokens)))
        slots.append(context[len(context) - len(tokens) :])
        lengths.append(len(tokens))
        contexts.append(context)
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
    counts = plan.counts[: len(decodes)]
    grouped = decode_group_arrays(decodes, block_size, share, counts, split_tokens) if decodes else None
    tensors = upload(
        {
            "token_ids": np.array(token_ids, dtype=np.int64),
            "positions": np.array(positions, dtype=np.int64),
            "slots": np.concatenate(slots),
            "hidden_rows": np.array(hidden_rows + group_rows, dtype=np.int64),
        },
        device,
    )
    return StepInputs(
        **tensors,
        num_decodes=len(decodes),
        decode_groups=grouped.to(device) if grouped else None,
        prefill=PrefillBatch.build(lengths, contexts, device) if lengths else None,
        last_prompt_groups=groups,
    )

"""What a decode step keeps on the device: who its rows are, how far each candidate is, and what the step gave.

All ops work in place on tensors that the caller owns, read nothing on the host and run unchanged inside a CUDA graph.
A row of a step names a slot, the place where a candidate's state stays from step to step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cuda_ext import library
from cuda_ext.sampling import sample, uniforms

MAX_STOP_IDS = 8
"""Stop ids that a row can carry."""

GOES_ON, STOP, LENGTH, NOT_A_TOKEN = 0, 1, 2, -1
"""Codes of a row after a step; NOT_A_TOKEN: it was padding or finished before, nothing was appended."""

# csrc/sampling.cuh: tokens a chunk; floats of workspace for each, a float4 of sums and the maxima of 32 groups
_CHUNK, _WORKSPACE_PER_CHUNK = 2048, 4 + 32


@dataclass(eq=False)
class RowParams:
    """Who the rows of a step are; tensors on the device, one entry a row.

    Attributes:
        slot: [rows] int32, index into :class:`SlotState`, no two rows the same; -1 for a padding row.
        prompt_len: [rows] int32, tokens of the prompt.
        max_tokens: [rows] int32, generated tokens after which the row ends.
        stop_ids: [rows, 8] int32, tokens that end the row; -1 where unused.
        temperature: [rows] float32, 0 for greedy.
        top_k: [rows] int32, 0 for off.
        top_p: [rows] float32, 1 for off.
        min_p: [rows] float32, 0 for off.
        seed: [rows] int64, the request's seed.
        prompt_hash: [rows] int64, stands for the prompt in the counters of random numbers.
        candidate: [rows] int32, the candidate's index in its group.
    """

    slot: Tensor
    prompt_len: Tensor
    max_tokens: Tensor
    stop_ids: Tensor
    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    seed: Tensor
    prompt_hash: Tensor
    candidate: Tensor

    @staticmethod
    def padding(rows: int, device: torch.device | str) -> RowParams:
        """Rows that are all padding, to be filled in place."""

        def full(value: float, dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.full((rows, *shape), value, dtype=dtype, device=device)

        return RowParams(
            slot=full(-1, torch.int32),
            prompt_len=full(0, torch.int32),
            max_tokens=full(0, torch.int32),
            stop_ids=full(-1, torch.int32, MAX_STOP_IDS),
            temperature=full(0, torch.float32),
            top_k=full(0, torch.int32),
            top_p=full(1, torch.float32),
            min_p=full(0, torch.float32),
            seed=full(0, torch.int64),
            prompt_hash=full(0, torch.int64),
            candidate=full(0, torch.int32),
        )


@dataclass(eq=False)
class SlotState:
    """How far the candidates are; tensors on the device that persist, one entry a slot.

    Attributes:
        last_token: [slots] int32, the token drawn last.
        num_tokens: [slots] int32, tokens generated so far, ``last_token`` included.
        finished: [slots] int32, 0 goes on, 1 ended by a stop id, 2 by its length.
    """

    last_token: Tensor
    num_tokens: Tensor
    finished: Tensor

    @staticmethod
    def zeros(slots: int, device: torch.device | str) -> SlotState:
        last_token, num_tokens, finished = torch.zeros(3, slots, dtype=torch.int32, device=device).unbind(0)
        return SlotState(last_token, num_tokens, finished)


@dataclass(eq=False)
class StepOutputs:
    """What steps gave, a line a step, until the host fetches it.

    Attributes:
        tokens: [max_steps, rows_capacity] int32.
        logprobs, sampling_logprobs: the same shape, float32, natural logarithms.
        codes: the same shape, int32: how the step left the row. 0 it goes on, 1 the token was a stop id, 2 it was the
            last by length, -1 nothing was appended (padding, or finished before).
        step: [1] int32, counts the steps; step s is written to line s % max_steps. The caller sets it to 0.
    """

    tokens: Tensor
    logprobs: Tensor
    sampling_logprobs: Tensor
    codes: Tensor
    step: Tensor

    @staticmethod
    def zeros(max_steps: int, rows_capacity: int, device: torch.device | str) -> StepOutputs:
        shape = (max_steps, rows_capacity)
        return StepOutputs(
            tokens=torch.zeros(shape, dtype=torch.int32, device=device),
            logprobs=torch.zeros(shape, device=device),
            sampling_logprobs=torch.zeros(shape, device=device),
            codes=torch.full(shape, NOT_A_TOKEN, dtype=torch.int32, device=device),
            step=torch.zeros(1, dtype=torch.int32, device=device),
        )


def decode_inputs(
    params: RowParams,
    state: SlotState,
    suffix_blocks: Tensor,
    suffix_starts: Tensor,
    suffix_lens: Tensor,
    block_size: int,
    trash_slot: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Which token each row feeds, where it stands, and where its K and V go.

    A live row feeds its last token; K and V of generated token j lie in block j // block_size of its own blocks.
    A finished row runs on without effect: position 0, K and V into the trash slot. A padding row feeds token 0.

    Args:
        suffix_blocks: [n] int32, ids of the rows' own KV blocks, row after row.
        suffix_starts: [rows] int32, where a row's blocks begin in ``suffix_blocks``.
        suffix_lens: [rows] int32, written: the generated tokens that the row attends to, the fed one included; 1 for
            a finished row, 0 for padding.
        block_size: tokens a KV block.
        trash_slot: a KV slot (block id * block_size + offset) that nobody reads.

    Returns:
        token_ids, positions, kv_slots, each [rows] int64.
    """
    if not suffix_lens.is_cuda:
        return decode_inputs_reference(params, state, suffix_blocks, suffix_starts, suffix_lens, block_size, trash_slot)
    rows = len(params.slot)
    _check_lengths("decode_inputs", rows, suffix_starts=suffix_starts, suffix_lens=suffix_lens)
    _check_int32(
        params.slot, params.prompt_len, suffix_blocks, suffix_starts, suffix_lens,
        state.last_token, state.num_tokens, state.finished,
    )  # fmt: skip
    token_ids, positions, kv_slots = (params.seed.new_empty(rows) for _ in range(3))
    library.launch(
        "decode_inputs", params.slot, params.prompt_len, state.last_token, state.num_tokens, state.finished,
        suffix_blocks, suffix_starts, suffix_lens, token_ids, positions, kv_slots, rows, block_size, trash_slot,
    )  # fmt: skip
    return token_ids, positions, kv_slots


def decode_inputs_reference(
    params: RowParams,
    state: SlotState,
    suffix_blocks: Tensor,
    suffix_starts: Tensor,
    suffix_lens: Tensor,
    block_size: int,
    trash_slot: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`decode_inputs` in plain torch."""
    padding, slot, live = _row_kinds(params, state)
    num_tokens = state.num_tokens[slot].long()
    last = (num_tokens - 1).clamp(min=0)
    # rows that are not live may carry any start
    place = torch.where(live, suffix_starts.long() + last // block_size, 0)
    block = suffix_blocks[place].long() if suffix_blocks.numel() else place
    token_ids = torch.where(padding, 0, state.last_token[slot].long())
    positions = torch.where(live, params.prompt_len.long() + num_tokens - 1, 0)
    kv_slots = torch.where(live, block * block_size + last % block_size, trash_slot)
    suffix_lens.copy_(torch.where(padding, 0, torch.where(live, num_tokens, 1)))
    return token_ids, positions, kv_slots


def embed(embedding: Tensor, token_ids: Tensor) -> Tensor:
    """Rows of an embedding matrix.

    Args:
        embedding: [vocab, hidden].
        token_ids: [rows] int64, each under vocab.

    Returns:
        [rows, hidden] in the matrix's dtype.
    """
    if not embedding.is_cuda:
        return embed_reference(embedding, token_ids)
    if token_ids.dtype != torch.int64 or token_ids.ndim != 1 or not token_ids.is_contiguous():
        raise ValueError(f"embed: token_ids must be a contiguous row of int64, not {_described(token_ids)}")
    if embedding.ndim != 2 or not embedding.is_contiguous():
        raise ValueError(f"embed: the embedding must be a contiguous matrix, not {_described(embedding)}")
    rows, hidden = len(token_ids), embedding.shape[1]
    out = embedding.new_empty(rows, hidden)
    library.launch("embed", embedding, token_ids, out, rows, hidden * embedding.element_size())
    return out


def embed_reference(embedding: Tensor, token_ids: Tensor) -> Tensor:
    """:func:`embed` in plain torch."""
    return embedding[token_ids]


def sample_rows(
    logits: Tensor, logits_rows: Tensor | None, params: RowParams, state: SlotState
) -> tuple[Tensor, Tensor, Tensor]:
    """Draws one token a row, with both its log-probabilities.

    The draw is that of :func:`cuda_ext.sampling.sample` with the number that :func:`cuda_ext.sampling.uniforms` gives
    for (seed, prompt, candidate, tokens generated so far); it does not depend on the other rows.

    Args:
        logits: [m, vocab] float32, bfloat16 or float16, rows contiguous.
        logits_rows: [rows] int32, the line of ``logits`` that each row draws from; None: row i draws from line i.

    Returns:
        tokens [rows] int32; logprob [rows] float32, under the model at temperature 1 (NaN where a logit is NaN or
        +inf); sampling_logprob [rows] float32, under the distribution drawn from (0 for greedy). 0 in padding rows.
    """
    if not logits.is_cuda:
        return sample_rows_reference(logits, logits_rows, params, state)
    rows = len(params.slot)
    if logits.ndim != 2 or not logits.is_contiguous() or logits.dtype not in library.DTYPES:
        raise ValueError(
            f"sample_rows: logits must be a contiguous float32, bfloat16 or float16 matrix, not {_described(logits)}"
        )
    if logits_rows is None:
        if len(logits) < rows:
            raise ValueError(f"sample_rows: {rows} rows cannot draw from {len(logits)} lines without logits_rows")
    else:
        _check_lengths("sample_rows", rows, logits_rows=logits_rows)
        _check_int32(logits_rows)
    _check_int32(params.slot, params.top_k, params.candidate, state.num_tokens)
    _check_lengths("sample_rows", rows, temperature=params.temperature, top_k=params.top_k, seed=params.seed)
    vocab = logits.shape[1]
    tokens = params.slot.new_empty(rows)
    logprobs, sampling_logprobs = params.temperature.new_empty(2, rows).unbind(0)
    workspace = params.temperature.new_empty(rows * -(-vocab // _CHUNK) * _WORKSPACE_PER_CHUNK)
    library.launch(
        "sample_rows", logits, logits_rows, params.slot, state.num_tokens, params.temperature, params.top_k,
        params.top_p, params.min_p, params.seed, params.prompt_hash, params.candidate, tokens, logprobs,
        sampling_logprobs, workspace, rows, vocab, logits.dtype,
    )  # fmt: skip
    return tokens, logprobs, sampling_logprobs


def sample_rows_reference(
    logits: Tensor, logits_rows: Tensor | None, params: RowParams, state: SlotState
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`sample_rows` in plain torch."""
    padding, slot, _ = _row_kinds(params, state)
    rows = len(slot)
    lines = logits[:rows] if logits_rows is None else logits[torch.where(padding, 0, logits_rows.long())]
    draws = uniforms(params.seed, params.prompt_hash, params.candidate.long(), state.num_tokens[slot].long())
    tokens, logprobs, sampling_logprobs = sample(
        lines, params.temperature, params.top_k.long(), params.top_p, params.min_p, draws
    )
    return (
        tokens.masked_fill(padding, 0).int(),
        logprobs.masked_fill(padding, 0),
        sampling_logprobs.masked_fill(padding, 0),
    )


def append_tokens(
    tokens: Tensor,
    logprobs: Tensor,
    sampling_logprobs: Tensor,
    params: RowParams,
    state: SlotState,
    outputs: StepOutputs,
) -> None:
    """Appends each live row's token, finds out whether the row ends by it, and writes the step's line of ``outputs``.

    Columns of ``outputs`` behind the step's rows keep what they hold. A stop id ends a row also where it is the last
    token by length.

    Args:
        tokens: [rows] int32. logprobs, sampling_logprobs: [rows] float32.
    """
    if not tokens.is_cuda:
        append_tokens_reference(tokens, logprobs, sampling_logprobs, params, state, outputs)
        return
    rows, (max_steps, capacity) = len(params.slot), outputs.tokens.shape
    if rows > capacity:
        raise ValueError(f"append_tokens: the outputs have room for {capacity} rows, the step has {rows}")
    _check_lengths("append_tokens", rows, tokens=tokens, logprobs=logprobs, sampling_logprobs=sampling_logprobs)
    _check_int32(
        tokens, params.slot, params.max_tokens, params.stop_ids, state.last_token, state.num_tokens, state.finished,
        outputs.tokens, outputs.codes, outputs.step,
    )  # fmt: skip
    library.launch(
        "append_tokens", tokens, logprobs, sampling_logprobs, params.slot, params.max_tokens, params.stop_ids,
        state.last_token, state.num_tokens, state.finished, outputs.tokens, outputs.logprobs,
        outputs.sampling_logprobs, outputs.codes, outputs.step, rows, capacity, max_steps,
    )  # fmt: skip


def append_tokens_reference(
    tokens: Tensor,
    logprobs: Tensor,
    sampling_logprobs: Tensor,
    params: RowParams,
    state: SlotState,
    outputs: StepOutputs,
) -> None:
    """:func:`append_tokens` in plain torch."""
    _, slot, live = _row_kinds(params, state)
    num_tokens = state.num_tokens[slot] + 1
    stopped = (tokens.unsqueeze(-1) == params.stop_ids).any(-1)
    code = torch.where(stopped, STOP, torch.where(num_tokens >= params.max_tokens, LENGTH, GOES_ON)).int()
    written = slot[live]
    state.last_token[written] = tokens[live]
    state.num_tokens[written] = num_tokens[live]
    state.finished[written] = code[live]
    line = int(outputs.step) % outputs.tokens.shape[0]
    rows = len(tokens)
    outputs.tokens[line, :rows] = tokens
    outputs.logprobs[line, :rows] = logprobs
    outputs.sampling_logprobs[line, :rows] = sampling_logprobs
    outputs.codes[line, :rows] = torch.where(live, code, NOT_A_TOKEN)
    outputs.step += 1


def _row_kinds(params: RowParams, state: SlotState) -> tuple[Tensor, Tensor, Tensor]:
    """Which rows are padding, each row's slot (0 for padding), which rows are live."""
    padding = params.slot < 0
    slot = params.slot.long().clamp(min=0)
    return padding, slot, ~padding & (state.finished[slot] == GOES_ON)


def _described(x: Tensor) -> str:
    return f"{tuple(x.shape)} {x.dtype} with strides {x.stride()}"


def _check_lengths(op: str, rows: int, **tensors: Tensor) -> None:
    for name, x in tensors.items():
        if len(x) != rows or not x.is_contiguous():
            raise ValueError(
                f"{op}: {name} must be contiguous with one entry for each of {rows} rows, not {_described(x)}"
            )


def _check_int32(*tensors: Tensor) -> None:
    for x in tensors:
        if x.dtype != torch.int32 or not x.is_contiguous():
            raise ValueError(f"a decode step's integers must be contiguous int32, not {_described(x)}")

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from torch import Tensor

from cuda_ext.decode_state import (
    GOES_ON,
    LENGTH,
    NOT_A_TOKEN,
    STOP,
    RowParams,
    SlotState,
    StepOutputs,
    append_tokens,
    decode_inputs,
    embed,
    sample_rows,
)
from cuda_ext.sampling import sample, uniforms
from ember_ray.engine.sequence import FINISH_REASONS

BLOCK = 4


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def three_rows_and_padding() -> tuple[RowParams, SlotState]:
    """Rows 0 and 2 are live in slots 4 and 1, row 1 is finished in slot 0, row 3 is padding."""
    params, state = RowParams.padding(4, "cpu"), SlotState.zeros(6, "cpu")
    params.slot[:3] = ints(4, 0, 1)
    params.prompt_len[:3] = ints(10, 20, 30)
    params.max_tokens[:3] = 9
    params.temperature[:3] = 1
    params.seed[:3] = 2**40 + 1
    params.prompt_hash[:3] = torch.tensor([-(2**62), 5, 6])
    params.candidate[:3] = ints(0, 1, 7)
    state.last_token[:] = ints(100, 101, 102, 103, 104, 105)
    state.num_tokens[:] = ints(3, 5, 0, 0, 1, 0)
    state.finished[0] = STOP
    return params, state


def copied(state: SlotState) -> list[list[int]]:
    return [getattr(state, field.name).tolist() for field in fields(state)]


def test_the_codes_are_those_of_finish_reasons() -> None:
    assert (FINISH_REASONS[GOES_ON], FINISH_REASONS[STOP], FINISH_REASONS[LENGTH]) == (None, "stop", "length")


def test_decode_inputs_of_live_finished_and_padding_rows() -> None:
    params, state = three_rows_and_padding()
    blocks = ints(50, 60, 61, 70, 71)
    lens = torch.full((4,), 99, dtype=torch.int32)
    before = copied(state)
    token_ids, positions, kv_slots = decode_inputs(params, state, blocks, ints(0, 1000, 3, 1000), lens, BLOCK, 7)
    assert token_ids.tolist() == [104, 100, 101, 0]
    assert positions.tolist() == [10, 0, 34, 0]
    # 1 token: the first place of block 50; 5 tokens: the first place of the second block
    assert kv_slots.tolist() == [50 * BLOCK, 7, 71 * BLOCK, 7]
    assert lens.tolist() == [1, 1, 5, 0]
    assert {x.dtype for x in (token_ids, positions, kv_slots)} == {torch.int64}
    assert copied(state) == before


def test_kv_slots_walk_through_a_rows_blocks() -> None:
    params, state = three_rows_and_padding()
    walked = []
    for count in range(1, 2 * BLOCK + 1):
        state.num_tokens[4] = count
        lens = torch.zeros(4, dtype=torch.int32)
        walked.append(int(decode_inputs(params, state, ints(9, 5, 3), ints(1, 0, 0, 0), lens, BLOCK, 7)[2][0]))
    assert walked == [*range(5 * BLOCK, 6 * BLOCK), *range(3 * BLOCK, 4 * BLOCK)]


def test_embed_gathers_rows() -> None:
    embedding = torch.randn(7, 3)
    assert torch.equal(embed(embedding, torch.tensor([6, 0, 6])), embedding[[6, 0, 6]])


def test_sample_rows_draws_what_sample_draws() -> None:
    params, state = three_rows_and_padding()
    params.top_k[2], params.top_p[0] = 3, 0.7
    lines = torch.randn(2, 11)
    tokens, logprobs, sampling_logprobs = sample_rows(lines, ints(1, 0, 1, -5), params, state)
    draws = uniforms(params.seed[:3], params.prompt_hash[:3], torch.tensor([0, 1, 7]), torch.tensor([1, 3, 5]))
    wanted = sample(
        lines[[1, 0, 1]], torch.ones(3), torch.tensor([0, 0, 3]), torch.tensor([0.7, 1, 1]), torch.zeros(3), draws
    )
    assert tokens.tolist() == [*wanted[0].tolist(), 0]
    assert logprobs.tolist() == [*wanted[1].tolist(), 0]
    assert sampling_logprobs.tolist() == [*wanted[2].tolist(), 0]
    assert tokens.dtype == torch.int32


def test_a_row_of_sample_rows_does_not_depend_on_the_others() -> None:
    params, state = three_rows_and_padding()
    lines = torch.randn(4, 50)
    together = sample_rows(lines, None, params, state)
    for row in range(4):
        alone = RowParams(**{field.name: getattr(params, field.name)[row : row + 1] for field in fields(params)})
        for one, all_rows in zip(sample_rows(lines[row : row + 1], None, alone, state), together, strict=True):
            assert torch.equal(one[0], all_rows[row])


def test_append_ends_rows_and_writes_the_line() -> None:
    params, state = three_rows_and_padding()
    params.stop_ids[0, :2] = ints(8, 9)
    params.stop_ids[2, 7] = 9
    params.max_tokens[2] = 7
    outputs = StepOutputs.zeros(3, 6, "cpu")
    outputs.step[0] = 1
    append_tokens(
        ints(5, 9, 6, 0), torch.tensor([-1.0, -2, -3, 0]), torch.tensor([-4.0, -5, -6, 0]), params, state, outputs
    )
    assert outputs.tokens[1, :4].tolist() == [5, 9, 6, 0]
    assert outputs.logprobs[1, :4].tolist() == [-1, -2, -3, 0]
    assert outputs.sampling_logprobs[1, :4].tolist() == [-4, -5, -6, 0]
    assert outputs.codes.tolist() == [[-1] * 6, [GOES_ON, NOT_A_TOKEN, GOES_ON, NOT_A_TOKEN, -1, -1], [-1] * 6]
    assert copied(state) == [[100, 6, 102, 103, 5, 105], [3, 6, 0, 0, 2, 0], [STOP, 0, 0, 0, 0, 0]]
    assert outputs.step.tolist() == [2]

    # row 0 meets its second stop id, row 2 one of its own, which goes before its length; the other stop id is not its
    append_tokens(ints(9, 3, 9, 0), torch.zeros(4), torch.zeros(4), params, state, outputs)
    assert outputs.codes[2, :4].tolist() == [STOP, NOT_A_TOKEN, STOP, NOT_A_TOKEN]
    assert state.finished.tolist() == [STOP, STOP, 0, 0, STOP, 0]

    # nothing is appended behind an end; the fourth step goes to the first line
    before = copied(state)
    append_tokens(ints(1, 1, 1, 1), torch.zeros(4), torch.zeros(4), params, state, outputs)
    assert outputs.codes[0, :4].tolist() == [NOT_A_TOKEN] * 4
    assert copied(state) == before
    assert outputs.step.tolist() == [4]


@pytest.mark.parametrize("max_tokens", [1, 2])
def test_the_last_token_by_length(max_tokens: int) -> None:
    params, state = RowParams.padding(1, "cpu"), SlotState.zeros(1, "cpu")
    params.slot[0], params.max_tokens[0] = 0, max_tokens
    outputs = StepOutputs.zeros(3, 1, "cpu")
    for _ in range(3):
        append_tokens(ints(0), torch.zeros(1), torch.zeros(1), params, state, outputs)
    ends = [GOES_ON] * (max_tokens - 1) + [LENGTH] + [NOT_A_TOKEN] * (3 - max_tokens)
    assert outputs.codes[:, 0].tolist() == ends
    assert state.num_tokens.tolist() == [max_tokens]

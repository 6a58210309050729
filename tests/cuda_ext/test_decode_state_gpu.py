from __future__ import annotations

from copy import deepcopy
from dataclasses import fields

import pytest
import torch
from torch import Tensor

from cuda_ext.decode_state import (
    RowParams,
    SlotState,
    StepOutputs,
    append_tokens,
    append_tokens_reference,
    decode_inputs,
    decode_inputs_reference,
    embed,
    sample_rows,
    sample_rows_reference,
)

pytestmark = pytest.mark.gpu

BLOCK = 16


def random_rows(rows: int, seed: int) -> tuple[RowParams, SlotState]:
    """A third of the rows live, a third finished, a third padding, in slots that are shuffled."""
    random = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=random, dtype=torch.int32).cuda()

    params, state = RowParams.padding(rows, "cuda"), SlotState.zeros(rows + 5, "cuda")
    slots = torch.randperm(rows + 5, generator=random)[:rows].int().cuda()
    params.slot.copy_(torch.where(integers(0, 3, rows) == 0, -1, slots))
    params.prompt_len.copy_(integers(1, 5000, rows))
    params.max_tokens.copy_(integers(1, 60, rows))
    params.stop_ids.copy_(integers(-1, 20, rows, 8))
    params.temperature.fill_(1)
    params.candidate.copy_(integers(0, 8, rows))
    state.last_token.copy_(integers(0, 20, rows + 5))
    state.num_tokens.copy_(integers(1, 50, rows + 5))
    state.finished.copy_(integers(0, 2, rows + 5) * integers(1, 3, rows + 5))
    return params, state


def assert_same(one: object, other: object) -> None:
    for field in fields(one):  # type: ignore[arg-type]
        assert torch.equal(getattr(one, field.name), getattr(other, field.name)), field.name


@pytest.mark.parametrize("rows", [1, 2, 127, 129, 800, 1024])
def test_decode_inputs(rows: int) -> None:
    params, state = random_rows(rows, rows)
    suffix_blocks = torch.randint(0, 2**27, (rows * 4,), dtype=torch.int32, device="cuda")
    suffix_starts = torch.arange(0, rows * 4, 4, dtype=torch.int32, device="cuda")
    suffix_starts[(params.slot < 0) | (state.finished[params.slot.long()] > 0)] = 2**30
    lens = torch.full((rows,), -9, dtype=torch.int32, device="cuda")
    wanted_lens = lens.clone()
    before = deepcopy(state)
    found = decode_inputs(params, state, suffix_blocks, suffix_starts, lens, BLOCK, 12345678901)
    wanted = decode_inputs_reference(params, state, suffix_blocks, suffix_starts, wanted_lens, BLOCK, 12345678901)
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one, other)
    assert torch.equal(lens, wanted_lens)
    assert_same(state, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("vocab", "hidden"), [(3, 1), (50, 67), (500, 2560), (500, 4100)])
def test_embed(vocab: int, hidden: int, dtype: torch.dtype) -> None:
    embedding = torch.randn(vocab, hidden, device="cuda").to(dtype)
    for rows in (0, 1, 1000):
        token_ids = torch.randint(0, vocab, (rows,), device="cuda")
        assert torch.equal(embed(embedding, token_ids), embedding[token_ids])


@pytest.mark.parametrize("rows", [1, 2, 31, 800, 1024, 1500])
def test_append_tokens(rows: int) -> None:
    params, state = random_rows(rows, rows)
    outputs = StepOutputs.zeros(3, rows + 7, "cuda")
    outputs.step[0] = 2
    outputs.logprobs.fill_(torch.nan)
    outputs.logprobs[:, :rows] = -99
    wanted_state, wanted_outputs = deepcopy(state), deepcopy(outputs)
    for _ in range(4):
        drawn = (torch.randint(0, 20, (rows,), dtype=torch.int32, device="cuda"), *torch.randn(2, rows, device="cuda"))
        append_tokens(drawn[0], drawn[1], drawn[2], params, state, outputs)
        append_tokens_reference(drawn[0], drawn[1], drawn[2], params, wanted_state, wanted_outputs)
    assert_same(state, wanted_state)
    assert bool(outputs.logprobs[:, rows:].isnan().all())
    outputs.logprobs[:, rows:] = wanted_outputs.logprobs[:, rows:] = 0
    assert_same(outputs, wanted_outputs)


@pytest.mark.parametrize("rows", [3, 200])
def test_a_captured_step_runs_on(rows: int) -> None:
    """Inputs, embedding, a toy layer, sampling and append in one graph against the references, step by step."""
    params, state = random_rows(rows, 3)
    params.top_k[::3] = 5
    params.top_p[1::3] = 0.8
    outputs = StepOutputs.zeros(64, rows, "cuda")
    table = torch.randn(20, 20, generator=torch.Generator().manual_seed(9)).cuda() * 2
    suffix_blocks = torch.arange(rows * 8, dtype=torch.int32, device="cuda").flip(0).contiguous()
    suffix_starts = torch.arange(0, rows * 8, 8, dtype=torch.int32, device="cuda")
    lens = torch.zeros(rows, dtype=torch.int32, device="cuda")
    start_state, start_outputs = deepcopy(state), deepcopy(outputs)

    def step() -> tuple[Tensor, Tensor, Tensor]:
        inputs = decode_inputs(params, state, suffix_blocks, suffix_starts, lens, BLOCK, 77)
        append_tokens(*sample_rows(embed(table, inputs[0]), None, params, state), params, state, outputs)
        return inputs

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for target, source in ((state, start_state), (outputs, start_outputs)):
        for field in fields(target):
            getattr(target, field.name).copy_(getattr(source, field.name))

    wanted_lens = lens.clone()
    for _ in range(61):
        graph.replay()
        inputs = decode_inputs_reference(params, start_state, suffix_blocks, suffix_starts, wanted_lens, BLOCK, 77)
        for one, other in zip(captured, inputs, strict=True):
            assert torch.equal(one, other)
        assert torch.equal(lens, wanted_lens)
        drawn = sample_rows_reference(table[inputs[0]], None, params, start_state)
        append_tokens_reference(*drawn, params, start_state, start_outputs)
    assert_same(state, start_state)
    assert bool((outputs.codes >= 0).any())
    assert bool((state.finished[params.slot[params.slot >= 0].long()] > 0).all())
    for name in ("tokens", "codes", "step"):
        assert torch.equal(getattr(outputs, name), getattr(start_outputs, name))
    torch.testing.assert_close(outputs.logprobs, start_outputs.logprobs)
    torch.testing.assert_close(outputs.sampling_logprobs, start_outputs.sampling_logprobs, atol=1e-5, rtol=1e-5)


def test_what_the_kernels_cannot_take_is_refused() -> None:
    params, state = random_rows(4, 0)
    few = torch.zeros(3, dtype=torch.int32, device="cuda")
    with pytest.raises(ValueError, match="suffix_lens must be contiguous with one entry for each of 4 rows"):
        decode_inputs(params, state, few, torch.zeros_like(params.slot), few, BLOCK, 0)
    with pytest.raises(ValueError, match="room for 3 rows, the step has 4"):
        append_tokens(params.slot, params.top_p, params.top_p, params, state, StepOutputs.zeros(2, 3, "cuda"))
    with pytest.raises(ValueError, match="int64"):
        embed(torch.zeros(4, 4, device="cuda"), few)

"""The sampling kernels against their reference and a float64 account of what may be drawn."""

from __future__ import annotations

from dataclasses import fields, replace
from itertools import cycle, islice

import pytest
import torch
from torch import Tensor

from cuda_ext.decode_state import RowParams, SlotState, sample_rows, sample_rows_reference
from cuda_ext.library import KernelError
from cuda_ext.sampling import filter_logits, uniforms

pytestmark = pytest.mark.gpu

EDGE = 1e-6
"""Share of the mass within which a draw may fall to either side of an edge."""

# temperature, top_k, top_p, min_p
UNFILTERED = [(1.0, 0, 1.0, 0.0), (0.0, 0, 1.0, 0.0), (0.01, 0, 1.0, 0.0), (0.7, 0, 1.0, 0.0), (5.0, 0, 1.0, 0.0)]
FILTERED = [
    (1.0, 1, 1.0, 0.0), (1.0, 50, 1.0, 0.0), (0.6, 50, 0.95, 0.0), (1.0, 1000, 1.0, 0.0), (1.3, 5000, 0.9, 0.0),
    (1.0, 10**6, 1.0, 0.0), (1.0, 0, 0.9, 0.0), (0.8, 0, 0.5, 0.0), (1.0, 0, 0.999, 0.0), (1.0, 0, 1e-9, 0.0),
    (1.0, 0, 1.0, 0.05), (2.0, 0, 1.0, 1e-4), (1.0, 0, 1.0, 1.0), (0.7, 40, 0.9, 0.02), (5.0, 300, 0.8, 0.3),
    (1.5, 0, 0.9, 0.01), (0.01, 20, 0.95, 0.0), (0.0, 50, 0.9, 0.1),
]  # fmt: skip


def rows_of(settings: list[tuple[float, int, float, float]], rows: int, seed: int = 5) -> tuple[RowParams, SlotState]:
    """Rows that take the settings in turn; each has its own identity and number of tokens, slots go backwards."""
    params, state = RowParams.padding(rows, "cuda"), SlotState.zeros(rows + 3, "cuda")
    random = torch.Generator().manual_seed(seed)
    params.slot.copy_(torch.arange(rows).flip(0))
    columns = zip(*islice(cycle(settings), rows), strict=True)
    for target, values in zip((params.temperature, params.top_k, params.top_p, params.min_p), columns, strict=True):
        target.copy_(torch.tensor(values))
    params.seed.copy_(torch.randint(-(2**63), 2**63 - 1, (rows,), generator=random))
    params.prompt_hash.copy_(torch.randint(-(2**63), 2**63 - 1, (rows,), generator=random))
    params.candidate.copy_(torch.arange(rows))
    state.num_tokens.copy_(torch.randint(0, 9000, (rows + 3,), generator=random))
    return params, state


def part(params: RowParams, rows: slice | Tensor) -> RowParams:
    return RowParams(**{field.name: getattr(params, field.name)[rows].contiguous() for field in fields(params)})


def poison() -> None:
    """Leaves NaN in the memory that the allocator gives out next."""
    waste = [torch.full((size,), torch.nan, device="cuda") for size in (64, 512, 4096, 2**15, 2**18, 2**20, 2**24)]
    del waste


def reference_of(lines: Tensor, params: RowParams, state: SlotState, row: int) -> list[float]:
    one = slice(row, row + 1)
    return [x.item() for x in sample_rows_reference(lines[one], None, part(params, one), state)]


def check(logits: Tensor, params: RowParams, state: SlotState, logits_rows: Tensor | None = None) -> tuple[int, int]:
    """Fails unless each row's token and log-probabilities fit; counts rows that lie on an edge, and all rows."""
    poison()
    tokens, logprobs, sampling_logprobs = sample_rows(logits, logits_rows, params, state)
    lines = (logits if logits_rows is None else logits[logits_rows.long()])[: len(params.slot)].float()
    draws = uniforms(
        params.seed, params.prompt_hash, params.candidate.long(), state.num_tokens[params.slot.long()].long()
    )
    token = tokens.long().unsqueeze(-1)
    assert int(token.min()) >= 0
    assert int(token.max()) < logits.shape[1]
    model = lines.double().log_softmax(-1)
    torch.testing.assert_close(logprobs.double(), model.gather(-1, token).squeeze(-1), rtol=0, atol=1e-5)

    greedy = params.temperature == 0
    assert torch.equal(tokens[greedy].long(), lines[greedy].argmax(-1))
    assert bool((sampling_logprobs[greedy] == 0).all())

    # the edge of top-p may fall to either side of a token
    fits, exact = greedy.clone(), greedy.clone()
    temperature = torch.where(greedy, 1.0, params.temperature).unsqueeze(-1)
    worst = torch.full_like(draws, torch.inf)
    for shift in (0.0, -EDGE, EDGE):
        top_p = torch.where(params.top_p < 1, (params.top_p + shift).clamp(max=1 - 2**-24), params.top_p)
        kept = filter_logits(lines / temperature, params.top_k.long(), top_p, params.min_p) > -torch.inf
        scaled = (lines.double() / temperature.double()).masked_fill(~kept, -torch.inf)
        cumulative = scaled.softmax(-1).cumsum(-1)
        target = draws * cumulative[:, -1]
        behind = cumulative.gather(-1, token).squeeze(-1)
        ahead = torch.where(token.squeeze(-1) > 0, cumulative.gather(-1, (token - 1).clamp(min=0)).squeeze(-1), 0.0)
        wanted = scaled.log_softmax(-1).gather(-1, token).squeeze(-1)
        off = (sampling_logprobs.double() - wanted).abs()
        near = (ahead - EDGE <= target) & (target < behind + EDGE) & (off <= 1e-5)
        if shift == 0:
            exact |= (ahead <= target) & (target < behind) & (off <= 1e-5)
        worst = torch.minimum(worst, off)
        fits |= near
    assert bool(fits.all()), "\n".join(
        f"row {row}: temperature {params.temperature[row]:g} top_k {params.top_k[row]} top_p {params.top_p[row]:g} "
        f"min_p {params.min_p[row]:g} draw {draws[row]:.9f}: token {tokens[row]} with sampling_logprob "
        f"{sampling_logprobs[row]}, off by {worst[row]:.2g}; reference {reference_of(lines, params, state, row)}"
        for row in (~fits).nonzero().squeeze(-1)[:8].tolist()
    )
    return int((~exact).sum()), len(tokens)


def spread_logits(rows: int, vocab: int, dtype: torch.dtype, seed: int = 1) -> Tensor:
    """Flat to peaked: the standard deviation goes from 0.1 to 8 over the rows."""
    random = torch.Generator("cuda").manual_seed(seed)
    spread = torch.logspace(-1, 0.9, 7, device="cuda").repeat(-(-rows // 7))[:rows]
    return (torch.randn(rows, vocab, device="cuda", generator=random) * spread.unsqueeze(-1)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("vocab", [1, 7, 300, 4097, 151936])
def test_all_filters_on_random_logits(vocab: int, dtype: torch.dtype) -> None:
    settings = UNFILTERED + FILTERED
    rows = len(settings) * (7 if vocab < 10_000 else 4)  # 23 settings and 7 spreads share no divisor
    params, state = rows_of(settings, rows, seed=vocab)
    on_edge, total = check(spread_logits(rows, vocab, dtype, seed=vocab), params, state)
    assert on_edge <= 0.08 * total


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("vocab", [300, 40_000])
def test_ties(vocab: int, dtype: torch.dtype) -> None:
    """Few distinct logits, both zeros, and nothing but one logit."""
    settings = UNFILTERED + FILTERED
    rows = len(settings) * 3
    params, state = rows_of(settings, rows)
    logits = torch.randint(-3, 4, (rows, vocab), device="cuda").to(dtype)
    logits[1::3] = torch.where(torch.rand(vocab, device="cuda") < 0.5, 0.0, -0.0).to(dtype)
    logits[2::3] = -7.25
    check(logits, params, state)


@pytest.mark.parametrize("vocab", [300, 40_000])
def test_quotients_that_round_together_are_ties(vocab: int) -> None:
    """Logits a last bit apart, of which temperature makes one quotient."""
    settings = [(2.7, 50, 1.0, 0.0), (3.0, 200, 0.9, 0.0), (1.7, 0, 0.4, 0.0), (1.9, 0, 1.0, 0.9999999)]
    params, state = rows_of(settings, 80)
    steps = torch.randint(0, 400, (80, vocab), device="cuda")
    check(10 + steps.float() * 2.0**-20, params, state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("vocab", [7, 4097, 20_000])
def test_tokens_that_cannot_be_drawn(vocab: int, dtype: torch.dtype) -> None:
    """Half of the logits, all but some in the last chunk, and all but one are -inf."""
    settings = UNFILTERED + FILTERED
    rows = len(settings) * 3
    params, state = rows_of(settings, rows)
    logits = 3 * torch.randn(rows, vocab, device="cuda").to(dtype)
    logits[0::3] = logits[0::3].masked_fill(torch.rand(len(logits[0::3]), vocab, device="cuda") < 0.5, -torch.inf)
    logits[0::3, -1] = 0.5
    logits[1::3, : vocab - 5] = -torch.inf
    logits[2::3] = -torch.inf
    logits[2::3, vocab // 2] = -3.0
    check(logits, params, state)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_logits_that_are_not_finite_are_told_by_the_logprob(bad: float, dtype: torch.dtype) -> None:
    settings = UNFILTERED + FILTERED
    params, state = rows_of(settings, 2 * len(settings))
    logits = torch.randn(2 * len(settings), 5000, device="cuda").to(dtype)
    if bad == -torch.inf:
        logits[: len(settings)] = bad
    else:
        logits[: len(settings), 4321] = bad
    poison()
    tokens, logprobs, sampling_logprobs = sample_rows(logits, None, params, state)
    told = torch.arange(2 * len(settings), device="cuda") < len(settings)
    assert torch.equal(logprobs.isnan(), told)
    assert torch.equal(sampling_logprobs.isnan(), told & (params.temperature != 0))
    assert bool(((tokens >= 0) & (tokens < 5000)).all())


def test_extreme_logits() -> None:
    """The largest and lowest finite floats."""
    params, state = rows_of([(1.0, 0, 1.0, 0.0), (1.0, 2, 1.0, 0.0), (1.0, 0, 0.9, 0.1)], 6)
    lowest = torch.finfo(torch.float32).min
    logits = torch.full((6, 3000), lowest, device="cuda")
    logits[:3, 2500] = -lowest
    tokens, logprobs, _ = sample_rows(logits, None, params, state)
    assert tokens[:3].tolist() == [2500] * 3
    assert logprobs[:3].tolist() == [0.0] * 3
    torch.testing.assert_close(logprobs[3:].cpu(), -torch.full((3,), 3000.0).log())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_lines_named_by_rows_and_padding(dtype: torch.dtype) -> None:
    params, state = rows_of(UNFILTERED + FILTERED, 92)
    logits = spread_logits(9, 5008, dtype)
    logits_rows = torch.randint(0, 9, (92,), device="cuda", dtype=torch.int32)
    check(logits, params, state, logits_rows)
    alone = sample_rows(logits, logits_rows, params, state)
    params.slot[::3] = -1
    logits_rows[::3] = 10**9
    poison()
    beside = sample_rows(logits, logits_rows, params, state)
    for one, other in zip(alone, beside, strict=True):
        one[::3] = 0
        assert torch.equal(one, other)


@pytest.mark.parametrize("vocab", [4096, 4099])
def test_lines_that_begin_anywhere(vocab: int) -> None:
    """Neither the address of the logits nor a line's length has to be a multiple of 16 bytes."""
    params, state = rows_of(UNFILTERED + FILTERED, 46)
    logits = spread_logits(46, vocab, torch.bfloat16)
    shifted = torch.cat((logits.new_zeros(1), logits.flatten()))[1:].view(46, vocab)
    assert shifted.data_ptr() % 16
    check(shifted, params, state)
    for one, other in zip(
        sample_rows(shifted, None, params, state), sample_rows(logits, None, params, state), strict=True
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize("settings", [UNFILTERED + FILTERED, UNFILTERED[:1], FILTERED[6:7]])
def test_equal_bits_in_two_runs_and_alone(settings: list[tuple[float, int, float, float]]) -> None:
    params, state = rows_of(settings, 300)
    logits = spread_logits(300, 151936, torch.bfloat16)
    together = sample_rows(logits, None, params, state)
    poison()
    for one, other in zip(together, sample_rows(logits, None, params, state), strict=True):
        assert torch.equal(one, other)
    for row in range(0, 300, 13):
        alone = sample_rows(logits[row : row + 1], None, part(params, slice(row, row + 1)), state)
        for one, other in zip(alone, together, strict=True):
            assert torch.equal(one[0], other[row])


@pytest.mark.parametrize("rows", [1, 2, 33, 1024])
def test_batches(rows: int) -> None:
    params, state = rows_of(UNFILTERED + FILTERED, rows)
    check(spread_logits(rows, 5000, torch.bfloat16), params, state)


@pytest.mark.parametrize(
    "setting", [(1.0, 0, 1.0, 0.0), (0.6, 0, 1.0, 0.0), (1.0, 7, 1.0, 0.0), (1.0, 0, 0.8, 0.0), (1.2, 20, 0.9, 0.05)]
)
def test_frequencies_fit_the_distribution(setting: tuple[float, int, float, float]) -> None:
    rows, vocab = 40_000, 40
    params, state = rows_of([setting], rows)
    params.seed.fill_(11)
    params.prompt_hash.fill_(12)
    params.candidate.fill_(3)
    state.num_tokens[:rows] = torch.arange(rows, device="cuda")
    line = 1.5 * torch.randn(1, vocab, generator=torch.Generator().manual_seed(4)).cuda()
    tokens, _, _ = sample_rows(line, torch.zeros(rows, dtype=torch.int32, device="cuda"), params, state)
    one = part(params, slice(0, 1))
    scaled = filter_logits(line / one.temperature, one.top_k.long(), one.top_p, one.min_p).double()
    expected = (scaled.softmax(-1)[0] * rows).cpu()
    counts = tokens.long().bincount(minlength=vocab).double().cpu()
    assert counts[expected == 0].sum() == 0
    large = expected >= 5
    counts = torch.cat((counts[large], counts[~large].sum()[None]))
    expected = torch.cat((expected[large], expected[~large].sum()[None]))
    counts, expected = counts[expected > 0], expected[expected > 0]
    statistic = ((counts - expected) ** 2 / expected).sum()
    assert torch.special.gammaincc(torch.tensor((len(counts) - 1) / 2).double(), statistic / 2) > 1e-4


def test_the_cpu_draws_the_same_tokens() -> None:
    """The same seed gives the same tokens on both; of 230 rows none lies on an edge."""
    params, state = rows_of(UNFILTERED + FILTERED, 230)
    logits = spread_logits(230, 1000, torch.float32)
    on_cpu = replace(params, **{field.name: getattr(params, field.name).cpu() for field in fields(params)})
    cpu_state = SlotState(state.last_token.cpu(), state.num_tokens.cpu(), state.finished.cpu())
    wanted = sample_rows(logits.cpu(), None, on_cpu, cpu_state)
    found = sample_rows(logits, None, params, state)
    assert torch.equal(found[0].cpu(), wanted[0])
    torch.testing.assert_close(found[1].cpu(), wanted[1], rtol=1e-5, atol=1e-5)
    # at temperature 0.01 the reference's quotients are near 2,000, their last bit 1e-4
    torch.testing.assert_close(found[2].cpu(), wanted[2], rtol=1e-5, atol=5e-4)


def test_what_the_kernel_cannot_take_is_refused() -> None:
    params, state = rows_of([(1.0, 0, 1.0, 0.0)], 2)
    with pytest.raises(ValueError, match=r"contiguous float32, bfloat16 or float16 matrix.*float64"):
        sample_rows(torch.zeros(2, 8, device="cuda", dtype=torch.float64), None, params, state)
    with pytest.raises(ValueError, match="strides"):
        sample_rows(torch.zeros(8, 2, device="cuda").T, None, params, state)
    with pytest.raises(ValueError, match="2 rows cannot draw from 1 lines"):
        sample_rows(torch.zeros(1, 8, device="cuda"), None, params, state)
    with pytest.raises(KernelError, match="vocabulary of 1100000"):
        sample_rows(torch.zeros(2, 1_100_000, device="cuda"), None, params, state)
    with pytest.raises(ValueError, match="int32"):
        sample_rows(torch.zeros(2, 8, device="cuda"), torch.zeros(2, dtype=torch.int64, device="cuda"), params, state)

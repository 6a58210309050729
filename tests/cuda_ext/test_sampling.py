from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cuda_ext.sampling import filter_logits, philox4x32, sample, uniforms

DRAWS = 20_000


def chi_square_p(counts: Tensor, expected: Tensor) -> float:
    """Probability of counts at least this far off if expected is right (Pearson)."""
    statistic = ((counts - expected) ** 2 / expected).sum().double()
    return float(torch.special.gammaincc(torch.tensor((len(counts) - 1) / 2).double(), statistic / 2))


def test_philox_gives_the_words_of_its_authors() -> None:
    """Known answers of Random123 (kat_vectors: philox4x32 10)."""
    ones = 0xFFFFFFFF
    pi = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], [0xA4093822, 0x299F31D0]
    counters, keys = [[0] * 4, [ones] * 4, pi[0]], [[0] * 2, [ones] * 2, pi[1]]
    assert philox4x32(torch.tensor(counters), torch.tensor(keys)).tolist() == [
        [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8],
        [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ]


def test_uniforms_are_uniform_and_depend_on_every_part_of_their_identity() -> None:
    base = torch.tensor([[-5, 2**62 + 3, 4, 7]])
    rows = torch.cat((base, base + torch.eye(4, dtype=torch.int64)))
    draws = uniforms(*rows.unbind(-1))
    assert len(set(draws.tolist())) == 5
    assert torch.equal(draws, uniforms(*rows.unbind(-1)))
    many = uniforms(*torch.stack(torch.broadcast_tensors(*base[0, :3], torch.arange(DRAWS))).unbind(0))
    counts = torch.histc(many.float(), 50, 0, 1)
    assert chi_square_p(counts, torch.full((50,), DRAWS / 50)) > 1e-4


def kept_by_hand(probabilities: Tensor, top_k: int, top_p: float, min_p: float) -> Tensor:
    """Mask of tokens that may be drawn, one filter after the other as the definitions say."""
    kept = probabilities >= min_p * probabilities.max()
    if top_k:
        order = torch.where(kept, probabilities, -1.0).argsort(descending=True)
        keep = torch.zeros_like(kept)
        keep[order[:top_k]] = True
        kept &= keep
    left = torch.where(kept, probabilities, 0.0)
    left = left / left.sum()
    top_p = float(torch.tensor(top_p))  # float32, as it arrives; 1 is off, whatever a sum comes to
    mass, order = 0.0, left.argsort(descending=True).tolist()
    for place, token in enumerate(order):
        if place and mass >= top_p and top_p < 1:
            kept[token] = False
        mass += float(left[token])
    return kept


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"),
    [(1.0, 0, 1.0, 0.0), (0.6, 0, 1.0, 0.0), (1.7, 0, 1.0, 0.0), (1.0, 7, 1.0, 0.0), (1.0, 0, 0.8, 0.0),
     (1.0, 0, 1.0, 0.1), (0.9, 12, 0.9, 0.03)],
)  # fmt: skip
def test_frequencies_fit_the_distribution(temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    logits = 2 * torch.randn(40, generator=torch.Generator().manual_seed(4))
    probabilities = (logits.double() / temperature).softmax(-1)
    kept = kept_by_hand(probabilities, top_k, top_p, min_p)
    expected = torch.where(kept, probabilities, 0.0)
    expected = expected / expected.sum()
    draws = uniforms(*torch.stack(torch.broadcast_tensors(*torch.tensor([9, 8, 0]), torch.arange(DRAWS))).unbind(0))
    tokens, logprob, sampling_logprob = sample(
        logits.expand(DRAWS, -1),
        torch.full((DRAWS,), temperature),
        torch.full((DRAWS,), top_k),
        torch.full((DRAWS,), top_p),
        torch.full((DRAWS,), min_p),
        draws,
    )
    counts = tokens.bincount(minlength=40).double()
    assert counts[~kept].sum() == 0
    # cells with under 5 expected draws are joined, as the test demands
    small = kept & (expected * DRAWS < 5)
    cells = torch.cat((counts[kept & ~small], counts[small].sum()[None]))
    wanted = torch.cat((expected[kept & ~small], expected[small].sum()[None])) * DRAWS
    cells, wanted = cells[wanted > 0], wanted[wanted > 0]
    assert chi_square_p(cells, wanted) > 1e-4
    torch.testing.assert_close(sampling_logprob.double(), expected.log()[tokens], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logprob, logits.log_softmax(-1)[tokens])


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    top_k=st.integers(0, 60),
    top_p=st.floats(0.01, 1.0),
    min_p=st.floats(0.0, 1.0),
    spread=st.floats(0.1, 20.0),
)
def test_filters_keep_what_their_definitions_keep(
    seed: int, top_k: int, top_p: float, min_p: float, spread: float
) -> None:
    logits = spread * torch.randn(50, generator=torch.Generator().manual_seed(seed))
    left = filter_logits(logits[None], torch.tensor([top_k]), torch.tensor([top_p]), torch.tensor([min_p]))[0]
    kept = left > -torch.inf
    by_hand = kept_by_hand(logits.double().softmax(-1), top_k, top_p, min_p)
    # the two may differ by a token that lies on an edge to within rounding
    assert int((kept != by_hand).sum()) <= 1
    assert bool(kept[logits.argmax()])
    assert torch.equal(left[kept], logits[kept])


def test_greedy_rows_beside_sampled_ones() -> None:
    logits = torch.randn(3, 20)
    zeros = torch.zeros(3, dtype=torch.int64)
    tokens, logprob, sampling_logprob = sample(
        logits,
        torch.tensor([0.0, 1.0, 0.0]),
        zeros,
        torch.ones(3),
        torch.zeros(3),
        torch.tensor([0.9, 0.5, 0.1]).double(),
    )
    assert tokens[[0, 2]].tolist() == logits.argmax(-1)[[0, 2]].tolist()
    assert sampling_logprob[[0, 2]].tolist() == [0.0, 0.0]
    torch.testing.assert_close(logprob, logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0])


def test_the_smallest_and_largest_draw_take_a_likely_token() -> None:
    logits = torch.full((1, 12), -80.0)
    logits[0, 3] = 80.0
    one = torch.ones(1)
    for draw in (2.0**-53, 1 - 2.0**-53):
        token, _, _ = sample(
            logits, one, torch.zeros(1, dtype=torch.int64), one, 0 * one, torch.tensor([draw], dtype=torch.float64)
        )
        assert token.item() == 3


def test_a_filter_of_one_row_leaves_another_row_whole() -> None:
    logits = torch.zeros(2, 6)
    logits[:, 1:] = -60.0  # too little for a sum in float64 to show
    left = filter_logits(logits, torch.tensor([2, 0]), torch.tensor([0.9, 1.0]), torch.zeros(2))
    assert torch.equal(left[1], logits[1])
    assert (left[0] > -torch.inf).tolist() == [True] + [False] * 5


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0, 0.7])
def test_logits_that_are_not_finite_are_told_by_the_logprob(bad: float, temperature: float) -> None:
    logits = torch.randn(3, 8)
    logits[1, 5] = bad
    one, none = torch.ones(3), torch.zeros(3, dtype=torch.int64)
    tokens, logprob, _ = sample(logits, temperature * one, none, one, 0 * one, torch.full((3,), 0.5).double())
    assert logprob.isnan().tolist() == [False, True, False]
    assert bool((tokens < 8).all())

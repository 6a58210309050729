"""The copy that looks at what it writes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cuda_ext.checked_copy import checked_copy, checked_copy_reference, checksum, copy_table

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def by_hand(piece: torch.Tensor) -> int:
    """The sum of the docstring in Python's integers."""
    width = {4: torch.int32, 2: torch.int16}[piece.element_size()]
    mask = 256 ** piece.element_size() - 1
    total = sum((bits & mask) * (2 * place + 1) for place, bits in enumerate(piece.view(width).tolist()))
    return (total + 2**63) % 2**64 - 2**63


@settings(deadline=None, max_examples=50)
@given(
    st.sampled_from(DTYPES), st.sampled_from(DTYPES), st.lists(st.integers(0, 40), min_size=1, max_size=5), st.data()
)
def test_pieces_land_where_the_table_says(
    source: torch.dtype, target: torch.dtype, counts: list[int], data: st.DataObject
) -> None:
    gaps = [(data.draw(st.integers(0, 5)), data.draw(st.integers(0, 5))) for _ in counts]
    pieces, begin, first = [], 0, 0
    for count, (before, ahead) in zip(counts, gaps, strict=True):
        pieces.append(((begin + before) * source.itemsize, first + ahead, count))
        begin, first = begin + before + count, first + ahead + count
    base = torch.randn(begin + 1).to(source)
    to = torch.full((first + 1,), 7.0, dtype=target)
    seen = checked_copy(to, base, copy_table(pieces, "cpu"), source)
    covered = torch.zeros(len(to), dtype=torch.bool)
    for (start, place, count), (bad, total) in zip(pieces, seen.tolist(), strict=True):
        start //= source.itemsize
        assert torch.equal(to[place : place + count], base[start : start + count].to(target))
        assert (bad, total) == (0, by_hand(to[place : place + count]))
        covered[place : place + count] = True
    assert bool((to[~covered] == 7.0).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_is_counted_in_the_dtype_that_is_written(dtype: torch.dtype) -> None:
    base = torch.tensor([1.0, torch.nan, -torch.inf, 2.0, 1e5, 3.0])
    seen = checked_copy(torch.empty(6, dtype=dtype), base, copy_table([(0, 0, 3), (12, 3, 3)], "cpu"), torch.float32)
    assert seen[:, 0].tolist() == [2, 1 if dtype == torch.float16 else 0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_checksum_knows_changed_and_exchanged_values(dtype: torch.dtype) -> None:
    piece = torch.randn(100).to(dtype)
    before = checksum(piece)
    for place in range(100):
        changed = piece.clone()
        changed.view(torch.int32 if dtype == torch.float32 else torch.int16)[place] ^= 1
        assert checksum(changed) != before
    exchanged = piece.clone()
    exchanged[3], exchanged[70] = piece[70], piece[3]
    assert checksum(exchanged) != before and checksum(piece.roll(1)) != before


def test_misfits_are_named() -> None:
    to, base, table = torch.empty(4), torch.zeros(4), copy_table([(0, 0, 4)], "cpu")
    with pytest.raises(ValueError, match="base of torch.bfloat16"):
        checked_copy(to, base, table, torch.bfloat16)
    with pytest.raises(ValueError, match="need a base"):
        checked_copy(to, None, table, torch.float32)
    with pytest.raises(ValueError, match=r"\[pieces, 3\] int64"):
        checked_copy(to, base, table[:, :2], torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("target", DTYPES)
@pytest.mark.parametrize("by_address", [False, True])
def test_the_kernel_sees_what_the_reference_sees(source: torch.dtype, target: torch.dtype, by_address: bool) -> None:
    torch.manual_seed(1)
    counts = [1, 7, 8, 9, 2560 * 16, 4096 * 3 + 5, 0, 200_000]
    pieces, begin, first = [], 0, 0
    for count in counts:  # some pieces begin at multiples of 16 bytes, some do not
        pieces.append((begin * source.itemsize, first, count))
        begin, first = begin + count, first + (count + 15) // 16 * 16
    base = torch.randn(begin, device="cuda").to(source)
    base[20], base[-1], base[-2] = torch.nan, torch.inf, -torch.inf
    to, other = (torch.full((first,), 7.0, dtype=target, device="cuda") for _ in range(2))
    expected = checked_copy_reference(other, base, copy_table(pieces, "cuda"))
    table = copy_table([(start + by_address * base.data_ptr(), *rest) for start, *rest in pieces], "cuda")
    seen = checked_copy(to, None if by_address else base, table, source)
    assert torch.equal(to.nan_to_num(5.0), other.nan_to_num(5.0)) and torch.equal(to.isnan(), other.isnan())
    finite = expected[:, 0] == 0  # the bits of a NaN are not the same everywhere
    assert torch.equal(seen[:, 0], expected[:, 0]) and torch.equal(seen[finite], expected[finite])
    assert seen[3].tolist()[0] == 1 and seen[-1].tolist()[0] == 2

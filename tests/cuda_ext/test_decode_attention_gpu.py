from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from cuda_ext import decode_attention
from cuda_ext.decode_attention import group_decode_attention, group_decode_attention_reference
from cuda_ext.decode_groups import FEW_ROWS_SPLIT_TOKENS, SPLIT_TOKENS, DecodeArrays, build_decode_groups

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LIMITS = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}
"""Largest relative error in norm: float32 rounding, or that of weights and outputs in 16 bits."""

both_ways = pytest.mark.parametrize("split", [SPLIT_TOKENS, FEW_ROWS_SPLIT_TOKENS])
"""In two launches, and in one (which float32 has not)."""


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs and workspaces start as NaN."""
    torch.backends.cuda.matmul.allow_tf32 = False
    for name in ("empty", "empty_like"):
        real = getattr(torch, name)

        def poisoned(*args: object, real=real, **options: object) -> Tensor:  # type: ignore[no-untyped-def]
            made = real(*args, **options)
            return made.fill_(torch.nan) if made.is_floating_point() else made

        monkeypatch.setattr(decode_attention.torch, name, poisoned)


@dataclass
class Case:
    """Sequences in a cache whose unowned slots are NaN."""

    groups: list[tuple[int, list[int]]]  # prefix length, suffix lengths
    tables: list[list[int]]  # blocks of the prefixes, then of the suffixes
    block_size: int
    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    steps: int

    def arrays(self, chosen: list[tuple[int, list[int]]] | None = None, **options: object) -> DecodeArrays:
        """Decode groups of all, or of chosen candidates: (group, places among its candidates)."""
        if chosen is None:
            chosen = [(number, list(range(len(lengths)))) for number, (_, lengths) in enumerate(self.groups)]
        first = self.first_rows
        share = self.q.shape[1] // self.k_cache.shape[1]
        return build_decode_groups(
            [self.tables[number] for number, _ in chosen],
            [self.groups[number][0] for number, _ in chosen],
            [len(places) for _, places in chosen],
            [self.tables[len(self.groups) + first[number] + place] for number, places in chosen for place in places],
            [self.groups[number][1][place] for number, places in chosen for place in places],
            block_size=self.block_size,
            steps=self.steps,
            **{"heads_per_kv_head": share, **options},  # type: ignore[arg-type]
        )

    @property
    def first_rows(self) -> list[int]:
        return np.cumsum([0] + [len(lengths) for _, lengths in self.groups]).tolist()

    def reference(self, arrays: DecodeArrays) -> Tensor:
        caches = self.k_cache.float(), self.v_cache.float()
        return group_decode_attention_reference(self.q.float(), *caches, arrays.to("cuda"), self.scale)

    @property
    def scale(self) -> float:
        return self.q.shape[2] ** -0.5


def make_case(
    groups: list[tuple[int, list[int]]],
    heads: tuple[int, int] = (32, 8),
    head_dim: int = 128,
    block_size: int = 16,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    steps: int = 1,
) -> Case:
    tokens = [prefix for prefix, _ in groups] + [length + steps - 1 for _, lengths in groups for length in lengths]
    counts = [-(-count // block_size) for count in tokens]
    spare = 7
    order = np.random.default_rng(seed).permutation(sum(counts) + spare)
    tables = [blocks.tolist() for blocks in np.split(order, np.cumsum(counts))[:-1]]
    generator = torch.Generator("cuda").manual_seed(seed)
    shape = (len(order) * block_size, heads[1], head_dim)
    k_cache, v_cache = (torch.full(shape, torch.nan, dtype=dtype, device="cuda") for _ in range(2))
    slots = np.concatenate(
        [
            np.asarray(table)[np.arange(count) // block_size] * block_size + np.arange(count) % block_size
            for table, count in zip(tables, tokens, strict=True)
        ]
    )
    where = torch.from_numpy(slots).to("cuda")
    for cache in (k_cache, v_cache):
        cache[where] = torch.randn(len(slots), *shape[1:], device="cuda", generator=generator).to(dtype)
    rows = sum(len(lengths) for _, lengths in groups)
    q = 3 * torch.randn(rows, heads[0], head_dim, device="cuda", generator=generator)
    return Case(groups, tables, block_size, q.to(dtype), k_cache, v_cache, steps)


def random_groups(seed: int) -> list[tuple[int, list[int]]]:
    random = np.random.default_rng(seed)
    longest, most, suffix = (int(random.choice(values)) for values in ([40, 700, 2600], [1, 9, 40], [1, 70, 1200]))
    return [
        (int(random.integers(1, longest + 1)), random.integers(1, suffix + 1, random.integers(1, most + 1)).tolist())
        for _ in range(random.integers(1, 9))
    ]


def assert_near(out: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert out.dtype == dtype and bool(out.isfinite().all()), "not everything was written, or poison was read"
    wrong = (out.float() - expected).norm(dim=-1) / expected.norm(dim=-1).clamp_min(1e-9)
    worst = int(wrong.argmax())
    # single rows scatter around the norm of the whole
    assert float((out.float() - expected).norm() / expected.norm()) < LIMITS[dtype], f"row, head {worst}: {wrong.max()}"
    assert float(wrong.max()) < 6 * LIMITS[dtype], f"row, head {divmod(worst, out.shape[1])}: {float(wrong.max())}"


@both_ways
@pytest.mark.parametrize("seed", range(24))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_random_shapes(seed: int, dtype: torch.dtype, split: int) -> None:
    random = np.random.default_rng(1000 + seed)
    heads = [(32, 8), (4, 1), (16, 8), (8, 8), (14, 2), (12, 3)][random.integers(6)]
    head_dim, block_size = int(random.choice([64, 128])), int(random.choice([16, 32]))
    case = make_case(random_groups(seed), heads, head_dim, block_size, dtype, seed)
    arrays = case.arrays(split_tokens=split)
    out = group_decode_attention(case.q, case.k_cache, case.v_cache, arrays.to("cuda"), case.scale)
    assert_near(out, case.reference(arrays), dtype)
    again = group_decode_attention(case.q, case.k_cache, case.v_cache, arrays.to("cuda"), case.scale)
    assert torch.equal(out, again), "two runs differ"


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("split_tokens", [128, 256, 1024])
def test_pieces_of_other_lengths(split_tokens: int, seed: int) -> None:
    """Prefixes and suffixes of several pieces, also with more KV blocks a piece than the kernel keeps at once."""
    random = np.random.default_rng(seed)
    dtype, block_size = (torch.bfloat16, torch.float16, torch.float32)[seed % 3], (16, 32)[seed % 2]
    groups = [
        (int(random.integers(1, 4200)), random.integers(1, 2300, random.integers(1, 10)).tolist())
        for _ in range(random.integers(1, 4))
    ]
    case = make_case(groups, (32, 8), 128, block_size, dtype, seed)
    arrays = case.arrays(split_tokens=split_tokens)
    out = group_decode_attention(case.q, case.k_cache, case.v_cache, arrays.to("cuda"), case.scale)
    assert_near(out, case.reference(arrays), dtype)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_generic_kernel_on_what_tensor_cores_take(head_dim: int, dtype: torch.dtype) -> None:
    for seed in (1, 2, 3):
        case = make_case(random_groups(seed), head_dim=head_dim, dtype=dtype, seed=seed)
        arrays = case.arrays()
        out = decode_attention._launch(case.q, case.k_cache, case.v_cache, arrays.to("cuda"), case.scale, 1)
        assert_near(out, case.reference(arrays), dtype)


@pytest.mark.parametrize(("heads", "head_dim", "block_size"), [((4, 2), 8, 16), ((9, 1), 256, 1), ((20, 2), 96, 48)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_generic_shapes(heads: tuple[int, int], head_dim: int, block_size: int, dtype: torch.dtype) -> None:
    case = make_case([(37, [1, 5]), (1, [1]), (300, [260])], heads, head_dim, block_size, dtype)
    arrays = case.arrays()
    out = group_decode_attention(case.q, case.k_cache, case.v_cache, arrays.to("cuda"), case.scale)
    assert_near(out, case.reference(arrays), dtype)


@both_ways
@pytest.mark.parametrize(
    "groups",
    [
        [(1, [1])],
        [(1, [1] * 16)],
        [(16, [16])],
        [(512, [512]), (513, [513]), (511, [511])],
        [(64, [1] * 17), (65, [2] * 3)],
        [(2048, [64] * 8)],
        [(5000, [1])],
        [(3, [1])] * 1024,
        [(40, [5] * 1024)],
    ],
    ids=str,
)
def test_edges(groups: list[tuple[int, list[int]]], split: int) -> None:
    case = make_case(groups, seed=5)
    arrays = case.arrays(split_tokens=split)
    out = group_decode_attention(case.q, case.k_cache, case.v_cache, arrays.to("cuda"), case.scale)
    assert_near(out, case.reference(arrays), torch.bfloat16)


@both_ways
def test_scores_and_values_far_from_one(split: int) -> None:
    case = make_case([(700, [3, 600]), (20, [1])], dtype=torch.bfloat16)
    case.q *= 50
    case.v_cache *= 2.0**100
    arrays = case.arrays(split_tokens=split)
    out = group_decode_attention(case.q, case.k_cache, case.v_cache, arrays.to("cuda"), case.scale)
    expected = case.reference(arrays)
    assert_near(out * 2.0**-100, expected * 2.0**-100, torch.bfloat16)


@both_ways
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_does_not_depend_on_the_rest_of_the_batch(dtype: torch.dtype, split: int) -> None:
    case = make_case([(1500, [40, 700, 3]), (37, [1, 16]), (512, [9] * 20), (900, [600])], seed=3, dtype=dtype)
    first = case.first_rows
    whole = group_decode_attention(
        case.q, case.k_cache, case.v_cache, case.arrays(split_tokens=split).to("cuda"), case.scale
    )
    for chosen in (
        [(0, [1])],
        [(1, [0, 1])],
        [(2, [19])],
        [(3, [0]), (0, [0, 2])],
        [(2, list(range(3, 16))), (1, [1]), (0, [0, 1, 2])],
    ):
        rows = [first[number] + place for number, places in chosen for place in places]
        q = case.q[rows].contiguous()
        alone = group_decode_attention(
            q, case.k_cache, case.v_cache, case.arrays(chosen, split_tokens=split).to("cuda"), case.scale
        )
        assert torch.equal(alone, whole[rows]), f"{chosen}: {float((alone - whole[rows]).abs().max())}"


@both_ways
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_suffixes_grow_and_groups_change_under_a_captured_graph(dtype: torch.dtype, split: int) -> None:
    steps = 6
    case = make_case([(600, [509, 1, 60]), (33, [1023, 15])], seed=4, steps=steps, dtype=dtype)
    needed = case.arrays(split_tokens=split).capacity
    capacity = type(needed)(needed.rows + 3, *(getattr(needed, name) + 9 for name in list(vars(needed))[1:]))
    q = torch.cat((case.q, case.q[:3]))
    arrays = case.arrays(capacity=capacity, split_tokens=split)
    groups = arrays.to("cuda")
    group_decode_attention(q, case.k_cache, case.v_cache, groups, case.scale)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = group_decode_attention(q, case.k_cache, case.v_cache, groups, case.scale)
        groups.suffix_lens.add_((groups.suffix_lens > 0).int())
    groups.storage.copy_(torch.from_numpy(arrays.storage))
    for step in range(steps):
        graph.replay()
        lengths = [(prefix, [length + step for length in lengths]) for prefix, lengths in case.groups]
        now = Case(lengths, case.tables, case.block_size, case.q, case.k_cache, case.v_cache, 1)
        fresh = now.arrays(split_tokens=split)
        expected = group_decode_attention(case.q, case.k_cache, case.v_cache, fresh.to("cuda"), case.scale)
        assert_near(out[:-3], now.reference(fresh), dtype)
        assert torch.equal(out[:-3], expected) and bool((out[-3:] == 0).all())
    # other sequences in the same arrays
    chosen = [(1, [1]), (0, [2, 0])]
    groups.storage.copy_(torch.from_numpy(case.arrays(chosen, capacity=capacity, split_tokens=split).storage))
    q[:3] = case.q[[4, 2, 0]]
    graph.replay()
    alone = group_decode_attention(
        q[:3].contiguous(), case.k_cache, case.v_cache, case.arrays(chosen, split_tokens=split).to("cuda"), case.scale
    )
    assert torch.equal(out[:3], alone) and bool((out[3:] == 0).all())


@both_ways
def test_a_batch_of_padding_gives_zeros(split: int) -> None:
    case = make_case([(40, [3, 4])])
    groups = case.arrays(split_tokens=split).to("cuda")
    groups.row_group.fill_(-1), groups.suffix_lens.zero_(), groups.num_items.zero_()
    out = group_decode_attention(case.q, case.k_cache, case.v_cache, groups, case.scale)
    assert bool((out == 0).all())


def test_unfit_tensors_are_refused() -> None:
    case = make_case([(40, [3, 4])])
    groups = case.arrays().to("cuda")
    with pytest.raises(ValueError, match="one dtype"):
        group_decode_attention(case.q.float(), case.k_cache, case.v_cache, groups, case.scale)
    with pytest.raises(ValueError, match="contiguous"):
        group_decode_attention(
            case.q.transpose(0, 1).contiguous().transpose(0, 1), case.k_cache, case.v_cache, groups, 1.0
        )
    narrow = make_case([(40, [3] * 40)], heads=(8, 8)).arrays().to("cuda")
    with pytest.raises(ValueError, match="do not hold 4"):
        group_decode_attention(case.q[:1].expand(40, -1, -1).contiguous(), case.k_cache, case.v_cache, narrow, 1.0)

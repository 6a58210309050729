from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from cuda_ext import library
from cuda_ext.linear_swiglu import (
    TILES,
    _takes,
    fits,
    linear_swiglu,
    linear_swiglu_lora,
    linear_swiglu_reference,
)
from cuda_ext.lora import FusedLora, LoraPart
from cuda_ext.swiglu_lora import swiglu_lora

pytestmark = pytest.mark.gpu

ULPS = {torch.bfloat16: 2**-8, torch.float16: 2**-11}
"""Half of a last place: the largest relative error of one rounding."""


@pytest.fixture(autouse=True)
def hopper() -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the kernel runs on compute capability 9.0")


def draw(tokens: int, ffn: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    torch.manual_seed(tokens + ffn + width)
    x = torch.randn(tokens, width, device="cuda").to(dtype)
    return x, (2 * torch.randn(2 * ffn, width, device="cuda") / width**0.5).to(dtype)


NO_ADAPTER = (None, 0, None, 0)


def kernel(x: Tensor, weight: Tensor, tile: int = 160, along_tokens: int = 1, out: Tensor | None = None) -> Tensor:
    """The kernel itself, whether or not it is the faster way."""
    (tokens, width), ffn = x.shape, len(weight) // 2
    out = torch.full((tokens, ffn), torch.nan, device="cuda", dtype=x.dtype) if out is None else out
    library.launch("linear_swiglu", x, weight, out, tokens, ffn, width, *NO_ADAPTER, tile, along_tokens, x.dtype)
    return out


def exact(x: Tensor, weight: Tensor) -> Tensor:
    gate, up = (x.double() @ weight.double().T).chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


def assert_near(out: Tensor, wanted: Tensor) -> None:
    # where gate or up nearly vanish, it is the float32 sums of the matrix units that round
    torch.testing.assert_close(out.double(), wanted, rtol=1.02 * ULPS[out.dtype], atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("ffn", "width"), [(256, 64), (512, 192), (768, 2560), (9728, 128)])
@pytest.mark.parametrize("tokens", [1, 17, 127, 160, 161, 321, 800])
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("along_tokens", [0, 1])
def test_every_tiling_writes_every_element_and_no_other(
    along_tokens: int, tile: int, tokens: int, ffn: int, width: int, dtype: torch.dtype
) -> None:
    x, weight = draw(tokens, ffn, width, dtype)
    whole = torch.full((tokens + 2, ffn), torch.nan, device="cuda", dtype=dtype)
    kernel(x, weight, tile, along_tokens, whole[:tokens])
    assert_near(whole[:tokens], exact(x, weight))
    assert whole[tokens:].isnan().all()


@pytest.mark.parametrize("tokens", [800, 1600, 3001])
def test_many_tokens_at_the_width_of_a_model(tokens: int) -> None:
    x, weight = draw(tokens, 9728, 2560, torch.bfloat16)
    assert fits(x, weight)
    out = linear_swiglu(x, weight)
    assert_near(out, exact(x, weight))
    assert torch.equal(out, linear_swiglu(x, weight))


@pytest.mark.parametrize("tile", TILES)
def test_a_token_is_the_same_to_the_bit_among_others_and_in_any_tile(tile: int) -> None:
    x, weight = draw(3000, 2560, 1024, torch.bfloat16)
    part = x[1001:1400].contiguous()
    assert torch.equal(kernel(x, weight)[1001:1400], kernel(part, weight, tile, 0))


def test_extreme_gates_stay_finite() -> None:
    x = torch.zeros(300, 64, device="cuda", dtype=torch.bfloat16)
    x[:, 0] = torch.linspace(-300, 300, 300)
    weight = torch.zeros(512, 64, device="cuda", dtype=torch.bfloat16)
    weight[:, 0] = 1
    torch.testing.assert_close(kernel(x, weight).double(), exact(x, weight), rtol=1.02 * 2**-8, atol=1e-30)


def test_capturable_and_behind_a_kernel_that_makes_x() -> None:
    x, weight = draw(800, 9728, 256, torch.bfloat16)
    linear_swiglu(x, weight)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = x + 1
        assert fits(made, weight)
        out = linear_swiglu(made, weight)
    x.normal_()
    graph.replay()
    assert_near(out, exact(x + 1, weight))


@pytest.mark.parametrize(
    ("tokens", "ffn", "width", "dtype"),
    [
        (32, 9728, 64, torch.bfloat16),
        (800, 9600, 64, torch.bfloat16),
        (800, 9728, 96, torch.bfloat16),
        (800, 9728, 64, torch.float32),
    ],
)
def test_what_does_not_fit_is_a_product_and_a_gate(tokens: int, ffn: int, width: int, dtype: torch.dtype) -> None:
    x, weight = draw(tokens, ffn, width, dtype)
    assert not fits(x, weight)
    assert torch.equal(linear_swiglu(x, weight), linear_swiglu_reference(x, weight))
    strided = torch.zeros(tokens, 2 * width, device="cuda", dtype=dtype)[:, :width]
    assert not fits(strided, weight)
    assert torch.equal(linear_swiglu(strided, weight), torch.zeros(tokens, ffn, device="cuda", dtype=dtype))


def test_the_library_refuses_what_it_cannot_tile() -> None:
    x, weight = draw(300, 384, 64, torch.bfloat16)
    out = torch.empty(300, 384, device="cuda", dtype=torch.bfloat16)
    with pytest.raises(library.KernelError, match="2 \\* 384 rows of 64 does not come in whole tiles"):
        library.launch("linear_swiglu", x, weight, out, 300, 384, 64, *NO_ADAPTER, 160, 0, x.dtype)
    with pytest.raises(library.KernelError, match="tiles of 128, 160 and 192 tokens, not 100"):
        library.launch("linear_swiglu", x[:, :64], weight[:512], out, 300, 256, 64, *NO_ADAPTER, 100, 0, x.dtype)


def adapter(ffn: int, width: int, ranks: tuple[int, int], dtype: torch.dtype, scale: float = 1.5) -> FusedLora:
    """Of gate and of up; rank 0: none."""
    parts, first = [], 0
    for half, rank in enumerate(ranks):
        if rank:
            b = (torch.randn(ffn, rank, device="cuda") / rank**0.5).to(dtype)
            parts.append(LoraPart(half * ffn, (half + 1) * ffn, first, first + rank, b, scale))
            first += rank
    return FusedLora((torch.randn(first, width, device="cuda") / width**0.5).to(dtype), tuple(parts))


def exact_with(x: Tensor, weight: Tensor, lora: FusedLora) -> Tensor:
    """With s x A^T rounded as the kernel gets it."""
    down = (lora.parts[0].scale * (x.double() @ lora.a.double().T)).to(x.dtype).double()
    both = x.double() @ weight.double().T
    for part in lora.parts:
        both[:, part.first_row : part.last_row] += down[:, part.first_rank : part.last_rank] @ part.b.double().T
    gate, up = both.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ranks", [(16, 16), (8, 8), (64, 64), (0, 16), (32, 0), (8, 104), (40, 24), (128, 128)])
@pytest.mark.parametrize(("ffn", "width"), [(256, 64), (9728, 128)])
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("along_tokens", [0, 1])
def test_an_adapter_is_more_of_the_inner_dimension(
    along_tokens: int, tile: int, ffn: int, width: int, ranks: tuple[int, int], dtype: torch.dtype
) -> None:
    tokens = 321
    x, weight = draw(tokens, ffn, width, dtype)
    lora = adapter(ffn, width, ranks, dtype)
    down = (lora.parts[0].scale * (x.double() @ lora.a.double().T)).to(dtype)
    out = torch.full((tokens, ffn), torch.nan, device="cuda", dtype=dtype)
    library.launch(
        "linear_swiglu", x, weight, out, tokens, ffn, width, down, down.shape[1], lora.part_structs, len(lora.parts),
        tile, along_tokens, dtype,
    )  # fmt: skip
    assert_near(out, exact_with(x, weight, lora))
    assert (out.double() - exact(x, weight)).abs().max() > 0.1  # it could show a fault


@pytest.mark.parametrize("ranks", [(16, 16), (64, 64), (0, 8)])
@pytest.mark.parametrize("tokens", [800, 3001])
def test_an_adapter_at_the_width_of_a_model(tokens: int, ranks: tuple[int, int]) -> None:
    x, weight = draw(tokens, 9728, 2560, torch.bfloat16)
    lora = adapter(9728, 2560, ranks, torch.bfloat16)
    assert fits(x, weight) and _takes(lora, 9728)
    out, wanted = linear_swiglu_lora(x, weight, lora), exact_with(x, weight, lora)
    error = float((out.double() - wanted).norm() / wanted.norm())
    apart = swiglu_lora(torch.nn.functional.linear(x, weight), torch.nn.functional.linear(x, lora.a), lora)
    assert error < 3e-3 and error <= float((apart.double() - wanted).norm() / wanted.norm())
    twin = FusedLora(lora.a, tuple(dataclasses.replace(part, scale=1.02 * part.scale) for part in lora.parts))
    assert float((linear_swiglu_lora(x, weight, twin).double() - wanted).norm() / wanted.norm()) > 2 * error


def test_a_captured_adapter_takes_new_values_in_place() -> None:
    x, weight = draw(800, 9728, 256, torch.bfloat16)
    lora = adapter(9728, 256, (16, 16), torch.bfloat16)
    linear_swiglu_lora(x, weight, lora)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = linear_swiglu_lora(x, weight, lora)
    for tensor in (lora.a, *(part.b for part in lora.parts), x):
        tensor.mul_(-0.5)
    graph.replay()
    assert torch.equal(out, linear_swiglu_lora(x, weight, lora))
    assert_near(out, exact_with(x, weight, lora))


@pytest.mark.parametrize("what", ["two scales", "odd rank", "half of a half"])
def test_other_adapters_are_computed_apart(what: str) -> None:
    x, weight = draw(800, 9728, 256, torch.bfloat16)
    lora = adapter(9728, 256, (8, 12 if what == "odd rank" else 16), torch.bfloat16)
    if what == "two scales":
        lora = FusedLora(lora.a, (lora.parts[0], dataclasses.replace(lora.parts[1], scale=0.5)))
    elif what == "half of a half":
        first = dataclasses.replace(lora.parts[0], last_row=4864, b=lora.parts[0].b[:4864].contiguous())
        lora = FusedLora(lora.a, (first, lora.parts[1]))
    assert fits(x, weight) and not _takes(lora, 9728)
    linear = torch.nn.functional.linear
    assert torch.equal(linear_swiglu_lora(x, weight, lora), swiglu_lora(linear(x, weight), linear(x, lora.a), lora))

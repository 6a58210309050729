"""An adapter as one flat tensor says the same as its named tensors, and is refused for the same reasons."""

from __future__ import annotations

import dataclasses
import math
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cuda_ext.library import DTYPES
from ember_ray.model.adapter_layout import (
    ALIGNMENT,
    AdapterLayout,
    AdapterPacker,
    FlatAdapter,
    Gathered,
    module_path,
    update_of,
)
from ember_ray.model.lora import MAX_SCALE, AdapterError, AdapterUpdate, check_adapter
from ember_ray.model.qwen3_config import Qwen3Config, read_model_config
from ember_ray.model.slots import AdapterSlots
from tests.support.adapters import random_adapter
from tests.support.qwen3 import make_qwen3

SHAPES = {
    "q_proj": (12, 10), "k_proj": (6, 10), "v_proj": (6, 10), "o_proj": (10, 12),
    "gate_proj": (14, 10), "up_proj": (14, 10), "down_proj": (10, 14),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("qwen3")
    make_qwen3(path)
    return path


@pytest.fixture(scope="module")
def config(folder: Path) -> Qwen3Config:
    return read_model_config(folder)


def packer(update: AdapterUpdate, config: Qwen3Config, dtype: torch.dtype = torch.float32) -> AdapterPacker:
    checked = check_adapter(update, config.linear_shapes, config.num_hidden_layers)
    return AdapterPacker(checked, config.linear_shapes, dtype)


def slots(config: Qwen3Config, layers: range = range(3), dtype: torch.dtype = torch.float32) -> AdapterSlots:
    return AdapterSlots(config, layers, dtype, "cpu")


def tensors_of(held: AdapterSlots) -> list[torch.Tensor]:
    loras = [lora for layer in held.active.values() for lora in layer.values()]
    return [lora.a for lora in loras] + [part.b for lora in loras for part in lora.parts]


@settings(deadline=None, max_examples=60)
@given(st.dictionaries(st.tuples(st.integers(0, 3), st.sampled_from(sorted(SHAPES))), st.integers(1, 5), min_size=1))
def test_a_layout_has_room_for_everything_once(ranks: dict[tuple[int, str], int]) -> None:
    layout = AdapterLayout.of(ranks, SHAPES)
    assert {module[:2]: module[2] for module in layout.modules} == ranks
    assert layout == AdapterLayout.of(dict(reversed(ranks.items())), SHAPES)
    assert len(layout.pieces) == 2 * len(ranks)
    end = 0
    for piece in layout.pieces:
        assert piece.first >= end and piece.first - end < ALIGNMENT
        end = piece.first + math.prod(piece.shape)
    assert end <= layout.numel < end + ALIGNMENT
    flat = torch.arange(layout.numel, dtype=torch.float32)
    scaling = [float(place) for place in range(len(ranks))]
    for layer, fused in layout.fused(flat, scaling).items():
        for lora in fused.values():
            for part in lora.parts:
                name = next(n for n, path in ((n, module_path(layer, n)) for n in SHAPES) if (layer, n) in ranks
                            and torch.equal(layout.views(flat)[f"{path}.lora_B.weight"], part.b))  # fmt: skip
                a = layout.views(flat)[f"{module_path(layer, name)}.lora_A.weight"]
                assert torch.equal(lora.a[part.first_rank : part.last_rank], a)
                assert part.scale == scaling[[m[:2] for m in layout.modules].index((layer, name))]


@pytest.mark.parametrize("begin", range(4))
@pytest.mark.parametrize("end", range(4))
def test_a_part_lies_whole_in_the_whole(begin: int, end: int) -> None:
    layout = AdapterLayout.of({(layer, name): 2 for layer in (0, 1, 2) for name in ("q_proj", "v_proj")}, SHAPES)
    own, first, first_piece = layout.part(range(begin, end))
    for mine, whole in zip(own.pieces, layout.pieces[first_piece:], strict=False):
        assert (mine.name, mine.first + first, mine.shape) == (whole.name, whole.first, whole.shape)


@pytest.mark.parametrize("layers", [range(3), range(1), range(1, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_flat_and_named_are_the_same_policy(
    folder: Path, config: Qwen3Config, layers: range, dtype: torch.dtype
) -> None:
    update = random_adapter(folder, 1)
    flat = pickle.loads(pickle.dumps(packer(update, config, dtype).pack(1)))
    named, taken, again = slots(config, layers, dtype), slots(config, layers, dtype), slots(config, layers, dtype)
    for held, form in ((named, update), (taken, flat), (again, update_of(flat))):
        held.stage(form)
        held.commit(1)
    assert tensors_of(named)
    for one, two, three in zip(tensors_of(named), tensors_of(taken), tensors_of(again), strict=True):
        assert torch.equal(one, two) and torch.equal(one, three)


def test_a_packer_writes_what_its_tensors_have_become(folder: Path, config: Qwen3Config) -> None:
    update = random_adapter(folder, 1)
    written = packer(update, config)
    first = written.pack(1)
    name, tensor = next(iter(update.tensors.items()))
    tensor.mul_(2)
    second = written.pack(2, torch.zeros_like(first.flat))
    assert torch.equal(second.layout.views(second.flat)[name], 2 * first.layout.views(first.flat)[name])
    tensor[0, 0] = torch.nan
    with pytest.raises(AdapterError, match=rf"'{name}' has NaN or Inf in float32"):
        written.pack(3)


def test_tensors_of_one_storage_travel_as_that_storage() -> None:
    layout = AdapterLayout.of({(0, "q_proj"): 2, (0, "down_proj"): 3}, SHAPES)
    pool = torch.randn(5 + sum(math.prod(piece.shape) for piece in layout.pieces))
    tensors, place = [], 5
    for piece in layout.pieces:
        tensors.append(pool[place : place + math.prod(piece.shape)].view(piece.shape))
        place += math.prod(piece.shape)
    for sources in (tensors, [tensor.clone() for tensor in tensors]):
        gathered = Gathered.of(sources, layout, "cpu")
        assert gathered.base is not None
        assert (gathered.base.untyped_storage().data_ptr() == pool.untyped_storage().data_ptr()) == (sources is tensors)
        flat = torch.zeros(layout.numel)
        gathered.copy_to(flat)
        for tensor, view in zip(tensors, layout.views(flat).values(), strict=True):
            assert torch.equal(tensor, view)


def test_what_had_to_be_cast_or_moved_together_is_known_to_be_a_copy() -> None:
    layout = AdapterLayout.of({(0, "q_proj"): 2, (0, "down_proj"): 3}, SHAPES)
    plain = [torch.randn(piece.shape) for piece in layout.pieces]
    assert Gathered.of(plain, layout, "cpu").reads(plain)
    mixed = [plain[0].bfloat16(), *plain[1:]]
    turned = [plain[0].t().contiguous().t(), *plain[1:]]
    for tensors in (mixed, turned):
        assert not Gathered.of(tensors, layout, "cpu").reads(tensors)


def test_tensors_of_a_dtype_that_no_kernel_computes_in_are_cast_before() -> None:
    layout = AdapterLayout.of({(0, "q_proj"): 2}, SHAPES)
    tensors = [torch.randn(piece.shape, dtype=torch.float64) for piece in layout.pieces]
    gathered = Gathered.of(tensors, layout, "cpu")
    assert gathered.dtype in DTYPES
    flat = torch.zeros(layout.numel)
    gathered.copy_to(flat)
    for tensor, view in zip(tensors, layout.views(flat).values(), strict=True):
        assert torch.equal(tensor.float(), view)


BROKEN = (
    "NaN", "one bit", "too short", "integers", "another model", "layer outside", "rank 0", "another order", "scale NaN",
    "scale too large", "scale missing", "old version", "float64", "checksum missing",
)  # fmt: skip


def broken(flat: FlatAdapter) -> dict[str, tuple[FlatAdapter, str]]:
    change = dataclasses.replace
    nan = flat.flat.clone()
    nan[flat.layout.pieces[3].first] = torch.nan
    flipped = flat.flat.clone()
    flipped.view(torch.int32)[flat.layout.pieces[-1].first] ^= 1
    other = AdapterLayout.of({(0, "q_proj"): 2}, SHAPES)
    outside = AdapterLayout(((3, "q_proj", 2),), flat.layout.shapes)
    swapped = AdapterLayout((flat.layout.modules[1], flat.layout.modules[0]), flat.layout.shapes)
    zero = AdapterLayout(((0, "q_proj", 0),), flat.layout.shapes)
    loud = (*flat.scaling[:-1], 2 * MAX_SCALE)
    assert flat.checksums is not None
    return {
        "NaN": (change(flat, flat=nan), rf"'{flat.layout.pieces[3].name}' has NaN"),
        "one bit": (change(flat, flat=flipped), rf"checksum of '{flat.layout.pieces[-1].name}'"),
        "too short": (change(flat, flat=flat.flat[:-1]), "flat tensor must be"),
        "integers": (change(flat, flat=flat.flat.int()), "flat tensor must be"),
        "another model": (change(flat, layout=other), "does not fit the model"),
        "layer outside": (change(flat, layout=outside), r"\(3, 'q_proj', 2\) is no"),
        "rank 0": (change(flat, layout=zero), r"\(0, 'q_proj', 0\) is no"),
        "another order": (change(flat, layout=swapped), "does not fit the model"),
        "scale NaN": (change(flat, scaling=(math.nan, *flat.scaling[1:])), r"q_proj': the scale is nan"),
        "scale too large": (change(flat, scaling=loud), r"down_proj': the scale is 2000, beyond 1000"),
        "scale missing": (change(flat, scaling=flat.scaling[:-1]), "9 modules, but 8 scales"),
        "old version": (change(flat, version=1), "never reused"),
        "float64": (change(flat, flat=flat.flat.double()), "flat tensor must be"),
        "checksum missing": (change(flat, checksums=flat.checksums[:-1]), "it has 17 checksums for 18 tensors"),
    }


@pytest.mark.parametrize("name", BROKEN)
def test_a_bad_flat_adapter_is_refused_by_name(name: str, folder: Path, config: Qwen3Config) -> None:
    flat = packer(random_adapter(folder), config).pack(2)
    bad, says = broken(flat)[name]
    held = slots(config)
    held.stage(random_adapter(folder, 1, seed=4))
    held.commit(1)
    before = [tensor.clone() for tensor in tensors_of(held)]
    with pytest.raises(AdapterError, match=says):
        held.stage(bad)
    assert held.version == 1 and all(map(torch.equal, before, tensors_of(held)))
    with pytest.raises(AdapterError, match="not resident"):
        held.commit(2)
    held.stage(flat)
    held.commit(2)
    assert held.version == 2


def test_checksums_are_of_what_was_published_whatever_is_served(folder: Path, config: Qwen3Config) -> None:
    flat = packer(random_adapter(folder), config).pack(1)
    held = slots(config, dtype=torch.bfloat16)
    bits = flat.flat.clone()
    bits.view(torch.int32)[flat.layout.pieces[0].first] ^= 1  # lost in bfloat16
    with pytest.raises(AdapterError, match="checksum"):
        held.stage(dataclasses.replace(flat, flat=bits))
    held.stage(flat)
    held.commit(1)

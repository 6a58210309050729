"""Adapters keep their bits, types and faults on the way between processes."""

from __future__ import annotations

import math
import pickle

import pytest
import torch

from actors.adapter_wire import pack_adapter, unpack_adapter
from ember_ray.model.lora import AdapterUpdate


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int32])
def test_bits_and_types_survive(dtype: torch.dtype) -> None:
    tensor = (torch.randn(3, 5) * 100).to(dtype)
    update = AdapterUpdate(4, {"a": tensor, "transposed": tensor.T}, {"m": math.nan})
    there = unpack_adapter(pickle.loads(pickle.dumps(pack_adapter(update))))
    assert there.version == 4 and math.isnan(there.scaling["m"])
    for name, sent in update.tensors.items():
        assert there.tensors[name].dtype == dtype
        assert torch.equal(there.tensors[name], sent)


def test_special_values_survive_in_bfloat16() -> None:
    tensor = torch.tensor([[math.inf, -0.0, math.nan]], dtype=torch.bfloat16)
    there = unpack_adapter(pack_adapter(AdapterUpdate(1, {"a": tensor}))).tensors["a"]
    assert torch.equal(there.view(torch.int16), tensor.view(torch.int16))


def test_the_received_tensors_are_owned() -> None:
    packed = pack_adapter(AdapterUpdate(1, {"a": torch.zeros(2, 2)}))
    packed.arrays["a"].flags.writeable = False
    unpack_adapter(packed).tensors["a"].fill_(1.0)
    assert packed.arrays["a"].sum() == 0

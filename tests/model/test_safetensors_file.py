"""Our reader of safetensors against the library's, and against files that are none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from ember_ray.model import safetensors_file
from ember_ray.model.safetensors_file import read_float_tensors


def test_tensors_are_those_of_the_library_and_lie_in_one_storage(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(3, 5), "b": torch.randn(7).bfloat16(), "c": torch.randn(2, 2, 2).half(),
        "empty": torch.zeros(0, 4), "d": torch.randn(1).double(),
    }  # fmt: skip
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    ours, theirs = read_float_tensors(tmp_path / "x.safetensors"), load_file(tmp_path / "x.safetensors")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor)
    assert len({tensor.untyped_storage().data_ptr() for tensor in ours.values()}) == 1


def test_several_readers_read_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors_file, "_LEAST_PART", 1000)
    tensors = {f"t{number}": torch.randn(137) for number in range(50)}
    save_file(tensors, tmp_path / "x.safetensors")
    ours = read_float_tensors(tmp_path / "x.safetensors")
    assert all(torch.equal(ours[name], tensor) for name, tensor in tensors.items())


def test_what_is_not_there_or_no_float_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"whole": torch.ones(3, dtype=torch.int64)}, path)
    with pytest.raises(ValueError, match="tensor 'whole': its dtype is I64"):
        read_float_tensors(path)
    for content in (b"", b"\0" * 8, b"\xff" * 40, (2).to_bytes(8, "little") + b"[]"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="no safetensors file"):
            read_float_tensors(path)
    header = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 7)
    with pytest.raises(ValueError, match=r"tensor 'a': bytes 0 to 8 of 7 do not hold F32 \[2\]"):
        read_float_tensors(path)


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_spoilt_file_is_refused_or_read_as_the_library_reads_it(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4)}, path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(content[: data.draw(st.integers(0, len(content)))]))
    try:
        ours = read_float_tensors(path)
    except ValueError:
        return
    try:
        theirs = load_file(path)
    except Exception:  # it is stricter: it also minds gaps and names that are there twice
        return
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name].nan_to_num(), theirs[name].nan_to_num()) for name in theirs)

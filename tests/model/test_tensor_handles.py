"""Tensors of one process opened in another, real ones."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ember_ray.model.tensor_handles import HandleError, empty_shared, export_tensor, is_here, open_tensor
from tests.support import tensor_process as there
from tests.support.tensor_process import TensorProcess


def _named_memory() -> set[str]:
    return {entry.name for entry in Path("/dev/shm").iterdir()}


def _left_behind(before: set[str]) -> set[str]:
    """Names that are new and stay; those of other tests that run beside this one come and go."""
    new = _named_memory() - before
    for _ in range(50):
        if new:
            time.sleep(0.1)
            new &= _named_memory()
    return new


def _files_held() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_views_of_shared_memory_are_opened_as_they_are() -> None:
    flat = empty_shared([24], torch.float32, "cpu")
    flat.copy_(torch.arange(24.0))
    for view in (flat, flat[3:7], flat.view(4, 6)[1:, ::2], flat.view(4, 6).t(), flat[:0], flat[5]):
        opened = open_tensor(export_tensor(view))
        assert torch.equal(opened, view) and opened.stride() == view.stride()
    halves = flat.view(torch.bfloat16)[8:16]
    opened = open_tensor(export_tensor(halves))
    opened.fill_(1.5)
    assert halves.eq(1.5).all() and opened.dtype == torch.bfloat16


def test_no_file_stays_open() -> None:
    before = _files_held()
    tensor = empty_shared([8], torch.float32, "cpu")
    handle = export_tensor(tensor)
    opened, again = open_tensor(handle), open_tensor(handle)
    held = _files_held()
    assert opened.data_ptr() == again.data_ptr()  # one mapping
    del opened, again
    assert _files_held() < held
    del tensor
    assert _files_held() == before
    with pytest.raises(HandleError, match="ended or let it go"):
        open_tensor(handle)
    other = empty_shared([8], torch.float32, "cpu")  # its file has the number that the first one had
    with pytest.raises(HandleError, match="ended or let it go"):
        open_tensor(handle)
    assert other.eq(0).all()


def test_what_cannot_be_shared_is_refused() -> None:
    with pytest.raises(HandleError, match="this one is private"):
        export_tensor(torch.zeros(3))
    handle = export_tensor(empty_shared([3], torch.float32, "cpu"))
    with pytest.raises(HandleError, match="another host"):
        open_tensor(replace(handle, host="elsewhere"))
    assert is_here(handle, "cpu")


@pytest.mark.slow
def test_two_processes_share_memory_and_either_may_be_killed() -> None:
    before = _named_memory()
    with TensorProcess() as owner, TensorProcess() as user:
        handle = owner(there.make, "t", [1.0, 2.0, 3.0], "bfloat16", "cpu")
        user(there.take, "t", handle)
        mine = open_tensor(handle)
        owner(there.write, "t", [4.0, 5.0, 6.0])
        assert user(there.read, "t") == mine.tolist() == [4.0, 5.0, 6.0]
        user(there.write, "t", [7.0, 8.0, 9.0])
        assert owner(there.read, "t") == [7.0, 8.0, 9.0]
        user.kill()
        assert owner(there.read, "t") == mine.tolist() == [7.0, 8.0, 9.0]
        owner.kill()
        assert mine.tolist() == [7.0, 8.0, 9.0]  # what is open stays
        del mine
        with pytest.raises(HandleError, match="ended or let it go"):
            open_tensor(handle)
    assert not _left_behind(before)


@pytest.mark.gpu
def test_cuda_memory_is_shared_and_either_may_be_killed() -> None:
    before = _named_memory()
    with TensorProcess() as owner, TensorProcess() as user:
        owner(there.make, "before", [0.0] * 100, "float32", "cuda")  # so that the next is not at the beginning
        handle = owner(there.make, "t", [1.0, 2.0, 3.0], "bfloat16", "cuda")
        user(there.take, "t", handle)
        mine = open_tensor(handle)
        assert mine.dtype == torch.bfloat16 and is_here(handle, mine.device)
        owner(there.write, "t", [4.0, 5.0, 6.0])
        assert user(there.read, "t") == mine.tolist() == [4.0, 5.0, 6.0]
        user(there.write, "t", [7.0, 8.0, 9.0])
        assert owner(there.read, "t") == [7.0, 8.0, 9.0]
        user.kill()
        assert owner(there.read, "t") == mine.tolist() == [7.0, 8.0, 9.0]
        owner.kill()
        assert mine.tolist() == [7.0, 8.0, 9.0]
        del mine
        torch.cuda.synchronize()
        with pytest.raises(HandleError):
            open_tensor(handle)
    assert not _left_behind(before)


@pytest.mark.gpu
def test_a_closed_cuda_tensor_gives_back_what_it_mapped() -> None:
    with TensorProcess() as owner:
        for _ in range(50):
            handle = owner(there.make, "t", [1.0] * 1000, "float32", "cuda")
            opened = open_tensor(handle)
            assert float(opened.sum()) == 1000.0
            del opened
            owner(there.drop, "t")
        with pytest.raises(HandleError):  # CUDA opens no handle in the process that made it
            open_tensor(export_tensor(torch.zeros(4, device="cuda")))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_tensor_is_found_by_its_gpu_whatever_the_number() -> None:
    with TensorProcess(CUDA_VISIBLE_DEVICES="1") as owner:
        handle = owner(there.make, "t", [1.0, 2.0, 3.0], "bfloat16", "cuda")
        with TensorProcess(CUDA_VISIBLE_DEVICES="0,1") as both:
            both(there.take, "t", handle)
            assert both(there.place, "t")[0] == "cuda:1"
            assert both(there.read, "t") == [1.0, 2.0, 3.0]
        with TensorProcess(CUDA_VISIBLE_DEVICES="1,0") as turned:
            turned(there.take, "t", handle)
            assert turned(there.place, "t")[0] == "cuda:0"
        with TensorProcess(CUDA_VISIBLE_DEVICES="0") as other:
            with pytest.raises(RuntimeError, match="HandleError: .* hides from this process"):
                other(there.take, "t", handle)
            assert other(there.copy_from_peer, handle, "cuda") == [1.0, 2.0, 3.0]

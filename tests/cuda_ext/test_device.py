from __future__ import annotations

import ctypes
from dataclasses import replace

import pytest
import torch

from cuda_ext import library
from cuda_ext.device import CudaFacts, CudaUnavailable, gather, require_cuda, what_is_wrong

GOOD = CudaFacts(
    torch_version="2.11.0+cu130",
    torch_cuda="13.0",
    driver=13000,
    gpus=2,
    index=1,
    name="NVIDIA H200",
    capability=(9, 0),
    library_error=None,
    library_cuda=13000,
    built_for="800,860,890,900",
    probe_status=0,
)


def test_a_device_that_runs_the_probe_is_good() -> None:
    assert what_is_wrong(GOOD) is None
    assert what_is_wrong(replace(GOOD, driver=13020, capability=(8, 0))) is None
    assert what_is_wrong(replace(GOOD, torch_cuda="12.8", driver=13000)) is None


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        (CudaFacts("2.13.0+cpu", None), ["torch 2.13.0+cpu is built without CUDA", "install a CUDA build of torch"]),
        (CudaFacts("2.11.0", "13.0"), ["no NVIDIA driver", "install one"]),
        (
            replace(GOOD, driver=12080, gpus=0),
            ["driver is too old for torch 2.11.0+cu130", "knows CUDA 12.8", "13.0 is needed", "update the driver"],
        ),
        (replace(GOOD, gpus=0, torch_error="No CUDA GPUs are available"), ["shows no GPU", "CUDA_VISIBLE_DEVICES"]),
        (replace(GOOD, torch_error="CUDA unknown error"), ["cannot start CUDA (CUDA unknown error)", "nvidia-smi"]),
        (replace(GOOD, index=2), ["no GPU 2, only 2", "name another"]),
        (
            replace(GOOD, name="Tesla T4", capability=(7, 5)),
            ["Tesla T4 has compute capability 7.5", "need 8.0", "newer GPU"],
        ),
        (replace(GOOD, library_error="missing"), ["were not built", "pip install -e .", "CUDA_HOME"]),
        (replace(GOOD, library_error="invalid ELF header"), ["cannot be loaded (invalid ELF header)", "pip install"]),
        (
            replace(GOOD, torch_cuda="12.8", driver=12090),
            ["too old for the CUDA kernels", "knows CUDA 12.9", "built with 13.0", "update the driver"],
        ),
        (
            replace(GOOD, probe_status=209, built_for="800,860", capability=(12, 0)),
            ["built for compute capability 8.0, 8.6", "NVIDIA H200 has 12.0", "EMBER_CUDA_ARCHS unset"],
        ),
        (replace(GOOD, probe_status=222), ["built for compute capability 8.0, 8.6, 8.9, 9.0"]),
        (replace(GOOD, probe_status=700, probe_error="illegal address"), ["first kernel failed", "illegal address"]),
    ],
)
def test_each_fault_is_one_sentence_with_the_way_out(facts: CudaFacts, words: list[str]) -> None:
    problem = what_is_wrong(facts)
    assert problem is not None and "\n" not in problem and not problem.endswith(".")
    for word in words:
        assert word in problem


def test_the_first_fault_is_named_when_there_are_several() -> None:
    assert "too old for torch" in (what_is_wrong(replace(GOOD, driver=11040, library_error="missing")) or "")
    assert "need 8.0" in (what_is_wrong(replace(GOOD, capability=(7, 0), library_error="missing")) or "")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_a_machine_without_a_gpu_is_refused_in_words() -> None:
    with pytest.raises(CudaUnavailable, match=r"device 'cuda:0' cannot be used: .*device 'cpu'"):
        require_cuda("cuda:0")
    assert issubclass(CudaUnavailable, ValueError)


def test_only_cuda_devices_are_asked_for() -> None:
    with pytest.raises(CudaUnavailable, match="'cpu' is no CUDA device"):
        require_cuda("cpu")


def test_an_older_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "load", lambda: ctypes.CDLL(None))
    with pytest.raises(library.KernelError, match=r"older than this code .* tools/build_cuda.py"):
        library.launch("no_such_kernel", 1)


@pytest.mark.gpu
def test_the_gpu_of_this_machine_is_good() -> None:
    require_cuda("cuda")
    facts = gather(0)
    assert facts.probe_status == 0 and facts.library_cuda >= 12000 and facts.built_for
    with pytest.raises(CudaUnavailable, match=r"there is no GPU 99"):
        require_cuda("cuda:99")

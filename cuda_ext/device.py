"""Whether a CUDA device can run the kernels and, where it cannot, why and what helps."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, replace

import torch

from cuda_ext import library

OLDEST_CAPABILITY = (8, 0)
NO_KERNEL_IMAGE = (209, 222)
"""cudaErrorNoKernelImageForDevice, and cudaErrorUnsupportedPtxVersion: PTX newer than the driver can compile."""

ON_CPU = "or use the device 'cpu'"
REBUILD = "run `pip install -e .` again with the CUDA toolkit's nvcc on the PATH or CUDA_HOME set"


class CudaUnavailable(ValueError):
    """A device that cannot run the kernels; the text says why in one sentence, and the way out."""


@dataclass(frozen=True)
class CudaFacts:
    """What is known of a device, in the order in which it is asked; what was not reached is left at its default.

    Attributes:
        torch_version, torch_cuda: torch and the CUDA version it was built with, if any ("13.0").
        driver: the CUDA version that the driver knows, times 1000 (13000); None where there is no driver.
        gpus: GPUs that the driver shows.
        torch_error: what torch says when CUDA cannot be started.
        index: of the wanted device.
        name, capability: of that GPU.
        library_error: None, "missing", or the loader's words.
        library_cuda, built_for: the CUDA version of the library (13000) and its architectures ("800,860").
        probe_status, probe_error: of a kernel that writes one number: a cudaError_t (0: it ran) and its words.
    """

    torch_version: str
    torch_cuda: str | None
    driver: int | None = None
    gpus: int = 0
    torch_error: str | None = None
    index: int = 0
    name: str = ""
    capability: tuple[int, int] = (0, 0)
    library_error: str | None = "missing"
    library_cuda: int = 0
    built_for: str = ""
    probe_status: int = -1
    probe_error: str = "it was not run"


def require_cuda(device: torch.device | str) -> None:
    """Makes sure that the kernels run on a CUDA device; it runs one that writes a number.

    Raises:
        CudaUnavailable: one sentence on what is wrong and what helps.
    """
    device = torch.device(device)
    if device.type != "cuda":
        raise CudaUnavailable(f"'{device}' is no CUDA device")
    problem = what_is_wrong(gather(device.index or 0))
    if problem is not None:
        raise CudaUnavailable(f"device '{device}' cannot be used: {problem}")


def what_is_wrong(facts: CudaFacts) -> str | None:
    """The first thing that keeps the kernels from running, with the way out, or None."""
    if facts.torch_cuda is None:
        return (
            f"torch {facts.torch_version} is built without CUDA; install a CUDA build of torch "
            f"(https://pytorch.org/get-started/locally), {ON_CPU}"
        )
    if facts.driver is None:
        return f"this machine has no NVIDIA driver (libcuda.so.1 is not found); install one, {ON_CPU}"
    wanted = int(facts.torch_cuda.partition(".")[0])
    if facts.driver // 1000 < wanted:
        return (
            f"the NVIDIA driver is too old for torch {facts.torch_version}: it knows CUDA {_version(facts.driver)} and "
            f"{facts.torch_cuda} is needed; update the driver, install a torch for an older CUDA, {ON_CPU}"
        )
    if facts.gpus == 0:
        return f"the NVIDIA driver shows no GPU; look at nvidia-smi and CUDA_VISIBLE_DEVICES, {ON_CPU}"
    if facts.torch_error is not None:
        return f"torch cannot start CUDA ({facts.torch_error}); look at nvidia-smi and the driver, {ON_CPU}"
    if facts.index >= facts.gpus:
        return f"there is no GPU {facts.index}, only {facts.gpus} (counted from 0); name another, {ON_CPU}"
    here = f"{facts.capability[0]}.{facts.capability[1]}"
    if facts.capability < OLDEST_CAPABILITY:
        return (
            f"{facts.name} has compute capability {here} and the kernels need 8.0 (Ampere) or newer; use a newer GPU, "
            f"{ON_CPU}"
        )
    if facts.library_error == "missing":
        return f"the CUDA kernels were not built when Ember Ray was installed; {REBUILD}, {ON_CPU}"
    if facts.library_error is not None:
        return f"the CUDA kernels cannot be loaded ({facts.library_error}); {REBUILD}, {ON_CPU}"
    if facts.driver // 1000 < facts.library_cuda // 1000:
        return (
            f"the NVIDIA driver is too old for the CUDA kernels: it knows CUDA {_version(facts.driver)} and they were "
            f"built with {_version(facts.library_cuda)}; update the driver or build them with an older CUDA toolkit"
        )
    if facts.probe_status in NO_KERNEL_IMAGE:
        built = ", ".join(f"{int(arch) // 100}.{int(arch) // 10 % 10}" for arch in facts.built_for.split(",") if arch)
        return (
            f"the CUDA kernels are built for compute capability {built} and {facts.name} has {here}; {REBUILD} and "
            "EMBER_CUDA_ARCHS unset"
        )
    if facts.probe_status != 0:
        return f"a first kernel failed on {facts.name} ({facts.probe_error}); look at nvidia-smi and the system log"
    return None


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def gather(index: int) -> CudaFacts:
    """Asks torch, the driver, the GPU and the library, one after the other, until one has a bad answer."""
    known = CudaFacts(torch.__version__, torch.version.cuda, index=index)
    if known.torch_cuda is None:
        return known
    known = replace(known, driver=_driver_version())
    if known.driver is None:
        return known
    known = replace(known, gpus=torch.cuda.device_count())
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as fault:
        return replace(known, torch_error=str(fault).partition("\n")[0].rstrip("."))
    if index >= known.gpus:
        return known
    known = replace(known, name=torch.cuda.get_device_name(index), capability=torch.cuda.get_device_capability(index))
    return known if known.capability < OLDEST_CAPABILITY else _ask_library(known)


def _driver_version() -> int | None:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    number = ctypes.c_int()
    return number.value if driver.cuDriverGetVersion(ctypes.byref(number)) == 0 else None


def _ask_library(known: CudaFacts) -> CudaFacts:
    if not library.PATH.exists():
        return known
    try:
        loaded = library.load()
    except (OSError, AttributeError) as fault:  # no library of this machine, or one older than this code
        return replace(known, library_error=str(fault))
    known = replace(
        known,
        library_error=None,
        library_cuda=loaded.ember_runtime_version(),
        built_for=loaded.ember_built_for().decode(),
    )
    with torch.cuda.device(known.index):
        answer = torch.zeros(1, dtype=torch.int32, device="cuda")
        try:
            library.launch("probe", answer)
        except library.KernelError as fault:
            return replace(known, probe_status=fault.status, probe_error=str(fault))
        try:
            right = int(answer) == 42
        except RuntimeError as fault:
            return replace(known, probe_error=str(fault).partition("\n")[0])
    return replace(known, probe_status=0) if right else replace(known, probe_error="it wrote a wrong number")

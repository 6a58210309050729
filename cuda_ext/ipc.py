"""Memory of a GPU shown to other processes of the host, by CUDA's IPC handles.

Called on the driver itself (``libcuda``): torch's own way to share a CUDA tensor keeps a counter file in ``/dev/shm``
for each, which stays there when a process is killed. Here nothing has a name: what is left when a process dies is
nothing. Handles are made with ``cuIpcGetMemHandle`` and opened with ``cuIpcOpenMemHandle`` (CUDA Driver API, section
"Memory Management").
"""

from __future__ import annotations

import ctypes
import weakref
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

_LAZY_PEER_ACCESS = 1
_HANDLE_BYTES = 64


class _Handle(ctypes.Structure):
    _fields_ = [("reserved", ctypes.c_ubyte * _HANDLE_BYTES)]


@dataclass(frozen=True)
class IpcMemory:
    """One allocation of the driver; torch's allocator makes several tensors of one.

    Attributes:
        handle: CUDA's 64 bytes.
        gpu: UUID of the GPU that it lies on; numbers of GPUs differ between processes (CUDA_VISIBLE_DEVICES).
    """

    handle: bytes
    gpu: str


def gpu_uuid(device: torch.device | str | int) -> str:
    """Tells one GPU from another in all processes of a host."""
    return str(torch.cuda.get_device_properties(device).uuid)


def visible_gpu(uuid: str) -> int | None:
    """This process's number of a GPU; None where CUDA_VISIBLE_DEVICES hides it."""
    return next((index for index in range(torch.cuda.device_count()) if gpu_uuid(index) == uuid), None)


def export_memory(tensor: Tensor) -> tuple[IpcMemory, int]:
    """The allocation that a CUDA tensor's storage lies in, and where in it the storage begins, in bytes.

    The caller keeps the tensor alive as long as anybody has it open, and lets nobody read before the work that fills
    it is done: memory is shown, not streams.

    Raises:
        RuntimeError: the memory cannot be shown.
    """
    with torch.cuda.device(tensor.device):
        torch.cuda.current_stream().synchronize()  # makes the context that the driver needs, in whatever thread
        pointer = tensor.untyped_storage().data_ptr()
        base, size, handle = ctypes.c_uint64(), ctypes.c_size_t(), _Handle()
        _call("cuMemGetAddressRange_v2", ctypes.byref(base), ctypes.byref(size), ctypes.c_uint64(pointer))
        _call("cuIpcGetMemHandle", ctypes.byref(handle), base)
    return IpcMemory(bytes(handle.reserved), gpu_uuid(tensor.device)), pointer - base.value


class OpenedMemory:
    """Memory of another process in this one's address space, until this object is let go.

    Args:
        device: the GPU that will read it: the one that it lies on, or one with peer access to that.

    Raises:
        RuntimeError: the process that showed it has ended, is this one itself, or the two GPUs have no peer access.

    Attributes:
        pointer: where the allocation begins here.
    """

    def __init__(self, memory: IpcMemory, device: torch.device | str | int) -> None:
        self.device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
        handle, pointer = _Handle.from_buffer_copy(memory.handle), ctypes.c_uint64()
        with torch.cuda.device(self.device):
            torch.cuda.current_stream().synchronize()  # makes the context that the driver needs
            _call("cuIpcOpenMemHandle_v2", ctypes.byref(pointer), handle, ctypes.c_uint(_LAZY_PEER_ACCESS))
        self.pointer = pointer.value
        # not when the interpreter ends: CUDA may be gone by then, and with the process its mappings go anyway
        weakref.finalize(self, _close, self.pointer, self.device).atexit = False

    def tensor(self, offset: int, nbytes: int) -> Tensor:
        """uint8 [nbytes] over this memory, which it keeps open; on the GPU that the memory lies on."""
        # with another device, or "cuda" where that is another one, torch would make a copy there
        return torch.as_tensor(_Bytes(self, self.pointer + offset, nbytes), device=self.device)

    def copy_to(self, out: Tensor, offset: int) -> None:
        """Bytes from ``offset`` on into a contiguous tensor on the reading GPU, queued on its current stream."""
        with torch.cuda.device(out.device):
            _call(
                "cuMemcpyDtoDAsync_v2",
                ctypes.c_uint64(out.data_ptr()),
                ctypes.c_uint64(self.pointer + offset),
                ctypes.c_size_t(out.nbytes),
                ctypes.c_void_p(torch.cuda.current_stream().cuda_stream),
            )


class _Bytes:
    """What torch makes a tensor of; the tensor keeps it, and it keeps the memory open."""

    def __init__(self, memory: OpenedMemory, pointer: int, nbytes: int) -> None:
        self._memory = memory
        self.__cuda_array_interface__ = {
            "shape": (nbytes,), "typestr": "|u1", "data": (pointer, False), "version": 3, "strides": None,
        }  # fmt: skip


def _close(pointer: int, device: torch.device) -> None:
    with torch.cuda.device(device):
        torch.cuda.synchronize()  # kernels that read it
        _call("cuIpcCloseMemHandle", ctypes.c_uint64(pointer))


@cache
def _driver() -> Any:
    driver = ctypes.CDLL("libcuda.so.1")
    driver.cuIpcOpenMemHandle_v2.argtypes = [ctypes.c_void_p, _Handle, ctypes.c_uint]  # the handle goes by value
    return driver


def _call(name: str, *arguments: Any) -> None:
    driver = _driver()
    status = getattr(driver, name)(*arguments)
    if status:
        text = ctypes.c_char_p()
        driver.cuGetErrorString(status, ctypes.byref(text))
        words = text.value.decode() if text.value else "unknown error"
        raise RuntimeError(f"CUDA memory cannot be shared between processes: {name}: {words} ({status})")

"""Tensors in memory that several processes of one host see: the owner exports a handle, others open it.

On a CPU the memory is a file without a name (``memfd``), which others reach through the owner's entry in ``/proc``; on
a GPU it is any CUDA memory, by CUDA's IPC handles (:mod:`cuda_ext.ipc`). Nothing is ever in ``/dev/shm``: the kernel
frees the memory when the last process that has it open ends, however it ends.

Who keeps what alive: the owner keeps the tensor until all others have opened it, and on a GPU as long as any of them
uses it. An opened tensor, and every view of it, keeps its mapping. A CPU tensor that was opened lives on when its owner
is gone; on a GPU the driver keeps the memory until the last one closes it, but that is not promised: let it go when
the owner is lost. Nobody waits for anybody: that the owner's writes are done before others read (on a GPU: the stream
synchronized) is agreed between them by other means.
"""

from __future__ import annotations

import mmap
import os
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from cuda_ext.ipc import IpcMemory, OpenedMemory, export_memory, gpu_uuid, visible_gpu


class HandleError(RuntimeError):
    """A tensor that cannot be shown to other processes, or not be opened here; the text says why."""


@dataclass(frozen=True)
class HostMemory:
    """A memfd: the process that holds it, its number there, and what the file must be (numbers are used again)."""

    pid: int
    fd: int
    inode: tuple[int, int]


@dataclass(frozen=True)
class TensorHandle:
    """A tensor in another process, for :func:`open_tensor`; small, hashable, to be pickled.

    Attributes:
        host: which machine (the boot id of its kernel).
        nbytes: of the storage, from ``start`` bytes behind the beginning of the memory on.
        shape, stride, offset: of the tensor in its storage, in elements.
    """

    host: str
    memory: HostMemory | IpcMemory
    start: int
    nbytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


def empty_shared(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """A contiguous tensor that can be exported; not initialized on a GPU, zeros on a CPU.

    On a CPU each costs two file descriptors: take one flat tensor and views of it for many.

    Raises:
        HandleError: the system has no memfd (only Linux does).
    """
    device = torch.device(device)
    if device.type == "cuda":
        return torch.empty(tuple(shape), dtype=dtype, device=device)
    if not hasattr(os, "memfd_create"):
        raise HandleError("memory cannot be shared between processes on this system; it needs Linux (memfd)")
    count = torch.Size(shape).numel()
    nbytes = max(1, count * dtype.itemsize)
    fd = os.memfd_create("ember", os.MFD_CLOEXEC)
    os.ftruncate(fd, nbytes)
    memory = _map(fd, nbytes)
    weakref.finalize(memory, os.close, fd)
    tensor = torch.frombuffer(memory, dtype=dtype, count=count) if count else torch.empty(0, dtype=dtype)
    info = os.fstat(fd)
    _OWNED[torch.frombuffer(memory, dtype=torch.uint8).data_ptr()] = memory
    _FILES[memory] = HostMemory(os.getpid(), fd, (info.st_dev, info.st_ino))
    return tensor.view(tuple(shape))


def export_tensor(tensor: Tensor) -> TensorHandle:
    """A handle of a tensor: of any on a GPU, on a CPU of those from :func:`empty_shared` and their views.

    Raises:
        HandleError: the memory is private.
    """
    memory: HostMemory | IpcMemory
    start = 0
    if tensor.device.type == "cuda":
        try:
            memory, start = export_memory(tensor)
        except RuntimeError as error:
            raise HandleError(str(error)) from error
    else:
        mapped = _OWNED.get(tensor.untyped_storage().data_ptr())
        if mapped is None or mapped not in _FILES:
            raise HandleError("a tensor on the CPU can be shared if it is from empty_shared(); this one is private")
        memory = _FILES[mapped]
        if memory.pid != os.getpid():
            raise HandleError("a forked process does not own its parent's tensors and cannot export them")
    return TensorHandle(
        _host(), memory, start, tensor.untyped_storage().nbytes(), tensor.dtype,
        tuple(tensor.shape), tuple(tensor.stride()), int(tensor.storage_offset()),
    )  # fmt: skip


def open_tensor(handle: TensorHandle) -> Tensor:
    """The same memory as a tensor of this process: what either writes, the other reads.

    On a GPU the tensor is on the owner's GPU, by whatever number this process knows it; a copy to another of the
    process's GPUs goes from card to card. Where CUDA_VISIBLE_DEVICES hides that GPU, see :class:`PeerTensor`.

    Raises:
        HandleError: the owner has ended, is on another host, is this process itself (on a GPU), or the GPU is hidden.
    """
    _check_host(handle)
    if isinstance(handle.memory, HostMemory):
        flat = torch.frombuffer(_mapping(handle.memory, handle.nbytes), dtype=torch.uint8, count=handle.nbytes)
    else:
        index = visible_gpu(handle.memory.gpu)
        if index is None:
            raise HandleError(
                f"the tensor lies on GPU {handle.memory.gpu}, which CUDA_VISIBLE_DEVICES hides from this process"
            )
        flat = _opened(handle.memory, index).tensor(handle.start, handle.nbytes)
    storage = flat.untyped_storage()
    return torch.empty(0, dtype=handle.dtype, device=flat.device).set_(
        storage, handle.offset, handle.shape, handle.stride
    )


class PeerTensor:
    """A contiguous tensor on another GPU of the host, to be copied from without a context on that GPU.

    Args:
        device: the GPU that copies; it needs peer access to the owner's.

    Raises:
        HandleError: the owner has ended or is on another host, or there is no peer access; or the device is no GPU.
    """

    def __init__(self, handle: TensorHandle, device: torch.device | str) -> None:
        _check_host(handle)
        if not isinstance(handle.memory, IpcMemory) or torch.device(device).type != "cuda":
            raise HandleError(f"the tensor and {device} are not two GPUs")
        index = torch.device(device).index
        self._handle = handle
        self._memory = _opened(handle.memory, torch.cuda.current_device() if index is None else index)

    def copy_to(self, out: Tensor) -> None:
        """Its values into a contiguous tensor of the same shape and dtype, queued on the current stream."""
        handle = self._handle
        if tuple(out.shape) != handle.shape or out.dtype != handle.dtype or not out.is_contiguous():
            raise ValueError(f"cannot copy {handle.dtype} {handle.shape} into {out.dtype} {tuple(out.shape)}")
        self._memory.copy_to(out, handle.start + handle.offset * handle.dtype.itemsize)


def is_here(handle: TensorHandle, device: torch.device | str) -> bool:
    """Whether :func:`open_tensor` gives a tensor on this very device."""
    device = torch.device(device)
    if isinstance(handle.memory, HostMemory):
        return device.type == "cpu"
    return device.type == "cuda" and gpu_uuid(device) == handle.memory.gpu


_OWNED: weakref.WeakValueDictionary[int, mmap.mmap] = weakref.WeakValueDictionary()
"""By the address where it is mapped: the memory that this process made."""

_FILES: weakref.WeakKeyDictionary[mmap.mmap, HostMemory] = weakref.WeakKeyDictionary()

_MAPPED: weakref.WeakValueDictionary[HostMemory, mmap.mmap] = weakref.WeakValueDictionary()
_OPENED: weakref.WeakValueDictionary[tuple[IpcMemory, int], OpenedMemory] = weakref.WeakValueDictionary()
"""What is open here already, so that a model's many tensors share one mapping of one memory."""


def _map(fd: int, nbytes: int) -> mmap.mmap:
    return mmap.mmap(fd, nbytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)


def _mapping(memory: HostMemory, nbytes: int) -> mmap.mmap:
    mapped = _MAPPED.get(memory)
    if mapped is None:
        gone = HandleError(f"process {memory.pid}, which owned the shared tensor, has ended or let it go")
        try:
            fd = os.open(f"/proc/{memory.pid}/fd/{memory.fd}", os.O_RDWR | os.O_CLOEXEC)
        except (FileNotFoundError, ProcessLookupError) as error:
            raise gone from error
        except OSError as error:
            raise HandleError(f"the memory of process {memory.pid} cannot be opened: {error.strerror}") from error
        try:
            info = os.fstat(fd)
            if (info.st_dev, info.st_ino) != memory.inode:
                raise gone
            mapped = _map(fd, nbytes)
        finally:
            os.close(fd)
        _MAPPED[memory] = mapped
    return mapped


def _opened(memory: IpcMemory, index: int) -> OpenedMemory:
    opened = _OPENED.get((memory, index))
    if opened is None:
        try:
            opened = _OPENED[memory, index] = OpenedMemory(memory, index)
        except RuntimeError as error:
            raise HandleError(str(error)) from error
    return opened


@cache
def _host() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _check_host(handle: TensorHandle) -> None:
    if handle.host != _host():
        raise HandleError("the tensor is in a process of another host; only processes of one host share memory")

"""A learner's adapters in memory that stages see: two flat buffers by turns, and a notice of what is in which.

The learner owns an :class:`AdapterOutbox`. To publish it writes the next buffer and hands round the notice, a few
kilobytes that say "version v is in buffer b, with these checksums". A stage's :class:`AdapterInbox` opens the buffers
at the first notice of an outbox and reads them in place from then on: on the same GPU without a copy, on another GPU
of the host by one copy from card to card, from host memory by one copy to the device.

A buffer is written again at the next publication but one. Who has it open by then sees other values, and the checksums
of the notice tell.
"""

from __future__ import annotations

import os
import pickle
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ember_ray.model.adapter_layout import AdapterLayout, AdapterPacker, FlatAdapter
from ember_ray.model.lora import AdapterUpdate, check_adapter
from ember_ray.model.tensor_handles import (
    HandleError,
    HostMemory,
    PeerTensor,
    TensorHandle,
    empty_shared,
    export_tensor,
    is_here,
    open_tensor,
)

SOURCES_KEPT = 2
"""Outboxes whose buffers a stage keeps open: the learner's, and in the moment of its loss the next one's."""


@dataclass(frozen=True)
class AdapterSource:
    """What stays the same over all publications of an outbox.

    Attributes:
        buffers: flat tensors [layout.numel] of one dtype.
        scaling: s of each module of the layout.
    """

    buffers: tuple[TensorHandle, ...]
    layout: AdapterLayout
    scaling: tuple[float, ...]


@dataclass(frozen=True)
class AdapterNotice:
    """A version that is there to be read; small, to be pickled.

    Attributes:
        version: its number; never reused.
        source_id: the outbox.
        source: its `AdapterSource`, pickled once: those who pass it on, or know it, need not look into it.
        buffer: which of the source's buffers.
        checksums: int64 of each piece of the layout as bytes, see :func:`cuda_ext.checked_copy.checked_copy`.
    """

    version: int
    source_id: str
    source: bytes
    buffer: int
    checksums: bytes


class AdapterOutbox:
    """The learner's side.

    Args:
        update: the learner's own tensors, which its optimizer changes in place, with their scales; its version is not
            looked at.
        shapes, num_layers: of the model, see ``check_adapter``.
        dtype: of the buffers, the one that the engine serves in.
        device: of the buffers: the learner's own, or ``cpu`` where stages cannot read that one's memory.

    Raises:
        AdapterError: the engine would refuse it.
        HandleError: memory cannot be shared on this system.
    """

    def __init__(
        self,
        update: AdapterUpdate,
        shapes: Mapping[str, tuple[int, int]],
        num_layers: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        self._packer = AdapterPacker(check_adapter(update, shapes, num_layers, dtype), shapes, dtype)
        layout = replace(self._packer.layout)  # without what was worked out from it, which would travel too
        self._buffers = [empty_shared([layout.numel], dtype, device).zero_() for _ in range(2)]
        self._next = 0
        source = AdapterSource(tuple(map(export_tensor, self._buffers)), layout, self._packer.scaling)
        self._source, self._id = pickle.dumps(source), f"{os.getpid()}-{uuid.uuid4().hex}"

    @property
    def source(self) -> bytes:
        """For :meth:`AdapterInbox.obstacle`."""
        return self._source

    def write(self, version: int) -> AdapterNotice:
        """Puts the adapter as it is now into the next buffer; it is there when this returns.

        Raises:
            AdapterError: a value is NaN or infinite in the buffers' dtype.
        """
        adapter = self._packer.pack(version, self._buffers[self._next])
        notice = AdapterNotice(version, self._id, self._source, self._next, _bytes(adapter.checksums))
        self._next = (self._next + 1) % len(self._buffers)
        return notice


class AdapterInbox:
    """A stage's side.

    Args:
        device: of the stage.
    """

    def __init__(self, device: torch.device | str) -> None:
        self._device = torch.device(device)
        self._sources: dict[str, tuple[AdapterSource, list[Tensor | PeerTensor]]] = {}

    def obstacle(self, source: bytes) -> str | None:
        """Why this process cannot read an outbox; None where it can."""
        try:
            self._open(pickle.loads(source))
        except HandleError as error:
            return str(error)
        return None

    def read(self, notice: AdapterNotice) -> FlatAdapter:
        """The adapter that a notice tells of.

        Its tensor is the outbox's own where it lies on this device or in host memory: use it up before the next
        publication but one. Checksums are for whoever reads it to compare.

        Raises:
            HandleError: the outbox cannot be opened.
        """
        if notice.source_id not in self._sources:
            source: AdapterSource = pickle.loads(notice.source)
            self._sources[notice.source_id] = source, self._open(source)
            for old in list(self._sources)[:-SOURCES_KEPT]:
                del self._sources[old]
        source, buffers = self._sources[notice.source_id]
        buffer = buffers[notice.buffer]
        if isinstance(buffer, PeerTensor):
            handle = source.buffers[notice.buffer]
            flat = torch.empty(handle.shape, dtype=handle.dtype, device=self._device)
            buffer.copy_to(flat)
        else:
            flat = buffer
        checksums = torch.frombuffer(bytearray(notice.checksums), dtype=torch.int64)
        return FlatAdapter(notice.version, source.layout, flat, source.scaling, checksums)

    def _open(self, source: AdapterSource) -> list[Tensor | PeerTensor]:
        return [
            open_tensor(handle)
            if isinstance(handle.memory, HostMemory) or is_here(handle, self._device)
            else PeerTensor(handle, self._device)
            for handle in source.buffers
        ]


def _bytes(checksums: Tensor | None) -> bytes:
    assert checksums is not None
    return checksums.contiguous().numpy().tobytes()

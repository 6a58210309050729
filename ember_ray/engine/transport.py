"""How the stages of one pipeline reach each other: hidden states forward, results back, no driver in between."""

from __future__ import annotations

from collections import deque
from datetime import timedelta
from typing import Any, Protocol

import torch
from torch import Tensor


class TransportError(RuntimeError):
    """A peer is gone, or did not answer within the time limit."""


class Transport(Protocol):
    """Point-to-point messages between stages; tensors arrive in a given buffer, matched by tag.

    A sender keeps what it sends until :meth:`flush` has seen it leave, so call that while a batch runs.

    Attributes:
        rank, world_size: this stage and how many there are.
    """

    rank: int
    world_size: int

    def send(self, tensor: Tensor, to: int, tag: int) -> None:
        """Starts sending; the tensor must not be changed afterwards. Does not wait."""

    def receive(self, buffer: Tensor, source: int, tag: int) -> Tensor:
        """Waits until the buffer holds the message of that tag; returns it."""

    def flush(self, keep: int = 0) -> None:
        """Waits until all messages but the newest ``keep`` have left, and lets go of their tensors."""

    def close(self) -> None:
        """Ends the connection; waits of peers fail."""


class LoopbackTransport:
    """The transport of a single stage: there is nobody to talk to."""

    rank, world_size = 0, 1

    def send(self, tensor: Tensor, to: int, tag: int) -> None:
        raise TransportError(f"a single stage has no stage {to} to send to")

    def receive(self, buffer: Tensor, source: int, tag: int) -> Tensor:
        raise TransportError(f"a single stage has no stage {source} to receive from")

    def flush(self, keep: int = 0) -> None:
        """Nothing was sent."""

    def close(self) -> None:
        """Nothing is open."""


class ProcessGroupTransport:
    """Messages over a gloo process group of the stages' own (torch.distributed), tensors as raw bytes.

    Tensors of a GPU go through the host's memory, because gloo knows no other. gloo listens at the address of the
    host's name; on nodes where that is a loopback address, name the network interface in ``GLOO_SOCKET_IFNAME``.

    Args:
        rank, world_size: this stage and the number of stages.
        master_addr, master_port: where stage 0 listens during the rendezvous.
        timeout_s: limit of every wait, the rendezvous included.

    Raises:
        TransportError: a peer is gone or a wait is over its limit.
    """

    def __init__(
        self, rank: int, world_size: int, master_addr: str, master_port: int, timeout_s: float = 120.0
    ) -> None:
        from torch.distributed import ProcessGroupGloo, TCPStore

        self.rank, self.world_size = rank, world_size
        timeout = timedelta(seconds=timeout_s)
        try:
            self._store: TCPStore | None = TCPStore(master_addr, master_port, world_size, rank == 0, timeout)
            self._group: Any = ProcessGroupGloo(self._store, rank, world_size, timeout)
        except RuntimeError as fault:
            raise TransportError(
                f"stage {rank} of {world_size} found no peers at {master_addr}:{master_port} within {timeout_s:.0f} s: "
                f"{fault}"
            ) from fault
        self._sending: deque[tuple[Any, Tensor]] = deque()

    def send(self, tensor: Tensor, to: int, tag: int) -> None:
        payload = tensor.cpu().contiguous().view(torch.uint8).reshape(-1)
        try:
            self._sending.append((self._group.send([payload], to, tag), payload))
        except RuntimeError as fault:
            raise TransportError(f"stage {self.rank} cannot send to stage {to}: {fault}") from fault

    def receive(self, buffer: Tensor, source: int, tag: int) -> Tensor:
        host = buffer if buffer.device.type == "cpu" else torch.empty_like(buffer, device="cpu")
        try:
            self._group.recv([host.view(torch.uint8).reshape(-1)], source, tag).wait()
        except RuntimeError as fault:
            raise TransportError(f"stage {self.rank} got nothing from stage {source}: {fault}") from fault
        return buffer if host is buffer else buffer.copy_(host)

    def flush(self, keep: int = 0) -> None:
        try:
            # a send of gloo counts as completed only once it was waited for
            while len(self._sending) > keep:
                self._sending.popleft()[0].wait()
        except RuntimeError as fault:
            raise TransportError(f"stage {self.rank} could not deliver its messages: {fault}") from fault

    def close(self) -> None:
        self._sending.clear()
        self._group = None
        self._store = None

"""How the stages of one pipeline reach each other: hidden states forward, results back, no driver in between."""

from __future__ import annotations

import json
import logging
from collections import deque
from dataclasses import asdict
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from ember_ray.engine.nccl_link import NcclLink, StageDevice, make_nccl_group, obstacle_to_nccl

if TYPE_CHECKING:
    from torch.distributed import TCPStore

logger = logging.getLogger(__name__)


class TransportError(RuntimeError):
    """A peer is gone, or did not answer within the time limit."""


class Transport(Protocol):
    """Point-to-point messages between stages; tensors arrive in a given buffer, matched by tag.

    A sender keeps what it sends until :meth:`flush` has seen it leave, so call that while a batch runs.

    Attributes:
        rank, world_size: this stage and how many there are.
        is_ahead: the host is back from :meth:`receive` of a GPU's tensor before the message is there.
    """

    rank: int
    world_size: int

    @property
    def is_ahead(self) -> bool: ...

    def send(self, tensor: Tensor, to: int, tag: int) -> None:
        """Starts sending; the tensor must not be changed afterwards. Does not wait.

        Messages of a pair of stages are sent and received in the same order.
        """

    def receive(self, buffer: Tensor, source: int, tag: int) -> Tensor:
        """Returns the buffer; all work on its device after this call sees the message of that tag in it.

        The host may be back before the message is there: call :meth:`check` when it has seen results of that work.
        """

    def check(self) -> None:
        """Raises TransportError where a message that was received has not come; does not wait."""

    def flush(self, keep: int = 0) -> None:
        """Waits until all messages but the newest ``keep`` have left, and lets go of their tensors."""

    def close(self) -> None:
        """Ends the connection; waits of peers fail."""


class LoopbackTransport:
    """The transport of a single stage: there is nobody to talk to."""

    rank, world_size, is_ahead = 0, 1, False

    def send(self, tensor: Tensor, to: int, tag: int) -> None:
        raise TransportError(f"a single stage has no stage {to} to send to")

    def receive(self, buffer: Tensor, source: int, tag: int) -> Tensor:
        raise TransportError(f"a single stage has no stage {source} to receive from")

    def check(self) -> None:
        """Nothing can be missing."""

    def flush(self, keep: int = 0) -> None:
        """Nothing was sent."""

    def close(self) -> None:
        """Nothing is open."""


class ProcessGroupTransport:
    """Messages over process groups of the stages' own (torch.distributed), tensors as raw bytes.

    Tensors of the host go over gloo; so do those of GPUs, through the host's memory, unless all stages have a GPU of
    their own and NCCL: then GPU tensors go from GPU to GPU, ordered by the current streams, and the host does not
    wait for them (see :mod:`ember_ray.engine.nccl_link`). The way is agreed on when the stages meet, and logged.

    gloo listens at the address of the host's name; on nodes where that is a loopback address, name the network
    interface in ``GLOO_SOCKET_IFNAME`` (for NCCL: ``NCCL_SOCKET_IFNAME``).

    Args:
        rank, world_size: this stage and the number of stages.
        master_addr, master_port: where stage 0 listens during the rendezvous.
        timeout_s: limit of every wait, the rendezvous included.
        device: of this stage's hidden states.

    Raises:
        TransportError: a peer is gone or a wait is over its limit.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        master_addr: str,
        master_port: int,
        timeout_s: float = 120.0,
        device: str = "cpu",
    ) -> None:
        from torch.distributed import ProcessGroupGloo, TCPStore

        self.rank, self.world_size = rank, world_size
        timeout = timedelta(seconds=timeout_s)
        self._sending: deque[tuple[Any, Tensor]] = deque()
        self._nccl: NcclLink | None = None
        try:
            store = TCPStore(master_addr, master_port, world_size, rank == 0, timeout)
            self._store: TCPStore | None = store
            self._group: Any = ProcessGroupGloo(store, rank, world_size, timeout)
            self._nccl = self._agree_on_nccl(store, device, timeout)
        except RuntimeError as fault:
            raise TransportError(
                f"stage {rank} of {world_size} found no peers at {master_addr}:{master_port} within {timeout_s:.0f} s: "
                f"{fault}"
            ) from fault

    def _agree_on_nccl(self, store: TCPStore, device: str, timeout: timedelta) -> NcclLink | None:
        """NCCL where all stages can have it; all come to the same answer, stage 0 logs it."""
        devices = [StageDevice(**told) for told in self._tell_all(store, "device", asdict(StageDevice.of(device)))]
        if all(told.gpu is None for told in devices):
            return None
        reason = obstacle_to_nccl(devices)
        link: NcclLink | None = None
        if reason is None:
            from torch.distributed import PrefixStore

            fault: str | None = None
            try:
                group = make_nccl_group(PrefixStore("nccl", store), self.rank, self.world_size, timeout)
                link = NcclLink(group, timeout)
                link.connect(self.rank, self.world_size, device)
            except RuntimeError as error:
                fault = f"it failed on stage {self.rank}: {error}"
            faults = [told for told in self._tell_all(store, "nccl_fault", fault) if told is not None]
            reason = faults[0] if faults else None
        if reason is not None and link is not None:
            link.close()
            link = None
        if self.rank == 0 and link is not None:
            logger.info("%d stages pass hidden states from GPU to GPU by NCCL", self.world_size)
        elif self.rank == 0:
            logger.warning("stages pass hidden states through the host's memory, not by NCCL: %s", reason)
        return link

    def _tell_all(self, store: TCPStore, what: str, mine: Any) -> list[Any]:
        """What every stage says, in order of the stages."""
        store.set(f"{what}/{self.rank}", json.dumps(mine))
        return [json.loads(store.get(f"{what}/{stage}")) for stage in range(self.world_size)]

    @property
    def is_ahead(self) -> bool:
        return self._nccl is not None

    def _open_group(self) -> Any:
        group = self._group
        if group is None:
            raise TransportError(f"stage {self.rank} has closed its connection")
        return group

    def send(self, tensor: Tensor, to: int, tag: int) -> None:
        group = self._open_group()
        try:
            if self._nccl is not None and tensor.device.type == "cuda":
                self._nccl.send(tensor, to, tag)
                return
            payload = tensor.cpu().contiguous().view(torch.uint8).reshape(-1)
            self._sending.append((group.send([payload], to, tag), payload))
        except RuntimeError as fault:
            raise TransportError(f"stage {self.rank} cannot send to stage {to}: {fault}") from fault

    def receive(self, buffer: Tensor, source: int, tag: int) -> Tensor:
        group = self._open_group()
        try:
            if self._nccl is not None and buffer.device.type == "cuda":
                return self._nccl.receive(buffer, source, tag)
            host = buffer if buffer.device.type == "cpu" else torch.empty_like(buffer, device="cpu")
            group.recv([host.view(torch.uint8).reshape(-1)], source, tag).wait()
        except RuntimeError as fault:
            raise TransportError(f"stage {self.rank} got nothing from stage {source}: {fault}") from fault
        return buffer if host is buffer else buffer.copy_(host)

    def check(self) -> None:
        try:
            if self._nccl is not None:
                self._nccl.check()
        except RuntimeError as fault:
            raise TransportError(f"stage {self.rank} lost a message: {fault}") from fault

    def flush(self, keep: int = 0) -> None:
        try:
            if self._nccl is not None:
                self._nccl.flush(keep)
            # a send of gloo counts as completed only once it was waited for
            while len(self._sending) > keep:
                self._sending.popleft()[0].wait()
        except RuntimeError as fault:
            raise TransportError(f"stage {self.rank} could not deliver its messages: {fault}") from fault

    def close(self) -> None:
        self._sending.clear()
        if self._nccl is not None:
            self._nccl.close()
        self._nccl = None
        self._group = None
        self._store = None

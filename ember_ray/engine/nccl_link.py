"""Tensors of one GPU to the next by NCCL, on a process group of the stages' own.

Everything is ordered on the GPUs: a send begins when the stream that made the tensor has got there, and what is
computed on the current stream after a receive waits there for the message. The host waits in neither.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

_SETTINGS = {
    # When a wait is over its limit or a peer is lost: abort the communicators, which ends kernels that wait for the
    # peer, and leave the process alive, so that it can say what happened. torch's own choice is to end the process.
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "2",
    # no debug files, and no waiting until other processes have written theirs: by default a minute before the abort
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
    "TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC": "0",
}
"""Read by torch when a group is made; what the user has set stays."""

_ENVIRONMENT = threading.Lock()


@dataclass(frozen=True)
class StageDevice:
    """What a stage tells its peers of itself before they agree on a way.

    Attributes:
        gpu: UUID of its GPU; None on a CPU.
        has_nccl: whether its torch was built with NCCL.
    """

    gpu: str | None
    has_nccl: bool

    @classmethod
    def of(cls, device: str) -> StageDevice:
        if torch.device(device).type != "cuda":
            return cls(None, False)
        return cls(str(torch.cuda.get_device_properties(device).uuid), torch.distributed.is_nccl_available())


def obstacle_to_nccl(devices: Sequence[StageDevice]) -> str | None:
    """Why the stages cannot use NCCL among them; None where they can.

    The answer depends on what all stages told only, so that all come to the same one.
    """
    for stage, device in enumerate(devices):
        if device.gpu is None:
            return f"stage {stage} is on no GPU"
        if not device.has_nccl:
            return f"the torch of stage {stage} has no NCCL"
    first: dict[str | None, int] = {}
    for stage, device in enumerate(devices):
        if device.gpu in first:
            return f"stages {first[device.gpu]} and {stage} share one GPU"
        first[device.gpu] = stage
    return None


@contextmanager
def nccl_settings() -> Iterator[None]:
    """The environment while a group is made."""
    with _ENVIRONMENT:
        added = {name: value for name, value in _SETTINGS.items() if name not in os.environ}
        os.environ.update(added)
        try:
            yield
        finally:
            for name in added:
                del os.environ[name]


def make_nccl_group(store: Any, rank: int, world_size: int, timeout: timedelta) -> Any:
    """A group whose communicators, one a pair of stages, are made when the pair first talks."""
    from torch.distributed import ProcessGroupNCCL

    options = ProcessGroupNCCL.Options()
    options._timeout = timeout
    with nccl_settings():
        return ProcessGroupNCCL(store, rank, world_size, options)


class NcclLink:
    """Messages over a group; all methods raise RuntimeError where a peer is lost or a wait is over its limit.

    Messages of a pair of stages arrive in the order in which they were sent: NCCL knows no tags.

    Args:
        group: from :func:`make_nccl_group`.
        timeout: limit of a wait; a message that has not arrived so long after it was asked for aborts the link.
    """

    def __init__(self, group: Any, timeout: timedelta) -> None:
        self._group, self._timeout = group, timeout
        self._sending: deque[tuple[Any, Tensor]] = deque()
        self._receiving: deque[tuple[Any, Tensor]] = deque()

    def connect(self, rank: int, world_size: int, device: str) -> None:
        """Sends one byte down the pipeline, so that neighbours are connected before the first real message."""
        byte = torch.zeros(1, dtype=torch.uint8, device=device)
        if rank > 0:
            self._group.recv([byte], rank - 1, 0).wait(self._timeout)
        if rank < world_size - 1:
            self._group.send([byte], rank + 1, 0).wait(self._timeout)
        self.check()

    def send(self, tensor: Tensor, to: int, tag: int) -> None:
        payload = _bytes(tensor.contiguous())
        self._sending.append((self._group.send([payload], to, tag), payload))

    def receive(self, buffer: Tensor, source: int, tag: int) -> Tensor:
        self.check()
        work = self._group.recv([_bytes(buffer)], source, tag)
        work.wait()  # without a limit, it only makes the current stream wait
        self._receiving.append((work, buffer))
        return buffer

    def check(self) -> None:
        """Raises if anything went wrong so far; does not wait."""
        while self._receiving and self._receiving[0][0].is_completed():
            self._receiving.popleft()[0].wait(self._timeout)  # "completed" may be a fault, which this raises
        error = getattr(self._group, "get_error", None)
        if error is not None and error().name != "SUCCESS":
            raise RuntimeError(f"NCCL: {error().name.lower().replace('_', ' ')}")

    def flush(self, keep: int = 0) -> None:
        """Waits on the host until all sends but the newest ``keep`` have left; with 0 for all receives too."""
        while len(self._sending) > keep:
            # taken out before the wait: after a fault it must not be waited for again
            self._sending.popleft()[0].wait(self._timeout)
        while not keep and self._receiving:
            self._receiving.popleft()[0].wait(self._timeout)
        self.check()

    @property
    def num_sending(self) -> int:
        """Messages whose tensors are held."""
        return len(self._sending)

    def close(self) -> None:
        """Aborts what is under way; peers notice by their time limit."""
        self._sending.clear()
        self._receiving.clear()
        group, self._group = self._group, None
        if group is not None:
            group.abort()


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8).reshape(-1)

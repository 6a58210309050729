"""NCCL between two processes with a GPU each, as stages are."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from ember_ray.engine.transport import ProcessGroupTransport, TransportError
from tests.support.stages import free_port

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(
        torch.cuda.device_count() < 2, reason=f"needs two CUDA devices, this machine has {torch.cuda.device_count()}"
    ),
]

SHAPE, COUNT = (800, 2560), 20


def _stage(work: Callable[[ProcessGroupTransport], Any], stage: int, port: int, timeout_s: float, answer: Any) -> None:
    transport = ProcessGroupTransport(stage, 2, "127.0.0.1", port, timeout_s, "cuda")
    answer.send(work(transport))
    transport.close()


def in_processes(
    work: Callable[[ProcessGroupTransport], Any],
    monkeypatch: pytest.MonkeyPatch,
    timeout_s: float = 60.0,
    limit_s: float = 60.0,
) -> list[Any]:
    """work(transport) in a process for each of two stages: what they gave, or the exit code where that is nothing."""
    context, port, started = multiprocessing.get_context("spawn"), free_port(), []
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")
    for stage in range(2):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus[stage])
        mine, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_stage, args=(work, stage, port, timeout_s, theirs), daemon=True)
        process.start()
        theirs.close()
        started.append((process, mine))
    end, found = time.monotonic() + limit_s, []
    for process, mine in started:
        try:
            assert mine.poll(max(0.1, end - time.monotonic())), "a stage hangs"
            found.append(mine.recv())
        except EOFError:
            process.join(10)
            found.append(process.exitcode)
    for process, _ in started:
        process.join(30)
        assert process.exitcode is not None, "a stage does not end"
    return found


def _message(value: float) -> torch.Tensor:
    return torch.full(SHAPE, value, device="cuda", dtype=torch.bfloat16)


def _talk(transport: ProcessGroupTransport) -> tuple[bool, bool, list[float]]:
    """Whether NCCL was used, whether the host was ahead of its GPU in the end, and what was in each message."""
    # what is set up at its first use must not be in the way: kernels, and memory for all messages
    warm = [_message(0.0) for _ in range(3 * COUNT)]
    values = [value for message in warm[:1] for value in message.float().aminmax()]
    warm.clear()
    torch.cuda.synchronize()
    for tag in range(COUNT):
        if transport.rank == 0:
            if tag == 0:
                torch.cuda._sleep(2_000_000_000)  # about a second
            transport.send(_message(float(tag + 1)), 1, tag)  # the transport alone keeps it
            _message(-1.0)
        else:
            values += transport.receive(_message(-2.0), 0, tag).float().aminmax()
    behind = torch.cuda.Event()
    behind.record()
    was_ahead = not behind.query()
    transport.flush()
    torch.cuda.synchronize()
    transport.check()
    return transport.is_ahead, was_ahead, [float(value) for value in values[2:]]


def test_messages_come_in_the_order_of_the_streams_and_no_host_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are made behind a long kernel, and used at once on the other side."""
    first, second = in_processes(_talk, monkeypatch)
    assert first == (True, True, [])
    assert second == (True, True, [float(tag + 1) for tag in range(COUNT) for _ in ("least", "most")])


def _is_left(transport: ProcessGroupTransport) -> tuple[str, float]:
    """What the second stage is told when the first one has died, and what its GPU computes then."""
    if transport.rank == 0:
        transport.receive(torch.zeros(1), 1, 0)  # then both have met
        os._exit(9)
    transport.send(torch.zeros(1), 0, 0)
    try:
        message = transport.receive(_message(0.0), 0, 1)
        float(message.sum())  # the host waits for the GPU, which waits for the peer until the time limit
        transport.check()
        told = ""
    except TransportError as fault:
        told = str(fault)
    return told, float(torch.ones(3, device="cuda").sum())


def test_a_peer_that_dies_is_an_error_and_the_gpu_is_free_again(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = in_processes(_is_left, monkeypatch, timeout_s=5.0)
    assert first == 9
    told, three = second
    assert told.startswith("stage 1 ") and three == 3.0

"""What stages say to each other: over gloo, over NCCL where each has a GPU, and how they agree on one of the two."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch

from ember_ray.engine.nccl_link import NcclLink, StageDevice, make_nccl_group, nccl_settings, obstacle_to_nccl
from ember_ray.engine.transport import LoopbackTransport, ProcessGroupTransport, TransportError
from tests.support.stages import free_port


def together(count: int, work: Callable[[int], Any], limit_s: float = 60.0) -> list[Any]:
    """work(stage) in a thread for each stage; what they returned, or raises what one of them raised."""
    results: list[Any] = [None] * count
    faults: list[BaseException] = []

    def guarded(stage: int) -> None:
        try:
            results[stage] = work(stage)
        except BaseException as fault:
            faults.append(fault)

    threads = [threading.Thread(target=guarded, args=(stage,), daemon=True) for stage in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(limit_s)
        assert not thread.is_alive(), "a stage hangs"
    if faults:
        raise faults[0]
    return results


def transports(devices: list[str], timeout_s: float = 20.0) -> list[ProcessGroupTransport]:
    port = free_port()
    return together(
        len(devices),
        lambda stage: ProcessGroupTransport(stage, len(devices), "127.0.0.1", port, timeout_s, devices[stage]),
    )


# -- which way -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("devices", "reason"),
    [
        ([("a", True), ("b", True), ("c", True)], None),
        ([("a", True), ("b", True), ("a", True)], "stages 0 and 2 share one GPU"),
        ([("a", True), (None, False)], "stage 1 is on no GPU"),
        ([("a", True), ("b", False)], "the torch of stage 1 has no NCCL"),
        ([(None, False), (None, False)], "stage 0 is on no GPU"),
    ],
)
def test_nccl_needs_a_gpu_of_its_own_for_every_stage(
    devices: list[tuple[str | None, bool]], reason: str | None
) -> None:
    assert obstacle_to_nccl([StageDevice(*device) for device in devices]) == reason


def test_a_stage_on_the_cpu_says_so() -> None:
    assert StageDevice.of("cpu") == StageDevice(None, False)


def test_settings_hold_while_a_group_is_made_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")
    monkeypatch.delenv("TORCH_NCCL_DUMP_ON_TIMEOUT", raising=False)
    with pytest.raises(KeyError), nccl_settings():
        assert os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "1"  # the user's
        assert os.environ["TORCH_NCCL_DUMP_ON_TIMEOUT"] == os.environ["TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC"] == "0"
        raise KeyError
    assert os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "1"
    assert "TORCH_NCCL_DUMP_ON_TIMEOUT" not in os.environ


def agreed(
    devices: list[StageDevice], monkeypatch: pytest.MonkeyPatch, make_group: Callable[..., Any]
) -> list[ProcessGroupTransport]:
    """Transports of stages that take themselves for the given devices; GPU tensors stay on the CPU here."""
    monkeypatch.setattr("ember_ray.engine.transport.StageDevice.of", lambda device: devices[int(device)])
    monkeypatch.setattr("ember_ray.engine.transport.make_nccl_group", make_group)
    monkeypatch.setattr(
        NcclLink, "connect", lambda self, rank, world_size, device: connect(self, rank, world_size, "cpu")
    )
    return transports([str(stage) for stage in range(len(devices))])


connect = NcclLink.connect


def test_stages_with_a_gpu_each_use_nccl(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    made = agreed([StageDevice(gpu, True) for gpu in "abc"], monkeypatch, gloo_like_nccl)
    assert all(transport._nccl is not None for transport in made)
    assert [record.message for record in caplog.records] == ["3 stages pass hidden states from GPU to GPU by NCCL"]
    for transport in made:
        transport.close()


def test_stages_that_share_a_gpu_say_so_once_and_use_gloo(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unexpected(*arguments: Any) -> Any:
        raise AssertionError("no NCCL group must be made")

    made = agreed([StageDevice("a", True), StageDevice("a", True)], monkeypatch, unexpected)
    assert all(transport._nccl is None for transport in made)
    expected = "stages pass hidden states through the host's memory, not by NCCL: stages 0 and 1 share one GPU"
    assert [(record.levelname, record.message) for record in caplog.records] == [("WARNING", expected)]
    for transport in made:
        transport.close()


def test_nccl_that_fails_on_one_stage_is_given_up_by_all(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails_on_stage_1(store: Any, rank: int, world_size: int, timeout: timedelta) -> Any:
        if rank == 1:
            raise RuntimeError("unhandled system error")
        return gloo_like_nccl(store, rank, world_size, timedelta(seconds=1))

    made = agreed([StageDevice(gpu, True) for gpu in "ab"], monkeypatch, fails_on_stage_1)
    assert all(transport._nccl is None for transport in made)
    assert len(caplog.records) == 1 and "stage" in caplog.records[0].message
    assert "not by NCCL: it failed on stage" in caplog.records[0].message
    message = torch.arange(5)
    made[0].send(message, 1, 7)
    assert torch.equal(made[1].receive(torch.empty(5, dtype=torch.int64), 0, 7), message)
    for transport in made:
        transport.flush()
        transport.close()


# -- the link ------------------------------------------------------------------------------------------------------


class GlooWork:
    """gloo's work with the two things that NCCL's has: it may be waited for twice, and completes by itself."""

    def __init__(self, work: Any) -> None:
        self._done, self._fault = threading.Event(), []

        def run() -> None:
            try:
                work.wait()
            except RuntimeError as fault:
                self._fault.append(fault)
            self._done.set()

        threading.Thread(target=run, daemon=True).start()

    def is_completed(self) -> bool:
        return self._done.is_set()

    def wait(self, limit: timedelta | None = None) -> None:
        if limit is not None and not self._done.wait(limit.total_seconds()):
            raise RuntimeError("timed out")
        if limit is not None and self._fault:
            raise self._fault[0]


class GlooGroup:
    """A gloo group in NCCL's place: like it, ``receive`` comes back before the message is there."""

    def __init__(self, store: Any, rank: int, world_size: int, timeout: timedelta) -> None:
        from torch.distributed import ProcessGroupGloo

        self._group = ProcessGroupGloo(store, rank, world_size, timeout)

    def send(self, tensors: list[torch.Tensor], to: int, tag: int) -> GlooWork:
        return GlooWork(self._group.send(tensors, to, tag))

    def recv(self, tensors: list[torch.Tensor], source: int, tag: int) -> GlooWork:
        return GlooWork(self._group.recv(tensors, source, tag))

    def abort(self) -> None:
        self._group.abort()
        self._group = None


gloo_like_nccl = GlooGroup


def links(count: int, timeout_s: float = 10.0) -> list[NcclLink]:
    from torch.distributed import TCPStore

    port, timeout = free_port(), timedelta(seconds=timeout_s)

    def make(rank: int) -> tuple[Any, NcclLink]:
        store = TCPStore("127.0.0.1", port, count, rank == 0, timeout)
        link = NcclLink(GlooGroup(store, rank, count, timeout), timeout)
        link.connect(rank, count, "cpu")
        return store, link

    return [link for _, link in together(count, make)]


def test_a_link_carries_messages_down_the_pipeline() -> None:
    ends = links(3)
    sent = [torch.randn(4, 6).to(torch.bfloat16) for _ in range(5)]
    for tag, message in enumerate(sent):
        ends[0].send(message, 1, tag)
    for tag, message in enumerate(sent):
        buffer = torch.zeros(4, 6, dtype=torch.bfloat16)
        assert ends[1].receive(buffer, 0, tag) is buffer
        ends[1].flush()
        assert torch.equal(buffer, message)
        ends[1].send(buffer * 2, 2, tag)
        last = ends[2].receive(torch.zeros(4, 6, dtype=torch.bfloat16), 1, tag)
        ends[2].flush()
        assert torch.equal(last, message * 2)
    ends[0].flush(keep=2)
    assert ends[0].num_sending <= 2
    ends[0].flush()
    assert ends[0].num_sending == 0
    for end in ends:
        end.close()


def test_a_tensor_that_is_not_contiguous_arrives_whole() -> None:
    ends = links(2)
    message = torch.arange(24).reshape(4, 6).T
    ends[0].send(message, 1, 0)
    buffer = ends[1].receive(torch.empty(6, 4, dtype=torch.int64), 0, 0)
    ends[1].flush()
    assert torch.equal(buffer, message)
    ends[0].flush()


def test_a_message_that_never_comes_is_a_fault_and_no_hang() -> None:
    ends = links(2, timeout_s=1.0)
    start = time.monotonic()
    ends[1].receive(torch.empty(3), 0, 0)
    assert time.monotonic() - start < 0.5, "receive waited on the host"
    ends[1].check()
    with pytest.raises(RuntimeError):
        ends[1].flush()
    assert time.monotonic() - start < 10


def test_a_fault_of_a_message_is_told_at_the_next_look() -> None:
    ends = links(2, timeout_s=1.0)
    ends[1].receive(torch.empty(3), 0, 0)
    deadline = time.monotonic() + 20
    with pytest.raises(RuntimeError):
        while time.monotonic() < deadline:
            ends[1].check()
            time.sleep(0.05)


# -- the transport -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64], ids=str)
def test_messages_find_their_tag(dtype: torch.dtype) -> None:
    a, b = transports(["cpu", "cpu"])
    first, second = torch.arange(6, dtype=dtype).reshape(2, 3), torch.arange(6, 12, dtype=dtype).reshape(2, 3)
    a.send(first, 1, 10)
    a.send(second, 1, 11)
    assert torch.equal(b.receive(torch.empty(2, 3, dtype=dtype), 0, 11), second)
    assert torch.equal(b.receive(torch.empty(2, 3, dtype=dtype), 0, 10), first)
    b.send(first, 0, 12)
    assert torch.equal(a.receive(torch.empty(2, 3, dtype=dtype), 1, 12), first)
    for end in (a, b):
        end.check()
        end.flush()
        end.close()


def test_a_closed_connection_says_so() -> None:
    a, b = transports(["cpu", "cpu"])
    a.close()
    with pytest.raises(TransportError, match="stage 0 has closed its connection"):
        a.send(torch.zeros(1), 1, 0)
    with pytest.raises(TransportError, match="stage 0 has closed its connection"):
        a.receive(torch.zeros(1), 1, 0)
    with pytest.raises(TransportError, match="stage 1 got nothing from stage 0"):
        b.receive(torch.zeros(1), 0, 0)
    b.close()
    b.close()


def test_on_cpus_nothing_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    for end in transports(["cpu", "cpu"]):
        end.close()
    assert not caplog.records


def test_a_single_stage_has_nobody_to_talk_to() -> None:
    alone = LoopbackTransport()
    alone.check()
    alone.flush()
    with pytest.raises(TransportError, match="a single stage"):
        alone.send(torch.zeros(1), 1, 0)


# -- on GPUs -------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_stages_on_one_gpu_talk_through_the_host(caplog: pytest.LogCaptureFixture) -> None:
    a, b = transports(["cuda:0", "cuda:0"])
    assert [record.message for record in caplog.records] == [
        "stages pass hidden states through the host's memory, not by NCCL: stages 0 and 1 share one GPU"
    ]
    message = torch.randn(64, 256, device="cuda:0").to(torch.bfloat16)
    a.send(message, 1, 2)
    assert torch.equal(b.receive(torch.empty_like(message), 0, 2), message)
    for end in (a, b):
        end.flush()
        end.close()


@pytest.mark.gpu
def test_a_group_of_nccl_is_made_and_ended() -> None:
    from torch.distributed import PrefixStore, TCPStore

    timeout = timedelta(seconds=20)
    store = TCPStore("127.0.0.1", free_port(), 1, True, timeout)
    link = NcclLink(make_nccl_group(PrefixStore("nccl", store), 0, 1, timeout), timeout)
    link.connect(0, 1, "cuda:0")
    link.flush()
    link.close()


@pytest.mark.gpu
def test_nccl_that_refuses_is_given_up_by_all(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Two stages on one GPU that do not know it."""
    monkeypatch.setattr("ember_ray.engine.transport.obstacle_to_nccl", lambda devices: None)
    a, b = transports(["cuda:0", "cuda:0"], timeout_s=30.0)
    assert a._nccl is None and b._nccl is None
    assert "not by NCCL: it failed on stage" in caplog.records[0].message
    message = torch.randn(64, 256, device="cuda:0")
    a.send(message, 1, 2)
    assert torch.equal(b.receive(torch.empty_like(message), 0, 2), message)
    for end in (a, b):
        end.flush()
        end.close()

"""The Ray actor that owns one device and the layers on it."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray

if TYPE_CHECKING:
    from actors.adapter_wire import PackedAdapter, Refusal
    from ember_ray.engine.options import EngineOptions
    from ember_ray.engine.request import Candidate, GenerationRequest
    from ember_ray.engine.stage_engine import StageEngine
    from ember_ray.model.adapter_outbox import AdapterInbox, AdapterNotice
    from ember_ray.model.base_weights import BaseHandles
    from ember_ray.train.batch import Answer


@dataclass(frozen=True)
class StagePlace:
    """Where a stage runs: what its peers need to reach it, and how many cores its node has."""

    node_id: str
    address: str
    free_port: int
    cores: int


# Work runs in the default group, one thread, one call after the other; the group "control" answers meanwhile.
@ray.remote(concurrency_groups={"control": 4})
class StageActor:
    """One pipeline stage: a `StageEngine` and the wires to its peers.

    Args:
        stage: which one, from 0.
        num_stages: how many there are.
        run: name of the run, a tag of the metrics.
    """

    def __init__(self, stage: int, num_stages: int, run: str) -> None:
        self._stage, self._num_stages, self._run = stage, num_stages, run
        self._made: StageEngine | None = None
        self._inbox: AdapterInbox
        self._transport: Any = None
        self._ended = threading.Event()

    def place(self) -> StagePlace:
        """Answers as soon as the process is up; the port was free a moment ago."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            port = probe.getsockname()[1]
        context = ray.get_runtime_context()
        return StagePlace(context.get_node_id(), ray.util.get_node_ip_address(), port, len(os.sched_getaffinity(0)))

    def setup(
        self, options: EngineOptions, master_addr: str, master_port: int, transport_limit_s: float, threads: int
    ) -> None:
        """Meets the peers and loads this stage's layers. Called on all stages at once.

        Raises:
            ModelError: the model folder cannot be served.
            TransportError: a peer did not come.
        """
        import torch

        from actors.stage_metrics import StageMetrics
        from ember_ray.engine.stage_engine import StageEngine
        from ember_ray.engine.transport import LoopbackTransport, ProcessGroupTransport
        from ember_ray.model.adapter_outbox import AdapterInbox

        torch.set_num_threads(threads)
        if self._num_stages == 1:
            self._transport = LoopbackTransport()
        else:
            self._transport = ProcessGroupTransport(
                self._stage, self._num_stages, master_addr, master_port, transport_limit_s, options.device
            )
        self._inbox = AdapterInbox(options.device)
        self._made = StageEngine(options, self._stage, self._transport)
        metrics = StageMetrics(self._stage, self._run)
        threading.Thread(target=metrics.run, args=(self._made, self._ended), name="metrics", daemon=True).start()

    @property
    def _engine(self) -> StageEngine:
        if self._made is None:
            raise RuntimeError(f"stage {self._stage} has not been set up yet")
        return self._made

    @ray.method(num_returns="streaming")
    def rollout(self, requests: list[GenerationRequest]) -> Iterator[list[Candidate]]:
        """Runs one batch together with the other stages; the last stage yields candidates as they finish."""
        yield from self._engine.rollout(requests)

    def score(self, answers: Sequence[Answer], version: int) -> list[list[float]]:
        """Log-probabilities of answers under a resident version; the one that serves is back in its place after it.

        Called on all stages at once; the last one gives, for each answer, one natural logarithm a token.

        Raises:
            RequestError: an answer can never be scored.
        """
        from ember_ray.engine.scorer import ScoreRequest

        engine = self._engine
        serving = engine.policy_version
        rows = [ScoreRequest((*prompt, *answer), len(prompt)) for prompt, answer in answers]
        if version != serving:
            engine.commit_adapter(version)
        try:
            return engine.score(rows)
        finally:
            if version != serving:
                engine.commit_adapter(serving)

    @ray.method(concurrency_group="control")
    def obstacle(self, source: bytes) -> str | None:
        """Why this stage cannot read a learner's buffers; None where it can."""
        return self._inbox.obstacle(source)

    @ray.method(concurrency_group="control")
    def stage_adapter(self, update: PackedAdapter | AdapterNotice) -> Refusal | None:
        """Checks an update and holds it, also while a batch runs; None, or why it is refused."""
        from actors.adapter_wire import PackedAdapter, Refusal, unpack_adapter
        from ember_ray.model.lora import AdapterError
        from ember_ray.model.tensor_handles import HandleError

        engine = self._engine
        try:
            with engine.beside():
                engine.stage_adapter(
                    unpack_adapter(update) if isinstance(update, PackedAdapter) else self._inbox.read(update)
                )
        except AdapterError as refusal:
            return Refusal(str(refusal))
        except HandleError as loss:
            return Refusal(f"policy version {update.version} cannot be read: {loss}", lost=True)
        return None

    @ray.method(concurrency_group="control", num_returns=2)
    def adapter_copy(self, notice: AdapterNotice) -> tuple[PackedAdapter, None]:
        """What a notice tells of, as a copy that outlives the learner's buffer; and nothing, which is quick to get."""
        from dataclasses import replace

        from actors.adapter_wire import pack_adapter
        from ember_ray.model.adapter_layout import update_of

        with self._engine.beside():
            adapter = self._inbox.read(notice)
            return pack_adapter(update_of(replace(adapter, flat=adapter.flat.cpu()))), None

    def commit_adapter(self, version: int) -> list[int]:
        """Switches to a held or resident version; gives the versions that are resident from then on."""
        self._engine.commit_adapter(version)
        return list(self._engine.resident_versions)

    @ray.method(concurrency_group="control")
    def switch_in_flight(self, version: int) -> None:
        """The running batch goes on under a held version; see `StageEngine.switch_in_flight`."""
        self._engine.switch_in_flight(version)

    @ray.method(concurrency_group="control")
    def discard_adapter(self, version: int) -> None:
        """Forgets a held version."""
        self._engine.discard_adapter(version)

    @ray.method(concurrency_group="control")
    def resident_versions(self) -> list[int]:
        """Versions that a commit can switch to without tensors."""
        return list(self._engine.resident_versions)

    @ray.method(concurrency_group="control")
    def base_weights(self) -> BaseHandles | str:
        """Where this stage's base weights lie, for a learner on its host, or why they cannot be shown."""
        from ember_ray.model.base_weights import export_base
        from ember_ray.model.tensor_handles import HandleError

        try:
            return export_base(self._engine.model.base)
        except HandleError as obstacle:
            return str(obstacle)

    @ray.method(concurrency_group="control")
    def abort(self, request_id: str) -> None:
        """Ends a request of the running batch; its candidates come back with finish reason ``abort``."""
        self._engine.abort(request_id)

    @ray.method(concurrency_group="control")
    def counters(self) -> dict[str, float]:
        """The engine's counters since this process began."""
        return dict(self._engine.counters())

    @ray.method(concurrency_group="control")
    def policy_version(self) -> int:
        """The version that serves; 0 is the base model."""
        return int(self._engine.policy_version)

    @ray.method(concurrency_group="control")
    def pid(self) -> int:
        """The process of this stage on its node."""
        return os.getpid()

    @ray.method(concurrency_group="control")
    def node_id(self) -> str:
        """Ray's name of the node it runs on."""
        return ray.get_runtime_context().get_node_id()

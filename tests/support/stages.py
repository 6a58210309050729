"""A pipeline of stages in threads of one process, connected by the real gloo transport."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ember_ray.engine.options import EngineOptions
from ember_ray.engine.request import Candidate, GenerationRequest
from ember_ray.engine.stage_engine import StageEngine
from ember_ray.engine.transport import LoopbackTransport, ProcessGroupTransport


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Pipeline:
    """Stages that run in lockstep; use as a context manager."""

    options: EngineOptions
    split: tuple[int, ...]
    timeout_s: float = 30.0

    def __enter__(self) -> Pipeline:
        port, options = free_port(), replace(self.options, layer_split=self.split)
        self.engines: list[StageEngine] = [None] * len(self.split)  # type: ignore[list-item]

        def build(stage: int) -> None:
            transport = (
                ProcessGroupTransport(stage, len(self.split), "127.0.0.1", port, self.timeout_s, options.device)
                if len(self.split) > 1
                else LoopbackTransport()
            )
            self.engines[stage] = StageEngine(options, stage, transport)

        self.each(build)
        return self

    def __exit__(self, *fault: object) -> None:
        for engine in self.engines:
            engine.transport.close()

    def each(self, work: Callable[[int], None]) -> None:
        """Runs work(stage) for all stages at once; raises what one of them raised."""
        faults: list[BaseException] = []

        def guarded(stage: int) -> None:
            try:
                work(stage)
            except BaseException as fault:
                faults.append(fault)

        threads = [threading.Thread(target=guarded, args=(stage,)) for stage in range(len(self.split))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if faults:
            raise faults[0]

    def rollout(self, requests: Sequence[GenerationRequest]) -> dict[tuple[str, int], Candidate]:
        made: list[Candidate] = []

        def run(stage: int) -> None:
            for ended in self.engines[stage].rollout(requests):
                made.extend(ended)

        self.each(run)
        by_name = {(c.request_id, c.index): c for c in made}
        assert len(by_name) == len(made), "a candidate came twice"
        return by_name

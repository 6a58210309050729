"""A stage's counters as Ray metrics; they appear as ``ray_ember_*`` on each node's metrics port."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from typing import Any

GAUGES = {
    "kv_blocks_used": "KV blocks in use",
    "kv_blocks_total": "KV blocks of the stage",
    "requests_running": "candidates that generate now",
    "requests_waiting": "candidates that wait for room",
}
TOTALS = {
    "generated_tokens": "tokens generated",
    "prefill_tokens": "prompt tokens computed",
    "prefix_hit_tokens": "prompt tokens taken from the cache",
    "preemptions": "candidates put back because KV blocks ran out",
}


class StageMetrics:
    """Reads the engine's counters once in a while and reports them, tagged with stage and run."""

    def __init__(self, stage: int, run: str) -> None:
        from ray.util.metrics import Counter, Gauge

        def gauge(name: str, meaning: str) -> Any:
            made = Gauge(f"ember_{name}", description=meaning, tag_keys=("stage", "run"))
            made.set_default_tags({"stage": str(stage), "run": run})
            return made

        def counter(name: str, meaning: str) -> Any:
            made = Counter(f"ember_{name}_total", description=meaning, tag_keys=("stage", "run"))
            made.set_default_tags({"stage": str(stage), "run": run})
            return made

        self._gauges = {name: gauge(name, meaning) for name, meaning in GAUGES.items()}
        self._totals = {name: counter(name, meaning) for name, meaning in TOTALS.items()}
        self._tokens_per_s = gauge("tokens_per_s", "tokens generated per second since the last look")
        self._hit_rate = gauge("prefix_hit_rate", "share of prompt tokens taken from the cache, 0 to 1")
        self._version = gauge("policy_version", "policy version that serves")
        self._last: dict[str, float] = {}
        self._last_time = time.monotonic()

    def report(self, counters: Mapping[str, float], policy_version: int) -> None:
        """Sends one look at the counters; totals go out as what was added since the look before."""
        now = time.monotonic()
        elapsed, self._last_time = max(now - self._last_time, 1e-6), now
        added = {name: counters[name] - self._last.get(name, 0.0) for name in TOTALS}
        self._last = {name: counters[name] for name in TOTALS}
        for name, made in self._gauges.items():
            made.set(counters[name])
        for name, made in self._totals.items():
            if added[name] > 0:
                made.inc(added[name])
        self._tokens_per_s.set(added["generated_tokens"] / elapsed)
        asked = counters["prefill_tokens"] + counters["prefix_hit_tokens"]
        self._hit_rate.set(counters["prefix_hit_tokens"] / asked if asked else 0.0)
        self._version.set(policy_version)

    def run(self, engine: Any, ended: threading.Event, every_s: float = 1.0) -> None:
        """Reports until ``ended`` is set; the body of a thread."""
        while not ended.wait(every_s):
            self.report(engine.counters(), engine.policy_version)

"""Where the time of a rollout goes when steps run one by one: prompts, decoding, and what a stage's GPU does of it."""

from __future__ import annotations

import time
from collections import Counter

import torch

from ember_ray.engine.scheduler import StepPlan


class StepClock:
    """Prompts and decodes share steps; what is timed as decoding begins behind the last step with a prompt in it."""

    def __init__(self, device: str) -> None:
        self._on_gpu = torch.device(device).type == "cuda"
        self._clear()

    def _clear(self) -> None:
        self._events: list[torch.cuda.Event] = []  # two a plan
        self._plans: Counter[int] = Counter()  # by lane, since the last with a prompt
        self._began = self._prompts_ended = 0.0

    def mark(self) -> None:
        """Called when a stage has the hidden states of a step, and when it has passed them on."""
        if self._on_gpu:
            self._events.append(torch.cuda.Event(enable_timing=True))
            self._events[-1].record()

    def starts(self) -> None:
        """A plan begins."""
        if not self._began:
            self._began = self._prompts_ended = time.perf_counter()

    def ended(self, plan: StepPlan) -> None:
        """The results of a plan are known."""
        self._plans[plan.lane] += 1
        if plan.prompt_chunks or plan.suffix_chunks:
            self._prompts_ended = time.perf_counter()
            self._plans.clear()

    def read(self) -> dict[str, float]:
        """Seconds of the rollout that has ended, and begins anew.

        ``decode_steps`` are those of the lane with most. ``gpu_decode_seconds`` is the time that decode steps of all
        lanes were under way on this stage's GPU, gaps between their kernels included.
        """
        now = time.perf_counter()
        events, plans, began, prompts_ended = self._events, self._plans, self._began or now, self._prompts_ended or now
        self._clear()
        found = {
            "prefill_seconds": prompts_ended - began,
            "decode_seconds": now - prompts_ended,
            "decode_steps": max(plans.values(), default=0),
        }
        if events:
            events[-1].synchronize()
            last = events[len(events) - 2 * plans.total() :]
            pairs = zip(last[::2], last[1::2], strict=False)
            found["gpu_decode_seconds"] = sum(first.elapsed_time(then) for first, then in pairs) / 1e3
        return found

"""Where the time of a rollout goes when steps run one by one: prompts, decoding, and what a stage's GPU does of it."""

from __future__ import annotations

import time

import torch

from ember_ray.engine.scheduler import StepPlan


class StepClock:
    """Prompts and decodes share steps; what is timed as decoding begins behind the last step with a prompt in it.

    Args:
        num_lanes: micro-batches; a decode step of the batch is one of each.
    """

    def __init__(self, device: str, num_lanes: int) -> None:
        self._on_gpu, self._num_lanes = torch.device(device).type == "cuda", num_lanes
        self._clear()

    def _clear(self) -> None:
        self._events: list[torch.cuda.Event] = []  # two a plan
        self._plans = 0
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
        self._plans += 1
        if plan.prompt_chunks or plan.suffix_chunks:
            self._prompts_ended, self._plans = time.perf_counter(), 0

    def read(self) -> dict[str, float]:
        """Seconds of the rollout that has ended, and begins anew.

        ``gpu_decode_seconds`` is the time that decode steps were under way on this stage's GPU, gaps between their
        kernels included.
        """
        now = time.perf_counter()
        events, plans, began, prompts_ended = self._events, self._plans, self._began or now, self._prompts_ended or now
        self._clear()
        found = {
            "prefill_seconds": prompts_ended - began,
            "decode_seconds": now - prompts_ended,
            "decode_steps": plans / self._num_lanes,
        }
        if events:
            events[-1].synchronize()
            last = events[len(events) - 2 * plans :]
            pairs = zip(last[::2], last[1::2], strict=False)
            found["gpu_decode_seconds"] = sum(first.elapsed_time(then) for first, then in pairs) / 1e3
        return found

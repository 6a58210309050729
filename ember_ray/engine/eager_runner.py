"""Runs plans op by op, on a CPU or with several stages: every step is passed on and sampled by itself.

Per step a stage computes its layers and passes the hidden states on; the last one samples and sends tokens and finish
codes back to all others. Where hidden states go from GPU to GPU, its host does so only when the lane's next step is
due, with the next lane's step on the way to the GPU already: so that the GPU has work while the host makes plans.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cuda_ext.decode_attention import group_decode_attention
from cuda_ext.decode_state import RowParams, SlotState, sample_rows
from cuda_ext.prefill_attention import prefill_attention
from ember_ray.engine.decode_buffers import split_tokens
from ember_ray.engine.options import EngineOptions
from ember_ray.engine.scheduler import StepPlan
from ember_ray.engine.slot_table import SlotTable
from ember_ray.engine.step_clock import StepClock
from ember_ray.engine.step_inputs import StepInputs, build_step_inputs
from ember_ray.engine.step_result import StepResult
from ember_ray.engine.stop_check import StopCheck
from ember_ray.engine.transport import Transport
from ember_ray.engine.upload import host_tensor, upload
from ember_ray.model.qwen3 import StageModel
from ember_ray.model.slots import AdapterSlots

ABORTS_PER_STEP = 4
"""Places for request numbers behind the results of a step; what does not fit waits for the next one."""


@dataclass
class _Pending:
    """A step on its way.

    Attributes:
        drawn: on the last stage [3, samples] int32 on the host: tokens, logprobs, sampling_logprobs (as bits); there
            when ``done`` is.
        result: on the last stage, once the others have been told.
    """

    plan: StepPlan
    tag: int
    drawn: Tensor | None = None
    done: torch.cuda.Event | None = None
    result: StepResult | None = None


class EagerRunner:
    """See the module's text.

    Args:
        kv_cache: [layers, 2, num_slots, kv_heads, head_dim].
        stop_check: on the last stage.
        take_aborts: gives at most so many numbers of requests that end now; called on the last stage.
        take_switch: gives the policy version to switch to, -1 for none; called on the last stage.
        num_lanes: micro-batches in flight.
        prefill_backend: from cuda_ext.prefill_attention.choose_backend().
    """

    lookahead = 0

    def __init__(
        self,
        options: EngineOptions,
        model: StageModel,
        adapters: AdapterSlots,
        kv_cache: Tensor,
        stop_check: StopCheck | None,
        take_aborts: Callable[[int], list[int]],
        take_switch: Callable[[], int],
        transport: Transport,
        num_lanes: int,
        prefill_backend: str,
    ) -> None:
        self._options, self._model, self._adapters, self._kv_cache = options, model, adapters, kv_cache
        self._stop_check, self._transport = stop_check, transport
        self._take_aborts, self._take_switch = take_aborts, take_switch
        self._num_lanes, self._prefill_backend = num_lanes, prefill_backend
        self._last_hidden: dict[int, Tensor] = {}  # group number -> final-norm output behind its prompt, last stage
        if stop_check is not None:
            self._slots = SlotTable(options.max_num_seqs, stop_check)
            self._state = SlotState.zeros(options.max_num_seqs, options.device)
        self._split = split_tokens(options.max_num_seqs, options.block_size)
        self._steps = 0
        self._clock = StepClock(options.device)
        self.timings: dict[str, float] = {}

    def run(self, plan: StepPlan) -> _Pending:
        """Computes this stage's part of a step."""
        self._clock.starts()
        options, share = self._options, self._model.config.share
        inputs = build_step_inputs(plan, options.block_size, share, options.device, self._split)
        incoming = self._incoming(inputs)
        self._clock.mark()
        hidden = self._layers(inputs, incoming)
        pending = _Pending(plan, 2 * self._steps + 1)
        if self._model.is_last:
            pending.drawn, pending.done = self._sample(plan, inputs, hidden)
            if not self._transport.is_ahead:  # the others wait for it
                self._deliver(pending)
        self._clock.mark()
        return pending

    def collect(self, pending: _Pending) -> StepResult:
        """Waits for the results of a step."""
        if self._model.is_last:
            result = pending.result or self._deliver(pending)
        else:
            count = len(pending.plan.samples)
            message = torch.empty(2 * count + ABORTS_PER_STEP + 1, dtype=torch.int64)
            values = self._transport.receive(message, self._transport.world_size - 1, pending.tag).tolist()
            tokens, codes, aborts = values[:count], values[count : 2 * count], values[2 * count : -1]
            result = StepResult(
                pending.plan,
                [[token] for token in tokens],
                codes,
                aborts=[n for n in aborts if n >= 0],
                switch_to=values[-1],
            )
        self._clock.ended(pending.plan)
        return result

    def _deliver(self, pending: _Pending) -> StepResult:
        """Tells all other stages what was drawn: int64 tokens, finish codes, aborted requests and the policy version to
        switch to (-1: none)."""
        assert pending.drawn is not None and self._stop_check is not None
        if pending.done is not None:
            pending.done.synchronize()
        self._transport.check()  # drawn from hidden states that have really come
        samples = pending.plan.samples
        tokens = pending.drawn[0].tolist()
        logprobs, sampling_logprobs = pending.drawn[1:].view(torch.float32).tolist()
        codes = [self._stop_check.end(s, [token])[1] for s, token in zip(samples, tokens, strict=True)]
        aborts = self._take_aborts(ABORTS_PER_STEP)
        padding = [-1] * (ABORTS_PER_STEP - len(aborts))
        switch_to = self._take_switch()
        message = torch.tensor([*tokens, *codes, *aborts, *padding, switch_to], dtype=torch.int64)
        for other in range(self._transport.rank):
            self._transport.send(message, other, pending.tag)
        pending.result = StepResult(
            pending.plan,
            [[t] for t in tokens],
            codes,
            [[p] for p in logprobs],
            [[p] for p in sampling_logprobs],
            aborts,
            switch_to,
        )
        return pending.result

    def forget_group(self, number: int) -> None:
        """A prompt group has ended."""
        self._last_hidden.pop(number, None)

    def end(self) -> None:
        """A rollout has ended, well or not."""
        self._last_hidden.clear()
        if self._model.is_last:
            self._slots.forget_owners()
        self.timings = self._clock.read()

    def forward(self, inputs: StepInputs) -> Tensor:
        """The residual stream [tokens, hidden] behind this stage's layers, passed on to the next stage."""
        return self._layers(inputs, self._incoming(inputs))

    def _incoming(self, inputs: StepInputs) -> Tensor:
        """The residual stream [tokens, hidden] before this stage's layers."""
        # The peers have what was sent in steps before those in flight, or take it next: this can never wait for long.
        self._transport.flush(keep=self._num_lanes * (self._transport.world_size - 1))
        self._steps += 1
        tokens = inputs.token_ids.shape[0]
        if self._model.is_first and tokens:
            return self._model.embed(inputs.token_ids)
        shape = (tokens, self._model.config.hidden_size)
        hidden = torch.empty(shape, dtype=self._model.dtype, device=self._options.device)
        if tokens:  # else there are only first tokens, from hidden states that are kept
            self._transport.receive(hidden, self._transport.rank - 1, 2 * self._steps)
        return hidden

    def _layers(self, inputs: StepInputs, hidden: Tensor) -> Tensor:
        if not len(hidden):
            return hidden
        scale, decodes = self._model.config.head_dim**-0.5, inputs.num_decodes

        def attention(q: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
            parts = []
            if inputs.decode_groups is not None:
                parts.append(group_decode_attention(q[:decodes], k_cache, v_cache, inputs.decode_groups, scale))
            if inputs.prefill is not None:
                parts.append(
                    prefill_attention(q[decodes:], k_cache, v_cache, inputs.prefill, scale, self._prefill_backend)
                )
            return torch.cat(parts) if len(parts) > 1 else parts[0]

        hidden = self._model.forward(
            hidden, inputs.positions, inputs.slots, self._kv_cache, attention, self._adapters.active
        )
        if not self._model.is_last:
            self._transport.send(hidden, self._transport.rank + 1, 2 * self._steps)
        return hidden

    def _sample(self, plan: StepPlan, inputs: StepInputs, hidden: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
        """Draws a token for each sample of the plan; see :class:`_Pending`. Does not wait for a GPU."""
        samples, device = plan.samples, self._options.device
        normed = self._model.final_norm(hidden[inputs.hidden_rows])
        own = normed.shape[0] - len(inputs.last_prompt_groups)
        for place, group in enumerate(inputs.last_prompt_groups):
            self._last_hidden[group.number] = normed[own + place]
        if not samples:
            return torch.empty(3, 0, dtype=torch.int32), None
        firsts = [sequence.group.number for sequence in samples[own:]]
        distinct = {number: own + place for place, number in enumerate(dict.fromkeys(firsts))}
        logits = self._model.logits(
            torch.cat((normed[:own], *(self._last_hidden[number][None] for number in distinct)))
        )
        self._slots.admit([sequence for sequence in samples if not self._slots.owns(sequence)])
        arrays = self._slots.rows(samples)
        arrays["line"] = np.array([*range(own), *(distinct[number] for number in firsts)], dtype=np.int32)
        arrays["known"] = np.array([len(sequence.token_ids) for sequence in samples], dtype=np.int32)
        arrays["index"] = arrays["slot"].astype(np.int64)
        rows = upload(arrays, device)
        line, known, index = (rows.pop(name) for name in ("line", "known", "index"))
        self._state.num_tokens.index_copy_(0, index, known)
        tokens, *logprobs = sample_rows(logits, line, RowParams(**rows), self._state)
        drawn = torch.stack((tokens, *(values.view(torch.int32) for values in logprobs)))
        if not drawn.is_cuda:
            return drawn, None
        host = host_tensor(drawn.shape, torch.int32, drawn.device)
        host.copy_(drawn, non_blocking=True)
        done = torch.cuda.Event()
        done.record()
        return host, done

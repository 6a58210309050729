"""Runs plans op by op, on a CPU or with several stages: every step is passed on, sampled and known at once.

Per step a stage computes its layers and passes the hidden states on; the last one samples and sends tokens and finish
codes back to all others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cuda_ext.decode_attention import group_decode_attention
from cuda_ext.prefill_attention import prefill_attention
from cuda_ext.sampling import sample, uniforms
from ember_ray.engine.options import EngineOptions
from ember_ray.engine.scheduler import StepPlan
from ember_ray.engine.sequence import Sequence
from ember_ray.engine.step_inputs import StepInputs, build_step_inputs
from ember_ray.engine.step_result import StepResult
from ember_ray.engine.stop_check import StopCheck
from ember_ray.engine.transport import Transport
from ember_ray.model.qwen3 import StageModel
from ember_ray.model.slots import AdapterSlots

ABORTS_PER_STEP = 4
"""Places for request numbers behind the results of a step; what does not fit waits for the next one."""


@dataclass
class _Pending:
    """A step on its way; message: int64 tokens, finish codes and aborted requests (-1: none)."""

    plan: StepPlan
    tag: int
    message: Tensor
    result: StepResult | None


class EagerRunner:
    """See the module's text.

    Args:
        kv_cache: [layers, 2, num_slots, kv_heads, head_dim].
        stop_check: on the last stage.
        take_aborts: gives at most so many numbers of requests that end now; called on the last stage.
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
        transport: Transport,
        num_lanes: int,
        prefill_backend: str,
    ) -> None:
        self._options, self._model, self._adapters, self._kv_cache = options, model, adapters, kv_cache
        self._stop_check, self._take_aborts, self._transport = stop_check, take_aborts, transport
        self._num_lanes, self._prefill_backend = num_lanes, prefill_backend
        self._last_hidden: dict[int, Tensor] = {}  # group number -> final-norm output behind its prompt, last stage
        self._steps = 0
        self.timings: dict[str, float] = {}

    def run(self, plan: StepPlan) -> _Pending:
        """Computes this stage's part of a step; on the last stage the result is there at once, on others to come."""
        inputs = build_step_inputs(plan, self._options.block_size, self._model.config.share, self._options.device)
        hidden = self.forward(inputs)
        tag = 2 * self._steps + 1
        size = 2 * len(plan.samples) + ABORTS_PER_STEP
        if not self._model.is_last:
            return _Pending(plan, tag, torch.empty(size, dtype=torch.int64), None)
        result = self._sample(plan, inputs, hidden)
        self._transport.check()  # drawn from hidden states that have really come
        result.aborts = self._take_aborts(ABORTS_PER_STEP)
        tokens = [token for (token,) in result.tokens]
        padding = [-1] * (ABORTS_PER_STEP - len(result.aborts))
        message = torch.tensor(tokens + result.finish_codes + result.aborts + padding, dtype=torch.int64)
        for other in range(self._transport.rank):
            self._transport.send(message, other, tag)
        return _Pending(plan, tag, message, result)

    def collect(self, pending: _Pending) -> StepResult:
        """Waits for the results of a step."""
        if pending.result is not None:
            return pending.result
        self._transport.receive(pending.message, self._transport.world_size - 1, pending.tag)
        count = len(pending.plan.samples)
        values = pending.message.tolist()
        tokens, codes, aborts = values[:count], values[count : 2 * count], values[2 * count :]
        return StepResult(pending.plan, [[token] for token in tokens], codes, aborts=[n for n in aborts if n >= 0])

    def forget_group(self, number: int) -> None:
        """A prompt group has ended."""
        self._last_hidden.pop(number, None)

    def end(self) -> None:
        """A rollout has ended, well or not."""
        self._last_hidden.clear()

    def forward(self, inputs: StepInputs) -> Tensor:
        """The residual stream [tokens, hidden] behind this stage's layers, passed on to the next stage."""
        # The peers have what was sent in steps before those in flight, or take it next: this can never wait for long.
        self._transport.flush(keep=self._num_lanes * (self._transport.world_size - 1))
        self._steps += 1
        tag = 2 * self._steps
        hidden_size, dtype, device = self._model.config.hidden_size, self._model.dtype, self._options.device
        tokens = inputs.token_ids.shape[0]
        if tokens == 0:  # only first tokens, from hidden states that are kept
            return torch.empty(0, hidden_size, dtype=dtype, device=device)
        if self._model.is_first:
            hidden = self._model.embed(inputs.token_ids)
        else:
            hidden = torch.empty(tokens, hidden_size, dtype=dtype, device=device)
            self._transport.receive(hidden, self._transport.rank - 1, tag)
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
            self._transport.send(hidden, self._transport.rank + 1, tag)
        return hidden

    def _sample(self, plan: StepPlan, inputs: StepInputs, hidden: Tensor) -> StepResult:
        """Draws a token for each sample of the plan."""
        samples = plan.samples
        normed = self._model.final_norm(hidden[inputs.hidden_rows])
        own = normed.shape[0] - len(inputs.last_prompt_groups)
        for place, group in enumerate(inputs.last_prompt_groups):
            self._last_hidden.setdefault(group.number, normed[own + place])
        if not samples:
            return StepResult(plan, [], [])
        firsts = [sequence.group.number for sequence in samples[own:]]
        distinct = {number: own + place for place, number in enumerate(dict.fromkeys(firsts))}
        rows = torch.cat((normed[:own], *(self._last_hidden[number][None] for number in distinct)))
        logits = self._model.logits(rows)
        if len(distinct) < len(firsts):
            logits = logits[torch.tensor([*range(own), *(distinct[number] for number in firsts)])]
        tokens, logprobs, sampling_logprobs = (result.tolist() for result in _draw(samples, logits))
        assert self._stop_check is not None
        codes = [self._stop_check.end(s, [token])[1] for s, token in zip(samples, tokens, strict=True)]
        return StepResult(
            plan, [[t] for t in tokens], codes, [[lp] for lp in logprobs], [[lp] for lp in sampling_logprobs]
        )


def _draw(samples: list[Sequence], logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    def column(values: list[float], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=logits.device)

    params = [sequence.params for sequence in samples]
    draws = uniforms(
        torch.tensor([sequence.seed for sequence in samples]),
        torch.tensor([sequence.group.hash for sequence in samples]),
        torch.tensor([sequence.index for sequence in samples]),
        torch.tensor([len(sequence.token_ids) for sequence in samples]),
    ).to(logits.device)
    return sample(
        logits,
        column([p.temperature for p in params], torch.float32),
        column([p.top_k for p in params], torch.int64),
        column([p.top_p for p in params], torch.float32),
        column([p.min_p for p in params], torch.float32),
        draws,
    )

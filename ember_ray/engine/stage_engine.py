"""One pipeline stage inside one process: its layers, its KV blocks, its own copy of the scheduler.

All stages of a pipeline run :meth:`StageEngine.rollout` on the same requests. Per step a stage plans, computes its
layers and passes the hidden states on; the last one samples and sends tokens and finish codes back to all others.
Several lanes (micro-batches) are in flight, so that all stages work at once: results of a lane are collected only
when its next step is due.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import torch
from torch import Tensor

from cuda_ext.attention import group_decode_attention, prefill_attention
from cuda_ext.sampling import sample, uniforms
from ember_ray.engine.block_pool import BlockPool
from ember_ray.engine.options import EngineOptions
from ember_ray.engine.request import Candidate, GenerationRequest
from ember_ray.engine.scheduler import Scheduler, StepPlan
from ember_ray.engine.sequence import Sequence as RunningSequence
from ember_ray.engine.step_inputs import StepInputs, build_step_inputs
from ember_ray.engine.stop_check import StopCheck
from ember_ray.engine.transport import Transport
from ember_ray.model.lora import AdapterError, AdapterUpdate
from ember_ray.model.plan import plan_stages, stage_layers
from ember_ray.model.qwen3 import StageModel
from ember_ray.model.qwen3_config import ModelError, read_model_config
from ember_ray.model.slots import AdapterSlots
from ember_ray.model.tokenizer import Tokenizer

ABORTS_PER_STEP = 4
"""Places for request numbers behind the results of a step; what does not fit waits for the next one."""


@dataclass
class _StepResult:
    """What the last stage tells the others of a step: int64 tokens, finish codes and aborted requests (-1: none)."""

    plan: StepPlan
    tag: int
    message: Tensor
    received: bool

    def lists(self) -> tuple[list[int], list[int], list[int]]:
        count = len(self.plan.samples)
        values = self.message.tolist()
        return values[:count], values[count : 2 * count], [n for n in values[2 * count :] if n >= 0]


class StageEngine:
    """See the module's text.

    Args:
        options: the same for all stages.
        stage: which one this is.
        transport: connects the stages; its world size is the number of stages.

    Raises:
        ModelError: the model cannot be served.
        ValueError: the options do not fit the model.
    """

    def __init__(self, options: EngineOptions, stage: int, transport: Transport) -> None:
        self.options, self.stage, self.transport = options, stage, transport
        self.config = config = read_model_config(options.model)
        split = plan_stages(config, options.layer_split or (config.num_hidden_layers,))
        if transport.world_size != len(split) or transport.rank != stage:
            raise ValueError(
                f"stage {stage} of {len(split)} got a transport of {transport.rank}/{transport.world_size}"
            )
        limit = config.max_position_embeddings
        if options.max_model_len is not None and options.max_model_len > limit:
            raise ValueError(f"max_model_len {options.max_model_len} is beyond the model's {limit} positions")
        self.max_model_len = options.max_model_len or limit
        self.dtype = getattr(torch, options.dtype)
        layers = stage_layers(split, stage)
        self.model = StageModel(options.model, config, layers, self.dtype, options.device, self.max_model_len)
        self.is_last = self.model.is_last
        self._stop_check = StopCheck(Tokenizer(options.model), config.eos_token_ids) if self.is_last else None
        self._slots = AdapterSlots(config, layers, self.dtype, options.device)
        shape = (
            len(layers),
            2,
            options.num_kv_blocks * options.block_size,
            config.num_key_value_heads,
            config.head_dim,
        )
        self.kv_cache = torch.zeros(shape, dtype=self.dtype, device=options.device)
        self.num_lanes = min(options.micro_batches or len(split), options.max_num_seqs)
        self.scheduler = Scheduler(
            BlockPool(options.num_kv_blocks),
            options.block_size,
            options.max_num_seqs,
            options.max_num_batched_tokens,
            self.max_model_len,
            config.vocab_size,
            self.num_lanes,
            options.prefix_sharing,
        )
        self._last_hidden: dict[int, Tensor] = {}  # group number -> final-norm output behind its prompt, last stage
        self._aborts: list[str] = []
        self._lock = threading.Lock()
        self._is_rolling_out = False
        self._requests_seen = 0
        self._steps = 0
        self._prefill_tokens = 0
        self._generated_tokens = 0

    # -- policies --------------------------------------------------------------------------------------------------

    @property
    def policy_version(self) -> int:
        return self._slots.version

    @property
    def resident_versions(self) -> list[int]:
        return self._slots.resident_versions

    def stage_adapter(self, update: AdapterUpdate) -> None:
        """Checks an update and holds it beside the one that serves; raises AdapterError and changes nothing else."""
        self._slots.stage(update)

    def commit_adapter(self, version: int) -> None:
        """Switches to a staged or still resident version; cached KV of other versions is not found from then on.

        Raises:
            AdapterError: unknown version, or a rollout is running.
        """
        if self._is_rolling_out:
            raise AdapterError(f"policy version {version} cannot be switched to while a rollout is running")
        self._slots.commit(version)

    def discard_adapter(self, version: int) -> None:
        """Forgets a staged version."""
        self._slots.discard(version)

    # -- rollouts --------------------------------------------------------------------------------------------------

    def rollout(self, requests: Sequence[GenerationRequest]) -> Iterator[list[Candidate]]:
        """Generates all candidates of a batch; to be run by all stages with the same requests.

        Yields:
            On the last stage the candidates that ended in a step, as they end. On others nothing.

        Raises:
            RequestError: a request can never be served; nothing is generated then.
            ModelError: the model computes NaN or infinite logits; the batch is given up.
            TransportError: a stage was lost; the batch is given up and the engine is empty again.
        """
        if self._is_rolling_out:
            raise RuntimeError("this stage is in a rollout already; one batch at a time")
        seeds = [self._seed(request) for request in requests]
        self.scheduler.add(requests, seeds, self.policy_version)
        numbers = {request.request_id: number for number, request in enumerate(requests)}
        with self._lock:
            self._is_rolling_out = True
        try:
            yield from self._loop(numbers)
            self.transport.flush()
        except BaseException:
            self.scheduler.pool.forget()  # a step may have been planned, and its blocks published, but not computed
            raise
        finally:
            self.scheduler.clear()
            self._last_hidden.clear()
            with self._lock:
                self._is_rolling_out = False
                self._aborts.clear()

    def abort(self, request_id: str) -> None:
        """Ends a request of the running batch with what it has; call it on the last stage, from any thread.

        Between batches, and for a request that is not in the batch or has ended, it does nothing: a later batch may
        use the same id.
        """
        with self._lock:
            if self._is_rolling_out and request_id not in self._aborts:
                self._aborts.append(request_id)

    def counters(self) -> dict[str, float]:
        """Totals since the start, and what is in use now.

        ``prefill_tokens`` are counted where the forward pass runs, recomputation after preemption included;
        ``prefix_hit_tokens`` are prompt tokens, per candidate, that needed no pass.
        """
        scheduler = self.scheduler
        return {
            "prefill_tokens": self._prefill_tokens,
            "prefix_hit_tokens": scheduler.prefix_hit_tokens,
            "recomputed_tokens": scheduler.recomputed_tokens,
            "generated_tokens": self._generated_tokens,
            "steps": self._steps,
            "preemptions": scheduler.preemptions,
            "kv_blocks_used": scheduler.pool.num_used,
            "kv_blocks_total": scheduler.pool.num_blocks,
            "requests_running": sum(map(len, scheduler.running)),
            "requests_waiting": sum(map(len, scheduler.waiting)),
        }

    def _seed(self, request: GenerationRequest) -> int:
        seed = request.sampling_params.seed
        if seed is None:
            text = f"{self.options.seed}:{self._requests_seen}".encode()
            seed = int.from_bytes(blake2b(text, digest_size=8).digest(), "little")
        self._requests_seen += 1
        return (seed + 2**63) % 2**64 - 2**63

    def _loop(self, numbers: dict[str, int]) -> Iterator[list[Candidate]]:
        in_flight: dict[int, _StepResult] = {}
        while self.scheduler.has_work or in_flight:
            moved = False
            for lane in range(self.num_lanes):
                if lane in in_flight:
                    moved = True
                    ended = self._finish(in_flight.pop(lane))
                    if ended:
                        yield ended
                plan = self.scheduler.schedule(lane)
                if not plan.is_empty:
                    moved = True
                    with torch.inference_mode():
                        in_flight[lane] = self._run(plan, numbers)
            if not moved:
                raise RuntimeError("the scheduler stands still with work left; this is a fault of the engine")

    def _run(self, plan: StepPlan, numbers: dict[str, int]) -> _StepResult:
        """Computes this stage's part of a step; on the last stage the result is there at once, on others to come."""
        # The peers have what was sent in steps before those in flight, or take it next: this can never wait for long.
        self.transport.flush(keep=self.num_lanes * (self.transport.world_size - 1))
        self._steps += 1
        tag = 2 * self._steps
        inputs = build_step_inputs(plan, self.options.block_size, self.options.device)
        hidden = self._forward(inputs, tag)
        size = 2 * len(plan.samples) + ABORTS_PER_STEP
        if not self.is_last:
            return _StepResult(plan, tag, torch.empty(size, dtype=torch.int64), received=False)
        tokens, codes = self._sample(plan, inputs, hidden)
        aborts = self._take_aborts(numbers)
        message = torch.tensor(tokens + codes + aborts, dtype=torch.int64)
        for stage in range(self.stage):
            self.transport.send(message, stage, tag + 1)
        return _StepResult(plan, tag, message, received=True)

    def _forward(self, inputs: StepInputs, tag: int) -> Tensor:
        tokens = inputs.token_ids.shape[0]
        if tokens == 0:  # only first tokens, from hidden states that are kept
            return torch.empty(0, self.config.hidden_size, dtype=self.dtype, device=self.options.device)
        if self.model.is_first:
            hidden = self.model.embed(inputs.token_ids)
        else:
            hidden = torch.empty(tokens, self.config.hidden_size, dtype=self.dtype, device=self.options.device)
            self.transport.receive(hidden, self.stage - 1, tag)
        self._prefill_tokens += inputs.num_prefill_tokens
        scale, decodes = self.config.head_dim**-0.5, inputs.num_decodes

        def attention(q: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
            if inputs.decode_groups is None:
                return prefill_attention(q, k_cache, v_cache, inputs.prefill_chunks, scale)
            decoded = group_decode_attention(q[:decodes], k_cache, v_cache, inputs.decode_groups, scale)
            if not inputs.prefill_chunks:
                return decoded
            out = prefill_attention(q, k_cache, v_cache, inputs.prefill_chunks, scale)
            out[:decodes] = decoded
            return out

        hidden = self.model.forward(
            hidden, inputs.positions, inputs.slots, self.kv_cache, attention, self._slots.active
        )
        if not self.is_last:
            self.transport.send(hidden, self.stage + 1, tag)
        return hidden

    def _sample(self, plan: StepPlan, inputs: StepInputs, hidden: Tensor) -> tuple[list[int], list[int]]:
        """Draws a token for each sample of the plan; notes its log-probabilities; returns tokens and finish codes."""
        samples = plan.samples
        normed = self.model.final_norm(hidden[inputs.hidden_rows])
        own = normed.shape[0] - len(inputs.last_prompt_groups)
        for place, group in enumerate(inputs.last_prompt_groups):
            self._last_hidden.setdefault(group.number, normed[own + place])
        if not samples:
            return [], []
        firsts = [sequence.group.number for sequence in samples[own:]]
        distinct = {number: own + place for place, number in enumerate(dict.fromkeys(firsts))}
        rows = torch.cat((normed[:own], *(self._last_hidden[number][None] for number in distinct)))
        logits = self.model.logits(rows)
        if len(distinct) < len(firsts):
            logits = logits[torch.tensor([*range(own), *(distinct[number] for number in firsts)])]

        def column(values: list[float], dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=logits.device)

        params = [sequence.params for sequence in samples]
        draws = uniforms(
            torch.tensor([sequence.seed for sequence in samples]),
            torch.tensor([sequence.group.hash for sequence in samples]),
            torch.tensor([sequence.index for sequence in samples]),
            torch.tensor([len(sequence.token_ids) for sequence in samples]),
        ).to(logits.device)
        tokens, logprobs, sampling_logprobs = (
            result.tolist()
            for result in sample(
                logits,
                column([p.temperature for p in params], torch.float32),
                column([p.top_k for p in params], torch.int64),
                column([p.top_p for p in params], torch.float32),
                column([p.min_p for p in params], torch.float32),
                draws,
            )
        )
        if not all(map(math.isfinite, logprobs)):
            raise ModelError(
                f"model folder '{self.options.model}': policy version {self.policy_version} gives logits that are not "
                f"finite in {self.options.dtype}; use a wider dtype, or go back to an earlier version"
            )
        for sequence, logprob, sampling_logprob in zip(samples, logprobs, sampling_logprobs, strict=True):
            sequence.logprobs.append(logprob)
            sequence.sampling_logprobs.append(sampling_logprob)
        assert self._stop_check is not None
        codes = [self._stop_check.finish_code(s, token) for s, token in zip(samples, tokens, strict=True)]
        return tokens, codes

    def _take_aborts(self, numbers: dict[str, int]) -> list[int]:
        with self._lock:
            known = [numbers[name] for name in self._aborts if name in numbers]
            taken = known[:ABORTS_PER_STEP]
            self._aborts = [name for name in self._aborts if name in numbers and numbers[name] not in taken]
        return taken + [-1] * (ABORTS_PER_STEP - len(taken))

    def _finish(self, result: _StepResult) -> list[Candidate]:
        if not result.received:
            self.transport.receive(result.message, self.transport.world_size - 1, result.tag + 1)
        tokens, codes, aborts = result.lists()
        self._generated_tokens += sum(not sequence.finish_code for sequence in result.plan.samples)
        ended = self.scheduler.finish_step(result.plan, [[token] for token in tokens], codes)
        for number in aborts:
            ended += self.scheduler.abort(number)
        if self._stop_check is None:
            return []
        for group in {id(sequence.group): sequence.group for sequence in ended}.values():
            if all(sequence.finish_code for sequence in group.candidates):
                self._last_hidden.pop(group.number, None)
        return [self._candidate(sequence) for sequence in ended]

    def _candidate(self, sequence: RunningSequence) -> Candidate:
        assert self._stop_check is not None
        # a step that was on the way when the request was aborted has drawn one token more than is kept
        count = len(sequence.token_ids)
        del sequence.logprobs[count:], sequence.sampling_logprobs[count:]
        return sequence.candidate(self._stop_check.text(sequence), self.policy_version)

"""One pipeline stage inside one process: its layers, its KV blocks, its own copy of the scheduler.

All stages of a pipeline run :meth:`StageEngine.rollout` on the same requests. The scheduler plans, a runner computes:
op by op and step by step on a CPU and with several stages (:mod:`ember_ray.engine.eager_runner`), in captured CUDA
graphs and ahead of the host where one GPU holds the whole model (:mod:`ember_ray.engine.cuda_runner`). Several lanes
(micro-batches) are in flight, so that all stages work at once: results of a lane are collected only when its next
step is due.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from hashlib import blake2b
from typing import Any, Protocol

import torch
from torch import Tensor

from cuda_ext.prefill_attention import choose_backend
from ember_ray.engine.aborts import Aborts, SwitchNote
from ember_ray.engine.block_pool import BlockPool
from ember_ray.engine.cuda_runner import CudaRunner
from ember_ray.engine.eager_runner import EagerRunner
from ember_ray.engine.kv_memory import agreed_kv_blocks, fitting_kv_blocks
from ember_ray.engine.lora_mode import chosen_lora_mode
from ember_ray.engine.options import CPU_KV_BLOCKS, EngineOptions
from ember_ray.engine.request import Candidate, GenerationRequest
from ember_ray.engine.scheduler import Scheduler, StepPlan
from ember_ray.engine.scorer import Scorer, ScoreRequest
from ember_ray.engine.sequence import Sequence as RunningSequence
from ember_ray.engine.step_inputs import StepInputs
from ember_ray.engine.step_result import StepResult
from ember_ray.engine.stop_check import StopCheck
from ember_ray.engine.transport import Transport
from ember_ray.model.adapter_layout import FlatAdapter
from ember_ray.model.lora import AdapterError, AdapterUpdate
from ember_ray.model.plan import plan_stages, stage_layers
from ember_ray.model.qwen3 import StageModel
from ember_ray.model.qwen3_config import ModelError, read_model_config
from ember_ray.model.slots import AdapterSlots, MergedWeights
from ember_ray.model.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


class Runner(Protocol):
    """Computes plans.

    Attributes:
        lookahead: plans of a lane whose results may be on the way when its next one is made.
        timings: of the last rollout, where the runner measures: prefill_seconds, decode_seconds, decode_steps.
    """

    lookahead: int
    timings: dict[str, float]

    def run(self, plan: StepPlan) -> Any:
        """Starts a plan; returns what collect() needs."""

    def collect(self, pending: Any) -> StepResult:
        """Waits for a plan's results; plans of a lane are collected in their order."""

    def forward(self, inputs: StepInputs) -> Tensor:
        """The residual stream [tokens, hidden] behind this stage's layers; nothing is drawn."""

    def forget_group(self, number: int) -> None:
        """A prompt group has ended."""

    def end(self) -> None:
        """A rollout has ended, well or not."""


def _logits(model: StageModel, residual: Tensor) -> Tensor:
    return model.logits(model.final_norm(residual))


# Nothing that a StageEngine holds may refer to it: an engine that is let go must free its GPU's memory at once, not
# when Python looks for cycles.
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
        device = torch.device(options.device)
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
        if device.type == "cuda":
            from cuda_ext.device import require_cuda

            require_cuda(device)
            if device.index not in (None, torch.cuda.current_device()):  # where kernels are launched
                raise ValueError(
                    f"device '{device}' is not the GPU that this process works on ({torch.cuda.current_device()}); set "
                    f"CUDA_VISIBLE_DEVICES={device.index} and name the device 'cuda'"
                )
        self.prefill_backend, why = choose_backend(
            options.prefill_attention, self.dtype, config.head_dim, options.device
        )
        logger.info("stage %d: attention over prompts by %s (%s)", stage, self.prefill_backend, why)
        self.model = StageModel(
            options.model, config, layers, self.dtype, options.device, self.max_model_len, options.load_format
        )
        self.is_last = self.model.is_last
        self._stop_check = StopCheck(Tokenizer(options.model), config.eos_token_ids) if self.is_last else None
        self.lora_mode = chosen_lora_mode(options, self.model, transport)
        logger.info("stage %d: adapters %s", stage, "merged" if self.lora_mode == "merged" else "beside the weights")
        merged = MergedWeights(layers, self.model.decoder_layers) if self.lora_mode == "merged" else None
        self._slots = AdapterSlots(config, layers, self.dtype, options.device, merged=merged)
        self.num_lanes = min(options.micro_batches or len(split), options.max_num_seqs)
        ahead = device.type == "cuda" and len(split) == 1
        num_blocks = options.num_kv_blocks or CPU_KV_BLOCKS
        if options.num_kv_blocks is None and device.type == "cuda":
            num_blocks = agreed_kv_blocks(
                transport, lambda: fitting_kv_blocks(options, self.model, self.prefill_backend)
            )
            logger.info("stage %d: %d KV blocks of %d tokens", stage, num_blocks, options.block_size)
        # one block more, which nobody reads: padding rows of a captured graph write there
        slots = (num_blocks + ahead) * options.block_size
        shape = (len(layers), 2, slots, config.num_key_value_heads, config.head_dim)
        self.kv_cache = torch.zeros(shape, dtype=self.dtype, device=options.device)
        self.scheduler = Scheduler(
            BlockPool(num_blocks),
            options.block_size,
            options.max_num_seqs,
            options.max_num_batched_tokens,
            self.max_model_len,
            config.vocab_size,
            self.num_lanes,
            options.prefix_sharing,
            options.num_scheduler_steps if ahead else 1,
            mixed=not ahead,
        )
        self._aborts, self._switch = Aborts(), SwitchNote()
        self._runner: Runner
        if ahead:
            assert self._stop_check is not None
            self._runner = CudaRunner(
                options, self.model, self._slots, self.kv_cache, self._stop_check, self._aborts.take,
                self._switch.take, self.prefill_backend,
            )  # fmt: skip
        else:
            self._runner = EagerRunner(
                options, self.model, self._slots, self.kv_cache, self._stop_check, self._aborts.take,
                self._switch.take, transport, self.num_lanes, self.prefill_backend,
            )  # fmt: skip
        self._scorer = Scorer(
            self.scheduler.pool, options.block_size, options.max_num_batched_tokens, self.max_model_len,
            config.vocab_size, options.device, self._runner.forward,
            partial(_logits, self.model) if self.is_last else None, options.prefix_sharing,
        )  # fmt: skip
        self._is_rolling_out = False
        self._beside: torch.cuda.Stream | None = None
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

    @contextmanager
    def beside(self) -> Iterator[None]:
        """Work on the device that does not wait for a running batch, nor the batch for it."""
        if torch.device(self.options.device).type != "cuda":
            yield
            return
        stream = self._beside = self._beside or torch.cuda.Stream()
        with torch.cuda.stream(stream):
            yield
            stream.synchronize()

    def stage_adapter(self, update: AdapterUpdate | FlatAdapter) -> None:
        """Checks an update and holds it beside the one that serves; raises AdapterError and changes nothing else.

        While a rollout runs, call it from another thread, in `beside`.
        """
        self._slots.stage(update)

    def commit_adapter(self, version: int) -> None:
        """Switches to a staged or still resident version; cached KV of other versions is not found from then on.

        Raises:
            AdapterError: unknown version, or a rollout is running.
        """
        if self._is_rolling_out:
            raise AdapterError(f"policy version {version} cannot be switched to while a rollout is running")
        self._switch.take()
        self._slots.commit(version)

    def switch_in_flight(self, version: int) -> None:
        """Lets all stages switch to a version that they hold between two steps of the running batch.

        Call it on the last stage, from any thread. What has been computed stays in use: candidates tell which of their
        tokens are of which version. Without a batch nothing happens before the next one; a commit takes it back.
        """
        self._switch.note(version)

    def discard_adapter(self, version: int) -> None:
        """Forgets a staged version."""
        self._slots.discard(version)

    # -- rollouts --------------------------------------------------------------------------------------------------

    def rollout(self, requests: Sequence[GenerationRequest]) -> Iterator[list[Candidate]]:
        """Generates all candidates of a batch; to be run by all stages with the same requests.

        It begins with the first look at the results, and closing the iterator gives the batch up.

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
        self._aborts.begin(request.request_id for request in requests)
        self._is_rolling_out = True
        try:
            yield from self._loop()
            self.transport.flush()
        except BaseException:
            self.scheduler.pool.forget()  # a step may have been planned, and its blocks published, but not computed
            raise
        finally:
            self.scheduler.clear()
            try:
                self._runner.end()
            finally:
                self._aborts.end()
                self._is_rolling_out = False

    def score(self, requests: Sequence[ScoreRequest]) -> list[list[float]]:
        """Log-probabilities of given tokens under the active policy; to be run by all stages with the same rows.

        Prompts are computed once for all rows that share them, and found in the cache where a rollout has been there.

        Returns:
            On the last stage, for each row, the natural log-probabilities of its tokens behind the prompt.

        Raises:
            RequestError: a row can never be scored.
            RuntimeError: a rollout is running.
        """
        if self._is_rolling_out:
            raise RuntimeError("this stage is in a rollout; score before or after it")
        scores = self._scorer.score(requests, self.policy_version)
        self.transport.flush()
        return scores

    def abort(self, request_id: str) -> None:
        """Ends a request of the running batch with what it has; call it on the last stage, from any thread.

        Between batches, and for a request that is not in the batch or has ended, it does nothing: a later batch may
        use the same id.
        """
        self._aborts.note(request_id)

    @property
    def implementation(self) -> dict[str, str]:
        """Which implementations compute: attention over prompts, decode attention, sampling, decode steps."""
        on_gpu = torch.device(self.options.device).type == "cuda"
        ahead = isinstance(self._runner, CudaRunner)
        return {
            "prefill": self.prefill_backend,
            "attention": "ember" if on_gpu else "torch",
            "sampling": "ember" if on_gpu else "torch",
            "decode": "eager" if self.options.enforce_eager or not ahead else "cuda_graph",
        }

    @property
    def timings(self) -> dict[str, float]:
        """Seconds of the last rollout on the GPU, see :class:`Runner`."""
        return self._runner.timings

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

    def _loop(self) -> Iterator[list[Candidate]]:
        in_flight: list[deque[Any]] = [deque() for _ in range(self.num_lanes)]
        while self.scheduler.has_work or any(in_flight):
            moved = False
            for lane, queue in enumerate(in_flight):
                while len(queue) > self._runner.lookahead:
                    moved = True
                    if ended := self._finish(queue.popleft()):
                        yield ended
                plan = self.scheduler.schedule(lane)
                if not plan.is_empty:
                    moved = True
                    queue.append(self._run(plan))
                elif queue:
                    moved = True
                    if ended := self._finish(queue.popleft()):
                        yield ended
            if not moved:
                raise RuntimeError("the scheduler stands still with work left; this is a fault of the engine")

    @torch.inference_mode()
    def _run(self, plan: StepPlan) -> Any:
        self._steps += plan.num_steps
        self._prefill_tokens += plan.num_tokens - len(plan.decodes)
        return self._runner.run(plan)

    def _finish(self, pending: Any) -> list[Candidate]:
        result = self._runner.collect(pending)
        rows = zip(result.plan.samples, result.logprobs, result.sampling_logprobs, strict=self.is_last)
        for sequence, logprobs, sampling_logprobs in rows:
            if sequence.finish_code:  # aborted while the step was on the way
                continue
            if not all(map(math.isfinite, logprobs)):
                raise ModelError(
                    f"model folder '{self.options.model}': policy version {self.policy_version} gives logits that are "
                    f"not finite in {self.options.dtype}; use a wider dtype, or go back to an earlier version"
                )
            sequence.logprobs.extend(logprobs)
            sequence.sampling_logprobs.extend(sampling_logprobs)
        self._generated_tokens += sum(
            len(tokens) for s, tokens in zip(result.plan.samples, result.tokens, strict=True) if not s.finish_code
        )
        ended = self.scheduler.finish_step(result.plan, result.tokens, result.finish_codes)
        for number in result.aborts:
            ended += self.scheduler.abort(number)
        for group in {id(sequence.group): sequence.group for sequence in ended}.values():
            if all(sequence.finish_code for sequence in group.candidates):
                self._runner.forget_group(group.number)
        candidates = [self._candidate(sequence) for sequence in ended] if self.is_last else []
        if result.switch_to not in (-1, self.policy_version):
            self._slots.commit(result.switch_to)
            self.scheduler.switch(result.switch_to)
        return candidates

    def _candidate(self, sequence: RunningSequence) -> Candidate:
        assert self._stop_check is not None
        return sequence.candidate(self._stop_check.text(sequence), self.policy_version)

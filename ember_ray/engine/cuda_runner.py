"""Runs plans on one GPU that holds the whole model, without waiting for it.

A decode step is one captured CUDA graph a batch size: embedding, layers, LM head, sampling, append and stop checks.
Which rows decode and where their blocks lie is uploaded once a plan; the steps of a plan are replays. Prompts run op
by op, several packed into one pass. Results are copied to the host behind each plan and looked at one plan later.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cuda_ext.decode_attention import group_decode_attention
from cuda_ext.decode_state import (
    RowParams,
    SlotState,
    StepOutputs,
    append_tokens,
    decode_inputs,
    sample_rows,
)
from cuda_ext.prefill_attention import PrefillBatch, prefill_attention
from ember_ray.engine.decode_buffers import DecodeBuffers
from ember_ray.engine.options import EngineOptions
from ember_ray.engine.scheduler import StepPlan
from ember_ray.engine.sequence import Sequence
from ember_ray.engine.slot_table import SlotTable
from ember_ray.engine.step_inputs import StepInputs, build_step_inputs
from ember_ray.engine.step_result import StepResult
from ember_ray.engine.stop_check import StopCheck
from ember_ray.engine.upload import host_tensor, upload
from ember_ray.model.qwen3 import StageModel
from ember_ray.model.slots import AdapterSlots


def graph_sizes(max_num_seqs: int) -> list[int]:
    """Batch sizes that get a graph: few enough to capture in seconds, close enough that little is padding."""
    sizes = [1, 2, 4, 8, *range(16, 257, 16), *range(288, 1025, 32), *range(1088, max_num_seqs + 64, 64)]
    return [size for size in sizes if size < max_num_seqs] + [max_num_seqs]


@dataclass
class _Pending:
    """A plan on its way.

    Attributes:
        results: [4, steps, rows] int32 in pinned memory: tokens, logprobs, sampling_logprobs (as bits), codes.
        done: recorded behind the copy.
    """

    plan: StepPlan
    results: Tensor
    done: torch.cuda.Event


class CudaRunner:
    """See the module's text.

    Args:
        kv_cache: [layers, 2, num_slots, kv_heads, head_dim]; the slots of its last block belong to no sequence.
        take_aborts: gives at most so many numbers of requests that end now.
        take_switch: gives the policy version to switch to, -1 for none.
        prefill_backend: from cuda_ext.prefill_attention.choose_backend().
    """

    lookahead = 1

    def __init__(
        self,
        options: EngineOptions,
        model: StageModel,
        adapters: AdapterSlots,
        kv_cache: Tensor,
        stop_check: StopCheck,
        take_aborts: Callable[[int], list[int]],
        take_switch: Callable[[], int],
        prefill_backend: str,
    ) -> None:
        self._options, self._model, self._adapters, self._kv_cache = options, model, adapters, kv_cache
        self._stop_check, self._prefill_backend = stop_check, prefill_backend
        self._take_aborts, self._take_switch = take_aborts, take_switch
        self._scale = model.config.head_dim**-0.5
        self._trash_slot = kv_cache.shape[2] - options.block_size
        self._sizes = graph_sizes(options.max_num_seqs)
        self._steps = options.num_scheduler_steps
        self._state = SlotState.zeros(options.max_num_seqs, options.device)
        self._slots = SlotTable(options.max_num_seqs, stop_check)
        self._buffers = DecodeBuffers(options.max_num_seqs, options.block_size, model.config.share, options.device)
        self._results = torch.zeros(4, self._steps, options.max_num_seqs, dtype=torch.int32, device=options.device)
        self._outputs = _step_outputs(self._results, self._buffers.step)
        self._graphs: dict[tuple[int, int], torch.cuda.CUDAGraph] = {}  # by adapter signature and padded rows
        self._pool: Any = None  # of memory that the graphs share
        self._capture_stream = torch.cuda.Stream()
        self._last_hidden: dict[int, Tensor] = {}  # group number -> final-norm output behind its prompt
        self._events: list[tuple[str, int, torch.cuda.Event, torch.cuda.Event]] = []
        self.timings: dict[str, float] = {}

    # -- the runner's face -----------------------------------------------------------------------------------------

    def run(self, plan: StepPlan) -> _Pending:
        """Enqueues a plan; does not wait, except where a graph has to be captured first."""
        rows = self._prepare(plan) if plan.decodes else 0
        start = torch.cuda.Event(enable_timing=True)
        start.record()
        results = self._decode(plan, rows) if plan.decodes else self._prefill(plan)
        host = host_tensor(results.shape, torch.int32, results.device)
        host.copy_(results, non_blocking=True)
        done = torch.cuda.Event(enable_timing=True)
        done.record()
        self._events.append(("decode" if plan.decodes else "prefill", plan.num_steps, start, done))
        return _Pending(plan, host, done)

    def collect(self, pending: _Pending) -> StepResult:
        """Waits for a plan and reads its results."""
        pending.done.synchronize()
        plan, count = pending.plan, len(pending.plan.samples)
        tokens, logprobs, sampling_logprobs, codes = pending.results.numpy()[:, : plan.num_steps, :count]
        appended = ((codes >= 0) & (np.arange(plan.num_steps)[:, None] < np.array(plan.counts))).sum(0)
        last_codes = codes[np.maximum(appended - 1, 0), np.arange(count)]
        result = StepResult(
            plan,
            _columns(tokens, appended),
            np.where(appended > 0, last_codes, 0).tolist(),
            _columns(logprobs.view(np.float32), appended),
            _columns(sampling_logprobs.view(np.float32), appended),
            self._take_aborts(self._options.max_num_seqs),
            self._take_switch(),
        )
        for place, sequence in enumerate(plan.samples):
            if self._slots.needs_host(sequence) and not sequence.finish_code:
                kept, code = self._stop_check.end(sequence, result.tokens[place])
                result.finish_codes[place] = code
                for values in (result.tokens, result.logprobs, result.sampling_logprobs):
                    del values[place][kept:]
        return result

    def forget_group(self, number: int) -> None:
        self._last_hidden.pop(number, None)

    def end(self) -> None:
        """Waits for what is still on its way and adds up the times of the rollout."""
        # first what the next rollout must not find, even if the wait is interrupted
        self._last_hidden.clear()
        self._slots.forget_owners()
        events, self._events = self._events, []
        self.timings = {"prefill_seconds": 0.0, "decode_seconds": 0.0, "decode_steps": 0.0}
        torch.cuda.synchronize()
        for kind, steps, start, done in events:
            self.timings[f"{kind}_seconds"] += start.elapsed_time(done) / 1e3
            self.timings["decode_steps"] += steps if kind == "decode" else 0

    def forward(self, inputs: StepInputs) -> Tensor:
        """The residual stream [tokens, hidden] behind the layers."""
        assert inputs.prefill is not None
        x, residual = self._layers(inputs, inputs.prefill)
        return residual + x

    # -- prompts ---------------------------------------------------------------------------------------------------

    def _layers(self, inputs: StepInputs, batch: PrefillBatch) -> tuple[Tensor, Tensor]:
        def attention(q: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
            return prefill_attention(q, k_cache, v_cache, batch, self._scale, self._prefill_backend)

        hidden = self._model.embed(inputs.token_ids)
        return self._model.run_layers(
            hidden, inputs.positions, inputs.slots, self._kv_cache, attention, self._adapters.active
        )

    def _prefill(self, plan: StepPlan) -> Tensor:
        """Prompts and suffixes in one pass, and the tokens drawn behind them; returns [4, 1, samples] int32."""
        device, samples = self._options.device, plan.samples
        inputs = build_step_inputs(plan, self._options.block_size, self._model.config.share, device)
        normed = torch.empty(0, self._model.config.hidden_size, dtype=self._model.dtype, device=device)
        if inputs.prefill is not None:
            x, residual = self._layers(inputs, inputs.prefill)
            if len(inputs.hidden_rows):
                normed = self._model.final_norm(residual[inputs.hidden_rows] + x[inputs.hidden_rows])
        own = len(normed) - len(inputs.last_prompt_groups)
        for place, group in enumerate(inputs.last_prompt_groups):
            self._last_hidden[group.number] = normed[own + place]
        results = torch.zeros(4, 1, len(samples), dtype=torch.int32, device=device)
        if not samples:
            return results
        firsts = [sequence.group.number for sequence in samples[own:]]
        distinct = {number: own + place for place, number in enumerate(dict.fromkeys(firsts))}
        logits = self._model.logits(
            torch.cat((normed[:own], *(self._last_hidden[number][None] for number in distinct)))
        )
        self._slots.admit(samples)
        arrays = self._slots.rows(samples)
        arrays["line"] = np.array([*range(own), *(distinct[number] for number in firsts)], dtype=np.int32)
        arrays["known"] = np.array([len(sequence.token_ids) for sequence in samples], dtype=np.int32)
        arrays["index"] = arrays["slot"].astype(np.int64)
        arrays["step"] = np.zeros(1, dtype=np.int32)
        rows = upload(arrays, device)
        line, known, index, step = (rows.pop(name) for name in ("line", "known", "index", "step"))
        self._state.num_tokens.index_copy_(0, index, known)
        self._state.finished.index_fill_(0, index, 0)
        params = RowParams(**rows)
        drawn = sample_rows(logits, line, params, self._state)
        append_tokens(*drawn, params, self._state, _step_outputs(results, step))
        return results

    # -- decodes ---------------------------------------------------------------------------------------------------

    def _decode(self, plan: StepPlan, rows: int) -> Tensor:
        """All steps of a plan; returns [4, steps, rows] int32."""
        self._adopt([sequence for sequence in plan.decodes if not self._slots.owns(sequence)])
        self._buffers.fill(self._slots.rows(plan.decodes))
        graph = self._graphs.get((self._adapters.signature, rows))
        for _ in range(plan.num_steps):
            if graph is None:
                self._step(rows)
            else:
                graph.replay()
        return self._results

    def _adopt(self, sequences: list[Sequence]) -> None:
        """Sets the state of candidates that come back with all but one of their tokens computed."""
        if not sequences:
            return
        self._slots.admit(sequences)
        rows = upload(
            {
                "index": np.array([s.slot for s in sequences], dtype=np.int64),
                "token": np.array([s.token_ids[-1] for s in sequences], dtype=np.int32),
                "known": np.array([len(s.token_ids) for s in sequences], dtype=np.int32),
            },
            self._options.device,
        )
        self._state.last_token.index_copy_(0, rows["index"], rows["token"])
        self._state.num_tokens.index_copy_(0, rows["index"], rows["known"])
        self._state.finished.index_fill_(0, rows["index"], 0)

    def _step(self, rows: int) -> None:
        """One decode step of the rows in the buffers; runs unchanged inside a graph capture."""
        params, groups, state = self._buffers.params(rows), self._buffers.groups, self._state
        token_ids, positions, kv_slots = decode_inputs(
            params, state, groups.suffix_blocks, groups.suffix_starts[:rows], groups.suffix_lens[:rows],
            self._options.block_size, self._trash_slot,
        )  # fmt: skip

        def attention(q: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
            return group_decode_attention(q, k_cache, v_cache, groups, self._scale)

        x, residual = self._model.run_layers(
            self._model.embed(token_ids), positions, kv_slots, self._kv_cache, attention, self._adapters.active
        )
        drawn = sample_rows(self._model.head(x, residual), None, params, state)
        append_tokens(*drawn, params, state, self._outputs)

    def _prepare(self, plan: StepPlan) -> int:
        """The padded rows of a plan; their graph is captured if it is not there."""
        rows = next(size for size in self._sizes if size >= len(plan.decodes))
        if self._buffers.prepare(plan.decodes, plan.counts):
            self._graphs.clear()  # they read the old ones
        if not self._options.enforce_eager and (self._adapters.signature, rows) not in self._graphs:
            self._make_graph(rows)
        return rows

    def _make_graph(self, rows: int) -> None:
        signature, kept = self._adapters.signature, self._adapters.signatures_kept
        self._graphs = {key: graph for key, graph in self._graphs.items() if key[0] in kept}
        if not self._graphs:
            # A pool dies with the last graph in it. The largest batch goes into a new one first: all others fit into
            # the memory that it took.
            self._pool = torch.cuda.graph_pool_handle()
            largest = self._sizes[-1]
            self._graphs[signature, largest] = self._capture(largest)
        if (signature, rows) not in self._graphs:
            self._graphs[signature, rows] = self._capture(rows)

    def _capture(self, rows: int) -> torch.cuda.CUDAGraph:
        # rows that are all padding change no candidate and write K and V where nobody reads
        torch.cuda.synchronize()
        self._buffers.clear()
        self._capture_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._capture_stream):
            self._step(rows)  # libraries set themselves up at their first call, which a capture does not allow
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # one stream for all: cuBLAS keeps a workspace for each that it was called on
        # other threads of the process (adapters are staged in one) may use CUDA meanwhile
        with torch.cuda.graph(graph, pool=self._pool, stream=self._capture_stream, capture_error_mode="thread_local"):
            self._step(rows)
        return graph


def _step_outputs(results: Tensor, step: Tensor) -> StepOutputs:
    """Views of [4, steps, rows] int32."""
    tokens, logprobs, sampling_logprobs, codes = results.unbind(0)
    return StepOutputs(tokens, logprobs.view(torch.float32), sampling_logprobs.view(torch.float32), codes, step)


def _columns(values: np.ndarray, counts: np.ndarray) -> list[list]:
    """[steps, rows] as one list a row, cut to its count."""
    return [column[:count] for column, count in zip(values.T.tolist(), counts.tolist(), strict=True)]

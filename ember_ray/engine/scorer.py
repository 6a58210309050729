"""Log-probabilities of given tokens: the forward pass of prompts, without drawing anything.

Rows with the same prompt form a group: its prompt is computed once (or found in the cache), the given tokens of each
row attend to it. Groups are packed into passes; the prompts' blocks stay findable afterwards.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from cuda_ext.logprobs import token_logprobs
from cuda_ext.prefill_attention import PrefillBatch
from ember_ray.engine.block_pool import BlockPool, prefix_keys
from ember_ray.engine.scheduler import RequestError, extremes
from ember_ray.engine.step_inputs import StepInputs, slots_of
from ember_ray.engine.upload import upload

LOGITS_ROWS = 1024
"""Rows of logits that exist at once."""


@dataclass(frozen=True)
class ScoreRequest:
    """One row: tokens from prompt_len on are scored, each given all before it.

    Attributes:
        token_ids: prompt and given tokens.
        prompt_len: at least 1, below the number of tokens.
    """

    token_ids: tuple[int, ...]
    prompt_len: int


@dataclass
class _Piece:
    """Tokens first to last - 1 of a row (or of its prompt), to be computed with the positions before in the cache."""

    token_ids: tuple[int, ...]
    first: int
    last: int
    slots: np.ndarray  # of all positions of the row up to last
    targets: list[tuple[int, int]] = field(default_factory=list)  # (position that predicts, row number)


@dataclass
class _Pass:
    """Pieces of one forward pass, and blocks that are free for others behind it."""

    pieces: list[_Piece] = field(default_factory=list)
    num_tokens: int = 0
    blocks: list[int] = field(default_factory=list)


class Scorer:
    """See the module's text.

    Args:
        pool: the stage's KV blocks; its index is used and filled.
        forward: runs the stage's layers on the inputs; gives the residual stream of all rows.
        logits: the LM head on such rows, final norm included; None on stages that are not the last.
        prefix_sharing: False computes every row's prompt on its own (for comparison).
    """

    def __init__(
        self,
        pool: BlockPool,
        block_size: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        vocab_size: int,
        device: str,
        forward: Callable[[StepInputs], Tensor],
        logits: Callable[[Tensor], Tensor] | None,
        prefix_sharing: bool = True,
    ) -> None:
        self._pool, self._block_size, self._budget = pool, block_size, max_num_batched_tokens
        self._max_model_len, self._vocab_size, self._device = max_model_len, vocab_size, device
        self._forward, self._logits, self._prefix_sharing = forward, logits, prefix_sharing
        self._held: Counter[int] = Counter()

    def check(self, number: int, request: ScoreRequest) -> None:
        """Raises RequestError where a row can never be scored."""
        count, name = len(request.token_ids), f"row {number} to score"
        if not 1 <= request.prompt_len < count:
            raise RequestError(f"{name}: prompt_len {request.prompt_len} of {count} tokens leaves nothing to score")
        if count > self._max_model_len:
            raise RequestError(f"{name}: it has {count} tokens, the context holds {self._max_model_len}")
        for token in extremes(request.token_ids):
            if not 0 <= token < self._vocab_size:
                raise RequestError(f"{name}: token id {token} is outside the vocabulary of {self._vocab_size}")
        need = self._blocks_for(request.prompt_len) + self._blocks_for(count - request.prompt_len)
        if need > self._pool.num_blocks:
            raise RequestError(f"{name}: it needs {need} KV blocks, the engine has {self._pool.num_blocks}")

    @torch.inference_mode()
    def score(self, requests: Sequence[ScoreRequest], policy_version: int) -> list[list[float]]:
        """Natural log-probabilities at temperature 1 of each row's tokens behind its prompt; empty lists on stages
        that are not the last.

        Raises:
            RequestError: a row can never be scored; nothing is computed then.
        """
        for number, request in enumerate(requests):
            self.check(number, request)
        places: list[tuple[Tensor, list[tuple[int, int]]]] = []
        try:
            for one in self._passes(requests, policy_version):
                if not one.pieces:
                    continue
                inputs, rows, targets, tokens = self._inputs(one, requests)
                hidden = self._forward(inputs)
                if self._logits is not None and targets:
                    places.append((self._logprobs(hidden, rows, tokens), targets))
        except BaseException:
            self._pool.release(list(self._held.elements()))
            self._held.clear()
            self._pool.forget()  # some blocks may have been published, but not computed
            raise
        scores = [[0.0] * (len(r.token_ids) - r.prompt_len if self._logits else 0) for r in requests]
        for values, targets in places:
            for (number, place), value in zip(targets, values.tolist(), strict=True):
                scores[number][place] = value
        return scores

    def _take(self, found: Sequence[int], fresh: int) -> list[int]:
        """Holds blocks that were found, and fresh ones behind them."""
        self._pool.hold(found)
        blocks = [*found, *self._pool.allocate(fresh)]
        self._held.update(blocks)
        return blocks

    def _release(self, blocks: list[int]) -> None:
        self._pool.release(blocks)
        self._held.subtract(blocks)

    def _blocks_for(self, tokens: int) -> int:
        return -(-tokens // self._block_size)

    def _passes(self, requests: Sequence[ScoreRequest], policy_version: int) -> Iterator[_Pass]:
        """Packs the rows group by group; a pass that is given out must be computed before the next one is asked for."""
        groups: list[tuple[tuple[int, ...], list[int]]] = []
        by_prompt: dict[tuple[int, ...], list[int]] = {}
        for number, request in enumerate(requests):
            prompt = request.token_ids[: request.prompt_len]
            if prompt not in by_prompt or not self._prefix_sharing:
                by_prompt[prompt] = []
                groups.append((prompt, by_prompt[prompt]))
            by_prompt[prompt].append(number)
        now = _Pass()
        for prompt, numbers in groups:
            keys = prefix_keys(prompt, self._block_size, policy_version) if self._prefix_sharing else []
            prompt_blocks: list[int] | None = None
            waiting = list(numbers)
            while waiting:
                own = self._blocks_for(len(requests[waiting[0]].token_ids) - len(prompt))
                found = self._pool.lookup(keys[: (len(prompt) - 1) // self._block_size])
                held = sum(map(self._pool.is_free, found)) + self._blocks_for(len(prompt)) - len(found)
                if own + (held if prompt_blocks is None else 0) > self._pool.num_free:
                    if prompt_blocks is not None and not now.blocks and not now.pieces:
                        raise RequestError(f"the {self._pool.num_blocks} KV blocks are held by others")
                    yield now  # then its blocks are free
                    self._release(now.blocks)
                    now = _Pass()
                    if prompt_blocks is None and held + own > self._pool.num_free:
                        raise RequestError(f"the {self._pool.num_blocks} KV blocks are held by others")
                    continue
                if prompt_blocks is None:
                    prompt_blocks = self._take(found, self._blocks_for(len(prompt)) - len(found))
                    first = len(found) * self._block_size
                    slots = slots_of(prompt_blocks, self._block_size, 0, len(prompt))
                    whole = _Piece(prompt, first, len(prompt), slots, [(len(prompt) - 1, n) for n in numbers])
                    for place in range(len(found), len(keys)):
                        self._pool.publish(prompt_blocks[place], keys[place])
                    now = yield from self._pack(now, whole)
                number = waiting.pop(0)
                tokens = requests[number].token_ids
                blocks = self._take([], own)
                now.blocks += blocks
                fed = len(tokens) - 1  # the last one predicts nothing that is asked for
                if fed > len(prompt):
                    suffix = slots_of(blocks, self._block_size, 0, fed - len(prompt))
                    slots = np.concatenate((slots_of(prompt_blocks, self._block_size, 0, len(prompt)), suffix))
                    piece = _Piece(tokens, len(prompt), fed, slots, [(p, number) for p in range(len(prompt), fed)])
                    now = yield from self._pack(now, piece)
            assert prompt_blocks is not None
            now.blocks += prompt_blocks
        yield now
        self._release(now.blocks)

    def _pack(self, now: _Pass, piece: _Piece) -> Generator[_Pass, None, _Pass]:
        """Adds a piece, over as many passes as it takes; returns the one that is open then."""
        first = piece.first
        while first < piece.last:
            room = self._budget - now.num_tokens
            if room == 0:
                blocks, now.blocks = now.blocks, []
                yield now
                now = _Pass(blocks=blocks)  # held on: the piece that is cut needs some of them
                continue
            last = min(piece.last, first + room)
            targets = [(position, number) for position, number in piece.targets if first <= position < last]
            now.pieces.append(_Piece(piece.token_ids, first, last, piece.slots[:last], targets))
            now.num_tokens += last - first
            first = last
        return now

    def _inputs(
        self, one: _Pass, requests: Sequence[ScoreRequest]
    ) -> tuple[StepInputs, list[int], list[tuple[int, int]], list[int]]:
        """The pass as tensors; rows that predict, what they predict as (row number, place) and the tokens."""
        rows: list[int] = []
        targets: list[tuple[int, int]] = []
        tokens: list[int] = []
        first_row = 0
        for piece in one.pieces:
            for position, number in piece.targets:
                rows.append(first_row + position - piece.first)
                targets.append((number, position + 1 - requests[number].prompt_len))
                tokens.append(requests[number].token_ids[position + 1])
            first_row += piece.last - piece.first
        tensors = upload(
            {
                "token_ids": _joined([np.array(p.token_ids[p.first : p.last]) for p in one.pieces]),
                "positions": _joined([np.arange(p.first, p.last) for p in one.pieces]),
                "slots": _joined([p.slots[p.first : p.last] for p in one.pieces]),
                "hidden_rows": np.array(sorted(set(rows)), dtype=np.int64),
            },
            self._device,
        )
        lengths = [piece.last - piece.first for piece in one.pieces]
        batch = PrefillBatch.build(lengths, [p.slots for p in one.pieces], self._device) if lengths else None
        inputs = StepInputs(**tensors, num_decodes=0, decode_groups=None, prefill=batch, last_prompt_groups=[])
        return inputs, rows, targets, tokens

    def _logprobs(self, hidden: Tensor, rows: list[int], tokens: list[int]) -> Tensor:
        """[targets] float32. A row of hidden states that predicts for several candidates goes through the head once."""
        assert self._logits is not None
        distinct, line = np.unique(np.array(rows, dtype=np.int64), return_inverse=True)
        order = np.argsort(line, kind="stable")
        arrays = {"rows": distinct, "line": line[order].astype(np.int64), "token": np.array(tokens)[order]}
        device = upload(arrays, self._device)
        parts = []
        for start in range(0, len(distinct), LOGITS_ROWS):
            logits = self._logits(hidden[device["rows"][start : start + LOGITS_ROWS]])
            begin, end = np.searchsorted(line[order], [start, start + LOGITS_ROWS]).tolist()
            parts.append(token_logprobs(logits, device["line"][begin:end] - start, device["token"][begin:end]))
        back = torch.from_numpy(np.argsort(order)).to(self._device)
        return torch.cat(parts)[back]


def _joined(arrays: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(arrays).astype(np.int64) if arrays else np.empty(0, np.int64)

"""How the tokens of a request are drawn, in the field's usual terms."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class SamplingParams:
    """Sampling settings of one request; the same for all its candidates.

    Filters apply in vLLM's order: temperature, then min-p, then top-k, then top-p over what is left.

    Attributes:
        temperature: divides the logits; 0 means greedy.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the smallest set of most likely tokens whose mass reaches top_p, in (0, 1].
        min_p: keep tokens at least min_p times as likely as the most likely one, in [0, 1].
        max_tokens: most tokens to generate per candidate, at least 1.
        seed: random numbers depend only on (seed, prompt tokens, candidate, position).
            None takes the engine's own seed and the number of requests seen so far.
        stop_token_ids: tokens that end a candidate beside the model's EOS; the token is kept.
        stop: strings that end a candidate; the text is cut before the first match.
        detokenize: decode the text of candidates; False leaves it empty (token ids are always there).
        ignore_eos: go on after the model's EOS token (stop_token_ids still end the candidate).

    Raises:
        ValueError: a value is out of range; the message names it.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    max_tokens: int = 16
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    detokenize: bool = True

    def __post_init__(self) -> None:
        def need(ok: bool, what: str) -> None:
            if not ok:
                raise ValueError(f"sampling parameters: {what}")

        need(
            math.isfinite(self.temperature) and self.temperature >= 0.0,
            f"temperature must be finite and at least 0, not {self.temperature}",
        )
        need(self.top_k >= 0, f"top_k must be at least 0 (0 = off), not {self.top_k}")
        need(0.0 < self.top_p <= 1.0, f"top_p must be in (0, 1], not {self.top_p}")
        need(0.0 <= self.min_p <= 1.0, f"min_p must be in [0, 1], not {self.min_p}")
        need(self.max_tokens >= 1, f"max_tokens must be at least 1, not {self.max_tokens}")
        need(not isinstance(self.stop, str), "stop must be a tuple of strings, not one string")
        need(all(self.stop), "a stop string must not be empty")

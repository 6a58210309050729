"""Where a candidate ends, and its text."""

from __future__ import annotations

from itertools import islice

from ember_ray.engine.sampling_params import SamplingParams
from ember_ray.engine.sequence import FINISH_REASONS, Sequence
from ember_ray.model.tokenizer import Tokenizer

_STOP, _LENGTH, _STOP_SEQUENCE = (FINISH_REASONS.index(name) for name in ("stop", "length", "stop_sequence"))


class StopCheck:
    """Finish codes (places in ``FINISH_REASONS``) of newly drawn tokens.

    Args:
        tokenizer: of the model.
        eos_token_ids: tokens that end an answer unless a request ignores them.
    """

    def __init__(self, tokenizer: Tokenizer, eos_token_ids: tuple[int, ...]) -> None:
        self._tokenizer, self._eos = tokenizer, frozenset(eos_token_ids)

    def stop_ids(self, params: SamplingParams) -> set[int]:
        """Tokens that end an answer."""
        return set(params.stop_token_ids) | (set() if params.ignore_eos else self._eos)

    def end(self, sequence: Sequence, tokens: list[int]) -> tuple[int, int]:
        """How many of the new tokens belong to the answer, and the finish code behind the last of them."""
        for place in range(len(tokens)):
            if code := self._finish_code(sequence, tokens[:place], tokens[place]):
                return place + 1, code
        return len(tokens), 0

    def _finish_code(self, sequence: Sequence, before: list[int], token: int) -> int:
        """0 to go on. A stop token wins over a stop string, and that over the length."""
        params = sequence.params
        if token in params.stop_token_ids or (token in self._eos and not params.ignore_eos):
            return _STOP
        if params.stop:
            tail = self._tokenizer.decode([*self._tail([*sequence.token_ids, *before], params.stop), token])
            if any(text in tail for text in params.stop):
                return _STOP_SEQUENCE
        if len(sequence.token_ids) + len(before) + 1 >= sequence.max_tokens:
            return _LENGTH
        return 0

    def _tail(self, token_ids: list[int], stops: tuple[str, ...]) -> list[int]:
        """The newest tokens with text, as many as a match that ends in the next token can reach back.

        A token with text has at least one byte; a character that the cut tears apart has at most four.
        """
        reach = max(len(text.encode()) for text in stops) + 4
        with_text = (token for token in reversed(token_ids) if token not in self._tokenizer.special_ids)
        return list(islice(with_text, reach))[::-1]

    def text(self, sequence: Sequence) -> str:
        """The decoded answer without its stop token and without what follows a stop string, that included;
        empty where no text is wanted."""
        if not sequence.params.detokenize:
            return ""
        tokens = sequence.token_ids
        if sequence.finish_code == _STOP:
            tokens = tokens[:-1]
        text = self._tokenizer.decode(tokens)
        if sequence.finish_code == _STOP_SEQUENCE:
            places = [place for stop in sequence.params.stop if (place := text.find(stop)) >= 0]
            text = text[: min(places, default=len(text))]
        return text

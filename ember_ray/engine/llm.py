"""The engine in one process: prompts in, candidates out."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from pathlib import Path

from ember_ray.engine.options import EngineOptions
from ember_ray.engine.request import Candidate, GenerationRequest, RequestOutput
from ember_ray.engine.sampling_params import SamplingParams
from ember_ray.engine.scorer import ScoreRequest
from ember_ray.engine.stage_engine import StageEngine
from ember_ray.engine.transport import LoopbackTransport
from ember_ray.model.lora import AdapterUpdate, load_peft_adapter
from ember_ray.model.tokenizer import Tokenizer

Prompt = str | Sequence[int] | Sequence[dict[str, str]]
"""Text (tokenized as it is), token ids, or chat messages."""


class LLM:
    """One stage with all layers.

    Raises:
        ModelError, ValueError: the model or the options cannot be served.
    """

    def __init__(self, options: EngineOptions) -> None:
        self.engine = StageEngine(options, 0, LoopbackTransport())
        self.tokenizer = Tokenizer(options.model)

    def generate(
        self,
        prompts: Sequence[Prompt],
        num_candidates: int = 1,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Generates N candidates of each prompt.

        Args:
            prompts: a list; each text, token ids or chat messages.
            sampling_params: one for all prompts, or one each.

        Returns:
            One output a prompt, in order; its candidates in order of their index.

        Raises:
            RequestError: a prompt is empty or too long.
            ValueError: numbers of prompts and parameters differ, or N is below 1.
        """
        if isinstance(prompts, str):
            raise ValueError("prompts must be a list of prompts, not one string")
        if num_candidates < 1:
            raise ValueError(f"num_candidates must be at least 1, not {num_candidates}")
        if sampling_params is None or isinstance(sampling_params, SamplingParams):
            params = [sampling_params or SamplingParams()] * len(prompts)
        else:
            params = list(sampling_params)
        if len(params) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts, but {len(params)} sampling parameters")
        requests = [
            GenerationRequest(str(number), self.encode(prompt), tuple(range(num_candidates)), one)
            for number, (prompt, one) in enumerate(zip(prompts, params, strict=True))
        ]
        made: dict[str, list[Candidate]] = {request.request_id: [] for request in requests}
        for ended in self.engine.rollout(requests):
            for candidate in ended:
                made[candidate.request_id].append(candidate)
        return [
            RequestOutput(
                request.request_id,
                request.prompt_token_ids,
                sorted(made[request.request_id], key=lambda candidate: candidate.index),
            )
            for request in requests
        ]

    def score(self, token_ids: Sequence[Sequence[int]], prompt_lens: int | Sequence[int] = 1) -> list[list[float]]:
        """Log-probabilities of given tokens under the active policy, at temperature 1.

        Args:
            token_ids: rows of tokens, prompt first.
            prompt_lens: how many tokens of each row are its prompt (one number for all, or one each); those behind
                are scored. Rows with equal prompts compute them once.

        Returns:
            For each row one natural logarithm for each token behind its prompt.

        Raises:
            RequestError: a row has nothing to score, or is too long.
            ValueError: numbers of rows and prompt lengths differ.
        """
        lengths = [prompt_lens] * len(token_ids) if isinstance(prompt_lens, int) else list(prompt_lens)
        if len(lengths) != len(token_ids):
            raise ValueError(f"{len(token_ids)} rows to score, but {len(lengths)} prompt lengths")
        return self.engine.score(
            [ScoreRequest(tuple(map(int, row)), length) for row, length in zip(token_ids, lengths, strict=True)]
        )

    def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """Token ids of a prompt."""
        if isinstance(prompt, str):
            return tuple(self.tokenizer.encode(prompt))
        if prompt and isinstance(prompt[0], dict):
            return tuple(self.tokenizer.encode_chat(prompt))  # type: ignore[arg-type]
        if isinstance(prompt, tuple):  # as it is: copying long prompts holds up the device; the scheduler checks them
            return prompt
        return tuple(array("q", prompt))  # type: ignore[arg-type]

    def publish(self, update: AdapterUpdate) -> None:
        """Switches to a new adapter version; raises AdapterError and keeps the old one if it is refused."""
        self.engine.stage_adapter(update)
        self.engine.commit_adapter(update.version)

    def load_adapter(self, folder: str | Path) -> int:
        """Serves a PEFT adapter folder; returns its policy version."""
        version = max(self.engine.resident_versions) + 1
        self.publish(load_peft_adapter(folder, version))
        return version

    def rollback(self, version: int) -> None:
        """Goes back to an earlier version that is still resident; 0 is the base model."""
        self.engine.commit_adapter(version)

"""Candidates from a model behind an OpenAI-compatible chat endpoint, in the form that our engine gives them."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ember_ray.config.endpoint_section import EndpointSection
from ember_ray.config.errors import UserError
from ember_ray.engine.request import Candidate, RequestOutput
from ember_ray.engine.sampling_params import SamplingParams
from ember_ray.evaluation.cost import token_dollars

if TYPE_CHECKING:
    from openai import AsyncOpenAI

FINISH_REASONS = {"stop": "stop", "length": "length"}
"""The server's words and ours; anything else (a content filter, a tool call) ended the answer from outside: abort."""


@dataclass(frozen=True)
class ChatPrompt:
    """A row's id and its chat, ``{"role": ..., "content": ...}`` each."""

    request_id: str
    messages: list[dict[str, str]]


@dataclass(frozen=True)
class Answered:
    """An answered request.

    Attributes:
        request_id: the prompt's.
        candidates: those that were wanted of what the server gave, their indices among all of the prompt.
        retries: further attempts at it.
        input_tokens, output_tokens: as the server counts them; None if it does not say.
    """

    request_id: str
    candidates: list[Candidate]
    retries: int
    input_tokens: int | None
    output_tokens: int | None


@dataclass
class Usage:
    """What was asked of an endpoint, and what it said that it cost.

    Attributes:
        requests: answered ones; ``retries`` are further attempts at them.
        input_tokens, output_tokens: as the server counts them.
        without_usage: answers in which the server did not say how many tokens they took.
    """

    requests: int = 0
    retries: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    without_usage: int = 0

    def add(self, answered: Answered) -> None:
        """Counts a request."""
        self.requests += 1
        self.retries += answered.retries
        if answered.input_tokens is None or answered.output_tokens is None:
            self.without_usage += 1
        else:
            self.input_tokens += answered.input_tokens
            self.output_tokens += answered.output_tokens

    def as_row(self, settings: EndpointSection) -> dict[str, float | None]:
        """The counts, and ``dollars`` at the configured prices; None if a price or a count is not known."""
        dollars = None
        if settings.input_price is not None and settings.output_price is not None and not self.without_usage:
            dollars = token_dollars(self.input_tokens, self.output_tokens, settings.input_price, settings.output_price)
        return asdict(self) | {"dollars": dollars}


class Endpoint:
    """A server that answers chats; retries, their waits and ``Retry-After`` are the openai client's.

    Attributes:
        usage: summed over all calls, the earlier answers that they were given included.

    Raises:
        UserError: the environment variable that should hold the key does not hold one.
    """

    def __init__(self, settings: EndpointSection) -> None:
        self.settings, self.usage = settings, Usage()
        name = settings.api_key_env
        # A client without a key would take OPENAI_API_KEY, which is not meant for this server.
        self._key = os.environ.get(name, "").strip() if name is not None else "none"
        if not self._key:
            raise UserError(
                f"endpoint.api_key_env: the environment variable {name} is not set; export it with the key of "
                f"{settings.base_url}, or set endpoint.api_key_env=null for a server that takes none"
            )
        if not (self._key.isascii() and self._key.isprintable()):
            raise UserError(f"endpoint.api_key_env: what the environment variable {name} holds is not a key")

    def generate(
        self,
        prompts: Sequence[ChatPrompt],
        num_candidates: int,
        params: SamplingParams,
        on_answer: Callable[[ChatPrompt, Answered], None] = lambda prompt, answered: None,
        earlier: Sequence[Answered] = (),
    ) -> list[RequestOutput]:
        """Candidates of all prompts, in their order.

        A server that gives fewer choices than asked (some give one, whatever ``n`` is) is asked again for the
        rest. What an endpoint does not tell is left empty: a candidate's ``token_ids`` and ``sampling_logprobs`` and
        the prompt's token ids; ``logprobs`` too, unless the server gives them. No seed is sent: servers that heed it
        would give the same answer to every repeated request. The policy version is 0.

        Args:
            prompts: chats.
            num_candidates: of each.
            params: temperature, top_p, max_tokens and stop are sent; top_k and min_p, which the protocol does not
                have, only if they are set (vLLM and SGLang understand them).
            on_answer: called whenever a request is answered; may raise, and what came before is not lost by it.
            earlier: what came of an earlier call with the same prompts and settings; only the rest is asked.

        Raises:
            UserError: one sentence on why the server cannot be used; what `on_answer` got is all there is then.
        """
        kept: dict[str, list[Candidate]] = {prompt.request_id: [] for prompt in prompts}
        for answered in earlier:
            self.usage.add(answered)
            kept[answered.request_id] += answered.candidates
        return asyncio.run(self._generate(prompts, kept, num_candidates, params, on_answer))

    async def _generate(
        self,
        prompts: Sequence[ChatPrompt],
        kept: dict[str, list[Candidate]],
        count: int,
        params: SamplingParams,
        on_answer: Callable[[ChatPrompt, Answered], None],
    ) -> list[RequestOutput]:
        from openai import AsyncOpenAI

        settings, gate = self.settings, asyncio.Semaphore(self.settings.concurrency)
        async with AsyncOpenAI(
            api_key=self._key,
            base_url=settings.base_url,
            max_retries=settings.max_retries,
            timeout=settings.timeout_s,
        ) as client:

            async def answer(prompt: ChatPrompt) -> RequestOutput:
                candidates = list(kept[prompt.request_id])
                while len(candidates) < count:
                    async with gate:
                        answered = await self._ask(client, prompt, range(len(candidates), count), params)
                        self.usage.add(answered)
                        on_answer(prompt, answered)
                    candidates += answered.candidates
                return RequestOutput(prompt.request_id, (), candidates)

            tasks = [asyncio.create_task(answer(prompt)) for prompt in prompts]
            try:
                return list(await asyncio.gather(*tasks))
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _ask(self, client: AsyncOpenAI, prompt: ChatPrompt, wanted: range, params: SamplingParams) -> Answered:
        """One request for the candidates of the indices that are wanted; it gives at least the first."""
        import openai

        settings = self.settings
        asked: dict[str, Any] = {
            "model": settings.model,
            "messages": prompt.messages,
            "n": len(wanted),
            "temperature": params.temperature,
            "top_p": params.top_p,
            settings.max_tokens_name: params.max_tokens,
        }
        if params.stop:
            asked["stop"] = list(params.stop)
        if settings.logprobs:
            asked["logprobs"] = True
        further = {"top_k": params.top_k, "min_p": params.min_p}
        extra = {name: value for name, value in further.items() if value}
        try:
            response = await client.chat.completions.with_raw_response.create(**asked, extra_body=extra or None)
            completion = response.parse()
        except openai.OpenAIError as fault:
            raise UserError(self._told(fault, prompt)) from fault
        except ValueError:  # a body that says it is JSON and is not
            completion = None
        choices = getattr(completion, "choices", None)
        if not choices or any(getattr(choice, "message", None) is None for choice in choices):
            raise UserError(
                f"endpoint.base_url={settings.base_url} answers, but not with chat completions; give the address "
                "below which /chat/completions lies, which mostly ends in /v1"
            )
        used = completion.usage
        return Answered(
            prompt.request_id,
            [self._candidate(prompt, index, choice) for index, choice in zip(wanted, choices, strict=False)],
            response.retries_taken,
            None if used is None else used.prompt_tokens,
            None if used is None else used.completion_tokens,
        )

    def _candidate(self, prompt: ChatPrompt, index: int, choice: Any) -> Candidate:
        tokens = (choice.logprobs.content or []) if choice.logprobs is not None else []
        return Candidate(
            request_id=prompt.request_id,
            index=index,
            token_ids=[],
            logprobs=[float(token.logprob) for token in tokens],
            sampling_logprobs=[],
            text=choice.message.content or "",
            finish_reason=FINISH_REASONS.get(choice.finish_reason, "abort"),
            policy_version=0,
        )

    def _told(self, fault: Exception, prompt: ChatPrompt) -> str:
        """What went wrong and what helps, in a sentence."""
        import openai

        settings = self.settings
        where = f"endpoint.base_url={settings.base_url}"
        if isinstance(fault, openai.APITimeoutError):
            return (
                f"{where}: no answer within {settings.timeout_s:g} s, tried {settings.max_retries + 1} times; raise "
                "endpoint.timeout_s or lower endpoint.concurrency"
            )
        if isinstance(fault, openai.APIConnectionError):
            return (
                f"{where} cannot be reached ({_root(fault)}), tried {settings.max_retries + 1} times; start the server "
                "or correct the address"
            )
        if not isinstance(fault, openai.APIStatusError):
            return f"{where}: {self._clean(fault)}"
        status, says = fault.status_code, self._clean(fault)
        if status in (401, 403):
            name = settings.api_key_env
            what = f"the key in {name}" if name is not None else "requests without a key (endpoint.api_key_env=null)"
            return f"{where} refuses {what} ({status}: {says}); check it"
        if status == 404:
            return (
                f"{where} does not know the model '{settings.model}', or is not the address below which "
                f"/chat/completions lies (404: {says}); correct endpoint.model or endpoint.base_url"
            )
        if status == 429:
            return (
                f"{where} still refuses requests as too many after {settings.max_retries} retries (429: {says}); lower "
                "endpoint.concurrency or raise endpoint.max_retries"
            )
        if status >= 500:
            return f"{where} failed {settings.max_retries + 1} times at row '{prompt.request_id}' ({status}: {says})"
        return (
            f"{where} refuses row '{prompt.request_id}' ({status}: {says}); endpoint.logprobs, "
            "endpoint.max_tokens_name and rollout.* say what is sent"
        )

    def _clean(self, fault: Exception) -> str:
        """The server's own words, short, and without the key, which some servers repeat."""
        body = getattr(fault, "body", None)
        words = body.get("message") if isinstance(body, dict) else None
        text = " ".join(str(words or fault).split())
        if self.settings.api_key_env is not None:
            text = text.replace(self._key, f"${self.settings.api_key_env}")
        return text if len(text) <= 300 else text[:297] + "..."


def _root(fault: BaseException) -> str:
    """The first cause, which names what the network did; the last is often just "Connection error."."""
    while (below := fault.__cause__ or fault.__context__) is not None:
        fault = below
    if isinstance(fault, OSError) and (fault.errno or 0) > 0:
        return os.strerror(fault.errno or 0)
    return str(getattr(fault, "strerror", None) or fault) or type(fault).__name__

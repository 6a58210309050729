"""The openai client against a real server: what is asked, what becomes of the answers, and what is said of faults."""

from __future__ import annotations

import socket
import threading
import time
from typing import Any

import pytest

from ember_ray.config.endpoint_section import EndpointSection
from ember_ray.config.errors import UserError
from ember_ray.engine.sampling_params import SamplingParams
from ember_ray.evaluation.endpoint import Answered, ChatPrompt, Endpoint
from tests.support.chat_server import Reply, completion, serving

KEY = "sk-secret-123"
PARAMS = SamplingParams(temperature=0.7, top_p=0.9, max_tokens=32)
PROMPTS = [ChatPrompt(name, [{"role": "user", "content": f"say {name}"}]) for name in ("a", "b", "c")]


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_KEY", KEY)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-somebody-else")


def settings(base_url: str, **further: Any) -> EndpointSection:
    return EndpointSection(**({"base_url": base_url, "model": "m", "api_key_env": "TEST_KEY"} | further))


def echo(request: dict[str, Any]) -> dict[str, Any]:
    """At most two choices a request, as servers with a limit do; each with the prompt's last word."""
    word = request["messages"][-1]["content"].split()[-1]
    return completion([word] * min(2, request["n"]), [-0.5, -0.25])


def test_answers_become_candidates_in_the_order_of_the_prompts() -> None:
    seen: list[Answered] = []
    with serving(echo) as server:
        endpoint = Endpoint(settings(server.base_url, input_price=2.0, output_price=10.0))
        outputs = endpoint.generate(PROMPTS, 3, PARAMS, lambda prompt, answered: seen.append(answered))
    assert [output.request_id for output in outputs] == ["a", "b", "c"]
    for output in outputs:
        assert [(one.index, one.text) for one in output.candidates] == [(i, output.request_id) for i in range(3)]
        assert output.candidates[0].logprobs == [-0.5, -0.25] and output.candidates[0].token_ids == []
        assert output.candidates[0].finish_reason == "stop"
    assert sorted(request["n"] for request in server.requests) == [1, 1, 1, 3, 3, 3] and len(seen) == 6
    first = server.requests[0]
    assert (first["model"], first["temperature"], first["top_p"], first["max_tokens"]) == ("m", 0.7, 0.9, 32)
    assert first["logprobs"] is True and not {"seed", "top_k", "min_p", "stop"} & first.keys()
    assert set(server.keys) == {f"Bearer {KEY}"}
    row = endpoint.usage.as_row(endpoint.settings)
    assert (row["requests"], row["retries"], row["input_tokens"], row["output_tokens"]) == (6, 0, 60, 90)
    assert row["dollars"] == pytest.approx((60 * 2 + 90 * 10) / 1e6)


def test_what_came_before_an_interruption_is_not_asked_again() -> None:
    kept: list[Answered] = []

    def keep(prompt: ChatPrompt, answered: Answered) -> None:
        kept.append(answered)
        if len(kept) == 4:  # one row is whole, another has two of its three candidates, or two have
            raise KeyboardInterrupt

    with serving(echo) as server:
        endpoint = Endpoint(settings(server.base_url, concurrency=1))
        with pytest.raises(KeyboardInterrupt):
            endpoint.generate(PROMPTS, 3, PARAMS, keep)
        before, endpoint = len(server.requests), Endpoint(settings(server.base_url, concurrency=1))
        outputs = endpoint.generate(PROMPTS, 3, PARAMS, earlier=kept)
    assert len(kept) == 4 and sum(request["n"] for request in server.requests[before:]) == 9 - sum(
        len(answered.candidates) for answered in kept
    )
    for output, prompt in zip(outputs, PROMPTS, strict=True):
        assert [(one.request_id, one.index, one.text) for one in output.candidates] == [
            (prompt.request_id, index, prompt.request_id) for index in range(3)
        ]
    assert (endpoint.usage.requests, endpoint.usage.input_tokens, endpoint.usage.output_tokens) == (6, 60, 90)


def test_too_many_requests_are_tried_again_after_the_wait_that_the_server_asks_for() -> None:
    refusals = iter([429, 503, 429])

    def busy(request: dict[str, Any]) -> dict[str, Any] | Reply:
        status = next(refusals, None)
        return echo(request) if status is None else (status, {"error": {"message": "busy"}}, {"retry-after-ms": "5"})

    with serving(busy) as server:
        endpoint = Endpoint(settings(server.base_url, concurrency=1))
        outputs = endpoint.generate(PROMPTS[:2], 2, PARAMS)
    assert [one.text for output in outputs for one in output.candidates] == ["a", "a", "b", "b"]
    assert (endpoint.usage.requests, endpoint.usage.retries, len(server.requests)) == (2, 3, 5)
    assert endpoint.usage.as_row(endpoint.settings)["dollars"] is None  # no price was given


def test_as_many_requests_are_in_flight_as_are_allowed() -> None:
    three = threading.Barrier(3)

    def together(request: dict[str, Any]) -> dict[str, Any]:
        three.wait(timeout=60)  # goes on only once three are here
        time.sleep(0.1)  # and gives a fourth the time to come
        return echo(request)

    with serving(together) as server:
        Endpoint(settings(server.base_url, concurrency=3)).generate(PROMPTS * 2, 1, PARAMS)
    assert server.most_in_flight == 3


def test_what_a_server_leaves_out_is_left_empty() -> None:
    def sparse(request: dict[str, Any]) -> dict[str, Any]:
        body = completion(["x", "y"])
        body["choices"][0]["message"]["content"] = None
        body["choices"][0]["finish_reason"], body["choices"][1]["finish_reason"] = "content_filter", "length"
        del body["usage"]
        return body

    with serving(sparse) as server:
        endpoint = Endpoint(settings(server.base_url, logprobs=False, input_price=1.0, output_price=1.0))
        params = SamplingParams(top_k=5, max_tokens=8, stop=("\n",))
        first, second = endpoint.generate(PROMPTS[:1], 2, params)[0].candidates
    assert (first.text, first.finish_reason, first.logprobs) == ("", "abort", [])
    assert (second.text, second.finish_reason) == ("y", "length")
    request = server.requests[0]
    assert request["top_k"] == 5 and request["stop"] == ["\n"] and "logprobs" not in request
    assert endpoint.usage.without_usage == 1 and endpoint.usage.as_row(endpoint.settings)["dollars"] is None


FAULTS: dict[str, tuple[Reply, str]] = {
    "model": ((404, {"error": {"message": "no such model"}}, {}), r"model 'm'.*404: no such model.*endpoint\.model"),
    "key": ((401, {"error": {"message": f"bad key {KEY}"}}, {}), r"key in TEST_KEY \(401: bad key \$TEST_KEY\)"),
    "request": ((400, {"error": {"message": "no logprobs"}}, {}), r"row 'a' \(400: no logprobs\).*endpoint\.logprobs"),
    "rate": ((429, {"error": {"message": "slow"}}, {"retry-after-ms": "1"}), r"1 retries \(429: slow\).*concurrency"),
    "crash": ((500, "oops", {"retry-after-ms": "1"}), r"failed 2 times at row 'a' \(500"),
    "page": ((200, "<html>hello</html>", {"Content-Type": "text/html"}), r"not with chat completions.*/v1"),
    "other": ((200, {"hello": 1}, {}), r"not with chat completions"),
    "broken": ((200, '{"choices": [', {}), r"not with chat completions"),
    "empty": ((200, {"choices": []}, {}), r"not with chat completions"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_told_in_a_sentence_without_the_key(name: str) -> None:
    reply, says = FAULTS[name]
    with serving(lambda request: reply) as server:
        endpoint = Endpoint(settings(server.base_url, max_retries=1, concurrency=1))
        with pytest.raises(UserError, match=says) as fault:
            endpoint.generate(PROMPTS, 1, PARAMS)
    text = str(fault.value)
    assert KEY not in text and "\n" not in text and server.base_url in text


def test_a_server_that_is_not_there_or_silent_is_told() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # bound and not listening: nobody else gets the port
        endpoint = Endpoint(settings(f"http://127.0.0.1:{free.getsockname()[1]}/v1", max_retries=0))
        with pytest.raises(UserError, match="cannot be reached .Connection refused."):
            endpoint.generate(PROMPTS, 1, PARAMS)
    ended = threading.Event()
    with serving(lambda request: (ended.wait(60), completion(["late"]))[1]) as server:
        endpoint = Endpoint(settings(server.base_url, timeout_s=0.2, max_retries=0))
        with pytest.raises(UserError, match="no answer within 0.2 s, tried 1 times"):
            endpoint.generate(PROMPTS[:1], 1, PARAMS)
        ended.set()


def test_no_key_is_told_before_anything_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TEST_KEY")
    with serving(echo) as server:
        with pytest.raises(UserError, match="TEST_KEY is not set.*endpoint.api_key_env=null"):
            Endpoint(settings(server.base_url))
        monkeypatch.setenv("TEST_KEY", "schlüssel")
        with pytest.raises(UserError, match="TEST_KEY holds is not a key"):
            Endpoint(settings(server.base_url))
        assert not server.requests
        Endpoint(settings(server.base_url, api_key_env=None)).generate(PROMPTS[:1], 1, PARAMS)
    assert server.keys == ["Bearer none"]  # and not what OPENAI_API_KEY holds


def test_half_an_endpoint_is_refused() -> None:
    with pytest.raises(ValueError, match="endpoint.base_url is set but endpoint.model is not"):
        EndpointSection(base_url="http://h/v1")
    with pytest.raises(ValueError, match="given together"):
        EndpointSection(input_price=1.0)
    with pytest.raises(ValueError):
        EndpointSection(base_url="http://user:word@h/v1", model="m")  # would be written into config.yaml

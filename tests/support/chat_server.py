"""A server that speaks the chat completions protocol, on a port of its own, with what a test lets it answer."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = tuple[int, Any, dict[str, str]]
"""Status, body (a str is sent as it is), further headers."""


@dataclass
class ChatServer:
    """``answer(request)`` gives the body of a completion, or a ``Reply``; ``requests`` and ``keys`` are what came."""

    answer: Callable[[dict[str, Any]], dict[str, Any] | Reply]
    base_url: str = ""
    requests: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    in_flight: int = 0
    most_in_flight: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


def completion(texts: list[str], logprobs: list[float] | None = None, prompt_tokens: int = 10) -> dict[str, Any]:
    """A body with one choice a text; ten output tokens each."""
    content = None if logprobs is None else {"content": [{"token": "t", "logprob": value} for value in logprobs]}
    choices = [
        {
            "index": index,
            "message": {"role": "assistant", "content": text},
            "finish_reason": "stop",
            "logprobs": content,
        }
        for index, text in enumerate(texts)
    ]
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": 10 * len(texts)}
    usage["total_tokens"] = sum(usage.values())
    return {"id": "c", "object": "chat.completion", "created": 0, "model": "m", "choices": choices, "usage": usage}


@contextmanager
def serving(answer: Callable[[dict[str, Any]], dict[str, Any] | Reply]) -> Iterator[ChatServer]:
    """The server, running in threads of this process until the block ends."""
    server = ChatServer(answer)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with server.lock:
                server.requests.append(request)
                server.keys.append(self.headers.get("Authorization"))
                server.in_flight += 1
                server.most_in_flight = max(server.most_in_flight, server.in_flight)
            made = server.answer(request)
            with server.lock:
                server.in_flight -= 1
            status, body, headers = made if isinstance(made, tuple) else (200, made, {})
            content = (body if isinstance(body, str) else json.dumps(body)).encode()
            try:
                self.send_response(status)
                for name, value in ({"Content-Type": "application/json"} | headers).items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)
            except OSError:  # the client has gone
                self.close_connection = True

        def log_message(self, *parts: object) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    server.base_url = f"http://127.0.0.1:{http.server_port}/v1"
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
        thread.join()

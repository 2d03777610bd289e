"""A small real HTTP server with OpenAI's chat interface, for tests: its answers are a function."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Body = dict[str, Any]
Answer = Callable[[Body], "tuple[int, object] | str"]
"""A reply's text, or a status and whatever is to be sent with it (a dict as JSON)."""


def completion(text: object, logprobs: object = None, finish: str = "stop") -> Body:
    """The body of an ordinary answer."""
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": finish, "logprobs": logprobs}
    return {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}


class FakeChatServer:
    """What it was asked, how many requests were under way at once, and where it listens."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.asked: list[Body] = []
        self.headers: list[dict[str, str]] = []
        self.most_at_once = 0
        self._at_once = 0
        self._lock = threading.Lock()
        self.url = ""

    def respond(self, body: Body, headers: dict[str, str]) -> tuple[int, object]:
        with self._lock:
            self.asked.append(body)
            self.headers.append(headers)
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            answer = self.answer(body)
        finally:
            with self._lock:
                self._at_once -= 1
        return (200, completion(answer)) if isinstance(answer, str) else answer


@contextmanager
def serve(answer: Answer, port: int = 0) -> Iterator[FakeChatServer]:
    """Listen on loopback until the block ends."""
    fake = FakeChatServer(answer)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._send(200, {"object": "list", "data": [{"id": "m", "object": "model"}]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            headers = {name.lower(): value for name, value in self.headers.items()}
            self._send(*fake.respond(body, headers))

        def _send(self, status: int, value: object) -> None:
            text = value if isinstance(value, str) else json.dumps(value)
            kind = "text/html" if isinstance(value, str) else "application/json"
            data = text.encode()
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(data)))
            if status == 429:
                self.send_header("Retry-After", "0.01")
            self.end_headers()
            with suppress(BrokenPipeError):  # the client's patience has ended
                self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", port), Handler) as http:
        thread = threading.Thread(target=http.serve_forever, args=(0.02,))
        thread.start()
        fake.url = f"http://127.0.0.1:{http.server_address[1]}/v1"
        try:
            yield fake
        finally:
            http.shutdown()
            thread.join()

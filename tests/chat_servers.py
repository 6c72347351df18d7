"""A chat server for tests, on a thread of its own, that answers well or badly as it is told."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from copy import copy
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Behave = Callable[["Call"], None]


class Call(BaseHTTPRequestHandler):
    """One request, and ways to answer it."""

    protocol_version = "HTTP/1.1"
    server: "ChatServer"
    body: dict[str, Any]
    number: int  # of the request, from 0

    def do_POST(self) -> None:
        """Record the request and let the server's behaviour answer it."""
        self.body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.number = len(self.server.calls)
            self.server.calls.append(copy(self))  # the connection's next request has the same handler
        with suppress(OSError):  # the client may have left
            self.server.behave(self)

    def send(
        self, body: bytes | str, status: int = 200, *, length: int | None = None, **headers: str
    ) -> None:
        """Send an answer, whose length may be a lie."""
        data = body.encode() if isinstance(body, str) else body
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data) if length is None else length))
        self.end_headers()
        self.wfile.write(data)

    def say(self, content: str | None, finish: str = "stop", **message: Any) -> None:
        """Answer with a reply of 2 tokens to a prompt of 10."""
        choice = {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": content}}
        choice["message"] |= message  # type: ignore[operator]
        usage = {"prompt_tokens": 10, "completion_tokens": 2, "total_tokens": 12}
        self.send(json.dumps({"id": "x", "object": "chat.completion", "choices": [choice], "usage": usage}))

    def refuse(self, status: int, message: str = "no", **error: Any) -> None:
        """Answer with an error in the form of OpenAI's."""
        self.send(json.dumps({"error": {"message": message, "type": "x", "param": None} | error}), status)

    def hang(self) -> None:
        """Answer nothing until the test is over."""
        self.server.over.wait(30)

    def drip(self) -> None:
        """Begin an answer and send a byte of it now and then, for ever."""
        self.send("{", length=1000)
        with suppress(OSError):
            while not self.server.over.is_set():
                self.wfile.write(b" ")
                time.sleep(0.02)

    def break_off(self) -> None:
        """Close the connection in the middle of an answer."""
        self.send('{"choices": [', length=1000)
        self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing."""


class ChatServer(ThreadingHTTPServer):
    """The server, with the calls that it has got."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, behave: Behave) -> None:
        super().__init__(("127.0.0.1", 0), Call)
        self.behave = behave
        self.calls: list[Call] = []
        self.lock = threading.Lock()
        self.over = threading.Event()

    @property
    def url(self) -> str:
        """Return the base URL for clients."""
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that leave."""


@contextmanager
def chat_server(behave: Behave) -> Iterator[ChatServer]:
    """Serve until the end of the block."""
    server = ChatServer(behave)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.over.set()
        server.shutdown()
        thread.join()
        server.server_close()

"""Servers that never end an answer, each behind a bare socket: the request ends, and the message says what happened."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator

import pytest

from aapa_lightning.errors import ConfigError
from aapa_lightning.remote import Remote

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"


class Endless:
    """Accepts connections and sends ``first``, then ``again`` every 10 ms for as long as somebody listens."""

    def __init__(self, first: bytes, again: bytes, *, reads: bool = True) -> None:
        self.first, self.again, self.reads = first, again, reads
        self.connections = 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.over = threading.Event()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            self.connections += 1
            threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        with connection:
            try:
                if self.reads:
                    connection.recv(65536)
                    connection.sendall(self.first)
                while not self.over.wait(0.01):
                    if self.reads:
                        connection.sendall(self.again)
            except OSError:
                return

    def close(self) -> None:
        self.over.set()
        self.listener.close()


@pytest.fixture
def endless() -> Iterator[Callable[..., Endless]]:
    servers: list[Endless] = []

    def start(*args: bytes, **kwargs: bool) -> Endless:
        servers.append(Endless(*args, **kwargs))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.mark.parametrize(
    ("first", "again"),
    [
        (HEAD + b"Content-Length: 100000000\r\n\r\n", b" "),
        (HEAD + b"\r\n", b" "),  # a body that ends with its connection
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
        (HEAD, b"X: y\r\n"),
        (b"H", b"T"),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    ],
)
def test_an_answer_that_never_ends(first, again, endless):
    server = endless(first, again)
    remote = Remote(server.url, read_timeout=0.3, retries=1, backoff=0.0)
    with pytest.raises(ConfigError, match="failed 2 times, the last time with"):
        remote.ask("/x", {}, "score")
    assert server.connections == 2


def test_a_server_that_does_not_read(endless):
    server = endless(b"", b"", reads=False)
    with pytest.raises(ConfigError, match="failed 1 times"):
        Remote(server.url, read_timeout=0.3, retries=0).ask("/x", "x" * 50_000_000, "score")


def test_an_answer_in_time_is_whole_however_it_is_sent():
    listener = socket.create_server(("127.0.0.1", 0))

    def answer() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(65536)
            for byte in b"HTTP/1.1 100 Continue\r\n\r\n" + HEAD + b"Content-Length: 2\r\n\r\n{}":
                connection.sendall(bytes([byte]))

    threading.Thread(target=answer, daemon=True).start()
    with listener:
        assert Remote(f"http://127.0.0.1:{listener.getsockname()[1]}").ask("/x", {}, "score") == b"{}"


def test_a_deadline_that_is_no_number_of_seconds():
    with pytest.raises(ConfigError, match=r"server\.read_timeout: .*inf"):
        Remote("http://127.0.0.1:1", read_timeout=float("inf"))

"""What a score server must not do to a run: print its key, fill its memory, or pass for a server that gave a score."""

from __future__ import annotations

import json
import socket
import threading

import pytest

from aapa_lightning import remote as module
from aapa_lightning.anchor.server import ScoreServer
from aapa_lightning.errors import ConfigError, DataError

KEY = "sk-do-not-print"


class RawServer:
    """Answers every connection with the same bytes and closes it; keeps the requests."""

    def __init__(self, content, status="200 OK", length=None):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        head = "" if length == 0 else f"Content-Length: {length or len(body)}\r\n"
        self.answer = f"HTTP/1.1 {status}\r\n{head}Connection: close\r\n\r\n".encode() + body
        self.requests = []
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self):
        while True:
            try:
                connection, _ = self.socket.accept()
            except OSError:
                return
            with connection:
                request = b""
                while not request.endswith(b"}"):  # a request is a JSON object
                    request += connection.recv(65536)
                self.requests.append(request.decode())
                connection.sendall(self.answer)


@pytest.fixture
def serve():
    servers = []

    def start(*arguments, **options):
        servers.append(RawServer(*arguments, **options))
        return servers[-1]

    yield start
    for server in servers:
        server.socket.close()


def ask(server, **options):
    return ScoreServer(server.url, "sglang_classify", retries=1, backoff=0.0, read_timeout=5.0, **options).scores(["a"], ["d:1"], "m")


@pytest.mark.parametrize("key", [f"{KEY}\n", f" {KEY}\r\n"])
def test_a_key_that_was_read_from_a_file(key, serve, monkeypatch):
    monkeypatch.setenv("THE_KEY", key)
    server = serve([{"embedding": [2.0]}])
    assert ask(server, api_key_env="THE_KEY") == [2.0]
    assert f"Authorization: Bearer {KEY}\r\n" in server.requests[0]


@pytest.mark.parametrize("key", ["", "\n", f"{KEY}\n{KEY}", f"{KEY}\u2026"])
def test_a_key_that_cannot_be_sent_is_not_printed(key, serve, monkeypatch):
    monkeypatch.setenv("THE_KEY", key)
    with pytest.raises(ConfigError, match="environment variable THE_KEY") as caught:
        ask(serve([{"embedding": [2.0]}]), api_key_env="THE_KEY")
    assert KEY not in str(caught.value)


@pytest.mark.parametrize(
    "url", [f"http://me:{KEY}@host:1", f"http://{KEY}@host", f"http://host:1/?token={KEY}", f"http://host:1/#{KEY}", f"ftp://{KEY}@host"]
)
def test_a_secret_in_the_address_is_refused_and_not_printed(url):
    with pytest.raises(ConfigError, match=r"server\.url.*api_key_env") as caught:
        ScoreServer(url)
    assert KEY not in str(caught.value)


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://host/x", "//host", "http://"])
def test_another_scheme_is_refused(url):
    with pytest.raises(ConfigError, match=r"server\.url"):
        ScoreServer(url)


@pytest.mark.parametrize("length", [None, 0])
def test_an_answer_that_would_fill_the_memory(length, serve, monkeypatch):
    monkeypatch.setattr(module, "_LONGEST_ANSWER", 1 << 20)
    server = serve(b" " * (1 << 20) + b'[{"embedding": [2.0]}]', length=length)
    with pytest.raises(ConfigError, match="answered with more than 1 MiB; lower batch_size"):
        ask(server)
    assert len(server.requests) == 1


@pytest.mark.parametrize("length", [None, 0])
def test_an_answer_of_any_legal_length(length, serve):
    assert ask(serve([{"embedding": [2.0]}], length=length)) == [2.0]


def test_an_answer_that_breaks_off_is_asked_for_again(serve):
    server = serve([{"embedding": [2.0]}], length=1000)
    with pytest.raises(ConfigError, match="failed 2 times, the last time with IncompleteRead"):
        ask(server)
    assert len(server.requests) == 2


@pytest.mark.parametrize("content", [b"[" * 100_000, [{"embedding": [1e39]}], [{"embedding": [-1e39]}]])
def test_an_answer_that_no_float32_can_hold(content, serve):
    with pytest.raises(DataError, match="d:1: expected"):
        ask(serve(content))


def test_a_redirection_is_not_followed(serve):
    server = serve(b"moved", status="302 Found\r\nLocation: file:///etc/passwd")
    with pytest.raises(ConfigError, match=r"refused to score d:1 \(status 302"):
        ask(server)
    assert len(server.requests) == 1

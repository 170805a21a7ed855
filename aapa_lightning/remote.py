"""JSON over HTTP: tried again where that can help, and never silent about what went wrong."""

from __future__ import annotations

import http.client
import json
import os
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar
from urllib.parse import urlsplit

from aapa_lightning.errors import POSITIVE, STEPS, WEIGHT, ConfigError, check_numbers

_LONGEST_WAIT = 30.0
#: Bytes of an answer.
_LONGEST_ANSWER = 1 << 28


def _is_url(url: str) -> bool:
    try:
        parts = urlsplit(url)
        plain = parts.username is None and not parts.query and not parts.fragment  # none of these would be sent
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0 and plain
    except ValueError:  # a port that is no number
        return False


def _without_login(url: str) -> str:
    """The address as a message may show it."""
    return re.sub("//.*@", "//...@", re.split("[?#]", url)[0])


@contextmanager
def _deadline(connected: socket.socket, seconds: float) -> Iterator[None]:
    """Give up on a connection after so many seconds, whatever comes over it: a socket's own timeout counts silence alone.

    Raises:
        TimeoutError: the time is up.
    """
    over = threading.Event()

    def end() -> None:
        over.set()
        with suppress(OSError):  # closed already
            socket.socket.shutdown(connected, socket.SHUT_RDWR)  # not TLS's own, which would wait for the other side

    connected.settimeout(seconds)
    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    except (OSError, ValueError, http.client.HTTPException) as error:
        if over.is_set():
            raise TimeoutError(f"no whole answer within {seconds:g} seconds") from error
        raise
    finally:
        timer.cancel()
    if over.is_set():  # an answer that ends with its connection looks whole
        raise TimeoutError(f"no whole answer within {seconds:g} seconds")


@dataclass(frozen=True)
class Remote:
    """A server, and how patiently it is asked.

    Connection errors, timeouts, 429 and 5xx are tried again, after ``backoff`` seconds that double each time (at most 30); any other status
    is an error at once. Proxies of the environment are not used.

    Args:
        url: ``http://host:port``.
        connect_timeout: seconds.
        read_timeout: seconds until a request is answered in full; a server that sends a byte now and then does not extend them.
        retries: tries after the first.
        backoff: seconds before the second try.
        api_key_env: environment variable that holds the bearer token.

    Raises:
        ConfigError: an option is illegal.
    """

    #: How errors name the option that holds it, and what they advise.
    option: ClassVar[str] = "server"
    check: ClassVar[str] = "check url"
    shorten: ClassVar[str] = "ask for less at a time"

    url: str
    _: KW_ONLY
    connect_timeout: float = 5.0
    read_timeout: float = 120.0
    retries: int = 5
    backoff: float = 0.5
    api_key_env: str | None = None

    def __post_init__(self) -> None:
        if not _is_url(self.url):
            raise ConfigError(
                f"{self.option}.url: expected http://host:port, found {_without_login(self.url)!r}; a token goes into api_key_env"
            )
        limits = {"connect_timeout": POSITIVE, "read_timeout": POSITIVE, "retries": STEPS, "backoff": WEIGHT}
        check_numbers({name: getattr(self, name) for name in limits}, limits, f"{self.option}.")

    def named(self) -> str:
        """The server, as messages call it."""
        return f"the server {self.url}"

    def ask(self, path: str, body: Any, task: str, stop: threading.Event | None = None, method: str = "POST") -> bytes:
        """Send a request until it is answered.

        Args:
            path: of the endpoint, ``/...``.
            body: becomes JSON; None sends none.
            task: what the request is for, after "to": ``score data.jsonl:3``.
            stop: ends the waiting between tries.
            method: of HTTP.

        Returns:
            The body of an answer of status 200.

        Raises:
            ConfigError: the server cannot be reached, goes on failing, refuses the request, or answers without end.
        """
        payload = None if body is None else json.dumps(body).encode()
        stop = stop or threading.Event()
        for attempt in range(self.retries + 1):
            if attempt and stop.wait(min(self.backoff * 2 ** (attempt - 1), _LONGEST_WAIT)):
                break
            try:
                status, content = self._send(method, path, payload)
            except (OSError, http.client.HTTPException) as error:
                problem = f"{type(error).__name__}: {error}"
                continue
            if status == http.client.OK:
                return content
            problem = f"status {status}: {content[:200].decode(errors='replace')}"
            if status != http.client.TOO_MANY_REQUESTS and status < http.client.INTERNAL_SERVER_ERROR:
                raise Refused(status, f"{self.named()} refused to {task} ({problem}); {self.check}")
        raise ConfigError(
            f"could not {task}: {self.named()} failed {attempt + 1} times, the last time with {problem}; "
            "is it running? See url, read_timeout and retries"
        )

    def _send(self, method: str, path: str, payload: bytes | None) -> tuple[int, bytes]:
        parts = urlsplit(self.url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(parts.hostname or "", parts.port, timeout=self.connect_timeout)
        headers = {"Content-Type": "application/json"}
        if self.api_key_env:
            headers["Authorization"] = f"Bearer {self._key(self.api_key_env)}"
        try:
            connection.connect()
            with _deadline(connection.sock, self.read_timeout):
                connection.request(method, parts.path.rstrip("/") + path, payload, headers)
                answer = connection.getresponse()
                content = answer.read(_LONGEST_ANSWER + 1)
            if len(content) > _LONGEST_ANSWER:
                raise ConfigError(f"{self.named()} answered with more than {_LONGEST_ANSWER >> 20} MiB; {self.shorten}")
            if answer.length:  # read with a limit does not mind that the rest is missing
                raise http.client.IncompleteRead(content, answer.length)
            return answer.status, content
        finally:
            connection.close()

    def _key(self, name: str) -> str:
        key = os.environ.get(name, "").strip()  # a secret that was read from a file ends in a newline
        if not key:
            raise ConfigError(f"{self.option}.api_key_env: expected the environment variable {name} to hold a key, but it is not set")
        if not (key.isascii() and key.isprintable()):  # http.client would print it
            raise ConfigError(
                f"{self.option}.api_key_env: expected printable ASCII in the environment variable {name}, found other characters"
            )
        return key


class Refused(ConfigError):
    """A status that another try would not change."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status

"""Scores over HTTP: a local server that works, lags, stumbles, lies or is not there."""

from __future__ import annotations

import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from aapa_lightning.anchor.load import load_discriminator
from aapa_lightning.anchor.polar import RewardModelDiscriminator
from aapa_lightning.anchor.server import ScoreServer
from aapa_lightning.data.tokenizer import train_tokenizer
from aapa_lightning.errors import ConfigError, DataError
from aapa_lightning.types import Record

FAST = {"backoff": 0.01, "retries": 3, "connect_timeout": 2.0, "read_timeout": 5.0}
TEXTS = [f"text {i}" for i in range(23)]
WHERE = [f"data.jsonl:{i}" for i in range(23)]
EXPECTED = [-1.5 * i for i in range(23)]


def number(text):
    return -1.5 * int(text.split()[-1])


ANSWERS = {
    "vllm_pooling": lambda body: {"data": [{"index": i, "data": [[9.0], [number(t)]]} for i, t in enumerate(body["input"])]},
    "vllm_classify": lambda body: {
        "data": [{"index": i, "label": "x", "probs": [number(t)], "num_classes": 1} for i, t in enumerate(body["input"])]
    },
    "sglang_classify": lambda body: [{"embedding": [number(t)], "meta_info": {}} for t in body["text"]],
}
PATHS = {"vllm_pooling": "/pooling", "vllm_classify": "/classify", "sglang_classify": "/classify"}


class Server:
    """``behave(body) -> (status, answer)``; an answer of bytes is sent as it stands."""

    def __init__(self, behave):
        self.requests, self.headers, self.busy, self.busiest = [], [], 0, 0
        lock, outer = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    outer.requests.append((self.path, body))
                    outer.headers.append(dict(self.headers))
                    outer.busy += 1
                    outer.busiest = max(outer.busiest, outer.busy)
                try:
                    status, answer = behave(body)
                finally:
                    with lock:
                        outer.busy -= 1
                content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.handle_error = lambda *args: None  # clients that hang up are part of the tests
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()


@pytest.fixture
def serve():
    servers = []

    def start(behave):
        servers.append(Server(behave))
        return servers[-1]

    yield start
    for server in servers:
        server.http.shutdown()
        server.http.server_close()


def ask(server, api="vllm_pooling", texts=TEXTS, where=WHERE, **options):
    return ScoreServer(server.url, api, **{**FAST, **options}).scores(texts, where, "org/model")


@pytest.mark.parametrize("api", ANSWERS)
def test_a_server_that_works(api, serve, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")  # nobody listens there
    server = serve(lambda body: (200, ANSWERS[api](body)))
    assert ask(server, api, batch_size=5, concurrency=3) == EXPECTED
    assert {path for path, _ in server.requests} == {PATHS[api]}
    assert {body["model"] for _, body in server.requests} == {"org/model"}
    assert {body.get("use_activation") for _, body in server.requests} == ({None} if api == "sglang_classify" else {False})
    assert len(server.requests) == 5


def test_what_a_request_may_say_more(serve, monkeypatch):
    server = serve(lambda body: (200, ANSWERS["vllm_pooling"](body)))
    monkeypatch.setenv("THE_KEY", "secret")
    options = {"model": "served", "body": {"use_activation": None, "priority": 1}, "api_key_env": "THE_KEY"}
    assert ask(server, **options) == EXPECTED
    assert server.requests[0][1] == {"model": "served", "input": TEXTS, "use_activation": None, "priority": 1}
    assert server.headers[0]["Authorization"] == "Bearer secret"
    assert ScoreServer(server.url + "/base/", **FAST).scores([], [], "m") == []
    ScoreServer(server.url + "/base/", **FAST).scores(["a 1"], ["x"], "m")
    assert server.requests[-1][0] == "/base/pooling"
    monkeypatch.delenv("THE_KEY")
    with pytest.raises(ConfigError, match="environment variable THE_KEY"):
        ask(server, **options)


def test_a_bare_number_of_lmdeploy(serve):
    server = serve(lambda body: (200, {"data": [{"data": number(text)} for text in body["input"]]}))
    assert ask(server) == EXPECTED


@pytest.mark.parametrize("api", ["vllm_pooling", "vllm_classify"])
def test_an_answer_in_another_order(api, serve):
    def shuffled(body):
        answer = ANSWERS[api](body)
        return 200, {"data": answer["data"][::-1]}

    assert ask(serve(shuffled), api, batch_size=7) == EXPECTED


def test_batches_that_come_back_in_another_order(serve):
    def later_first(body):
        time.sleep(0.2 if "text 0" in body["input"] else 0.0)
        return 200, ANSWERS["vllm_pooling"](body)

    assert ask(serve(later_first), batch_size=4, concurrency=6) == EXPECTED


def test_no_more_requests_at_a_time_than_allowed(serve):
    def slow(body):
        time.sleep(0.03)
        return 200, ANSWERS["vllm_pooling"](body)

    server = serve(slow)
    assert ask(server, batch_size=1, concurrency=3) == EXPECTED
    assert 2 <= server.busiest <= 3


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_server_that_stumbles_twice(status, serve):
    tries = iter([(status, b"busy"), (status, b"busy")])
    server = serve(lambda body: next(tries, (200, ANSWERS["vllm_pooling"](body))))
    assert ask(server) == EXPECTED
    assert len(server.requests) == 3


def test_a_server_that_hangs_up_twice(serve):
    def hang_up(body):
        if len(server.requests) <= 2:
            raise ConnectionAbortedError  # closes the connection without an answer
        return 200, ANSWERS["vllm_pooling"](body)

    server = serve(hang_up)
    assert ask(server) == EXPECTED
    assert len(server.requests) == 3


def test_a_server_that_fails_for_good(serve):
    server = serve(lambda body: (500, b"out of memory"))
    with pytest.raises(ConfigError, match=r"could not score data.jsonl:0 and 22 more: .* failed 4 times, .* status 500: out of memory"):
        ask(server)
    assert len(server.requests) == 4


@pytest.mark.parametrize("status", [400, 401, 404, 301])
def test_a_server_that_refuses_is_not_asked_again(status, serve):
    server = serve(lambda body: (status, b"no such model"))
    with pytest.raises(ConfigError, match=rf"refused to score data.jsonl:0 and 22 more \(status {status}: no such model\)"):
        ask(server)
    assert len(server.requests) == 1


def test_a_slow_server(serve):
    release = threading.Event()

    def stuck(body):
        release.wait(10)
        return 200, ANSWERS["vllm_pooling"](body)

    server, begin = serve(stuck), time.monotonic()
    with pytest.raises(ConfigError, match=r"failed 2 times, the last time with TimeoutError"):
        ask(server, read_timeout=0.2, retries=1)
    release.set()
    assert 0.4 <= time.monotonic() - begin < 8
    assert len(server.requests) == 2


def test_a_dead_server():
    with socket.socket() as taken:  # bound, and nobody listens
        taken.bind(("127.0.0.1", 0))
        server = ScoreServer(f"http://127.0.0.1:{taken.getsockname()[1]}", **FAST)
        with pytest.raises(
            ConfigError, match=r"could not score data.jsonl:0: .* failed 4 times, the last time with ConnectionRefusedError"
        ):
            server.scores(["text"], WHERE[:1], "m")


def test_one_bad_batch_stops_the_others(serve):
    def bad(body):
        if "text 0" in body["input"]:
            return 400, b"too long"
        time.sleep(0.02)
        return 500, b"broken"

    server, begin = serve(bad), time.monotonic()
    with pytest.raises(ConfigError, match="too long"):
        ask(server, batch_size=1, concurrency=2, retries=6, backoff=0.2)
    assert time.monotonic() - begin < 6  # all the tries of one batch take 12 s


LIES = {
    "not json": ("vllm_pooling", b"<html>", "expected the answer of vllm_pooling"),
    "another api": ("vllm_pooling", [{"embedding": [1.0]}], "is it another api"),
    "null": ("sglang_classify", None, "expected the answer of sglang_classify"),
    "too few": ("vllm_pooling", {"data": [{"index": 0, "data": [1.0]}]}, "expected 3 scores .* found 1"),
    "too many": ("sglang_classify", [{"embedding": [1.0]}] * 4, "expected 3 scores .* found 4"),
    "an index twice": ("vllm_classify", {"data": [{"index": i, "probs": [1.5]} for i in (0, 1, 1)]}, r"indices \[0.0, 1.0\]"),
    "nan": ("sglang_classify", [{"embedding": [v]} for v in (1, float("nan"), 2)], "data.jsonl:1: expected one finite score .* found .nan"),
    "infinite": ("sglang_classify", b'[{"embedding":[1]},{"embedding":[1]},{"embedding":[1e999]}]', "data.jsonl:2: .* found .+inf"),
    "endless": (
        "sglang_classify",
        b'[{"embedding":[1]},{"embedding":[1]},{"embedding":[%s]}]' % (b"9" * 400),
        "data.jsonl:2: .* found .+inf",
    ),
    "missing": ("sglang_classify", [{"embedding": [v]} for v in (1.0, 2.0, None)], "data.jsonl:2: .* found .+None"),
    "a word": ("sglang_classify", [{"embedding": [v]} for v in ("1.0", 2.0, 3.0)], "data.jsonl:0: .* found .+1.0"),
    "true": ("sglang_classify", [{"embedding": [v]} for v in (1.0, True, 3.0)], "data.jsonl:1: .* found .+True"),
    "two classes": ("vllm_classify", {"data": [{"index": i, "probs": [0.4, 0.6]} for i in range(3)]}, "with one output"),
    "an embedding": ("vllm_pooling", {"data": [{"index": i, "data": [[0.4, 0.6]]} for i in range(3)]}, "with one output"),
    "no tokens": ("vllm_pooling", {"data": [{"index": i, "data": []} for i in range(3)]}, r"data.jsonl:0: .* \[\]"),
    "a softmax of one": ("vllm_classify", {"data": [{"index": i, "probs": [1.0]} for i in range(3)]}, "exactly 1.0 for all of 3"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_server_that_lies(lie, serve):
    api, answer, message = LIES[lie]
    server = serve(lambda body: (200, answer))
    with pytest.raises(DataError, match=message) as caught:
        ask(server, api, TEXTS[:3], WHERE[:3])
    assert str(caught.value).startswith("data.jsonl:")
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "localhost:8000"}, "server.url: expected http://host:port"),
        ({"url": "http://host:port"}, "server.url"),
        ({"api": "tgi"}, "server.api: expected one of vllm_pooling"),
        ({"batch_size": 0}, "server.batch_size"),
        ({"read_timeout": 0}, "server.read_timeout"),
        ({"retries": -1}, "retries"),
    ],
)
def test_illegal_options(options, message):
    with pytest.raises(ConfigError, match=message):
        ScoreServer(**{"url": "http://localhost:8000", **options})


def test_a_discriminator_behind_a_server(serve, tmp_path):
    """The tokenizer is here, the weights are there: scores are the lengths of the texts."""
    tokenizer = train_tokenizer([], vocab_size=259)
    tokenizer.add_tokens(["<|reward|>", "[UNUSED_TOKEN_130]"], special_tokens=True)
    tokenizer.save_pretrained(tmp_path / "m")
    server = serve(lambda body: (200, {"data": [{"index": i, "data": [[len(t)]]} for i, t in enumerate(body["input"])]}))
    path = str(tmp_path / "m")

    def judge_at(url, **options):
        return RewardModelDiscriminator(path, server=ScoreServer(url, **{**FAST, **options}), subtract_self=True)

    judge = judge_at(server.url)
    rows = [Record("Say it.", experts=(text,), source=f"data.jsonl:{i}") for i, text in enumerate(["one", "three", "one"])]
    assert judge.to("cpu").raw(["<think>x</think>seven", "go", "seven"], rows).tolist() == [2.0, -3.0, 2.0]
    assert judge.raw([], []).shape == (0,)
    ((_, body),) = server.requests
    assert body["model"] == path
    assert body["input"] == [
        "Say it.\none<|reward|>Say it.\nseven[UNUSED_TOKEN_130]",
        "Say it.\none<|reward|>Say it.\none[UNUSED_TOKEN_130]",
        "Say it.\nthree<|reward|>Say it.\ngo[UNUSED_TOKEN_130]",
        "Say it.\nthree<|reward|>Say it.\nthree[UNUSED_TOKEN_130]",
    ]
    # neither address nor patience changes a score
    assert judge_at("http://b:2", retries=9, batch_size=1, concurrency=2).fingerprint() == judge.fingerprint()
    others = [judge_at("http://b:2", **change).fingerprint() for change in ({"model": "x"}, {"api": "vllm_classify"}, {"body": {"a": 1}})]
    assert len({judge.fingerprint(), *others}) == 4
    judge.save(tmp_path / "judge")
    moved = load_discriminator(tmp_path / "judge", encoder="http://c:3")
    assert (moved.server.url, moved.fingerprint()) == ("http://c:3", judge.fingerprint())

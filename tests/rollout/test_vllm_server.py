"""Rollouts over HTTP: a server that works, stumbles, lies, forgets or dies."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from aapa_lightning.errors import AapaError, ConfigError, DataError
from aapa_lightning.logprobs import response_logprobs
from aapa_lightning.rollout.base import SamplingParams
from aapa_lightning.rollout.transformers_engine import TransformersEngine
from aapa_lightning.rollout.vllm_server import VLLMServerEngine

PARAMS = SamplingParams(max_new_tokens=8, temperature=0.7)
FAST = {"backoff": 0.01, "retries": 2, "connect_timeout": 2.0, "read_timeout": 20.0, "dtype": "float32"}


@pytest.fixture
def model(tiny_model_dir):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_model_dir)


@pytest.fixture
def requests(vllm_kit, tiny_tokenizer):
    return vllm_kit.make_requests(tiny_tokenizer)


@pytest.fixture
def eos_ids(tiny_tokenizer):
    return [tiny_tokenizer.eos_token_id, *range(100, 160)]  # lengths differ


@pytest.fixture
def connect(model, tiny_tokenizer, eos_ids, tmp_path):
    def engine(server, **options):
        return VLLMServerEngine(model, tiny_tokenizer, eos_ids, url=server.url, **FAST | {"folder": str(tmp_path / "w")} | options)

    return engine


def move(model):
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))


def trainer_logprobs(model, rollouts, temperature):
    inputs = rollouts.prompt_ids, rollouts.prompt_mask, rollouts.response_ids, rollouts.response_mask
    with torch.no_grad():
        return response_logprobs(model, *inputs, temperature)[0]


@pytest.mark.parametrize("params", [PARAMS, SamplingParams(8, 1.3, stop=("a", "e")), SamplingParams(8, 0.0)])
def test_rollouts_hold_together_and_their_logprobs_are_the_trainers(connect, vllm_server, model, requests, params, eos_ids):
    move(model)
    engine = connect(vllm_server())
    engine.sync(4)
    rollouts = engine.generate(requests, params, seed=1, window=2)
    assert rollouts.group_ids.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert [record.prompt for record in rollouts.records[::2]] == [request.record.prompt for request in requests]
    for i, request in enumerate(requests):
        for row in (2 * i, 2 * i + 1):
            assert rollouts.prompt_ids[row][rollouts.prompt_mask[row]].tolist() == list(request.prompt_ids)
    torch.testing.assert_close(rollouts.engine_logprobs, trainer_logprobs(model, rollouts, params.temperature or 1.0), atol=1e-4, rtol=1e-4)
    last = rollouts.response_ids.gather(1, rollouts.lengths[:, None] - 1).squeeze(1)
    ended = torch.isin(last, torch.tensor(eos_ids)) | torch.tensor([any(stop in text for stop in params.stop) for text in rollouts.texts])
    assert torch.equal(rollouts.truncated, ~ended)
    assert len(set(rollouts.lengths.tolist())) > 1


def test_greedy_is_what_the_embedded_engine_draws(connect, vllm_server, model, tiny_tokenizer, eos_ids, requests):
    move(model)
    engine = connect(vllm_server())
    engine.sync(0)
    greedy = replace(PARAMS, temperature=0.0)
    theirs = engine.generate(requests, greedy, seed=0, window=0)
    ours = TransformersEngine(model, tiny_tokenizer, eos_ids).generate(requests, greedy, seed=0, window=0)
    for name in ("response_ids", "response_mask", "truncated", "group_ids", "token_ends"):
        assert torch.equal(getattr(theirs, name), getattr(ours, name)), name
    assert theirs.texts == ours.texts
    torch.testing.assert_close(theirs.engine_logprobs, ours.engine_logprobs, atol=1e-4, rtol=1e-4)


def test_rows_are_seeded_whatever_they_are_asked_with(connect, vllm_server, requests):
    engine = connect(vllm_server())
    engine.sync(0)
    draw = partial(engine.generate, params=PARAMS, seed=1)
    both = draw(requests, window=2).texts
    assert draw(requests, window=2).texts == both
    assert draw(requests[3:], window=2).texts == both[6:]
    assert draw(requests, window=3).texts != both
    assert draw([], window=2).texts == []


def test_weights_are_given_once_a_step_in_order(connect, vllm_server, model, requests, tmp_path):
    server = vllm_server()
    engine = connect(server)
    engine.sync(5)
    expected = ["/v1/models", "/server_info"]
    push = ["/pause", "/collective_rpc", "/reset_prefix_cache", "/update_weight_version", "/resume", "/weight_info"]
    assert server.paths() == expected + push
    engine.sync(5)
    assert server.paths() == expected + push
    move(model)
    engine.sync(6)
    assert server.paths() == expected + push + push
    assert [Path(path).parent for path, *_ in server.loaded] == [tmp_path / "w"] * 2
    assert [path.endswith(f"step-{step}") for (path, *_), step in zip(server.loaded, (5, 6), strict=True)] == [True, True]
    assert all(torch.equal(server.loaded[1][1][name], value) for name, value in model.named_parameters())
    assert [missing for *_, missing in server.loaded] == [["lm_head.weight"]] * 2  # tied
    assert not list((tmp_path / "w").iterdir())  # what is loaded is removed
    engine.close()
    engine.sync(6)  # a run after the run: the weights may have been loaded from a checkpoint
    assert len(server.loaded) == 3


def test_a_folder_that_the_server_sees_elsewhere(connect, vllm_server, tmp_path):
    (tmp_path / "mount").symlink_to(tmp_path / "w")
    server = vllm_server()
    connect(server, folder_on_server=str(tmp_path / "mount")).sync(1)
    assert Path(server.loaded[0][0]).parent == tmp_path / "mount"
    assert server.loaded[0][1]


@pytest.mark.parametrize("path", ["/v1/completions", "/collective_rpc", "/weight_info", "/v1/models"])
def test_a_server_that_stumbles_is_asked_again(path, connect, vllm_server, requests):
    calm = connect(vllm_server())
    calm.sync(0)
    server = vllm_server()
    server.failures[path] = [500, 503]
    engine = connect(server)
    engine.sync(0)
    assert engine.generate(requests, PARAMS, seed=0, window=0).texts == calm.generate(requests, PARAMS, seed=0, window=0).texts


def test_a_server_that_dies_ends_the_run_with_advice(connect, vllm_server, requests):
    server = vllm_server()
    engine = connect(server)
    engine.sync(0)
    server.failures["/v1/completions"] = [500] * 100
    with pytest.raises(
        ConfigError, match=r"could not respond to p\.jsonl:\d: the server http.* failed 3 times, the last time with status 500"
    ):
        engine.generate(requests, PARAMS, seed=0, window=0)
    server.die()
    for act in (partial(engine.generate, requests, PARAMS, seed=0, window=0), partial(engine.sync, 1)):
        with pytest.raises(ConfigError, match=r"failed 3 times, .*ConnectionRefusedError.*is it running\?"):
            act()


def test_a_push_that_fails_leaves_the_server_paused_and_says_where(connect, vllm_server, requests, tmp_path):
    server = vllm_server()
    engine = connect(server)
    engine.sync(6)
    server.failures["/collective_rpc"] = [500] * 3
    with pytest.raises(ConfigError, match=r"could not load the weights in .*step-7 \(does it see that folder\?\)"):
        engine.sync(7)
    assert server.paused
    assert not list((tmp_path / "w").iterdir())
    with pytest.raises(RuntimeError, match="sync was not called"):
        engine.generate(requests, PARAMS, seed=0, window=0)
    engine.sync(7)
    assert not server.paused
    assert len(engine.generate(requests, PARAMS, seed=0, window=0)) == 10


def test_a_stale_server_is_found(connect, vllm_server, requests):
    server = vllm_server()
    engine = connect(server)
    engine.sync(3)
    server.version = "default"  # it was restarted
    with pytest.raises(ConfigError, match=r"holds weights of version 'default', expected '\w{8}-step-3'"):
        engine.generate(requests, PARAMS, seed=0, window=0)
    connect(server).sync(3)  # another run has the same step
    with pytest.raises(ConfigError, match=r"version '\w{8}-step-3', expected '\w{8}-step-3'"):
        engine.generate(requests, PARAMS, seed=0, window=0)


def test_weights_that_change_while_it_generates_are_found(connect, vllm_server, requests):
    server = vllm_server()
    engine = connect(server)
    engine.sync(3)
    mine = server.version

    def swapped(answer):
        server.version = "theirs"
        for choice in answer["choices"]:
            choice["weight_versions"] = None  # a server before 0.33 does not say
        return answer

    server.tamper["/v1/completions"] = swapped
    with pytest.raises(ConfigError, match="holds weights of version 'theirs'"):
        engine.generate(requests, PARAMS, seed=0, window=0)
    server.version, server.tamper = mine, {"/v1/completions": lambda answer: answer | {"choices": [
        choice | {"weight_versions": [{"version": "theirs", "start": 0, "end": 1}]} for choice in answer["choices"]
    ]}}  # fmt: skip
    with pytest.raises(DataError, match=r"drawn by weights of version \['theirs'\]"):
        engine.generate(requests, PARAMS, seed=0, window=0)


@pytest.mark.parametrize(
    ("path", "answer", "message"),
    [
        ("/v1/completions", b"{", "JSONDecodeError"),
        ("/v1/models", {"data": []}, "expected the answer of /v1/models.*IndexError"),
        ("/v1/models", {"data": [{"id": "m", "max_model_len": "long"}]}, "expected the answer of /v1/models"),
        ("/server_info", [], "expected the answer of /server_info"),
        ("/weight_info", {"version": 1}, "expected the answer of /weight_info.*KeyError"),
    ],
)
def test_malformed_answers_are_named(path, answer, message, connect, vllm_server, requests):
    server = vllm_server()
    server.tamper[path] = lambda _: answer
    engine = connect(server)

    def use():
        engine.sync(0)
        engine.generate(requests, PARAMS, seed=0, window=0)

    with pytest.raises(AapaError, match=message):
        use()


@pytest.mark.parametrize(
    ("tamper", "message"),
    [
        ({"/reset_prefix_cache": lambda _: {"success": False}}, "could not reset its prefix cache"),
        ({"/weight_info": lambda _: {"weight_version": "other"}}, "serves weights of version 'other' after loading"),
    ],
)
def test_a_push_that_did_not_take_is_found(tamper, message, connect, vllm_server):
    server = vllm_server()
    server.tamper = tamper
    with pytest.raises(ConfigError, match=message):
        connect(server).sync(0)


def test_a_server_without_the_endpoints_or_the_logprobs_is_refused(connect, vllm_server):
    with pytest.raises(ConfigError, match="VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --logprobs-mode processed_logprobs"):
        connect(vllm_server(dev=False)).sync(0)
    with pytest.raises(ConfigError, match="log-probs before the temperature"):
        connect(vllm_server(mode="raw_logprobs")).sync(0)


def test_a_context_that_is_too_short_is_refused_before_anything_is_drawn(connect, vllm_server, requests):
    server = vllm_server(context=20)
    engine = connect(server)
    engine.sync(0)
    with pytest.raises(ConfigError, match=r"holds 20 tokens, but a prompt of \d+ and sampling.max_new_tokens of 8.*--max-model-len"):
        engine.generate(requests, PARAMS, seed=0, window=0)
    assert "/v1/completions" not in server.paths()


def test_a_server_that_holds_the_weights_already(connect, vllm_server, requests):
    server = vllm_server(dev=False)
    engine = connect(server, folder=None)
    with pytest.warns(UserWarning, match="does not show its settings"):
        engine.sync(0)
    assert len(engine.generate(requests, PARAMS, seed=0, window=0)) == 10
    assert set(server.paths()) == {"/v1/models", "/server_info", "/v1/completions"}
    with pytest.raises(ConfigError, match=r"engine\.folder: expected a folder .* weights of step 1, found none"):
        engine.sync(1)
    with pytest.raises(ConfigError, match=r"engine\.folder: expected a folder .* weights of every step, found none"):
        engine.check_training()
    connect(server).check_training()


def test_weights_that_are_exchanged_within_a_step(connect, vllm_server, model, requests):
    server = vllm_server()
    engine = connect(server)
    engine.sync(3)
    move(model)  # as weight averaging does for a validation
    engine.forget()
    engine.sync(3)
    engine.sync(3)
    assert len(server.loaded) == 2
    averaged = dict(server.loaded[1][1])
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(averaged[name], parameter.detach(), rtol=0, atol=0)


def test_a_run_that_ends_sends_no_more(connect, vllm_server, requests):
    server = vllm_server()
    engine = connect(server, concurrency=1)
    engine.sync(0)
    server.tamper["/v1/completions"] = lambda answer: (engine.close(), answer)[1]
    with pytest.raises(ConfigError, match="is not asked any more: the run ends"):
        engine.generate(requests, PARAMS, seed=0, window=0)
    assert server.paths().count("/v1/completions") == 1
    del server.tamper["/v1/completions"]
    engine.sync(0)
    assert len(engine.generate(requests, PARAMS, seed=0, window=0)) == 10


def test_a_folder_that_cannot_be_written(connect, vllm_server, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"engine\.folder: cannot write .*(NotADirectory|FileExists)Error"):
        connect(vllm_server(), folder=str(tmp_path / "file")).sync(0)


def test_weights_of_ones_own(connect, vllm_server, model):
    server = vllm_server()
    connect(server, weights=lambda policy: [("model.norm.weight", policy.model.norm.weight * 2)], dtype="bfloat16").sync(0)
    (_, state, _) = server.loaded[0]
    assert list(state) == ["model.norm.weight"]
    assert torch.equal(state["model.norm.weight"], (model.model.norm.weight * 2).bfloat16())


def test_options_that_are_illegal(connect, vllm_server):
    server = vllm_server()
    with pytest.raises(ConfigError, match=r"engine\.concurrency"):
        connect(server, concurrency=0)
    with pytest.raises(ConfigError, match=r"engine\.url: expected http://host:port"):
        connect(type("S", (), {"url": "localhost:8000"}))

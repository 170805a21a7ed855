"""vLLM in the training process: the order of calls and what is read, against a module that behaves as vLLM's interface says."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from aapa_lightning.errors import ConfigError, DataError, MissingDependencyError
from aapa_lightning.rollout.base import SamplingParams
from aapa_lightning.rollout.transformers_engine import TransformersEngine
from aapa_lightning.rollout.vllm_colocated import VLLMEngine

PARAMS = SamplingParams(max_new_tokens=8, temperature=0.7)
LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
EVERYTHING = {"weights", "kv_cache"}


@dataclass
class FakeSampling:
    """The arguments of vLLM's ``SamplingParams`` that are used."""

    n: int
    seed: int
    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    stop: list
    stop_token_ids: list
    ignore_eos: bool
    skip_special_tokens: bool
    logprobs: int
    detokenize: bool


@pytest.fixture
def vllm(vllm_kit, tiny_tokenizer, monkeypatch):
    """A module ``vllm`` whose one LLM samples with the weights that it was given; ``calls`` is what happened to it."""
    module = ModuleType("vllm")
    module.calls, module.tamper, module.llms = [], lambda outputs: outputs, []

    class LLM:
        def __init__(self, *, model, **options):
            from transformers import AutoConfig, AutoModelForCausalLM

            config = AutoConfig.from_pretrained(model)
            assert config.architectures == ["Qwen3ForCausalLM"]
            assert (Path(model) / "tokenizer.json").exists()
            self.sampler = object.__new__(vllm_kit.FakeVLLM)
            self.sampler.model, self.sampler.tokenizer, self.sampler.version = AutoModelForCausalLM.from_config(config), tiny_tokenizer, "v"
            self.resident, self.options = set(EVERYTHING), options
            self.environment = {name: os.environ.get(name) for name in LAUNCHER}
            self.llm_engine = SimpleNamespace(engine_core=SimpleNamespace(shutdown=lambda: module.calls.append(("shutdown",))))
            module.calls.append(("LLM",))
            module.llms.append(self)

        def sleep(self, level):
            assert self.resident == EVERYTHING
            self.resident = set()
            if level == 2:
                for parameter in self.sampler.model.parameters():
                    parameter.data.fill_(float("nan"))
            module.calls.append(("sleep", level))

        def wake_up(self, tags):
            assert not self.resident & set(tags)
            self.resident |= set(tags)
            module.calls.append(("wake_up", *tags))

        def collective_rpc(self, method, kwargs):
            assert "weights" in self.resident
            state = dict(kwargs["weights_iterator"])
            assert all(value.dtype == torch.float32 for value in state.values())
            missing, unexpected = self.sampler.model.load_state_dict(state, strict=False)
            assert (missing, unexpected) == (["lm_head.weight"], [])
            module.calls.append((method,))

        def reset_prefix_cache(self):
            module.calls.append(("reset_prefix_cache",))

        @torch.no_grad()
        def generate(self, prompts, sampling, use_tqdm):
            assert self.resident == EVERYTHING
            assert use_tqdm is False
            module.calls.append(("generate", len(prompts)))
            return module.tamper([self.respond(prompt["prompt_token_ids"], one) for prompt, one in zip(prompts, sampling, strict=True)])

        def respond(self, prompt, sampling):
            body = vars(sampling) | {"prompt": prompt, "return_weight_versions": False}
            assert sampling.detokenize == bool(sampling.stop)
            rows = [self.sampler.sample(body, i) for i in range(sampling.n)]
            outputs = [
                SimpleNamespace(
                    index=row["index"],
                    token_ids=tuple(row["token_ids"]),
                    logprobs=[
                        {token: SimpleNamespace(logprob=value)}
                        for token, value in zip(row["token_ids"], row["logprobs"]["token_logprobs"], strict=True)
                    ],
                    finish_reason=row["finish_reason"],
                )
                for row in rows
            ]
            return SimpleNamespace(prompt_token_ids=prompt, outputs=outputs)

    module.LLM, module.SamplingParams = LLM, FakeSampling
    monkeypatch.setitem(sys.modules, "vllm", module)
    return module


@pytest.fixture
def model(tiny_model_dir):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_model_dir)


@pytest.fixture
def requests(vllm_kit, tiny_tokenizer):
    return vllm_kit.make_requests(tiny_tokenizer)


@pytest.fixture
def make(model, tiny_tokenizer):
    return lambda **options: VLLMEngine(model, tiny_tokenizer, [tiny_tokenizer.eos_token_id, *range(100, 160)], dtype="float32", **options)


START, PUSH = [("LLM",)], [("reload_weights",), ("reset_prefix_cache",)]
DRAW = [("generate", 5)]


@pytest.mark.parametrize("level", [0, 1, 2])
def test_calls_come_in_order(level, make, vllm, requests):
    asleep = [("sleep", level)] if level else []
    weights, cache = ([("wake_up", tag)] if level else [] for tag in ("weights", "kv_cache"))
    both = [("wake_up", "weights", "kv_cache")] if level else []
    engine = make(sleep_level=level)
    assert vllm.calls == []
    for step in (3, 4):
        vllm.calls.clear()
        engine.sync(step)
        assert vllm.calls == (START + asleep if step == 3 else []) + weights + PUSH
        vllm.calls.clear()
        engine.generate(requests, PARAMS, seed=0, window=0)
        assert vllm.calls == cache + DRAW + asleep
        vllm.calls.clear()
        engine.sync(step)
        engine.generate(requests, PARAMS, seed=0, window=1)
        again = weights + PUSH + cache if level == 2 else both  # discarded weights come anew, kept ones wake up
        assert vllm.calls == again + DRAW + asleep
    vllm.calls.clear()
    engine.close()
    engine.close()
    assert vllm.calls == [("shutdown",)]
    engine.sync(4)
    assert vllm.calls[1:] == START + asleep + weights + PUSH


@pytest.mark.parametrize("level", [1, 2])
def test_greedy_is_what_the_embedded_engine_draws_with_the_weights_of_the_step(level, make, vllm, model, tiny_tokenizer, requests):
    engine, greedy = make(sleep_level=level), replace(PARAMS, temperature=0.0)
    for step in range(2):
        with torch.no_grad():
            for i, parameter in enumerate(model.parameters()):
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i + step)))
        engine.sync(step)
        theirs = engine.generate(requests, greedy, seed=0, window=0)
        ours = TransformersEngine(model, tiny_tokenizer, engine.eos_ids).generate(requests, greedy, seed=0, window=0)
        for name in ("prompt_ids", "prompt_mask", "response_ids", "response_mask", "truncated", "group_ids", "token_ends"):
            assert torch.equal(getattr(theirs, name), getattr(ours, name)), name
        torch.testing.assert_close(theirs.engine_logprobs, ours.engine_logprobs, atol=1e-4, rtol=1e-4)


def test_rows_are_seeded_and_stop_strings_end_them(make, vllm, requests):
    engine = make()
    engine.sync(0)
    both = engine.generate(requests, PARAMS, seed=1, window=2).texts
    assert engine.generate(requests[2:], PARAMS, seed=1, window=2).texts == both[4:]
    assert engine.generate(requests, PARAMS, seed=1, window=3).texts != both
    row = max(range(10), key=lambda i: len(both[i]))
    stopped = engine.generate(requests, replace(PARAMS, stop=(both[row][0],)), seed=1, window=2)
    assert both[row].startswith(stopped.texts[row])
    assert len(stopped.texts[row]) < len(both[row])
    assert not stopped.truncated[row]
    assert engine.generate([], PARAMS, seed=1, window=2).texts == []


def test_how_vllm_is_started(make, vllm, monkeypatch):
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "7")
    engine = make(gpu_memory_utilization=0.4, max_model_len=64, enforce_eager=True, options={"max_num_seqs": 8, "load_format": "auto"})
    engine.sync(0)
    (llm,) = vllm.llms
    assert llm.options == {
        "dtype": "float32",
        "load_format": "auto",
        "tensor_parallel_size": 1,
        "gpu_memory_utilization": 0.4,
        "max_model_len": 64,
        "enforce_eager": True,
        "enable_sleep_mode": True,
        "logprobs_mode": "processed_logprobs",
        "generation_config": "vllm",
        "distributed_executor_backend": "external_launcher",
        "max_num_seqs": 8,
    }
    assert [llm.environment[name] for name in LAUNCHER[:4]] == ["0", "0", "1", "127.0.0.1"]
    assert int(llm.environment["MASTER_PORT"]) > 0
    assert {name: os.environ.get(name) for name in LAUNCHER} == dict.fromkeys(LAUNCHER) | {"RANK": "7"}


def test_a_policy_made_from_a_configuration_and_sharded_has_a_class(make, vllm, model):
    model.config.architectures = None
    model.__class__ = type("FSDPQwen3ForCausalLM", (type(model),), {})  # as fully_shard does
    make().sync(0)
    assert model.config.architectures is None


@pytest.mark.parametrize(
    ("tamper", "message"),
    [
        (lambda outputs: outputs[1:], "expected outputs for 5 prompts, found 4"),
        (lambda outputs: outputs[::-1], "expected samples 0 to 1 of that prompt"),
        (lambda outputs: [outputs[0].outputs.pop(), *outputs][1:], "expected samples 0 to 1 of that prompt, found \\[0\\]"),
        (lambda outputs: [setattr(outputs[0].outputs[0], "logprobs", None), *outputs][1:], "a finite log-prob for each of"),
        (lambda outputs: [outputs[0].outputs[0].logprobs[0].clear(), *outputs][1:], "a finite log-prob for each of"),
        (lambda outputs: [setattr(outputs[0].outputs[0], "finish_reason", "abort"), *outputs][1:], "finish_reason 'abort'"),
    ],
)
def test_outputs_that_are_not_what_was_asked_for(tamper, message, make, vllm, requests):
    engine = make()
    engine.sync(0)
    vllm.tamper = tamper
    with pytest.raises(DataError, match=message):
        engine.generate(requests, PARAMS, seed=0, window=0)
    assert vllm.calls[-1] == ("sleep", 1)


def test_without_weights_nothing_is_drawn(make, vllm, requests):
    with pytest.raises(RuntimeError, match="sync was not called"):
        make().generate(requests, PARAMS, seed=0, window=0)


def test_a_start_that_fails_is_told_with_advice(make, vllm, monkeypatch):
    def refuse(**options):
        raise ValueError("Free memory on device is less than desired GPU memory utilization")

    monkeypatch.setattr(vllm, "LLM", refuse)
    with pytest.raises(ConfigError, match=r"vLLM did not start \(ValueError: Free memory.*gpu_memory_utilization, max_model_len"):
        make().sync(0)


@pytest.mark.parametrize(
    ("options", "named"), [({"gpu_memory_utilization": 1.0}, "gpu_memory_utilization"), ({"sleep_level": 3}, "sleep_level")]
)
def test_options_that_are_illegal(options, named, make, vllm):
    with pytest.raises(ConfigError, match=f"engine.{named}"):
        make(**options)


def test_shards_are_not_gathered_inside_generate(make, vllm, monkeypatch):
    monkeypatch.setattr("aapa_lightning.rollout.vllm_colocated.is_sharded", lambda model: True)
    make(sleep_level=1).sync(0)
    with pytest.raises(ConfigError, match=r"engine\.sleep_level: expected 0 or 1 for a policy in shards, found 2"):
        make(sleep_level=2).sync(0)


def test_without_vllm_the_extra_is_named(make, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(MissingDependencyError, match=r"aapa-lightning\[vllm\]"):
        make()

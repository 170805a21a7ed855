"""vLLM itself, where it is installed: its own request classes, routers and answers; and on a GPU, the engine in this process.

``pip install -e '.[vllm,test]' && pytest -q tests/rollout/test_vllm_real.py`` on a machine with a GPU.
"""

from __future__ import annotations

import asyncio
import inspect
import types

import pytest
import torch

from aapa_lightning.logprobs import response_logprobs
from aapa_lightning.rollout.base import RolloutRequest, SamplingParams
from aapa_lightning.rollout.transformers_engine import TransformersEngine
from aapa_lightning.rollout.vllm_colocated import VLLMEngine
from aapa_lightning.rollout.vllm_requests import completion_body, read_completion, sampling_fields
from aapa_lightning.rollout.vllm_server import VLLMServer
from aapa_lightning.types import Record

vllm = pytest.importorskip("vllm", reason="vLLM is not installed; pip install 'aapa-lightning[vllm]'")

REQUEST = RolloutRequest([5, 6, 7], Record("p", source="d.jsonl:1"), 3, 2)
EVERY = [SamplingParams(8, 0.7), SamplingParams(8, 1.0, stop=("x",)), SamplingParams(8, 0.0), SamplingParams(8, 0.7, top_p=0.9, top_k=5)]
A_SERVERS_DEFAULTS = {"repetition_penalty": 1.3, "temperature": 0.6, "top_p": 0.8, "top_k": 20, "min_p": 0.1}


@pytest.mark.parametrize("params", EVERY)
def test_requests_mean_what_they_say(params):
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest

    fields = sampling_fields(REQUEST, params, (1, 2), 1, 2)
    request = CompletionRequest(**completion_body("m", REQUEST, fields))
    served = request.to_sampling_params(params.max_new_tokens, A_SERVERS_DEFAULTS)
    for found in (served, vllm.SamplingParams(**fields, detokenize=bool(params.stop))):
        kept = {name: getattr(found, name) for name in fields}
        greedy = {"top_p": 1.0, "top_k": 0} if params.temperature == 0 else {}
        assert kept == fields | greedy
    assert request.prompt == [5, 6, 7]
    assert request.return_token_ids


def test_the_engine_takes_the_arguments(tiny_model_dir):
    from vllm.engine.arg_utils import EngineArgs

    EngineArgs(model=str(tiny_model_dir), **VLLMEngine(None, None, [])._arguments)
    for name, arguments in {
        "sleep": {"level"},
        "wake_up": {"tags"},
        "collective_rpc": {"method", "kwargs"},
        "generate": {"use_tqdm"},
    }.items():
        assert arguments <= inspect.signature(getattr(vllm.LLM, name)).parameters.keys()


class Control:
    """What vLLM's routers call."""

    def __init__(self):
        self.version, self.calls = "default", []

    async def pause_generation(self, mode, **others):
        self.calls.append(("pause", mode))

    async def resume_generation(self):
        self.calls.append(("resume",))

    async def collective_rpc(self, method, timeout, args, kwargs):
        self.calls.append((method, args, kwargs))
        return [None]

    async def reset_prefix_cache(self, *args):
        self.calls.append(("reset",))
        return True

    async def update_weight_version(self, version):
        self.version = version

    async def get_weight_version(self):
        return self.version


def test_the_routers_take_a_push(monkeypatch):
    fastapi = pytest.importorskip("fastapi", reason="vLLM's server brings it")
    client = pytest.importorskip("fastapi.testclient", reason="it needs httpx")
    from vllm.entrypoints.serve.dev.cache.api_router import router as cache
    from vllm.entrypoints.serve.dev.rpc.api_router import router as rpc

    try:
        from vllm.entrypoints.rl.online.api_router import router as weights
    except ImportError:  # before 0.32
        from vllm.entrypoints.serve.dev.rlhf.api_router import router as weights
    app, control = fastapi.FastAPI(), Control()
    for router in (cache, rpc, weights):
        app.include_router(router)
    app.state.engine_client = control
    http = client.TestClient(app)

    def send(self, method, path, payload):
        answer = http.request(method, path, content=payload, headers={"Content-Type": "application/json"})
        return answer.status_code, answer.content

    monkeypatch.setattr(VLLMServer, "_send", send)
    VLLMServer("http://localhost:8000", retries=0).load("/weights/abc-step-1", "abc-step-1")
    reload = ("reload_weights", (), {"weights_path": "/weights/abc-step-1"})
    assert control.calls == [("pause", "wait"), reload, ("reset",), ("resume",)]
    assert control.version == "abc-step-1"
    assert asyncio.run(control.get_weight_version()) == "abc-step-1"


def test_an_answer_that_vllm_builds_is_read():
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
    from vllm.logprobs import Logprob
    from vllm.outputs import CompletionOutput, RequestOutput

    drawn = [([8, 2], "stop", 2), ([9] * 8, "length", None)]
    outputs = [
        CompletionOutput(
            index=i,
            text="t",
            token_ids=ids,
            cumulative_logprob=0.0,
            logprobs=[{token: Logprob(-0.5 - position, 1, "t")} for position, token in enumerate(ids)],
            finish_reason=reason,
            stop_reason=stop,
        )
        for i, (ids, reason, stop) in enumerate(drawn)
    ]
    result = RequestOutput("r", "", [5, 6, 7], None, outputs, finished=True)
    serving = object.__new__(OpenAIServingCompletion)
    for name in ("return_tokens_as_token_ids", "enable_prompt_tokens_details", "enable_force_include_usage", "enable_per_request_metrics"):
        setattr(serving, name, False)
    serving.system_fingerprint = None
    request = CompletionRequest(**completion_body("m", REQUEST, sampling_fields(REQUEST, EVERY[0], (1, 2), 1, 2)))
    answer = serving.request_output_to_completion_response([result], request, "id", 0, "m", None, types.SimpleNamespace())
    first, second = read_completion(answer.model_dump_json().encode(), REQUEST, EVERY[0], (1, 2), 10, "v")
    assert first == ([8, 2], [-0.5, -1.5], False)
    assert second == ([9] * 8, [-0.5 - i for i in range(8)], True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("level", [0, 1, 2])
def test_vllm_draws_what_the_policy_would(level, tiny_model_dir, tiny_tokenizer, vllm_kit):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir).cuda()
    eos_ids = [tiny_tokenizer.eos_token_id]
    engine = VLLMEngine(
        model,
        tiny_tokenizer,
        eos_ids,
        dtype="float32",
        gpu_memory_utilization=0.1,
        max_model_len=256,
        sleep_level=level,
        enforce_eager=True,
    )
    requests = vllm_kit.make_requests(tiny_tokenizer)
    try:
        for step in range(2):
            engine.sync(step)
            greedy = SamplingParams(max_new_tokens=12, temperature=0.0)
            theirs = engine.generate(requests, greedy, seed=0, window=step)
            ours = TransformersEngine(model, tiny_tokenizer, eos_ids).generate(requests, greedy, seed=0, window=step)
            assert theirs.texts == ours.texts
            assert torch.equal(theirs.truncated, ours.truncated)
            sampled = engine.generate(requests, SamplingParams(max_new_tokens=12, temperature=0.7), seed=0, window=step)
            with torch.no_grad():
                scored, _ = response_logprobs(
                    model, sampled.prompt_ids, sampled.prompt_mask, sampled.response_ids, sampled.response_mask, temperature=0.7
                )
            # float32 throughout: kernels differ by rounding alone
            torch.testing.assert_close(sampled.engine_logprobs, scored, atol=2e-3, rtol=2e-3)
            with torch.no_grad():
                for i, parameter in enumerate(model.parameters()):
                    parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)).cuda())
    finally:
        engine.close()

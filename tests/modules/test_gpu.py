"""The same promises on a CUDA device: `make test-gpu`."""

from __future__ import annotations

import math

import pytest
import torch

from aapa_lightning.anchor.context import Encoding
from aapa_lightning.anchor.encoder import FrozenEncoder
from aapa_lightning.anchor.encoder_head import EncoderHeadDiscriminator
from aapa_lightning.anchor.head import StackedHead, feature_size
from aapa_lightning.anchor.segment import Segmenter
from aapa_lightning.callbacks.anchor import AnchorCallback
from aapa_lightning.logprobs import response_logprobs
from aapa_lightning.policy import eos_token_ids, load_policy
from aapa_lightning.rollout.base import RolloutRequest, SamplingParams
from aapa_lightning.rollout.sampling import gumbel_noise
from aapa_lightning.rollout.transformers_engine import TransformersEngine
from aapa_lightning.types import Record

DEVICE = "cuda"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.fixture
def judge(tiny_model_dir) -> EncoderHeadDiscriminator:
    """An untrained head over the tiny policy."""
    encoder = FrozenEncoder(str(tiny_model_dir), Encoding())
    head = StackedHead(1, feature_size(("sentence",), encoder.hidden_size), 0, 0.0, 0)
    return EncoderHeadDiscriminator(encoder, head, ("sentence",), Segmenter(), {})


def test_noise_is_that_of_the_cpu():
    keys = torch.tensor([1, -5, 2**62], dtype=torch.int64)
    # the bits are equal; two logarithms may differ in the last places
    torch.testing.assert_close(gumbel_noise(keys.to(DEVICE), 3, 1000).cpu(), gumbel_noise(keys, 3, 1000), atol=1e-4, rtol=1e-5)


def test_engine_and_trainer_agree(spec):
    model, tokenizer = load_policy(spec)
    model.to(DEVICE)
    engine = TransformersEngine(model, tokenizer, eos_token_ids(model, tokenizer))
    requests = [RolloutRequest(tokenizer("boats " * n).input_ids, Record("x"), n, 3) for n in (1, 4, 9)]
    rollouts = engine.generate(requests, SamplingParams(12, temperature=0.7), seed=0, window=0)
    assert rollouts.response_ids.device.type == DEVICE
    parts = (rollouts.prompt_ids, rollouts.prompt_mask, rollouts.response_ids, rollouts.response_mask)
    with torch.no_grad():
        logprobs, _ = response_logprobs(model, *parts, 0.7)
    torch.testing.assert_close(logprobs, rollouts.engine_logprobs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("name", ["sft", "grpo", "chord"])
def test_anchored_modules_train(kit, spec, judge, name, precision):
    rows = kit.Rows()
    trainer = kit.make_trainer(
        3, accumulate=2, callbacks=[AnchorCallback(judge)], logger=rows, accelerator=DEVICE, devices=1, precision=precision
    )
    before = judge.fingerprint()
    module = kit.fit(kit.make_module(name, spec), trainer, val=kit.make_records(3))
    train = [metrics for _, metrics in rows.rows if "train/loss" in metrics]
    assert len(train) == 3
    assert all(math.isfinite(value) for metrics in train for value in metrics.values())
    assert all(metrics["train/skipped_steps"] == 0 for metrics in train)
    assert module.device.type == DEVICE
    assert judge.fingerprint() == before
    if name == "grpo":
        assert all(metrics["train/policy/ratio"] == 1 and metrics["train/policy/clip_fraction"] == 0 for metrics in train)


def test_several_updates_and_a_reference(kit, spec):
    module = kit.make_module("grpo", spec, minibatches=2, updates_per_window=2, beta=0.1)
    rows = kit.Rows()
    kit.fit(module, kit.make_trainer(4, logger=rows, accelerator=DEVICE, devices=1))
    first, *_, last = [metrics for _, metrics in rows.rows if "train/loss" in metrics]
    assert first["train/policy/ratio"] == pytest.approx(1, abs=1e-5)
    assert last["train/policy/kl"] > 0

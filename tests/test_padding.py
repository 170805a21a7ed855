"""Rows that must not share a batch: log-probs, gradients and draws are those of each row alone, whatever the model and its neighbours."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch

from aapa_lightning.errors import ConfigError
from aapa_lightning.logprobs import response_logprobs, sequence_logprobs
from aapa_lightning.logprobs.padding import rows_apart
from aapa_lightning.rollout.base import RolloutRequest, SamplingParams
from aapa_lightning.rollout.engines import build_engine
from aapa_lightning.types import Record

COMMON = {"vocab_size": 97, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
BART = {"vocab_size": 97, "d_model": 16, "decoder_layers": 2, "encoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 32}
ROPE = {"rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 8}
#: Models that see padding on the left, on the right, or nowhere.
FAMILIES = {
    "recurrent_gemma": (COMMON | {"num_hidden_layers": 3, "lru_width": 16}, {"left"}),
    "rwkv": ({"vocab_size": 97, "hidden_size": 16, "num_hidden_layers": 2, "attention_hidden_size": 16, "context_length": 64}, {"left"}),
    "bart": (BART | {"is_decoder": True, "max_position_embeddings": 64}, {"left"}),
    "roformer": (COMMON | {"num_hidden_layers": 2, "is_decoder": True, "embedding_size": 16}, set()),
    "mamba": ({"vocab_size": 97, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}, set()),
    "qwen3": (COMMON | {"num_hidden_layers": 2}, set()),
}


def build(family, config):
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, pad_token_id=0, bos_token_id=1, eos_token_id=2, **config))
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():  # biases too: padding of a zero embedding shows nothing while they are 0
        p.data.normal_(0, 0.2, generator=generator)
    return model.double().eval()


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    prompt_ids, response_ids = (torch.randint(3, 97, size, generator=generator) for size in ((4, 9), (4, 6)))
    prompt_mask = torch.arange(9) >= torch.tensor([0, 5, 2, 5])[:, None]
    return prompt_ids, prompt_mask, response_ids, torch.arange(6) < torch.tensor([6, 2, 4, 0])[:, None]


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def alone(model, batch, **options):
    """Each row's log-probs and entropies out of a forward of its own, without padding."""
    rows = []
    for prompt, seen, response, wanted in zip(*batch, strict=True):
        parts = (prompt[seen][None], response[wanted][None])
        found = response_logprobs(model, parts[0], torch.ones_like(parts[0]).bool(), parts[1], torch.ones_like(parts[1]).bool(), **options)
        rows.append([torch.nn.functional.pad(value[0], (0, len(response) - int(wanted.sum()))) for value in found])
    return [torch.stack(values) for values in zip(*rows, strict=True)]


@pytest.mark.parametrize("backend", ["full", "chunked"])
@pytest.mark.parametrize("family", FAMILIES)
def test_values_and_gradients_are_those_of_rows_alone(family, backend, batch):
    config, sides = FAMILIES[family]
    model = build(family, config)
    weights = torch.randn(4, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    state = torch.get_rng_state()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        together = response_logprobs(model, *batch, 0.8, entropy=True, backend=backend, group_size=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert {side for side in ("left", "right") if any(f"reads padding on the {side}" in str(w.message) for w in said)} == sides
    found = gradients(model, (together[0] * weights).sum() + together[1].sum())
    apart = alone(model, batch, temperature=0.8, entropy=True, backend=backend)
    expected = gradients(model, (apart[0] * weights).sum() + apart[1].sum())
    for a, b in zip((*together, found), (*apart, expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)  # some norms and positions are float32


@pytest.mark.parametrize("family", ["recurrent_gemma"])
def test_draws_are_those_of_each_prompt_alone(family, tiny_tokenizer):
    model = build(family, FAMILIES[family][0] | {"vocab_size": 300})
    prompts = [[5, 6, 7, 8, 9, 10], [11, 12], [13, 14, 15], [16, 17]]
    requests = [RolloutRequest(ids, Record("x"), slot, 2) for slot, ids in enumerate(prompts)]
    engine = build_engine("auto", model, tiny_tokenizer, [2])
    params = SamplingParams(5)
    with pytest.warns(UserWarning, match="reads padding on the left"):
        together = engine.generate(requests, params, seed=3, window=0)
    found = [engine.generate([request], params, seed=3, window=0) for request in requests]
    assert together.texts == [text for rollouts in found for text in rollouts.texts]
    torch.testing.assert_close(
        together.engine_logprobs.sum(1), torch.cat([rollouts.engine_logprobs.sum(1) for rollouts in found]), rtol=1e-5, atol=1e-5
    )
    # what was drawn is what the trainer scores
    scored, _ = response_logprobs(model, together.prompt_ids, together.prompt_mask, together.response_ids, together.response_mask)
    torch.testing.assert_close(scored.float(), together.engine_logprobs, rtol=1e-4, atol=1e-4)
    few = replace(params, max_new_tokens=2)
    torch.testing.assert_close(
        build_engine("auto", model, tiny_tokenizer, [2], 1).generate(requests, few, seed=3, window=0).response_ids,
        engine.generate(requests, few, seed=3, window=0).response_ids,
    )


LONG = {
    "llama": COMMON | {"num_hidden_layers": 2, "max_position_embeddings": 8, "rope_parameters": ROPE | {"rope_type": "dynamic"}},
    "phi3": COMMON
    | {"num_hidden_layers": 2, "max_position_embeddings": 64, "original_max_position_embeddings": 8}
    | {"rope_parameters": ROPE | {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}},
}


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("family", LONG)
def test_rotary_positions_that_change_with_length_are_each_rows_own(family, packing, batch):
    from aapa_lightning.logprobs import set_packing

    model = build(family, LONG[family])
    fresh = build(family, LONG[family])
    set_packing(model, packing)
    set_packing(fresh, packing)
    ids, mask = torch.cat((batch[0], batch[2]), 1), torch.arange(15) < torch.tensor([15, 3, 8, 12])[:, None]
    sequence_logprobs(model, ids, torch.ones_like(mask))  # longer rows that came before
    together = sequence_logprobs(model, ids, mask)
    for i, length in enumerate((15, 3, 8, 12)):
        apart = sequence_logprobs(fresh, ids[i : i + 1, :length], mask[i : i + 1, :length])
        torch.testing.assert_close(together[i, : length - 1], apart[0], rtol=1e-4, atol=1e-3)  # norms are float32


@pytest.mark.parametrize("family", LONG)
def test_rows_that_could_turn_while_they_are_drawn_are_refused(family, tiny_tokenizer):
    model = build(family, LONG[family] | {"vocab_size": 300})
    engine = build_engine("auto", model, tiny_tokenizer, [2])
    request = RolloutRequest([5, 6, 7], Record("x"), 0, 2)
    engine.generate([request], SamplingParams(5), seed=0, window=0)
    with pytest.raises(ConfigError, match=r"within 8 tokens, beyond which the rotary positions of .* change with length"):
        engine.generate([request], SamplingParams(6), seed=0, window=0)
    engine.check_lengths(3, 5)
    with pytest.raises(ConfigError, match=r"found up to 5 \+ 4; lower it"):
        engine.check_lengths(5, 4)


def test_a_sharded_model_that_would_read_rows_apart_is_refused(monkeypatch, batch):
    from aapa_lightning.logprobs import padding

    model = build("rwkv", FAMILIES["rwkv"][0])
    monkeypatch.setattr(padding, "is_sharded", lambda model: True)
    with (
        pytest.warns(UserWarning, match="padding"),
        pytest.raises(ConfigError, match=r"reads padding like text.* --trainer.strategy ddp"),
    ):
        response_logprobs(model, *batch)
    assert rows_apart(build("qwen3", FAMILIES["qwen3"][0]), batch[1], ("left",), lambda side: False) is None

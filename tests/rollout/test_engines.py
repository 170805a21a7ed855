from dataclasses import replace

import pytest
import torch

from aapa_lightning.errors import ConfigError
from aapa_lightning.logprobs import response_logprobs
from aapa_lightning.rollout.base import RolloutEngine, RolloutRequest, SamplingParams
from aapa_lightning.rollout.continuous_engine import ContinuousEngine
from aapa_lightning.rollout.engines import ENGINES, build_engine
from aapa_lightning.rollout.generate_engine import GenerateEngine
from aapa_lightning.rollout.transformers_engine import TransformersEngine
from aapa_lightning.types import Record, Rollouts

EMBEDDED = [name for name in ENGINES if name != "vllm"]
ROW_KEYED = [name for name in EMBEDDED if name != "continuous"]
GREEDY = SamplingParams(max_new_tokens=8, temperature=0.0)


@pytest.fixture(scope="module")
def model(tiny_model_dir):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_model_dir).eval()


@pytest.fixture(scope="module")
def eos_ids(tiny_tokenizer):
    return (tiny_tokenizer.eos_token_id, *range(100, 160))


@pytest.fixture(scope="module")
def requests(tiny_tokenizer):
    prompts = ["abc", "Describe the harbor in two sentences.", "The", "boats rest", "x"]
    return [RolloutRequest(tiny_tokenizer(prompt)["input_ids"], Record(prompt), slot, 3) for slot, prompt in enumerate(prompts)]


def ready(name, *args) -> RolloutEngine:
    engine = build_engine(name, *args)
    engine.sync(0)
    return engine


def responses(rollouts: Rollouts) -> list[tuple]:
    rows = zip(rollouts.response_ids.tolist(), rollouts.lengths.tolist(), strict=True)
    return [(ids[:length], cut) for (ids, length), cut in zip(rows, rollouts.truncated.tolist(), strict=True)]


def trainers(model, rollouts: Rollouts, temperature: float) -> torch.Tensor:
    parts = (rollouts.prompt_ids, rollouts.prompt_mask, rollouts.response_ids, rollouts.response_mask)
    with torch.no_grad():
        return response_logprobs(model, *parts, temperature)[0]


@pytest.mark.parametrize("name", EMBEDDED)
def test_every_engine_writes_the_same_at_temperature_zero(name, model, tiny_tokenizer, eos_ids, requests) -> None:
    expected = GenerateEngine(model, tiny_tokenizer, eos_ids).generate(requests, GREEDY, seed=0, window=0)
    assert len({tuple(ids) for ids, _ in responses(expected)}) == 5
    state = torch.get_rng_state()
    found = ready(name, model, tiny_tokenizer, eos_ids).generate(requests, GREEDY, seed=0, window=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert responses(found) == responses(expected)
    assert found.texts == expected.texts
    assert found.group_ids.tolist() == expected.group_ids.tolist()
    torch.testing.assert_close(found.engine_logprobs, trainers(model, found, 1.0), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", EMBEDDED)
def test_log_probs_are_the_trainers_at_the_temperature(name, model, tiny_tokenizer, eos_ids, requests) -> None:
    params = SamplingParams(max_new_tokens=8, temperature=0.7)
    rollouts = ready(name, model, tiny_tokenizer, eos_ids).generate(requests, params, seed=0, window=0)
    assert len(set(rollouts.lengths.tolist())) > 2
    ended = torch.isin(rollouts.response_ids[torch.arange(15), rollouts.lengths - 1], torch.tensor(eos_ids))
    assert torch.equal(rollouts.truncated, ~ended)
    torch.testing.assert_close(rollouts.engine_logprobs, trainers(model, rollouts, 0.7), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ROW_KEYED)
@pytest.mark.parametrize("stop", [(), ("e",)])
def test_engines_with_row_keyed_noise_draw_the_same(name, stop, model, tiny_tokenizer, eos_ids, requests) -> None:
    params = SamplingParams(max_new_tokens=12, temperature=1.1, stop=stop)
    expected = GenerateEngine(model, tiny_tokenizer, eos_ids).generate(requests, params, seed=3, window=2)
    for rows in (None, 4):
        engine = ready(name, model, tiny_tokenizer, eos_ids, rows)
        assert responses(engine.generate(requests, params, seed=3, window=2)) == responses(expected)


def test_each_prompt_is_read_once_and_ended_rows_leave(model, tiny_tokenizer, eos_ids, requests) -> None:
    shapes: list[tuple[int, int]] = []
    handle = model.register_forward_pre_hook(lambda m, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True)
    try:
        params = SamplingParams(max_new_tokens=20, temperature=1.1)
        rollouts = TransformersEngine(model, tiny_tokenizer, eos_ids).generate(requests, params, seed=0, window=0)
    finally:
        handle.remove()
    assert shapes[0] == (5, rollouts.prompt_ids.shape[1])
    assert shapes[1] == (15, 1) or shapes[1][0] < 15
    rows = [shape[0] for shape in shapes[1:]]
    assert rows == sorted(rows, reverse=True)
    alive = [int((rollouts.lengths > position + 1).sum()) for position in range(len(rows))]
    assert all(row >= count for row, count in zip(rows, alive, strict=True))
    assert min(rows) < 8, "rows that ended must leave the batch"
    assert len(shapes) == int(rollouts.lengths.max())


def test_auto_falls_back_to_generate_where_the_state_is_no_cache_of_attention(tiny_tokenizer, eos_ids, requests) -> None:
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    mamba = MambaForCausalLM(MambaConfig(vocab_size=300, hidden_size=16, num_hidden_layers=2, state_size=4, pad_token_id=0)).eval()
    engine = build_engine("auto", mamba, tiny_tokenizer, eos_ids)
    assert isinstance(engine, GenerateEngine)
    same_length = [replace(requests[0], slot=slot) for slot in range(2)]
    assert len(engine.generate(same_length, GREEDY, seed=0, window=0)) == 6


@pytest.mark.parametrize("kind", ["dynamic", "recurrent_gemma"])
def test_auto_falls_back_where_rows_do_not_keep_their_state(kind, tiny_tokenizer, eos_ids) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    rope = {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 8}}
    config = AutoConfig.for_model("llama", **sizes, **rope) if kind == "dynamic" else AutoConfig.for_model(kind, **sizes)
    with torch.device("meta"):
        unfit = AutoModelForCausalLM.from_config(config)
    assert isinstance(build_engine("auto", unfit, tiny_tokenizer, eos_ids), GenerateEngine)
    with pytest.raises(ConfigError, match="use engine: generate"):
        build_engine("transformers", unfit, tiny_tokenizer, eos_ids)


def test_a_replica_has_the_policys_weights_whatever_the_step(model, tiny_tokenizer, eos_ids, requests) -> None:
    import copy

    policy = copy.deepcopy(model)
    engine = ready("replica", policy, tiny_tokenizer, eos_ids)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    engine.sync(0)  # weights may be exchanged within a step, for a validation
    found = engine.generate(requests, GREEDY, seed=0, window=0)
    assert responses(found) == responses(GenerateEngine(policy, tiny_tokenizer, eos_ids).generate(requests, GREEDY, seed=0, window=0))


def test_rows_are_bounded_in_an_engine_of_a_factory_too(model, tiny_tokenizer, eos_ids) -> None:
    assert build_engine(TransformersEngine, model, tiny_tokenizer, eos_ids, 3).max_rows == 3
    assert build_engine(lambda *args: GenerateEngine(*args, max_rows=2), model, tiny_tokenizer, eos_ids, 3).max_rows == 2


def test_a_factory_is_called_with_model_tokenizer_and_ids(model, tiny_tokenizer, eos_ids) -> None:
    engine = build_engine(lambda *args: GenerateEngine(*args, cache="static"), model, tiny_tokenizer, eos_ids)
    assert (engine.cache, engine.eos_ids) == ("static", eos_ids)


def test_continuous_batching_refuses_stop_strings_and_lost_responses(model, tiny_tokenizer, eos_ids, requests, monkeypatch) -> None:
    engine = ContinuousEngine(model, tiny_tokenizer, eos_ids)
    with pytest.raises(ConfigError, match=r"sampling\.stop"):
        engine.generate(requests, replace(GREEDY, stop=("x",)), seed=0, window=0)
    monkeypatch.setattr(type(model), "generate_batch", lambda *args, **kwargs: {})
    with pytest.raises(RuntimeError, match="expected 15 responses, found 0"):
        engine.generate(requests, GREEDY, seed=0, window=0)
    assert not model.training

import copy
from dataclasses import replace

import pytest
import torch

from aapa_lightning.errors import ConfigError
from aapa_lightning.logprobs import response_logprobs
from aapa_lightning.rollout import decoding
from aapa_lightning.rollout.base import RolloutRequest, SamplingParams
from aapa_lightning.rollout.sampling import row_keys
from aapa_lightning.rollout.transformers_engine import TransformersEngine
from aapa_lightning.types import Record, Rollouts

PARAMS = SamplingParams(max_new_tokens=8, temperature=0.7)


@pytest.fixture(scope="module")
def model(tiny_model_dir):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_model_dir)


@pytest.fixture
def engine(model, tiny_tokenizer):
    # a fifth of the vocabulary ends a response, so lengths differ
    return TransformersEngine(model, tiny_tokenizer, [tiny_tokenizer.eos_token_id, *range(100, 160)])


@pytest.fixture(scope="module")
def requests(tiny_tokenizer):
    prompts = ["abc", "Describe the harbor in two sentences.", "The", "boats rest", "x"]
    ids = [tiny_tokenizer(prompt)["input_ids"] for prompt in prompts]
    return [RolloutRequest(row, Record(prompt), slot, 2) for slot, (row, prompt) in enumerate(zip(ids, prompts, strict=True))]


def by_row(rollouts: Rollouts) -> dict[tuple[int, int], tuple]:
    """Everything that was drawn, by slot and sample, whatever the order of rows."""
    found: dict[tuple[int, int], tuple] = {}
    for i, slot in enumerate(rollouts.group_ids.tolist()):
        sample = sum(key[0] == slot for key in found)
        length = int(rollouts.lengths[i])
        found[slot, sample] = (
            rollouts.response_ids[i, :length].tolist(),
            rollouts.texts[i],
            bool(rollouts.truncated[i]),
            rollouts.token_ends[i, :length].tolist(),
            rollouts.records[i],
        )
    return found


def trainer_logprobs(model, rollouts: Rollouts, temperature: float) -> torch.Tensor:
    with torch.no_grad():
        return response_logprobs(
            model, rollouts.prompt_ids, rollouts.prompt_mask, rollouts.response_ids, rollouts.response_mask, temperature
        )[0]


@pytest.mark.parametrize(
    "params",
    [PARAMS, replace(PARAMS, temperature=1.7), replace(PARAMS, temperature=1.3, top_p=0.6, top_k=20)],
    ids=["cold", "hot", "truncated-sampling"],
)
def test_own_logprobs_are_the_trainers(engine, model, requests, params) -> None:
    rollouts = engine.generate(requests, params, seed=0, window=0)
    assert len({len(request.prompt_ids) for request in requests}) > 2
    assert len(set(rollouts.lengths.tolist())) > 1
    expected = trainer_logprobs(model, rollouts, params.temperature)
    torch.testing.assert_close(rollouts.engine_logprobs, expected, atol=1e-5, rtol=0)
    assert (rollouts.engine_logprobs[rollouts.response_mask] < 0).all()
    assert (rollouts.engine_logprobs[~rollouts.response_mask] == 0).all()


def test_own_logprobs_are_the_trainers_with_learned_positions_and_left_padding(tiny_tokenizer, requests) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_positions=64, n_embd=16, n_layer=2, n_head=2, initializer_range=0.5)).eval()
    rollouts = TransformersEngine(gpt2, tiny_tokenizer, [2]).generate(requests, PARAMS, seed=0, window=0)
    torch.testing.assert_close(rollouts.engine_logprobs, trainer_logprobs(gpt2, rollouts, 0.7), atol=1e-5, rtol=0)


def test_the_models_generation_defaults_change_nothing(engine, model, requests) -> None:
    expected = by_row(engine.generate(requests, PARAMS, seed=0, window=0))
    saved = copy.deepcopy(model.generation_config)
    model.generation_config.update(repetition_penalty=5.0, no_repeat_ngram_size=1, min_new_tokens=8, suppress_tokens=[5, 6], top_k=1)
    changed = copy.deepcopy(model.generation_config)
    try:
        rollouts = engine.generate(requests, PARAMS, seed=0, window=0)
        assert model.generation_config == changed
    finally:
        model.generation_config = saved
    assert by_row(rollouts) == expected
    torch.testing.assert_close(rollouts.engine_logprobs, trainer_logprobs(model, rollouts, 0.7), atol=1e-5, rtol=0)


def test_adapters_sample_like_any_model(model, tiny_tokenizer, requests) -> None:
    from peft import LoraConfig, get_peft_model

    inner = copy.deepcopy(model)
    inner.generation_config.update(repetition_penalty=5.0)
    torch.manual_seed(0)
    adapted = get_peft_model(inner, LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False, lora_dropout=0.5))
    adapted.train()
    rollouts = TransformersEngine(adapted, tiny_tokenizer, [2]).generate(requests, PARAMS, seed=0, window=0)
    assert inner.generation_config.repetition_penalty == 5.0
    assert adapted.training
    adapted.eval()
    found = trainer_logprobs(adapted, rollouts, 0.7)
    torch.testing.assert_close(rollouts.engine_logprobs, found, atol=1e-5, rtol=0)
    assert not torch.allclose(found, trainer_logprobs(model, rollouts, 0.7), atol=1e-2)


def test_rows_do_not_depend_on_batches_order_or_grouping(engine, model, tiny_tokenizer, requests) -> None:
    whole = engine.generate(requests, PARAMS, seed=3, window=5)
    assert whole.group_ids.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert [record.prompt for record in whole.records[::2]] == [request.record.prompt for request in requests]
    expected = by_row(whole)
    assert expected[0, 0] != expected[0, 1]
    for rows in (1, 3, 4):
        small = TransformersEngine(model, tiny_tokenizer, engine.eos_ids, max_rows=rows)
        assert by_row(small.generate(requests, PARAMS, seed=3, window=5)) == expected
    permuted = engine.generate([requests[i] for i in (3, 0, 4, 2, 1)], PARAMS, seed=3, window=5)
    assert permuted.group_ids.tolist() == [3, 3, 0, 0, 4, 4, 2, 2, 1, 1]
    assert by_row(permuted) == expected
    # two ranks draw one rank's rows between them
    shares = [by_row(engine.generate(requests[rank::2], PARAMS, seed=3, window=5)) for rank in (0, 1)]
    assert shares[0] | shares[1] == expected
    # fewer samples: the first ones
    one = by_row(engine.generate([replace(request, samples=1) for request in requests], PARAMS, seed=3, window=5))
    assert one == {key: value for key, value in expected.items() if key[1] == 0}


def test_seed_and_window_change_the_draw_and_torchs_generator_does_not(engine, requests) -> None:
    base = by_row(engine.generate(requests, PARAMS, seed=0, window=0))
    torch.manual_seed(123)
    state = torch.get_rng_state()
    assert by_row(engine.generate(requests, PARAMS, seed=0, window=0)) == base
    assert torch.equal(torch.get_rng_state(), state)
    assert by_row(engine.generate(requests, PARAMS, seed=1, window=0)) != base
    assert by_row(engine.generate(requests, PARAMS, seed=0, window=1)) != base


def test_temperature_zero_is_greedy(engine, model, requests) -> None:
    rollouts = engine.generate(requests, replace(PARAMS, temperature=0.0), seed=0, window=0)
    drawn = by_row(rollouts)
    assert all(drawn[slot, 0] == drawn[slot, 1] for slot in range(5))
    for request in requests[:2]:
        ids = list(request.prompt_ids)
        for token in drawn[request.slot, 0][0]:
            with torch.no_grad():
                assert int(model(torch.tensor([ids])).logits[0, -1].argmax()) == token
            ids.append(token)
    torch.testing.assert_close(rollouts.engine_logprobs, trainer_logprobs(model, rollouts, 1.0), atol=1e-5, rtol=0)


@pytest.fixture
def say(monkeypatch, model, tiny_tokenizer, requests):
    """Generate with the model forced to write given tokens, one list for each request."""

    def run(scripts: list[list[int]], *, eos: list[int], params: SamplingParams = PARAMS, tokenizer=tiny_tokenizer) -> Rollouts:
        used = [replace(request, samples=1) for request in requests[: len(scripts)]]
        engine = TransformersEngine(model, tokenizer, eos)
        scripted = dict(zip(row_keys(0, 0, [(request.slot, 0) for request in used]).tolist(), scripts, strict=True))

        def forced(logits, keys, position, params):
            drawn = [script[position] if position < len(script) else 9 for script in (scripted[key] for key in keys.tolist())]
            return logits, torch.tensor(drawn), torch.zeros(len(drawn))

        monkeypatch.setattr(decoding, "perturb", forced)
        return engine.generate(used, params, seed=0, window=0)

    return run


def test_eos_is_a_response_token_and_any_of_a_set_ends_a_response(say, tiny_tokenizer) -> None:
    eos, other, a, b = tiny_tokenizer.eos_token_id, 40, 50, 51
    rollouts = say([[a, b, eos], [eos], [a, other], [a] * 8, [a] * 7 + [eos]], eos=[eos, other])
    assert rollouts.lengths.tolist() == [3, 1, 2, 8, 8]
    assert rollouts.truncated.tolist() == [False, False, False, True, False]
    assert rollouts.response_ids[0].tolist() == [a, b, eos] + [tiny_tokenizer.pad_token_id] * 5
    assert rollouts.response_ids[2, :2].tolist() == [a, other]
    word = tiny_tokenizer.decode([a])
    assert rollouts.texts[:2] == [word + tiny_tokenizer.decode([b]), ""]
    assert rollouts.texts[2] == word + tiny_tokenizer.decode([other])  # not special in the tokenizer: it writes
    assert rollouts.token_ends[0].tolist() == [1, 2, 2, 0, 0, 0, 0, 0]


def test_padding_may_equal_eos(say, tiny_tokenizer) -> None:
    eos, tokenizer = tiny_tokenizer.eos_token_id, copy.deepcopy(tiny_tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    rollouts = say([[50, eos], [50, 51, 52, eos], [eos]], eos=[eos], tokenizer=tokenizer)
    assert rollouts.lengths.tolist() == [2, 4, 1]
    assert rollouts.response_mask.tolist() == [[True, True, False, False], [True] * 4, [True, False, False, False]]
    assert rollouts.prompt_mask.sum(-1).tolist() == [len(tiny_tokenizer(r.prompt)["input_ids"]) for r in rollouts.records]


def test_the_padding_token_may_stand_in_a_prompt(model, engine, tiny_tokenizer, requests) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(requests[1].prompt_ids[-1])
    assert tokenizer.pad_token_id in requests[1].prompt_ids
    rollouts = TransformersEngine(model, tokenizer, engine.eos_ids).generate(requests, PARAMS, seed=0, window=0)
    torch.testing.assert_close(rollouts.engine_logprobs, trainer_logprobs(model, rollouts, 0.7), atol=1e-5, rtol=0)
    assert [ids for ids, *_ in by_row(rollouts).values()] == [
        ids for ids, *_ in by_row(engine.generate(requests, PARAMS, seed=0, window=0)).values()
    ]


def test_the_padding_token_may_be_drawn(say, tiny_tokenizer) -> None:
    pad, eos = tiny_tokenizer.pad_token_id, tiny_tokenizer.eos_token_id
    rollouts = say([[pad, pad, 50, eos], [50, pad, pad, pad]], eos=[eos], params=replace(PARAMS, max_new_tokens=4))
    assert rollouts.lengths.tolist() == [4, 4]
    assert rollouts.truncated.tolist() == [False, True]


def test_one_token_responses_and_the_length_limit(engine, requests) -> None:
    rollouts = engine.generate(requests, replace(PARAMS, max_new_tokens=1), seed=0, window=0)
    assert rollouts.response_ids.shape == (10, 1)
    assert rollouts.lengths.tolist() == [1] * 10
    ended = torch.isin(rollouts.response_ids[:, 0], torch.tensor(engine.eos_ids))
    assert torch.equal(rollouts.truncated, ~ended)


def test_stop_strings_end_a_response_wherever_tokens_split_them(say, tiny_tokenizer) -> None:
    def ids(text: str) -> list[int]:
        return tiny_tokenizer(text, add_special_tokens=False)["input_ids"]

    scripts = [ids("ab END cd"), ids("END"), ids("x\u20acy, no"), ids("E N D and on")]
    rollouts = say(scripts, eos=[tiny_tokenizer.eos_token_id], params=replace(PARAMS, max_new_tokens=9, stop=("END", "\u20ac")))
    assert rollouts.texts[:3] == ["ab END", "END", "x\u20ac"]
    assert rollouts.truncated.tolist() == [False, False, False, True]
    assert [rollouts.response_ids[i, : int(rollouts.lengths[i])].tolist() for i in range(2)] == [ids("ab END"), ids("END")]
    assert int(rollouts.lengths[3]) == 9


def test_the_end_of_the_prompt_does_not_complete_a_stop_string(say, tiny_tokenizer, requests) -> None:
    # the prompt ends in "c"; the response begins with "d"
    d = tiny_tokenizer("d")["input_ids"]
    rollouts = say([d * 3], eos=[tiny_tokenizer.eos_token_id], params=replace(PARAMS, max_new_tokens=3, stop=("cd",)))
    assert rollouts.texts == ["ddd"]
    assert rollouts.truncated.tolist() == [True]


def test_modes_are_put_back_module_by_module(model, engine, requests) -> None:
    model.train()
    model.model.layers[1].eval()  # a part that its owner froze
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    modes = [module.training for module in model.modules()]
    flags = [getattr(module, "gradient_checkpointing", None) for module in model.modules()]
    assert any(modes)
    assert not all(modes)
    assert any(flags)
    seen: list[tuple[bool, bool]] = []
    handle = model.model.layers[0].register_forward_pre_hook(lambda m, args: seen.append((m.training, m.gradient_checkpointing)))
    try:
        engine.generate(requests[:1], PARAMS, seed=0, window=0)
        assert seen
        assert set(seen) == {(False, False)}
        assert modes == [module.training for module in model.modules()]
        assert flags == [getattr(module, "gradient_checkpointing", None) for module in model.modules()]

        def explode(*args):
            raise RuntimeError("boom")

        bomb = model.model.layers[1].register_forward_pre_hook(explode)
        defaults = model.generation_config
        with pytest.raises(RuntimeError, match="boom"):
            engine.generate(requests[:1], PARAMS, seed=0, window=0)
        bomb.remove()
        assert model.generation_config is defaults
        assert modes == [module.training for module in model.modules()]
        assert flags == [getattr(module, "gradient_checkpointing", None) for module in model.modules()]
    finally:
        handle.remove()
        model.gradient_checkpointing_disable()
        model.eval()


def test_no_requests_give_no_rows(engine) -> None:
    rollouts = engine.generate([], PARAMS, seed=0, window=0)
    assert len(rollouts) == 0
    assert rollouts.texts == []


@pytest.mark.parametrize("kind", ["gpt2", "opt"])
def test_learned_positions_that_would_run_out_are_an_error(kind, tiny_tokenizer, requests) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {
        "gpt2": {"n_positions": 24, "n_embd": 16, "n_layer": 1, "n_head": 2},
        "opt": {"max_position_embeddings": 24, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 16},
    }
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, vocab_size=300, **sizes[kind])).eval()
    longest = max(len(request.prompt_ids) for request in requests)
    engine = TransformersEngine(model, tiny_tokenizer, [2])
    assert len(engine.generate(requests, replace(PARAMS, max_new_tokens=24 - longest), seed=0, window=0)) == 10
    with pytest.raises(ConfigError, match=rf"within the 24 positions that the model has learned, found {longest} \+ {25 - longest}"):
        engine.generate(requests, replace(PARAMS, max_new_tokens=25 - longest), seed=0, window=0)

"""Prompts that are read once: the log-probs and gradients of rows that are read whole."""

import copy

import pytest
import torch

from aapa_lightning.logprobs import prefix, response_logprobs, set_packing
from aapa_lightning.logprobs.inputs import rotary_limit
from aapa_lightning.loop.window import common_group_size

COMMON = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
GROUPED = COMMON | {"num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.3, "max_position_embeddings": 128}
FAMILIES = {
    "qwen3": GROUPED,
    "llama": GROUPED,
    "mistral": GROUPED | {"sliding_window": 5},
    "gemma2": GROUPED | {"sliding_window": 4},
    "gemma3_text": GROUPED | {"sliding_window": 4},
    "gpt2": {"vocab_size": 61, "n_embd": 32, "n_layer": 3, "n_head": 4, "initializer_range": 0.3, "n_positions": 128}
    | dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0),
    "phi3": GROUPED | {"pad_token_id": 0},
}
#: Of these rows cannot go on behind a prefix, or not as they are called here.
ROPE = {"rope_theta": 1e4, "original_max_position_embeddings": 8, "factor": 4.0}
UNFIT = {
    "llama": GROUPED | {"rope_parameters": ROPE | {"rope_type": "dynamic"}},
    "phi3": GROUPED
    | {"pad_token_id": 0, "original_max_position_embeddings": 8}
    | {"rope_parameters": ROPE | {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}},
    "mamba": {"vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4},
    "bloom": {"vocab_size": 61, "hidden_size": 16, "n_layer": 2, "n_head": 2},
    "qwen3_next": GROUPED | {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16, "decoder_sparse_step": 1},
}


def build(family: str, config: dict):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model(family, **config), attn_implementation="eager" if "gemma2" in family else None
    )


@pytest.fixture(autouse=True)
def always(monkeypatch):
    monkeypatch.setattr(prefix, "LEAST_SAVED", 1)


@pytest.fixture(scope="module")
def batch():
    generator = torch.Generator().manual_seed(1)
    prompts, responses, group = 3, 12, 4
    prompt_ids = torch.randint(1, 61, (prompts, 9), generator=generator).repeat_interleave(group, 0)
    prompt_mask = (torch.arange(9) >= torch.tensor([0, 4, 8])[:, None]).repeat_interleave(group, 0)
    response_ids = torch.randint(1, 61, (responses, 7), generator=generator)
    response_mask = torch.arange(7) < torch.randint(0, 8, (responses, 1), generator=generator)
    return prompt_ids, prompt_mask, response_ids, response_mask


@pytest.fixture
def calls():
    """The shapes of ``input_ids`` of every call to a model."""
    seen: list[tuple[int, ...]] = []

    def watch(model):
        model.register_forward_pre_hook(lambda m, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True)
        return seen

    return watch


def gradients(model, loss: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def value_and_gradients(model, batch, weights, **options):
    logprobs, entropy = response_logprobs(model, *batch, 0.8, entropy=True, **options)
    return logprobs, entropy, gradients(model, (logprobs * weights + 0.1 * entropy).sum())


@pytest.mark.parametrize("backend", ["full", "chunked"])
@pytest.mark.parametrize("family", FAMILIES)
def test_values_and_gradients_are_those_of_whole_rows(family, backend, batch, calls) -> None:
    model = build(family, FAMILIES[family]).eval()
    weights = torch.randn(batch[2].shape, generator=torch.Generator().manual_seed(2))
    whole = value_and_gradients(model, batch, weights, backend=backend)
    prefix.can_share(model)
    seen = calls(model)
    shared = value_and_gradients(model, batch, weights, backend=backend, group_size=4)
    assert (3, 8) in seen, "each prompt but its last token is read once"
    assert set(seen) <= {(3, 8), (12, 8)}
    for found, expected in zip([*shared[:2], *shared[2]], [*whole[:2], *whole[2]], strict=True):
        torch.testing.assert_close(found, expected, atol=5e-5, rtol=1e-3)


@pytest.mark.parametrize("family", UNFIT)
def test_models_that_remember_something_else_read_whole_rows(family, batch, calls) -> None:
    model = build(family, UNFIT[family]).eval()
    state = torch.get_rng_state()
    assert not prefix.can_share(model)
    assert torch.equal(torch.get_rng_state(), state)
    response_logprobs(model, *batch)  # the trial of padding
    seen = calls(model)
    response_logprobs(model, *batch, group_size=4)
    limit, longest = rotary_limit(model), int((batch[1].sum(1) + batch[3].sum(1)).max())
    if limit is None or longest <= limit:
        assert seen == [(12, 16)]
    else:  # rows of one length together, beyond the limit
        assert sum(rows for rows, _ in seen) == 12
        assert len({width for _, width in seen}) == len(seen) > 1


def test_what_does_not_share(batch, calls, tiny_model_dir) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    response_logprobs(model, *batch)  # the trial of padding
    seen = calls(model)
    response_logprobs(model, *batch)
    assert seen == [(12, 16)]  # no groups
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert not prefix.sharing_pays(model, batch[1], 4)  # recomputed layers take no cache
    model.gradient_checkpointing_disable()
    assert prefix.sharing_pays(model, batch[1], 4)
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    # a prompt must not lose the same units in every row of its group, whatever mode the model is in when it is first asked
    assert not prefix.can_share(copy.deepcopy(model))
    assert not prefix.can_share(copy.deepcopy(model).eval())


def test_few_tokens_are_not_worth_a_call(batch, monkeypatch, tiny_model_dir) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    monkeypatch.setattr(prefix, "LEAST_SAVED", 9 * 8 + 1)
    assert not prefix.sharing_pays(model, batch[1], 4)
    monkeypatch.setattr(prefix, "LEAST_SAVED", 9 * 8)
    assert prefix.sharing_pays(model, batch[1], 4)


def test_adapters_and_packing_go_with_it(batch, calls) -> None:
    from peft import LoraConfig, get_peft_model

    model = build("qwen3", GROUPED)
    set_packing(model, True)
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj", "lm_head"], init_lora_weights=False)).eval()
    weights = torch.randn(batch[2].shape, generator=torch.Generator().manual_seed(2))
    whole = value_and_gradients(adapted, batch, weights)
    prefix.can_share(adapted)
    seen = calls(model)
    shared = value_and_gradients(adapted, batch, weights, group_size=4)
    assert set(seen) == {(3, 8), (12, 8)}
    for found, expected in zip([*shared[:2], *shared[2]], [*whole[:2], *whole[2]], strict=True):
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("groups", "size"),
    [([0, 0, 1, 1, 5, 5], 2), ([0, 0, 1], 1), ([0, 1, 0, 1], 1), ([3, 3, 3], 3), ([0, 1, 2], 1), ([], 1), ([0, 0, 1, 1, 0, 0], 1)],
)
def test_groups_that_share(groups, size) -> None:
    assert common_group_size(torch.tensor(groups, dtype=torch.int64)) == size

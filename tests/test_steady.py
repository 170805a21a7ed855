"""Models that draw random numbers beside dropout: in training they compute what they compute in evaluation, or are refused."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn

from aapa_lightning.errors import ConfigError
from aapa_lightning.logprobs import sequence_logprobs
from aapa_lightning.policy import PolicySpec, load_policy

COMMON = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
MOE = COMMON | {"num_local_experts": 4, "num_experts_per_tok": 2, "initializer_range": 0.2}
DECODER = {"d_model": 16, "decoder_layers": 4, "encoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 32, "is_decoder": True}
FAMILIES = {
    "phimoe": MOE,
    "mixtral": MOE | {"router_jitter_noise": 0.3},
    "minimax": MOE | {"router_jitter_noise": 0.3, "head_dim": 8},
    "bart": DECODER | {"decoder_layerdrop": 0.5},
    "falcon": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "attention_dropout": 0.5, "hidden_dropout": 0.5},
    "opt": {
        "hidden_size": 16,
        "word_embed_proj_dim": 16,
        "ffn_dim": 16,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "layerdrop": 0.5,
    },
}
IDS = torch.randint(3, 290, (2, 9), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS, dtype=torch.bool)


def states():
    return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()


@pytest.fixture
def load(tiny_tokenizer, tmp_path):
    tiny_tokenizer.save_pretrained(tmp_path)
    return lambda family, **options: load_policy(
        PolicySpec(tokenizer=str(tmp_path), config={"model_type": family} | FAMILIES[family], **options)
    )[0]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_training_computes_what_evaluation_computes(family, checkpointing, load):
    model = load(family, activation_checkpointing=checkpointing)
    frozen, before = copy.deepcopy(model).eval(), states()
    first, again = sequence_logprobs(model.train(), IDS, MASK), sequence_logprobs(model, IDS, MASK)
    assert states() == before
    expected = sequence_logprobs(frozen, IDS, MASK)
    assert torch.equal(first, expected)
    assert torch.equal(again, expected)
    first.sum().backward()
    assert sum(p.grad is not None and bool(p.grad.any()) for p in model.parameters()) > len(list(model.parameters())) / 2
    # Lightning switches modes around a validation, and copies of a model listen to their own calls
    other = copy.deepcopy(model).eval()
    assert model.training
    assert not any(module.training for module in other.modules())
    assert torch.equal(sequence_logprobs(model.eval().train(), IDS, MASK), expected)
    assert torch.equal(sequence_logprobs(other.train(), IDS, MASK), expected)


def test_randomness_that_was_asked_for_stays(load):
    model = load("mixtral", disable_dropout=False).train()
    assert not torch.equal(sequence_logprobs(model, IDS, MASK), sequence_logprobs(model, IDS, MASK))


class Noisy(nn.Module):
    """Draws in evaluation too."""

    def forward(self, hidden):
        return hidden * (1 + 0.1 * random.random() + 0.1 * float(np.random.rand()))


def test_what_evaluation_mode_does_not_end_is_refused(load):
    model = load("opt").train()
    model.model.decoder.layers[1].self_attn.k_proj = nn.Sequential(model.model.decoder.layers[1].self_attn.k_proj, Noisy())
    with pytest.raises(ConfigError, match=r"OPTForCausalLM draws random numbers beside dropout, in model\.decoder\.layers\.1\..*\(Noisy\)"):
        sequence_logprobs(model, IDS, MASK)

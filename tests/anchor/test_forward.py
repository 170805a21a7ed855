"""Forward passes of a frozen encoder: shared prompts, batches by length, and linear layers through oneDNN."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from aapa_lightning.anchor import forward
from aapa_lightning.anchor.context import ContextRow, Encoding
from aapa_lightning.anchor.encoder import FrozenEncoder
from aapa_lightning.anchor.forward import RowEncoder
from aapa_lightning.anchor.onednn import use_onednn
from aapa_lightning.anchor.prefix import can_share
from aapa_lightning.anchor.segment import Segmenter, segment_texts

SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 24,
    "initializer_range": 0.3,
}
FAMILIES = {
    "qwen3": {},
    "llama": {},
    "gpt_neox": {},
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 24},
    "gemma": {},
    "phi": {},
}


def tiny(family, language_model=False, **overrides):
    torch.manual_seed(0)
    loader = AutoModelForCausalLM if language_model else AutoModel
    return loader.from_config(AutoConfig.for_model(family, **{**SIZES, **FAMILIES.get(family, {}), **overrides})).eval()


def rows_of(heads, tails):
    """Rows of tokens that nothing else knows: every head with every tail."""
    return [ContextRow([*head, *tail], [], [-1] * len(head) + [0] * len(tail), len(head)) for head in heads for tail in tails]


def hidden_of(encoder, rows):
    """Hidden states of the tokens after the heads, by row."""
    found = {}
    for encoded in encoder(rows, range(len(rows))):
        for b, (i, skipped) in enumerate(zip(encoded.rows, encoded.skipped, strict=True)):
            found[i] = encoded.hidden[b, rows[i].head - skipped : len(rows[i].ids) - skipped]
    return [found[i] for i in range(len(rows))]


HEADS, TAILS = [[1, 2, 3, 4, 5, 6, 7], [8, 9], [5, 4, 3, 2, 1]], [[9], [3, 1, 4, 1, 5, 9, 2], [6, 5]]


@pytest.mark.parametrize("likelihood", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_shared_prompt_changes_no_value(family, likelihood):
    model = tiny(family, likelihood)
    encoding = Encoding(layers=(1, -1), likelihood=likelihood)
    shared, whole = RowEncoder(model, encoding, 0, causal=True), RowEncoder(model, encoding, 0, causal=True)
    whole._pays = lambda heads, tokens: False
    assert can_share(model)
    rows = rows_of(HEADS, TAILS)
    for found, expected in zip(hidden_of(shared, rows), hidden_of(whole, rows), strict=True):
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    assert shared._pays({i: tuple(row.ids[: row.head]) for i, row in enumerate(rows)}, 72)


def test_a_shared_prompt_is_read_once():
    model, rows = tiny("qwen3"), rows_of(HEADS, TAILS)
    encoder = RowEncoder(model, Encoding(), 0, causal=True)
    assert encoder._can_share
    tokens = []
    model.register_forward_pre_hook(lambda module, args, kwargs: tokens.append(kwargs["input_ids"].shape), with_kwargs=True)
    hidden_of(encoder, rows)
    assert tokens == [(3, 7), (9, 7)]


@pytest.mark.parametrize("family", ["mistral", "qwen2", "mamba", "bert"])
def test_a_model_that_forgets_is_read_in_one_piece(family):
    """Windows (given as one number or layer by layer), a recurrence, and attention in both directions."""
    windows = {"mistral": {"sliding_window": 4}, "qwen2": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}}
    model = tiny(family, **windows.get(family, {}))
    assert not can_share(model)
    rows = rows_of(HEADS[:1], TAILS)
    found = hidden_of(RowEncoder(model, Encoding(), 0, causal=True), rows)
    with torch.no_grad():
        for row, hidden in zip(rows, found, strict=True):
            expected = model(input_ids=torch.tensor([row.ids])).last_hidden_state[0, row.head :]
            if family != "mamba":  # which reads padding, as it always has
                torch.testing.assert_close(hidden, expected, atol=2e-5, rtol=1e-4)


def test_sharing_waits_until_it_pays():
    encoder = RowEncoder(tiny("qwen3"), Encoding(), 0, causal=True)
    same, other = tuple(range(9)), tuple(range(9, 18))
    assert encoder._pays({0: same, 1: same}, 40)
    assert not encoder._pays({0: same, 1: other}, 40)
    assert not encoder._pays({0: same[:1], 1: same[:1]}, 40)  # one token of forty
    assert not encoder._pays({0: (), 1: ()}, 40)
    assert not encoder._pays({}, 0)
    assert not RowEncoder(encoder.model, Encoding(), 0, causal=False)._pays({0: same, 1: same}, 40)


@pytest.mark.parametrize("shared", [True, False])
def test_batches_keep_to_the_budget(shared, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    heads = HEADS if shared else [torch.randint(40, (6,), generator=generator).tolist() for _ in range(7)]
    tails = [torch.randint(40, (int(n),), generator=generator).tolist() for n in torch.randint(1, 15, (7,), generator=generator)]
    rows = rows_of(heads, tails) if shared else [rows_of([head], [tail])[0] for head, tail in zip(heads, tails, strict=True)]
    model = tiny("qwen3")
    expected = hidden_of(RowEncoder(model, Encoding(), 0, causal=True), rows)
    for budget, cpu in ((20, 1024), (4096, 20)):
        monkeypatch.setattr(forward, "_CPU_TOKENS", cpu)
        encoder = RowEncoder(model, Encoding(batch_tokens=budget), 0, causal=True)
        encoded = list(encoder(rows, range(len(rows))))
        sizes = [(len(one.rows), one.hidden.shape[1]) for one in encoded]
        assert all(n * width <= 20 or n == 1 for n, width in sizes)
        assert len(sizes) > 3
        assert sorted(i for one in encoded for i in one.rows) == list(range(len(rows)))
        for found, value in zip(hidden_of(encoder, rows), expected, strict=True):
            torch.testing.assert_close(found, value, atol=2e-5, rtol=1e-4)


def test_an_encoder_gives_a_group_what_it_gives_its_members(tiny_model_dir):
    texts = ["The boats rest calmly. The gulls call.", "abc def.", "A quiet harbor. It waits.", ""]
    prompts = ["Describe the harbor in two sentences."] * 4
    spans = segment_texts(texts, Segmenter()).char_spans
    for encoding in (Encoding(), Encoding(layers=(1, -1), likelihood=True), Encoding(max_length=24)):
        encoder = FrozenEncoder(str(tiny_model_dir), encoding)
        together = encoder(prompts, texts, spans)
        assert encoder._forward._can_share
        alone = [encoder(prompts[i : i + 1], texts[i : i + 1], spans[i : i + 1]) for i in range(4)]
        torch.testing.assert_close(together.embeddings, torch.cat([one.embeddings for one in alone]), atol=1e-5, rtol=1e-4)
        assert together.counts.tolist() == [count for one in alone for count in one.counts.tolist()]


@pytest.mark.parametrize("family", ["qwen3", "gpt_neox", "gemma"])
def test_onednn_computes_the_same_network(family):
    model, ids = tiny(family), torch.arange(12).view(2, 6)
    usual = copy.deepcopy(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert use_onednn(model) == sum(type(module) is nn.Linear for module in usual.modules()) > 0
    with torch.no_grad():
        torch.testing.assert_close(model(ids).last_hidden_state, usual(ids).last_hidden_state, atol=2e-5, rtol=1e-4)
    assert {name: value.tolist() for name, value in model.state_dict().items()} == {n: v.tolist() for n, v in before.items()}
    copied = copy.deepcopy(model)
    for weight in copied.parameters():
        weight.data.zero_()
    with torch.no_grad():
        assert not torch.equal(copied(ids).last_hidden_state, model(ids).last_hidden_state)
    assert torch.equal(model.bfloat16()(ids).last_hidden_state, usual.bfloat16()(ids).last_hidden_state)


def test_onednn_leaves_gradients_alone():
    layer = nn.Sequential(nn.Linear(4, 3))
    assert use_onednn(layer) == 1
    layer(torch.ones(2, 4)).sum().backward()
    assert layer[0].weight.grad.tolist() == [[2.0] * 4] * 3
    with torch.no_grad():
        assert layer(torch.ones(0, 4)).shape == (0, 3)


def test_onednn_spares_a_block_that_only_looks_gated():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 4)

        def forward(self, x):
            return 2 * self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))

    block, x = Scaled(), torch.randn(3, 4)
    with torch.no_grad():
        expected = block(x)
        use_onednn(block)
        torch.testing.assert_close(block(x), expected)


@pytest.mark.parametrize("family", ["qwen3", "gpt2", "bert", "roberta"])
def test_layers_above_the_pooled_one_do_not_run(family):
    model, rows = tiny(family, **({"head_dim": 8} if family == "qwen3" else {})), rows_of(HEADS, TAILS)
    causal = family in ("qwen3", "gpt2")
    (blocks,) = [part for part in model.modules() if isinstance(part, nn.ModuleList) and len(part) == 3]
    ran = []
    blocks[2].register_forward_hook(lambda *_: ran.append(1))
    shallow = RowEncoder(model, Encoding(layers=(2, 1, -4)), 0, causal=causal)
    assert shallow._shallow is not None
    del ran[:]
    found = hidden_of(shallow, rows)
    assert bool(ran) == (causal and shallow._can_share)  # the shared prompts alone are read to the end
    deep = RowEncoder(model, Encoding(layers=(2, 1, -4)), 0, causal=causal)
    deep.__dict__["_shallow"] = None
    for mine, theirs in zip(found, hidden_of(deep, rows), strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=1e-4)
    assert RowEncoder(model, Encoding(layers=(1, -1)), 0, causal=causal)._shallow is None
    assert RowEncoder(tiny("albert"), Encoding(layers=(1,)), 0, causal=False)._shallow is None

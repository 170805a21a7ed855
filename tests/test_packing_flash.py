"""Variable-length flash attention: on a CPU through transformers' own code with kernels written in torch, on a GPU the real ones."""

import importlib.util
import warnings

import pytest
import torch
import torch.nn.functional as F

from aapa_lightning.attention import _FLASH, use_flash_attention
from aapa_lightning.logprobs import response_logprobs, set_packing

SIZES = {"vocab_size": 60, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
BF16 = torch.bfloat16
gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def build(kind="qwen3", layers=2, **options):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    sizes = SIZES | {"num_hidden_layers": layers, "initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes), **options).eval()


def make_batch(device="cpu", rows=6, prompt=9, response=40):
    g = torch.Generator().manual_seed(0)
    prompts, responses = torch.randint(3, 60, (rows, prompt), generator=g), torch.randint(3, 60, (rows, response), generator=g)
    prompt_mask = torch.arange(prompt) >= torch.randint(0, prompt, (rows, 1), generator=g)
    lengths = torch.randint(0, response + 1, (rows, 1), generator=g)
    lengths[0] = 0
    return [part.to(device) for part in (prompts, prompt_mask, responses, torch.arange(response) < lengths)]


def everything(model, batch, backend):
    model.zero_grad()
    logprobs, entropy = response_logprobs(model, *batch, 0.7, entropy=True, backend=backend)
    upstream = torch.linspace(-1, 1, logprobs.numel(), device=logprobs.device).view_as(logprobs)
    (logprobs * upstream + entropy * upstream.flip(0)).sum().backward()
    return logprobs.detach(), entropy.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def attend(q, k, v, causal, softmax_scale, window_size=(-1, -1)):
    """Causal attention ``[1, H, T, D]`` with fewer key heads and a window."""
    rows = torch.arange(q.shape[2])
    back = rows[:, None] - rows
    seen = back >= 0
    if window_size[0] >= 0:
        seen &= back <= window_size[0]
    assert causal
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=softmax_scale, enable_gqa=True)


@pytest.fixture
def varlen(monkeypatch):
    """Put flash attention's two functions, in torch, where transformers keeps those it has imported; returns the calls' arguments."""
    from transformers import modeling_flash_attention_utils as utils

    calls = []

    def flash_attn_func(q, k, v, causal=False, softmax_scale=None, window_size=(-1, -1)):
        out = attend(*(x.transpose(1, 2) for x in (q, k, v)), causal, softmax_scale, window_size)
        return out.transpose(1, 2)

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal=False, softmax_scale=None, window_size=(-1, -1)
    ):
        calls.append((cu_seqlens_q, max_seqlen_q))
        assert torch.equal(cu_seqlens_q, cu_seqlens_k)
        assert cu_seqlens_q.dtype == torch.int32
        assert cu_seqlens_q.diff().max() == max_seqlen_q == max_seqlen_k
        sizes = cu_seqlens_q.diff().tolist()
        parts = zip(*(x.split(sizes) for x in (q, k, v)), strict=True)
        out = [attend(*(x.transpose(0, 1)[None] for x in part), causal, softmax_scale, window_size)[0].transpose(0, 1) for part in parts]
        return torch.cat(out)

    monkeypatch.setattr(utils, "_loaded_implementation", "flash_attention_4")
    monkeypatch.setattr(utils, "_flash_fn", flash_attn_func)
    monkeypatch.setattr(utils, "_flash_varlen_fn", flash_attn_varlen_func)
    monkeypatch.setattr(utils, "_pad_fn", utils._pad_input)
    monkeypatch.setattr(utils, "_unpad_fn", utils._unpad_input)
    monkeypatch.setattr(utils, "_process_flash_kwargs_fn", utils._lazy_define_process_function(flash_attn_varlen_func))
    return calls


def flashed(kind="qwen3", **options):
    model = build(kind, **options)
    model.config._attn_implementation_internal = "flash_attention_4"
    return model


@pytest.mark.parametrize("backend", ["full", "chunked"])
@pytest.mark.parametrize("kind", ["qwen3", "mistral", "mixtral", "gemma3_text"])
def test_auto_packs_all_rows_into_one(varlen, kind, backend):
    """One call of the kernel a layer, with the bounds of the rows said once; values and gradients of padded SDPA."""
    batch = make_batch()
    expected = everything(build(kind, attn_implementation="sdpa"), batch, backend)
    model = flashed(kind)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="batches of")
        everything(model, batch, backend)  # the trial, and what the model does to its logits
    varlen.clear()
    shapes = []
    model.register_forward_pre_hook(lambda _, args, inputs: shapes.append(tuple(inputs["input_ids"].shape)), with_kwargs=True)
    torch.testing.assert_close(everything(model, batch, backend), expected, rtol=1e-4, atol=2e-5)
    lengths = batch[1].sum(1) + batch[3].sum(1)
    assert shapes == [(1, int(lengths.sum()))]
    assert len(varlen) == 2
    assert varlen[0][0].diff().tolist() == lengths.tolist()


def test_padded_rows_under_flash_attention(varlen):
    batch = make_batch()
    model = flashed()
    set_packing(model, False)
    expected, _ = response_logprobs(build(attn_implementation="sdpa"), *batch)
    torch.testing.assert_close(response_logprobs(model, *batch)[0], expected)


def test_windows_shorter_than_a_row(varlen):
    batch = make_batch()
    expected, _ = response_logprobs(build("gemma3_text", attn_implementation="sdpa"), *batch)
    model = flashed("gemma3_text")
    for part in (model.config, *(layer.self_attn for layer in model.model.layers)):
        part.sliding_window = 3
    narrow = build("gemma3_text", attn_implementation="sdpa")
    narrow.config.sliding_window = 3
    found, _ = response_logprobs(model, *batch)
    torch.testing.assert_close(found, response_logprobs(narrow, *batch)[0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, expected, atol=1e-3)


def test_layers_that_do_not_hear_of_the_rows_are_found(varlen):
    """A model whose attention gets neither positions nor bounds would read all rows as one: the trial says so."""
    model = flashed()
    for layer in model.model.layers:
        forward = layer.self_attn.forward

        def deaf(*args, forward=forward, position_ids=None, cu_seq_lens_q=None, **options):
            return forward(*args, **options)

        layer.self_attn.forward = deaf
    batch = make_batch()
    with pytest.warns(UserWarning, match="packed rows see each other"):
        found, _ = response_logprobs(model, *batch)
    torch.testing.assert_close(found, response_logprobs(build(attn_implementation="sdpa"), *batch)[0])


# On a GPU -----------------------------------------------------------------------------------------------------------------------------

RELEASES = {"flash_attention_2": "flash_attn", "flash_attention_4": "flash_attn.cute"}


def installed(name):
    """Skip where a release of flash attention is not installed, or is for other GPUs."""
    import transformers.utils

    if not getattr(transformers.utils, f"is_flash_attn_{name[-1]}_available")():
        pytest.skip(f"{name} is not installed")
    assert importlib.util.find_spec(RELEASES[name])
    if torch.cuda.get_device_capability()[0] not in _FLASH[name].majors:
        pytest.skip(f"{name} is not for this GPU")


@pytest.mark.parametrize("backend", ["full", "chunked"])
@pytest.mark.parametrize("kind", ["qwen3", "mistral"])  # experts would be chosen by rounding
@pytest.mark.parametrize("name", [*RELEASES, "sdpa"])
@pytest.mark.parametrize("mixed", [True, False])
class TestOnAGpu:
    pytestmark = gpu

    def test_packed_rows_equal_padded_float32(self, name, kind, backend, mixed):
        """In bfloat16, weights or arithmetic: as near to float32 as padded SDPA is, twice over."""
        if name != "sdpa":
            installed(name)
        batch = make_batch("cuda", rows=32, prompt=30, response=300)
        exact = everything(build(kind, attn_implementation="sdpa").cuda(), batch, backend)
        found = {}
        for attention, packing in (("sdpa", False), (name, True)):
            model = build(kind, attn_implementation=attention, dtype=torch.float32 if mixed else BF16).cuda()
            set_packing(model, packing)
            with warnings.catch_warnings(), torch.autocast("cuda", BF16, enabled=mixed):
                warnings.filterwarnings("error", message="batches of")
                found[attention, packing] = everything(model, batch, backend)
        padded, packed = found["sdpa", False], found[name, True]
        for part in range(2):
            allowed = 2 * (padded[part].float() - exact[part]).abs().max() + 1e-3
            assert (packed[part].float() - exact[part]).abs().max() <= allowed
        for name_, gradient in exact[2].items():
            allowed = 2 * (padded[2][name_].float() - gradient).norm() + 1e-3 * gradient.norm()
            assert (packed[2][name_].float() - gradient).norm() <= allowed, name_


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", list(RELEASES))
def test_auto_finds_what_is_installed(name):
    installed(name)
    model = build().cuda()
    chosen = use_flash_attention(model, BF16)
    assert chosen >= name
    assert chosen.startswith("flash_attention")
    assert use_flash_attention(build(), torch.float32) == "sdpa"

"""Heads of many models, met inside the model's own forward: equal to full logits, with every change a model makes to its logits."""

import sys
import warnings
from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch

from aapa_lightning.errors import ConfigError, MissingDependencyError
from aapa_lightning.logprobs import head as lm_head
from aapa_lightning.logprobs import response_logprobs, sequence_logprobs, set_logprob_backend

SIZES = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "initializer_range": 0.3,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
#: Tied, untied, capped, scaled up, scaled down, with a bias, without position ids, with dimensions of other names.
MODELS = {
    "qwen3": {"tie_word_embeddings": True},
    "llama": {"tie_word_embeddings": False},
    "gemma2": {"final_logit_softcapping": 2.0},
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 6.0},
    "hyperclovax": {"logits_scaling": 6.0},
    "phi": {},
    "bloom": {"n_layer": 1, "n_head": 2},
    "mixtral": {"num_local_experts": 2},
}


def build(kind, **options):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    sizes = {name: size for name, size in SIZES.items() if kind not in ("phi", "bloom") or name not in ("num_key_value_heads", "head_dim")}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes, **MODELS[kind], **options))


@pytest.fixture
def model():
    return build("qwen3")


@pytest.fixture
def batch():
    """Left-padded prompts, and responses of 5, 2 and 0 tokens."""
    g = torch.Generator().manual_seed(0)
    prompts, responses = torch.randint(3, 50, (3, 4), generator=g), torch.randint(3, 50, (3, 5), generator=g)
    prompt_mask = torch.ones(3, 4, dtype=torch.bool)
    prompt_mask[1, :2] = False
    return prompts, prompt_mask, responses, torch.arange(5) < torch.tensor([5, 2, 0])[:, None]


def everything(model, batch, backend, **options):
    """Values, and the gradient of their sum with uneven weights."""
    model.zero_grad()
    logprobs, entropy = response_logprobs(model, *batch, 0.7, entropy=True, backend=backend, **options)
    upstream = torch.linspace(-1, 1, logprobs.numel(), device=logprobs.device).view_as(logprobs)
    (logprobs * upstream + entropy * upstream.flip(0)).sum().backward()
    return logprobs.detach(), entropy.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def same(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=5e-5)


@pytest.fixture(autouse=True)
def _no_warnings():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="log-probs of")
        yield


@pytest.mark.parametrize("kind", MODELS)
def test_every_family_equals_full_logits(kind, batch):
    model = build(kind)
    full = everything(model, batch, "full")
    same(everything(model, batch, "chunked"), full)  # the first call finds out what the model does to its logits
    same(everything(model, batch, "chunked"), full)
    ids, mask = torch.cat(batch[::2], 1), torch.ones(3, 9, dtype=torch.bool)
    same(sequence_logprobs(model, ids, mask, backend="chunked"), sequence_logprobs(model, ids, mask, backend="full"))
    assert "forward" not in model.get_output_embeddings().__dict__


def test_padding_never_reaches_the_head(model, batch, monkeypatch):
    seen = []
    streamed = lm_head.chunked_logprobs
    monkeypatch.setattr(lm_head, "chunked_logprobs", lambda *args, **options: seen.append(len(args[0])) or streamed(*args, **options))
    response_logprobs(model, *batch, backend="chunked")
    assert seen == [7]
    batch[3][:] = False
    logprobs, entropy = response_logprobs(model, *batch, entropy=True, backend="chunked")
    assert not logprobs.any()
    (logprobs.sum() + entropy.sum()).backward()  # a rank without tokens takes part in the backward pass
    assert not model.lm_head.weight.grad.any()


@pytest.mark.parametrize(
    "options", [{"target_modules": ["q_proj", "lm_head"]}, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}]
)
def test_a_head_with_adapters_makes_its_logits_a_few_tokens_at_a_time(batch, options, monkeypatch):
    peft = pytest.importorskip("peft", reason="adapters come with the extra `peft`")
    monkeypatch.setattr(lm_head, "_LOGITS_AT_ONCE", 150)  # three tokens
    model = peft.get_peft_model(build("gemma2"), peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **options)).eval()
    sizes = []
    model.get_base_model().get_output_embeddings().register_forward_hook(lambda *call: sizes.append(call[2].shape))
    full = everything(model, batch, "full")
    ours = everything(model, batch, "chunked")
    same(ours, full)
    assert any("lm_head" in name for name in ours[2])
    assert sizes[-1][-1] < 50
    with model.disable_adapter():
        same(response_logprobs(model, *batch, backend="chunked"), response_logprobs(model, *batch, backend="full"))


@pytest.mark.parametrize("change", ["shift", "cut", "twice"])
def test_a_model_that_does_the_unknown_falls_back_and_says_so_once(model, batch, change, monkeypatch):
    head, forward = model.lm_head, type(model).forward

    def odd(self, *args, **options):
        if change == "twice":
            head(torch.zeros(3, 6, 16))
        outputs = forward(self, *args, **options)
        if change == "shift":
            outputs.logits = outputs.logits + torch.arange(outputs.logits.shape[-1])
        if change == "cut":
            outputs.logits = outputs.logits[..., :40]
        return outputs

    monkeypatch.setattr(type(model), "forward", odd)
    if change == "cut":
        batch[2].clamp_(max=39)
        model.config.vocab_size = 40
    full = everything(model, batch, "full")
    with pytest.warns(UserWarning, match="log-probs of Qwen3ForCausalLM are computed from full logits"):
        ours = everything(model, batch, "chunked")
    same(ours, full)
    same(everything(model, batch, "chunked"), full)  # and no second warning


def test_the_first_call_has_the_dropout_of_every_call(batch):
    """Which cap a model has is found on the first call, and shifts no random numbers: a resumed run makes its first call anywhere."""
    model = build("gemma2", attention_dropout=0.5).train()
    made = []
    for _ in range(2):
        torch.manual_seed(3)
        made.append((response_logprobs(model, *batch, backend="chunked")[0], torch.rand(1)))
    assert torch.equal(made[0][0], made[1][0])
    assert torch.equal(made[0][1], made[1][1])
    torch.manual_seed(4)
    assert not torch.equal(response_logprobs(model, *batch, backend="chunked")[0], made[0][0])


def test_auto_goes_by_the_vocabulary(model, batch, monkeypatch):
    full, _ = response_logprobs(model, *batch, backend="full")
    assert torch.equal(response_logprobs(model, *batch)[0], full)
    calls = []
    streamed = lm_head.chunked_logprobs
    monkeypatch.setattr(lm_head, "chunked_logprobs", lambda *args, **options: calls.append(1) or streamed(*args, **options))
    monkeypatch.setattr(lm_head, "LARGE_VOCABULARY", 50)
    same(response_logprobs(model, *batch)[0], full)
    assert calls == [1]
    wrapped = torch.nn.Sequential()
    wrapped.module = model
    wrapped.forward = model.forward
    response_logprobs(wrapped, *batch)
    assert calls == [1, 1]


def test_the_choice_stays_with_the_model_and_its_copies(model, batch, monkeypatch):
    calls = []
    streamed = lm_head.chunked_logprobs
    monkeypatch.setattr(lm_head, "chunked_logprobs", lambda *args, **options: calls.append(1) or streamed(*args, **options))
    set_logprob_backend(model, "chunked")
    response_logprobs(deepcopy(model), *batch)
    assert calls == [1]
    response_logprobs(model, *batch, backend="full")
    assert calls == [1]
    with pytest.raises(ConfigError, match="logprob_backend"):
        set_logprob_backend(model, "fast")
    with pytest.raises(ConfigError, match="logprob_backend"):
        response_logprobs(model, *batch, backend="fast")


@pytest.mark.parametrize("found", [None, SimpleNamespace()], ids=["none", "old"])
def test_liger_has_to_be_there(model, monkeypatch, found):
    monkeypatch.setitem(sys.modules, "liger_kernel", found)
    monkeypatch.setitem(sys.modules, "liger_kernel.ops", found)
    with pytest.raises(MissingDependencyError, match="liger-kernel"):
        set_logprob_backend(model, "liger")


@pytest.mark.parametrize("kind", ["qwen3", "gemma2", "granite", "phi"])
def test_liger_equals_full_logits(kind, batch):
    """By its kernels where there is a GPU, else by its fallback; capped heads and heads with a bias are streamed by ours."""
    pytest.importorskip("liger_kernel", reason="an optional backend")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, batch = build(kind).to(device), [tensor.to(device) for tensor in batch]
    same(everything(model, batch, "liger"), everything(model, batch, "full"))


def test_without_a_head_or_compiled_there_are_full_logits(model, batch):
    full, _ = response_logprobs(model, *batch, backend="full")

    class Bare(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, input_ids, attention_mask, position_ids, use_cache, logits_to_keep):
            return self.inner(
                input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=use_cache, logits_to_keep=logits_to_keep
            )

    with pytest.warns(UserWarning, match="no LM head"):
        assert torch.equal(response_logprobs(Bare(), *batch, backend="chunked")[0], full)
    with pytest.warns(UserWarning, match="compiled"):
        logprobs, _ = response_logprobs(torch.compile(model, backend="eager"), *batch, backend="chunked")
    same(logprobs, full)


def test_an_error_inside_gives_the_head_back(model, batch):
    model.model.layers[0].register_forward_hook(lambda *_: (_ for _ in ()).throw(ValueError("inside")))
    with pytest.raises(ValueError, match="inside"):
        response_logprobs(model, *batch, backend="chunked")
    assert "forward" not in model.lm_head.__dict__


def test_autocast_is_that_of_the_model(model, batch):
    with torch.autocast("cpu", torch.bfloat16):
        full, ours = (everything(model, batch, backend) for backend in ("full", "chunked"))
    torch.testing.assert_close(ours[:2], full[:2], rtol=1e-4, atol=1e-4)  # the same rounded logits
    torch.testing.assert_close(ours[2], full[2], rtol=0.05, atol=0.1)  # gradients of the head are rounded elsewhere


@pytest.mark.parametrize("backend", ["full", "chunked"])
def test_entropy_for_logging_has_no_graph(model, batch, backend):
    logprobs, entropy = response_logprobs(model, *batch, entropy=True, entropy_grad=False, backend=backend)
    assert logprobs.requires_grad
    assert not entropy.requires_grad
    with torch.no_grad():  # as old log-probs are made: the same bits
        assert torch.equal(response_logprobs(model, *batch, backend=backend)[0], logprobs)


def test_no_positions_at_all_still_have_a_graph(model, batch):
    prompts, mask, *_ = batch
    logprobs, entropy = response_logprobs(model, prompts, mask, prompts[:, :0], mask[:, :0], entropy=True, backend="chunked")
    assert logprobs.shape == entropy.shape == (3, 0)
    (logprobs.sum() + entropy.sum()).backward()

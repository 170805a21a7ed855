"""Names and values of the weights that vLLM is given, and the folder that they are written to."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file

from aapa_lightning.errors import ConfigError
from aapa_lightning.rollout.vllm_weights import named_weights, share_from_first, write_weights


@pytest.fixture
def model(tiny_model_dir):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_model_dir)


def adapted(model, **options):
    peft = pytest.importorskip("peft", reason="adapters come with the extra `peft`")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], **options))
    torch.manual_seed(0)
    for name, parameter in wrapped.named_parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    return wrapped


def check_loads(state, tiny_model_dir, expected):
    """The names are those of a checkpoint, and nothing but the tied head is missing."""
    from transformers import AutoModelForCausalLM

    fresh = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    missing, unexpected = fresh.load_state_dict(state, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])
    ids = torch.arange(12)[None]
    torch.testing.assert_close(fresh(ids).logits, expected(ids).logits, rtol=1e-5, atol=1e-5)


def test_a_plain_model_gives_every_parameter_once(model, tiny_model_dir):
    state = dict(named_weights(model))
    assert list(state) == [name for name, _ in model.named_parameters()]
    assert not any(value.requires_grad for value in state.values())
    check_loads(state, tiny_model_dir, model)


def test_wrappers_leave_the_names_as_they_were(model):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    names = list(dict(named_weights(model)))
    model.model.layers[0] = checkpoint_wrapper(model.model.layers[0])
    model.model.layers[1] = torch.compile(model.model.layers[1])
    assert list(dict(named_weights(model))) == names


def test_adapters_are_merged_and_the_policy_stays_as_it_is(model, tiny_model_dir):
    plain = model.model.layers[0].self_attn.q_proj.weight.clone()
    wrapped = adapted(model, modules_to_save=["norm"])
    before = {name: value.clone() for name, value in wrapped.state_dict().items()}
    state = dict(named_weights(wrapped))
    assert not torch.equal(state["model.layers.0.self_attn.q_proj.weight"], plain)
    check_loads(state, tiny_model_dir, wrapped.eval())
    assert all(torch.equal(value, before[name]) for name, value in wrapped.state_dict().items())


def test_adapters_that_pull_tied_weights_apart_are_refused(model):
    with pytest.warns(UserWarning, match="tie_word_embeddings"):
        wrapped = adapted(model, modules_to_save=["lm_head"])
    with pytest.raises(ConfigError, match=r"pulled the tied weights model\.embed_tokens\.weight and lm_head\.weight apart"):
        list(named_weights(wrapped))


def test_adapters_on_quantised_weights_are_refused(model):
    wrapped = adapted(model)
    packed = torch.nn.Parameter(torch.zeros(4, 1, dtype=torch.uint8), requires_grad=False)
    wrapped.get_base_model().model.layers[0].self_attn.q_proj.base_layer.weight = packed
    with pytest.raises(ConfigError, match="expected adapters on whole, unquantised weights"):
        list(named_weights(wrapped))


def test_weights_are_written_in_several_files_and_one_dtype(model, tmp_path):
    weights = [*named_weights(model), ("counts", torch.arange(5))]
    folder = write_weights(weights, tmp_path / "run" / "step-3", "bfloat16", file_bytes=8_000)
    files = sorted(folder.glob("*"))
    assert len(files) > 3
    assert [file.name for file in files] == [f"model-{i:05d}.safetensors" for i in range(1, len(files) + 1)]
    state = {name: value for file in files for name, value in load_file(file).items()}
    assert state.keys() == dict(weights).keys()
    for name, value in weights:
        assert torch.equal(state[name], value.bfloat16() if value.is_floating_point() else value)
    assert sorted(folder.parent.iterdir()) == [folder]
    one = write_weights(weights, tmp_path / "one", "float32")
    assert [file.name for file in one.glob("*")] == ["model-00001.safetensors"]


def test_what_breaks_off_leaves_nothing_behind(model, tmp_path):
    def breaking():
        yield from list(named_weights(model))[:3]
        raise OSError("no more")

    with pytest.raises(OSError, match="no more"):
        write_weights(breaking(), tmp_path / "step-3", "float32", file_bytes=10)
    assert not list(tmp_path.iterdir())
    (tmp_path / ".step-3.partial").mkdir()  # of a process that was killed
    (tmp_path / ".step-3.partial" / "model-00009.safetensors").write_text("half")
    assert len(list(write_weights(named_weights(model), tmp_path / "step-3", "float32").iterdir())) == 1


def test_files_hold_a_copy(model, tmp_path):
    before = copy.deepcopy(dict(named_weights(model)))
    folder = write_weights(named_weights(model), tmp_path / "step-3", "float32")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert all(torch.equal(value, before[name]) for name, value in load_file(folder / "model-00001.safetensors").items())


def test_one_process_shares_with_itself():
    value = object()
    assert share_from_first(value) is value

"""Folders whose weights are not those that their configuration asks for: every loader names them, and none goes on with random ones."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from aapa_lightning.adapters import LoraSpec
from aapa_lightning.anchor.classifier import SequenceClassifierDiscriminator
from aapa_lightning.anchor.context import Encoding
from aapa_lightning.anchor.encoder import FrozenEncoder
from aapa_lightning.anchor.value_model import ValueModel
from aapa_lightning.cli import main
from aapa_lightning.errors import ConfigError
from aapa_lightning.export import save_adapters
from aapa_lightning.loop.classifier import load_classifier
from aapa_lightning.policy import PolicySpec, load_policy

UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def folder(tiny_model_dir, tmp_path):
    """A copy of the tiny model, to be damaged."""
    shutil.copytree(tiny_model_dir, tmp_path / "model")
    return tmp_path / "model"


def edit(folder, change, name="model.safetensors"):
    state = load_file(folder / name)
    change(state)
    save_file(state, folder / name, metadata={"format": "pt"})


def configure(folder, name="config.json", **changes):
    file = folder / name
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def spoil(folder, how):
    if how == "missing":
        edit(folder, lambda state: state.pop(UP))
        return UP
    if how == "renamed":
        edit(folder, lambda state: state.update({"model.layers.1.mlp.upper.weight": state.pop(UP)}))
        return UP
    if how == "shape":
        edit(folder, lambda state: state.update({UP: torch.zeros(3, 2)}))
        return rf"{UP} \[3, 2\], expected \[64, 32\]"
    if how == "layers":
        configure(folder, num_hidden_layers=3, layer_types=None)
        return r"model.layers.2.input_layernorm.weight, .* in all\)"
    configure(folder, tie_word_embeddings=False)
    return "lm_head.weight"


DAMAGES = ["missing", "renamed", "shape", "layers", "untied"]


@pytest.mark.parametrize("how", DAMAGES)
def test_a_policy_whose_folder_does_not_hold_it_is_refused(folder, how):
    names = spoil(folder, how)
    for spec in (PolicySpec(str(folder)), PolicySpec(str(folder), lora=LoraSpec(r=2))):
        with pytest.raises(ConfigError, match=rf"policy.model '.*model' (lacks the weights|holds weights of other shapes.*) {names}"):
            load_policy(spec)


@pytest.mark.parametrize("how", ["missing", "renamed", "shape", "layers"])
def test_so_are_encoders_classifiers_and_reward_models(folder, how):
    names = spoil(folder, how).removeprefix("model.")
    for load in (
        lambda: load_classifier(PolicySpec(str(folder))),
        lambda: FrozenEncoder(str(folder), Encoding()),
        lambda: ValueModel(str(folder), ends_with_reward_token=False),
        lambda: SequenceClassifierDiscriminator(str(folder)),
    ):
        with pytest.raises(ConfigError, match=names.replace("model.", "(model.)?")):
            load()


def test_what_may_be_missing_is_said_by_name_and_drawn_from_the_seed(folder):
    edit(folder, lambda state: [state.pop(name) for name in (UP, "model.norm.weight")])
    with pytest.raises(ConfigError, match=r"lacks the weights model.norm.weight \(1 in all\).*name each in policy.allow_missing"):
        load_policy(PolicySpec(str(folder), allow_missing=[UP]))
    spec = PolicySpec(str(folder), allow_missing=[UP, "model.norm.weight"], seed=4)
    torch.manual_seed(0)
    (one, _), state = load_policy(spec), torch.get_rng_state()
    torch.manual_seed(1)
    two, _ = load_policy(spec)
    torch.manual_seed(0)
    assert torch.equal(state, torch.get_rng_state())  # no draw of the run's own is used up
    torch.testing.assert_close(dict(one.state_dict()), dict(two.state_dict()), rtol=0, atol=0)
    other, _ = load_policy(PolicySpec(str(folder), allow_missing=[UP, "model.norm.weight"], seed=5))
    assert not torch.equal(one.state_dict()[UP], other.state_dict()[UP])


def test_weights_that_nobody_reads_are_a_warning(folder):
    edit(folder, lambda state: state.update({"model.layers.1.mlp.other": torch.zeros(3)}))
    with pytest.warns(UserWarning, match=r"holds weights that the model does not read: model.layers.1.mlp.other \(1 in all\)"):
        load_policy(PolicySpec(str(folder)))


def test_a_new_head_is_legitimate_a_lost_one_is_not(folder, tmp_path):
    model, tokenizer = load_classifier(PolicySpec(str(folder), seed=3))
    assert float(model.score.weight.detach().std()) > 0
    model.save_pretrained(tmp_path / "reward")
    tokenizer.save_pretrained(tmp_path / "reward")
    load_classifier(PolicySpec(str(tmp_path / "reward")))
    edit(tmp_path / "reward", lambda state: state.pop("score.weight"))
    with pytest.raises(ConfigError, match=r"base.model '.*reward' lacks the weights score.weight"):
        load_classifier(PolicySpec(str(tmp_path / "reward")))
    with pytest.raises(ConfigError, match="lacks the weights score"):
        ValueModel(str(tmp_path / "reward"), ends_with_reward_token=False)


ADAPTER = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
NORM = "base_model.model.model.layers.0.input_layernorm.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop(ADAPTER), "lack the weights .*layers.0.mlp.up_proj.lora_A"),
        (lambda state: state.update({f"x.{ADAPTER}": state.pop(ADAPTER)}), "lack the weights .*layers.0.mlp.up_proj.lora_A"),
        (lambda state: state.update({ADAPTER.replace(".0.", ".7."): state[ADAPTER].clone()}), "hold, beside .*layers.7.mlp.up_proj.lora_A"),
        (lambda state: state.pop(NORM), "cannot merge the adapters of .*layers.0.input_layernorm.weight"),
    ],
    ids=["missing", "renamed", "more", "whole layer"],
)
def test_adapters_that_came_half_are_refused(tiny_model_dir, tmp_path, change, message):
    spec = PolicySpec(str(tiny_model_dir), lora=LoraSpec(r=4, modules_to_save=["norm"]))
    save_adapters(*load_policy(spec), tmp_path, spec)
    load_policy(PolicySpec(str(tmp_path)))
    edit(tmp_path, change, "adapter_model.safetensors")
    with pytest.raises(ConfigError, match=message):
        load_policy(PolicySpec(str(tmp_path)))


def test_adapters_on_other_weights_than_they_were_trained_on_are_refused(folder, tmp_path):
    spec = PolicySpec(str(folder), lora=LoraSpec(r=4))
    save_adapters(*load_policy(spec), tmp_path / "adapter", spec)
    edit(folder, lambda state: state.update({UP: state[UP] + 0.01}))
    with pytest.raises(ConfigError, match=r"were trained on other weights \(fingerprint .* or remove aapa_base.json"):
        load_policy(PolicySpec(str(tmp_path / "adapter")))
    (tmp_path / "adapter" / "aapa_base.json").write_text("{")
    with pytest.raises(ConfigError, match="aapa_base"):
        load_policy(PolicySpec(str(tmp_path / "adapter")))
    (tmp_path / "adapter" / "aapa_base.json").unlink()
    load_policy(PolicySpec(str(tmp_path / "adapter")))


def test_a_run_ends_before_it_begins(folder, tmp_path, capsys):
    spoil(folder, "missing")
    (tmp_path / "data.jsonl").write_text('{"prompt": "abc", "expert": "def"}\n' * 4)
    words = ["fit", "--model", "SFTModule", "--model.policy.model", str(folder), "--data.train", str(tmp_path / "data.jsonl")]
    words += ["--trainer.max_steps", "1", "--trainer.accelerator", "cpu", "--trainer.logger", "false", "--run_dir", str(tmp_path / "run")]
    assert main([*words, "--model.batch_size", "2"]) == 2
    said = capsys.readouterr().err
    assert f"lacks the weights {UP}" in said
    assert "Traceback" not in said

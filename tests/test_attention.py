"""Which attention a model gets: by what is installed, the GPU, the dtype of the forward pass, and the model itself."""

import importlib.metadata
import re
from types import SimpleNamespace

import pytest
import torch
import transformers.utils

from aapa_lightning import attention
from aapa_lightning.attention import compute_dtype, resolve_attention, use_flash_attention
from aapa_lightning.errors import ConfigError, MissingDependencyError
from aapa_lightning.policy import PolicySpec, load_policy

BF16 = torch.bfloat16


class Model:
    """What transformers shows of a model with flash attention."""

    _supports_flash_attn = True
    _compatible_flash_implementations = None

    def __init__(self, head_dim=128, dropout=0.0, softcap=None, broken=()):
        text = SimpleNamespace(attn_logit_softcapping=softcap)
        self.config = SimpleNamespace(_attn_implementation="sdpa", get_text_config=lambda: text)
        self.layer = SimpleNamespace(head_dim=head_dim, attention_dropout=dropout)
        self.broken = broken

    def modules(self):
        return [self, self.layer]

    def set_attn_implementation(self, name):
        if name in self.broken:
            raise OSError("undefined symbol")
        self.config._attn_implementation = name


@pytest.fixture
def machine(monkeypatch):
    """A machine with a GPU of a given capability and some releases of flash attention."""

    def make(capability=(9, 0), releases=(2, 3, 4)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        for release in (2, 3, 4):
            monkeypatch.setattr(transformers.utils, f"is_flash_attn_{release}_available", lambda found=release in releases: found)

    return make


def test_without_a_gpu_nothing_changes():
    assert use_flash_attention(Model(), BF16) == "sdpa"


@pytest.mark.parametrize(
    ("capability", "releases", "chosen"),
    [
        ((9, 0), (2, 3, 4), "flash_attention_4"),
        ((10, 0), (2, 3, 4), "flash_attention_4"),
        ((9, 0), (2, 3), "flash_attention_3"),
        ((10, 0), (2, 3), "flash_attention_2"),
        ((12, 0), (2, 4), "flash_attention_2"),
        ((8, 0), (2, 3, 4), "flash_attention_2"),
        ((7, 5), (2, 3, 4), "sdpa"),
        ((9, 0), (), "sdpa"),
    ],
)
def test_the_newest_release_that_the_gpu_runs(machine, capability, releases, chosen):
    machine(capability, releases)
    assert use_flash_attention(Model(), BF16) == chosen
    assert use_flash_attention(Model(), torch.float32) == "sdpa"


@pytest.mark.parametrize(
    ("options", "hopper", "blackwell"),
    [
        ({"head_dim": 64}, "flash_attention_4", "flash_attention_4"),
        ({"head_dim": 256}, "flash_attention_4", "flash_attention_4"),
        ({"head_dim": 192}, "flash_attention_4", "flash_attention_2"),
        ({"head_dim": 512}, "sdpa", "sdpa"),
        ({"head_dim": 36}, "sdpa", "sdpa"),
        ({"head_dim": None}, "sdpa", "sdpa"),
        ({"softcap": 50.0}, "flash_attention_2", "flash_attention_2"),
        ({"dropout": 0.1}, "flash_attention_2", "flash_attention_2"),
    ],
)
def test_what_the_model_needs_decides(machine, options, hopper, blackwell):
    machine((9, 0))
    assert use_flash_attention(Model(**options), BF16) == hopper
    machine((10, 0))
    assert use_flash_attention(Model(**options), BF16) == blackwell


def test_what_the_model_allows_decides(machine, monkeypatch):
    machine()
    monkeypatch.setattr(Model, "_compatible_flash_implementations", ["flash_attention_3"])
    assert use_flash_attention(Model(), BF16) == "flash_attention_3"
    monkeypatch.setattr(Model, "_supports_flash_attn", False)
    assert use_flash_attention(Model(), BF16) == "sdpa"


def test_a_broken_build_is_named_and_the_next_taken(machine):
    machine()
    with pytest.warns(UserWarning, match="flash_attention_4 is installed and cannot be used: OSError: undefined symbol"):
        assert use_flash_attention(Model(broken=("flash_attention_4",)), BF16) == "flash_attention_3"


def test_mixed_precision_counts_as_its_16_bits():
    assert compute_dtype(torch.float32, "16-mixed") == torch.float16
    assert compute_dtype(torch.float32, "32-true") == compute_dtype(torch.float32) == torch.float32
    assert compute_dtype(BF16) == BF16


@pytest.mark.parametrize("name", ["flash_attention_2", "flash_attention_3", "flash_attention_4"])
def test_a_release_asked_for_by_name_has_to_be_there(monkeypatch, name):
    flash = attention._FLASH[name]

    def missing(found):
        raise importlib.metadata.PackageNotFoundError(found)

    monkeypatch.setattr(attention, "distribution", missing)
    monkeypatch.setattr(transformers.utils, "is_kernels_available", lambda: False)
    with pytest.raises(MissingDependencyError, match=f"expected the package {flash.package}, found none; {re.escape(flash.install)}"):
        resolve_attention(name, BF16)
    monkeypatch.setattr(transformers.utils, "is_kernels_available", lambda: True)  # it brings its own
    assert resolve_attention(name, BF16) == name


def test_a_release_asked_for_by_name_computes_in_16_bits(monkeypatch):
    monkeypatch.setattr(attention, "distribution", lambda found: found)
    assert resolve_attention("flash_attention_4", torch.float32, "bf16-mixed") == "flash_attention_4"
    assert resolve_attention("flash_attention_4", torch.float32) == "flash_attention_4"  # whoever calls it may use autocast
    with pytest.raises(ConfigError, match=r"bf16-mixed or a 16-bit policy\.dtype, found 32-true and float32"):
        resolve_attention("flash_attention_4", torch.float32, "32-true")


def test_other_names_are_passed_on():
    assert resolve_attention("eager", torch.float32, "32-true") == "eager"
    assert resolve_attention("auto", torch.float32) is None


@pytest.mark.parametrize("kind", ["qwen3", "gemma2", "bloom"])
def test_auto_loads_models_without_sdpa(tiny_model_dir, kind):
    """Soft caps and ALiBi have no SDPA in transformers, which refuses to load such a model with it."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    model, _ = load_policy(
        PolicySpec(config={"model_type": kind, **(sizes if kind != "bloom" else {"n_head": 2})}, tokenizer=str(tiny_model_dir))
    )
    assert model.config._attn_implementation == ("sdpa" if model._supports_sdpa else "eager")
    assert model._supports_sdpa == (kind == "qwen3") or kind == "gemma2"  # which had it once, without its caps

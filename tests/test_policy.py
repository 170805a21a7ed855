import json
import shutil
from pathlib import Path

import pytest
import torch

from aapa_lightning.errors import ConfigError
from aapa_lightning.logprobs.head import streaming_backend
from aapa_lightning.policy import (
    PolicySpec,
    eos_token_ids,
    load_policy,
    load_tokenizer,
    parse_dtype,
)


@pytest.fixture
def tokenizer_dir(tiny_tokenizer, tmp_path) -> str:
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    return str(tmp_path / "tokenizer")


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.tensor([[5, 6, 7, 8]])).logits


def test_from_config_has_the_tokenizers_ids_and_its_own_seed(tokenizer_dir, tiny_config) -> None:
    config = {key: value for key, value in tiny_config.items() if key != "vocab_size"}
    torch.manual_seed(0)
    state = torch.get_rng_state()
    model, tokenizer = load_policy(PolicySpec(config=config, tokenizer=tokenizer_dir))
    assert torch.equal(torch.get_rng_state(), state)
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert model.dtype == torch.float32
    assert model.config._attn_implementation == "sdpa"  # what `auto` is without a GPU
    again, _ = load_policy(PolicySpec(config=config, tokenizer=tokenizer_dir))
    other, _ = load_policy(PolicySpec(config=config, tokenizer=tokenizer_dir, seed=1))
    assert torch.equal(logits(again), logits(model))
    assert not torch.equal(logits(other), logits(model))


def test_from_folder_with_overrides(tiny_model_dir) -> None:
    from transformers import AutoModelForCausalLM

    model, tokenizer = load_policy(PolicySpec(model=str(tiny_model_dir)))
    torch.testing.assert_close(logits(model), logits(AutoModelForCausalLM.from_pretrained(tiny_model_dir)), atol=0, rtol=0)
    assert tokenizer.eos_token_id == 2
    spec = PolicySpec(
        model=str(tiny_model_dir),
        config={"attention_dropout": 0.5},
        dtype="bfloat16",
        attn_implementation="eager",
        activation_checkpointing=True,
    )
    model, _ = load_policy(spec)
    assert model.dtype == torch.bfloat16
    assert model.config.attention_dropout == 0.5
    assert model.config._attn_implementation == "eager"
    assert model.model.layers[0].self_attn.attention_dropout == 0.0
    assert model.is_gradient_checkpointing
    kept, _ = load_policy(PolicySpec(model=str(tiny_model_dir), config={"attention_dropout": 0.5}, disable_dropout=False))
    assert kept.model.layers[0].self_attn.attention_dropout == 0.5


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16},
        {
            "model_type": "opt",
            "hidden_size": 16,
            "word_embed_proj_dim": 16,
            "ffn_dim": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
        },
    ],
    ids=["modules", "numbers"],
)
def test_disabled_dropout_makes_training_mode_deterministic(tokenizer_dir, config) -> None:
    model, _ = load_policy(PolicySpec(config=config, tokenizer=tokenizer_dir))
    model.train()
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(model(ids).logits, model(ids).logits)


def test_dtypes() -> None:
    assert parse_dtype("float16") == torch.float16
    for wrong in ("int64", "fp32", "nn", "Tensor"):
        with pytest.raises(ConfigError, match=f"float32, bfloat16 or float16, found '{wrong}'"):
            parse_dtype(wrong)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (PolicySpec(), "expected `tokenizer`"),
        (PolicySpec(model="/no/such/folder"), "cannot load a tokenizer from '/no/such/folder'"),
        (PolicySpec(model="nobody/no-such-model"), "cannot load a tokenizer from 'nobody/no-such-model'"),
        (PolicySpec(config={"model_type": "qwen3"}), "expected `tokenizer`"),
    ],
    ids=["nothing", "folder", "name", "config-alone"],
)
def test_what_cannot_be_found_is_named(spec, message) -> None:
    with pytest.raises(ConfigError, match=message):
        load_policy(spec)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "`config` with `model_type`"),
        ({"hidden_size": 8}, "`config` with `model_type`"),
        ({"model_type": "no-such-type"}, "policy.config.*no-such-type"),
        ({"model_type": "vit"}, "policy.config: cannot build a causal LM"),
        ({"model_type": "qwen3", "hidden_size": "many"}, "policy.config.*hidden_size.*many"),
    ],
    ids=["none", "no-type", "unknown-type", "no-language-model", "wrong-value"],
)
def test_bad_configs(tokenizer_dir, config, message) -> None:
    with pytest.raises(ConfigError, match=message):
        load_policy(PolicySpec(config=config, tokenizer=tokenizer_dir))


def test_folders_that_hold_no_policy(tmp_path, tokenizer_dir, tiny_model_dir) -> None:
    with pytest.raises(ConfigError, match=r"policy.model: cannot load a causal LM"):
        load_policy(PolicySpec(model=str(tmp_path), tokenizer=tokenizer_dir))
    bare = tmp_path / "bare"
    shutil.copytree(tiny_model_dir, bare, ignore=lambda folder, names: [name for name in names if "token" in name or "chat" in name])
    with pytest.raises(ConfigError, match=r"policy.tokenizer: cannot load a tokenizer"):
        load_policy(PolicySpec(model=str(bare)))
    load_policy(PolicySpec(model=str(bare), tokenizer=tokenizer_dir))
    with pytest.raises(ConfigError, match=r"policy.model.*no_such_option"):
        load_policy(PolicySpec(model=str(tiny_model_dir), config={"no_such_option": 1}))
    (bare / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(ConfigError, match=r"policy.model: cannot load a causal LM"):
        load_policy(PolicySpec(model=str(bare), tokenizer=tokenizer_dir))


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(tokenizer_dir, tiny_config, tiny_tokenizer) -> None:
    with pytest.raises(ConfigError, match=f"tokenizer has {len(tiny_tokenizer)} tokens, the model's vocabulary 100"):
        load_policy(PolicySpec(config=tiny_config | {"vocab_size": 100}, tokenizer=tokenizer_dir))
    model, _ = load_policy(PolicySpec(config=tiny_config | {"vocab_size": 512}, tokenizer=tokenizer_dir))
    assert model.config.vocab_size == 512


def _edit_tokenizer(folder: str, **changes: str | None) -> None:
    path = Path(folder) / "tokenizer_config.json"
    path.write_text(json.dumps({key: value for key, value in (json.loads(path.read_text()) | changes).items() if value is not None}))


def test_eos_is_needed_and_padding_is_not(tokenizer_dir) -> None:
    _edit_tokenizer(tokenizer_dir, pad_token=None)
    tokenizer = load_tokenizer(PolicySpec(tokenizer=tokenizer_dir))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    _edit_tokenizer(tokenizer_dir, eos_token=None)
    with pytest.raises(ConfigError, match="has no EOS token"):
        load_tokenizer(PolicySpec(tokenizer=tokenizer_dir))


def test_every_eos_of_the_generation_config_counts(tiny_model_dir, tmp_path) -> None:
    folder = tmp_path / "chat"
    shutil.copytree(tiny_model_dir, folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 5]}))
    model, tokenizer = load_policy(PolicySpec(model=str(folder)))
    assert eos_token_ids(model, tokenizer) == (2, 5, 7)
    for given, found in ((5, (2, 5)), (2, (2,)), (None, (2,))):
        model.generation_config.eos_token_id = given
        assert eos_token_ids(model, tokenizer) == found


def test_code_that_comes_with_a_model_does_not_run_unless_asked(tiny_model_dir, tmp_path) -> None:
    assert PolicySpec().trust_remote_code is False
    folder, ran = tmp_path / "remote", tmp_path / "ran"
    shutil.copytree(tiny_model_dir, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "code.Mine", "AutoModelForCausalLM": "code.MineLM"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(f"open({str(ran)!r}, 'w').close()\n")
    with pytest.raises(ConfigError, match="cannot load"):
        load_policy(PolicySpec(model=str(folder)))
    assert not ran.exists()


def test_the_backend_of_logprobs_is_the_specs(tiny_model_dir):
    model, _ = load_policy(PolicySpec(model=str(tiny_model_dir), logprob_backend="chunked"))
    assert streaming_backend(model, None) == "chunked"
    assert streaming_backend(load_policy(PolicySpec(model=str(tiny_model_dir)))[0], None) is None
    with pytest.raises(ConfigError, match="logprob_backend"):
        load_policy(PolicySpec(model="nothing", logprob_backend="tiles"))

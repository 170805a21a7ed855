import json
import shutil
from pathlib import Path

import pytest
import torch

from aapa_lightning.errors import ConfigError
from aapa_lightning.lm_head import streaming_backend
from aapa_lightning.policy import (
    PolicySpec,
    eos_token_ids,
    export_policy,
    load_policy,
    load_tokenizer,
    parse_dtype,
    policy_state,
    resolve_attention,
    save_policy,
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


def test_attention_auto_needs_gpu_half_precision_and_the_package(monkeypatch) -> None:
    import transformers.utils

    assert resolve_attention("auto", torch.float32) == "sdpa"
    assert resolve_attention("eager", torch.float32) == "eager"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(transformers.utils, "is_flash_attn_2_available", lambda: True)
    assert resolve_attention("auto", torch.bfloat16) == "flash_attention_2"
    assert resolve_attention("auto", torch.float32) == "sdpa"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert resolve_attention("auto", torch.bfloat16) == "sdpa"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(transformers.utils, "is_flash_attn_2_available", lambda: False)
    assert resolve_attention("auto", torch.bfloat16) == "sdpa"


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


@pytest.fixture(scope="module")
def checkpoint(tiny_model_dir, tmp_path_factory) -> tuple[Path, torch.Tensor]:
    """A checkpoint that Lightning wrote after one step, and the policy's logits then."""
    import lightning as L

    from aapa_lightning.data.datamodule import AapaDataModule
    from aapa_lightning.modules.sft import SFTModule
    from aapa_lightning.types import Record

    folder = tmp_path_factory.mktemp("run")
    model = SFTModule(PolicySpec(model=str(tiny_model_dir)), batch_size=2, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    trainer = L.Trainer(
        max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, default_root_dir=folder
    )
    trainer.fit(model, AapaDataModule([Record("abc", ("def",)), Record("ghi", ("jkl",))]))
    trainer.save_checkpoint(folder / "last.ckpt")
    return folder / "last.ckpt", logits(model.model)


def test_export_writes_a_folder_that_transformers_loads(checkpoint, tiny_model_dir, tmp_path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path, expected = checkpoint
    assert export_policy(path, tmp_path / "export") == tmp_path / "export"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    assert torch.equal(logits(model), expected)
    assert not torch.equal(expected, logits(AutoModelForCausalLM.from_pretrained(tiny_model_dir)))
    assert model.dtype == torch.float32
    assert model.generation_config.eos_token_id == 2
    tokenizer, original = (AutoTokenizer.from_pretrained(folder) for folder in (tmp_path / "export", tiny_model_dir))
    assert tokenizer.get_vocab() == original.get_vocab()
    assert tokenizer.chat_template == original.chat_template
    assert not list((tmp_path / "export").glob("*.bin"))
    again, _ = load_policy(PolicySpec(model=str(tmp_path / "export")))
    assert torch.equal(logits(again), expected)


def test_export_takes_a_tokenizer_that_has_moved(checkpoint, tokenizer_dir, tmp_path) -> None:
    loaded = torch.load(checkpoint[0], weights_only=True)
    loaded["aapa"]["policy"]["tokenizer"] = str(tmp_path / "gone")
    torch.save(loaded, tmp_path / "moved.ckpt")
    with pytest.raises(ConfigError, match="cannot load a tokenizer from"):
        export_policy(tmp_path / "moved.ckpt", tmp_path / "export")
    export_policy(tmp_path / "moved.ckpt", tmp_path / "export", tokenizer=tokenizer_dir)
    assert (tmp_path / "export" / "tokenizer.json").exists()


def test_export_refuses_what_is_not_a_policys_checkpoint(checkpoint, tmp_path) -> None:
    def refused(message: str, content: object = None) -> None:
        path = tmp_path / "some.ckpt"
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content is not None:
            torch.save(content, path)
        with pytest.raises(ConfigError, match=message):
            export_policy(path, tmp_path / "export")
        assert not (tmp_path / "export").exists()

    refused("found nothing at .*some.ckpt")
    refused("some.ckpt is not a checkpoint", b"text, no checkpoint")
    refused("holds no policy", {"state_dict": {}})
    refused("holds no policy", torch.zeros(2))
    refused("some.ckpt is not a checkpoint", {"model": torch.nn.Linear(1, 1)})  # pickled objects are never loaded
    loaded = torch.load(checkpoint[0], weights_only=True)
    name = next(iter(loaded["state_dict"]))
    refused("lacks weights", loaded | {"state_dict": {k: v for k, v in loaded["state_dict"].items() if k != name and "lm_head" not in k}})
    foreign = loaded["aapa"]["policy"] | {"config": loaded["aapa"]["policy"]["config"] | {"model_type": "of_its_own"}}
    refused("no model type 'of_its_own'", loaded | {"aapa": {"policy": foreign}})
    with pytest.raises(ConfigError, match="found nothing"):
        export_policy(tmp_path, tmp_path / "export")


def test_policy_state_strips_the_modules_prefix() -> None:
    one, two = torch.zeros(1), torch.ones(1)
    assert policy_state({"state_dict": {"model.model.x": one, "other.model.y": two}}) == {"model.x": one}


def test_save_policy_round_trip(tiny_model_dir, tmp_path) -> None:
    model, tokenizer = load_policy(PolicySpec(model=str(tiny_model_dir)))
    save_policy(model, tokenizer, tmp_path)
    again, _ = load_policy(PolicySpec(model=str(tmp_path)))
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize(("model_type", "warns"), [("qwen3", False), ("qwen2", True)])
def test_a_folder_that_reads_its_tokenizer_differently_is_announced(model_type, warns, tiny_config, tiny_tokenizer, tmp_path, recwarn):
    from transformers import AutoConfig, AutoModelForCausalLM

    # transformers reads the tokenizer of every qwen2 folder with Qwen2Tokenizer, which splits text in another way
    config = AutoConfig.for_model(**tiny_config | {"model_type": model_type})
    save_policy(AutoModelForCausalLM.from_config(config), tiny_tokenizer, tmp_path)
    assert any("will not be read back with the tokenizer" in str(warning.message) for warning in recwarn) == warns


def test_a_generation_config_that_cannot_be_written_does_not_cost_the_model(tiny_model_dir, tmp_path) -> None:
    from transformers import GenerationConfig

    model, tokenizer = load_policy(PolicySpec(model=str(tiny_model_dir)))
    model.generation_config = GenerationConfig(temperature=0.9, eos_token_id=[1, 2])  # a temperature, but no do_sample
    with pytest.warns(UserWarning, match="generation config is not valid, so only its special tokens are written: .*temperature"):
        save_policy(model, tokenizer, tmp_path)
    again, _ = load_policy(PolicySpec(model=str(tmp_path)))
    assert torch.equal(logits(again), logits(model))
    assert again.generation_config.eos_token_id == [1, 2]
    assert again.generation_config.temperature is None


def test_the_backend_of_logprobs_is_the_specs(tiny_model_dir):
    model, _ = load_policy(PolicySpec(model=str(tiny_model_dir), logprob_backend="chunked"))
    assert streaming_backend(model, None) == "chunked"
    assert streaming_backend(load_policy(PolicySpec(model=str(tiny_model_dir)))[0], None) is None
    with pytest.raises(ConfigError, match="logprob_backend"):
        load_policy(PolicySpec(model="nothing", logprob_backend="tiles"))

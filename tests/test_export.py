from pathlib import Path

import pytest
import torch

from aapa_lightning.adapters import LoraSpec
from aapa_lightning.chat_templates import read_chat_template
from aapa_lightning.errors import ConfigError
from aapa_lightning.export import export_policy, policy_state, save_policy
from aapa_lightning.policy import PolicySpec, load_policy


@pytest.fixture
def tokenizer_dir(tiny_tokenizer, tmp_path) -> str:
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    return str(tmp_path / "tokenizer")


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.tensor([[5, 6, 7, 8]])).logits


def one_step(spec: PolicySpec, folder: Path) -> tuple[Path, torch.Tensor]:
    """A checkpoint that Lightning wrote after one step, and the policy's logits then."""
    import lightning as L

    from aapa_lightning.data.datamodule import AapaDataModule
    from aapa_lightning.modules.sft import SFTModule
    from aapa_lightning.types import Record

    model = SFTModule(spec, batch_size=2, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    trainer = L.Trainer(
        max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, default_root_dir=folder
    )
    trainer.fit(model, AapaDataModule([Record("abc", ("def",)), Record("ghi", ("jkl",))]))
    trainer.save_checkpoint(folder / "last.ckpt")
    return folder / "last.ckpt", logits(model.model)


@pytest.fixture(scope="module")
def checkpoint(tiny_model_dir, tmp_path_factory) -> tuple[Path, torch.Tensor]:
    """``one_step`` of the tiny model."""
    return one_step(PolicySpec(model=str(tiny_model_dir)), tmp_path_factory.mktemp("run"))


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


@pytest.mark.parametrize("lora", [None, LoraSpec(r=2)])
def test_export_keeps_a_chosen_chat_template(lora, tiny_model_dir, tmp_path) -> None:
    from transformers import AutoTokenizer

    file = tmp_path / "mine.jinja"
    file.write_text(text := read_chat_template("chatml", AutoTokenizer.from_pretrained(tiny_model_dir)) + "{# mine #}")
    path, _ = one_step(PolicySpec(model=str(tiny_model_dir), chat_template=str(file), lora=lora), tmp_path)
    file.unlink()
    export_policy(path, tmp_path / "export")
    assert AutoTokenizer.from_pretrained(tmp_path / "export").chat_template == text
    assert AutoTokenizer.from_pretrained(tiny_model_dir).chat_template != text


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

"""What is spelled like a path is looked for here, and nowhere else."""

import pytest

from aapa_lightning.anchor.classifier import SequenceClassifierDiscriminator
from aapa_lightning.anchor.context import Encoding
from aapa_lightning.anchor.encoder import FrozenEncoder
from aapa_lightning.anchor.value_model import ValueModel, load_tokenizer
from aapa_lightning.errors import ConfigError
from aapa_lightning.files import refuse_missing
from aapa_lightning.loop.classifier import load_classifier
from aapa_lightning.policy import PolicySpec, load_policy
from aapa_lightning.policy import load_tokenizer as load_policy_tokenizer

HERE = ("runs/policy", "./policy", "/a", "~/model", "policy/", "a/b/c", "model.safetensors", "train.CSV", "data.jsonl.gz")


def test_paths_that_are_missing_are_refused_and_names_are_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for name in HERE:
        with pytest.raises(FileNotFoundError, match="does not exist; expected a folder that is here, or a Hub name"):
            refuse_missing(name)
    for name in ("gpt2", "Qwen/Qwen3-0.6B", "google/IFEval", "org/name-v1.5", "runs"):
        refuse_missing(name)


@pytest.mark.parametrize(
    "load",
    [
        lambda name, _: load_policy_tokenizer(PolicySpec(name)),
        lambda name, good: load_policy(PolicySpec(name, tokenizer=good)),
        lambda name, good: load_policy(PolicySpec(name, tokenizer=good), weights=False),
        lambda name, _: load_tokenizer(name, trust_remote_code=False),
        lambda name, _: ValueModel(name, ends_with_reward_token=False),
        lambda name, _: FrozenEncoder(name, Encoding()),
        lambda name, _: SequenceClassifierDiscriminator(name),
        lambda name, _: load_classifier(PolicySpec(name)),
        lambda name, good: load_classifier(PolicySpec(name, tokenizer=good)),
    ],
)
def test_models_that_are_not_here_are_not_looked_up(load, tmp_path, monkeypatch, tiny_model_dir):
    import transformers

    def refuse(*args, **kwargs):
        if str(args[0]) != str(tiny_model_dir):
            raise AssertionError(f"{args[0]} was looked up")
        return real(*args, **kwargs)

    real = transformers.AutoTokenizer.from_pretrained
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", refuse)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(ConfigError, match=r"runs/policy does not exist"):
        load("runs/policy", str(tiny_model_dir))

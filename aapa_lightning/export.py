"""A policy's way back to a Hugging Face folder."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from aapa_lightning.errors import ConfigError, in_one_line
from aapa_lightning.policy import PolicySpec, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def policy_state(checkpoint: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The policy's weights out of a Lightning checkpoint, without the ``model.`` prefix."""
    return {name.removeprefix("model."): value for name, value in checkpoint["state_dict"].items() if name.startswith("model.")}


def export_policy(checkpoint: str | Path, out: str | Path, *, tokenizer: str | None = None) -> Path:
    """Write a Hugging Face folder (safetensors, config, tokenizer) from a checkpoint of this library.

    Args:
        checkpoint: a ``.ckpt`` file; read with ``weights_only=True``.
        out: folder to write.
        tokenizer: where the tokenizer lies now, if it has moved since training.

    Returns:
        ``out``, which ``AutoModelForCausalLM.from_pretrained`` loads.

    Raises:
        ConfigError: the file is missing, not of this library, of a model type that transformers lacks, or its tokenizer is gone.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    path = Path(checkpoint)
    if not path.is_file():
        raise ConfigError(f"export: expected a checkpoint file, found nothing at {path}")
    loaded = _read_checkpoint(path)
    saved = loaded.get("aapa", {}).get("policy")
    if saved is None:
        raise ConfigError(f"export: {path} holds no policy; expected a checkpoint written by a policy module such as GRPOModule")
    settings = dict(saved["config"])
    try:
        config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    except ValueError as error:  # code that came with the weights
        kind = saved["config"]["model_type"]
        raise ConfigError(f"export: transformers has no model type {kind!r}; use the folder export/ that the run itself wrote") from error
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    state = policy_state(loaded)
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    missing = [name for name, value in model.named_parameters() if value.is_meta]
    if missing:
        raise ConfigError(f"export: {path} lacks weights of the policy it describes: {', '.join(missing[:3])}")
    if saved["generation_config"]:
        model.generation_config = GenerationConfig(**saved["generation_config"])
    loaded_tokenizer = load_tokenizer(PolicySpec(tokenizer=tokenizer or saved["tokenizer"]))
    save_policy(model, loaded_tokenizer, out)
    return Path(out)


def _read_checkpoint(path: Path) -> dict[str, Any]:
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a file that torch did not write fails in many ways
        raise ConfigError(f"export: {path} is not a checkpoint of tensors and primitives: {in_one_line(error)}") from error
    return loaded if isinstance(loaded, dict) else {}


def save_policy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, out: str | Path) -> None:
    """Write model and tokenizer as a Hugging Face folder.

    Warns when the folder's tokenizer would not be this one: transformers picks the tokenizer's class by the model's type for some types,
    and then reads the same files differently. Warns also of a generation config that transformers refuses to write.
    """
    from transformers import AutoTokenizer

    _mend_generation_config(model)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    saved = AutoTokenizer.from_pretrained(out)
    if saved.get_vocab() != tokenizer.get_vocab() or _pre_tokenizer(saved) != _pre_tokenizer(tokenizer):
        warnings.warn(
            f"{out} will not be read back with the tokenizer it was trained with: transformers takes {type(saved).__name__} for "
            f"{model.config.model_type} models. Pass the original tokenizer as policy.tokenizer, or train a model of another type",
            stacklevel=2,
        )


def _mend_generation_config(model: PreTrainedModel) -> None:
    """Keep the special tokens alone of a generation config that does not pass transformers' own check; some published models have one."""
    from transformers import GenerationConfig

    config = getattr(model, "generation_config", None)
    if config is None:
        return
    try:
        config.validate(strict=True)
    except ValueError as error:
        warnings.warn(
            f"the model's generation config is not valid, so only its special tokens are written: {in_one_line(error)}", stacklevel=3
        )
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        model.generation_config = GenerationConfig(**{name: getattr(config, name) for name in names})


def _pre_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    return str(getattr(getattr(tokenizer, "backend_tokenizer", None), "pre_tokenizer", ""))

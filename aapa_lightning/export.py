"""A policy's way back to a Hugging Face folder."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from aapa_lightning.adapter_checkpoints import check_base, check_names, saved_spec
from aapa_lightning.adapters import adapter_names, has_adapters
from aapa_lightning.adapters.quantization import is_quantized
from aapa_lightning.adapters.weights import adapter_base, assembled, merged_model, save_adapter
from aapa_lightning.errors import ConfigError, in_one_line
from aapa_lightning.files import whole_folder
from aapa_lightning.policy import PolicySpec, load_policy, load_tokenizer
from aapa_lightning.sharding.files import in_memory, is_checkpoint_folder, is_deepspeed_folder, read_checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


#: Files of an earlier export that must not lie beside a new one: transformers would read them in its place.
STALE = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "adapter_config.json")


def policy_state(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The policy's weights out of a Lightning checkpoint, without the ``model.`` prefix."""
    return {name.removeprefix("model."): value for name, value in checkpoint["state_dict"].items() if name.startswith("model.")}


def export_policy(
    checkpoint: str | Path, out: str | Path, *, tokenizer: str | None = None, base: str | None = None, adapter: bool = False
) -> Path:
    """Write a Hugging Face folder (safetensors, config, tokenizer) from a checkpoint of this library, adapters merged.

    Args:
        checkpoint: a ``.ckpt`` file, or the folder of a sharded one; no objects are unpickled.
        out: folder to write.
        tokenizer: where the tokenizer lies now, if it has moved since training.
        base: where the base model of the adapters lies now, if it has moved.
        adapter: write the adapters alone.

    Returns:
        ``out``, which ``AutoModelForCausalLM.from_pretrained`` loads; with ``adapter`` ``PeftModel.from_pretrained`` does.

    Raises:
        ConfigError: the file is missing, not of this library, of a model type that transformers lacks, or its tokenizer is gone; adapters
            asked for where there are none, or a base model on which they were not trained.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    path = Path(checkpoint)
    if not (path.is_file() or is_checkpoint_folder(path) or is_deepspeed_folder(path)):
        raise ConfigError(f"export: expected a checkpoint, file or folder, found nothing at {path}")
    loaded = _read_checkpoint(path)
    saved = loaded.get("aapa", {}).get("policy")
    if saved is None:
        raise ConfigError(f"export: {path} holds no policy; expected a checkpoint written by a policy module such as GRPOModule")
    if "lora" in saved:
        _export_adapters(loaded, saved, out, PolicySpec(base, tokenizer=tokenizer), adapter)
        return Path(out)
    if adapter or base:
        raise ConfigError(f"export: {path} holds whole weights, no adapters; leave --adapter and --base out")
    settings = dict(saved["config"])
    try:
        config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    except ValueError as error:  # code that came with the weights
        kind = saved["config"]["model_type"]
        raise ConfigError(f"export: transformers has no model type {kind!r}; use the folder export/ that the run itself wrote") from error
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    state = in_memory(policy_state(loaded))
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    missing = [name for name, value in model.named_parameters() if value.is_meta]
    if missing:
        raise ConfigError(f"export: {path} lacks weights of the policy it describes: {', '.join(missing[:3])}")
    if saved["generation_config"]:
        model.generation_config = GenerationConfig(**saved["generation_config"])
    loaded_tokenizer = _with_template(load_tokenizer(PolicySpec(tokenizer=tokenizer or saved["tokenizer"])), saved)
    save_policy(model, loaded_tokenizer, out)
    return Path(out)


def _with_template(tokenizer: PreTrainedTokenizerBase, saved: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    """The tokenizer with the chat template that the policy was trained with, where it was not the tokenizer's own."""
    if "chat_template" in saved:
        tokenizer.chat_template = saved["chat_template"]
    return tokenizer


def _export_adapters(loaded: Mapping[str, Any], saved: Mapping[str, Any], out: str | Path, moved: PolicySpec, adapter: bool) -> None:
    trained = saved_spec(saved["lora"])
    spec = replace(trained, model=moved.model or trained.model, tokenizer=moved.tokenizer or saved["tokenizer"], quantization="none")
    try:
        model, tokenizer = load_policy(spec)
    except ConfigError as error:
        raise ConfigError(
            f"export: what the adapters lie on: {error}; name it with --base if it has moved, or use the run's export/"
        ) from error
    if trained.quantization == "none":
        check_base(saved["lora"], model, repr(spec.model))
    _with_template(tokenizer, saved)
    check_names(loaded["state_dict"], model)
    model.load_state_dict(in_memory(policy_state(loaded)), strict=False)
    if adapter:
        save_adapters(model, tokenizer, out, spec)
    else:
        save_policy(merged_model(model), tokenizer, out)


def save_trained(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    out: str | Path,
    spec: PolicySpec,
    state: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write a policy at the end of its training: a Hugging Face folder, adapters merged. ``state`` is as of ``save_policy``.

    Adapters on weights that were quantised in training are merged into the weights as they were before. Where the base model comes
    quantised as it is, there are none, and the adapters alone are written, with a warning.
    """
    if not has_adapters(model):
        save_policy(model, tokenizer, out, state)
    elif state is not None:
        save_policy(merged_model(assembled(model, state)), tokenizer, out)
    elif not is_quantized(model):
        save_policy(merged_model(model), tokenizer, out)
    elif spec.quantization == "none":
        warnings.warn(f"{out} holds the adapters alone: {spec.model} has no weights to merge them into but quantised ones", stacklevel=2)
        save_adapters(model, tokenizer, out, spec)
    else:
        whole, _ = load_policy(replace(spec, quantization="none", activation_checkpointing=False))
        state, kept = model.state_dict(), adapter_names(model)
        whole.load_state_dict({name: state[name] for name in kept}, strict=False)
        save_policy(merged_model(whole), tokenizer, out)


def save_adapters(model: Any, tokenizer: PreTrainedTokenizerBase, out: str | Path, spec: PolicySpec) -> None:
    """Write a policy's adapters and its tokenizer.

    Raises:
        ConfigError: no folder holds what they lie on: random weights, or weights with other adapters merged.
    """
    if spec.model is None or adapter_base(spec.model, spec.revision) is not None:
        below = "random weights" if spec.model is None else f"{spec.model} with its own adapters merged"
        raise ConfigError(f"export: the adapters lie on {below}, which no folder holds; leave --adapter out to write them merged")
    with whole_folder(out, STALE) as folder:
        save_adapter(model, folder, spec.model, spec.revision)
        tokenizer.save_pretrained(folder)


def _read_checkpoint(path: Path) -> dict[str, Any]:
    try:
        loaded = read_checkpoint(path)
    except ConfigError as error:
        raise ConfigError(f"export: {error}") from error
    return loaded if isinstance(loaded, dict) else {}


def save_policy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, out: str | Path, state: dict[str, torch.Tensor] | None = None
) -> None:
    """Write model and tokenizer as a Hugging Face folder, whole or not at all; ``state`` is the whole state dictionary of a sharded model.

    Warns when the folder's tokenizer would not be this one: transformers picks the tokenizer's class by the model's type for some types,
    and then reads the same files differently. Warns also of a generation config that transformers refuses to write.
    """
    from transformers import AutoTokenizer

    _mend_generation_config(model)
    with whole_folder(out, STALE) as folder:
        model.save_pretrained(folder, state_dict=state)
        tokenizer.save_pretrained(folder)
        saved = AutoTokenizer.from_pretrained(folder)
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

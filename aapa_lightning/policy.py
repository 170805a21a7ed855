"""The policy: any Hugging Face causal LM and its tokenizer, loaded lazily; and its way back to a Hugging Face folder."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from aapa_lightning.errors import ConfigError, MissingDependencyError
from aapa_lightning.lm_head import check_backend, set_logprob_backend

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(slots=True)
class PolicySpec:
    """Which model to train, and how to load it.

    Args:
        model: a local folder or a Hub name. None builds a model from ``config`` with random weights.
        config: ``AutoConfig`` arguments with ``model_type`` (for a model from scratch), or overrides of the loaded config.
        tokenizer: folder or name; None uses ``model``.
        revision: Hub revision of model and tokenizer.
        dtype: dtype of the master weights; float32 unless you know why not (updates at small learning rates round away in bfloat16).
        attn_implementation: ``auto`` picks flash-attention 2 when it is installed, the GPU is capable and the dtype is 16-bit,
            else SDPA; any name that transformers knows is passed on.
        trust_remote_code: run Python code that comes with the model. Off unless you ask.
        activation_checkpointing: recompute activations in the backward pass to save memory.
        disable_dropout: set every dropout to 0, so that old and new log-probs come from the same function.
        seed: seed of the weights of a model built from ``config``.
        logprob_backend: how log-probs come from the LM head: ``auto`` (streamed for vocabularies of 16,384 and more), ``full`` (logits),
            ``chunked`` (streamed) or ``liger``.
    """

    model: str | None = None
    config: dict[str, Any] | None = None
    tokenizer: str | None = None
    revision: str | None = None
    dtype: str = "float32"
    attn_implementation: str = "auto"
    trust_remote_code: bool = False
    activation_checkpointing: bool = False
    disable_dropout: bool = True
    seed: int = 0
    logprob_backend: str = "auto"


def resolve_attention(name: str, dtype: torch.dtype) -> str:
    """The attention implementation that ``auto`` stands for on this machine; other names are returned unchanged.

    Raises:
        MissingDependencyError: flash-attention 2 is asked for by name and not installed.
    """
    if name == "flash_attention_2" and not find_spec("flash_attn"):
        raise MissingDependencyError(
            "policy.attn_implementation=flash_attention_2: expected the package flash-attn, found none; "
            "pip install 'aapa-lightning[flash]', or use auto or sdpa"
        )
    if name != "auto":
        return name
    from transformers.utils import is_flash_attn_2_available

    capable = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 8
    half = dtype in (torch.bfloat16, torch.float16)
    return "flash_attention_2" if capable and half and is_flash_attn_2_available() else "sdpa"


def parse_dtype(name: str) -> torch.dtype:
    """``"float32"`` to ``torch.float32``.

    Raises:
        ConfigError: it is no floating dtype.
    """
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ConfigError(f"policy.dtype: expected float32, bfloat16 or float16, found {name!r}")
    return dtype


def load_tokenizer(spec: PolicySpec) -> PreTrainedTokenizerBase:
    """The policy's tokenizer. A missing padding token becomes the EOS: masks never look at ids, so the two may be equal.

    Raises:
        ConfigError: no tokenizer is named, it cannot be loaded, or it has no EOS token.
    """
    from transformers import AutoTokenizer

    source = spec.tokenizer or spec.model
    if source is None:
        raise ConfigError("policy: expected `tokenizer` (a folder or name) beside `config`, found none; `aapa data tokenizer` trains one")
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, revision=spec.revision, trust_remote_code=spec.trust_remote_code)
    except Exception as error:  # transformers, tokenizers and the Hub client raise errors of their own
        raise ConfigError(f"policy.tokenizer: cannot load a tokenizer from {source!r}: {_cause(error)}") from error
    if len(tokenizer) == len(set(tokenizer.all_special_ids)):  # transformers makes an empty one where the files are missing
        raise ConfigError(f"policy.tokenizer: cannot load a tokenizer from {source!r}: it holds no tokens; set `tokenizer`")
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"policy.tokenizer: {source!r} has no EOS token, so no response could ever end; set `eos_token` in its config")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_policy(spec: PolicySpec) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load model and tokenizer as ``spec`` says.

    Raises:
        ConfigError: nothing to load, nothing there, or a vocabulary that does not hold the tokenizer's tokens.
    """
    check_backend(spec.logprob_backend)
    tokenizer = load_tokenizer(spec)
    dtype = parse_dtype(spec.dtype)
    attention = resolve_attention(spec.attn_implementation, dtype)
    model = _from_config(spec, tokenizer, dtype, attention) if spec.model is None else _from_folder(spec.model, spec, dtype, attention)
    vocabulary = cast("nn.Embedding", model.get_input_embeddings()).num_embeddings
    if len(tokenizer) > vocabulary:
        raise ConfigError(
            f"policy: the tokenizer has {len(tokenizer)} tokens, the model's vocabulary {vocabulary}; "
            "use the model's own tokenizer or set config.vocab_size"
        )
    if spec.disable_dropout:
        disable_dropout(model)
    if spec.activation_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    set_logprob_backend(model, spec.logprob_backend)
    return model, tokenizer


def _from_config(spec: PolicySpec, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype, attention: str) -> PreTrainedModel:
    from transformers import AutoConfig, AutoModelForCausalLM

    if not spec.config or "model_type" not in spec.config:
        raise ConfigError("policy: expected `model` (a folder or name) or `config` with `model_type`, found neither")
    settings = {
        "vocab_size": len(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        **spec.config,
    }
    try:
        config = AutoConfig.for_model(**settings)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(spec.seed)
            return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    except Exception as error:  # every model checks its options in its own way
        raise ConfigError(f"policy.config: cannot build a causal LM: {_cause(error)}") from error


def _from_folder(source: str, spec: PolicySpec, dtype: torch.dtype, attention: str) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(
            source,
            revision=spec.revision,
            dtype=dtype,
            attn_implementation=attention,
            trust_remote_code=spec.trust_remote_code,
            **(spec.config or {}),
        )
    except Exception as error:  # transformers, safetensors, the Hub client and the model's own code raise errors of their own
        raise ConfigError(f"policy.model: cannot load a causal LM from {source!r}: {_cause(error)}") from error


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout probability to 0, in dropout modules and where a layer keeps one as a number, such as ``attention_dropout``."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and name.endswith(("dropout", "layerdrop")):
                vars(module)[name] = 0.0


def eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Every id that ends a response: the tokenizer's and those of the model's generation config (chat models often have two)."""
    ids = {tokenizer.eos_token_id}
    generation = getattr(model, "generation_config", None)
    extra = generation.eos_token_id if generation is not None else None
    ids.update(extra if isinstance(extra, list) else [extra])
    return tuple(sorted(i for i in ids if i is not None))


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
        raise ConfigError(f"export: {path} is not a checkpoint of tensors and primitives: {_cause(error)}") from error
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
        warnings.warn(f"the model's generation config is not valid, so only its special tokens are written: {_cause(error)}", stacklevel=3)
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        model.generation_config = GenerationConfig(**{name: getattr(config, name) for name in names})


def _cause(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def _pre_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    return str(getattr(getattr(tokenizer, "backend_tokenizer", None), "pre_tokenizer", ""))

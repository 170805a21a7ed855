"""A sequence classifier with one output, to be trained: out of a causal LM, an encoder, an earlier classifier, or from scratch."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch

from aapa_lightning.attention import compute_dtype, resolve_attention, use_flash_attention
from aapa_lightning.errors import ConfigError
from aapa_lightning.files import refuse_missing
from aapa_lightning.freezing import freeze_parameters
from aapa_lightning.loading import check_weights
from aapa_lightning.policy import PolicySpec, disable_dropout, parse_dtype

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load_classifier(spec: PolicySpec, precision: str = "") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load ``AutoModelForSequenceClassification`` with one output, and its tokenizer.

    The head of a folder that has one is kept; else it is drawn from ``spec.seed``. Padding is the tokenizer's, or else its EOS.

    Args:
        spec: any causal LM or encoder, or a classifier with one output; without ``model`` one from scratch.
        precision: the trainer's; mixed ones let flash attention serve float32 weights.

    Raises:
        ConfigError: nothing to load, lora, no such classifier, several outputs, body weights missing, or a vocabulary that lacks tokens.
    """
    if spec.lora is not None or spec.quantization != "none":
        raise ConfigError("base: a reward model is trained whole; leave lora and quantization out of base")
    if spec.chat_template is not None:
        raise ConfigError("base: a reward model reads text by 'template' and uses no chat template; leave chat_template out of base")
    tokenizer = _load_tokenizer(spec)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)
        model = _build(spec, tokenizer)
    vocabulary = cast("nn.Embedding", model.get_input_embeddings()).num_embeddings
    if len(tokenizer) > vocabulary:
        raise ConfigError(
            f"base: the tokenizer has {len(tokenizer)} tokens, the model's vocabulary {vocabulary}; use the model's own tokenizer"
        )
    model.config.get_text_config().pad_token_id = padding_id(tokenizer)  # a classifier finds its last token by this id
    freeze_parameters(model, spec.freeze, "base.freeze")
    if spec.disable_dropout:
        disable_dropout(model)
    if spec.attn_implementation == "auto":
        use_flash_attention(model, compute_dtype(parse_dtype(spec.dtype), precision))
    if spec.activation_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model, tokenizer


def padding_id(tokenizer: Any) -> int:
    """Id that fills up a batch, as ``ValueModel`` chooses it."""
    return int((tokenizer.eos_token_id or 0) if tokenizer.pad_token_id is None else tokenizer.pad_token_id)


def _load_tokenizer(spec: PolicySpec) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    source = spec.tokenizer or spec.model
    if source is None:
        raise ConfigError("base: expected `model` (a folder or name), or `config` and `tokenizer`, found neither")
    _loading(lambda: refuse_missing(source), f"tokenizer: cannot load a tokenizer from {source!r}")
    tokenizer = _loading(
        lambda: AutoTokenizer.from_pretrained(source, revision=spec.revision, trust_remote_code=spec.trust_remote_code),
        f"tokenizer: cannot load a tokenizer from {source!r}",
    )
    if len(tokenizer) == len(set(tokenizer.all_special_ids)):  # transformers makes an empty one where the files are missing
        raise ConfigError(f"base.tokenizer: cannot load a tokenizer from {source!r}: it holds no tokens; set `tokenizer`")
    return cast("PreTrainedTokenizerBase", tokenizer)


def _build(spec: PolicySpec, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    from transformers import AutoConfig, AutoModelForSequenceClassification

    dtype = parse_dtype(spec.dtype)
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": resolve_attention(spec.attn_implementation, dtype)}
    if spec.model is None:
        settings = {"vocab_size": len(tokenizer), "pad_token_id": padding_id(tokenizer), **(spec.config or {}), "num_labels": 1}
        if "model_type" not in settings:
            raise ConfigError("base: expected `model` (a folder or name) or `config` with `model_type`, found neither")

        def from_scratch() -> Any:
            return AutoModelForSequenceClassification.from_config(AutoConfig.for_model(**settings), **options)

        return cast("PreTrainedModel", _loading(from_scratch, "config: cannot build a sequence classifier"))
    source = spec.model
    _loading(lambda: refuse_missing(source), f"model: cannot load a sequence classifier with one output from {source!r}")
    options |= {"revision": spec.revision, "trust_remote_code": spec.trust_remote_code, **(spec.config or {}), "num_labels": 1}
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    model, info = _loading(
        lambda: AutoModelForSequenceClassification.from_pretrained(source, **options),
        f"model: cannot load a sequence classifier with one output from {spec.model!r}",
    )
    # the head of what was no classifier is new, and so is the layer of a BERT that pools for it
    trained = any(name.endswith("ForSequenceClassification") for name in model.config.architectures or ())
    new = () if trained else [name for name in info["missing_keys"] if _above(name, model)]
    info["unexpected_keys"] = [name for name in info["unexpected_keys"] if trained or not _above(name, model)]
    check_weights(info, f"base.model {source!r}", new=new, allow=spec.allow_missing, option="base.allow_missing")
    return cast("PreTrainedModel", model)


def _above(name: str, model: Any) -> bool:
    """Return whether a weight belongs to what lies on a model's body."""
    return "pooler" in name or not name.startswith(f"{model.base_model_prefix}.")


def _loading(load: Callable[[], Any], what: str) -> Any:
    try:
        return load()
    except Exception as error:  # transformers, safetensors, the Hub client and the model's own code raise errors of their own
        text = " ".join(str(error).split())
        raise ConfigError(f"base.{what}: {type(error).__name__}: {text[:300]}") from error

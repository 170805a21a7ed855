"""The policy: any Hugging Face causal LM and its tokenizer, loaded lazily."""

from __future__ import annotations

from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import nn

from aapa_lightning.adapters import LoraSpec, put_adapters
from aapa_lightning.adapters.quantization import quantization_arguments
from aapa_lightning.adapters.weights import adapter_base, merge_folder
from aapa_lightning.attention import compute_dtype, resolve_attention, use_flash_attention
from aapa_lightning.chat_templates import read_chat_template
from aapa_lightning.errors import ConfigError, in_one_line
from aapa_lightning.files import refuse_missing
from aapa_lightning.freezing import freeze_parameters
from aapa_lightning.loading import check_weights
from aapa_lightning.logprobs.head import check_backend, set_logprob_backend
from aapa_lightning.logprobs.inputs import dropouts
from aapa_lightning.logprobs.packing import check_packing, set_packing
from aapa_lightning.logprobs.steady import set_steady
from aapa_lightning.sharding.materialize import parameters_on_meta

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(slots=True)
class PolicySpec:
    """Which model to train, and how to load it.

    Args:
        model: a local folder or a Hub name, also of adapters, which are merged into their base model. None builds a model from ``config``
            with random weights.
        config: ``AutoConfig`` arguments with ``model_type`` (for a model from scratch), or overrides of the loaded config.
        tokenizer: folder or name; None uses ``model``.
        chat_template: in the place of the tokenizer's own: a file, the name of one of several that it has, or ``chatml`` or ``qwen3``,
            which mark the assistant's turns. Exports keep it.
        revision: Hub revision of model and tokenizer.
        dtype: dtype of the master weights; float32 unless you know why not (updates at small learning rates round away in bfloat16).
        attn_implementation: ``auto`` picks flash attention 4, 3 or 2 where it is installed, the GPU and the model allow it and the forward
            pass is 16-bit, else SDPA, or eager attention for models without it; any name that transformers knows is passed on.
        trust_remote_code: run Python code that comes with the model. Off unless you ask.
        activation_checkpointing: recompute activations in the backward pass to save memory.
        disable_dropout: set every dropout to 0, so that old and new log-probs come from the same function.
        seed: seed of the weights of a model built from ``config``.
        logprob_backend: how log-probs come from the LM head: ``auto`` (streamed for vocabularies of 16,384 and more), ``full`` (logits),
            ``chunked`` (streamed) or ``liger``.
        lora: train adapters in the place of the weights.
        quantization: of the weights under adapters: ``none``, ``nf4`` (QLoRA, 4 bits) or ``int8``; the last two by bitsandbytes.
        allow_missing: full names of weights that the folder lacks and that may start from random values of ``seed``. All others are errors.
        freeze: names of parameters or modules that are not trained, as patterns such as ``model.embed_tokens`` or ``model.layers.[0-3]``.
    """

    model: str | None = None
    config: dict[str, Any] | None = None
    tokenizer: str | None = None
    chat_template: str | None = None
    revision: str | None = None
    dtype: str = "float32"
    attn_implementation: str = "auto"
    trust_remote_code: bool = False
    activation_checkpointing: bool = False
    disable_dropout: bool = True
    seed: int = 0
    logprob_backend: str = "auto"
    packing: bool | Literal["auto"] = "auto"
    lora: LoraSpec | None = None
    quantization: str = "none"
    allow_missing: list[str] = field(default_factory=list)
    freeze: list[str] = field(default_factory=list)


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
        ConfigError: no tokenizer is named, it cannot be loaded, it has no EOS token, or there is no such chat template.
    """
    from transformers import AutoTokenizer

    source = spec.tokenizer or spec.model
    if source is None:
        raise ConfigError("policy: expected `tokenizer` (a folder or name) beside `config`, found none; `aapa data tokenizer` trains one")
    try:
        refuse_missing(source)
        tokenizer = AutoTokenizer.from_pretrained(source, revision=spec.revision, trust_remote_code=spec.trust_remote_code)
    except Exception as error:  # transformers, tokenizers and the Hub client raise errors of their own
        raise ConfigError(f"policy.tokenizer: cannot load a tokenizer from {source!r}: {in_one_line(error)}") from error
    if len(tokenizer) == len(set(tokenizer.all_special_ids)):  # transformers makes an empty one where the files are missing
        raise ConfigError(f"policy.tokenizer: cannot load a tokenizer from {source!r}: it holds no tokens; set `tokenizer`")
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"policy.tokenizer: {source!r} has no EOS token, so no response could ever end; set `eos_token` in its config")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if spec.chat_template is not None:
        tokenizer.chat_template = read_chat_template(spec.chat_template, tokenizer)
    return tokenizer


def load_policy(spec: PolicySpec, precision: str = "", *, weights: bool = True) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load model and tokenizer as ``spec`` says.

    Args:
        spec: what to load.
        precision: the trainer's; mixed ones let flash attention serve float32 weights.
        weights: without them the model's parameters lie on the meta device, for ``aapa_lightning.sharding.materialize`` to fill.

    Raises:
        ConfigError: nothing to load, nothing there, a vocabulary that does not hold the tokenizer's tokens, or options that contradict
            each other.
        MissingDependencyError: what adapters, quantised weights or flash-attention need is not installed.
    """
    check_backend(spec.logprob_backend)
    check_packing(spec.packing)
    _check_adapters(spec)
    tokenizer = load_tokenizer(spec)
    dtype = parse_dtype(spec.dtype)
    attention = resolve_attention(spec.attn_implementation, dtype, precision)
    with nullcontext() if weights else parameters_on_meta():
        model = _build(spec, tokenizer, dtype, attention, weights)
    vocabulary = cast("nn.Embedding", model.get_input_embeddings()).num_embeddings
    if len(tokenizer) > vocabulary:
        raise ConfigError(
            f"policy: the tokenizer has {len(tokenizer)} tokens, the model's vocabulary {vocabulary}; "
            "use the model's own tokenizer or set config.vocab_size"
        )
    if spec.lora is not None:
        with nullcontext() if weights else parameters_on_meta():
            model = put_adapters(model, spec.lora, spec.seed)
    freeze_parameters(model, spec.freeze, "policy.freeze")
    if spec.disable_dropout:
        disable_dropout(model)
    if spec.activation_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if spec.lora is not None:  # gradients of the embeddings, which the reentrant kind alone needs, cost a pass through frozen layers
            model.disable_input_require_grads()
    if spec.attn_implementation == "auto":
        use_flash_attention(model, compute_dtype(dtype, precision))
    set_logprob_backend(model, spec.logprob_backend)
    set_packing(model, spec.packing)
    return model, tokenizer


def _build(
    spec: PolicySpec, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype, attention: str | None, weights: bool
) -> PreTrainedModel:
    if spec.model is None:
        return _from_config(spec, tokenizer, dtype, attention)
    return _from_folder(spec.model, spec, dtype, attention) if weights else _without_weights(spec.model, spec, dtype, attention)


def _check_adapters(spec: PolicySpec) -> None:
    if spec.lora is not None and spec.lora.dropout and spec.disable_dropout:
        raise ConfigError(
            f"policy.lora.dropout={spec.lora.dropout} would do nothing: policy.disable_dropout, which is on unless you say otherwise, sets "
            "every dropout to 0; set policy.disable_dropout to false, or policy.lora.dropout to 0"
        )
    if spec.quantization != "none" and spec.lora is None:
        raise ConfigError(
            f"policy.quantization={spec.quantization}: quantised weights cannot be trained; add policy.lora, or leave quantization out"
        )
    if spec.quantization == "int8" and spec.lora is not None and spec.lora.dora:
        raise ConfigError("policy.lora.dora: peft's DoRA layers lose the scales of int8 weights; use quantization nf4, or dora false")


def _from_config(spec: PolicySpec, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype, attention: str | None) -> PreTrainedModel:
    from transformers import AutoConfig, AutoModelForCausalLM

    if not spec.config or "model_type" not in spec.config:
        raise ConfigError("policy: expected `model` (a folder or name) or `config` with `model_type`, found neither")
    if spec.quantization != "none":
        raise ConfigError(f"policy.quantization={spec.quantization}: expected `model`, found random weights from `config`")
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
        raise ConfigError(f"policy.config: cannot build a causal LM: {in_one_line(error)}") from error


def _from_folder(source: str, spec: PolicySpec, dtype: torch.dtype, attention: str | None) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    _require(source)
    below = adapter_base(source, spec.revision)
    if below is not None:
        if spec.quantization != "none":
            raise ConfigError(
                f"policy.quantization={spec.quantization}: {source!r} holds adapters, and merging them into quantised weights would round "
                "them away; merge first: aapa export RUN --out FOLDER, or peft's merge_and_unload"
            )
        base = _from_folder(below.model, replace(spec, model=below.model, revision=below.revision), dtype, attention)
        return merge_folder(base, source, spec.revision)
    options = quantization_arguments(spec.quantization, dtype)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(spec.seed)  # of weights that may be missing
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source,
                revision=spec.revision,
                dtype=dtype,
                attn_implementation=attention,
                trust_remote_code=spec.trust_remote_code,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # or the message would name none of them
                **options,
                **(spec.config or {}),
            )
    except Exception as error:  # transformers, safetensors, the Hub client and the model's own code raise errors of their own
        raise ConfigError(f"policy.model: cannot load a causal LM from {source!r}: {in_one_line(error)}") from error
    model, info = loaded
    check_weights(info, f"policy.model {source!r}", allow=spec.allow_missing, option="policy.allow_missing")
    return cast("PreTrainedModel", model)


def _require(source: str) -> None:
    try:
        refuse_missing(source)
    except FileNotFoundError as error:
        raise ConfigError(f"policy.model: cannot load a causal LM from {source!r}: {error}") from error


def _without_weights(source: str, spec: PolicySpec, dtype: torch.dtype, attention: str | None) -> PreTrainedModel:
    """What ``_from_folder`` loads, as its configuration describes it."""
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    _require(source)
    below = adapter_base(source, spec.revision)
    if below is not None:
        return _without_weights(below.model, replace(spec, model=below.model, revision=below.revision), dtype, attention)
    options = {"revision": spec.revision, "trust_remote_code": spec.trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(source, **options, **(spec.config or {}))
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attention, trust_remote_code=spec.trust_remote_code
        )
    except Exception as error:  # as above
        raise ConfigError(f"policy.model: cannot build a causal LM as of {source!r}: {in_one_line(error)}") from error
    with suppress(OSError):  # a model need not come with one
        model.generation_config = GenerationConfig.from_pretrained(source, revision=spec.revision or "main")
    return model


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout probability to 0, in dropout modules and where a layer keeps one as a number, such as ``attention_dropout``.

    What else is random in training (routers that draw) is put in evaluation mode at the model's first call, see ``logprobs.steady``.
    """
    for module, name in dropouts(model):
        setattr(module, name, 0.0)
    set_steady(model)


def eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Every id that ends a response: the tokenizer's and those of the model's generation config (chat models often have two)."""
    ids = {tokenizer.eos_token_id}
    generation = getattr(model, "generation_config", None)
    extra = generation.eos_token_id if generation is not None else None
    ids.update(extra if isinstance(extra, list) else [extra])
    return tuple(sorted(i for i in ids if i is not None))

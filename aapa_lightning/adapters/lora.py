"""Adapters (LoRA) on a causal language model: put on, switched off, told apart from the base model's weights.

Needs the package peft, which is imported only where adapters are asked for.
"""

from __future__ import annotations

import copy
import hashlib
import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from aapa_lightning.errors import COUNT, POSITIVE, ConfigError, Limit, MissingDependencyError, check_numbers, in_one_line

#: Arguments of ``peft.LoraConfig`` that may be given by its own names. The others change base weights, train them, or cannot be merged.
OPTIONS = (
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "init_lora_weights",
    "fan_in_fan_out",
)
#: Starts from which the model with fresh adapters computes what the base model does.
_STARTS = (True, "gaussian")
#: Settings of a model that do not change what it computes.
_NOT_DIGESTED = ("_name_or_path", "transformers_version", "use_cache")
#: Values of each tensor that go into a base model's fingerprint.
_SAMPLED = 64
_PREFIX = "base_model.model."


@dataclass(slots=True)
class LoraSpec:
    """Low-rank adapters; only they are trained, in float32 whatever the policy's dtype.

    Args:
        r: rank.
        alpha: the update is scaled by alpha / r (``rslora``: alpha / sqrt(r)).
        dropout: on the adapters' input, in training. Above 0 it needs ``policy.disable_dropout: false``, and with several updates per
            window the ratio of the first is then not exactly 1.
        target_modules: names (ends of names) of the layers, a regular expression, or ``all-linear`` for every linear layer but the head.
        modules_to_save: ends of names of layers trained whole, in a float32 copy; with the adapters off the original answers. ``norm`` is
            every norm whose name ends so.
        rslora: rank-stabilised scaling.
        dora: also learn the magnitude of each output (DoRA).
        options: further arguments of ``peft.LoraConfig``, of those in ``OPTIONS``.

    Raises:
        ConfigError: a value out of range, or an option that is not supported.
    """

    r: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    target_modules: list[str] | str = "all-linear"
    modules_to_save: list[str] | None = None
    rslora: bool = False
    dora: bool = False
    options: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        check_numbers(asdict(self), {"r": COUNT, "alpha": POSITIVE, "dropout": Limit(0, 1, below=True)}, "policy.lora.")
        if not self.target_modules:
            raise ConfigError(f"policy.lora.target_modules: expected names of layers, or all-linear, found {self.target_modules!r}")
        options = self.options or {}
        if unknown := sorted(set(options) - set(OPTIONS)):
            raise ConfigError(
                f"policy.lora.options: expected keys of {', '.join(OPTIONS)}; found {', '.join(unknown)}. Others change or train the base "
                "model's weights, cannot be merged, or have a key of their own beside `options`"
            )
        if (start := options.get("init_lora_weights", True)) not in _STARTS:
            raise ConfigError(
                f"policy.lora.options.init_lora_weights: expected true or gaussian, found {start!r}: with another start the "
                "policy would not begin as its base model, which is what the reference is"
            )


def put_adapters(model: nn.Module, spec: LoraSpec, seed: int) -> Any:
    """Put fresh adapters on a causal language model, and freeze all else.

    Args:
        model: changed in place.
        spec: which adapters.
        seed: of their weights.

    Returns:
        The ``peft.PeftModel`` around it, with the base model's ``fingerprint`` as its attribute ``aapa_base``.

    Raises:
        MissingDependencyError: peft is not installed.
        ConfigError: layers that the model lacks.
    """
    peft = peft_package()
    # without weights (see ``load_policy``) whoever fills them in knows it
    base = "" if any(p.is_meta for p in model.parameters()) else fingerprint(model)
    arguments: dict[str, Any] = {
        "r": spec.r,
        "lora_alpha": spec.alpha,
        "lora_dropout": spec.dropout,
        "target_modules": spec.target_modules,
        "modules_to_save": copy.copy(spec.modules_to_save),
        "use_rslora": spec.rslora,
        "use_dora": spec.dora,
        "task_type": "CAUSAL_LM",
        **(spec.options or {}),
    }
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # of a question that peft asks transformers, and of trouble in merging that ``merged_model`` takes care of
        warnings.filterwarnings("ignore", message=".*(is_gradient_checkpointing|tie_word_embeddings)")
        torch.manual_seed(seed)
        try:
            adapted = peft.get_peft_model(model, peft.LoraConfig(**arguments))
        except (ValueError, TypeError, KeyError, NotImplementedError) as error:  # their ways to refuse an argument
            raise ConfigError(f"policy.lora: peft cannot adapt {type(model).__name__}: {in_one_line(error)}") from error
    whole = [path for path, inner in wrapped_layers(adapted).items() if inner == "original_module"]
    if missing := [name for name in spec.modules_to_save or () if not any(path.endswith(name) for path in whole)]:
        raise ConfigError(f"policy.lora.modules_to_save: {type(model).__name__} has no layer {', '.join(missing)}")
    for path in whole:
        _train_in_float32(adapted.get_base_model().get_submodule(path))
    adapted.aapa_base = base
    return adapted


def peft_package() -> Any:
    """The package peft. Raises MissingDependencyError where it is not installed."""
    try:
        import peft
    except ImportError as error:
        raise MissingDependencyError(
            "adapters: expected the package peft, 0.18 or newer, found none or an older one; pip install 'aapa-lightning[peft]'"
        ) from error
    return peft


def has_adapters(model: nn.Module) -> bool:
    """Whether ``put_adapters`` (or peft) has put adapters on a model."""
    return hasattr(model, "peft_config") and hasattr(model, "disable_adapter")


def _train_in_float32(wrapper: Any) -> None:
    """Turn the trained copies of a 16-bit layer into float32; between 16-bit layers they go on to take and give 16 bits."""
    for trained in wrapper.modules_to_save.values():
        dtypes = {p.dtype for p in trained.parameters() if p.dtype in (torch.bfloat16, torch.float16)}
        if dtypes:
            trained.float()
            trained.register_forward_pre_hook(_cast_inputs)
            trained.register_forward_hook(partial(_cast_output, dtype=dtypes.pop()))


def _cast_inputs(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs)


def _cast_output(module: nn.Module, inputs: Any, output: Any, *, dtype: torch.dtype) -> Any:
    return output.to(dtype) if isinstance(output, Tensor) else output


def wrapped_layers(model: Any) -> dict[str, str]:
    """Where in the base model a layer is wrapped, and under which name the wrapper keeps it."""
    base = model.get_base_model()
    inner = {True: "base_layer", False: "original_module"}
    return {path: inner[hasattr(m, "base_layer")] for path, m in base.named_modules() if _switchable(m)}


def _switchable(module: nn.Module) -> bool:
    return hasattr(type(module), "disable_adapters") and hasattr(type(module), "enable_adapters") and hasattr(module, "adapter_layer_names")


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """The model computes what its base model does, bit for bit; layers trained whole answer with their originals.

    Calls may nest. ``requires_grad``, gradients and graphs stay as they are, which peft's ``disable_adapter`` does not promise: it
    freezes and thaws every adapter, and under ``fully_shard`` whole and sharded parameters would disagree afterwards.
    """
    layers: list[Any] = [module for module in model.modules() if _switchable(module)]
    before = [layer.disable_adapters for layer in layers]
    try:
        for layer in layers:
            _switch(layer, off=True)
        yield
    finally:
        for layer, off in zip(layers, before, strict=True):
            _switch(layer, off=off)


def _switch(layer: Any, *, off: bool) -> None:
    layer._disable_adapters = off
    if layer.disable_adapters is not off:
        raise RuntimeError(f"{type(layer).__name__} of this version of peft cannot be switched off")


def base_name(key: str, layers: Mapping[str, str]) -> str | None:
    """What a tensor of a model with adapters is called in the base model; None for one of an adapter."""
    parts = key.removeprefix(_PREFIX).split(".")
    for i in range(1, len(parts)):
        inner = layers.get(".".join(parts[:i]))
        if inner is not None:
            return ".".join(parts[:i] + parts[i + 1 :]) if parts[i] == inner else None
    return ".".join(parts)


def base_state(model: nn.Module) -> dict[str, Tensor]:
    """The base model's ``state_dict``, under its own names; of a model without adapters its own."""
    if not has_adapters(model):
        return dict(model.state_dict())
    layers = wrapped_layers(model)
    named = {base_name(key, layers): value for key, value in model.state_dict().items()}
    return {name: value for name, value in named.items() if name is not None}


def adapter_names(model: nn.Module) -> set[str]:
    """Names in ``model.state_dict()`` of what a checkpoint keeps: adapters, and layers trained whole."""
    layers = wrapped_layers(model)
    return {key for key in model.state_dict() if base_name(key, layers) is None}


def architecture(model: nn.Module) -> str:
    """What beside the weights decides a log-prob, such as the scaling of rotary positions."""
    config: Any = getattr(model, "config", None)
    settings = {} if config is None else config.to_dict()
    return json.dumps({name: value for name, value in settings.items() if name not in _NOT_DIGESTED}, sort_keys=True, default=str)


def fingerprint(model: nn.Module) -> str:
    """A hex digest of a base model: its configuration and, of every tensor, name, dtype, shape and up to 64 values spread over it.

    Takes a fraction of a second where hashing all weights takes as long as reading them. Training moves nearly every value of the tensors
    that it moves, so another stage or another seed is told apart; an edit of single values may not be.
    """
    return _sampled_digest(architecture(model), base_state(model))


def weights_fingerprint(model: nn.Module) -> str:
    """Like ``fingerprint``, of the base model's weights alone: another version of transformers may describe the same model otherwise."""
    return _sampled_digest("", base_state(model))


def _sampled_digest(salt: str, state: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(salt.encode())
    for name, value in sorted(state.items()):
        flat = value.detach().reshape(-1)
        sample = flat[:: max(flat.numel() // _SAMPLED, 1)][:_SAMPLED].cpu().contiguous()
        digest.update(f"{name}|{value.dtype}|{tuple(value.shape)}|".encode())
        digest.update(sample.view(torch.uint8).numpy().data)
    return digest.hexdigest()

"""What a checkpoint holds of a policy under adapters, and what a resume checks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from torch import nn

from aapa_lightning.adapters import LoraSpec, adapter_names, has_adapters
from aapa_lightning.errors import ConfigError
from aapa_lightning.policy import PolicySpec

#: Fields of a ``PolicySpec`` that decide what the base model is. Not whether its code is trusted: a file must not decide that.
_BASE = ("model", "config", "revision", "dtype", "seed", "quantization")


def keep_adapters(module: nn.Module) -> None:
    """Leave the base model out of a LightningModule's ``state_dict`` from now on; its ``model`` has adapters."""
    module.register_state_dict_post_hook(_drop_base)


def _drop_base(module: Any, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    own = f"{prefix}model."
    kept = {own + name for name in adapter_names(module.model)}
    for name in [name for name in state_dict if name.startswith(own) and name not in kept]:
        del state_dict[name]


def describe_adapters(model: Any, spec: PolicySpec) -> dict[str, Any]:
    """What a checkpoint says of its adapters, as primitives: how to build what they lie on, and how to know it again."""
    if spec.lora is None:
        return {}
    base = {name: getattr(spec, name) for name in _BASE}
    return {"lora": {"spec": asdict(spec.lora), "base": base, "fingerprint": model.aapa_base}}


def saved_spec(saved: Mapping[str, Any]) -> PolicySpec:
    """The policy that ``describe_adapters`` described."""
    return PolicySpec(**saved["base"], lora=LoraSpec(**saved["spec"]))


def check_adapters(checkpoint: Mapping[str, Any], model: nn.Module, spec: PolicySpec) -> None:
    """Refuse a checkpoint whose weights are not those of this policy's adapters.

    Raises:
        ConfigError: it holds whole weights or this policy has none, other adapters, another base model, or tensors too many or too few.
    """
    saved = checkpoint.get("aapa", {}).get("policy", {}).get("lora")
    if not has_adapters(model):
        if saved is not None:
            raise ConfigError(
                f"checkpoint: it holds the adapters (r={saved['spec']['r']}) of a policy on {_named(saved['base'])}, and this policy has "
                "none; set policy.lora as in the run's config.yaml, or export the run and start from the folder"
            )
        return
    if saved is None:
        raise ConfigError(
            "checkpoint: it holds whole weights, and this policy trains adapters; leave policy.lora out, or export the run and name the "
            "folder as policy.model"
        )
    now = describe_adapters(model, spec)["lora"]
    changed = [f"{name} {saved['spec'].get(name)} -> {value}" for name, value in now["spec"].items() if saved["spec"].get(name) != value]
    if changed:
        raise ConfigError(f"checkpoint: its adapters have other settings: {', '.join(changed)}; set policy.lora as it was")
    check_base(saved, model, _named(now["base"]))
    if "state_dict" in checkpoint:  # not when it lies in shards: whoever reads those asks for the tensors by name
        check_names(checkpoint["state_dict"], model)


def check_base(saved: Mapping[str, Any], model: Any, named: str) -> None:
    """Refuse a base model on which the saved adapters were not trained.

    Raises:
        ConfigError: its fingerprint is another; both models are named.
    """
    if model.aapa_base != saved["fingerprint"]:
        raise ConfigError(
            f"checkpoint: its adapters were trained on {_named(saved['base'])} (fingerprint {saved['fingerprint'][:12]}), and the base "
            f"model here is {named} ({model.aapa_base[:12]}); set policy.model, revision, config, dtype and quantization as they were, or "
            "put the folder back as it was"
        )


def _named(base: Mapping[str, Any]) -> str:
    if base["model"] is None:
        return f"random weights of seed {base['seed']}"
    return repr(base["model"]) + (f" at {base['revision']}" if base["revision"] else "")


def check_names(state: Mapping[str, Any], model: nn.Module) -> None:
    """Refuse a checkpoint's ``state_dict`` that has other tensors than a policy's adapters have.

    Raises:
        ConfigError: some are missing, or there are more.
    """
    expected = {f"model.{name}" for name in adapter_names(model)}
    missing = sorted(expected - state.keys())
    extra = sorted(name for name in state.keys() - expected if name.startswith("model."))
    if missing or extra:
        which = (
            f"lacks {', '.join(missing[:3])} ({len(missing)} in all)" if missing else f"has {', '.join(extra[:3])} ({len(extra)} in all)"
        )
        raise ConfigError(f"checkpoint: expected the {len(expected)} tensors of this policy's adapters; it {which}")

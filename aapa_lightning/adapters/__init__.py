"""Training a few weights beside frozen ones: LoRA by peft, on whole or quantised models."""

from aapa_lightning.adapters.lora import (
    LoraSpec,
    adapter_names,
    adapters_off,
    architecture,
    base_state,
    fingerprint,
    has_adapters,
    put_adapters,
)

__all__ = [
    "LoraSpec",
    "adapter_names",
    "adapters_off",
    "architecture",
    "base_state",
    "fingerprint",
    "has_adapters",
    "put_adapters",
]

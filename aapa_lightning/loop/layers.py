"""Which parameters of a causal language model a perturbation moves: found by structure, so that any decoder of Hugging Face will do."""

from __future__ import annotations

from typing import Any, cast

from torch import nn

from aapa_lightning.errors import ConfigError
from aapa_lightning.sharding import decoder_blocks


def perturbed_parameters(model: nn.Module, start_layer: int) -> list[nn.Parameter]:
    """Trainable parameters to perturb, in the model's order.

    Args:
        model: a causal language model, bare or with an adapter; another module counts as its own decoder without a head.
        start_layer: 0 for all but an untied head; n > 0 for the decoder's blocks from n on, its final norm and an untied head.

    Raises:
        ConfigError: ``start_layer`` is not a block of the model, or nothing there is trainable.
    """
    base: Any = model
    if hasattr(base, "get_base_model"):  # an adapter around it
        base = base.get_base_model()
    decoder: nn.Module = base.get_decoder() if hasattr(base, "get_decoder") else base
    inside = {id(p) for p in decoder.parameters()}
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    untied = {id(p) for p in head.parameters()} - inside if head is not None else set()
    if start_layer == 0:
        chosen = {id(p) for p in model.parameters()} - untied
    else:
        upper = [*_blocks(decoder, start_layer), *_final_norms(decoder)]
        chosen = untied.union(id(p) for module in upper for p in module.parameters())
    found = [p for p in model.parameters() if p.requires_grad and id(p) in chosen]
    if not found:
        raise ConfigError(
            f"weight stress: expected trainable parameters from layer {start_layer} on, found none in {type(model).__name__}; "
            "train some of these layers, or lower start_layer"
        )
    return found


def _blocks(decoder: nn.Module, start_layer: int) -> list[nn.Module]:
    blocks = decoder_blocks(decoder)
    if not 0 < start_layer < len(blocks):
        raise ConfigError(
            f"weight stress: expected start_layer from 0 to {max(len(blocks) - 1, 0)}, found {start_layer}; "
            f"{type(decoder).__name__} has {len(blocks)} decoder layers"
        )
    return blocks[start_layer:]


def _final_norms(decoder: nn.Module) -> list[nn.Module]:
    # OPT registers it before the blocks and BLOOM has one of the embeddings, so neither order nor kind alone tells.
    def is_final(name: str, module: nn.Module) -> bool:
        return "emb" not in name and (name.startswith("ln") or "norm" in name + type(module).__name__.lower())

    return [cast(nn.Module, module) for name, module in decoder.named_children() if is_final(name, module)]

"""Adapters and weights together: merged, and the folders that either is written to and read from."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aapa_lightning.adapters.lora import base_state, peft_package, weights_fingerprint, wrapped_layers
from aapa_lightning.documents import read_json
from aapa_lightning.errors import ConfigError, in_one_line
from aapa_lightning.files import write_json
from aapa_lightning.loading import named

#: What a folder of adapters says of the weights that they were trained on.
BASE_FILE = "aapa_base.json"


@torch.no_grad()
def merged_state(model: Any) -> dict[str, Tensor]:
    """Weights under the base model's names, and in its dtype, with the adapters added. The model stays as it is, bit for bit.

    Takes the memory of the adapted layers once more; the other tensors are the model's own.

    Raises:
        ConfigError: weights that are quantised, or lie in shards.
    """
    base = model.get_base_model()
    state = base_state(model)
    for path, inner in wrapped_layers(model).items():
        layer = base.get_submodule(path)
        if inner == "original_module":
            trained = layer.modules_to_save[layer.active_adapters[0]].state_dict()
            state |= {f"{path}.{name}": value.to(state[f"{path}.{name}"].dtype) for name, value in trained.items()}
        else:
            state[f"{path}.weight"] = _merged_weight(layer, path)
    return state


def _merged_weight(layer: Any, path: str) -> Tensor:
    base = layer.get_base_layer()
    weight = base.weight
    if not weight.is_floating_point() or hasattr(weight, "full_tensor"):
        kind = "quantised" if not weight.is_floating_point() else "in shards"
        raise ConfigError(f"merging: the weights of {path} are {kind}; write the adapters alone (aapa export --adapter)")
    # On a copy in the weight's place: a merge taken back by subtraction would leave other bits, and a tied weight is another layer's too.
    base.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
    try:
        layer.merge(safe_merge=True)
        merged: Tensor = base.weight.detach()
        base.weight = nn.Parameter(merged.clone(), requires_grad=False)
        layer.unmerge()  # forgets what merging noted down
    except ValueError as error:  # of safe_merge
        raise ConfigError(f"merging: {path}: {in_one_line(error)}") from error
    finally:
        base.weight = weight
    return merged


def merged_model(model: Any) -> Any:
    """A Hugging Face model of its own with the adapters merged, to be written; it shares the tensors that no adapter touches.

    Where an adapter has pulled tied weights apart (a head and the embeddings), the new model has both.
    """
    base = model.get_base_model()
    state = merged_state(model)
    config = copy.deepcopy(base.config)
    if _ties(config) and not _still_tied(base, state):
        config.tie_word_embeddings = config.get_text_config(decoder=True).tie_word_embeddings = False
    with torch.device("meta"):
        merged = type(base)(config)
    merged.load_state_dict(state, assign=True)
    merged.tie_weights()
    merged.generation_config = copy.deepcopy(base.generation_config)
    return merged


def assembled(model: Any, state: Mapping[str, Tensor]) -> Any:
    """A model in one piece, for one whose parameters lie in shards and whose whole state dictionary is ``state``."""
    base = model.get_base_model()
    # of what fully_shard has turned into a class of its own, this makes a plain one
    with torch.device("meta"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")  # a question that peft asks transformers
        plain = type(base)(copy.deepcopy(base.config))
        twin = peft_package().get_peft_model(plain, copy.deepcopy(model.active_peft_config))
    twin.load_state_dict(state, assign=True)
    plain.generation_config = copy.deepcopy(base.generation_config)
    return twin


def _still_tied(base: Any, state: Mapping[str, Tensor]) -> bool:
    paths = {id(module): path for path, module in base.named_modules()}
    head, embeddings = (state.get(f"{paths.get(id(m))}.weight") for m in (base.get_output_embeddings(), base.get_input_embeddings()))
    return head is None or embeddings is None or torch.equal(head, embeddings)


def save_adapter(model: Any, out: str | Path, base: str, revision: str | None = None) -> None:
    """Write the folder that ``PeftModel.from_pretrained(base_model, out)`` loads, and beside it which weights the adapters were trained on.

    Args:
        model: with adapters.
        out: folder to write.
        base: folder or Hub name of the base model, which the folder names.
        revision: of the base model.
    """
    config = model.active_peft_config
    config.base_model_name_or_path, config.revision = base, revision
    # never the base's embeddings: the library would add them, and ask the Hub whether they have grown
    model.save_pretrained(out, save_embedding_layers=False)
    write_json(Path(out) / BASE_FILE, {"dtype": str(model.get_base_model().dtype), "fingerprint": weights_fingerprint(model)})


@dataclass(frozen=True, slots=True)
class AdapterBase:
    """The model that a folder of adapters names as theirs: folder or Hub name, and revision."""

    model: str
    revision: str | None


def adapter_base(source: str, revision: str | None = None) -> AdapterBase | None:
    """What the adapters in a folder or Hub repository lie on; None where there are none.

    Raises:
        ConfigError: adapters that name no base model, or themselves.
    """
    from transformers.utils.peft_utils import find_adapter_config_file

    try:
        file = find_adapter_config_file(source, revision=revision)
    except OSError:  # nothing there, or no network: whoever loads the model will say so
        return None
    if file is None:
        return None
    settings = read_json(file, base_model_name_or_path=(str, type(None)), revision=(str, type(None)))
    base = settings.get("base_model_name_or_path")
    if not base or base == source:
        raise ConfigError(
            f"policy.model: {source!r} holds adapters, and its adapter_config.json names {base!r} as their base model; put the folder or "
            "Hub name of the base there, or use a merged model (aapa export RUN --out FOLDER)"
        )
    return AdapterBase(base, settings.get("revision"))


def merge_folder(base: Any, source: str, revision: str | None = None) -> Any:
    """Add the adapters of a folder or Hub repository to their base model's weights, for good.

    Raises:
        ConfigError: adapters that are incomplete, do not fit, or cannot be merged.
    """
    peft = peft_package()
    tied = {base.get_output_embeddings(), base.get_input_embeddings()} if _ties(base.config) else set()
    _check_base(base, source)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*(is_gradient_checkpointing|tie_word_embeddings)")
            warnings.filterwarnings("ignore", message="Found missing adapter keys")  # an error below
            adapted = peft.PeftModel.from_pretrained(base, source, revision=revision)
            _check_names(adapted, source, revision)
        apart = [path for path, inner in wrapped_layers(adapted).items() if getattr(base.get_submodule(path), inner) in tied]
        merged = None if apart else adapted.merge_and_unload(safe_merge=True)
    except ConfigError:
        raise
    except Exception as error:  # peft, safetensors and the Hub client raise errors of their own
        raise ConfigError(f"policy.model: cannot merge the adapters of {source!r}: {in_one_line(error)}") from error
    if merged is None:
        raise ConfigError(
            f"policy.model: the adapters of {source!r} change {', '.join(apart)}, which shares its weights with another layer; start from "
            "a merged folder (aapa export RUN --out FOLDER), which holds both"
        )
    return merged.requires_grad_(True)  # what peft froze


def _check_base(base: Any, source: str) -> None:
    """Refuse weights that the adapters of a folder were not trained on, where the folder says which those were, and in the same dtype.

    Raises:
        ConfigError: they are others.
    """
    file = Path(source) / BASE_FILE
    if not file.is_file():
        return
    said = read_json(file, fingerprint=str, dtype=str)
    expected = said.get("fingerprint") if said.get("dtype") == str(base.dtype) else None
    found = weights_fingerprint(base)
    if expected is not None and expected != found:
        raise ConfigError(
            f"policy.model: the adapters of {source!r} were trained on other weights (fingerprint {str(expected)[:12]}) than those that "
            f"its adapter_config.json names ({found[:12]}); name the right base there, or remove {BASE_FILE} to use these"
        )


def _check_names(adapted: Any, source: str, revision: str | None) -> None:
    """Refuse adapters of which the file holds too few or too many tensors: peft warns of some of them and goes on.

    Raises:
        ConfigError: names of both are in it.
    """
    peft = peft_package()
    found = adapted.load_adapter(source, adapted.active_adapter, revision=revision)  # once more, for what it says
    # of layers that were trained whole it says nothing
    held = peft.load_peft_weights(source, device="cpu", revision=revision)
    expected = peft.get_peft_model_state_dict(adapted, save_embedding_layers=False)
    missing = {*found.missing_keys, *(name for name in expected if "lora_" not in name and name not in held)}
    for names, wrong in ((missing, "lack"), (set(found.unexpected_keys), "hold, beside those that adapter_config.json asks for,")):
        if names:
            raise ConfigError(
                f"policy.model: the adapters of {source!r} {wrong} the weights {named(names)}; use the adapter_config.json written "
                "with them, or write both again (aapa export RUN --out FOLDER --adapter)"
            )


def _ties(config: Any) -> bool:
    return bool(getattr(config.get_text_config(decoder=True), "tie_word_embeddings", False))

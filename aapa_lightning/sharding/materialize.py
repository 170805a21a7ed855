"""Weights for a model that was built without: every rank fills the rows that it keeps, and none holds the whole model.

Rows come straight from safetensors files where these hold the model's weights under its own names and shapes. Else (a model from scratch,
adapters, files that transformers converts) rank 0 loads the model as ever and sends it, one tensor at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from aapa_lightning.documents import check_kinds, read_json
from aapa_lightning.errors import AapaError, ConfigError
from aapa_lightning.sharding.files import local_rows


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules built inside get parameters without memory. Buffers are real: what they hold is computed, not loaded."""
    register = nn.Module.register_parameter

    def on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:  # one that is there already may be tied to another
            param = nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)
        register(self, name, param)

    setattr(nn.Module, "register_parameter", on_meta)  # noqa: B010 - what all parameters pass
    try:
        yield
    finally:
        setattr(nn.Module, "register_parameter", register)  # noqa: B010 - as above


def fill_model(model: nn.Module, device: torch.device, *, folder: str | None, revision: str | None, load: Callable[[], nn.Module]) -> None:
    """Give a sharded model of ``parameters_on_meta`` its weights; all ranks call it together.

    Args:
        model: sharded; changed in place.
        device: where its shards shall lie.
        folder: folder or Hub name whose safetensors files may hold the weights as they are; None for none.
        revision: of ``folder``.
        load: the whole model on the CPU; called on rank 0, and only where the files will not do.

    Raises:
        ConfigError: ``load`` refuses, or tied weights differ, on rank 0; the others raise what it said.
    """
    tensors = _materialize(model, device)
    whole, refusal = None, None
    if torch.distributed.get_rank() == 0:
        try:
            if folder is None or not _covers(_files(folder, revision), tensors):
                whole = load().state_dict()
                for _, names in tensors.values():
                    _check_tied(names, whole[names[0]], [whole[name] for name in names[1:]])
        except AapaError as error:
            refusal = error
    said: list[Any] = [whole is None, refusal and str(refusal)]
    torch.distributed.broadcast_object_list(said, 0)
    from_files, message = said
    if message is not None:
        raise refusal or ConfigError(message)
    if from_files and folder is not None:
        _read(_files(folder, revision), tensors)
    else:
        _receive(whole, tensors, device)


def _materialize(model: nn.Module, device: torch.device) -> dict[int, tuple[Tensor, list[str]]]:
    """Memory for parameters, tied ones once; buffers move. Gives what has to be filled, with all of its names."""
    buffers = [(module, name, value) for module in model.modules() for name, value in module._buffers.items() if value is not None]
    ties: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                ties.setdefault(id(parameter), []).append((module, name))
    model.to_empty(device=device)
    for module, name, value in buffers:
        module._buffers[name] = value.to(device)
    for (module, name), *others in ties.values():
        for other, alias in others:
            other._parameters[alias] = module._parameters[name]
    found: dict[int, tuple[Tensor, list[str]]] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        found.setdefault(id(value), (value, []))[1].append(name)
    return found


def _files(folder: str, revision: str | None) -> dict[str, Path]:
    """Where a model's tensors lie, by name; empty without safetensors files."""
    from transformers.utils import cached_file

    def find(name: str) -> Path | None:
        path = cached_file(folder, name, revision=revision, _raise_exceptions_for_missing_entries=False)
        return None if path is None else Path(path)

    index = find("model.safetensors.index.json")
    if index is not None:
        names: dict[str, str] = read_json(index, weight_map=dict).get("weight_map", {})
        check_kinds(names, str(index), dict.fromkeys(names, str))
        parts = {file: find(file) for file in set(names.values())}
        return {name: path for name, file in names.items() if (path := parts[file]) is not None}
    single = find("model.safetensors")
    return {} if single is None else dict.fromkeys(_open(single).keys(), single)


def _open(path: Path) -> Any:
    from safetensors import safe_open

    return safe_open(str(path), framework="pt")


def _covers(files: dict[str, Path], tensors: dict[int, tuple[Tensor, list[str]]]) -> bool:
    opened = {path: _open(path) for path in set(files.values())}
    for value, names in tensors.values():
        held = [name for name in names if name in files]
        if not held or opened[files[held[0]]].get_slice(held[0]).get_shape() != list(value.shape):
            return False
        first, *others = (opened[files[name]].get_tensor(name) for name in held) if len(held) > 1 else (None,)
        _check_tied(held, first, others)
    return True


def _check_tied(names: Sequence[str], first: Tensor | None, others: Sequence[Tensor]) -> None:
    """Refuse weights that the model shares between layers and that are not one. Raises ConfigError."""
    for name, other in zip(names[1:], others, strict=True):
        if first is None or not torch.equal(first, other):
            raise ConfigError(
                f"policy.model: the config ties {names[0]} and {name}, and the files hold other weights for each, one of which would be "
                "lost where the model is sharded; set tie_word_embeddings to false in policy.config"
            )


@torch.no_grad()
def _read(files: dict[str, Path], tensors: dict[int, tuple[Tensor, list[str]]]) -> None:
    opened = {path: _open(path) for path in set(files.values())}
    for value, names in tensors.values():
        name = next(name for name in names if name in files)
        if isinstance(value, DTensor):
            first, rows = local_rows(value)
            if len(rows):
                rows.copy_(opened[files[name]].get_slice(name)[first : first + len(rows)])
        else:
            value.copy_(opened[files[name]].get_tensor(name))


@torch.no_grad()
def _receive(whole: dict[str, Tensor] | None, tensors: dict[int, tuple[Tensor, list[str]]], device: torch.device) -> None:
    """Fill from the whole model of rank 0, which frees it on the way."""
    for value, names in tensors.values():
        sent = torch.empty(value.shape, dtype=value.dtype, device=device)
        if whole is not None:
            sent.copy_(whole[names[0]])
            for name in names:
                del whole[name]
        torch.distributed.broadcast(sent, 0)
        if isinstance(value, DTensor):
            first, rows = local_rows(value)
            rows.copy_(sent[first : first + len(rows)])
        else:
            value.copy_(sent)

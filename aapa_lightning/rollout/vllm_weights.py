"""The policy's weights, on their way to an engine that holds its own."""

from __future__ import annotations

import itertools
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from aapa_lightning.adapters import has_adapters
from aapa_lightning.adapters.weights import merged_state
from aapa_lightning.errors import ConfigError

T = TypeVar("T")
Dtype = Literal["bfloat16", "float16", "float32"]
#: Yields names and whole tensors of a checkpoint of the model; called by all ranks together, which all exhaust it.
NamedWeights = Callable[[Any], Iterable[tuple[str, Tensor]]]

_WRAPPERS = re.compile(r"_checkpoint_wrapped_module\.|_orig_mod\.")
_FILE_BYTES = 2 << 30


def named_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter once, whole, under the name that it has in a checkpoint; adapters are merged, tied weights come under one name.

    Under FSDP2 one parameter is gathered at a time: all ranks iterate together. Buffers are left out.

    Raises:
        ConfigError: adapters on weights that are quantised or in shards, or that have pulled tied weights apart.
    """
    if has_adapters(model):
        yield from _merged(model)
        return
    for name, parameter in model.named_parameters():
        value = parameter.detach()
        yield _WRAPPERS.sub("", name), value.full_tensor() if hasattr(value, "full_tensor") else value


def _merged(model: Any) -> Iterator[tuple[str, Tensor]]:
    base = model.get_base_model()
    names = {name for name, _ in base.named_parameters()}
    if any(hasattr(p, "full_tensor") or not p.is_floating_point() for p in model.parameters()):
        raise ConfigError(
            "vLLM engine: expected adapters on whole, unquantised weights, which can be merged for it; found shards or quantised ones. "
            "Train the adapters with DDP and without quantisation, or give the engine weights of your own (weights=...)"
        )
    state = merged_state(model)
    head, embeddings = (_weight_name(base, module) for module in (base.get_output_embeddings(), base.get_input_embeddings()))
    tied = base.config.get_text_config(decoder=True).tie_word_embeddings
    if tied and head in state and embeddings in state and not torch.equal(state[head], state[embeddings]):
        raise ConfigError(f"vLLM engine: adapters have pulled the tied weights {embeddings} and {head} apart, and vLLM holds them once")
    plain = {name.replace(".base_layer.", ".").replace(".original_module.", ".") for name in names}
    yield from ((name, value) for name, value in state.items() if name in plain)


def _weight_name(model: nn.Module, module: nn.Module) -> str:
    return next((f"{name}.weight" for name, other in model.named_modules() if other is module), "")


class Taken:
    """Weights that are counted as whoever loads them takes them.

    Args:
        weights: names and whole tensors.
    """

    def __init__(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        self._weights = iter(weights)
        self.count = 0

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for named in self._weights:
            self.count += 1
            yield named

    def check(self, by: str) -> None:
        """Raise ConfigError unless all were taken, and there were any; what is left is gone through, since ranks gather it together."""
        left = sum(1 for _ in self._weights)
        if left or not self.count:
            raise ConfigError(
                f"engine: {by} took {self.count} of {self.count + left} tensors of the policy, so it would draw from others; see its log"
            )


def write_weights(weights: Iterable[tuple[str, Tensor]], folder: str | Path, dtype: Dtype, file_bytes: int = _FILE_BYTES) -> Path:
    """Write weights as safetensors files into a new folder, which appears whole or not at all.

    Args:
        weights: names and whole tensors, on any device; one at a time is held, and a file's worth on the CPU.
        folder: to be made.
        dtype: of the files' floating tensors.
        file_bytes: size from which the next file begins.

    Raises:
        ConfigError: there are none.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    taken, held = Taken(weights), dict[str, Tensor]()
    files = itertools.count(1)

    def flush() -> None:
        save_file(held, partial / f"model-{next(files):05d}.safetensors", {"format": "pt"})
        held.clear()

    try:
        for name, value in taken:
            kind = getattr(torch, dtype) if value.is_floating_point() else value.dtype
            held[name] = value.detach().to("cpu", kind).contiguous()
            if sum(tensor.nbytes for tensor in held.values()) >= file_bytes:
                flush()
        if held:
            flush()
        taken.check(f"the folder {folder}")
        os.replace(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return folder


def is_first_rank() -> bool:
    """Whether this process is the one that speaks for all."""
    return not _distributed() or torch.distributed.get_rank() == 0


def share_from_first(value: T) -> T:
    """Rank 0's value on all ranks, once all have come here; the value itself in a single process."""
    if not _distributed():
        return value
    torch.distributed.barrier()
    box = [value]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1

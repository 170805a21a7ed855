"""Checkpoints in a folder: what every rank holds lies in a file of its own, and any number of ranks can read them.

A folder holds ``checkpoint.pt``, the checkpoint with a note in the place of every sharded tensor, and ``rank<r>.pt``, the rows of those
tensors that rank r held. All are read without unpickling objects. The folder's name is hidden; a link that is replaced in one step points
to it, so that a crash while writing leaves the last checkpoint as it was.
"""

from __future__ import annotations

import glob
import os
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from aapa_lightning.digests import Digesting, check_digests, check_sealed
from aapa_lightning.errors import ConfigError, in_one_line
from aapa_lightning.files import atomic_write

_INDEX = "checkpoint.pt"
#: What DeepSpeed's ZeRO stages 1 and 2 write beside the optimiser's shards: the whole weights, and all that is Lightning's and ours.
_DEEPSPEED = Path("checkpoint", "mp_rank_00_model_states.pt")
#: Where the digests of DeepSpeed's files lie.
DIGESTS = "digests.json"
#: Key of a note: its value is the tensor's number.
_NOTE = "__shards__"


@dataclass(slots=True)
class SavedTensor:
    """A tensor of a checkpoint, its rows spread over files.

    Args:
        shape: of the whole.
        pieces: rows and the number of the first.
    """

    shape: tuple[int, ...]
    pieces: list[tuple[int, Tensor]] = field(default_factory=list)

    def rows(self, start: int, stop: int) -> Tensor:
        """A copy of rows ``start`` to ``stop``, ``[stop - start, ...]``."""
        parts = [rows[max(start - first, 0) : stop - first] for first, rows in self.pieces if first < stop and start < first + len(rows)]
        return torch.cat(parts) if parts else self.pieces[0][1].new_empty((0, *self.shape[1:]))

    def whole(self) -> Tensor:
        """A copy of all rows."""
        return self.rows(0, self.shape[0])


def map_tensors(tree: Any, change: Callable[[Any], Any]) -> Any:
    """A copy of nested dictionaries, lists and tuples in which every tensor (``SavedTensor`` too) is ``change`` of it."""
    if isinstance(tree, Tensor | SavedTensor):
        return change(tree)
    if isinstance(tree, dict):
        return _like(tree, ((key, map_tensors(value, change)) for key, value in tree.items()))
    if isinstance(tree, list | tuple):
        return _like(tree, (map_tensors(value, change) for value in tree))
    return tree


def _like(tree: Any, items: Iterable[Any]) -> Any:
    if isinstance(tree, defaultdict):
        return dict(items)
    return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)


def local_rows(tensor: DTensor) -> tuple[int, Tensor]:
    """The first row of this rank's part of a tensor that is sharded by rows, and the part.

    Raises:
        ConfigError: a tensor that is split otherwise.
    """
    if any(not isinstance(placement, Shard) or placement.dim != 0 for placement in tensor.placements):
        raise ConfigError(f"checkpoint: expected tensors that are sharded by rows, found placements {tensor.placements}")
    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return offset[0], tensor.to_local().detach()


def write_folder(checkpoint: dict[str, Any], folder: Path, rank: int, barrier: Callable[[], None]) -> None:
    """Write a checkpoint with sharded tensors into a new folder; all ranks call it together. Tied tensors are written once."""
    shards: list[dict[str, Any]] = []
    numbers: dict[int, int] = {}

    def note(value: Any) -> Any:
        if not isinstance(value, DTensor):
            return value.detach()
        if id(value) not in numbers:
            first, rows = local_rows(value)
            numbers[id(value)] = len(shards)
            shards.append({"shape": list(value.shape), "first": first, "rows": rows.cpu()})
        return {_NOTE: numbers[id(value)]}

    index = map_tensors(checkpoint, note)
    save_sealed(shards, folder / f"rank{rank}.pt")
    barrier()
    if rank == 0:
        save_sealed(index, folder / _INDEX)


def save_sealed(value: Any, path: str | os.PathLike[str]) -> None:
    """``torch.save`` to a file that is whole or not there, with its digest at the end."""
    with atomic_write(path) as file:
        sealed = Digesting(file)
        torch.save(value, cast("BinaryIO", sealed))
        sealed.seal()


def publish(folder: Path, path: Path) -> None:
    """Let ``path`` lead to a finished folder, and remove the one that it led to; what else lies at ``path`` is replaced."""
    link = folder.with_name(f"{folder.name}.link")
    link.symlink_to(folder.name)
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    os.replace(link, path)
    clean(path)


def clean(path: Path) -> None:
    """Remove the hidden folders of ``path`` that it does not lead to: replaced ones, and unfinished ones of a crash."""
    kept = os.readlink(path) if path.is_symlink() else None
    ours = re.compile(re.escape(f".{path.name}.") + r"[0-9a-f]{8}(\.link)?")
    for folder in path.parent.glob(f".{glob.escape(path.name)}.*"):
        if not ours.fullmatch(folder.name):  # of another checkpoint, whose name begins the same
            continue
        if folder.is_symlink():
            folder.unlink()
        elif folder.is_dir() and folder.name != kept:
            shutil.rmtree(folder, ignore_errors=True)


def remove(path: Path) -> None:
    """Remove a checkpoint, file or folder, and whatever a crash left of it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    clean(path)


def is_checkpoint_folder(path: Path) -> bool:
    """Whether a folder is a checkpoint that was written to its end."""
    return (path / _INDEX).is_file()


def is_deepspeed_folder(path: Path) -> bool:
    """Whether a folder is a checkpoint of DeepSpeed's ZeRO stages 1 and 2."""
    return (path / _DEEPSPEED).is_file()


def check_checkpoint(path: str | os.PathLike[str], rank: int = 0, world_size: int = 1) -> None:
    """Refuse a checkpoint, file or folder, of which a byte is not what was written.

    Args:
        path: the checkpoint.
        rank: of several processes that check a folder together, each its share of the files.
        world_size: their number.

    Raises:
        ConfigError: nothing there, or damaged; the file is named, and what may be resumed from instead.
    """
    path = Path(path)
    if not path.exists():
        raise ConfigError(f"no checkpoint at {path}; expected a file or folder written by a fit run, such as RUN/checkpoints/last.ckpt")
    if (path / DIGESTS).exists() or is_deepspeed_folder(path):
        if rank == 0:
            check_digests(path, DIGESTS, advice(path))
        return
    files = [path] if path.is_file() else sorted(path.glob("*.pt"))
    for file in files[rank::world_size]:
        check_sealed(file, advice(path))


def advice(path: Path) -> str:
    """How to go on without a checkpoint."""
    others = [other for other in path.parent.glob("*.ckpt") if other.name != path.name and other.exists()]
    if not others:
        return "copy it again where there is a copy, or train again in another run_dir; --checkpoint.keep all keeps older ones"
    newest = sorted(others, key=lambda other: other.stat().st_mtime, reverse=True)
    return f"go on from another one with --ckpt_path: {', '.join(str(other) for other in newest[:3])}"


def read_checkpoint(path: str | os.PathLike[str], *, check: bool = True) -> dict[str, Any]:
    """Read a checkpoint, file or folder, without unpickling objects. Tensors stay on disk until they are used.

    Of a checkpoint of DeepSpeed's everything but the optimiser's state is read.

    Args:
        path: the checkpoint.
        check: look at every byte first; False where ``check_checkpoint`` did.

    Returns:
        The checkpoint; in the place of sharded tensors ``SavedTensor``.

    Raises:
        ConfigError: nothing there, damaged, or no checkpoint of this library.
    """
    path = Path(path)
    if check or not path.exists():
        check_checkpoint(path)
    if not path.is_dir():
        return _read(path)
    if is_deepspeed_folder(path):
        states: dict[str, Any] = _read(path / _DEEPSPEED)
        return {**states, "state_dict": states["module"]}
    if not is_checkpoint_folder(path):
        raise ConfigError(f"{path}: expected a checkpoint folder written by --trainer.strategy fsdp2, found no {_INDEX} in it")
    tensors: dict[int, SavedTensor] = {}
    for file in sorted(path.glob("rank*.pt")):
        for number, shard in enumerate(_read(file)):
            tensors.setdefault(number, SavedTensor(tuple(shard["shape"]))).pieces.append((shard["first"], shard["rows"]))
    for tensor in tensors.values():
        tensor.pieces.sort(key=lambda piece: piece[0])
        if sum(len(rows) for _, rows in tensor.pieces) != tensor.shape[0]:
            raise ConfigError(f"{path}: expected {tensor.shape[0]} rows of a tensor in its rank files; some are missing")
    found: dict[str, Any] = _resolve(_read(path / _INDEX), tensors)
    return found


def read_step(path: str | os.PathLike[str]) -> int:
    """The optimiser steps that a checkpoint was taken after; also of a folder that Lightning's own ``ModelParallelStrategy`` wrote.

    The rest of it is not looked at: whoever goes on from there reads it again.
    """
    lightnings = Path(path) / "meta.pt"
    return int((_read(lightnings) if lightnings.is_file() else read_checkpoint(path, check=False))["global_step"])


def in_memory(tree: Any) -> Any:
    """A part of what ``read_checkpoint`` gave, with whole tensors in the place of those in several files; tied ones once."""
    kept: dict[int, Tensor] = {}

    def whole(value: Any) -> Any:
        if not isinstance(value, SavedTensor):
            return value
        if id(value) not in kept:
            kept[id(value)] = value.whole()
        return kept[id(value)]

    return map_tensors(tree, whole)


def _read(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a file that torch did not write fails in many ways
        check_sealed(path, advice(path))
        raise ConfigError(f"{path} is not a checkpoint of tensors and primitives: {in_one_line(error)}") from error


def _resolve(tree: Any, tensors: dict[int, SavedTensor]) -> Any:
    if isinstance(tree, dict):
        if _NOTE in tree:
            return tensors[tree[_NOTE]]
        return _like(tree, ((key, _resolve(value, tensors)) for key, value in tree.items()))
    if isinstance(tree, list | tuple):
        return _like(tree, (_resolve(value, tensors) for value in tree))
    return tree

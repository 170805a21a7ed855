"""Log-probs of responses under a frozen policy: as they are asked for, or computed once and kept on disk."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aapa_lightning.anchor.encoder import hash_tensors
from aapa_lightning.anchor.files import read_json, read_tensors, write_tensors
from aapa_lightning.errors import ConfigError
from aapa_lightning.files import write_json
from aapa_lightning.loop.demonstrations import demonstration_logprobs
from aapa_lightning.reduce import masked_sum
from aapa_lightning.types import Demonstration

#: Responses of which a cache is being made that are held in memory at once; those of like length share a forward.
_CHUNK = 4096


def response_sums(
    model: nn.Module, rows: Sequence[Demonstration], pad_token_id: int, device: torch.device | str
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Run a policy over responses.

    Returns:
        Sums of log-probs over each response, float32 ``[R]`` nats; their tokens, int64 ``[R]``; and the log-probs and mask ``[R, T - 1]``
        that were summed.
    """
    logprobs, mask = demonstration_logprobs(model, rows, pad_token_id, device)
    return masked_sum(logprobs, mask, dim=-1), mask.sum(-1), (logprobs, mask)


class ReferenceCache:
    """Sums of log-probs under one policy, kept in a folder: ``reference.safetensors``, and ``reference.json`` with its fingerprint.

    Entries are found by their tokens, so the order of the data does not matter and data that grows only adds what is new. They are
    computed in float32 without autocast.

    Args:
        folder: where; need not exist.
        model: the policy; its weights are the fingerprint.

    Raises:
        ConfigError: the folder holds the log-probs of another policy, or is damaged.
    """

    def __init__(self, folder: str | Path, model: nn.Module) -> None:
        self.folder = Path(folder)
        self.fingerprint = hash_tensors("reference", model.state_dict())
        self._sums: dict[bytes, float] = {}
        if (self.folder / "reference.json").exists():
            self._load()

    def _load(self) -> None:
        found = read_json(self.folder / "reference.json").get("fingerprint")
        if found != self.fingerprint:
            raise ConfigError(
                f"reference_cache {self.folder} holds the log-probs of another model: expected fingerprint {self.fingerprint[:12]}, found "
                f"{str(found)[:12]}; name another folder, or remove this one"
            )
        tensors = read_tensors(self.folder / "reference.safetensors")
        if {"keys", "logprobs"} - tensors.keys() or len(tensors["keys"]) != len(tensors["logprobs"]):
            raise ConfigError(f"{self.folder / 'reference.safetensors'} is damaged; remove the folder, and it is made again")
        keys = tensors["keys"].numpy().tobytes()
        self._sums = {keys[16 * i : 16 * i + 16]: value for i, value in enumerate(tensors["logprobs"].tolist())}

    def __len__(self) -> int:
        return len(self._sums)

    def __call__(self, rows: Sequence[Demonstration]) -> Tensor:
        """Sums of log-probs, float32 ``[R]`` nats on the CPU. Raises KeyError for a row that was never filled in."""
        return torch.tensor([self._sums[_key(row)] for row in rows], dtype=torch.float32)

    def fill(
        self,
        rows: Iterable[Demonstration],
        compute: Callable[[Sequence[Demonstration]], Tensor],
        *,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        gather: Callable[[Any], list[Any]] = lambda value: [value],
    ) -> int:
        """Compute what is missing, each rank its share, and write the folder on rank 0.

        Args:
            rows: all responses, in the same order on every rank.
            compute: gives the sums of a batch, float32 ``[B]``.
            batch_size: rows of a forward.
            rank: this process.
            world_size: number of processes.
            gather: a list of every rank's value.

        Returns:
            How many entries were new.
        """
        added = 0
        for chunk in _chunks((row for row in rows if _key(row) not in self._sums), _CHUNK):
            missing = {_key(row): row for row in chunk}
            mine = sorted(missing.items(), key=lambda item: len(item[1].input_ids))[rank::world_size]
            found: dict[bytes, float] = {}
            for part in _chunks(mine, batch_size):
                found |= zip((key for key, _ in part), compute([row for _, row in part]).tolist(), strict=True)
            for share in gather(found):
                self._sums |= share
            added += len(missing)
        if added and rank == 0:
            self._save()
        return added

    def _save(self) -> None:
        keys = torch.frombuffer(bytearray(b"".join(self._sums)), dtype=torch.uint8).view(-1, 16)
        # the fingerprint last: a folder without one is made again
        write_tensors(
            self.folder / "reference.safetensors", {"keys": keys, "logprobs": torch.tensor([*self._sums.values()], dtype=torch.float32)}
        )
        write_json(self.folder / "reference.json", {"fingerprint": self.fingerprint, "responses": len(self._sums), "unit": "nats"})


def _key(row: Demonstration) -> bytes:
    digest = hashlib.blake2b(array("q", row.input_ids).tobytes(), digest_size=16)
    digest.update(bytes(row.response_mask))
    return digest.digest()


def _chunks(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk

"""Log-probs of responses under a frozen policy: as they are asked for, or computed once and kept on disk."""

from __future__ import annotations

import hashlib
import logging
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aapa_lightning.adapters import adapters_off, architecture, base_state, has_adapters
from aapa_lightning.anchor.encoder import hash_tensors
from aapa_lightning.anchor.files import read_tensors, write_tensors
from aapa_lightning.documents import read_json
from aapa_lightning.errors import ConfigError
from aapa_lightning.files import write_json
from aapa_lightning.loop.demonstrations import demonstration_logprobs
from aapa_lightning.reduce import masked_sum
from aapa_lightning.sharding import WholeTensors, gathered_parameters
from aapa_lightning.types import Demonstration

#: Responses of which a cache is being made that are held in memory at once; those of like length share a forward.
_CHUNK = 4096
_KEY_BYTES = 16

logger = logging.getLogger(__name__)


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


@contextmanager
def as_it_started(model: nn.Module) -> Iterator[nn.Module]:
    """A policy as it was before training, for a forward without gradients: a frozen copy, or the policy itself with its adapters off.

    In evaluation mode; afterwards, also after an exception, everything is as it was.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with adapters_off(model):
            yield model
    finally:
        for module in training:
            module.training = True


class ReferenceCache:
    """Sums of log-probs under one policy, kept in a folder: ``reference.safetensors``, and ``reference.json`` with its fingerprint.

    Entries are found by their tokens, so the order of the data does not matter and data that grows only adds what is new.

    Args:
        folder: where; need not exist. All ranks must see it.
        model: the policy; the fingerprint is of its weights and configuration, under adapters of those that lie below.
        precision: in which log-probs are computed; part of the fingerprint.

    Raises:
        ConfigError: the folder holds the log-probs of another policy or precision, or is damaged.
    """

    def __init__(self, folder: str | Path, model: nn.Module, precision: str = "") -> None:
        self.folder = Path(folder)
        self.fingerprint = hash_tensors(f"reference {precision} {architecture(model)}", WholeTensors(base_state(model)))
        self._sums: dict[bytes, float] = {}
        if (self.folder / "reference.json").exists():
            self._load()

    def _load(self) -> None:
        found = read_json(self.folder / "reference.json").get("fingerprint")
        if found != self.fingerprint:
            raise ConfigError(
                f"reference_cache {self.folder} holds the log-probs of another model, or of this one in another precision: expected "
                f"fingerprint {self.fingerprint[:12]}, found {str(found)[:12]}; name another folder, or remove this one"
            )
        tensors = read_tensors(self.folder / "reference.safetensors")
        keys, values = tensors.get("keys", torch.zeros(0)), tensors.get("logprobs", torch.zeros(0))
        sound = keys.dtype == torch.uint8 and keys.shape == (len(values), _KEY_BYTES) and values.shape == (len(values),)
        if not sound or not torch.equal(tensors.get("sha256", torch.zeros(0)), _digest(keys, values)):
            raise ConfigError(f"{self.folder / 'reference.safetensors'} is damaged; remove the folder, and it is made again")
        self._sums = {bytes(key): value for key, value in zip(keys.numpy(), values.tolist(), strict=True)}

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

        Batches do not depend on the number of ranks, and what was computed is written every few thousand responses.

        Args:
            rows: all responses, in the same order on every rank.
            compute: gives the sums of a batch, float32 ``[B]``.
            batch_size: rows of a forward.
            rank: this process.
            world_size: number of processes.
            gather: a list of every rank's value.

        Returns:
            How many entries were new.

        Raises:
            ConfigError: ranks have read different folders.
        """
        known = gather(len(self._sums))
        if len(set(known)) > 1:
            raise ConfigError(f"reference_cache {self.folder}: expected a folder that all ranks see, found {known} entries on the ranks")
        added = 0
        for chunk in _chunks((row for row in rows if _key(row) not in self._sums), _CHUNK):
            missing = {_key(row): row for row in chunk}
            batches = list(_chunks(sorted(missing.items(), key=lambda item: len(item[1].input_ids)), batch_size))
            found: dict[bytes, float] = {}
            for batch in batches[rank::world_size]:
                found |= zip((key for key, _ in batch), compute([row for _, row in batch]).tolist(), strict=True)
            for share in gather(found):
                self._sums |= share
            added += len(missing)
            if rank == 0:
                self._save()
        if added and rank == 0:
            logger.info("computed the reference log-probs of %d responses; %s holds %d", added, self.folder, len(self))
        return added

    def _save(self) -> None:
        entries = sorted(self._sums.items())
        keys = torch.frombuffer(bytearray(b"".join(key for key, _ in entries)), dtype=torch.uint8).view(-1, _KEY_BYTES)
        values = torch.tensor([value for _, value in entries], dtype=torch.float32)
        # the fingerprint last: a folder without one is made again
        write_tensors(self.folder / "reference.safetensors", {"keys": keys, "logprobs": values, "sha256": _digest(keys, values)})
        write_json(self.folder / "reference.json", {"fingerprint": self.fingerprint, "responses": len(entries), "unit": "nats"})


def _digest(keys: Tensor, values: Tensor) -> Tensor:
    """SHA-256 of a cache's entries, uint8 ``[32]``: a flipped bit must not become another loss."""
    return torch.frombuffer(bytearray(hashlib.sha256(keys.numpy().tobytes() + values.numpy().tobytes()).digest()), dtype=torch.uint8)


class ReferencePolicy:
    """A frozen policy that is asked for log-probs of responses. With a cache it answers once, before training, and is then dropped.

    Not an ``nn.Module``: what holds it neither trains nor saves it.

    Args:
        model: the policy, frozen here; or one under adapters, which stays in training and answers with them off.
        pad_token_id: any id.
        cache: where its answers are kept, or None.
    """

    def __init__(self, model: nn.Module, pad_token_id: int, cache: ReferenceCache | None = None) -> None:
        self.model: nn.Module | None = model if has_adapters(model) else model.eval().requires_grad_(False)
        self.pad_token_id = pad_token_id
        self.cache = cache
        self.device: torch.device | str = "cpu"

    def to(self, device: torch.device | str) -> None:
        """Answer on this device."""
        self.device = device
        if self.model is not None and not has_adapters(self.model):
            self.model.to(device)

    def __call__(self, rows: Sequence[Demonstration]) -> Tensor:
        """Sums of log-probs, float32 ``[R]`` nats, without gradient."""
        return self._compute(rows) if self.cache is None else self.cache(rows).to(self.device)

    def remember(self, rows: Iterable[Demonstration], **share: Any) -> None:
        """Answer for all rows, where there is a cache, and drop a copy of the model. ``share`` is as of ``ReferenceCache.fill``.

        Raises:
            ConfigError: rows that are new, after the copy was dropped.
        """
        if self.cache is not None:
            with nullcontext() if self.model is None else gathered_parameters(self.model):  # ranks have unequal shares
                self.cache.fill(rows, self._compute, **share)
            if self.model is not None and not has_adapters(self.model):
                self.model = None

    @torch.no_grad()
    def _compute(self, rows: Sequence[Demonstration]) -> Tensor:
        if self.model is None:
            raise ConfigError(
                "reference_cache: a second fit brought responses that the first had not; build the module anew for other data"
            )
        with as_it_started(self.model) as model:
            return response_sums(model, rows, self.pad_token_id, self.device)[0]


def _key(row: Demonstration) -> bytes:
    digest = hashlib.blake2b(array("q", row.input_ids).tobytes(), digest_size=_KEY_BYTES)
    digest.update(bytes(row.response_mask))
    return digest.digest()


def _chunks(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk

"""The data module of ``DiscriminatorModule``."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader
from typing_extensions import override

from aapa_lightning.anchor.encoder_head import fold_of
from aapa_lightning.anchor.segment import Segmenter
from aapa_lightning.data.examples import Example, build_examples, choosing_prompts, prompt_key
from aapa_lightning.data.inputs import Source, as_records
from aapa_lightning.data.records import attach_experts, prompt_hash, split_records
from aapa_lightning.errors import ConfigError
from aapa_lightning.seeds import derive_seed
from aapa_lightning.thinking import ScoreThinking
from aapa_lightning.types import Record


class ShuffledBatches:
    """Batches of places in another order every epoch; a sized, plain iterable whose position is read, never stored.

    Args:
        units: what is shuffled: places int64 ``[n]`` that belong together, ``U`` of them.
        size: units in a batch.
        seed: of the orders.
        rank: this process; each takes its turn at the batches of an epoch, and the first ones fill up the last turn.
        world_size: number of processes.
        position: epoch, and number of its batches that this process has had; read when an iteration starts.
    """

    def __init__(
        self,
        units: Sequence[Tensor] | Tensor,
        size: int,
        seed: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        position: Callable[[], tuple[int, int]] = lambda: (0, 0),
    ) -> None:
        self.units, self.size, self.seed = units, size, seed
        self.rank, self.world_size, self.position = rank, world_size, position

    def __len__(self) -> int:
        """Batches of one epoch for each process."""
        return math.ceil(self._count / self.world_size)

    @property
    def _count(self) -> int:
        return math.ceil(len(self.units) / self.size)

    def __iter__(self) -> Iterator[Tensor]:
        epoch, start = self.position()
        order = self.order(epoch)
        for number in range(start, len(self)):
            first = (number * self.world_size + self.rank) % self._count * self.size
            yield torch.cat([self.units[i] for i in order[first : first + self.size]])

    def order(self, epoch: int) -> list[int]:
        """The units in the order of an epoch, a pure function of seed and epoch."""
        generator = torch.Generator().manual_seed(derive_seed("discriminator order", self.seed, epoch))
        order: list[int] = torch.randperm(len(self.units), generator=generator).tolist()
        return order

    def state_dict(self) -> dict[str, int]:
        """Nothing, since the position is read. A Trainer warns that loaders without this method do not resume."""
        return {}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Nothing to do."""


class DiscriminatorData(LightningDataModule):
    """Expert responses against other responses, split by prompt.

    Where a module chooses an epoch or fits a temperature on held-out prompts (``chooses``), every second of them does so (``choosing``),
    and the others are left to be reported. Experts' responses to other prompts are drawn within a part: the training fold (``folds`` of the
    module), the prompts that choose, those that are reported.

    The loaders yield indices int64 ``[B]`` into ``examples[split]``: the module encodes every example once and keeps the result. A module
    that compares the responses to a prompt sets ``whole_prompts``: then training batches hold all responses to each of their prompts, and
    prompts without an expert's and another response are left out.

    Args:
        train: dataset of prompts and expert responses (JSONL, Parquet, folder or Hub name), or records.
        negatives: response files: rollouts of the base policy at several temperatures, responses of other models.
        experts: response file whose responses become expert responses of the records.
        split: split of a folder or Hub dataset.
        columns: fields that have another name in the dataset, field to column: ``{"expert": "response"}``.
        other_prompts: negatives made of experts' responses to other prompts, per record; needs a discriminator that sees the prompt.
        val: dataset of held-out prompts; None holds ``val_fraction`` of the prompts of ``train`` out.
        val_fraction: share of the prompts held out when ``val`` is None.
        missing_experts: what happens to a record without an expert response: ``error``, or ``drop`` it.
        test_negatives: response files that ``test`` judges on the held-out prompts; ``negatives`` by default.
        test_experts: response file whose responses are the only positives of ``test``; the records' experts by default.
        batch_size: responses in a training step; with whole prompts, as many prompts as hold about that many.
        segmenter: how responses are split into sentences.
        score_thinking: keep the thinking before an answer.
        seed: of the split, the pairing of prompts and the order of training.
    """

    def __init__(
        self,
        train: Source,
        negatives: list[str] | None = None,
        experts: str | None = None,
        split: str | None = None,
        columns: dict[str, str] | None = None,
        other_prompts: float = 1.0,
        val: Source | None = None,
        val_fraction: float = 0.2,
        missing_experts: Literal["error", "drop"] = "error",
        test_negatives: list[str] | None = None,
        test_experts: str | None = None,
        batch_size: int = 64,
        segmenter: Segmenter = Segmenter(),  # noqa: B008 - frozen, so sharing it is safe
        score_thinking: ScoreThinking = False,
        seed: int = 0,
    ) -> None:
        super().__init__()  # Path among the types keeps the command line from reading a dataset as a configuration
        if other_prompts < 0 or batch_size < 1:
            raise ConfigError(f"expected other_prompts of at least 0 and batch_size of at least 1, found {other_prompts} and {batch_size}")
        self.train, self.val, self.experts, self.split, self.columns = train, val, experts, split, columns
        self.negatives, self.test_negatives, self.test_experts = negatives or [], test_negatives or [], test_experts
        self.other_prompts, self.val_fraction, self.batch_size = other_prompts, val_fraction, batch_size
        self.missing_experts = missing_experts
        self.segmenter, self.score_thinking, self.seed = segmenter, score_thinking, seed
        self.examples: dict[str, list[Example]] = {}
        self.whole_prompts = False
        self.choosing: frozenset[int] = frozenset()

    @override
    def setup(self, stage: str) -> None:
        train, held_out = self._read(self.train), [] if self.val is None else self._read(self.val)
        if self.val is None:
            train, held_out = (list(part) for part in split_records(train, self.val_fraction, self.seed))
        module = getattr(self.trainer, "lightning_module", None)
        self.choosing = choosing_prompts(held_out) if getattr(module, "chooses", False) else frozenset()
        if stage == "fit":
            folds = getattr(module, "folds", 1)
            self.examples["train"] = self._build(train, self.negatives, lambda record: fold_of(record.prompt, folds))
        if held_out and stage in ("fit", "validate"):
            self.examples["val"] = self._build(held_out, self.negatives, self._chooses)
        if stage == "test":
            if not held_out:
                raise ConfigError(f"test judges held-out prompts: expected val, or val_fraction above 0, found {self.val_fraction}")
            if self.test_experts:
                joined = attach_experts([replace(record, experts=()) for record in held_out], self.test_experts)
                held_out = [record for record in joined if record.experts]
            examples = self._build(held_out, self.test_negatives or self.negatives, self._chooses)
            self.examples["test"] = [example for example in examples if not self._chooses(example.record)]

    def _read(self, source: Source) -> list[Record]:
        records = as_records(source, split=self.split, experts=self.experts, columns=self.columns)
        return [record for record in records if record.experts or self.missing_experts == "error"]

    def _chooses(self, record: Record) -> bool:
        return prompt_key(record) in self.choosing

    def _build(self, records: Sequence[Record], negatives: list[str], part: Callable[[Record], int]) -> list[Example]:
        return build_examples(records, negatives, other_prompts=self.other_prompts, seed=self.seed, part=part)

    @override
    def train_dataloader(self) -> ShuffledBatches:
        trainer: Any = self.trainer
        options: dict[str, Any] = {"seed": self.seed}
        if trainer is not None:
            options |= {"rank": trainer.global_rank, "world_size": trainer.world_size, "position": lambda: place_in_epoch(trainer)}
        if not self.whole_prompts:
            return ShuffledBatches(torch.arange(len(self.examples["train"]))[:, None], self.batch_size, **options)
        prompts = paired_prompts(self.examples["train"])
        count = max(1, round(self.batch_size * len(prompts) / sum(map(len, prompts))))
        return ShuffledBatches(prompts, count, **options)

    def fingerprint(self) -> str:
        """Equal for equal examples in the same order, of all splits that are set up."""
        digest = hashlib.sha256()
        for split, examples in sorted(self.examples.items()):
            for example in examples:
                row = (split, prompt_hash(example.record.prompt), example.kind, example.text)
                digest.update(repr(row).encode(errors="surrogatepass"))
        return digest.hexdigest()

    @override
    def val_dataloader(self) -> DataLoader[Tensor] | list[Tensor]:
        return self._whole("val") if "val" in self.examples else []

    @override
    def test_dataloader(self) -> DataLoader[Tensor]:
        return self._whole("test")

    def _whole(self, name: str) -> DataLoader[Tensor]:
        """One batch: figures such as an AUROC are of all examples together."""
        size = len(self.examples[name])
        return DataLoader(range(size), size)  # type: ignore[arg-type]  # a range is a map-style dataset, collated to a tensor


def place_in_epoch(trainer: Any) -> tuple[int, int]:
    """Epoch, and number of its batches on this rank that are done, by the optimiser steps that a run has taken.

    Lightning ends an epoch with an optimiser step, however few of its micro-steps are left.
    """
    batches, accumulate = trainer.num_training_batches, trainer.accumulate_grad_batches
    epoch, step = divmod(trainer.global_step, math.ceil(batches / accumulate))
    return epoch, step * accumulate


def paired_prompts(examples: Sequence[Example]) -> list[Tensor]:
    """Places of the responses to each prompt that has both an expert's and another one: int64 ``[n]`` each.

    Raises:
        ConfigError: there is no such prompt.
    """
    places: dict[str, list[int]] = {}
    for i, example in enumerate(examples):
        places.setdefault(prompt_hash(example.record.prompt), []).append(i)
    kept = [torch.tensor(rows) for rows in places.values() if len({examples[i].kind == "expert" for i in rows}) == 2]
    if not kept:
        kinds = [example.kind == "expert" for example in examples]
        raise ConfigError(
            f"loss=bradley_terry compares responses to one prompt: expected prompts with an expert's and another response, found none "
            f"among {len(places)} prompts with {sum(kinds)} expert responses and {len(kinds) - sum(kinds)} others; name response files to "
            "the prompts of `train` in `negatives`, set other_prompts above 0, or take loss=cross_entropy"
        )
    return kept

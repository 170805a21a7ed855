"""The data module of ``DiscriminatorModule``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader
from typing_extensions import override

from aapa_lightning.anchor.segment import Segmenter
from aapa_lightning.data.examples import Example, build_examples
from aapa_lightning.data.records import attach_experts, prompt_hash, read_records, split_records
from aapa_lightning.errors import ConfigError
from aapa_lightning.thinking import ScoreThinking
from aapa_lightning.types import Record


class DiscriminatorData(LightningDataModule):
    """Expert responses against other responses, split by prompt.

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
        train: str | Path | Sequence[Record],
        negatives: list[str] | None = None,
        experts: str | None = None,
        split: str | None = None,
        columns: dict[str, str] | None = None,
        other_prompts: float = 1.0,
        val: str | Path | Sequence[Record] | None = None,
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

    @override
    def setup(self, stage: str) -> None:
        train, held_out = self._read(self.train), [] if self.val is None else self._read(self.val)
        if self.val is None:
            train, held_out = (list(part) for part in split_records(train, self.val_fraction, self.seed))
        if stage == "fit":
            self.examples["train"] = self._build(train, self.negatives)
        if held_out and stage in ("fit", "validate"):
            self.examples["val"] = self._build(held_out, self.negatives)
        if stage == "test":
            if not held_out:
                raise ConfigError(f"test judges held-out prompts: expected val, or val_fraction above 0, found {self.val_fraction}")
            if self.test_experts:
                joined = attach_experts([replace(record, experts=()) for record in held_out], self.test_experts)
                held_out = [record for record in joined if record.experts]
            self.examples["test"] = self._build(held_out, self.test_negatives or self.negatives)

    def _read(self, source: str | Path | Sequence[Record]) -> list[Record]:
        if isinstance(source, str | Path):
            source = read_records(str(source), split=self.split, experts=self.experts, columns=self.columns)
        return [record for record in source if record.experts or self.missing_experts == "error"]

    def _build(self, records: Sequence[Record], negatives: list[str]) -> list[Example]:
        return build_examples(records, negatives, other_prompts=self.other_prompts, seed=self.seed)

    @override
    def train_dataloader(self) -> DataLoader[Tensor]:
        options: dict[str, Any] = {"shuffle": True, "generator": torch.Generator().manual_seed(self.seed)}
        if not self.whole_prompts:
            return _loader(len(self.examples["train"]), self.batch_size, **options)
        prompts = paired_prompts(self.examples["train"])
        count = max(1, round(self.batch_size * len(prompts) / sum(map(len, prompts))))
        return DataLoader(prompts, count, collate_fn=torch.cat, **options)  # type: ignore[arg-type]  # a list is a map-style dataset

    @override
    def val_dataloader(self) -> DataLoader[Tensor] | list[Tensor]:
        return self._whole("val") if "val" in self.examples else []

    @override
    def test_dataloader(self) -> DataLoader[Tensor]:
        return self._whole("test")

    def _whole(self, name: str) -> DataLoader[Tensor]:
        """One batch: figures such as an AUROC are of all examples together."""
        return _loader(len(self.examples[name]), len(self.examples[name]))


def _loader(size: int, batch_size: int, **options: Any) -> DataLoader[Tensor]:
    return DataLoader(range(size), batch_size, **options)  # type: ignore[arg-type]  # a range is a map-style dataset, collated to a tensor


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

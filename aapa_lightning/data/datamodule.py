"""The datamodule of policies: records of three splits, read and checked once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePath
from typing import Any, Literal

import lightning as L

from aapa_lightning.data.inputs import Source, as_records
from aapa_lightning.data.records import require_experts, split_records
from aapa_lightning.errors import ConfigError, Limit, check_numbers, refuse_idle
from aapa_lightning.hyperparameters import plain, remember
from aapa_lightning.types import Record


class AapaDataModule(L.LightningDataModule):
    """Prompts, expert responses and instructions for policy modules.

    Args:
        train: training records: a JSONL or Parquet file, several of them, a folder or Hub name; or in Python records, rows
            (dictionaries) or a ``datasets.Dataset``.
        val: validation records; None splits ``val_fraction`` of the prompts off ``train``.
        test: test records; None tests on the validation split.
        demonstrations: what is imitated (SFT, CHORD, UniAPL), or pairs; None takes ``train``.
        golden: pairs of an expert's response (chosen) and a policy's (rejected) that a reward model is also trained on.
        golden_val: such pairs of other prompts, measured with the validation and the test split.
        experts: a response file whose responses become the experts of all splits, joined by key or prompt.
        columns: fields that have another name in the files, field to column: ``{"expert": "response"}``.
        missing_experts: what happens to a record without an expert response when ``experts`` is given: ``error``, or ``drop`` it.
        val_fraction: share of training prompts held out when ``val`` is None; 0 holds none out.
        seed: seed of that split.
    """

    def __init__(
        self,
        train: Source | None = None,
        *,
        val: Source | None = None,
        test: Source | None = None,
        demonstrations: Source | None = None,
        golden: Source | None = None,
        golden_val: Source | None = None,
        experts: str | None = None,
        columns: dict[str, str] | None = None,
        missing_experts: Literal["error", "drop"] = "error",
        val_fraction: float = 0.0,
        seed: int = 0,
    ) -> None:
        check_numbers(locals(), {"val_fraction": Limit(0, 1, below=True), "seed": Limit(whole=True)}, "data.")
        if not val_fraction:
            refuse_idle(AapaDataModule, locals(), ("seed",), "without val_fraction, whose split alone it draws", "data.")
        super().__init__()  # Path among the types keeps the command line from reading a dataset as a configuration
        self._sources = {"train": train, "val": val, "test": test, "demonstrations": demonstrations}
        self._sources |= {"golden": golden, "golden_val": golden_val}
        self._experts = experts
        self._columns = columns
        self._missing_experts = missing_experts
        self._val_fraction = val_fraction
        self._seed = seed
        self._splits: dict[str, Sequence[Record]] = {}
        named = {
            name: str(source) if isinstance(source, str | PurePath) else f"a {type(source).__name__}"
            for name, source in self._sources.items()
            if source is not None
        }
        settings = {"columns": columns, "missing_experts": missing_experts, "val_fraction": val_fraction, "seed": seed}
        remember(self, plain({"data": {**named, "experts": experts, **settings}}))

    def setup(self, stage: str | None = None) -> None:
        """Read and validate every split that is named."""
        if self._splits:
            return
        splits = {name: self._read(source) for name, source in self._sources.items() if source is not None}
        if "val" not in splits and self._val_fraction and "train" in splits:
            splits["train"], splits["val"] = split_records(splits["train"], self._val_fraction, self._seed)
        if "golden_val" in splits and not {"val", "test"} & splits.keys():
            raise ConfigError("data.golden_val: expected `val` or `test` beside it, whose evaluation it joins, found neither")
        self._splits = splits

    def _read(self, source: Source) -> Sequence[Record]:
        records = as_records(source, columns=self._columns, experts=self._experts)
        if self._experts is None:
            return records
        if self._missing_experts == "drop":
            return [record for record in records if record.experts]
        require_experts(records, f"{self._experts} has no response to it (missing_experts: drop leaves such records out)")
        return records

    def _require(self, name: str) -> Sequence[Record]:
        if name not in self._splits:
            raise ConfigError(f"data: expected `{name}` records, found none; set data.init_args.{name}")
        return self._splits[name]

    def train_dataloader(self) -> Any:
        """Windows of the module in training."""
        self._require("train")
        return self._module().train_loader(self._splits)

    def val_dataloader(self) -> Any:
        """Batches of the validation split; none without one."""
        return self._eval_loaders("val") if "val" in self._splits else []

    def test_dataloader(self) -> Any:
        """Batches of the test split, or of the validation split."""
        name = next((name for name in ("test", "val") if name in self._splits), "test")
        return self._eval_loaders(name)

    def _eval_loaders(self, name: str) -> Any:
        splits = [self._require(name)] + ([self._splits["golden_val"]] if "golden_val" in self._splits else [])
        loaders = [self._module().eval_loader(records) for records in splits]
        return loaders if len(loaders) > 1 else loaders[0]

    def predict_dataloader(self) -> Any:
        """Batches of the test split if there is one, else of the validation, else of the training split."""
        name = next((name for name in ("test", "val", "train") if name in self._splits), "train")
        return self._module().eval_loader(self._require(name))

    def _module(self) -> Any:
        if self.trainer is None:
            raise ConfigError("data: AapaDataModule is used by a Trainer; in a loop of your own use WindowLoader and EvalLoader")
        module: Any = self.trainer.lightning_module
        golden = [name for name in ("golden", "golden_val") if name in self._splits]
        if golden and not getattr(module, "takes_golden", False):
            raise ConfigError(f"data.{golden[0]}: expected a RewardModelModule, found {type(module).__name__}; leave data.{golden[0]} out")
        return module

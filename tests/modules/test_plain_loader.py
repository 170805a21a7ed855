"""Records through Lightning's own batch transfer: in a plain DataLoader, for our modules and for a user's."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from aapa_lightning.data.datamodule import AapaDataModule
from aapa_lightning.errors import ConfigError
from aapa_lightning.loop.evaluate import PlainBatches
from aapa_lightning.types import Demonstration, Record


def texts(batches):
    return [row["response"] for rows in batches for row in rows]


def test_predict_draws_the_same_from_a_plain_loader(kit, spec):
    records = kit.make_records(7)
    module = kit.make_module("grpo", spec, eval_batch_size=3)
    ours = kit.make_trainer().predict(module, AapaDataModule(test=records))
    plain = kit.make_trainer().predict(module, DataLoader(records, batch_size=3))
    assert texts(plain) == texts(ours)
    assert len(texts(ours)) == 7


def test_validation_reads_a_plain_loader(kit, spec):
    records = kit.make_records(5)
    module = kit.make_module("sft", spec, eval_batch_size=2)
    (ours,) = kit.make_trainer().validate(module, AapaDataModule(kit.make_records(), val=records), verbose=False)
    (plain,) = kit.make_trainer().validate(module, DataLoader(records, batch_size=2), verbose=False)
    assert plain == ours


class Own(L.LightningModule):
    """A user's module that is given records."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def predict_step(self, batch, batch_idx):
        return batch


@pytest.mark.parametrize("batch", [list, tuple, lambda rows: {"records": list(rows)}, lambda rows: rows[0]])
def test_a_users_module_gets_records_as_they_are(batch, kit):
    records = kit.make_records(4)
    loader = DataLoader(records, batch_size=2, collate_fn=batch)
    assert kit.make_trainer().predict(Own(), loader) == [batch(records[:2]), batch(records[2:])]


def test_demonstrations_pass_too(kit):
    rows = [Demonstration([1, 2], [False, True], record) for record in kit.make_records(2)]
    assert kit.make_trainer().predict(Own(), DataLoader(rows, batch_size=2, collate_fn=list)) == [rows]


def test_places_in_the_split_of_every_rank():
    records = [Record(str(i)) for i in range(5)]
    for rank in range(2):
        batches = PlainBatches()
        steps = [batches.step(part, number, rank=rank, world_size=2) for number, part in enumerate((records[:2], records[2:]))]
        assert [step.indices for step in steps] == [[rank, 2 + rank], [4 + rank, 6 + rank, 8 + rank]]
    with pytest.raises(ConfigError, match="expected a loader of batches of Records, found Tensor"):
        PlainBatches().step(torch.zeros(2), 0)

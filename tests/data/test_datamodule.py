import json
from types import SimpleNamespace

import pytest

from aapa_lightning.data.datamodule import AapaDataModule
from aapa_lightning.errors import ConfigError, DataError
from aapa_lightning.types import Record

RECORDS = [Record(f"prompt {i}", (f"expert {i}",)) for i in range(10)]


class FakeModule:
    """Says what it was given."""

    def train_loader(self, splits):
        return "train", splits["train"], splits.get("demonstrations")

    def eval_loader(self, records):
        return "eval", records


def attached(*args, **kwargs) -> AapaDataModule:
    data = AapaDataModule(*args, **kwargs)
    data.trainer = SimpleNamespace(lightning_module=FakeModule())
    data.setup("fit")
    return data


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_records_are_used_as_they_are() -> None:
    data = attached(RECORDS)
    assert data.train_dataloader() == ("train", RECORDS, None)
    data = attached(RECORDS, demonstrations=RECORDS[:2], val=RECORDS[2:4], test=RECORDS[4:6])
    assert data.train_dataloader() == ("train", RECORDS, RECORDS[:2])
    assert data.val_dataloader() == ("eval", RECORDS[2:4])
    assert data.test_dataloader() == ("eval", RECORDS[4:6])


def test_files_are_read_once(tmp_path) -> None:
    rows = [{"prompt": f"p{i}", "expert": "e"} for i in range(3)]
    path = write(tmp_path / "train.jsonl", rows)
    data = attached(path, val=write(tmp_path / "val.jsonl", rows[:1]))
    (tmp_path / "train.jsonl").unlink()
    data.setup("test")
    _, prompts, _ = data.train_dataloader()
    assert [record.prompt for record in prompts] == ["p0", "p1", "p2"]
    assert prompts[1].source == f"{path}:2"
    assert len(data.val_dataloader()[1]) == 1


def test_a_malformed_file_stops_the_run_with_its_line(tmp_path) -> None:
    path = write(tmp_path / "train.jsonl", [{"prompt": "p"}, {"no": 1}])
    with pytest.raises(DataError, match=r"train\.jsonl:2"):
        attached(path)


def test_a_fraction_is_held_out_of_training_only() -> None:
    data = attached(RECORDS, val_fraction=0.3)
    _, train, demonstrations = data.train_dataloader()
    _, val = data.val_dataloader()
    assert demonstrations is None
    assert len(val) == 3
    assert sorted(record.prompt for record in [*train, *val]) == sorted(record.prompt for record in RECORDS)
    same, other = (attached(RECORDS, val_fraction=0.3, seed=seed).val_dataloader()[1] for seed in (0, 1))
    assert list(same) == list(val)
    assert list(other) != list(val)
    given = attached(RECORDS, val=RECORDS[:1], val_fraction=0.3)
    assert given.train_dataloader()[1] == RECORDS
    assert given.val_dataloader()[1] == RECORDS[:1]
    with pytest.raises(ConfigError, match=r"val_fraction: expected a number in \[0, 1\)"):
        attached(RECORDS, val_fraction=1.0)


def test_which_split_is_measured() -> None:
    train, val, test = RECORDS[:2], RECORDS[2:4], RECORDS[4:6]
    assert attached(train).val_dataloader() == []
    assert attached(train, val=val).test_dataloader() == ("eval", val)
    assert attached(test=test, val=val).test_dataloader() == ("eval", test)
    assert attached(train, val=val, test=test).predict_dataloader() == ("eval", test)
    assert attached(train, val=val).predict_dataloader() == ("eval", val)
    assert attached(train).predict_dataloader() == ("eval", train)


def test_a_missing_split_is_named() -> None:
    with pytest.raises(ConfigError, match=r"expected `train` records, found none; set data\.init_args\.train"):
        attached(val=RECORDS).train_dataloader()
    with pytest.raises(ConfigError, match="expected `test` records"):
        attached(RECORDS).test_dataloader()
    with pytest.raises(ConfigError, match="expected `train` records"):
        attached().predict_dataloader()


def test_without_a_trainer_it_points_to_the_loaders() -> None:
    data = AapaDataModule(RECORDS)
    data.setup()
    with pytest.raises(ConfigError, match="WindowLoader and EvalLoader"):
        data.train_dataloader()


@pytest.mark.parametrize("kind", ["file", "records"])
def test_experts_are_joined_to_files_and_records(tmp_path, kind: str) -> None:
    rows = [{"prompt": "a"}, {"prompt": "b", "expert": "own"}]
    experts = write(tmp_path / "experts.jsonl", [{"prompt": "a", "response": "one"}, {"prompt": "b", "response": "two"}])
    source = write(tmp_path / "train.jsonl", rows) if kind == "file" else [Record("a"), Record("b", ("own",))]
    _, train, _ = attached(source, experts=experts).train_dataloader()
    assert [record.experts for record in train] == [("one",), ("own", "two")]


@pytest.mark.parametrize("kind", ["file", "records"])
def test_a_record_without_an_expert_is_an_error_or_left_out(tmp_path, kind: str) -> None:
    experts = write(tmp_path / "experts.jsonl", [{"prompt": "a", "response": "one"}])
    source = write(tmp_path / "train.jsonl", [{"prompt": "a"}, {"prompt": "b"}]) if kind == "file" else [Record("a"), Record("b")]
    with pytest.raises(DataError, match=r"no expert response, but .*experts\.jsonl has no response to it"):
        attached(source, experts=experts)
    _, train, _ = attached(source, experts=experts, missing_experts="drop").train_dataloader()
    assert [record.prompt for record in train] == ["a"]

"""One reader: the same JSON gives the same records, whatever holds it; what is here is never looked up on the Hub; bombs stay packed."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys

import pytest

from aapa_lightning.cli import main
from aapa_lightning.data import jsonl, parquet
from aapa_lightning.data import records as records_module
from aapa_lightning.data.check import check_dataset
from aapa_lightning.data.datamodule import AapaDataModule
from aapa_lightning.data.inputs import as_records
from aapa_lightning.data.records import read_records
from aapa_lightning.data.responses import read_responses
from aapa_lightning.errors import ConfigError, DataError
from aapa_lightning.types import Record

pytestmark = pytest.mark.usefixtures("arrow_cache")

ROWS = [
    {"prompt": "When?", "answer": "2026-01-01", "key": 1},
    {"prompt": "Then?", "answer": "2026-02-01T10:00:00", "steps": 1, "meta": {"a": 1}},
    {"prompt": "Last?", "answer": "12", "steps": 2.5, "meta": {"b": [{"c": 1}, {"d": "x"}]}, "big": 12345678901234567890123},
]


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def plain(records):
    return [(record.prompt, record.key, dict(record.extra)) for record in records]


@pytest.fixture(autouse=True)
def no_hub(monkeypatch):
    """Opening anything but a folder that is here through ``datasets`` is a failure."""
    import datasets

    def refuse(name, *args, **kwargs):
        raise AssertionError(f"{name} was looked up")

    monkeypatch.setattr(datasets, "load_dataset", refuse)


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return str(path)


def test_the_same_json_gives_the_same_values(tmp_path, monkeypatch):
    text = lines(ROWS)
    array = json.dumps(ROWS, indent=1)
    places = [
        write(tmp_path / "a.jsonl", text),
        write(tmp_path / "B.JSONL", text),
        write(tmp_path / "noending", text),
        write(tmp_path / "c.jsonl.gz", gzip.compress(text.encode())),
        write(tmp_path / "packed", gzip.compress(text.encode())),
        write(tmp_path / "array.json", array),
        write(tmp_path / "array2.json.gz", gzip.compress(array.encode())),
    ]
    for name, data in (("f1/train.jsonl", text), ("f2/train-0.jsonl", lines(ROWS[:1])), ("f2/train-1.jsonl", lines(ROWS[1:]))):
        write(tmp_path / name, data)
    write(tmp_path / "f3" / "train.jsonl.gz", gzip.compress(text.encode()))
    expected = plain(read_records(places[0]))
    assert expected[2][2]["big"] == 12345678901234567890123
    assert expected[1][2]["steps"] == 1
    assert isinstance(expected[1][2]["steps"], int)
    places += [str(tmp_path / name) for name in ("f1", "f2", "f3")]
    for limit in (2**24, -1):  # in memory, and left on disk
        monkeypatch.setattr(records_module, "IN_MEMORY", limit)
        for place in places:
            found = read_records(place)
            assert plain(found) == expected, place
            assert found[1].source.rpartition(":")[2] in ("1", "2")
    assert plain(as_records(ROWS)) == expected
    assert plain(as_records([places[0]])) == expected


def test_folders_have_splits(tmp_path):
    write(tmp_path / "d" / "train.jsonl", lines(ROWS[:1]))
    write(tmp_path / "d" / "test.jsonl", lines(ROWS[1:]))
    assert len(read_records(str(tmp_path / "d"))) == 1
    assert [record.source for record in read_records(str(tmp_path / "d"), split="test")] == [f"{tmp_path}/d/test.jsonl:{i}" for i in (1, 2)]
    with pytest.raises(DataError, match=r"no split 'val'; it has \['test', 'train'\]"):
        read_records(str(tmp_path / "d"), split="val")


def test_what_arrow_fills_with_nulls_is_absent(tmp_path):
    import datasets

    rows = [
        {"prompt": "a", "meta": {"a": 1}, "deep": [{"x": {"y": "s"}}], "none": None, "answer": None},
        {"prompt": "b", "meta": {"b": "t"}, "deep": [{"x": {"z": 2}}], "answer": "2026-01-01"},
    ]
    table = datasets.Dataset.from_list(rows)
    table.to_parquet(tmp_path / "d.parquet")
    table.save_to_disk(tmp_path / "saved")
    expected = plain(read_records(write(tmp_path / "d.jsonl", lines(rows))))
    assert expected[0][2] == {"meta": {"a": 1}, "deep": [{"x": {"y": "s"}}]}
    for source in (str(tmp_path / "d.parquet"), str(tmp_path / "saved"), table, rows):
        assert plain(as_records(source)) == expected


def test_a_column_that_a_row_leaves_out_is_null_and_one_that_all_leave_out_is_misspelt(tmp_path):
    rows = [{"question": "a", "good": "x", "bad": "y"}, {"question": "b", "good": "x"}, {"question": "c", "bad": "z"}]
    columns = {"prompt": "question", "chosen": "good", "rejected": "bad"}
    path = write(tmp_path / "r.jsonl", lines(rows))
    sides = [("x", "y"), ("x", None), (None, "z")]
    for found in (read_records(path, columns=columns), as_records(rows, columns=columns)):
        assert [(record.chosen, record.rejected) for record in found] == sides
    for wrong in ({"expert": "reply"}, {"prompt": "qestion"}):
        for read in (lambda c: read_records(path, columns=c), lambda c: as_records(rows, columns=c)):
            with pytest.raises(DataError, match=r"columns names '(reply|qestion)', found only \['bad', 'good', 'question'\]"):
                read({"prompt": "question"} | wrong)
    report = check_dataset(path, columns=columns | {"expert": "reply"})
    assert (report.valid, report.error_count) == (3, 1)
    assert "columns names 'reply'" in report.errors[0]


@pytest.mark.parametrize("value", ["True", "true", 1, 1.0, "1", "False", 0, 0.0, "0", " false "])
def test_labels(value):
    (record,) = as_records([{"prompt": "a", "completion": "x", "label": value}])
    good = value in ("True", "true", 1, 1.0, "1")
    assert (record.chosen, record.rejected) == (("x", None) if good else (None, "x"))
    assert "label" not in record.extra


@pytest.mark.parametrize(
    "name", ["data.csv", "x.jsonl.gz", "sub/data.csv", "train.parquet", "d/train.jsonl", "here/nothing", "runs/a/b", "a.txt"]
)
def test_what_is_spelt_like_a_path_is_not_looked_up(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    with pytest.raises(DataError, match=r"does not exist|No such file"):
        read_records(name)


@pytest.mark.parametrize("data", [b"prompt,expert\na,b\n", b"\x89PNG\r\n", gzip.compress(b"a,b\n", mtime=0)])
def test_files_that_hold_no_json_are_named(tmp_path, data, capsys):
    path = write(tmp_path / "data.csv", data)
    assert main(["data", "check", path]) == 2
    assert "data.csv: the ending '.csv' is not known and the file holds no JSON objects; expected" in capsys.readouterr().err


def test_data_modules_take_rows_tables_and_paths(tmp_path):
    import datasets

    rows = [{"prompt": "a", "expert": "x"}, {"prompt": "b", "expert": "y"}]
    table = datasets.Dataset.from_list(rows).with_format("numpy")
    path = write(tmp_path / "d.jsonl", lines(rows))
    for source in (rows, table, path, [path], [Record("a", ("x",)), Record("b", ("y",))]):
        data = AapaDataModule(train=source, val=source)
        data.setup()
        assert [(r.prompt, r.experts) for r in data._require("train")] == [("a", ("x",)), ("b", ("y",))]
    experts = write(tmp_path / "e.jsonl", '{"prompt": "a", "response": "z"}\n')
    assert as_records(table, experts=experts)[0].experts == ("x", "z")
    for wrong in (datasets.DatasetDict(train=table), iter(rows), 3, [1], [rows[0], "x"]):
        with pytest.raises(ConfigError, match="data: expected"):
            as_records(wrong)
    with pytest.raises(DataError, match=r"rows:row 1: no prompt"):
        as_records([rows[0], {"text": "x"}])


# Bombs -------------------------------------------------------------------------------------------------------------------------------


def test_compressed_lines_that_unpack_to_too_much_are_refused(tmp_path, monkeypatch):
    row = json.dumps({"prompt": "a" * 1000}).encode() + b"\n"
    path = write(tmp_path / "bomb.jsonl.gz", gzip.compress(row * 5000))
    assert len(read_records(path)) == 5000
    monkeypatch.setattr(jsonl, "_ALWAYS", 2**20)
    with pytest.raises(DataError, match=r"bomb\.jsonl\.gz: unpacks to more than 1 MiB"):
        read_records(path)
    row = json.dumps({"key": 1, "response": "a" * 1000}).encode() + b"\n"
    with pytest.raises(DataError, match="unpacks to more than 1 MiB"):
        read_responses(write(tmp_path / "r.jsonl.gz", gzip.compress(row * 5000)))


def test_broken_archives_and_endless_lines_are_named(tmp_path, monkeypatch):
    packed = gzip.compress(lines(ROWS).encode())
    for damaged in (packed[:-9], packed[:30] + b"\xff" * 8 + packed[38:]):
        with pytest.raises(DataError, match=r"cannot read .*x\.jsonl\.gz"):
            read_records(write(tmp_path / "x.jsonl.gz", damaged))
    monkeypatch.setattr(jsonl, "LONGEST_LINE", 1000)
    long = write(tmp_path / "long.jsonl", lines(ROWS[:1]) + json.dumps({"prompt": "a" * 1000}) + "\n")
    for limit in (2**24, -1):
        monkeypatch.setattr(records_module, "IN_MEMORY", limit)
        with pytest.raises(DataError, match=r"long\.jsonl:2: the line has more than"):
            read_records(long)


def bombs(folder):
    """Small files that unpack to some 1,000 times their size: many equal rows, long lists of zeros, large texts that repeat."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    tables = {
        "rows": pa.table({"prompt": ["a" * 100] * 100_000}),
        "lists": pa.table({"prompt": ["a"], "zeros": [[0] * 2_000_000]}),
        "texts": pa.table({"prompt": ["a" * 1_000_000] * 200}),
    }
    for name, table in tables.items():
        pq.write_table(table, folder / f"{name}.parquet", compression="zstd")
        yield folder / f"{name}.parquet"


def test_parquet_that_unpacks_to_too_much_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "ALWAYS", 2**20)
    (tmp_path / "folder").mkdir()
    for path in bombs(tmp_path):
        assert path.stat().st_size < 50_000
        with pytest.raises(
            DataError, match=rf"{path.name}: row group 0 brings the file to .* MiB or more once unpacked, over the limit of"
        ):
            read_records(str(path))
        train = path.rename(tmp_path / "folder" / "train.parquet")
        with pytest.raises(DataError, match="once unpacked"):
            read_records(str(tmp_path / "folder"))
        train.unlink()


def test_a_bomb_is_found_before_it_is_unpacked(tmp_path):
    """In a process of its own, whose memory has held nothing else."""
    look = (
        "import sys, pyarrow as pa\n"
        "from aapa_lightning.data import parquet\n"
        "parquet.ALWAYS = 2**20\n"
        "for path in sys.argv[1:]:\n"
        "    try: parquet.check_parquet(path)\n"
        "    except parquet.DataError: print('refused')\n"
        "print(pa.default_memory_pool().max_memory())\n"
    )
    done = subprocess.run([sys.executable, "-c", look, *map(str, bombs(tmp_path))], capture_output=True, text=True, check=True)
    *verdicts, peak = done.stdout.split()
    assert verdicts == ["refused"] * 3
    assert int(peak) < 2**24, "the bombs hold 10, 16 and 200 MB"


def test_ordinary_tables_pass(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(parquet, "ALWAYS", 2**10)
    rows = [{"prompt": f"Describe harbor {i} of many.", "meta": {"n": i}, "tags": ["a", "b"]} for i in range(3000)]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "d.parquet")
    assert read_records(str(tmp_path / "d.parquet"))[2999].extra["meta"] == {"n": 2999}

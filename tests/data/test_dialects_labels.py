"""Responses with a label and without a counterpart, as KTO and its kin are trained on."""

import json

import pytest

from aapa_lightning.data.check import check_dataset
from aapa_lightning.data.records import parse_record, read_records
from aapa_lightning.errors import DataError

USER = {"role": "user", "content": "Hi"}
REPLY = {"role": "assistant", "content": "Hello."}
SILENCE = {"role": "assistant", "content": ""}


def sides(row, **options):
    record = parse_record(row, "f:1", **options)
    return record.prompt, record.experts, record.chosen, record.rejected


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "Hi", "completion": "Hello.", "label": True}, ("Hi", (), "Hello.", None)),
        ({"prompt": "Hi", "completion": "Hello.", "label": False}, ("Hi", (), None, "Hello.")),
        ({"prompt": "Hi", "completion": "", "label": False}, ("Hi", (), None, "")),
        ({"prompt": [USER], "completion": [REPLY], "label": True}, ((USER,), (), "Hello.", None)),
        ({"prompt": [USER], "completion": [SILENCE], "label": False}, ((USER,), (), None, "")),
        ({"prompt": [USER], "completion": [REPLY, USER, REPLY], "label": False}, ((USER, REPLY, USER), (), None, "Hello.")),
        ({"messages": [USER, REPLY], "label": True}, ((USER,), (), "Hello.", None)),
        ({"messages": [USER, SILENCE], "label": False}, ((USER,), (), None, "")),
        ({"prompt": "Hi", "chosen": "Hello."}, ("Hi", (), "Hello.", None)),
        ({"prompt": "Hi", "rejected": "Hello.", "chosen": None}, ("Hi", (), None, "Hello.")),
        ({"chosen": [USER, REPLY]}, ((USER,), (), "Hello.", None)),
        ({"prompt": "Hi", "rejected": [USER, SILENCE]}, ("Hi", (), None, "")),
    ],
)
def test_one_side_alone(row, expected):
    assert sides(row) == expected
    assert parse_record(row, "f:1").extra == {}


def test_a_pair_may_reject_silence():
    assert sides({"prompt": "Hi", "chosen": "Hello.", "rejected": ""}) == ("Hi", (), "Hello.", "")
    assert sides({"chosen": [USER, REPLY], "rejected": [USER, SILENCE]}) == ((USER,), (), "Hello.", "")
    assert sides({"chosen": "Q? A.", "rejected": "Q?"}) == ("Q?", (), " A.", "")


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Hi", "completion": "Hello."},
        {"prompt": "Hi", "completion": "Hello.", "label": None},
        {"prompt": "Hi", "completion": "Hello.", "label": "greeting"},
        {"prompt": "Hi", "completion": "Hello.", "label": 2},
        {"messages": [USER, REPLY], "label": 0.5},
        {"prompt": "Hi", "expert": "Hello.", "label": True},
    ],
)
def test_without_true_or_false_a_completion_is_an_expert(row):
    record = parse_record(row, "f:1")
    assert (record.experts, record.chosen, record.rejected) == (("Hello.",), None, None)
    assert record.extra.get("label") == row.get("label")


def test_the_label_of_a_pair_is_a_column_like_any():
    record = parse_record({"prompt": "Hi", "chosen": "a", "rejected": "b", "label": True}, "f:1")
    assert (record.chosen, record.rejected, record.extra) == ("a", "b", {"label": True})


def test_columns_under_other_names():
    row = {"question": "Hi", "answer": "Hello.", "thumbs_up": False}
    columns = {"prompt": "question", "completion": "answer", "label": "thumbs_up"}
    assert sides(row, columns=columns) == ("Hi", (), None, "Hello.")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "Hi", "completion": "", "label": True}, "f:1: 'completion' is empty"),
        ({"prompt": "Hi", "completion": ""}, "f:1: 'completion' is empty"),
        ({"completion": "Hello.", "label": True}, "f:1: no prompt"),
        ({"prompt": "Hi", "completion": 3, "label": True}, "f:1: 'completion' must be a list of chat turns"),
        ({"prompt": "Hi", "completion": [USER], "label": True}, "'completion' must end with an assistant turn"),
        ({"messages": [USER], "label": True}, "f:1: 'label' without a response; let 'messages' end with an assistant turn"),
        ({"messages": [{**USER, "content": ""}, REPLY], "label": False}, r"'messages\[0\].content' is empty"),
        ({"prompt": "Hi", "rejected": 3}, "'rejected' must be a list of chat turns"),
        ({"prompt": "Yo", "rejected": [USER, REPLY]}, "before the response in 'rejected' are not those of 'prompt'"),
    ],
)
def test_malformed(row, message):
    with pytest.raises(DataError, match=message):
        parse_record(row, "f:1")


def test_the_check_counts_every_kind(tmp_path):
    path = tmp_path / "d.jsonl"
    rows = [
        {"prompt": "a", "chosen": "x", "rejected": "y"},
        {"prompt": "b", "chosen": "x", "rejected": "x"},
        {"prompt": "c", "completion": "x", "label": True},
        {"prompt": "d", "completion": "x", "label": False},
        {"prompt": "e", "rejected": ""},
        {"prompt": "f", "completion": "x"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = check_dataset(str(path))
    assert report.ok
    assert (report.with_pairs, report.equal_pairs, report.only_chosen, report.only_rejected, report.with_experts) == (2, 1, 1, 2, 1)
    assert report.to_dict()["only_rejected"] == 2
    text = "\n".join(report.lines())
    assert "pairs: 2;" in text
    assert "labelled responses: 1 only chosen, 2 only rejected" in text
    assert "pairs whose two responses are the same: 1 ('aapa data pairs --chosen given' leaves them out)" in text


@pytest.mark.usefixtures("arrow_cache")
def test_parquet_fills_the_other_side_with_nulls(tmp_path):
    import datasets

    path = str(tmp_path / "d.parquet")
    datasets.Dataset.from_list(
        [{"prompt": "a", "completion": "x", "label": True}, {"prompt": "b", "completion": "y", "label": False}]
    ).to_parquet(path)
    assert [(record.chosen, record.rejected) for record in read_records(path)] == [("x", None), (None, "y")]

"""The fingerprint of a dataset: any change of what is trained on is seen, where it lies is not."""

from __future__ import annotations

from dataclasses import replace

import pytest

from aapa_lightning.data import fingerprint as module
from aapa_lightning.data.fingerprint import check_data, fingerprint
from aapa_lightning.data.records import LazyRecords
from aapa_lightning.errors import ConfigError
from aapa_lightning.types import Instruction, Record


def records(count=6):
    return [
        Record(f"prompt {i}", experts=(f"expert {i}",), instructions=(Instruction("x", {"n": i}),), extra={"a": i}, source=f"f:{i}")
        for i in range(count)
    ]


CHANGES = {
    "prompt": {"prompt": "another"},
    "turns": {"prompt": ({"role": "user", "content": "prompt 3"},)},
    "expert": {"experts": ("another",)},
    "instruction": {"instructions": (Instruction("x", {"n": 9}),)},
    "pair": {"chosen": "a", "rejected": "b"},
    "column": {"extra": {"a": 9}},
    "surrogate": {"prompt": "\ud800"},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_of_any_field_is_seen(change):
    changed = records()
    changed[3] = replace(changed[3], **change)
    assert fingerprint(changed) != fingerprint(records())


def test_order_and_number_are_seen_and_the_place_is_not():
    base = fingerprint(records())
    assert base["rows"] == 6
    assert fingerprint(records()[::-1]) != base
    assert fingerprint(records(7)) != base
    assert fingerprint(records(7), 6) == base
    assert fingerprint([replace(record, source="elsewhere:1") for record in records()]) == base
    assert fingerprint(LazyRecords(lambda i: records()[i], 6)) == base


def test_of_many_rows_some_are_read_the_first_and_last_among_them(monkeypatch):
    monkeypatch.setattr(module, "DIGESTED", 4)
    read = []
    rows = LazyRecords(lambda i: (read.append(i), records(10)[i])[1], 10)
    before = fingerprint(rows)
    assert read == [0, 3, 6, 9]
    assert fingerprint([*records(10)[1:], records(1)[0]]) != before


def test_no_rows_have_a_fingerprint_too():
    assert fingerprint([])["rows"] == 0


def test_rows_that_were_added_may_be_allowed():
    saved = {"data.train": fingerprint(records())}
    check_data(saved, {"data.train": records()}, may_grow=False)
    check_data(saved, {"data.train": records(7)})
    with pytest.raises(ConfigError, match="it had 6 rows, and has 7"):
        check_data(saved, {"data.train": records(7)}, may_grow=False)
    with pytest.raises(ConfigError, match="it had 6 rows, and has 7"):
        check_data(saved, {"data.train": records(7)[::-1]})

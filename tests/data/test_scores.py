"""Scores of responses: their own columns, or the rows of a second file."""

from __future__ import annotations

import json

import pytest

from aapa_lightning.data.responses import read_responses
from aapa_lightning.data.scores import attach_scores, response_score
from aapa_lightning.errors import ConfigError, DataError

CHAT = [{"role": "user", "content": "Hi"}]


def write(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def responses(tmp_path):
    rows = [
        {"key": 1, "response": "a", "temperature": 0.5},
        "",
        {"prompt": CHAT, "response": "b", "sample": 1, "reward": 3},
    ]
    return read_responses(write(tmp_path / "r.jsonl", rows))


def score_of(tmp_path, value, reduce="mean"):
    (one,) = read_responses(write(tmp_path / "one.jsonl", [{"key": 1, "response": "a", "s": value}]))
    return response_score(one, "s", reduce)


@pytest.mark.parametrize(
    ("value", "mean", "low"),
    [(2, 2.0, 2.0), (-0.5, -0.5, -0.5), (True, 1.0, 1.0), ([True, False], 0.5, 0.0), ([True, True], 1.0, 1.0), ([1, 2.5, 4], 2.5, 1.0)],
)
def test_one_number(tmp_path, value, mean, low):
    assert score_of(tmp_path, value) == mean
    assert score_of(tmp_path, value, "min") == low
    assert type(score_of(tmp_path, value)) is float


@pytest.mark.parametrize("value", ["3", [], [1, None], {"a": 1}, float("nan"), [1, float("inf")], 10**400, [[1]]])
def test_not_a_number(tmp_path, value):
    with pytest.raises(DataError, match=r"one\.jsonl:1: 's' must be a finite number, true or false, or a list of them"):
        score_of(tmp_path, value)


def test_a_missing_column_and_an_unknown_reduction(tmp_path, responses):
    with pytest.raises(DataError, match=r"r\.jsonl:3: no score; expected a column 'rewrd', found \['reward'\]"):
        response_score(responses[1], "rewrd")
    with pytest.raises(DataError, match=r"one\.jsonl:1: no score"):
        score_of(tmp_path, None)
    with pytest.raises(ConfigError, match="reduce: expected one of mean, min"):
        response_score(responses[1], "reward", "max")


@pytest.mark.parametrize(
    "rows",
    [
        [
            {"line": 1, "key": "1", "sample": 0, "temperature": 0.5, "score": 1},
            {"line": 3, "key": None, "sample": 1, "temperature": None, "score": 2},
        ],
        [{"key": 1, "score": 1}, {"key": "of the record", "score": 2}],
        [{"key": 1, "score": 1}, {"prompt": "Hi", "sample": 1, "score": 2}],
    ],
    ids=["score", "key of the record", "verdicts"],
)
def test_rows_in_the_order_of_responses(tmp_path, responses, rows):
    attached = attach_scores(responses, write(tmp_path / "s.jsonl", rows))
    assert [one.extra for one in attached] == [{"score": 1}, {"reward": 3, "score": 2}]
    assert [(one.text, one.source) for one in attached] == [(one.text, one.source) for one in responses]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"line": 2, "score": 1}, r"s\.jsonl:2: the line differs from that of .*r\.jsonl:3: expected 3, found 2; both files must have"),
        ({"prompt": "Yo", "score": 1}, r"s\.jsonl:2: the prompt differs"),
        ({"prompt": CHAT, "sample": 0, "score": 1}, "the sample differs from that of .*: expected 1, found 0"),
        ({"score": 1}, r"s\.jsonl:2: none of 'line', 'key' and 'prompt'"),
        ({"key": [1], "score": 1}, r"s\.jsonl:2: 'key' must be text or a whole number"),
        ({"prompt": 3, "score": 1}, r"s\.jsonl:2: 'prompt' must be"),
        ("{", r"s\.jsonl:2: malformed JSON"),
    ],
)
def test_rows_of_other_responses_are_refused(tmp_path, responses, row, message):
    with pytest.raises(DataError, match=message):
        attach_scores(responses, write(tmp_path / "s.jsonl", [{"key": 1, "score": 0}, row]))


def test_another_number_of_rows_or_another_key(tmp_path, responses):
    with pytest.raises(DataError, match=r"s\.jsonl has 1 rows, .*r\.jsonl has 2 responses; expected a row for each"):
        attach_scores(responses, write(tmp_path / "s.jsonl", [{"key": 1, "score": 0}]))
    with pytest.raises(DataError, match=r"s\.jsonl:1: the key differs from that of .*r\.jsonl:1: expected '1', found '2'"):
        attach_scores(responses, write(tmp_path / "s.jsonl", [{"key": 2, "score": 0}, {"key": 2, "score": 0}]))


def test_numbers_near_the_largest_have_a_mean(tmp_path):
    assert score_of(tmp_path, [1.7e308, 1.7e308]) == pytest.approx(1.7e308)


def test_columns_of_every_row_are_scores_too(tmp_path):
    row = {"key": 1, "response": "a", "temperature": 0.7, "sample": 3, "truncated": True}
    (answered,) = read_responses(write(tmp_path / "r.jsonl", [row]))
    assert [response_score(answered, name) for name in ("temperature", "sample", "truncated")] == [0.7, 3.0, 1.0]

"""Pairs: what training on them demands, how they are made out of responses, and noise that does not depend on order."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aapa_lightning.data.pairs import (
    Scored,
    best,
    expert_pairs,
    flip_pairs,
    given_pairs,
    join_files,
    require_labels,
    require_pairs,
    scored_pairs,
)
from aapa_lightning.data.responses import parse_response
from aapa_lightning.errors import ConfigError, DataError
from aapa_lightning.types import Record


def pair(chosen, rejected, prompt="p", **columns):
    return Record(prompt, chosen=chosen, rejected=rejected, source="d.jsonl:7", **columns)


def response(text, **columns):
    return parse_response({"prompt": "p", "response": text, **columns}, "r.jsonl:1")


def scored(*rows):
    """Responses of (text, score) or (text, score, truncated)."""
    return [Scored(response(text, truncated=bool(cut)), score) for text, score, *cut in rows]


def texts(pairs):
    return [(one.chosen, one.rejected) for one in pairs]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (pair("a", "a"), "d.jsonl:7: chosen and rejected are the same, but DPO compares; mend the row, or leave such rows out"),
        (pair("", "b"), "d.jsonl:7: empty chosen, but DPO compares"),
        (pair(" \n", ""), "d.jsonl:7: empty chosen"),
        (pair("a", None), "d.jsonl:7: no rejected, but DPO compares"),
        (pair(None, "b"), "d.jsonl:7: no chosen, but"),
        (pair(None, None), "d.jsonl:7: no chosen and no rejected, but"),
    ],
)
def test_training_on_pairs_refuses(bad, message):
    with pytest.raises(DataError) as caught:
        require_pairs([pair("a", "b"), bad], "DPO compares")
    assert str(caught.value).startswith(message)
    assert "aapa data pairs --chosen given" in str(caught.value)
    assert given_pairs(bad) == []


def test_training_on_pairs_accepts_a_rejected_silence():
    require_pairs([pair("a", ""), pair("a", "b")], "DPO compares")
    assert given_pairs(pair("a", "")) == [pair("a", "")]


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([pair("a", None), pair(None, None)], "d.jsonl:7: no labelled response, but KTO learns; write 'completion' and 'label'"),
        ([pair(None, None, extra={"label": "good"})], "no labelled response (its 'label' is 'good', expected true or false), but"),
        (
            [pair("a", None)],
            "d.jsonl: no response is labelled false, but KTO learns; expected both labels, found {'chosen': 1, 'rejected': 0}",
        ),
        ([pair(None, "")] * 2, "d.jsonl: no response is labelled true, but KTO learns"),
        ([pair(" ", "b")], "d.jsonl:7: empty chosen"),
        ([], "the dataset: no response is labelled true"),
    ],
)
def test_training_on_labels_refuses(records, message):
    with pytest.raises(DataError) as caught:
        require_labels(records, "KTO learns")
    assert message in str(caught.value)


def test_training_on_labels_accepts_pairs_and_single_responses():
    require_labels([pair("a", None), pair(None, "")], "KTO learns")
    require_labels([pair("a", "b")], "KTO learns")


def test_every_expert_against_every_response():
    record = Record("p", experts=("gold", "silver", " "), extra={"topic": "sea"}, key="1")
    made = expert_pairs(record, [response("x"), response("gold"), response("")])
    assert texts(made) == [("gold", "x"), ("gold", ""), ("silver", "x"), ("silver", "gold"), ("silver", "")]
    assert {(one.prompt, one.key, one.extra["topic"]) for one in made} == {("p", "1", "sea")}
    assert expert_pairs(Record("p"), [response("x")]) == []


FIVE = scored(("b", 2), ("a", 3), ("c", 1), ("a2", 3), ("d", 1))


@pytest.mark.parametrize(
    ("pairing", "margin", "expected"),
    [
        ("best-worst", 0, [("a", "c")]),
        ("best-rest", 0, [("a", "b"), ("a", "c"), ("a", "d")]),
        ("best-rest", 1.5, [("a", "c"), ("a", "d")]),
        ("best-worst", 2, [("a", "c")]),
        ("best-worst", 2.1, []),
        ("all", 1.5, [("a", "c"), ("a", "d"), ("a2", "c"), ("a2", "d")]),
        ("all", 0, [("b", "c"), ("b", "d"), ("a", "b"), ("a", "c"), ("a", "d"), ("a2", "b"), ("a2", "c"), ("a2", "d")]),
    ],
)
def test_pairs_by_score(pairing, margin, expected):
    assert texts(scored_pairs(Record("p"), FIVE, pairing, margin)) == expected


def test_scores_are_kept_beside_other_columns():
    (one,) = scored_pairs(Record("p", extra={"topic": "sea"}), FIVE)
    assert one.extra == {"topic": "sea", "score_chosen": 3, "score_rejected": 1}


@pytest.mark.parametrize("pairing", ["best-worst", "best-rest", "all"])
def test_what_makes_no_pair(pairing):
    def made(*rows):
        return texts(scored_pairs(Record("p"), scored(*rows), pairing))

    assert made() == []
    assert made(("a", 1)) == []
    assert made(("a", 1), ("b", 1)) == []  # a tie
    assert made(("a", 1), ("a", 0)) == []  # the same text, judged twice
    assert made(("", 2), (" ", 3)) == []
    assert made(("cut", 9, True), ("", 8), ("a", 2), ("b", 1)) == [("a", "b")]  # neither is ever chosen
    assert made(("a", 2), ("", 1)) == [("a", "")]
    assert made(("a", 2), ("cut", 1, True)) == [("a", "cut")]


def test_a_margin_holds_in_binary_fractions_too():
    assert texts(scored_pairs(Record("p"), scored(("a", 0.3), ("b", 0.2)), "all", 0.1)) == [("a", "b")]


def test_unknown_pairings_and_flips_are_named():
    with pytest.raises(ConfigError, match="pairs: expected one of best-worst, best-rest, all; found 'some'"):
        scored_pairs(Record("p"), FIVE, "some")
    with pytest.raises(ConfigError, match="flip: expected one of random, length; found 'some'"):
        flip_pairs([], 0.1, how="some")


def test_the_best_response():
    assert best(FIVE).response.text == "a"  # the first of equals
    assert best(scored(("cut", 9, True), ("", 8), (" ", 7), ("a", -2))).response.text == "a"
    assert best(scored(("cut", 9, True), ("", 8))) is None
    assert best([]) is None


def test_files_are_joined_and_counted():
    records = [Record("p"), Record("q", key="2"), Record("r")]
    first = [response("a"), response("b", truncated=True), response("c"), parse_response({"prompt": "z", "response": "x"}, "r:4")]
    second = [parse_response({"key": 2, "response": text}, f"s:{i}") for i, text in enumerate("de", 1)] + [response("f")]
    joined = join_files(records, [first, second])
    assert [[one.text for one in own] for own in joined.responses] == [["a", "c", "f"], ["d", "e"], []]
    assert (joined.read, joined.other_prompts, joined.truncated) == (7, 1, 1)
    kept = join_files(records, [first, second], limit=2, keep_truncated=True)
    assert [[one.text for one in own] for own in kept.responses] == [["a", "b"], ["d", "e"], []]
    assert kept.truncated == 0
    with pytest.raises(DataError, match="s:1: no response matches a record"):
        join_files([Record("p")], [first, [parse_response({"prompt": "y", "response": "x"}, "s:1")]])


PAIRS = [pair("good " * (i % 7 + 1), "bad " * (i % 5 + 1), prompt=f"p{i}") for i in range(100)]


def flipped(pairs):
    return {one.prompt for one in pairs if one.extra["flipped"]}


@pytest.mark.parametrize("how", ["random", "length"])
def test_flips_depend_on_the_pairs_and_not_on_their_order(how):
    noisy = flip_pairs(PAIRS, 0.2, how=how, seed=3)
    shuffled = random.Random(0).sample(PAIRS, len(PAIRS))
    assert flipped(flip_pairs(shuffled, 0.2, how=how, seed=3)) == flipped(noisy)
    assert flipped(noisy) < flipped(flip_pairs(PAIRS, 0.3, how=how, seed=3))
    assert flipped(noisy) != flipped(flip_pairs(PAIRS, 0.2, how=how, seed=4))
    assert len(flipped(noisy)) == 20
    for before, after in zip(PAIRS, noisy, strict=True):
        sides = (before.rejected, before.chosen) if after.extra["flipped"] else (before.chosen, before.rejected)
        assert (after.prompt, after.chosen, after.rejected) == (before.prompt, *sides)


def test_flips_by_length_make_the_longer_response_chosen_up_to_the_rate():
    longer = {one.prompt for one in PAIRS if len(one.rejected) > len(one.chosen)}
    assert 0 < len(longer) < 90
    noisy = flip_pairs(PAIRS, 0.9, how="length")
    assert flipped(noisy) == longer
    assert all(len(one.chosen) > len(one.rejected) for one in noisy if one.extra["flipped"])


def test_flips_keep_scores_with_their_responses_and_spare_silence():
    clean = [pair("a", "b", extra={"score_chosen": 2, "score_rejected": 1, "topic": "sea"}), pair("a", ""), pair("a", " ")]
    noisy = flip_pairs(clean, 1.0)
    assert noisy[0] == replace(
        clean[0], chosen="b", rejected="a", extra={"score_chosen": 1, "score_rejected": 2, "topic": "sea", "flipped": True}
    )
    assert noisy[1:] == [replace(one, extra={"flipped": False}) for one in clean[1:]]
    require_pairs(noisy, "whatever the rate")
    with pytest.raises(DataError, match=r"d\.jsonl:7: has a column 'flipped' already"):
        flip_pairs(noisy, 0.1)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.text(max_size=3), st.text(max_size=3)), max_size=12), st.floats(0, 1))
def test_noise_keeps_pairs_trainable(sides, rate):
    clean = [one for chosen, rejected in sides for one in given_pairs(pair(chosen, rejected))]
    noisy = flip_pairs(clean, rate)
    require_pairs(noisy, "noise must not break pairs")
    assert len(flipped_rows := [one for one in noisy if one.extra["flipped"]]) <= round(rate * len(clean))
    assert all(one.chosen.strip() for one in flipped_rows)


@pytest.mark.parametrize("rate", [-0.1, 1.1, float("nan")])
def test_impossible_rates(rate):
    with pytest.raises(ConfigError, match=r"flip rate: expected a number in \[0, 1\]"):
        flip_pairs(PAIRS, rate)


def test_a_rate_of_zero_marks_all_as_clean():
    assert flip_pairs(PAIRS[:2], 0) == [replace(one, extra={"flipped": False}) for one in PAIRS[:2]]

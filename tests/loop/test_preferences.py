"""Batches of pairs and labelled responses: order, counts, what is held against what."""

import pytest
import torch

from aapa_lightning.loop.preferences import (
    Preference,
    count_preferences,
    in_a_ring,
    label_inputs,
    mismatched,
    mismatched_log_ratios,
    pair_inputs,
    preferred_texts,
    responses_of,
)
from aapa_lightning.types import Demonstration, Record, identity_gather


def demo(prompt, response):
    return Demonstration([*prompt, *response], [False] * len(prompt) + [True] * len(response), Record("a"))


PAIRS = [
    Preference(demo([1, 2], [10, 11]), demo([1, 2], [20]), Record("a")),
    Preference(demo([3], [12]), demo([3], [21, 22, 23]), Record("b")),
]
LABELS = [
    Preference(None, demo([1, 2], [20]), Record("a")),
    Preference(demo([3], [12]), None, Record("b")),
    Preference(demo([4, 5], [13, 14]), demo([4, 5], [24]), Record("c")),
]


def ids(rows):
    return [row.input_ids for row in rows]


def first_token_logprob(rows):
    """Log-probs that name their row."""
    return torch.tensor([-float(next(i for i, learned in zip(row.input_ids, row.response_mask, strict=True) if learned)) for row in rows])


def inputs_of(make, rows, **options):
    responses = responses_of(rows)
    lengths = torch.tensor([sum(row.response_mask) for row in responses])
    given = {"reference": first_token_logprob, "log_ratios": torch.zeros(1), "stressed_margins": None, "gather": identity_gather}
    return make(rows, first_token_logprob(responses), lengths, **{**given, **options})


def test_chosen_come_before_rejected():
    assert ids(responses_of(PAIRS)) == [[1, 2, 10, 11], [3, 12], [1, 2, 20], [3, 21, 22, 23]]
    assert ids(responses_of(LABELS)) == [[3, 12], [4, 5, 13, 14], [1, 2, 20], [4, 5, 24]]


def test_counts_are_of_chosen_tokens_and_losses():
    assert count_preferences(PAIRS, labels=False).tolist() == [3, 2]
    assert count_preferences(PAIRS, labels=True).tolist() == [3, 4]
    assert count_preferences(LABELS, labels=True).tolist() == [3, 4]
    assert count_preferences([], labels=False).tolist() == [0, 0]


def test_texts_of_a_record_keep_an_empty_rejected_one():
    assert preferred_texts(Record("a", chosen="b", rejected="")) == [("chosen response", "b"), ("rejected response", "")]
    assert preferred_texts(Record("a", rejected="c")) == [("rejected response", "c")]
    assert preferred_texts(Record("a")) == []


def test_pairs_line_up_with_their_reference():
    made = inputs_of(pair_inputs, PAIRS)
    assert made.chosen_logprobs.tolist() == made.ref_chosen_logprobs.tolist() == [-10.0, -12.0]
    assert made.rejected_logprobs.tolist() == made.ref_rejected_logprobs.tolist() == [-20.0, -21.0]
    assert (made.chosen_lengths.tolist(), made.rejected_lengths.tolist()) == ([2, 1], [1, 3])
    bare = inputs_of(pair_inputs, PAIRS, reference=None)
    assert bare.ref_chosen_logprobs is bare.ref_rejected_logprobs is None


def test_labels_line_up_with_their_responses():
    made = inputs_of(label_inputs, LABELS)
    assert made.labels.tolist() == [True, True, False, False]
    assert made.logprobs.tolist() == made.ref_logprobs.tolist() == [-12.0, -13.0, -20.0, -24.0]


def test_every_response_is_held_against_the_prompt_before():
    """Chosen ones first; those of the first record stand under the prompt of the row that is given."""
    ring = in_a_ring(LABELS, LABELS[-1])
    assert ids(mismatched(ring)) == [[1, 2, 12], [3, 13, 14], [4, 5, 20], [3, 24]]
    assert [row.response_mask.index(True) for row in mismatched(ring)] == [2, 1, 2, 1]
    assert ids(mismatched(in_a_ring(PAIRS, PAIRS[-1]))) == [[3, 10, 11], [1, 2, 12], [3, 20], [1, 2, 21, 22, 23]]
    assert ids(mismatched(in_a_ring(PAIRS[:1], LABELS[2]))) == [[4, 5, 10, 11], [4, 5, 20]]


def test_cuts_of_a_step_change_no_mismatched_response():
    asked = []

    def policy(rows):
        asked.extend(ids(rows))
        return torch.zeros(len(rows))

    ring = in_a_ring(LABELS, LABELS[-1])
    whole = mismatched_log_ratios([ring], policy, first_token_logprob)
    assert whole.tolist() == [12.0, 13.0, 20.0, 24.0]
    assert asked == ids(mismatched(ring))
    cut = mismatched_log_ratios([ring[:1], ring[1:]], policy, first_token_logprob)
    assert sorted(cut.tolist()) == sorted(whole.tolist())
    assert sorted(asked[4:]) == sorted(asked[:4])


def test_labels_without_a_reference_are_a_mistake_of_the_caller():
    with pytest.raises(RuntimeError, match="has a reference"):
        inputs_of(label_inputs, LABELS, reference=None)
    with pytest.raises(RuntimeError, match="has a reference"):
        mismatched_log_ratios([LABELS], first_token_logprob, None)

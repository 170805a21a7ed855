"""Options, metrics, and the ways in which a signal joins a task."""

import pytest
import torch

from aapa_lightning.anchor.segment import Segmenter, segment_rollouts
from aapa_lightning.anchor.signal import (
    AnchorOptions,
    build_signal,
    combine_advantages,
    combine_rewards,
    first_responses,
    zero_variance_counts,
)
from aapa_lightning.errors import ConfigError

TEXTS = ["One two. Three four five.", "Six seven.", "Eight.", "Nine ten. Eleven."]


def signal_of(rollouts, logits, **options):
    spans = segment_rollouts(rollouts, Segmenter())
    return build_signal(torch.tensor(logits), spans, rollouts, AnchorOptions(**options))


def test_values_and_metrics_by_hand(make_rollouts):
    rollouts = make_rollouts(TEXTS, [0, 0, 1, 1])
    signal = signal_of(rollouts, [1.0, 3.0, 4.0, -1.0, 0.0, -2.0], transform="score", scale="fixed")
    torch.testing.assert_close(signal.scores, torch.tensor([2.0, 4.0, -1.0, -1.0]))
    expected = torch.tensor([-1.0, 1.0, 0.0, 0.0])[:, None] * rollouts.response_mask
    torch.testing.assert_close(signal.advantages, expected)
    metrics = signal.metrics
    assert metrics["logit"] == pytest.approx(5 / 6)
    assert metrics["score"] == pytest.approx(1.0)
    assert metrics["score_std_within"] == pytest.approx(2**0.5 / 2)
    assert metrics["zero_variance_share"] == 0.5
    assert metrics["sentences_per_response"] == 1.5
    assert metrics["scale"] == 1.0
    assert metrics["dropped_share"] == 0.0
    assert 0 < metrics["probability"] < 1


def test_dropped_rows_leave_the_statistics(make_rollouts):
    cut = [False, False, True, False]
    rollouts = make_rollouts(TEXTS, [0] * 4, truncated=cut)
    logits = [1.0, 3.0, 4.0, -100.0, 0.0, 2.0]
    signal = signal_of(rollouts, logits, transform="score", scale="fixed", truncated="drop")
    torch.testing.assert_close(signal.scores, torch.tensor([2.0, 4.0, 7 / 3, 1.0]))
    torch.testing.assert_close(signal.advantages[:, 0], torch.tensor([2.0, 4.0, 7 / 3, 1.0]) - 7 / 3)
    assert signal.metrics["dropped_share"] == 0.25
    kept = signal_of(rollouts, logits, transform="score", scale="fixed")
    assert kept.scores[2] == -100


@pytest.mark.parametrize("count", [0, 1, 2, 4])
def test_the_signal_of_the_first_responses(make_rollouts, count):
    signal = signal_of(make_rollouts(TEXTS, [0, 0, 1, 1]), [1.0, 3.0, 4.0, -1.0, 0.0, -2.0], transform="score", granularity="sentence")
    first = first_responses(signal, count)
    sentences = [0, 2, 3, 4, 6][count]
    assert torch.equal(first.logits, signal.logits[:sentences])
    assert torch.equal(first.scores, signal.scores[:count])
    assert torch.equal(first.advantages, signal.advantages[:count])
    assert first.metrics == signal.metrics
    assert first.spans.response_index.tolist() == [0, 0, 1, 2, 3, 3][:sentences]
    assert torch.equal(first.spans.token_counts, signal.spans.token_counts[:sentences])
    assert torch.equal(first.spans.token_sentence, signal.spans.token_sentence[:count])
    assert first.spans.char_spans == signal.spans.char_spans[:count]


def test_combining_advantages(make_rollouts):
    signal = signal_of(make_rollouts(TEXTS, [0, 0, 1, 1]), [1.0, 3.0, 4.0, -1.0, 0.0, -2.0], transform="score", scale="fixed")
    task = torch.tensor([0.5, -0.5, 1.0, -1.0])
    found = combine_advantages(task, signal.advantages, 0.3)
    torch.testing.assert_close(found[:, 0], torch.tensor([0.2, -0.2, 1.0, -1.0]))
    torch.testing.assert_close(combine_advantages(found, signal.advantages, 0.7), combine_advantages(task, signal.advantages, 1.0))
    assert torch.equal(combine_advantages(task, signal.advantages * torch.nan, 0.0), task[:, None].expand(signal.advantages.shape))


def test_combining_rewards(make_rollouts):
    signal = signal_of(make_rollouts(TEXTS, [0, 0, 1, 1]), [1.0, 3.0, 4.0, -1.0, 0.0, -2.0], transform="score")
    rewards, weights = torch.rand(4, 3), torch.tensor([1.0, 0.5, 2.0])
    columns, more = combine_rewards(rewards, weights, signal, 0.3)
    torch.testing.assert_close(columns @ more, rewards @ weights + 0.3 * signal.scores)
    same = combine_rewards(rewards, weights, signal, 0.0)
    assert same[0] is rewards
    assert same[1] is weights


def test_zero_variance_counts():
    values, groups = torch.tensor([1.0, 1.0, 2.0, 3.0, 5.0]), torch.tensor([0, 0, 1, 1, 2])
    assert zero_variance_counts(values, groups).tolist() == [1, 2]
    assert zero_variance_counts(values, groups, torch.tensor([True, True, True, False, True])).tolist() == [1, 1]
    assert zero_variance_counts(values[:0], groups[:0]).tolist() == [0, 0]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"transform": "gan"}, "gan_ns"),
        ({"pool": "max"}, "token_mean"),
        ({"scale": "none"}, "batch"),
        ({"granularity": "token"}, "sentence"),
        ({"combine": "sum"}, "advantage"),
        ({"truncated": "mask"}, "drop"),
        ({"tau": 0.0}, "tau"),
        ({"scale_floor": -1.0}, "scale_floor"),
        ({"softmin_temperature": float("inf")}, "softmin_temperature"),
        ({"granularity": "sentence", "combine": "reward"}, "a reward is one number per response"),
    ],
)
def test_bad_options_are_refused(options, said):
    with pytest.raises(ConfigError, match=said):
        AnchorOptions(**options).check()

"""Where answers begin, and that thinking is neither scored nor lost."""

import pytest
import torch

from aapa_lightning.anchor.guard import measure
from aapa_lightning.anchor.segment import Segmenter, segment_rollouts
from aapa_lightning.anchor.term import AnchorTerm
from aapa_lightning.anchor.thinking import answer_start, answer_view
from aapa_lightning.thinking import Thinking
from aapa_lightning.types import Record


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("An answer.", "An answer."),
        ("", ""),
        ("<think>why</think>An answer.", "An answer."),
        ("\n<think>why</think>\n\nAn answer.", "\n\nAn answer."),
        ("why\n</think>An answer.", "An answer."),
        ("<think>never ends. At all.", ""),
        ("<think>why</think>", ""),
        ("Write <think> and </think> like this.", "Write <think> and </think> like this."),
        ("<think>a</think>b</think>c", "b</think>c"),
    ],
)
def test_answer_start(text, answer):
    assert text[answer_start(text) :] == answer


def test_thinking_tokens_belong_to_the_first_sentence_and_weigh_nothing(make_rollouts):
    rollouts = make_rollouts(["<think>hm hm. Hm.</think> One two. Three four.", "One two. Three.", "<think>hm hm hm"], [0, 0, 0])
    view = answer_view(rollouts)
    spans = view.scored(segment_rollouts(view.rollouts, Segmenter()))
    assert view.thinking.sum(-1).tolist() == [3, 0, 4]
    assert spans.token_sentence[0].tolist() == [0, 0, 0, 0, 0, 1, 1, 1]
    assert spans.token_counts.tolist() == [2, 3, 2, 2, 0]
    assert ((spans.token_sentence >= 0) == rollouts.response_mask).all()
    full = view.in_full_text(spans)
    assert [rollouts.texts[0][a:b].strip() for a, b in full.char_spans[0]] == ["One two.", "Three four."]


def test_only_answers_are_scored_and_thinking_answers_for_them(make_rollouts, word_judge):
    rollouts = make_rollouts(["<think>hm hm. Hm.</think> One two. Three four five.", "One two three four five six."], [0, 0])
    plain = make_rollouts([" One two. Three four five.", "One two three four five six."], [0, 0])
    judge = word_judge()
    for granularity in ("response", "sentence"):
        term = AnchorTerm(judge, granularity=granularity, transform="score")
        found = term.signal(rollouts)
        assert judge.seen == [" One two. Three four five.", "One two three four five six."]
        expected = term.signal(plain)
        torch.testing.assert_close(found.scores, expected.scores)
        torch.testing.assert_close(found.advantages[0, 3:9], expected.advantages[0, :6])
        assert found.advantages[0, :4].eq(found.advantages[0, 0]).all()
        assert found.advantages[0, 0] != 0
    AnchorTerm(judge, score_thinking=True).signal(rollouts)
    assert judge.seen[0] == rollouts.texts[0]


def test_the_guard_measures_answers(make_rollouts, word_judge):
    texts = ["<think>hm hm. Hm.</think> One.", " One."]
    both = []
    for text in texts:
        rollouts = make_rollouts([text], [0])
        rollouts.records = [Record("p", experts=("<think>long, long</think>Five!",))]
        both.append(measure(rollouts, AnchorTerm(word_judge()).signal(rollouts)))
    for name in ("length_vs_expert", "length"):
        assert both[0][name] == pytest.approx(both[1][name])
    assert both[0]["length_vs_expert"] == 1.0
    whole = make_rollouts(texts[:1], [0])
    assert measure(whole, AnchorTerm(word_judge()).signal(whole), thinking=Thinking(True))["length"] > both[0]["length"]

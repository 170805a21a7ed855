"""Judges whose models see padding, or turn their positions by the longest text: a score is that of its text alone, or is refused."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from aapa_lightning.anchor.classifier import SequenceClassifierDiscriminator
from aapa_lightning.anchor.context import ContextRow, Encoding
from aapa_lightning.anchor.encoder import FrozenEncoder
from aapa_lightning.anchor.forward import RowEncoder
from aapa_lightning.anchor.value_model import ValueModel
from aapa_lightning.errors import ConfigError
from aapa_lightning.loop.ranking import RankingPair, pair_scores
from aapa_lightning.policy import PolicySpec
from aapa_lightning.types import Record, SentenceSpans


class Blind(nn.Module):
    """Mixes a token with all others, and reads no mask (as FNet does)."""

    def forward(self, hidden_states, *args, **kwargs):
        return hidden_states + hidden_states.mean(1, keepdim=True), None


def classifier(tiny_model_dir, blind=True):
    from aapa_lightning.loop.classifier import load_classifier

    model, tokenizer = load_classifier(PolicySpec(str(tiny_model_dir)))
    if blind:
        model.model.layers[0].self_attn = Blind()
    return model, tokenizer


ROWS = [[5, 6, 7], [8, 9, 10, 11, 12, 13], [14, 15], [16, 17, 18]]


def test_a_reward_models_scores_and_gradients_are_those_of_texts_alone(tiny_model_dir):
    model, tokenizer = classifier(tiny_model_dir)
    pairs = [RankingPair(ROWS[0], ROWS[1]), RankingPair(ROWS[2], ROWS[3])]
    with pytest.warns(UserWarning, match="reads padding on the right like text"):
        found = torch.cat(pair_scores(model.train(), tokenizer, pairs, torch.device("cpu")))
    order = [ROWS[0], ROWS[2], ROWS[1], ROWS[3]]
    alone = torch.cat([model(input_ids=torch.tensor([row])).logits[0] for row in order])
    torch.testing.assert_close(found, alone, rtol=1e-5, atol=1e-6)
    grads = []
    for scores in (found, alone):
        model.zero_grad()
        (scores * torch.arange(4.0)).sum().backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("blind", [False, True])
def test_an_encoders_states_are_those_of_texts_alone(tiny_model_dir, blind):
    model = classifier(tiny_model_dir, blind)[0].model.eval().requires_grad_(False)
    encoder = RowEncoder(model, Encoding(), 0, causal=False)
    rows = [ContextRow(ids=row, types=[0] * len(row), sentences=[0] * len(row), head=0) for row in ROWS]
    found = {i: batch.hidden[b] for batch in encoder(rows, range(4)) for b, i in enumerate(batch.rows)}
    for i, row in enumerate(ROWS):
        expected = model(input_ids=torch.tensor([row]), use_cache=False).last_hidden_state[0]
        torch.testing.assert_close(found[i][: len(row)], expected, rtol=1e-5, atol=1e-5)


@pytest.fixture
def judge_dir(tiny_model_dir, tmp_path):
    model, tokenizer = classifier(tiny_model_dir, blind=False)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


def test_judges_score_texts_alone(judge_dir):
    texts = ["abc", "abc def ghi jkl 0123456789", "The boats rest calmly."]
    value, judge = ValueModel(str(judge_dir), ends_with_reward_token=False), SequenceClassifierDiscriminator(str(judge_dir))
    for model in (value.model, judge.model):
        model.model.layers[0].self_attn = Blind()
    scores = value.scores(texts, texts)
    torch.testing.assert_close(scores, torch.cat([value.scores([text], [text]) for text in texts]), rtol=1e-5, atol=1e-6)

    def judged(some):
        sizes = torch.ones(len(some), dtype=torch.int64)
        spans = SentenceSpans(torch.arange(len(some)), sizes, torch.arange(len(some))[:, None], [[(0, len(text))] for text in some])
        return judge.score(some, [Record("abc") for _ in some], spans)

    torch.testing.assert_close(judged(texts), torch.cat([judged([text]) for text in texts]), rtol=1e-5, atol=1e-6)


def test_positions_that_change_with_length_are_refused(judge_dir, tiny_model_dir):
    config = json.loads((judge_dir / "config.json").read_text())
    config |= {"max_position_embeddings": 16, "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}
    (judge_dir / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"change with length beyond 16 tokens.* set max_length to at most 16"):
        SequenceClassifierDiscriminator(str(judge_dir), max_length=32)
    assert ValueModel(str(judge_dir), ends_with_reward_token=False).max_tokens == 16
    config["rope_parameters"] |= {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    config |= {"max_position_embeddings": 64, "original_max_position_embeddings": 16, "architectures": ["Qwen3Model"]}
    config["rope_parameters"]["original_max_position_embeddings"] = 16
    (judge_dir / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"change with length beyond 16 tokens.* set encoding.max_length to 16 or less, not 64"):
        FrozenEncoder(str(judge_dir), Encoding(max_length=64))

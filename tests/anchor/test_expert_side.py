"""The expert side is made once: references that are embedded once and kept within bounds, look-ups once a prompt."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from aapa_lightning.anchor.checks import mean_expert_logits
from aapa_lightning.anchor.classifier import SequenceClassifierDiscriminator
from aapa_lightning.anchor.context import Encoding
from aapa_lightning.anchor.encoder import FrozenEncoder
from aapa_lightning.anchor.encoder_head import EncoderHeadDiscriminator, embed_references
from aapa_lightning.anchor.head import StackedHead, feature_size
from aapa_lightning.anchor.reference_cache import ReferenceCache
from aapa_lightning.anchor.segment import Segmenter, segment_texts
from aapa_lightning.types import Record

FEATURES = ("sentence", "reference")
RECORDS = [Record(f"Describe {i}.", experts=(f"The boats {'rest ' * i}calmly. The gulls call.",)) for i in range(4)]


@pytest.fixture
def encoder(tiny_model_dir):
    """An encoder that remembers which texts it was given."""
    encoder = FrozenEncoder(str(tiny_model_dir), Encoding())
    encoder.texts = []
    encoder.context = Watched(encoder.context, encoder.texts)
    return encoder


class Watched:
    def __init__(self, inner, texts):
        self.inner, self.texts, self.causal = inner, texts, inner.causal

    def __call__(self, prompts, responses, spans):
        self.texts += responses
        return self.inner(prompts, responses, spans)


def judge_of(encoder):
    return EncoderHeadDiscriminator(encoder, StackedHead(1, feature_size(FEATURES, encoder.hidden_size), hidden_units=8), FEATURES)


def score(judge, rows, text="A quiet harbor. It waits."):
    records = [RECORDS[i] for i in rows]
    texts = [f"{text} {i}" for i in range(len(rows))]
    return judge.score(texts, records, segment_texts(texts, Segmenter()))


def test_an_expert_is_encoded_once_while_training(encoder):
    judge = judge_of(encoder)
    first = score(judge, [0, 0, 1, 1])
    experts = [record.experts[0] for record in RECORDS]
    assert [text for text in encoder.texts if text in experts] == experts[:2]
    del encoder.texts[:]
    assert torch.equal(score(judge, [0, 0, 1, 1]), first)
    score(judge, [1, 2])
    assert [text for text in encoder.texts if text in experts] == [experts[2]]


def test_a_resumed_run_meets_the_same_bits(encoder):
    went_on, resumed = judge_of(encoder), judge_of(encoder)
    score(went_on, [3, 2, 1, 0])
    score(went_on, [0])
    assert torch.equal(score(went_on, [1, 0, 2]), score(resumed, [1, 0, 2]))


def test_values_are_those_of_a_batch(encoder):
    chosen = [(RECORDS[i], RECORDS[i].experts[0]) for i in (2, 0, 2, 1)]
    found, rows = ReferenceCache(encoder, Segmenter())(chosen)
    expected, expected_rows = embed_references(encoder, Segmenter(), chosen)
    assert rows == expected_rows == [0, 1, 0, 2]
    torch.testing.assert_close(found.embeddings, expected.embeddings, atol=1e-5, rtol=1e-4)
    assert found.counts.tolist() == expected.counts.tolist()
    assert found.response_index.tolist() == expected.response_index.tolist()
    assert found.size == 3
    nothing, none = ReferenceCache(encoder, Segmenter())([])
    assert (nothing.embeddings.shape, none) == ((0, encoder.hidden_size), [])


def test_what_is_kept_is_bounded(encoder):
    row = encoder.hidden_size * 4
    cache = ReferenceCache(encoder, Segmenter(), limit=4 * row)
    requests = [(record, record.experts[0]) for record in RECORDS]  # of two sentences each
    for request in (requests[0], requests[1], requests[0], requests[2]):
        cache([request])
        assert sum(part.nbytes for part, _ in cache._kept.values()) == cache._bytes <= 4 * row
    del encoder.texts[:]
    cache([requests[0]])
    cache([requests[2]])
    assert not encoder.texts
    cache([requests[1]])  # used longest ago
    assert encoder.texts == [RECORDS[1].experts[0]]
    cache(requests)  # more than it keeps, at once
    assert len(cache._kept) == 2


def test_odd_text_has_a_key(encoder):
    record = Record("\ud800", experts=("a \ud800 b.",))
    assert ReferenceCache(encoder, Segmenter())([(record, record.experts[0])])[0].size == 1


def test_a_prompt_is_looked_up_once(encoder):
    class Bank:
        fingerprint = "x"
        asked: list[str] = []  # noqa: RUF012 - of this test alone

        def expert_logits(self, record):
            self.asked.append(record.prompt)
            return torch.tensor([1.0, 2.0, float(len(record.prompt))])

    records = [RECORDS[0]] * 3 + [RECORDS[1]] * 2
    assert mean_expert_logits(Bank(), records).tolist() == pytest.approx([(3 + len("Describe 0.")) / 3] * 5)
    assert Bank.asked == ["Describe 0.", "Describe 1."]


def test_a_classifier_keeps_to_both_budgets(tmp_path, tiny_tokenizer):
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_labels": 1}
    torch.manual_seed(0)
    config = AutoConfig.for_model("bert", vocab_size=len(tiny_tokenizer), initializer_range=0.3, **sizes)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    path, long = str(tmp_path), "abc def ghi jkl mno. " * 4
    texts = ["abc", long, "a. b. c.", "x y", long + "abc", "def"]
    rows = [Record(f"{i}") for i in range(len(texts))]
    spans = segment_texts(texts, Segmenter(whole_response=True))
    judge = SequenceClassifierDiscriminator(path, batch_size=3, batch_tokens=60)
    judge.score(texts, rows, spans)  # the first call tries whether the model sees padding
    shapes = []
    judge.model.register_forward_pre_hook(lambda module, args, kwargs: shapes.append(kwargs["input_ids"].shape), with_kwargs=True)
    found = judge.score(texts, rows, spans)
    alone = [
        judge.score([text], [row], segment_texts([text], Segmenter(whole_response=True))) for text, row in zip(texts, rows, strict=True)
    ]
    torch.testing.assert_close(found, torch.cat(alone), atol=1e-5, rtol=1e-4)
    batches = shapes[: len(shapes) - len(texts)]
    assert [rows for rows, _ in batches] == [3, 1, 1, 1]
    assert all(rows == 1 or rows * width <= 60 for rows, width in batches)
    assert judge.score([], [], segment_texts([], Segmenter(whole_response=True))).shape == (0,)

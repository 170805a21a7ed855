"""The discriminator that reads sentences alone goes straight from hidden states to logits: the same numbers as by way of embeddings."""

import pytest
import torch

from aapa_kernels import anchor_score
from aapa_lightning.anchor.context import Encoding
from aapa_lightning.anchor.encoder import FrozenEncoder
from aapa_lightning.anchor.encoder_head import EncoderHeadDiscriminator, fold_of
from aapa_lightning.anchor.head import StackedHead
from aapa_lightning.anchor.segment import Segmenter, segment_texts
from aapa_lightning.types import Record

TEXTS = ["The boats rest calmly. The gulls call. A long day ends.", "", "abc def. ghi!", "One. Two. Three. Four. Five. Six. Seven."]


@pytest.mark.parametrize("batch_tokens", [1, 4096])
@pytest.mark.parametrize(("folds", "hidden_units"), [(1, 0), (3, 0), (1, 8), (3, 8)])
def test_equals_the_head_of_the_prompts_fold_on_embeddings(folds, hidden_units, batch_tokens, tiny_model_dir):
    encoder = FrozenEncoder(str(tiny_model_dir), Encoding(max_length=40, batch_tokens=batch_tokens))
    head = StackedHead(folds, encoder.hidden_size, hidden_units, seed=3)
    with torch.no_grad():
        head.mean.normal_(generator=torch.Generator().manual_seed(0))
        head.std.uniform_(0.1, 2, generator=torch.Generator().manual_seed(1))
        head.bias.normal_(generator=torch.Generator().manual_seed(2))
        head.floor.copy_(torch.linspace(-5, -3, folds))
        head.temperature.fill_(2.5)
    judge = EncoderHeadDiscriminator(encoder, head, ("sentence",))
    records = [Record(f"Prompt {i} of some length.", source="x") for i in range(len(TEXTS))]
    spans = segment_texts(TEXTS, Segmenter())
    fused = judge.score(TEXTS, records, spans)
    heads = torch.tensor([fold_of(record.prompt, folds) for record in records])
    by_embeddings = judge._logits(TEXTS, records, spans, strict=False)[heads[spans.response_index], torch.arange(len(fused))]
    assert (encoder([r.prompt for r in records], TEXTS, spans.char_spans).counts == 0).sum() > 1  # some sentences are cut off
    torch.testing.assert_close(fused, by_embeddings, rtol=1e-5, atol=1e-5)
    assert fused[spans.response_index == 1].tolist() == [pytest.approx(float(head.floor[heads[1]]))]


@pytest.mark.parametrize("std", [1e-6, 1.0])
def test_a_feature_that_stood_still_in_training_stays_finite(std):
    head = StackedHead(2, 32, hidden_units=8).eval()
    head.std[3] = std
    single = head.of_fold(1, torch.float16)
    assert single.hidden_weight.dtype == (torch.float32 if std < 1e-3 else torch.float16)
    hidden = torch.randn(1, 8, 32, generator=torch.Generator().manual_seed(0))
    starts, lengths, offsets = (torch.tensor(values) for values in ([0, 4], [4, 4], [0, 2]))
    scored = anchor_score(hidden, starts, lengths, offsets, single, transform="score")
    expected = head(hidden.reshape(2, 4, 32).mean(1))[1]
    torch.testing.assert_close(scored.logits, expected, rtol=2e-3, atol=2e-3)

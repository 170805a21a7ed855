"""Several layers side by side, and the encoder's own likelihood."""

from __future__ import annotations

import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from aapa_lightning.anchor.context import Encoding
from aapa_lightning.anchor.encoder import FrozenEncoder
from aapa_lightning.anchor.segment import Segmenter

TEXTS = ["The boats rest calmly. The gulls call."]


@pytest.fixture
def plain(tiny_model_dir, tmp_path):
    """The tiny model without its chat template."""
    folder = shutil.copytree(tiny_model_dir, tmp_path / "plain")
    (folder / "chat_template.jinja").unlink()
    return folder


def test_layers_lie_side_by_side(plain):
    spans = [Segmenter()(TEXTS[0])]
    one, last, both = (
        FrozenEncoder(str(plain), Encoding(layers=layers))(["Hi "], TEXTS, spans).embeddings for layers in ((1,), (-1,), (1, -1))
    )
    torch.testing.assert_close(both, torch.cat([one, last], -1))
    assert not torch.allclose(one, last)


def test_likelihood_is_that_of_the_language_model(plain):
    encoder, text = FrozenEncoder(str(plain), Encoding(likelihood=True)), TEXTS[0]
    whole = [(0, len(text))]
    found = encoder(["Hi "], [text], [whole]).embeddings
    assert found.shape == (1, encoder.hidden_size)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(plain), AutoTokenizer.from_pretrained(plain)
    prompt, response = tokenizer("Hi ").input_ids, tokenizer(text).input_ids
    distribution = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
    logprobs = distribution[torch.arange(len(response)), response]
    entropy = -(distribution.exp() * distribution).sum(-1)
    expected = torch.stack([logprobs.mean(), (logprobs + entropy).mean()]).float()
    torch.testing.assert_close(found[0, -2:], expected.detach(), atol=1e-5, rtol=1e-4)

"""``sentence_pool`` against hand-computed values and a double loop."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aapa_kernels import sentence_pool


def brute_force(hidden, sentence, count, normalize):
    rows = []
    for s in range(count):
        picked = [hidden[t].double() for t in range(len(sentence)) if int(sentence[t]) == s]
        mean = sum(picked) / len(picked) if picked else torch.zeros(hidden.shape[-1], dtype=torch.float64)
        norm = float(mean.pow(2).sum()) ** 0.5
        rows.append(mean / norm if normalize and norm > 0 else mean)
    return torch.stack(rows)


def test_hand_computed():
    hidden = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], [[3.0, 4.0], [9.0, 9.0], [7.0, 7.0]]])
    sentence = torch.tensor([[0, 0, 1], [2, -1, -1]])
    torch.testing.assert_close(sentence_pool(hidden, sentence, 4), torch.tensor([[2.0, 3.0], [5.0, 6.0], [3.0, 4.0], [0.0, 0.0]]))
    unit = sentence_pool(hidden, sentence, 4, normalize=True)
    torch.testing.assert_close(unit[2:], torch.tensor([[0.6, 0.8], [0.0, 0.0]]))


@settings(max_examples=40, deadline=None)
@given(
    sentence=st.lists(st.integers(-1, 4), min_size=0, max_size=12),
    width=st.integers(1, 5),
    normalize=st.booleans(),
    dtype=st.sampled_from([torch.bfloat16, torch.float32, torch.float64]),
)
def test_equals_a_double_loop(sentence, width, normalize, dtype):
    hidden = torch.randn(len(sentence), width, generator=torch.Generator().manual_seed(len(sentence))).to(dtype)
    found = sentence_pool(hidden, torch.tensor(sentence, dtype=torch.int64), 5, normalize)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(found.double(), brute_force(hidden, sentence, 5, normalize), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("normalize", [False, True])
def test_gradient_and_poison(normalize):
    hidden = torch.randn(2, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sentence = torch.tensor([[0, 0, 1, -1], [3, 3, -1, -1]])  # sentence 2 is empty
    clean = hidden.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda h: sentence_pool(h, sentence, 4, normalize), clean)
    poisoned = torch.where((sentence < 0)[..., None], torch.nan, hidden).requires_grad_()
    found, expected = sentence_pool(poisoned, sentence, 4, normalize), sentence_pool(clean, sentence, 4, normalize)
    torch.testing.assert_close(found, expected)
    found.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(poisoned.grad, clean.grad)
    assert poisoned.grad[sentence < 0].eq(0).all()


def test_normalised_zero_has_a_finite_gradient():
    hidden = torch.zeros(2, 3, requires_grad=True)
    sentence_pool(hidden, torch.tensor([0, 0]), 1, normalize=True).sum().backward()
    assert torch.isfinite(hidden.grad).all()


def test_padding_does_not_matter():
    hidden, sentence = torch.randn(2, 3, 4), torch.tensor([[0, 1, 1], [2, 2, -1]])
    wider = torch.cat([hidden, torch.full((2, 5, 4), 7.0)], 1)
    longer = torch.cat([sentence, torch.full((2, 5), -1)], 1)
    assert torch.equal(sentence_pool(hidden, sentence, 3), sentence_pool(wider, longer, 3))


def test_no_tokens_and_no_sentences():
    assert sentence_pool(torch.randn(2, 0, 4), torch.zeros(2, 0, dtype=torch.int64), 2).eq(0).all()
    assert sentence_pool(torch.randn(3, 4), torch.full((3,), -1), 0).shape == (0, 4)

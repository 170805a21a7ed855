"""Streamed log-probs against float64, full logits and TRL's kernel, in value and every gradient."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aapa_lightning.logprobs.chunked import Cap, chunked_logprobs
from aapa_lightning.logprobs.tokens import token_logprobs

CAPS = [Cap(), Cap(0.25), Cap(1.0, 3.0), Cap(6.0, 2.0)]


def inputs(tokens, vocabulary, width, *, dtype=torch.float32, bias=False, scale=1.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden = scale * torch.randn(tokens, width, generator=g, dtype=torch.float64)
    weight = torch.randn(vocabulary, width, generator=g, dtype=torch.float64)
    offsets = torch.randn(vocabulary, generator=g, dtype=torch.float64) if bias else None
    ids = torch.randint(vocabulary, (tokens,), generator=g)
    leaves = [None if x is None else x.to(dtype).requires_grad_() for x in (hidden, weight, offsets)]
    return (*leaves, ids)


def reference(hidden, weight, bias, ids, temperature=1.0, cap=CAPS[0], dtype=torch.float64):
    """Full logits in float64."""
    logits = hidden.to(dtype) @ weight.to(dtype).t()
    return token_logprobs(cap(logits if bias is None else logits + bias.to(dtype)), ids, temperature, entropy=True)


def gradients(outputs, leaves, seed=1):
    """Of sums with random upstream gradients, as per-token advantages give."""
    g = torch.Generator().manual_seed(seed)
    leaves = [leaf for leaf in leaves if leaf is not None]
    upstream = [torch.randn(x.shape, generator=g, dtype=torch.float64).to(x.dtype) for x in outputs]
    return torch.autograd.grad(list(outputs), leaves, upstream)


def compare(leaves, ids, *, rtol, atol, **options):
    """Values and gradients of the streamed path against float64."""
    hidden, weight, bias = leaves
    shared = {name: options[name] for name in ("temperature", "cap") if name in options}
    ours = chunked_logprobs(hidden, weight, ids, bias=bias, entropy=True, **options)
    theirs = reference(hidden, weight, bias, ids, **shared)
    for mine, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.double(), right, rtol=rtol, atol=atol)
    for mine, right, leaf in zip(gradients(ours, leaves), gradients(theirs, leaves), (x for x in leaves if x is not None), strict=True):
        assert mine.dtype == leaf.dtype
        torch.testing.assert_close(mine.double(), right.double(), rtol=rtol, atol=atol)


@pytest.mark.parametrize("cap", CAPS, ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tile", [(3, 4), (2, 11), (100, 100), (1, 1)])
def test_gradcheck_in_float64(cap, bias, tile):
    *leaves, _ = inputs(6, 11, 3, dtype=torch.float64, bias=bias)
    ids = torch.tensor([0, 3, 4, 7, 8, 10])  # first and last of tiles of four

    def function(*tensors):
        return chunked_logprobs(
            tensors[0],
            tensors[1],
            ids,
            bias=tensors[2] if bias else None,
            temperature=0.7,
            cap=cap,
            entropy=True,
            token_chunk=tile[0],
            vocab_chunk=tile[1],
        )

    assert torch.autograd.gradcheck(function, [x for x in leaves if x is not None])
    for mine, right in zip(function(*leaves), reference(*leaves, ids, 0.7, cap), strict=True):
        torch.testing.assert_close(mine, right)


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(0, 20),
    vocabulary=st.integers(1, 70),
    width=st.integers(1, 9),
    tile=st.tuples(st.integers(1, 25), st.integers(1, 80)),
    bias=st.booleans(),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.0]),
    cap=st.sampled_from(CAPS),
    seed=st.integers(0, 1000),
)
def test_any_shape_and_tile_equals_float64(tokens, vocabulary, width, tile, bias, temperature, cap, seed):
    *leaves, ids = inputs(tokens, vocabulary, width, bias=bias, seed=seed)
    # float32: products of up to 9 terms, divided by a temperature of 0.3
    options = {"temperature": temperature, "cap": cap, "token_chunk": tile[0], "vocab_chunk": tile[1]}
    compare(leaves, ids, rtol=1e-4, atol=2e-4, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_weights_are_summed_in_float32(dtype):
    """On a grid where products are exact, values keep float32's digits and gradients are rounded once, at the end."""
    g = torch.Generator().manual_seed(0)
    hidden, weight, bias = torch.randint(-1, 2, (40, 16), generator=g), *(torch.randint(-8, 9, (3000, n), generator=g) / 4 for n in (16, 1))
    leaves = [x.to(dtype).requires_grad_() for x in (hidden, weight, bias[:, 0])]
    compare(leaves, torch.randint(3000, (40,), generator=g), rtol=2**-8, atol=1e-5, token_chunk=16, vocab_chunk=256)
    ours = chunked_logprobs(*leaves[:2], torch.arange(40), bias=leaves[2], entropy=True, vocab_chunk=256)
    torch.testing.assert_close([x.double() for x in ours], list(reference(*leaves, torch.arange(40))), rtol=1e-5, atol=1e-5)
    hidden, weight = torch.zeros(1, 4, dtype=dtype), torch.zeros(50_000, 4, dtype=dtype)
    logprobs, entropy = chunked_logprobs(hidden, weight, torch.tensor([7]), entropy=True)
    assert logprobs.dtype == torch.float32
    torch.testing.assert_close(torch.stack([-logprobs, entropy]), torch.full((2, 1), 50_000.0).log())


def test_gradient_of_a_half_weight_is_rounded_once():
    """A thousand equal contributions of 1/512 to one entry: a sum kept in bfloat16 stalls at 1/2."""
    hidden = torch.full((1024, 1), 2.0**-9, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    chunked_logprobs(hidden, weight, torch.zeros(1024, dtype=torch.long), token_chunk=1)[0].sum().backward()
    torch.testing.assert_close(weight.grad, torch.tensor([[1.0], [-1.0]], dtype=torch.bfloat16))


def test_autocast_multiplies_in_its_dtype_and_sums_in_float32():
    *leaves, ids = inputs(20, 300, 8)
    hidden, weight, _ = leaves
    with torch.autocast("cpu", torch.bfloat16):
        ours = chunked_logprobs(hidden, weight, ids, entropy=True, token_chunk=7, vocab_chunk=64)
        theirs = token_logprobs(hidden @ weight.t(), ids, entropy=True)
    for mine, right in zip(ours, theirs, strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine, right, rtol=1e-5, atol=1e-5)
    for mine, right in zip(gradients(ours, leaves), gradients(theirs, leaves), strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine, right, rtol=0.02, atol=0.1)


@pytest.mark.parametrize(
    "row", [[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4], [1e30, 0.0, -1e30], [0.0, 1.0, float("-inf")], [float("-inf"), 1.0, 2.0]]
)
@pytest.mark.parametrize("width", [1, 2, 3])
def test_extreme_logits_have_finite_values_and_gradients(row, width):
    """The logits come from the bias, so that -inf (a forbidden token) can be among them."""
    hidden, weight = torch.zeros(1, 2, requires_grad=True), torch.ones(3, 2, requires_grad=True)
    bias = torch.tensor(row, requires_grad=True)
    ours = chunked_logprobs(hidden, weight, torch.tensor([1]), bias=bias, entropy=True, vocab_chunk=width)
    theirs = reference(hidden, weight, bias, torch.tensor([1]))
    for mine, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.double(), right, rtol=1e-6, atol=1e-6)
    for grad in torch.autograd.grad(ours[0].sum() + 3 * ours[1].sum(), (hidden, weight, bias)):
        assert grad.isfinite().all()


def test_large_logits_keep_their_digits():
    """At logits of 1e4 the differences stay exact: nothing is taken from a rounded logsumexp."""
    bias = torch.tensor([1e4, 1e4 - 0.5, 1e4 - 1.0])
    ours = chunked_logprobs(torch.zeros(1, 1), torch.zeros(3, 1), torch.tensor([1]), bias=bias, entropy=True)
    for mine, right in zip(ours, reference(torch.zeros(1, 1), torch.zeros(3, 1), bias, torch.tensor([1])), strict=True):
        torch.testing.assert_close(mine.double(), right, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_only_wanted_gradients_are_made(frozen):
    *leaves, ids = inputs(5, 30, 4, bias=True)
    leaves[frozen].requires_grad_(False)
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    ours = chunked_logprobs(leaves[0], leaves[1], ids, bias=leaves[2], entropy=True, vocab_chunk=8)
    for mine, right in zip(gradients(ours, wanted), gradients(reference(*leaves, ids), wanted), strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-4, atol=1e-5)
    assert leaves[frozen].grad is None


def test_entropy_for_logging_has_no_graph_and_changes_no_bit():
    hidden, weight, _, ids = inputs(5, 300, 4)
    logprobs, entropy = chunked_logprobs(hidden, weight, ids, entropy=True, entropy_grad=False, vocab_chunk=64)
    alone, nothing = chunked_logprobs(hidden, weight, ids, vocab_chunk=64)
    assert logprobs.requires_grad
    assert not entropy.requires_grad
    assert nothing is None
    assert torch.equal(logprobs, alone)
    with torch.no_grad():
        assert torch.equal(chunked_logprobs(hidden, weight, ids, vocab_chunk=64)[0], alone)


def test_no_tokens_have_zero_gradients():
    hidden, weight, bias, ids = inputs(0, 30, 4, bias=True)
    logprobs, entropy = chunked_logprobs(hidden, weight, ids, bias=bias, entropy=True)
    assert logprobs.shape == entropy.shape == (0,)
    (logprobs.sum() + entropy.sum()).backward()
    assert not weight.grad.any()
    assert not bias.grad.any()


def test_second_derivatives_are_refused():
    hidden, weight, _, ids = inputs(3, 20, 4)
    with pytest.raises(RuntimeError, match="create_graph=True; use logprob backend `full`"):
        torch.autograd.grad(chunked_logprobs(hidden, weight, ids)[0].sum(), hidden, create_graph=True)


@pytest.mark.parametrize(
    ("shapes", "options"),
    [
        (((3, 4), (9, 5), (3,)), {}),
        (((3, 4), (9, 4), (2,)), {}),
        (((1, 3, 4), (9, 4), (3,)), {}),
        (((3, 4), (9, 4), (3,)), {"token_chunk": 0}),
        (((3, 4), (9, 4), (3,)), {"temperature": -1.0}),
    ],
)
def test_what_does_not_fit_is_refused(shapes, options):
    hidden, weight, ids = (torch.zeros(shape) for shape in shapes)
    with pytest.raises(ValueError, match="chunked_logprobs: expected"):
        chunked_logprobs(hidden, weight, ids.long(), **options)


class TestTrl:
    """TRL's own streamed log-probs, an independent implementation."""

    @pytest.mark.parametrize("cap", CAPS, ids=str)
    @pytest.mark.parametrize("bias", [False, True])
    def test_values_and_gradients(self, cap, bias):
        pytest.importorskip("trl", reason="the peer comes with the extra `bench`")
        from trl.kernels.chunked_logprob import ChunkedLogProbFunction

        *leaves, ids = inputs(50, 700, 8, bias=bias)
        arguments = (ids, 0.7, 128, cap.cap, cap.scale, ("entropy",))
        theirs = ChunkedLogProbFunction.apply(*leaves, *arguments)[:2]
        ours = chunked_logprobs(*leaves[:2], ids, bias=leaves[2], temperature=0.7, cap=cap, entropy=True, token_chunk=16, vocab_chunk=100)
        for mine, right in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, right, rtol=1e-5, atol=1e-5)
        for mine, right in zip(gradients(ours, leaves), gradients(theirs, leaves), strict=True):
            torch.testing.assert_close(mine, right, rtol=1e-4, atol=1e-4)

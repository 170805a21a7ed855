"""Log-probs against unpadded rows, float64 and full logits."""

import pytest
import torch

from aapa_lightning.logprobs import response_logprobs, sequence_logprobs, token_logprobs

PROMPTS = [[5, 6, 7, 8], [9], [10, 11]]
RESPONSES = [[20, 21], [22, 23, 24, 25, 26], []]


@pytest.fixture(scope="module", params=["qwen3", "gpt2", "bloom"])
def model(request, tiny_config):
    """Rotary, learned and ALiBi positions (the last takes no position_ids)."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    sizes = {
        "qwen3": {key: value for key, value in tiny_config.items() if key != "model_type"},
        "gpt2": {"vocab_size": 40, "n_positions": 64, "n_embd": 16, "n_layer": 2, "n_head": 2, "initializer_range": 0.2},
        "bloom": {"vocab_size": 40, "hidden_size": 16, "n_layer": 2, "n_head": 2, "initializer_range": 0.2},
    }
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(request.param, **sizes[request.param])).eval()


def padded(rows, left):
    width = max(map(len, rows))
    ids, mask = torch.full((len(rows), width), 1), torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        where = slice(width - len(row), width) if left else slice(0, len(row))
        ids[i, where], mask[i, where] = torch.tensor(row, dtype=torch.long), True
    return ids, mask


def unpadded(model, prompt, response, temperature=1.0):
    """Full logits of one row without padding, log-softmax in float64."""
    ids = torch.tensor([prompt + response])
    logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].double() / temperature
    logprobs = logits.log_softmax(-1)
    return logprobs.gather(-1, torch.tensor(response)[:, None])[:, 0], -(logprobs.exp() * logprobs).sum(-1)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
def test_padded_batch_equals_unpadded_rows(model, temperature):
    prompts, responses = padded(PROMPTS, left=True), padded(RESPONSES, left=False)
    logprobs, entropy = response_logprobs(model, *prompts, *responses, temperature, entropy=True)
    assert logprobs.dtype == entropy.dtype == torch.float32
    assert not logprobs[~responses[1]].any()
    assert not entropy[~responses[1]].any()
    for row, (prompt, response) in enumerate(zip(PROMPTS[:2], RESPONSES[:2], strict=True)):
        expected, expected_entropy = unpadded(model, prompt, response, temperature or 1.0)
        torch.testing.assert_close(logprobs[row, : len(response)].double(), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(entropy[row, : len(response)].double(), expected_entropy, rtol=1e-4, atol=1e-5)


def test_gradient_does_not_depend_on_padding(model):
    def gradients(loss):
        return torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])

    prompts, responses = padded(PROMPTS[:2], left=True), padded(RESPONSES[:2], left=False)
    ours = gradients(response_logprobs(model, *prompts, *responses)[0].sum())
    rows = gradients(sum(unpadded(model, p, r)[0].sum() for p, r in zip(PROMPTS[:2], RESPONSES[:2], strict=True)))
    for left, right in zip(ours, rows, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-4)


def test_sequences_equal_unpadded_rows(model):
    rows = [p + r for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    ids, mask = padded(rows, left=False)
    logprobs = sequence_logprobs(model, ids, mask)
    assert logprobs.shape == (3, ids.shape[1] - 1)
    for row, tokens in enumerate(rows):
        expected, _ = unpadded(model, tokens[:1], tokens[1:])
        torch.testing.assert_close(logprobs[row, : len(tokens) - 1].double(), expected, rtol=1e-4, atol=1e-5)
        assert not logprobs[row, len(tokens) - 1 :].any()
    wanted = torch.zeros_like(mask)
    wanted[0, 4:6] = wanted[1, 3:] = True
    torch.testing.assert_close(sequence_logprobs(model, ids, mask, wanted), logprobs * (wanted & mask)[:, 1:], rtol=1e-5, atol=1e-6)
    nothing = sequence_logprobs(model, ids, mask, torch.zeros_like(mask))
    assert nothing.requires_grad
    assert not nothing.any()


class Recorder(torch.nn.Module):
    """Passes calls on and keeps the shape of the logits."""

    def __init__(self, model):
        super().__init__()
        self.inner, self.shape = model, None

    def forward(self, input_ids, attention_mask, position_ids, use_cache, logits_to_keep):
        outputs = self.inner(
            input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=use_cache, logits_to_keep=logits_to_keep
        )
        self.shape = outputs.logits.shape
        return outputs


@pytest.mark.parametrize("model", ["qwen3"], indirect=True)
def test_only_response_positions_get_logits(model):
    recorder = Recorder(model)
    prompts, responses = padded(PROMPTS, left=True), padded(RESPONSES, left=False)
    response_logprobs(recorder, *prompts, *responses)
    assert recorder.shape[1] == responses[0].shape[1] + 1
    ids, mask = padded([[5, 6, 7, 8, 9, 10, 11]], left=False)
    sequence_logprobs(recorder, ids, mask, torch.arange(7)[None] >= 5)
    assert recorder.shape[1] == 3  # two tokens to learn, and the last column that predicts nothing


@pytest.mark.parametrize("model", ["qwen3"], indirect=True)
def test_an_adapter_does_not_hide_position_ids(model):
    peft = pytest.importorskip("peft", reason="adapters come with the extra `peft`")
    from copy import deepcopy

    prompts, responses = padded(PROMPTS, left=True), padded(RESPONSES, left=False)
    wrapped = peft.get_peft_model(deepcopy(model), peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")).eval()
    plain, _ = response_logprobs(model, *prompts, *responses)
    torch.testing.assert_close(response_logprobs(wrapped, *prompts, *responses)[0], plain)


def test_tokens_against_float64_and_gradcheck():
    torch.manual_seed(0)
    logits, ids = 5 * torch.randn(3, 4, 50), torch.randint(50, (3, 4))
    reference = (logits.double() / 0.6).log_softmax(-1)
    logprobs, entropy = token_logprobs(logits, ids, 0.6, entropy=True)
    torch.testing.assert_close(logprobs.double(), reference.gather(-1, ids[..., None])[..., 0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy.double(), -(reference.exp() * reference).sum(-1), rtol=1e-5, atol=1e-5)
    small = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: token_logprobs(x, torch.tensor([0, 3]), 0.6, entropy=True), (small,))


def test_bfloat16_logits_are_reduced_in_float32():
    logits = torch.zeros(1, 50_000, dtype=torch.bfloat16)
    logprobs, entropy = token_logprobs(logits, torch.tensor([7]), entropy=True)
    expected = torch.tensor([50_000.0]).log()
    torch.testing.assert_close(logprobs, -expected)
    torch.testing.assert_close(entropy, expected)


@pytest.mark.parametrize("row", [[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4], [1e30, 0.0, -1e30], [0.0, 1.0, float("-inf")]])
def test_extreme_logits_have_finite_values_and_gradients(row):
    logits = torch.tensor([row], requires_grad=True)
    logprobs, entropy = token_logprobs(logits, torch.tensor([1]), entropy=True)
    (logprobs + entropy).sum().backward()
    assert logprobs.isfinite().all()
    assert entropy.isfinite().all()
    assert logits.grad.isfinite().all()


def test_entropy_for_logging_has_no_graph():
    logits = torch.randn(2, 5, requires_grad=True)
    logprobs, entropy = token_logprobs(logits, torch.tensor([0, 1]), entropy=True, entropy_grad=False)
    assert logprobs.requires_grad
    assert not entropy.requires_grad
    assert token_logprobs(logits, torch.tensor([0, 1]))[1] is None

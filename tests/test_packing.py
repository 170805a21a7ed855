"""Packed rows: the log-probs, entropies and gradients of padded rows, or none where a model cannot be packed."""

import importlib.util
import warnings
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aapa_lightning.errors import ConfigError
from aapa_lightning.logprobs import response_logprobs, sequence_logprobs, set_packing
from aapa_lightning.logprobs.packing import _bins, pack


@pytest.fixture(scope="module")
def heads():
    """The model families of ``test_logprobs_head.py``."""
    source = importlib.util.spec_from_file_location("heads", Path(__file__).with_name("test_logprobs_head.py"))
    module = importlib.util.module_from_spec(source)
    source.loader.exec_module(module)
    return module


@pytest.fixture
def build(heads, monkeypatch):
    def make(kind, layers=1, **options):
        monkeypatch.setitem(heads.SIZES, "num_hidden_layers", layers)
        heads.MODELS.setdefault(kind, {})
        return heads.build(kind, **options).eval()

    return make


@pytest.fixture
def model(build):
    return build("qwen3", layers=2)


@pytest.fixture
def batch():
    """Prompts of 4, 2, 1, 3 and 4 tokens, padded on the left, and responses of 7, 2, 0, 1 and 5."""
    g = torch.Generator().manual_seed(0)
    prompts, responses = torch.randint(3, 50, (5, 4), generator=g), torch.randint(3, 50, (5, 7), generator=g)
    prompt_mask = torch.arange(4) >= torch.tensor([0, 2, 3, 1, 0])[:, None]
    return [prompts, prompt_mask, responses, torch.arange(7) < torch.tensor([7, 2, 0, 1, 5])[:, None]]


@pytest.fixture(autouse=True)
def _all_are_packed():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="batches of")
        yield


def called_with(model):
    """Shapes and names of what the model is called with from now on."""
    seen = []
    model.register_forward_pre_hook(lambda _, args, inputs: seen.append((tuple(inputs["input_ids"].shape), set(inputs))), with_kwargs=True)
    return seen


def compare(heads, model, batch, backend, tolerance=None):
    """Padded and packed: values, and gradients of sums with uneven weights. Returns what the model was called with when packed."""
    set_packing(model, False)
    padded = heads.everything(model, batch, backend)
    set_packing(model, True)
    seen = called_with(model)
    packed = heads.everything(model, batch, backend)
    assert padded[2].keys() == packed[2].keys()
    torch.testing.assert_close(packed, padded, **tolerance or {"rtol": 1e-4, "atol": 5e-5})
    assert padded[0].any()
    return seen


@pytest.mark.parametrize("backend", ["full", "chunked"])
@pytest.mark.parametrize("kind", ["qwen3", "llama", "gemma2", "cohere", "granite", "hyperclovax", "phi", "mixtral", "gpt2", "gemma3_text"])
def test_every_family_equals_padded_rows(heads, build, batch, kind, backend):
    seen = compare(heads, build(kind), batch, backend)
    assert seen[-1][0] == (2, 15)  # rows of 11, 4, 1, 4, 9 tokens
    assert "attention_mask" not in seen[-1][1]


@pytest.mark.parametrize("backend", ["full", "chunked"])
def test_float64_equals_to_the_last_digits(heads, model, batch, backend):
    compare(heads, model.double(), batch, backend, {"rtol": 1e-10, "atol": 1e-12})


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_windows_shorter_than_a_row(heads, build, batch, attention):
    model = build("mistral", sliding_window=3, attn_implementation=attention)
    full = build("mistral", sliding_window=None)
    compare(heads, model, batch, "full")
    assert not torch.allclose(response_logprobs(model, *batch)[0], response_logprobs(full, *batch)[0], atol=1e-3)


def test_one_row_and_rows_alone(heads, model, batch):
    compare(heads, model, [part[:1] for part in batch], "full")
    together, _ = response_logprobs(model, *batch)
    for row in range(5):
        alone, _ = response_logprobs(model, *(part[row : row + 1] for part in batch))
        torch.testing.assert_close(together[row : row + 1], alone)


@pytest.mark.parametrize("backend", ["full", "chunked"])
def test_order_and_padding_change_no_value(model, batch, backend):
    set_packing(model, True)
    first, _ = response_logprobs(model, *batch, backend=backend)
    order = torch.tensor([3, 0, 4, 2, 1])
    again, _ = response_logprobs(model, *(part[order] for part in batch), backend=backend)
    torch.testing.assert_close(again, first[order])
    pad = torch.nn.functional.pad
    wide = [pad(part, (3, 0) if i < 2 else (0, 2)) for i, part in enumerate(batch)]
    wider, _ = response_logprobs(model, *wide, backend=backend)
    assert torch.equal(wider[:, :7], first)  # the packed batch is the same
    assert not wider[:, 7:].any()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("backend", ["full", "chunked"])
def test_demonstrations(model, masked, backend):
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 50, (4, 9), generator=g)
    mask = torch.arange(9) < torch.tensor([9, 5, 1, 2])[:, None]
    wanted = torch.rand(4, 9, generator=g) < 0.5 if masked else None
    found = []
    for packing in (False, True):
        set_packing(model, packing)
        model.zero_grad()
        logprobs = sequence_logprobs(model, ids, mask, wanted, backend=backend)
        (logprobs * torch.linspace(-1, 1, 32).view(4, 8)).sum().backward()
        found.append((logprobs.detach(), {name: p.grad for name, p in model.named_parameters()}))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["full", "chunked"])
def test_adapters_and_their_reference(heads, build, batch, backend):
    peft = pytest.importorskip("peft", reason="adapters come with the extra `peft`")
    options = {"target_modules": ["q_proj", "lm_head"], "init_lora_weights": False}
    model = peft.get_peft_model(build("llama"), peft.LoraConfig(task_type="CAUSAL_LM", **options)).eval()
    compare(heads, model, batch, backend)
    with model.disable_adapter():
        packed, _ = response_logprobs(model, *batch, backend=backend)
        set_packing(model, False)
        torch.testing.assert_close(packed, response_logprobs(model, *batch, backend=backend)[0])


@pytest.mark.parametrize("backend", ["full", "chunked"])
def test_activation_checkpointing(heads, model, batch, backend):
    model.train().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    compare(heads, model, batch, backend)


@pytest.mark.parametrize("backend", ["full", "chunked"])
def test_a_batch_without_responses_still_has_a_graph(model, batch, backend):
    set_packing(model, True)
    batch[3] = torch.zeros_like(batch[3])
    logprobs, entropy = response_logprobs(model, *batch, entropy=True, backend=backend)
    assert not logprobs.any()
    (logprobs.sum() + entropy.sum()).backward()  # a rank without tokens takes part in the backward pass
    assert not model.model.layers[0].mlp.up_proj.weight.grad.any()


def test_prompts_never_reach_the_head(model, batch):
    set_packing(model, True)
    response_logprobs(model, *batch)  # the trial
    rows = []
    model.lm_head.register_forward_hook(lambda _, args, logits: rows.append(tuple(logits.shape)))
    response_logprobs(model, *batch, backend="full")
    assert rows == [(1, 15, 50)]
    assert "forward" not in model.lm_head.__dict__


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("bloom", "it takes no position_ids"),
        ("qwen3_next", "recurrent state"),
        ("llama4_text", "layers of kind chunked_attention"),
        ("gpt_oss", "its packed rows see each other"),
        ("opt", "its packed rows see each other"),
    ],
)
def test_families_that_cannot_be_packed_stay_padded_and_say_so_once(build, batch, kind, reason):
    model = build(kind, layers=4)
    set_packing(model, False)
    padded, _ = response_logprobs(model, *batch)
    set_packing(model, True)
    with pytest.warns(UserWarning, match=f"batches of {type(model).__name__} stay padded: .*{reason}"):
        assert torch.equal(response_logprobs(model, *batch)[0], padded)
    assert torch.equal(response_logprobs(model, *batch)[0], padded)  # and no second warning


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda inputs: inputs | {"position_ids": inputs["position_ids"] + 5 * ("attention_mask" not in inputs)}, "other log-probs"),
        (lambda inputs: inputs | {"attention_mask": torch.ones_like(inputs["input_ids"])}, "see each other"),
        (lambda inputs: inputs | {"input_ids": inputs["input_ids"][:, :20]}, "two packed rows end in RuntimeError"),
    ],
)
def test_the_trial_finds_what_no_config_tells(build, batch, change, reason):
    """Absolute positions that go on; a mask of the model's own; a model that cannot be called so."""
    model = build("gpt2")
    set_packing(model, True)
    assert pack(deepcopy(model), batch[0], batch[1], batch[1][:, 1:])
    model.register_forward_pre_hook(lambda _, args, inputs: (args, change(inputs)), with_kwargs=True)
    with pytest.warns(UserWarning, match=reason):
        assert pack(model, batch[0], batch[1], batch[1][:, 1:]) is None


def test_the_first_call_has_the_dropout_of_every_call(build, batch):
    """The trial shifts no random numbers, since a resumed run makes its first call anywhere, and puts every module's mode back."""
    model = build("qwen3", attention_dropout=0.5).train()
    model.model.norm.eval()
    set_packing(model, True)
    made = []
    for _ in range(2):
        torch.manual_seed(3)
        made.append((response_logprobs(model, *batch)[0], torch.rand(1)))
    assert torch.equal(made[0][0], made[1][0])
    assert torch.equal(made[0][1], made[1][1])
    torch.manual_seed(4)
    assert not torch.equal(response_logprobs(model, *batch)[0], made[0][0])
    assert model.training
    assert not model.model.norm.training


def test_a_compiled_model_stays_padded(model, batch):
    padded, _ = response_logprobs(model, *batch)
    set_packing(model, True)
    with pytest.warns(UserWarning, match="packed batches differ in length"):
        torch.testing.assert_close(response_logprobs(torch.compile(model, backend="eager"), *batch)[0], padded)


def test_the_choice_stays_with_the_model_and_its_copies(model, batch):
    seen = called_with(model)
    response_logprobs(model, *batch)
    assert "attention_mask" in seen[-1][1]  # auto, under SDPA
    set_packing(model, True)
    copy = deepcopy(model)
    seen = called_with(copy)
    response_logprobs(copy, *batch)
    assert "attention_mask" not in seen[-1][1]
    with pytest.raises(ConfigError, match="packing: expected auto, true or false; found 'always'"):
        set_packing(model, "always")


@settings(deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=20).filter(any), st.sampled_from([1, 1000]))
def test_bins_hold_every_row_once(lengths, hidden):
    places, used = _bins(lengths, hidden)
    cells = [(row, start + i) for length, (row, start) in zip(lengths, places, strict=True) for i in range(length)]
    assert len(set(cells)) == len(cells) == sum(used)
    assert all(column < used[row] for row, column in cells)
    assert len(used) * max(used) <= (2 if hidden > 1 else 4) * sum(lengths)


def test_bins_by_what_they_cost():
    assert _bins([10] * 7, 64)[1] == [10] * 7  # nothing to gain: one row each
    assert _bins([5, 4, 4], 1000)[1] == [5 + 4 + 4]  # two bins would hold 16 cells, three 15
    assert _bins([500, 400, 400], 100)[1] == [500, 400, 400]  # a wide row costs attention

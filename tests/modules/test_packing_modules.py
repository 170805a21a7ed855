"""Packing in runs: every module trains to the weights of padded batches, and two ranks make the same values under DDP and FSDP2."""

import math
from dataclasses import replace

import pytest
import torch
from ranks import run_ranks

from aapa_lightning.attention import _FLASH
from aapa_lightning.logprobs import packing

MODES = ("ddp", "fsdp", "reshard", "head", "half")


@pytest.fixture
def packed_batches(monkeypatch):
    """Shapes ``[B, S]`` of the batches that were packed."""
    shapes = []
    inputs = packing.packed_inputs
    monkeypatch.setattr(packing, "packed_inputs", lambda inner, ids, *rest: shapes.append(tuple(ids.shape)) or inputs(inner, ids, *rest))
    return shapes


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("sft", {}),
        ("grpo", {"beta": 0.1, "minibatches": 2, "updates_per_window": 2}),
        ("preference", {}),
        ("chord", {}),
        ("uniapl", {}),
    ],
)
def test_packed_runs_train_to_the_weights_of_padded_ones(kit, spec, packed_batches, name, options):
    weights = {}
    for choice in (False, True):
        packed_batches.clear()
        module = kit.make_module(name, replace(spec, packing=choice), sgd=True, **options)
        kit.fit(module, kit.make_trainer(3, accumulate=1 if "minibatches" in options else 2))
        assert bool(packed_batches) == choice
        weights[choice] = {key: value.detach().clone() for key, value in module.model.named_parameters()}
    start = kit.make_module(name, spec)
    start.configure_model()
    moved = max(float((weights[False][key] - value.detach()).abs().max()) for key, value in start.model.named_parameters())
    apart = max(float((weights[True][key] - value).abs().max()) for key, value in weights[False].items())
    assert apart < 1e-4 < 1e-2 * moved


def test_one_update_per_window_has_a_ratio_of_exactly_one(kit, spec):
    rows = kit.Rows()
    kit.fit(kit.make_module("grpo", replace(spec, packing=True)), kit.make_trainer(2, accumulate=2, logger=rows))
    train = [metrics for _, metrics in rows.rows if "train/loss" in metrics]
    assert train
    assert all(metrics["train/policy/ratio"] == 1 and metrics["train/policy/clip_fraction"] == 0 for metrics in train)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", ["sft", "grpo", "preference"])
@pytest.mark.parametrize("attention", ["flash_attention_2", "flash_attention_4", "sdpa"])
def test_mixed_runs_on_a_gpu(kit, spec, packed_batches, name, attention):
    """float32 weights under bf16-mixed: rollouts, old log-probs and updates all compute with the same attention, packed."""
    import transformers.utils

    if attention != "sdpa" and not getattr(transformers.utils, f"is_flash_attn_{attention[-1]}_available")():
        pytest.skip(f"{attention} is not installed")
    if attention != "sdpa" and torch.cuda.get_device_capability()[0] not in _FLASH[attention].majors:
        pytest.skip(f"{attention} is not for this GPU")
    rows = kit.Rows()
    trainer = kit.make_trainer(3, accumulate=2, logger=rows, accelerator="cuda", devices=1, precision="bf16-mixed")
    own = replace(spec, attn_implementation=attention, packing=attention == "sdpa" or "auto")
    module = kit.fit(kit.make_module(name, own), trainer, val=kit.make_records(3))
    assert module.model.config._attn_implementation == attention
    assert packed_batches
    train = [metrics for _, metrics in rows.rows if "train/loss" in metrics]
    assert len(train) == 3
    assert all(math.isfinite(value) for metrics in train for value in metrics.values())
    if name == "grpo":
        assert all(metrics["train/policy/ratio"] == 1 for metrics in train)


# Two ranks ----------------------------------------------------------------------------------------------------------------------------


def build(mode):
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "head_dim": 8, "initializer_range": 0.3, "tie_word_embeddings": mode != "head"}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3", **sizes))
    if mode == "ddp":
        return torch.nn.parallel.DistributedDataParallel(model)
    dtype = torch.bfloat16 if mode == "half" else None
    for layer in model.model.layers:
        fully_shard(layer, mp_policy=MixedPrecisionPolicy(param_dtype=dtype))
    if mode == "head":
        fully_shard(model.lm_head, reshard_after_forward=True)
    policy = MixedPrecisionPolicy(param_dtype=dtype, output_dtype=torch.float32 if dtype else None)
    return fully_shard(model, mp_policy=policy, reshard_after_forward=mode == "reshard" or None)


def run(mode, backend, choice, rank):
    """Values and gradients after two backward passes; rank 1 has nothing to score."""
    from aapa_lightning.logprobs import response_logprobs, set_packing

    model = build(mode)
    set_packing(model, choice)
    g = torch.Generator().manual_seed(rank)
    prompts, responses = torch.randint(3, 50, (3, 4), generator=g), torch.randint(3, 50, (3, 5), generator=g)
    mask = torch.arange(5) < torch.tensor([0, 0, 0] if rank else [5, 2, 0])[:, None]
    prompt_mask = torch.arange(4) >= torch.tensor([0, 3, 2])[:, None]
    for _ in range(2):
        made = response_logprobs(model, prompts, prompt_mask, responses, mask, 0.7, entropy=True, backend=backend)
        (made[0].sum() + made[1].sum()).backward()
    grads = [p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in model.parameters()]
    return [values.detach() for values in made], grads


def work():
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    for mode in MODES:
        # 2^-8 of logits of about 4, and of gradients of about 10
        tolerance = {"rtol": 0.05, "atol": 0.1} if mode == "half" else {"rtol": 1e-4, "atol": 1e-5}
        for backend in ("full", "chunked"):
            padded, packed = (run(mode, backend, choice, rank) for choice in (False, True))
            torch.testing.assert_close(packed, padded, **tolerance)
        if not rank:
            assert padded[0][0].any()
            print("same under", mode, flush=True)
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_equal_padded_rows():
    done = run_ranks(__file__, PYTHONWARNINGS="error:log-probs of,error:batches of")
    assert done.returncode == 0, done.stderr[-5000:]
    assert [mode for mode in MODES if f"same under {mode}" in done.stdout] == list(MODES)


if __name__ == "__main__":
    work()

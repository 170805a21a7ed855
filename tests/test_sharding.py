"""Gathered parameters of a sharded model on two ranks: forwards without the other rank, and training that does not notice."""

from contextlib import contextmanager, suppress

import pytest
import torch
from ranks import run_ranks

from aapa_lightning.errors import ConfigError
from aapa_lightning.sharding import gathered_parameters, reshard, shard_units

KINDS = ("plain", "reshard", "lora", "half")


def build(kind, shard=True):
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "head_dim": 8, "initializer_range": 0.3, "tie_word_embeddings": True}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3", **sizes))
    if kind == "lora":
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(target_modules="all-linear"))
    if not shard:
        return model
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if kind == "half" else None, reduce_dtype=torch.float32)
    for layer in (model.get_base_model() if kind == "lora" else model).model.layers:
        fully_shard(layer, mp_policy=policy)
    return fully_shard(model, mp_policy=policy, reshard_after_forward=True if kind == "reshard" else None)


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(6)[None]).logits


class BrokenError(Exception):
    pass


@contextmanager
def broken(model):
    """Its second block raises."""
    handle = shard_units(model)[2].self_attn.register_forward_hook(lambda *args: (_ for _ in ()).throw(BrokenError))
    try:
        yield
    finally:
        handle.remove()


def look(model, rank):
    """A forward that fails on rank 0, under inference mode; then what a rollout does: rank 0 calls the model often, rank 1 never."""
    model.eval()
    # the failure is rank 0's own: ranks leave the block together
    with torch.inference_mode(), gathered_parameters(model), suppress(BrokenError), broken(model):
        if rank == 0:
            logits(model)
    with gathered_parameters(model), gathered_parameters(model):
        found = [logits(model) for _ in range(0 if rank else 3)]
    model.train()
    return found


def train(kind, rank, place):
    """Three optimiser steps of two micro-steps; ``place`` is where something looks at the model."""
    model = build(kind)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    seen = []
    for step in range(3):
        seen += look(model, rank) if place == "before" else []
        for micro_step in range(2):
            for unit in shard_units(model):
                unit.set_requires_gradient_sync(micro_step == 1)
            g = torch.Generator().manual_seed(100 * step + 10 * micro_step + rank)
            loss = model(input_ids=torch.randint(0, 50, (2, 7), generator=g)).logits.float().square().mean()
            seen += look(model, rank) if place == "in a graph" else []
            loss.backward()
            seen += look(model, rank) if place == "between" and micro_step == 0 else []
        optimizer.step()
        optimizer.zero_grad()
    shards = list(model.parameters())
    logits(model)  # leaves the root's parameters gathered
    with torch.no_grad():
        for shard in shards:
            shard.mul_(1.1)
    with gathered_parameters(model):
        fresh = logits(model)
    whole = {name: value.full_tensor() for name, value in model.state_dict().items()}
    if rank == 0:
        copy = build(kind, shard=False)
        copy.load_state_dict(whole)
        copy = copy.bfloat16() if kind == "half" else copy
        torch.testing.assert_close(fresh, logits(copy), rtol=0, atol=0.05 if kind == "half" else 1e-5)
        assert all(value.isfinite().all() for value in seen)
        assert len(seen) == (0 if place is None else 18 if place == "in a graph" else 9)
    assert all(hasattr(p, "full_tensor") for p in model.parameters())
    return whole


def work():
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    for kind in KINDS:
        plain = train(kind, rank, None)
        for place in ("before", "between", "in a graph"):
            torch.testing.assert_close(train(kind, rank, place), plain, rtol=0, atol=0)
        if rank == 0:
            print("unaffected:", kind, flush=True)
    torch.distributed.destroy_process_group()


def test_two_ranks_gather_and_train_on():
    done = run_ranks(__file__, timeout=120)
    assert done.returncode == 0, done.stderr[-5000:]
    assert [kind for kind in KINDS if f"unaffected: {kind}" in done.stdout] == list(KINDS)


def test_a_model_in_one_piece_is_left_alone():
    model = build("plain", shard=False)
    with gathered_parameters(model):
        found = logits(model)
    reshard(model)
    torch.testing.assert_close(found, logits(model), rtol=0, atol=0)


def test_zero_3_is_refused():
    model = torch.nn.Linear(2, 2)
    model.weight.ds_id = 0
    with pytest.raises(ConfigError, match="ZeRO stage 3; keep ranks in step"), gathered_parameters(model):
        pass


if __name__ == "__main__":
    work()

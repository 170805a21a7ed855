"""Streamed log-probs under DDP and FSDP2 on two ranks, one of them without a token: the same values and gradients as full logits."""

import pytest
import torch
from ranks import run_ranks

#: DDP; one FSDP2 group for the tied head; gathered anew for the backward pass, with a soft cap too; a head with a group of its own; 16-bit
#: parameters.
MODES = ("ddp", "fsdp", "reshard", "capped", "head", "half")


def build(mode):
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "head_dim": 8, "initializer_range": 0.3, "tie_word_embeddings": mode != "head"}
    kind = "gemma2" if mode == "capped" else "qwen3"
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes))
    if mode == "ddp":
        return torch.nn.parallel.DistributedDataParallel(model)
    dtype = torch.bfloat16 if mode == "half" else None
    for layer in model.model.layers:
        fully_shard(layer, mp_policy=MixedPrecisionPolicy(param_dtype=dtype))
    if mode == "head":
        fully_shard(model.lm_head, reshard_after_forward=True)
    policy = MixedPrecisionPolicy(param_dtype=dtype, output_dtype=torch.float32 if dtype else None)
    return fully_shard(model, mp_policy=policy, reshard_after_forward=mode in ("reshard", "capped") or None)


def run(mode, backend, rank):
    """Values and gradients after two backward passes; rank 1 has nothing to score."""
    from aapa_lightning.logprobs import response_logprobs

    model = build(mode)
    g = torch.Generator().manual_seed(rank)
    prompts, responses = torch.randint(3, 50, (3, 4), generator=g), torch.randint(3, 50, (3, 5), generator=g)
    mask = torch.arange(5) < torch.tensor([0, 0, 0] if rank else [5, 2, 0])[:, None]
    for _ in range(2):
        made = response_logprobs(
            model, prompts, torch.ones_like(prompts, dtype=torch.bool), responses, mask, 0.7, entropy=True, backend=backend
        )
        (made[0].sum() + made[1].sum()).backward()
    grads = [p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in model.parameters()]
    return [values.detach() for values in made], grads


def work():
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    for mode in MODES:
        found = {backend: run(mode, backend, rank) for backend in ("full", "chunked")}
        # 2^-8 of logits of about 4, and of gradients of about 10
        tolerance = {"rtol": 0.05, "atol": 0.1} if mode == "half" else {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(found["chunked"], found["full"], **tolerance)
        if not rank:
            assert found["full"][0][0].any()
            print("same under", mode, flush=True)
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_equal_full_logits():
    done = run_ranks(__file__, PYTHONWARNINGS="error:log-probs of")
    assert done.returncode == 0, done.stderr[-5000:]
    assert [mode for mode in MODES if f"same under {mode}" in done.stdout] == list(MODES)


if __name__ == "__main__":
    work()

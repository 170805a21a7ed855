"""Prompts read once under DDP and FSDP2 on two ranks, one of them with prompts of one token: values and gradients of whole rows."""

from functools import partial

import torch
from ranks import run_ranks


def build(mode):
    from torch.distributed.fsdp import fully_shard
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "head_dim": 8, "initializer_range": 0.3, "tie_word_embeddings": True}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3", **sizes)).eval()
    if mode == "ddp":
        return torch.nn.parallel.DistributedDataParallel(model)
    for layer in model.model.layers:
        fully_shard(layer, reshard_after_forward=True)
    return fully_shard(model, reshard_after_forward=mode == "reshard" or None)


def run(mode, backend, rank, group_size):
    from aapa_lightning.logprobs import response_logprobs

    model, calls = build(mode), []
    model.register_forward_pre_hook(lambda *args: calls.append(1))
    g = torch.Generator().manual_seed(rank)
    width = 1 if rank else 6
    prompts = torch.randint(3, 50, (2, width), generator=g).repeat_interleave(3, 0)
    responses, mask = torch.randint(3, 50, (6, 5), generator=g), torch.arange(5) < torch.randint(0, 6, (6, 1), generator=g)
    whole = torch.ones_like(prompts, dtype=torch.bool)
    for _ in range(2):
        made = response_logprobs(model, prompts, whole, responses, mask, 0.7, entropy=True, backend=backend, group_size=group_size)
        (made[0].sum() + made[1].sum()).backward()
    grads = [p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in model.parameters()]
    return [values.detach() for values in made], grads, len(calls)


def work():
    from aapa_lightning.logprobs import prefix

    prefix.LEAST_SAVED = -1  # a rank of short prompts would save nothing: under DDP it need not share, here both do
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    for mode in ("ddp", "fsdp", "reshard"):
        for backend in ("full", "chunked"):
            values, grads, few = run(mode, backend, rank, 1)
            shared, shared_grads, many = run(mode, backend, rank, 3)
            assert many > few, (mode, backend)
            for i, (found, expected) in enumerate(zip([*shared, *shared_grads], [*values, *grads], strict=True)):
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=5e-5, msg=partial("{} {} {}: {}".format, mode, backend, i))
    torch.distributed.destroy_process_group()


def test_shared_prompts_on_two_ranks():
    done = run_ranks(__file__)
    assert done.returncode == 0, done.stderr[-3000:]


if __name__ == "__main__":
    work()

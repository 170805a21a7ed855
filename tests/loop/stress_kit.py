"""A tiny model under the stress test, and optimiser steps with it: alone, or as one rank of several when run by torchrun."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from aapa_lightning.logprobs import sequence_logprobs
from aapa_lightning.loop.stress import WeightStress

IDS = torch.randint(0, 64, (8, 9), generator=torch.Generator().manual_seed(0))


def make_model(kind="qwen3", *, layers=3, **options):
    """A model of 65 words, so that shards are uneven."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"vocab_size": 65, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": layers, "num_attention_heads": 2}
    extra = {"qwen3": {"num_key_value_heads": 1, "head_dim": 8}, "llama": {"num_key_value_heads": 2}}
    extra |= {"opt": {"ffn_dim": 32, "word_embed_proj_dim": 16, "max_position_embeddings": 32}}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": True}
    config = AutoConfig.for_model(kind, **(sizes | extra.get(kind, {}) | tokens | {"initializer_range": 0.3} | options))
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).train()


def margins(model, ids=IDS):
    """Mean log-probs of the first half of the rows less those of the second."""
    scores = sequence_logprobs(model, ids, torch.ones_like(ids, dtype=torch.bool)).mean(-1)
    return scores[: len(ids) // 2] - scores[len(ids) // 2 :]


def probe_of(model, ids=IDS):
    return lambda: -nn.functional.logsigmoid(2.0 * margins(model, ids)).mean()


def stored(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def assert_same_bits(model, before):
    for name, value in model.state_dict().items():
        assert torch.equal(value.view(torch.uint8), before[name].view(torch.uint8)), name


def moved_by(model, **options):
    """What ``evaluate`` adds to each parameter, by name."""
    before = stored(model)
    stress = WeightStress(model, **options)
    flat = stress.evaluate(probe_of(model), lambda: torch.cat([p.detach().flatten() for p in model.parameters()]), seed=3)
    assert_same_bits(model, before)
    parts = flat.split([p.numel() for p in model.parameters()])
    return {n: part.view_as(p) - p.detach() for (n, p), part in zip(model.named_parameters(), parts, strict=True)}, stress


def whole(value):
    return (value.full_tensor() if hasattr(value, "full_tensor") else value).detach().clone()


class Step(nn.Module):
    """Stands where Lightning's training step does: the module that DDP wraps."""

    def __init__(self, model, **options):
        super().__init__()
        self.model = model
        self.stress = WeightStress(model, rho=0.5, **options)
        self.seen = []

    def forward(self, ids, known=None):
        stressed = known if known is not None else self.stress.evaluate(probe_of(self.model, ids), lambda: self.measure(ids), seed=5)
        return -nn.functional.logsigmoid(2.0 * (margins(self.model, ids) - stressed) - 0.5).mean(), stressed

    def measure(self, ids):
        self.seen.append({name: whole(p) for name, p in self.model.named_parameters()})
        return margins(self.model, ids)


def sum_over_ranks(value):
    total = value.clone()
    dist.all_reduce(total)
    return total


def build(job, ranks):
    options = {"start_layer": job.get("layer", 0), "direction": job.get("direction", "gradient")}
    if ranks > 1:
        options |= {"sum_over_ranks": sum_over_ranks, "world_size": ranks}
    model = make_model()
    step = Step(model, **options)
    if job["strategy"] == "fully_shard":
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if job.get("mixed") else MixedPrecisionPolicy()
        for layer in model.model.layers:
            fully_shard(layer, mp_policy=policy)
        fully_shard(model, mp_policy=policy)
        model.set_reshard_after_backward(not job.get("stay_gathered", False))
    wrapped = DistributedDataParallel(step) if job["strategy"] == "ddp" else step
    return wrapped, step


def micro_steps(rank, ranks):
    """This rank's ids of two micro-steps; ranks and micro-steps share the four pairs of each."""
    for order in (IDS, IDS.flip(1)):
        rows = torch.arange(4).view(ranks, -1)[rank]
        yield order[torch.cat((rows, rows + 4))]


def optimiser_step(job, rank, ranks, known=None):
    """Two accumulated micro-steps, of which the first does not reduce unless told; what they saw and the gradient they left."""
    wrapped, step = build(job, ranks)
    start, answers = {n: whole(p) for n, p in step.model.named_parameters()}, []
    for i, ids in enumerate(micro_steps(rank, ranks)):
        quiet = contextlib.nullcontext()
        if job["strategy"] == "ddp" and i == 0:
            quiet = wrapped.no_sync()
        if job["strategy"] == "fully_shard":
            step.model.set_requires_gradient_sync(i == 1 or job.get("reduce_always", False))
        with quiet:
            loss, stressed = wrapped(ids, None if known is None else known[i])
            (loss / 2).backward()
        answers.append(stressed)
    if job["strategy"] == "fully_shard":
        for unit in [step.model, *step.model.model.layers]:
            unit.reshard()
    intact = all(torch.equal(whole(p), start[n]) for n, p in step.model.named_parameters())
    gradient = {name: whole(p.grad) for name, p in step.model.named_parameters()}
    return {"margins": answers, "seen": step.seen, "gradient": gradient, "intact": intact, "metrics": step.stress.metrics}


def raising_step(job, ranks):
    """Whether the weights come back when the measurement fails on all ranks, before its forward or after it."""
    _, step = build(job, ranks)
    start = {n: whole(p) for n, p in step.model.named_parameters()}
    intact = []
    for forward_first in (False, True):

        def measure(forward_first=forward_first):
            if forward_first:
                margins(step.model)
            raise FloatingPointError

        with contextlib.suppress(FloatingPointError):
            step.stress.evaluate(probe_of(step.model), measure, seed=0)
        intact.append(all(torch.equal(whole(p), start[n]) and p.grad is None for n, p in step.model.named_parameters()))
    return intact


def run(job, rank, ranks):
    result = optimiser_step(job, rank, ranks)
    result["undisturbed"] = optimiser_step(job, rank, ranks, known=result["margins"])["gradient"]
    result["after errors"] = raising_step(job, ranks)
    return result


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    for name, job in json.loads(Path(sys.argv[1]).read_text()).items():
        torch.save(run(job, rank, ranks), f"{sys.argv[2]}/{name}.rank{rank}")
    dist.destroy_process_group()

"""Rollouts of a sharded model on two ranks: no rank waits for one that has ended, has fewer batches, or has nothing to do."""

import subprocess
import sys

import pytest
import torch
from ranks import run_ranks

from aapa_lightning.rollout.base import RolloutRequest, SamplingParams
from aapa_lightning.types import Record

#: Engine, and whether the ranks hold whole weights while they generate or keep step.
ENGINES = {
    "transformers": ("transformers", {}),
    "transformers in step": ("transformers", {"gather": False}),
    "generate": ("generate", {}),
    "generate in step": ("generate", {"gather": False}),
}
#: Responses that each rank draws to each of its prompts.
SHARES = {"even": ((2, 2), (2, 2)), "empty": ((2, 3), ()), "empty first": ((), (1,)), "batches": ((3, 3, 3), (1,))}


def make(share, rank):
    """Prompts of different lengths, whose responses end early or not at all."""
    return [
        RolloutRequest([5 + 7 * i + rank, *range(11 + i, 13 + 3 * i)], Record(f"{rank}.{i}"), 10 * rank + i, samples)
        for i, samples in enumerate(share)
    ]


def work(folder):
    from torch.distributed.device_mesh import init_device_mesh

    from aapa_lightning.policy import PolicySpec, load_policy
    from aapa_lightning.rollout.engines import ENGINES as CLASSES
    from aapa_lightning.sharding import shard_model

    torch.distributed.init_process_group("gloo")
    rank, mesh = torch.distributed.get_rank(), init_device_mesh("cpu", (2,))
    params = SamplingParams(9, temperature=1.2, stop=("a", "e", "s"))
    whole, tokenizer = load_policy(PolicySpec(folder))
    model, _ = load_policy(PolicySpec(folder))
    shard_model(model, mesh)
    for name, (engine, options) in ENGINES.items():
        ours, alone = (CLASSES[engine](m, tokenizer, [tokenizer.eos_token_id], max_rows=2, **o) for m, o in ((model, options), (whole, {})))
        lengths = set()
        for share in SHARES.values():
            requests = make(share[rank], rank)
            found, expected = (e.generate(requests, params, seed=3, window=1) for e in (ours, alone))
            assert found.texts == expected.texts
            assert torch.equal(found.response_ids, expected.response_ids)
            torch.testing.assert_close(found.engine_logprobs, expected.engine_logprobs, rtol=0, atol=1e-5)
            assert len(found.texts) == sum(share[rank])
            lengths.update(found.response_mask.sum(-1).tolist())
        assert len(lengths) > 1, lengths
        if rank == 0:
            print("drawn by", name, flush=True)
    torch.distributed.destroy_process_group()


def test_two_ranks_draw_what_one_process_draws(tiny_model_dir):
    try:
        done = run_ranks(__file__, tiny_model_dir, timeout=120)
    except subprocess.TimeoutExpired as error:
        pytest.fail(f"the ranks wait for each other: {error.stdout}")
    assert done.returncode == 0, done.stderr[-5000:]
    assert [name for name in ENGINES if f"drawn by {name}\n" in done.stdout] == list(ENGINES)


if __name__ == "__main__":
    work(sys.argv[1])

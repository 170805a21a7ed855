"""One rank of several that share a vLLM server: gives it weights, draws its own prompts, and writes down what came of it.

Arguments: url, folder, model, ``ddp`` or ``fsdp2``, ``out`` (``<out>.rank<r>``).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import vllm_kit
from torch import distributed
from transformers import AutoModelForCausalLM, AutoTokenizer

from aapa_lightning.errors import AapaError
from aapa_lightning.rollout.base import SamplingParams
from aapa_lightning.rollout.vllm_server import VLLMServerEngine


def move(model) -> None:
    """The same step on every rank."""
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))


def main(url: str, folder: str, source: str, kind: str, out: str) -> None:
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(source), AutoTokenizer.from_pretrained(source)
    move(model)
    if kind == "fsdp2":
        from torch.distributed.fsdp import fully_shard
        from torch.distributed.tensor import init_device_mesh

        mesh = init_device_mesh("cpu", (2,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    engine = VLLMServerEngine(model, tokenizer, [tokenizer.eos_token_id], url=url, folder=folder, dtype="float32", backoff=0.01, retries=1)
    requests = vllm_kit.make_requests(tokenizer)[rank::2]
    try:
        engine.sync(1)
        engine.sync(1)
        rollouts = engine.generate(requests, SamplingParams(max_new_tokens=5), seed=0, window=0)
        found = {"texts": rollouts.texts, "slots": rollouts.group_ids.tolist()}
    except AapaError as error:
        found = {"error": str(error)}
    Path(f"{out}.rank{rank}").write_text(json.dumps(found))
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])

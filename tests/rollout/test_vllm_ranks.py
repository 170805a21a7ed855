"""Two ranks and one vLLM server: one gives weights, both draw, and both know when it went wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from ranks import run_ranks

WORKER = Path(__file__).with_name("vllm_worker.py")
PUSH = ["/pause", "/collective_rpc", "/reset_prefix_cache", "/update_weight_version", "/resume"]


@pytest.fixture
def both_ranks(tiny_model_dir, tmp_path):
    def run(url, kind, folder=tmp_path / "weights"):
        done = run_ranks(WORKER, url, folder, tiny_model_dir, kind, tmp_path / "out", timeout=120)
        assert done.returncode == 0, done.stderr
        assert not list(folder.glob("*"))
        return [json.loads((tmp_path / f"out.rank{rank}").read_text()) for rank in range(2)]

    return run


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_one_rank_gives_whole_weights_and_both_draw(kind, both_ranks, vllm_server, vllm_kit, tiny_tokenizer, tiny_model_dir):
    server = vllm_server()
    first, second = both_ranks(server.url, kind)
    assert (first["slots"], second["slots"]) == ([0, 0, 2, 2, 4, 4], [1, 1, 3, 3])
    assert [path for path in server.paths() if path in PUSH] == PUSH  # once, in order
    ((_, state, missing),) = server.loaded
    expected = vllm_kit.FakeVLLM(tiny_model_dir, tiny_tokenizer)
    with torch.no_grad():
        for i, (name, parameter) in enumerate(expected.model.named_parameters()):
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))
            assert torch.equal(state[name], parameter), name
    expected.die()
    assert missing == ["lm_head.weight"]
    assert len(server.paths()) - server.paths().index("/resume") == 1 + 1 + 4 + 5  # served version, then two checks a rank and five prompts


@pytest.mark.slow
@pytest.mark.parametrize("culprit", ["server", "folder"])
def test_both_ranks_hear_of_a_push_that_failed(culprit, both_ranks, vllm_server, tmp_path):
    server = vllm_server()
    if culprit == "server":
        server.failures["/collective_rpc"] = [500] * 2
        first, second = both_ranks(server.url, "fsdp2")
        assert "could not load the weights in" in first["error"]
    else:  # one rank writes nothing, and the other must not wait for its part of the weights for ever
        (tmp_path / "file").write_text("")
        first, second = both_ranks(server.url, "fsdp2", tmp_path / "file" / "weights")
        assert "engine.folder: cannot write" in first["error"]
    assert first == second

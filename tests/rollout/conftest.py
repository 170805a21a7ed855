"""``vllm_kit``: a server that speaks as vLLM does, which worker processes import too."""

import importlib.util
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def vllm_kit():
    source = importlib.util.spec_from_file_location("vllm_kit", Path(__file__).with_name("vllm_kit.py"))
    module = importlib.util.module_from_spec(source)
    sys.modules["vllm_kit"] = module
    source.loader.exec_module(module)
    return module


@pytest.fixture
def vllm_server(vllm_kit, tiny_model_dir, tiny_tokenizer):
    servers = []

    def start(**options):
        servers.append(vllm_kit.FakeVLLM(tiny_model_dir, tiny_tokenizer, **options))
        return servers[-1]

    yield start
    for server in servers:
        server.die()

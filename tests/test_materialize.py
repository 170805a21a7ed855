"""Weights that every rank reads its rows of: those of the model as it is loaded in one piece, from files, from rank 0, tied and not."""

import json
import sys
from pathlib import Path

import pytest
import torch
from ranks import run_ranks

from aapa_lightning.errors import ConfigError
from aapa_lightning.policy import PolicySpec, load_policy
from aapa_lightning.sharding.materialize import parameters_on_meta

SIZES = {"model_type": "qwen3", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.2, "vocab_size": 301}
#: How many parts the file is in, whether the head is tied, what the file holds, and what the policy is.
CASES = {
    "one file": {},
    "parts": {"max_shard_size": "20KB"},
    "untied": {"tie": False},
    "half in the file": {"file_dtype": "bfloat16"},
    "half": {"dtype": "bfloat16", "file_dtype": "bfloat16"},
    "another head size": {"rename": True},
    "from scratch": {"scratch": True},
    "adapters": {"lora": True},
    "frozen parts": {"freeze": ["model.embed_tokens", "model.layers.0"]},
}


def make(folder, tokenizer, tie=True, file_dtype="float32", max_shard_size="1GB", rename=False, **_):
    """A saved model whose norms and biases are no constants."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**SIZES, tie_word_embeddings=tie), dtype=getattr(torch, file_dtype))
    for p in model.parameters():
        p.data.normal_()
    (model.model if rename else model).save_pretrained(folder, max_shard_size=max_shard_size)  # the bare decoder's names lack a prefix
    tokenizer.save_pretrained(folder)


def spec_of(folder, case):
    from aapa_lightning.adapters import LoraSpec

    lora = LoraSpec(r=2) if case.get("lora") else None
    if case.get("scratch"):
        return PolicySpec(config=SIZES, tokenizer=str(folder), seed=5)
    return PolicySpec(str(folder), dtype=case.get("dtype", "float32"), lora=lora, freeze=case.get("freeze", []))


def refuse():
    raise ConfigError("nothing to load")


def work(folder):
    from torch.distributed.device_mesh import init_device_mesh

    from aapa_lightning.sharding import WholeTensors, gathered_parameters, materialize, shard_model

    torch.distributed.init_process_group("gloo")
    rank, mesh = torch.distributed.get_rank(), init_device_mesh("cpu", (2,))
    for name, case in CASES.items():
        spec, calls = spec_of(Path(folder) / name, case), []
        model, _ = load_policy(spec, weights=False)
        assert all(p.is_meta for p in model.parameters())

        def load(spec=spec, calls=calls):
            calls.append(spec)
            return load_policy(spec)[0]

        shard_model(model, mesh)
        source = None if spec.lora else spec.model
        materialize.fill_model(model, torch.device("cpu"), folder=source, revision=None, load=load)
        expected, _ = load_policy(spec)
        assert len(calls) == (rank == 0 and bool({"rename", "scratch", "lora"} & case.keys()))
        torch.testing.assert_close(dict(WholeTensors(model.state_dict())), dict(expected.state_dict()), rtol=0, atol=0)
        torch.testing.assert_close(dict(model.named_buffers()), dict(expected.named_buffers()), rtol=0, atol=0)
        assert [n for n, p in model.named_parameters() if p.requires_grad] == [n for n, p in expected.named_parameters() if p.requires_grad]
        ours, theirs = ({k: v for k, v in m.generation_config.to_dict().items() if v} for m in (model, expected))
        assert ours == theirs
        ids = torch.arange(20)[None]
        with torch.no_grad(), gathered_parameters(model):
            torch.testing.assert_close(model.eval()(ids).logits, expected.eval()(ids).logits, rtol=0, atol=0)
        if rank == 0:
            print("filled:", name, flush=True)
    model, _ = load_policy(spec, weights=False)
    shard_model(model, mesh)
    with pytest.raises(ConfigError, match="nothing to load"):  # on the rank that loads, and on the one that waits
        materialize.fill_model(model, torch.device("cpu"), folder=None, revision=None, load=refuse)
    model, _ = load_policy(PolicySpec(str(Path(folder) / "two heads")), weights=False)
    shard_model(model, mesh)
    with pytest.raises(ConfigError, match=r"the config ties .* and lm_head.weight, and the files hold other weights for each"):
        materialize.fill_model(model, torch.device("cpu"), folder=str(Path(folder) / "two heads"), revision=None, load=refuse)
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_tokenizer):
    folder = tmp_path_factory.mktemp("models")
    for name, case in CASES.items():
        make(folder / name, tiny_tokenizer, **case)
    make(folder / "two heads", tiny_tokenizer, tie=False)
    config = json.loads((folder / "two heads" / "config.json").read_text()) | {"tie_word_embeddings": True}
    (folder / "two heads" / "config.json").write_text(json.dumps(config))
    return folder


def test_two_ranks_fill_their_rows(folder):
    done = run_ranks(__file__, folder, timeout=120)
    assert done.returncode == 0, done.stderr[-5000:]
    assert [name for name in CASES if f"filled: {name}\n" in done.stdout] == list(CASES)


MIB = 2**20


def measure(folder):
    """Private memory at most in use while a large policy is loaded, in shares of its float32 weights: filled by rows, and whole."""
    import threading
    import time

    from torch.distributed.device_mesh import init_device_mesh

    from aapa_lightning.sharding import shard_model
    from aapa_lightning.sharding.materialize import fill_model

    def private():
        return next(
            int(line.split()[1]) * 1024 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")
        )

    def watched(load):
        before, peaks, done = private(), [0], threading.Event()

        def watch():
            while not done.is_set():
                peaks.append(private())
                time.sleep(0.002)

        thread = threading.Thread(target=watch)
        thread.start()
        model = load()
        done.set()
        thread.join()
        return model, max(peaks) - before

    torch.distributed.init_process_group("gloo")
    mesh, spec = init_device_mesh("cpu", (2,)), PolicySpec(folder)

    def by_rows():
        model, _ = load_policy(spec, weights=False)
        shard_model(model, mesh)
        fill_model(model, torch.device("cpu"), folder=folder, revision=None, load=refuse)
        return model

    watched(lambda: load_policy(spec, weights=False)[0])  # what is imported on the way
    filled, rows = watched(by_rows)
    size = 4 * sum(p.numel() for p in filled.parameters())
    _, whole = watched(lambda: load_policy(spec)[0])
    print(f"rank {torch.distributed.get_rank()}: {rows / size:.3f} {whole / size:.3f} of {size / MIB:.0f} MiB", flush=True)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the memory of a process where Linux tells it")
def test_a_rank_takes_the_memory_of_its_rows(tmp_path, tiny_tokenizer):
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = SIZES | {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 8, "head_dim": 64}
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**sizes), dtype=torch.bfloat16).save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    done = run_ranks(__file__, tmp_path, "measure", timeout=120)
    assert done.returncode == 0, done.stderr[-5000:]
    shares = [[float(share) for share in line.split()[2:4]] for line in done.stdout.splitlines() if line.startswith("rank ")]
    assert len(shares) == 2
    for rows, whole in shares:
        assert rows < 0.65  # half of the weights, and the largest tensor on its way
        assert whole > 0.95


def test_only_parameters_are_left_without_memory():
    with parameters_on_meta():
        layer = torch.nn.BatchNorm1d(3)
        tied = torch.nn.Linear(3, 3)
        tied.bias = layer.bias
    assert layer.weight.is_meta
    assert tied.bias is layer.bias
    assert torch.equal(layer.running_var, torch.ones(3))
    assert not torch.nn.Linear(2, 2).weight.is_meta


def test_a_folder_that_holds_no_model_is_named(tmp_path, tiny_tokenizer):
    tiny_tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="cannot build a causal LM as of"):
        load_policy(PolicySpec(str(tmp_path)), weights=False)


if __name__ == "__main__":
    (measure if sys.argv[2:] else work)(sys.argv[1])

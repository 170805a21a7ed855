"""A policy that trains on the rollouts of a vLLM server: every step's responses come from that step's weights."""

from __future__ import annotations

from functools import partial

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import Logger

from aapa_lightning.adapters import LoraSpec
from aapa_lightning.data.datamodule import AapaDataModule
from aapa_lightning.errors import ConfigError
from aapa_lightning.modules.grpo import GRPOModule
from aapa_lightning.objectives.correction import CorrectionOptions
from aapa_lightning.policy import PolicySpec
from aapa_lightning.rewards.base import Reward
from aapa_lightning.rollout.base import SamplingParams
from aapa_lightning.rollout.vllm_server import VLLMServerEngine
from aapa_lightning.types import Record

RECORDS = [Record(f"Describe the harbor {i}", source=f"data.jsonl:{i + 1}") for i in range(8)]
CORRECTION = CorrectionOptions("truncate", high=2.0)


class Letters(Reward):
    name = "letters"

    def __call__(self, responses, records):
        return [sum(map(ord, text)) % 17 / 17 for text in responses]


class Rows(Logger):
    name = version = "rows"

    def __init__(self):
        super().__init__()
        self.rows = []

    def log_metrics(self, metrics, step=None):
        self.rows.append(metrics)

    def log_hyperparams(self, params, *args, **kwargs):
        pass


@pytest.fixture
def run(tiny_model_dir):
    def fit(server, *, steps=3, asynchronous=False, tolerance=0.1, correction=CORRECTION, lora=None, **options):
        engine = partial(VLLMServerEngine, url=server.url, backoff=0.01, retries=1, **options)
        module = GRPOModule(
            PolicySpec(str(tiny_model_dir), lora=lora),
            engine=engine,
            engine_tolerance=tolerance,
            rewards=[Letters()],
            correction=correction,
            asynchronous=asynchronous,
            sampling=SamplingParams(max_new_tokens=6, temperature=1.2),
            optimizer=partial(torch.optim.SGD, lr=1.0),
            prompts_per_window=4,
            group_size=3,
            seed=3,
        )
        logger = Rows()
        trainer = L.Trainer(
            max_steps=steps,
            logger=logger,
            log_every_n_steps=1,
            accelerator="cpu",
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, AapaDataModule(train=RECORDS))
        return logger.rows

    return fit


def test_each_step_is_drawn_with_the_weights_of_that_step(run, vllm_server, tmp_path):
    server = vllm_server()
    rows = run(server, folder=str(tmp_path / "weights"), dtype="float32")
    assert [path.rpartition("-step-")[2] for path, *_ in server.loaded] == ["0", "1", "2"]
    first, second = server.loaded[0][1], server.loaded[1][1]
    assert any(not torch.equal(first[name], second[name]) for name in first)
    assert len(rows) == 3
    for row in rows:
        assert abs(row["train/policy/engine_kl"]) < 1e-6
        assert row["train/policy/engine_weight"] == pytest.approx(1.0, abs=1e-3)
        assert row["train/policy/ratio"] == 1.0
        assert row["train/engine/gap"] == 0.0
    assert not list((tmp_path / "weights").iterdir())


def test_windows_drawn_ahead_are_corrected_for_their_age(run, vllm_server, tmp_path):
    server = vllm_server()
    rows = run(server, folder=str(tmp_path / "weights"), dtype="float32", asynchronous=True)
    assert [path.rpartition("-step-")[2] for path, *_ in server.loaded] == ["0", "1", "2"]
    assert rows[0]["train/policy/engine_kl"] < 1e-6  # the first window waits for its own
    assert min(row["train/policy/engine_kl"] for row in rows[1:]) > 1e-4
    assert all(row["train/policy/ratio"] == 1.0 for row in rows)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_server_that_stays_behind_is_found_by_the_probe(run, vllm_server, tmp_path, asynchronous):
    server = vllm_server()
    server.reload = lambda body: {"results": [None]}  # says yes and does nothing, as a loader that reads a cached file
    with pytest.raises(ConfigError, match=r"weights of step [12] its log-probs of a fixed prompt .* the weights did not arrive"):
        run(server, folder=str(tmp_path / "weights"), asynchronous=asynchronous)


def test_what_is_not_asked_for_is_not_probed(run, vllm_server, tmp_path):
    server = vllm_server()
    server.reload = lambda body: {"results": [None]}
    rows = run(server, folder=str(tmp_path / "weights"), tolerance=None)
    kl = [row["train/policy/engine_kl"] for row in rows]
    assert kl[0] < 1e-6 < 1e-3 < kl[-1]
    assert "train/engine/gap" not in rows[0]


def test_a_server_that_loads_half_is_found_by_the_probe(run, vllm_server, tmp_path):
    server = vllm_server()
    with torch.no_grad():
        for parameter in server.model.parameters():  # it was started with other weights
            parameter.mul_(1.5)
    plain = server.model.load_state_dict
    server.model.load_state_dict = lambda state, strict: plain(dict(list(state.items())[::2]), strict=strict)
    with pytest.raises(
        ConfigError, match=r"weights of step 0 its log-probs of a fixed prompt are .* nats a token .* engine_tolerance is 0\.1"
    ):
        run(server, folder=str(tmp_path / "weights"), dtype="float32", correction=None)


def test_a_server_without_a_folder_is_refused(run, vllm_server):
    with pytest.raises(ConfigError, match=r"engine\.folder: expected a folder to give .* the weights of every step"):
        run(vllm_server())


def test_a_server_that_dies_in_the_middle_ends_the_run(run, vllm_server, tmp_path):
    server = vllm_server()
    plain = server.sample

    def dying(body, index):
        if server.version.endswith("step-1"):
            raise RuntimeError
        return plain(body, index)

    server.sample = dying
    with pytest.raises(ConfigError, match=r"could not respond to data\.jsonl:\d+: the server http.* failed 2 times"):
        run(server, folder=str(tmp_path / "weights"), tolerance=None)
    assert not list((tmp_path / "weights").iterdir())


def test_adapters_that_reach_the_server_merged_pass_the_probe_and_their_base_alone_does_not(run, vllm_server, tmp_path):
    lora = LoraSpec(r=4, alpha=64.0, options={"init_lora_weights": True})
    rows = run(vllm_server(), folder=str(tmp_path / "weights"), dtype="float32", lora=lora, steps=4)
    assert [row["train/engine/gap"] for row in rows] == [0.0] * 4

    def base_alone(model):
        base = model.get_base_model().state_dict()
        return ((name.replace(".base_layer", ""), value) for name, value in base.items() if "lora_" not in name and "lm_head" not in name)

    with pytest.raises(ConfigError, match="the weights did not arrive, or only some of them"):
        run(vllm_server(), folder=str(tmp_path / "weights"), dtype="float32", lora=lora, steps=6, weights=base_alone)

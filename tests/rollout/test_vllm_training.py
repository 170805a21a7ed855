"""A policy that trains on the rollouts of a vLLM server: every step's responses come from that step's weights."""

from __future__ import annotations

from functools import partial

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import Logger

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
    def fit(server, *, steps=3, asynchronous=False, **options):
        engine = partial(VLLMServerEngine, url=server.url, backoff=0.01, retries=1, **options)
        module = GRPOModule(
            PolicySpec(str(tiny_model_dir)),
            engine=engine,
            rewards=[Letters()],
            correction=CORRECTION,
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
    assert not list((tmp_path / "weights").iterdir())


def test_windows_drawn_ahead_are_corrected_for_their_age(run, vllm_server, tmp_path):
    server = vllm_server()
    rows = run(server, folder=str(tmp_path / "weights"), dtype="float32", asynchronous=True)
    assert [path.rpartition("-step-")[2] for path, *_ in server.loaded] == ["0", "1", "2"]
    assert rows[0]["train/policy/engine_kl"] < 1e-6  # the first window waits for its own
    assert min(row["train/policy/engine_kl"] for row in rows[1:]) > 1e-4
    assert all(row["train/policy/ratio"] == 1.0 for row in rows)


def test_a_server_that_stays_behind_shows_in_the_metrics_and_is_refused(run, vllm_server, tmp_path):
    server = vllm_server()
    server.reload = lambda body: {"results": [None]}  # says yes and does nothing, as a loader that reads a cached file
    rows = run(server, folder=str(tmp_path / "weights"))
    kl = [row["train/policy/engine_kl"] for row in rows]
    assert kl[0] < 1e-6 < 1e-3 < kl[-1]
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
        run(server, folder=str(tmp_path / "weights"))
    assert not list((tmp_path / "weights").iterdir())

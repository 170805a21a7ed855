"""The same configuration on a Ray cluster: two workers, on one node or two, train what two processes of torchrun do, to the bit."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Union

import pytest
from lightning.pytorch import Callback, Trainer

from aapa_lightning.cli import main

ROOT = Path(__file__).parents[1]
CONFIGS = [f"--config={ROOT}/configs/debug/{name}.yaml" for name in ("base", "grpo")]
SHORT = ["--trainer.max_steps=4", "--trainer.devices=2", "--checkpoint.every_n_steps=1", "--trainer.enable_progress_bar=false"]
RAY = "comes with the extra `ray`: pip install 'aapa-lightning[ray]'"


class Killed(Callback):
    """Rank 1 is killed in the middle of training, as by the kernel for want of memory."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 2 and trainer.global_rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)


# Without Ray ------------------------------------------------------------------------------------------------------------------------------


def test_without_ray_the_extra_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(["ray", "--workers", "2", "fit", *CONFIGS]) == 2
    assert "pip install 'aapa-lightning[ray]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "expected one of fit, validate, test, predict and its options, found nothing"),
        (["score", "--out", "x"], "found score --out x"),
        (["--workers", "0", "fit"], "--workers: expected at least 1, found 0"),
        (["--cpus-per-worker", "-1", "--", "fit"], "--cpus-per-worker: expected at least 1, found -1"),
    ],
)
def test_mistakes_are_found_before_a_cluster_starts(words, message, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(["ray", *words]) == 2
    assert message in capsys.readouterr().err


def test_one_batch_is_not_all_of_them(monkeypatch, build_cli):
    # As where the first union of these types that `typing` cached had them the other way round; Ray's workers are such a place.
    monkeypatch.setitem(Trainer.__init__.__annotations__, "limit_val_batches", Union[float, int, None])  # noqa: UP007
    cli = build_cli("fit", *CONFIGS, "--trainer.limit_val_batches=1", "--trainer.val_check_interval=0.5")
    assert type(cli.config.fit.trainer.limit_val_batches) is int
    assert cli.config.fit.trainer.val_check_interval == 0.5


# On a cluster of two CPUs -----------------------------------------------------------------------------------------------------------------


def run(folder, *words):
    folder.mkdir(exist_ok=True)
    if not (folder / "runs").exists():
        (folder / "runs").mkdir()
        (folder / "runs" / "world").symlink_to(folder.parent / "world")
    # Through files: Ray's processes may keep a pipe open beyond the end of the command.
    with open(folder / "out.txt", "w+") as out, open(folder / "err.txt", "w+") as err:
        code = subprocess.run([sys.executable, "-m", *words], check=False, cwd=folder, stdout=out, stderr=err, timeout=400).returncode
    return code, (folder / "out.txt").read_text(), (folder / "err.txt").read_text()


def on_ray(folder, address, *words, cpus=1):
    cluster = [f"--address={address}", "--workers=2", f"--cpus-per-worker={cpus}"]
    return run(folder, "aapa_lightning.cli", "ray", *cluster, "--", "fit", *CONFIGS, *SHORT, *words)


def under_torchrun(folder, *words):
    launcher = ["torch.distributed.run", "--nproc_per_node=2", "--standalone", "-m", "aapa_lightning.cli"]
    code, _, err = run(folder, *launcher, "fit", *CONFIGS, *SHORT, *words)
    assert code == 0, err


def results(folder):
    """Metrics, weights and the configuration: files that must not differ by a byte."""
    return [(folder / "runs" / "debug" / "grpo" / name).read_bytes() for name in ("metrics.csv", "export/model.safetensors", "config.yaml")]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with the world's data, and the environment of every process below."""
    pytest.importorskip("ray", reason=f"Ray {RAY}")
    folder = tmp_path_factory.mktemp("ray")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests")]))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        assert main(["data", "synthetic", f"--out={folder / 'world'}", "--train=48", "--val=8", "--test=8"]) == 0
        yield folder


@pytest.mark.slow
def test_a_wrong_address_is_found_at_once(capsys):
    pytest.importorskip("ray", reason=f"Ray {RAY}")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # and nobody listens
        assert main(["ray", "--address", f"127.0.0.1:{free.getsockname()[1]}", "fit", *CONFIGS]) == 2
    assert "expected a running Ray cluster, found none (ConnectionRefusedError" in capsys.readouterr().err


@pytest.mark.slow
def test_a_strategy_that_starts_processes_is_refused(home):
    command = ["aapa_lightning.cli", "ray", "--workers=2", "fit", *CONFIGS, *SHORT, "--trainer.strategy=ddp_spawn"]
    code, out, err = run(home / "spawn", *command)  # on a cluster of its own, so before the one that the other tests share
    assert code == 2
    assert err.splitlines()[-1].startswith("aapa: error: trainer.strategy: expected one that runs in Ray's workers")
    assert "Traceback" not in out + err


@pytest.fixture(scope="module")
def address(home):
    """A cluster of two nodes of two CPUs each, both on this machine; it outlives the runs."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    cluster.add_node(num_cpus=2, node_ip_address="127.0.0.2")  # Ray tells nodes apart by their addresses
    yield cluster.address
    cluster.shutdown()


@pytest.mark.slow
def test_a_killed_worker_ends_the_run_and_resume_makes_it_whole(home, address):
    under_torchrun(home / "plain", "--trainer.strategy=ddp")
    code, _, err = on_ray(home / "ray", address, "--trainer.strategy=ddp", "--trainer.callbacks+=test_ray.Killed")
    assert code == 1
    assert "--resume continues from the last checkpoint" in err
    assert len((home / "ray/runs/debug/grpo/metrics.csv").read_text().splitlines()) == 3  # the header and two steps
    code, _, err = on_ray(home / "ray", address, "--trainer.strategy=ddp", "--resume")
    assert code == 0, err
    assert results(home / "ray") == results(home / "plain")

    code, out, err = on_ray(home / "ray", address, "--trainer.strategy=ddp")  # rank 0 alone looks at the folder
    assert code == 2
    assert err.count("runs/debug/grpo already holds a run") == 1
    assert "Traceback" not in out + err


@pytest.mark.slow
def test_shards_on_two_nodes_are_those_of_torchrun(home, address):
    under_torchrun(home / "shards", "--trainer.strategy=fsdp2")
    code, _, err = on_ray(home / "ray_shards", address, "--trainer.strategy=fsdp2", cpus=2)  # a worker fills a node
    assert code == 0, err
    assert results(home / "ray_shards") == results(home / "shards")
    assert (home / "ray_shards/runs/debug/grpo/checkpoints/last.ckpt").is_dir()

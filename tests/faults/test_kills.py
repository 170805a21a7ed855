"""SIGKILL at random moments, again and again: the run that is continued ends as one that nothing interrupted, and leaves nothing behind."""

from __future__ import annotations

import os
import random
import shutil
import time

import pytest
from faults.kit import Control, run_trial, serve, state_of

#: Kills for each scenario; the campaign of `make test-faults` makes this many.
KILLS = int(os.environ.get("AAPA_FAULT_KILLS", "18"))
BASE = ["fit", "--config", "configs/debug/base.yaml"]
COMMON = ["--trainer.enable_progress_bar=false", "--checkpoint.every_n_steps=1"]
ANCHOR = ["--config", "configs/debug/anchor.yaml"]


def policy(name: str, *extra: str, anchored: bool = False) -> list[str]:
    return [*BASE, "--config", f"configs/debug/{name}.yaml", *(ANCHOR if anchored else []), *extra, *COMMON]


def stateful(*more: str) -> list[str]:
    return ["--model.init_args.minibatches=2", "--model.init_args.updates_per_window=2", "--model.init_args.beta=0.05", *more]


SCENARIOS = {
    "sft": policy("sft"),
    "anchored sft": policy("sft", anchored=True),
    "grpo": policy("grpo"),
    "anchored grpo": policy("grpo", *stateful("--trainer.max_steps=8", "--trainer.val_check_interval=4"), anchored=True),
    "grpo drawing ahead": policy("grpo", "--config", "configs/asynchronous.yaml"),
    "chord": policy("chord", anchored=True),
    "uniapl": policy("uniapl", anchored=True),
    "dpo": policy("preference", anchored=True),
    "gapo": policy("preference", "--model.init_args.objective=gapo"),
    "kto": policy("preference", "--model.init_args.objective=kto"),
    "lora": policy("grpo", "--config", "configs/debug/lora.yaml"),
    "reward model": ["fit", "--config", "configs/debug/reward_model.yaml", *COMMON],
    "discriminator": ["fit", "--config", "configs/debug/discriminator.yaml", "--trainer.max_epochs=2", *COMMON],
}
#: A discriminator's last checkpoint may lie before or after its last validation; weights, optimiser, rows and export are the same.
COUNTERS = ("/checkpoint//loops", "/checkpoint//epoch", "/checkpoint//epochs/judgement_is_due")
IGNORED = {"discriminator": COUNTERS}


@pytest.fixture(scope="module")
def server(debug_runs):
    with serve(debug_runs) as running:
        yield running


def control_run(server, argv, run) -> Control:
    """What the run leaves without kills. It is removed, since checkpoints name their own paths."""
    started = time.monotonic()
    done = server.run(*argv, "--run_dir", str(run))
    seconds = time.monotonic() - started
    assert done["code"] == 0, server.tail()
    largest = max(path.stat().st_size for path in (run / "checkpoints").iterdir())
    control = Control(state_of(run), done["operations"], seconds, largest)
    shutil.rmtree(run)
    return control


def campaign(server, folder, scenario: str, kills: int) -> None:
    argv, random_, done = SCENARIOS[scenario], random.Random(scenario), 0
    control = control_run(server, argv, folder / "run")
    while done < kills:
        trial = run_trial(server, argv, folder / "run", control, random_, min(5, kills - done), IGNORED.get(scenario, ()))
        assert not trial.wrong, f"{scenario}, killed at {trial.kills}: {trial.wrong}"
        done += len(trial.kills)
        shutil.rmtree(folder / "run")


@pytest.mark.slow
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_killed_runs_end_as_if_nothing_had_been(server, tmp_path, scenario):
    campaign(server, tmp_path, scenario, KILLS)

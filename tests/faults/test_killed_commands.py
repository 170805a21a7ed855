"""Commands that write files, killed before each of their file operations: the same command then works, and leaves what it always does."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from faults.kit import serve

QUIET = "--trainer.enable_progress_bar=false"
DISCRIMINATOR = "--discriminator=runs/debug/discriminator/export"
RESPONSES = ["--prompts=runs/world/train.jsonl", "--responses=runs/debug/rollouts/responses.jsonl"]
#: Each command with its output at ``{out}``, and what continues it, if it cannot simply be given again.
COMMANDS = {
    "export": (["export", "runs/debug/sft", "--out={out}/model"], []),
    "bank": (["bank", "build", "--data=runs/world/train.jsonl", DISCRIMINATOR, "--out={out}/bank", "--batch-size=16"], ["--resume"]),
    "score": (["score", *RESPONSES, DISCRIMINATOR, "--out={out}/scores.jsonl", "--batch-size=32"], ["--resume"]),
    "score to Parquet": (["score", *RESPONSES, DISCRIMINATOR, "--out={out}/scores.parquet", "--batch-size=32"], ["--resume"]),
    "pairs": (["data", "pairs", *RESPONSES, "--chosen=experts", "--keep-truncated", "--out={out}/pairs.jsonl"], []),
    "synthetic": (["data", "synthetic", "--train=8", "--val=4", "--test=4", "--out={out}/world"], []),
    "tokenizer": (["data", "tokenizer", "runs/world/train.jsonl", "--vocab-size=300", "--out={out}/tokenizer"], []),
    "predict": (
        ["predict", "--config=configs/debug/base.yaml", "--config=configs/debug/rollouts.yaml", "--run_dir={out}/predict", QUIET],
        [],
    ),
}


@pytest.fixture(scope="module")
def server(debug_runs):
    with serve(debug_runs) as running:
        yield running


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_killed_anywhere_works_when_given_again(server, tmp_path, name):
    words, continued = COMMANDS[name]
    out = tmp_path / "out"
    command = [word.format(out=out) for word in words]
    whole = server.run(*command)
    assert whole["code"] == 0, server.tail()
    wanted = contents(out)
    for operation in range(1, whole["operations"] + 1):
        shutil.rmtree(out)
        if server.run(*command, operation=operation)["code"]:
            assert server.run(*command, *continued)["code"] == 0, f"killed before operation {operation}: {server.tail()}"
        assert contents(out) == wanted, f"killed before operation {operation}"

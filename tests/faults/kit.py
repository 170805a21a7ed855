"""Trials: a run that is killed again and again, continued by the documented rule, and compared with one that nothing interrupted."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch

from aapa_lightning.checkpoint_io import AtomicCheckpointIO

ROOT = Path(__file__).parents[2]
SERVER = Path(__file__).with_name("server.py")


class Server:
    """A process that runs ``aapa`` commands in killable children; ``log`` holds what they printed."""

    def __init__(self, cwd: Path) -> None:
        self.cwd, self.log = cwd, cwd / "fault-output.txt"
        own = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
        self._process = subprocess.Popen(
            [sys.executable, str(SERVER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ | own, text=True
        )

    def run(self, *argv: str, **kill: float) -> dict[str, int]:
        """Run ``aapa`` with these arguments; its ``code`` and ``operations``. See ``server.py`` for the ways to kill it."""
        job = {"argv": list(argv), "cwd": str(self.cwd), "output": str(self.log), **kill}
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def tail(self, lines: int = 15) -> str:
        """The last lines that the commands printed."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def close(self) -> None:
        """End the process."""
        self._process.stdin.close()
        self._process.wait()


@contextmanager
def serve(cwd: Path) -> Iterator[Server]:
    """A server for the time of a ``with`` block."""
    server = Server(cwd)
    try:
        yield server
    finally:
        server.close()


@dataclass
class Control:
    """What an uninterrupted run leaves, and how many file operations and seconds it took."""

    state: dict[str, Any]
    operations: int
    seconds: float
    largest: int


@dataclass
class Trial:
    """How a killed run ended: what differs from the control, and how often it was killed."""

    kills: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


def state_of(run: Path) -> dict[str, Any]:
    """Everything that a run leaves that must not depend on kills: checkpoint, figures, samples, export, names of files."""
    files = sorted(path for path in run.rglob("*") if path.is_file() and "tensorboard" not in path.parts)
    return {
        "checkpoint": flatten(AtomicCheckpointIO().load_checkpoint(run / "checkpoints" / "last.ckpt")),
        "metrics": (run / "metrics.csv").read_text(),
        "samples": {path.name: pq.read_table(path).to_pylist() for path in sorted(run.rglob("samples.parquet/*.parquet"))},
        "export": {str(path.relative_to(run)): path.read_bytes() for path in files if "export" in path.relative_to(run).parts},
        "files": dict.fromkeys((str(path.relative_to(run)) for path in files), True),
    }


def flatten(value: Any, name: str = "") -> dict[str, Any]:
    """Nested dictionaries and lists as one dictionary from paths to leaves."""
    if isinstance(value, dict):
        return {key: leaf for part, inner in value.items() for key, leaf in flatten(inner, f"{name}/{part}").items()}
    if isinstance(value, list | tuple):
        return {key: leaf for i, inner in enumerate(value) for key, leaf in flatten(inner, f"{name}/{i}").items()}
    return {name: value}


def differences(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """Names of the leaves that differ, bit for bit."""
    found, wanted = flatten(found), flatten(wanted)
    return [name for name in sorted(found.keys() | wanted.keys()) if not _same(found.get(name), wanted.get(name))]


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and a.numpy(force=True).tobytes() == b.numpy(force=True).tobytes()
    return type(a) is type(b) and (a == b or (a != a and b != b))


def draw_kill(control: Control, random_: random.Random) -> dict[str, float]:
    """Where to kill a run: before a file operation, inside a long write, or at any time."""
    kind = random_.choice(["operation", "operation", "size", "seconds"])
    if kind == "operation":
        return {kind: random_.randint(1, control.operations)}
    if kind == "size":
        return {kind: random_.randint(1, control.largest - 1)}
    return {kind: random_.uniform(0, control.seconds)}


def run_trial(
    server: Server, argv: list[str], run: Path, control: Control, random_: random.Random, kills: int, ignored: tuple[str, ...] = ()
) -> Trial:
    """Kill a run up to ``kills`` times, let it end, and compare what it left with the control, but for names that begin as ``ignored``."""
    trial = Trial()
    for attempt in range(kills + 1):
        resume = ["--resume"] if (run / "config.yaml").exists() else []
        kill = draw_kill(control, random_) if attempt < kills else {}
        done = server.run(*argv, "--run_dir", str(run), *resume, **kill)
        if done["code"] == 0:
            break
        if done["code"] > 0:
            trial.wrong.append(f"exit {done['code']} after {trial.kills}: {server.tail()}")
            return trial
        trial.kills.append(str(kill))
    trial.wrong += [name for name in differences(state_of(run), control.state) if not name.startswith(ignored)]
    return trial

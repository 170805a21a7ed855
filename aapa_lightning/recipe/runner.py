"""Runs the stages of a planned recipe: each in a subprocess, finished ones skipped, interrupted ones continued."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, TextIO

import yaml

from aapa_lightning.console import say
from aapa_lightning.documents import check_kinds, read_json
from aapa_lightning.errors import ConfigError
from aapa_lightning.files import sweep, write_json, write_text
from aapa_lightning.locks import hold
from aapa_lightning.recipe.plan import Recipe
from aapa_lightning.recipe.references import Stage

TAIL_LINES = 20
_STATE_KINDS = {"status": str, "fingerprint": str, "seconds": float}


class Progress:
    """What has run, kept in ``recipe_state.json``: status, fingerprint and wall seconds of each stage."""

    def __init__(self, run_dir: str) -> None:
        self.path = Path(run_dir) / "recipe_state.json"
        self.stages: dict[str, dict[str, Any]] = _read_state(self.path) if self.path.exists() else {}

    def get(self, stage: Stage) -> dict[str, Any]:
        """The stage's entry, empty if it never started."""
        return self.stages.get(stage.name, {})

    def set(self, stage: Stage, status: str, seconds: float) -> None:
        """Record a stage's status and the seconds it has taken so far."""
        self.stages[stage.name] = {"status": status, "fingerprint": stage.fingerprint, "seconds": round(seconds, 3)}
        write_json(self.path, self.stages)

    def forget(self, stage: Stage) -> None:
        """Drop a stage's entry."""
        if self.stages.pop(stage.name, None) is not None:
            write_json(self.path, self.stages)


def _read_state(path: Path) -> dict[str, dict[str, Any]]:
    """The stages of a state file. Raises ConfigError for a file that this program has not written so."""
    try:
        stages = read_json(path)
        for name, entry in stages.items():
            if not isinstance(entry, dict) or not entry.keys() >= _STATE_KINDS.keys():
                raise ConfigError(f"{path} is damaged: expected {', '.join(_STATE_KINDS)} of the stage {name!r}")
            check_kinds(entry, f"{path}: stage {name}", _STATE_KINDS)
    except ConfigError as error:
        raise ConfigError(
            f"{error}. It says which stages are done: put a sound copy back, or remove it, and the folders of stages that are to run again"
        ) from error
    return stages


def select(recipe: Recipe, start: str | None, only: str | None) -> list[Stage]:
    """The stages to consider.

    Raises:
        ConfigError: no stage has that name.
    """
    names = [stage.name for stage in recipe.stages]
    for name in (start, only):
        if name is not None and name not in names:
            raise ConfigError(f"{recipe.path}: no stage {name!r}; expected one of {', '.join(names)}")
    if only is not None:
        return [recipe.stages[names.index(only)]]
    return recipe.stages[names.index(start) if start else 0 :]


def run_recipe(recipe: Recipe, *, start: str | None = None, only: str | None = None, force: bool = False) -> int:
    """Run what has not run yet.

    Args:
        recipe: the plan.
        start: discard this stage and all later ones, and run them again.
        only: run this stage alone.
        force: discard the selected stages first, also finished ones.

    Returns:
        0, or the exit code of the stage that failed.

    Raises:
        ConfigError: a stage that has run is not the recipe's any more, or another process runs a recipe in the folder.
    """
    folder, stages = Path(recipe.run_dir), select(recipe, start, only)
    mend = "wait for it, end it, or choose another folder with --set run_dir=..."
    with hold(folder / ".recipe.lock", ["aapa", "recipe", recipe.path], mend):
        for written in (folder, folder / "configs"):
            sweep(written)
        return _run_stages(recipe, stages, discard=start is not None or force)


def _run_stages(recipe: Recipe, stages: list[Stage], *, discard: bool) -> int:
    progress = Progress(recipe.run_dir)
    for stage in stages:
        _check_launcher(stage)
    if discard:
        for stage in stages:
            _discard(stage, recipe, progress)
    for stage in stages:
        entry = progress.get(stage)
        _check_unchanged(stage, entry)
        if entry.get("status") == "done":
            say(f"== {stage.name}: done before, {entry['seconds']:.0f} s")
            continue
        code = _run_stage(stage, recipe, progress)
        if code != 0:
            return code
    return 0


def command_line(stage: Stage, resume: bool = False) -> list[str]:
    """The words that start a stage."""
    launcher = list(stage.launcher) or [sys.executable]
    if launcher[0] == "torchrun":  # the one of this interpreter, also when its folder is not on the path
        launcher = [sys.executable, "-m", "torch.distributed.run", *launcher[1:]]
    return [*launcher, "-m", "aapa_lightning.cli", *stage.command, *stage.arguments, *(["--resume"] if resume else [])]


def _check_launcher(stage: Stage) -> None:
    """Raise ConfigError for a launcher that is no program here, before anything has run."""
    words = command_line(stage)
    if shutil.which(words[0], path=stage.env.get("PATH")) is None:
        raise ConfigError(f"stage {stage.name}: launcher: expected a program on the PATH, such as torchrun, found {words[0]!r}")


def _checkpoint(stage: Stage) -> bool:
    # a link that leads nowhere, too: the command refuses it, where starting anew would remove the run
    return stage.command[0] == "fit" and os.path.lexists(Path(stage.run_dir) / "checkpoints" / "last.ckpt")


def _check_unchanged(stage: Stage, entry: dict[str, Any]) -> None:
    started = entry.get("status") == "done" or (bool(entry) and _checkpoint(stage))
    if started and entry["fingerprint"] != stage.fingerprint:
        raise ConfigError(
            f"stage {stage.name} has changed since it ran, or one that it uses has; run again from it with --from {stage.name}, "
            "which removes its folder and those of later stages, or choose another folder with --set run_dir=..."
        )


def _discard(stage: Stage, recipe: Recipe, progress: Progress) -> None:
    """Remove a stage's folder, if this recipe made it, and forget the stage."""
    folder, home = Path(os.path.abspath(stage.run_dir)), Path(os.path.abspath(recipe.run_dir))
    if progress.get(stage) and folder != home and folder.is_relative_to(home) and folder.is_dir():
        # a stage may live on after the recipe that started it was killed
        with hold(folder / f".{stage.command[0]}.lock", ["aapa", "recipe", recipe.path], "wait for it, or end it"):
            shutil.rmtree(folder)
    progress.forget(stage)


def _run_stage(stage: Stage, recipe: Recipe, progress: Progress) -> int:
    resume = bool(progress.get(stage)) and _checkpoint(stage)
    before = float(progress.get(stage).get("seconds", 0.0)) if resume else 0.0
    if not resume:
        _discard(stage, recipe, progress)
    if stage.settings:
        write_text(stage.settings_file, yaml.safe_dump(stage.settings, sort_keys=False))
    words = command_line(stage, resume)
    say(f"== {stage.name}: {shlex.join(words)}")
    progress.set(stage, "running", before)
    log = Path(recipe.run_dir) / "logs" / f"{stage.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    try:
        with open(log, "a" if resume else "w", encoding="utf-8") as file:
            code = _run_and_copy(words, {**os.environ, "PYTHONUNBUFFERED": "1", **stage.env}, file)
    except BaseException:  # an interrupt: what was done so far counts
        progress.set(stage, "running", before + time.monotonic() - began)
        raise
    seconds = before + time.monotonic() - began
    progress.set(stage, "done" if code == 0 else "failed", seconds)
    if code != 0:
        tail = "\n".join(f"  {line}" for line in log.read_text(encoding="utf-8").splitlines()[-TAIL_LINES:])
        say(f"aapa: error: stage {stage.name} ended with exit code {code}; the end of {log}:\n{tail}", error=True)
    return code


def _run_and_copy(words: list[str], env: dict[str, str], log: TextIO) -> int:
    """Run a command, copy its output to the terminal and, without the frames of progress bars, to the log."""
    live = sys.stdout.isatty()
    # the stage hears of a SIGTERM too, and this process ends after it
    before = signal.signal(signal.SIGTERM, _terminated) if threading.current_thread() is threading.main_thread() else None
    try:
        process = subprocess.Popen(words, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # noqa: S603  # words, no shell
    except (OSError, ValueError) as error:  # not for this machine, or a word with a null byte
        raise ConfigError(f"launcher: cannot start {words[0]!r}: {getattr(error, 'strerror', None) or error}") from error
    if process.stdout is None:
        raise RuntimeError("the stage has no output pipe")
    try:
        pending = b""
        while chunk := os.read(process.stdout.fileno(), 65536):
            if live:
                os.write(sys.stdout.fileno(), chunk)
            *lines, pending = (pending + chunk).split(b"\n")
            _write_lines(lines, log, live)
        _write_lines([pending] if pending else [], log, live)
        code = process.wait()
    except SystemExit:
        process.terminate()
        process.wait()
        raise
    except BaseException:
        _end(process)
        raise
    finally:
        process.stdout.close()
        if before is not None:
            signal.signal(signal.SIGTERM, before)
    return code if code >= 0 else 128 - code


def _terminated(*_: Any) -> None:
    raise SystemExit(143)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Wait for a process that an interrupt has reached too, then insist."""
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        process.terminate()
        process.wait()


def _write_lines(lines: list[bytes], log: TextIO, live: bool) -> None:
    for line in lines:
        text = line.rstrip(b"\r").rsplit(b"\r", 1)[-1].decode(errors="replace")
        log.write(text + "\n")
        if not live:
            sys.stdout.write(text + "\n")
            sys.stdout.flush()
    log.flush()

"""A lock that dies with its process, and what a second process is told."""

from __future__ import annotations

import errno
import json
import os
import platform
import subprocess
import sys
import time

import pytest

from aapa_lightning import files
from aapa_lightning.errors import ConfigError
from aapa_lightning.locks import hold

HOLD = """
import os, sys, time
from pathlib import Path
from aapa_lightning.locks import hold
with hold(Path("run/.fit.lock"), ["aapa", "fit", "--run_dir", "a run"], "wait"):
    if "child" in sys.argv:
        child = os.fork()
        if not child:
            time.sleep(60)
            os._exit(0)
        print(child, flush=True)
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """``holder(*words)``: a process that holds the lock, and what it printed before."""
    running = []

    def start(*words):
        process = subprocess.Popen([sys.executable, "-c", HOLD, *words], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
        running.append(process)
        said = []
        while (line := process.stdout.readline().strip()) != "held":
            said.append(line)
        return process, said

    yield start
    for process in running:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run" / ".fit.lock"


def take(path):
    with hold(path, ["aapa", "fit"], "choose another folder"):
        pass


def test_a_second_process_is_told_who_holds_it(path, holder):
    process, _ = holder()
    with pytest.raises(ConfigError) as caught:
        take(path)
    message = str(caught.value)
    for word in (str(process.pid), platform.node(), time.strftime("%Y-"), "aapa fit --run_dir 'a run'", "choose another folder"):
        assert word in message
    assert len(message.splitlines()) == 1


def test_a_kill_releases_it(path, holder):
    process, _ = holder()
    process.kill()
    process.wait()
    assert path.exists()
    take(path)
    assert not path.exists()


def test_a_child_that_outlives_its_parent_does_not_keep_it(path, holder):
    process, said = holder("child")
    process.kill()
    process.wait()
    try:
        take(path)
    finally:
        os.kill(int(said[0]), 9)


def test_it_leaves_nothing_behind_not_even_the_folder_that_it_made(tmp_path):
    take(tmp_path / "runs" / "a" / ".fit.lock")
    assert not (tmp_path / "runs").exists()
    (tmp_path / "runs").mkdir()
    take(tmp_path / "runs" / "a" / ".fit.lock")
    assert (tmp_path / "runs").exists()


def test_a_holder_of_the_same_process_refuses_too(path):
    with hold(path, ["aapa"], "wait"), pytest.raises(ConfigError, match=f"process {os.getpid()} "):
        take(path)


def test_control_characters_of_a_holder_do_not_reach_the_terminal(path):
    with hold(path, ["aapa", "\x1b[2J\nfit"], "wait"), pytest.raises(ConfigError) as caught:
        take(path)
    assert "\x1b" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.fixture
def no_locks(monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", refuse)


def sign(path, **who):
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"pid": os.getpid(), "host": platform.node(), "since": "then", "command": "aapa fit"} | who))


@pytest.mark.usefixtures("no_locks")
@pytest.mark.parametrize(
    ("who", "free"),
    [({}, False), ({"host": "elsewhere"}, False), ({"pid": 2**22 + 1}, True), ({"started": "1"}, True)],
    ids=["alive", "of another machine", "dead", "a number that came again"],
)
def test_without_locks_the_holder_s_process_decides(path, who, free):
    sign(path, **who)
    if free:
        take(path)
        assert not path.exists()
    else:
        with pytest.raises(ConfigError, match="in use by process"):
            take(path)
        assert path.exists()


@pytest.mark.usefixtures("no_locks")
def test_without_locks_two_of_one_machine_still_exclude_each_other(path):
    with hold(path, ["aapa"], "wait"), pytest.raises(ConfigError, match="in use"):
        take(path)
    take(path)

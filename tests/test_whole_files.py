"""Files and folders that are whole or not there, whoever is killed, and what the system refuses."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from aapa_lightning import files, system
from aapa_lightning.errors import ConfigError, causes, users_cause
from aapa_lightning.files import atomic_write, replace_folder, sweep, whole_folder, write_text

WRITE = {
    "file": "with files.atomic_write('it') as f:\n    f.write(b'half'); f.flush(); print('there', flush=True); time.sleep(60)",
    "folder": "with files.whole_folder('it') as f:\n    (f / 'new').write_text('half'); print('there', flush=True); time.sleep(60)",
}


def listing(folder):
    return sorted(path.name for path in Path(folder).iterdir())


@pytest.fixture
def writer(tmp_path):
    """``writer(kind)``: a process in the middle of writing ``it``."""
    running = []

    def start(kind):
        code = f"import time\nfrom aapa_lightning import files\n{WRITE[kind]}"
        process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE)
        running.append(process)
        assert process.stdout.readline() == b"there\n"
        return process

    yield start
    for process in running:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.mark.parametrize("kind", WRITE)
def test_what_a_killed_process_left_is_swept_and_a_living_one_is_let_be(tmp_path, writer, kind):
    process = writer(kind)
    sweep(tmp_path)
    (left,) = listing(tmp_path)
    assert left.startswith(".it.")
    process.send_signal(signal.SIGKILL)
    process.wait()
    sweep(tmp_path, "other")
    assert listing(tmp_path) == [left]
    sweep(tmp_path)
    assert listing(tmp_path) == []


def test_the_next_write_of_a_file_sweeps_what_an_earlier_one_left(tmp_path, writer):
    process = writer("file")
    process.kill()
    process.wait()
    write_text(tmp_path / "it", "whole")
    assert listing(tmp_path) == ["it"]


def test_only_temporary_files_are_swept(tmp_path):
    names = [".hidden", "a.tmp", ".a.b.tmp", ".a.ABCDEFGH.tmp", ".last.ckpt.0123abcd"]
    for name in names:
        (tmp_path / name).write_text("")
    sweep(tmp_path)
    assert listing(tmp_path) == sorted(names)


@pytest.mark.parametrize(("age", "kept"), [(3600, True), (100_000, False)])
def test_without_locks_age_decides(tmp_path, monkeypatch, age, kept):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", no_locks)
    old = tmp_path / ".it.abcdefgh.tmp"
    old.write_text("")
    os.utime(old, (time.time() - age,) * 2)
    write_text(tmp_path / "it", "whole")  # writing works without locks, too
    assert listing(tmp_path) == ([old.name] if kept else []) + ["it"]


def test_a_name_as_long_as_the_system_allows_can_be_written(tmp_path):
    name = "ä" * 127
    write_text(tmp_path / name, "text")
    assert listing(tmp_path) == [name]


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_folder_is_replaced_whole_and_what_else_lies_there_stays(tmp_path, monkeypatch, exchanges):
    if not exchanges:
        monkeypatch.setattr(files, "_exchange", lambda *_: False)
    target = tmp_path / "model"
    (target / "notes").mkdir(parents=True)
    for name in ("config.json", "model-1.safetensors", "README.md", "notes/mine"):
        (target / name).write_text("old")
    target.chmod(0o750)
    with whole_folder(target, stale=["*.safetensors"]) as folder:
        (folder / "config.json").write_text("new")
        (folder / "model-2.safetensors").write_text("new")
        assert (target / "config.json").read_text() == "old"
    assert listing(target) == ["README.md", "config.json", "model-2.safetensors", "notes"]
    assert [(target / name).read_text() for name in ("config.json", "README.md", "notes/mine")] == ["new", "old", "old"]
    assert listing(tmp_path) == ["model"]
    assert target.stat().st_mode & 0o777 == 0o750


def test_a_folder_that_fails_halfway_leaves_the_old_one_and_no_litter(tmp_path):
    def fail():
        with whole_folder(tmp_path / "it") as folder:
            (folder / "a").write_text("new")
            raise RuntimeError("halfway")

    (tmp_path / "it").mkdir()
    (tmp_path / "it" / "a").write_text("old")
    with pytest.raises(RuntimeError, match="halfway"):
        fail()
    assert listing(tmp_path) == ["it"]
    assert (tmp_path / "it" / "a").read_text() == "old"


def test_a_folder_behind_a_link_is_replaced_and_the_link_stays(tmp_path):
    (tmp_path / "disk" / "real").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "real")
    with whole_folder(tmp_path / "link") as folder:
        (folder / "a").write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "disk" / "real" / "a").read_text() == "new"


def test_a_new_folder_gets_ordinary_permissions(tmp_path):
    (tmp_path / "plain").mkdir()
    with whole_folder(tmp_path / "it"):
        pass
    assert (tmp_path / "it").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_kill_between_the_two_renames_of_a_file_system_without_exchange_loses_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_exchange", lambda *_: False)
    for name in ("it", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a").write_text(name)

    def killed(source, target):
        if Path(source).name == "new":
            raise KeyboardInterrupt
        os.rename(source, target)

    monkeypatch.setattr(files.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        replace_folder(tmp_path / "new", tmp_path / "it")
    monkeypatch.undo()
    with whole_folder(tmp_path / "it") as folder:
        assert (tmp_path / "it" / "a").read_text() == "it"
        (folder / "b").write_text("")
    assert listing(tmp_path / "it") == ["a", "b"]


@pytest.fixture
def places(tmp_path):
    """Places that cannot be written, and words that say why."""
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    return {
        "below a file": (tmp_path / "file" / "x" / "y", "expected a folder"),
        "too long": (tmp_path / ("n" * 300) / "y", "too long"),
        "dangling": (tmp_path / "dangling" / "y", "leads nowhere"),
        "device": (Path("/dev/null/y"), "expected a folder"),
        "proc": (Path("/proc/nothing/y"), "cannot be made"),
        "null": (Path(f"{tmp_path}/a\0b/y"), "null character"),
    }


@pytest.mark.parametrize("write", [lambda path: write_text(path, ""), lambda path: whole_folder(path).__enter__()], ids=["file", "folder"])
@pytest.mark.parametrize("case", ["below a file", "too long", "dangling", "device", "proc", "null"])
def test_a_place_that_cannot_be_written_is_named_in_one_line(places, write, case):
    path, why = places[case]
    with pytest.raises(ConfigError, match=why) as caught:
        write(path)
    assert len(str(caught.value).splitlines()) == 1
    assert "cannot write" in str(caught.value)


def test_a_folder_is_no_place_for_a_file_nor_a_file_for_a_folder(tmp_path):
    (tmp_path / "folder" / "a").mkdir(parents=True)
    with pytest.raises(ConfigError, match="a folder lies there"):
        write_text(tmp_path / "folder", "")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="a file lies there"), whole_folder(tmp_path / "file"):
        pass


@pytest.mark.parametrize("what", ["write", "fsync"])
def test_a_full_disk_is_named_whatever_torch_makes_of_it(tmp_path, monkeypatch, what):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    if what == "fsync":
        monkeypatch.setattr(files.os, "fsync", full)
        size = 10
    else:  # a process may not write more than this to a file
        monkeypatch.setitem(system._OUTSIDE, errno.EFBIG, "no space is left on the disk")
        size = 100_000
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def save():
        with atomic_write(tmp_path / "last.ckpt") as file:
            torch.save({"w": torch.zeros(size)}, file)

    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(ConfigError, match=r"last\.ckpt: no space is left on the disk"):
            save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert listing(tmp_path) == []


def test_a_full_disk_is_named_where_a_library_in_rust_reports_it(tmp_path):
    def save():
        with whole_folder(tmp_path / "export"):
            raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")

    with pytest.raises(ConfigError, match="export: no space is left"):
        save()


def test_an_error_that_names_another_file_passes(tmp_path):
    def save():
        with whole_folder(tmp_path / "export"):
            raise PermissionError(errno.EACCES, "Permission denied", "/elsewhere/tokenizer.json")

    with pytest.raises(PermissionError):
        save()


def test_errors_that_name_each_other_as_their_cause_end():
    first, second = RuntimeError("first"), RuntimeError("second")
    first.__cause__, second.__context__ = second, first
    assert list(causes(first, context=True)) == [first, second]
    assert system.refusal(first) is None
    assert users_cause(first) is first

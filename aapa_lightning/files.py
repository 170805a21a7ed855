"""Files and folders that are either whole or not there.

Both are written under a temporary name beside their own, ``.NAME.XXXXXXXX.tmp``, which their process keeps locked. So what a killed process
left can be told from what a living one writes, and ``sweep`` removes the first alone.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import io
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, BinaryIO

from aapa_lightning.system import check_folder, make_folder, refused_message, writing

#: Endings of files, which no name on the Hub is read as.
_ENDINGS = {".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt", ".parquet", ".arrow", ".gz", ".zip", ".zst", ".bz2", ".xz", ".pkl"} | {
    ".yaml", ".yml", ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".md", ".py"
}  # fmt: skip
_TEMPORARY = re.compile(r"\.(.+)\.[a-z0-9_]{8}\.tmp")
#: Bytes of a target's name that its temporary name repeats; a name may have 255 in all.
_KEPT = 200
#: Seconds after which a temporary file counts as left behind where the file system has no locks.
_ABANDONED = 24 * 3600.0
#: How a file system says that it has no locks, or none on folders.
NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL, errno.EBADF)
_EXCHANGE, _HERE = 2, -100  # RENAME_EXCHANGE and AT_FDCWD of renameat2(2)


def refuse_missing(
    name: str, expected: str = "expected a folder that is here, or a Hub name", error: type[Exception] = FileNotFoundError
) -> None:
    """Raise ``error`` for what does not exist and is spelled like a path, so that it is never looked up on the Hub.

    A path begins with ``.``, ``/`` or ``~``, ends with ``/``, has more than one slash, has the ending of a file, or names something in a
    folder that is here.

    Args:
        name: a path or a Hub name.
        expected: what was expected, for the message.
        error: what to raise.
    """
    path = Path(name)
    if path.exists():
        return
    inside = "/" in name and path.parent.is_dir()
    if inside or name.startswith((".", "/", "~")) or name.endswith("/") or name.count("/") > 1 or path.suffix.lower() in _ENDINGS:
        raise error(f"{name} does not exist; {expected}")


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Write beside ``path``, flush to disk, then replace it in one step.

    An exception leaves an existing file as it was and no temporary file behind. What an earlier, killed write of it left is removed.

    Args:
        path: the file to write; missing parent folders are made.

    Yields:
        A binary file object.

    Raises:
        ConfigError: the system refuses to write it: full disk, no permission, a folder that is a file.
    """
    target = Path(path)
    with writing(target):
        make_folder(target.parent)
        sweep(target.parent, target.name)
        raw, name = _temporary_file(target)
    try:
        try:
            with io.BufferedWriter(raw) as file:
                yield file
                with writing(target):
                    file.flush()
                    os.fsync(file.fileno())
                    os.chmod(name, 0o666 & ~_umask())  # mkstemp makes it private
                    os.replace(name, target)
        except Exception as error:
            if raw.refused is not None:  # torch reports a full disk as a position that it did not expect
                raise refused_message(target, raw.refused) from error
            raise
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


class _Recorder(io.FileIO):
    """A file that remembers why the system refused to write it."""

    refused: OSError | None = None

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.refused = error
            raise


def _temporary_file(target: Path) -> tuple[_Recorder, str]:
    while True:
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=_prefix(target), suffix=".tmp")
        raw = _Recorder(handle, "wb")
        lock(handle)
        if os.fstat(handle).st_nlink:  # not swept before it was locked
            return raw, name
        raw.close()


@contextmanager
def whole_folder(path: str | os.PathLike[str], stale: Sequence[str] = ()) -> Iterator[Path]:
    """Write a folder beside ``path``, flush its files to disk, then put it there in one step.

    Where a folder was, its files that the new one lacks stay. An exception or a kill leaves it as it was.

    Args:
        path: the folder to write; missing parent folders are made.
        stale: patterns of names that do not stay, such as weights that the new ones replace under other names.

    Yields:
        The folder to write into.

    Raises:
        ConfigError: the system refuses to write it, or a file is in the way.
    """
    target = Path(os.path.realpath(path)) if os.path.islink(path) else Path(path)
    with writing(target):
        make_folder(target.parent)
        _restore(target)
        sweep(target.parent, target.name)
        check_folder(target)
        folder, handle = _temporary_folder(target)
    try:
        with writing(target, folder):
            yield folder
            if target.is_dir():
                _keep_others(target, folder, stale)
            for file in folder.rglob("*"):
                _flush(file)
            os.chmod(folder, target.stat().st_mode if target.is_dir() else 0o777 & ~_umask())
            replace_folder(folder, target)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    finally:
        os.close(handle)


def _temporary_folder(target: Path) -> tuple[Path, int]:
    while True:
        folder = Path(tempfile.mkdtemp(dir=target.parent, prefix=_prefix(target), suffix=".tmp"))
        with suppress(FileNotFoundError):
            handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            lock(handle)
            if os.fstat(handle).st_nlink:
                return folder, handle
            os.close(handle)


def _keep_others(old: Path, new: Path, stale: Sequence[str]) -> None:
    """Link what the old folder has and the new one lacks into the new one."""
    for entry in old.iterdir():
        if os.path.lexists(new / entry.name) or any(fnmatch(entry.name, pattern) for pattern in stale):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, new / entry.name, symlinks=True, copy_function=_link)
        else:
            _link(str(entry), str(new / entry.name))


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target, follow_symlinks=False)


def _flush(file: Path) -> None:
    if file.is_file() and not file.is_symlink():
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())


def replace_folder(new: Path, target: Path) -> None:
    """Put a finished folder in the place of another, which is removed; at every moment one of them is there.

    File systems that cannot exchange two folders leave a moment without; the old one then lies in ``.NAME.old`` and is put back by the next
    write, if this one is killed.
    """
    if not os.path.lexists(target) or (target.is_dir() and not any(target.iterdir())):
        os.replace(new, target)
        return
    if _exchange(new, target):
        shutil.rmtree(new, ignore_errors=True)
        return
    old = _set_aside(target)
    os.replace(target, old)
    os.replace(new, target)
    shutil.rmtree(old, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    return rename is not None and rename(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0


def _set_aside(target: Path) -> Path:
    return target.with_name(f"{_prefix(target)}old")


def _restore(target: Path) -> None:
    old = _set_aside(target)
    if old.is_dir() and not os.path.lexists(target):
        os.replace(old, target)
    shutil.rmtree(old, ignore_errors=True)


def sweep(folder: Path, name: str | None = None) -> None:
    """Remove the temporary files and folders in ``folder`` that no living process writes; where there are no locks, those of a day ago.

    Args:
        folder: not searched below.
        name: only what became of writing this file or folder.
    """
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            match = _TEMPORARY.fullmatch(entry.name)
            if match and (name is None or entry.name.startswith(_prefix(Path(name)))):
                _remove_if_left(Path(entry.path), is_folder=entry.is_dir(follow_symlinks=False))


def _remove_if_left(path: Path, *, is_folder: bool) -> None:
    with suppress(OSError):  # of another user, or gone by now
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY if is_folder else os.O_RDWR | os.O_NOFOLLOW)
        try:
            held = lock(handle, wait=False)
            if held or (held is None and time.time() - os.fstat(handle).st_mtime > _ABANDONED):
                shutil.rmtree(path, ignore_errors=True) if is_folder else path.unlink()
        finally:
            os.close(handle)


def lock(handle: int, *, wait: bool = True) -> bool | None:
    """Lock an open file or folder until it is closed or its process dies; None where the file system has no locks.

    Args:
        handle: file descriptor.
        wait: for whoever holds it; False is the answer else.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return None
    return True


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic_write(path) as file:
        file.write(text.encode())


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write indented JSON atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def _prefix(target: Path) -> str:
    return f".{os.fsencode(target.name)[:_KEPT].decode(errors='ignore')}."


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask

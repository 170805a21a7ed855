"""A lock file that one process holds and that the system releases when the process dies."""

from __future__ import annotations

import json
import os
import platform
import shlex
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from aapa_lightning.errors import ConfigError
from aapa_lightning.files import lock
from aapa_lightning.system import make_folder, shown, writing

#: Descriptors of held locks: a forked child, such as a data loader's worker, must not keep them from being released.
_held: set[int] = set()
#: Seconds for which a holder is given time to say who it is.
_PATIENCE = 1.0
#: Seconds after which a lock file without a word in it counts as left behind, where the file system has no locks.
_SILENT = 60.0


@contextmanager
def hold(path: Path, command: Sequence[str], mend: str) -> Iterator[None]:
    """Hold the lock file ``path`` until the end of the block, or of this process.

    The file says who holds it and is removed at the end, with folders that were made for it and are empty. Where the file system has no
    locks, a file whose process has died on this machine counts as released.

    Args:
        path: the lock file; missing parent folders are made.
        command: words of the command that holds it, for others to read.
        mend: what a second process shall do.

    Raises:
        ConfigError: another process holds it, or it cannot be written.
    """
    with writing(path.parent):
        made = _missing(path.parent)
        make_folder(path.parent)
        handle, owner = _acquire(path), os.getpid()
    if handle is None:
        _refuse(path, mend)
    _held.add(handle)
    try:
        with writing(path):
            _sign(handle, command)
        yield
    finally:
        if os.getpid() == owner:
            _release(path, handle, made)


def _acquire(path: Path) -> int | None:
    """An open, locked file that lies at ``path``; None when another process holds it."""
    while True:
        handle, new = _open(path)
        got = lock(handle, wait=False)
        if got is None:
            got = new or _is_left(path)
        if not got:
            os.close(handle)
            return None
        with suppress(FileNotFoundError):  # whoever held it may have removed it meanwhile
            if os.path.samestat(os.fstat(handle), os.stat(path)):
                return handle
        os.close(handle)


def _open(path: Path) -> tuple[int, bool]:
    """The open file, and whether this call made it."""
    with suppress(FileExistsError):
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666), True
    return os.open(path, os.O_RDWR | os.O_CREAT, 0o666), False


def _is_left(path: Path) -> bool:
    """Return whether the process that made a lock file has died, as far as its words tell; one that said nothing is given time."""
    holder = _holder(path)
    if holder:
        return not _runs(holder)
    with suppress(OSError):
        return time.time() - path.stat().st_mtime > _SILENT
    return False


def _sign(handle: int, command: Sequence[str]) -> None:
    since = time.strftime("%Y-%m-%d %H:%M:%S %z")
    pid = os.getpid()
    who = {"pid": pid, "host": platform.node(), "since": since, "started": _started(pid), "command": shlex.join(command)[:500]}
    text = json.dumps(who).encode()
    os.pwrite(handle, text, 0)
    os.ftruncate(handle, len(text))


def _release(path: Path, handle: int, made: Sequence[Path]) -> None:
    with suppress(OSError):
        path.unlink()  # while it is locked: nobody else can hold it
        for folder in made:
            folder.rmdir()
    _held.discard(handle)
    os.close(handle)


def _missing(folder: Path) -> list[Path]:
    """The folders that must be made, from the inmost."""
    return [part for part in (folder, *folder.parents) if not os.path.lexists(part)]


def _refuse(path: Path, mend: str) -> NoReturn:
    until = time.monotonic() + _PATIENCE
    while not _runs(holder := _holder(path)) and time.monotonic() < until:
        time.sleep(0.02)  # it has the lock, and has not signed yet
    where = shown(path.parent)
    if not holder:
        raise ConfigError(f"{where} is in use by another process, which has not said who it is ({path.name}); {mend}")
    raise ConfigError(
        f"{where} is in use by process {holder.get('pid')} on {_plain(holder.get('host'))} since {_plain(holder.get('since'))}: "
        f"{_plain(holder.get('command'))}; {mend}"
    )


def _holder(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes()[:10_000])
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _runs(holder: dict[str, Any]) -> bool:
    """Return whether the process that signed may be alive: of another machine nobody knows."""
    pid = holder.get("pid")
    if not isinstance(pid, int) or pid < 1:
        return False
    if holder.get("host") != platform.node():
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # of another user
        return True
    return holder.get("started") in (None, _started(pid))


def _started(pid: int) -> str | None:
    """When a process began, in ticks since the machine did: numbers of processes come again."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError, UnicodeDecodeError):
        return None


def _plain(value: Any) -> str:
    """Text without control characters, which a terminal would obey."""
    return "".join(sign if sign.isprintable() else "?" for sign in str(value))[:500]


def _let_go() -> None:
    for handle in _held:
        with suppress(OSError):
            os.close(handle)
    _held.clear()


os.register_at_fork(after_in_child=_let_go)

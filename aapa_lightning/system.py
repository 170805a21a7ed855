"""What the system refuses to write, said in one line: a full disk, no permission, a name that cannot be."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from aapa_lightning.errors import AapaError, ConfigError, causes

#: What the system refuses for reasons that lie outside this program.
_OUTSIDE = {
    errno.ENOSPC: "no space is left on the disk; free some, and run the command again (a run goes on with --resume)",
    errno.EDQUOT: "the disk quota is used up; free some space, and run the command again (a run goes on with --resume)",
    errno.EFBIG: "the file is larger than the system allows (ulimit -f, or the file system); raise the limit",
    errno.EACCES: "permission denied; name a folder that can be written",
    errno.EPERM: "the system does not permit it; name a folder that can be written",
    errno.EROFS: "the file system is read-only; name a folder that can be written",
    errno.ENAMETOOLONG: "the name is too long; name a shorter one",
    errno.ENOTDIR: "a part of the path is a file, expected a folder; name another one",
    errno.EEXIST: "a file lies there, expected a folder; name another one",
    errno.EISDIR: "a folder lies there, expected a file; name another one",
    errno.EBUSY: "the system uses it, as it does a current folder or a mount; name another one",
    errno.ENOENT: "its folder cannot be made, or was removed meanwhile; name another one, or start again",
    errno.ELOOP: "the path leads through links in a circle; name another one",
    errno.EIO: "the disk reports an error; look at the system's log",
    errno.ESTALE: "the network file system has lost it; mount it again, and run the command again",
}


def make_folder(folder: Path) -> None:
    """Make a folder and those above it. Raises OSError, also where a link leads nowhere, and ConfigError for a name that cannot be."""
    if "\0" in str(folder):
        raise ConfigError(f"cannot write {shown(repr(str(folder)))}: a name cannot hold a null character")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        if folder.is_symlink() and not folder.exists():
            raise OSError(errno.EEXIST, f"a link that leads nowhere ({os.readlink(folder)})", str(folder)) from error
        raise


def check_folder(path: str | os.PathLike[str]) -> None:
    """Raise ConfigError where a folder shall be written and a file lies."""
    if os.path.exists(path) and not os.path.isdir(path):
        raise refused_message(path, FileExistsError(errno.EEXIST, ""))


@contextmanager
def writing(path: str | os.PathLike[str], within: Path | None = None) -> Iterator[None]:
    """Turn the system's refusal to write, also one that a library reports in its own words, into a ConfigError.

    Args:
        path: what is written, for the message.
        within: an error that names a file outside this folder is another's, and passes.
    """
    try:
        yield
    except AapaError:
        raise
    except Exception as error:
        refused = refusal(error, within)
        if refused is None:
            raise
        raise refused_message(path, refused) from error


def refusal(error: BaseException, within: Path | None = None) -> OSError | None:
    """The system's error behind ``error``, if its reason lies outside this program: a full disk, no permission and the like.

    Args:
        error: what was raised.
        within: leave out errors that name a file outside this folder.
    """
    for seen in causes(error, context=True):
        found = seen if isinstance(seen, OSError) else _in_words(str(seen))
        if found is not None and found.errno in _OUTSIDE and _lies_in(found.filename, within):
            return found
    return None


def _lies_in(name: Any, folder: Path | None) -> bool:
    return folder is None or not isinstance(name, str | bytes) or Path(os.fsdecode(name)).absolute().is_relative_to(folder.absolute())


def _in_words(text: str) -> OSError | None:
    """Return what a library in Rust, such as safetensors, reports: "No space left on device (os error 28)"."""
    found = re.search(r"\(os error (\d+)\)", text[-1000:])
    return OSError(int(found[1]), "") if found else None


def refused_message(path: str | os.PathLike[str], error: OSError) -> ConfigError:
    """The error for a user: what could not be written, why, and how to mend it."""
    known = _OUTSIDE.get(error.errno or 0)
    why = (error.strerror if error.errno == errno.EEXIST and error.strerror != os.strerror(errno.EEXIST) else None) or known
    return ConfigError(f"cannot write {shown(path)}: {why or error.strerror or error}")


def shown(path: str | os.PathLike[str], limit: int = 200) -> str:
    """A path for a message, its middle left out where it is long."""
    text = os.fspath(path)
    return text if len(text) <= limit else f"{text[: limit // 2]}...{text[-limit // 2 :]} ({len(text)} characters)"

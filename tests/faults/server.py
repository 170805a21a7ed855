"""Runs ``aapa`` commands in forked children that are killed where a job says so; imports everything once.

Jobs come as JSON lines on standard input: ``argv``, ``cwd``, ``output`` (a file for what the command prints) and at most one of
``operation`` (SIGKILL before the nth file operation), ``size`` (killed inside the write that takes a file past that many bytes) and
``seconds`` (SIGKILL after that time). Each is answered by a JSON line: the ``code``
(negative for a signal) and the number of ``operations``.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable

EVENTS = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate"}


class Operations:
    """Counts what changes files, from an audit hook and ``os.fsync``, and kills the process before operation number ``limit``."""

    def __init__(self, limit: int | None) -> None:
        self.count, self.limit = 0, limit
        self._fsync = os.fsync
        os.fsync = self._counted_fsync
        sys.addaudithook(self._hook)

    def _counted_fsync(self, fd: int) -> None:
        self._step()
        self._fsync(fd)

    def _hook(self, event: str, arguments: tuple) -> None:
        if event in EVENTS or (event == "open" and _writes(*arguments)):
            self._step()

    def _step(self) -> None:
        self.count += 1
        if self.count == self.limit:
            os.kill(os.getpid(), signal.SIGKILL)


def _writes(path: object, mode: str | None, flags: int) -> bool:
    return not str(path).startswith(("/dev/", "/proc/")) and bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


def run_child(job: dict, main: Callable[[list[str]], int], report: int) -> None:
    """Run the job's command in this process, which then ends."""
    os.setsid()  # what the command starts is killed with it
    output = os.open(job["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.chdir(job["cwd"])
    if "size" in job:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["size"], job["size"]))
    operations = Operations(job.get("operation"))
    try:
        code = main(job["argv"])
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    sys.stdout.flush()
    sys.stderr.flush()
    os.write(report, str(operations.count).encode())
    os._exit(code)


def run_job(job: dict, main: Callable[[list[str]], int]) -> dict:
    """Run one job in a child; its exit code (negative for a signal) and the operations that it counted, if it ended by itself."""
    readable, writable = os.pipe()
    child = os.fork()
    if not child:
        os.close(readable)
        try:
            run_child(job, main, writable)
        finally:
            os._exit(70)  # a traceback was printed
    os.close(writable)
    if "seconds" in job:
        _kill_after(child, job["seconds"])
    _, status = os.waitpid(child, 0)
    with os.fdopen(readable) as file:
        counted = file.read()
    return {"code": os.waitstatus_to_exitcode(status), "operations": int(counted or 0)}


def _kill_after(child: int, seconds: float) -> None:
    """Kill the child's group after ``seconds``, unless it ends before."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return
        time.sleep(0.005)
    os.killpg(child, signal.SIGKILL)


def warm_up() -> Callable[[list[str]], int]:
    """Import what the commands import, without starting a thread; the ``aapa`` command."""
    import peft
    import transformers.models.qwen3.modeling_qwen3  # noqa: F401

    from aapa_lightning.cli import main
    from aapa_lightning.commands import train
    from aapa_lightning.commands.parser import import_components

    import_components()
    assert peft
    assert train
    assert threading.active_count() == 1, "children forked beside another thread may wait for it for ever"
    return main


if __name__ == "__main__":
    command = warm_up()
    for line in sys.stdin:
        print(json.dumps(run_job(json.loads(line), command)), flush=True)

"""``--device`` and ``--devices``: where a command works, and the same work on several devices at once, a process each."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.queues import SimpleQueue
from typing import Any, TypeVar

from aapa_lightning.errors import ConfigError

T = TypeVar("T")
R = TypeVar("R")
#: Items that wait or are worked on, for each process: the next one is there when a process is done with one.
_AHEAD = 2

_work: Callable[[Any], Any] | None = None  # of a process of ``on_devices``: made when it gets its first item
_make: Callable[[], Callable[[Any], Any]]


def add_device_options(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument(
        "--device", default="auto", help="where to score: auto (a GPU where there is one), cpu, cuda, cuda:N (default: auto)"
    )
    parser.add_argument(
        "--devices", type=int, default=1, metavar="N", help="GPUs, or processes on the CPU, that score at once (default: 1)"
    )


def pick_devices(name: str, count: int) -> list[str]:
    """The devices that ``--device NAME --devices COUNT`` asks for.

    Args:
        name: ``auto`` (GPUs where there are any), ``cpu``, ``cuda`` or ``cuda:N``.
        count: how many; several on ``cpu`` are processes that share its cores.

    Raises:
        ConfigError: there is no such device, or there are fewer.
    """
    import torch

    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    try:
        kind = torch.device("cuda" if found else "cpu") if name == "auto" else torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"--device: expected auto, cpu or cuda:N, found {name!r}") from error
    if count < 1:
        raise ConfigError(f"--devices: expected a whole number above 0, found {count}")
    if kind.type == "cuda" and not found:
        raise ConfigError(f"--device {name}: torch {torch.__version__} finds no GPU; use --device cpu")
    if kind.type != "cuda":
        return [str(kind)] * count
    if kind.index is not None and count > 1:
        raise ConfigError(f"--device {name} names one GPU, --devices asks for {count}; use --device cuda")
    devices = [f"cuda:{kind.index or 0}"] if count == 1 else [f"cuda:{i}" for i in range(count)]
    if int(devices[-1].partition(":")[2]) >= found:
        raise ConfigError(f"--device {name} --devices {count}: this machine has {found} GPUs, cuda:0 to cuda:{found - 1}")
    return devices


@contextmanager
def on_devices(start: Callable[[str], Callable[[T], R]], devices: list[str]) -> Iterator[Callable[[Iterable[T]], Iterator[R]]]:
    """A ``map`` whose work is spread over devices.

    On one device the work is done in this process. On several, each has a process that takes an item when it has finished the one before;
    results come in the order of the items, and no more than twice as many items as processes are read ahead. An exception of the work is
    raised where its result would have come. The processes end at once when this one is interrupted, fails or is killed.

    Args:
        start: makes the work, given a device; picklable, as items and results are, where there are several devices.
        devices: names of devices, such as ``cuda:0``.

    Yields:
        What takes items and gives their results, as they come.
    """
    if len(devices) == 1:
        yield partial(map, start(devices[0]))
        return
    context = multiprocessing.get_context("spawn")
    queue: SimpleQueue[str] = context.SimpleQueue()
    for device in devices:
        queue.put(device)
    heard, alive = context.Pipe(duplex=False)  # closed by this process, or by the system at its end
    executor = ProcessPoolExecutor(len(devices), mp_context=context, initializer=_begin, initargs=(start, queue, heard, len(devices)))
    try:
        yield partial(_in_order, executor, _AHEAD * len(devices))
    except BaseException:
        alive.close()
        raise
    finally:
        executor.shutdown(cancel_futures=True)
        alive.close()


def _in_order(executor: ProcessPoolExecutor, ahead: int, items: Iterable[T]) -> Iterator[R]:
    waiting: deque[Future[R]] = deque()
    try:
        for item in items:
            waiting.append(executor.submit(_run, item))
            if len(waiting) >= ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise RuntimeError(
            "a process that worked on one of the devices has died; the system may have run out of memory. What is finished is kept: "
            "go on with --resume, perhaps with a smaller --batch-size or fewer --devices"
        ) from error


def _begin(start: Callable[[str], Callable[[Any], Any]], queue: SimpleQueue[str], alive: Connection, processes: int) -> None:
    """Prepare a process of the pool; whatever can fail waits for the first item, whose result carries the error."""
    global _make  # noqa: PLW0603 - a process of the pool has no other place of its own
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is for the process that started this one
    threading.Thread(target=_end_with, args=(alive,), daemon=True).start()
    _make = partial(_prepare, start, queue.get(), processes)


def _end_with(alive: Connection) -> None:
    with suppress(EOFError):
        alive.recv()
    os._exit(1)


def _prepare(start: Callable[[str], Callable[[Any], Any]], device: str, processes: int) -> Callable[[Any], Any]:
    import torch
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(max(1, torch.get_num_threads() // processes))
    return start(device)


def _run(item: Any) -> Any:
    global _work  # noqa: PLW0603 - see ``_begin``
    if _work is None:
        _work = _make()
    return _work(item)

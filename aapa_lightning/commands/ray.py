"""``aapa ray``: a trainer command on the workers of a Ray cluster, one process each, started by Ray Train."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import socket
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from aapa_lightning.cli import TRAINER_COMMANDS, is_users_error
from aapa_lightning.console import say
from aapa_lightning.errors import ConfigError, MissingDependencyError, in_one_line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("--workers", type=int, default=1, help="processes that train together, as many on every node (default: 1)")
    parser.add_argument("--gpu", action="store_true", help="a GPU for every worker; without it they train on the CPU")
    parser.add_argument("--cpus-per-worker", type=int, default=1, help="CPUs reserved for a worker, and its threads (default: 1)")
    parser.add_argument(
        "--address", help="cluster to run on, such as `auto` on one of its nodes (default: $RAY_ADDRESS, or one started here for this run)"
    )
    parser.add_argument("words", nargs=argparse.REMAINDER, metavar="COMMAND", help="what every worker runs: fit --config ...")


def run(args: argparse.Namespace) -> int:
    """Run the command on the cluster; 1 when a worker fails.

    Raises:
        ConfigError: the arguments are wrong, or the mistake in the input that the workers found.
        MissingDependencyError: Ray is not installed.
    """
    words = _checked(args)
    train = _import_ray("ray.train")
    pytorch = _import_ray("ray.train.torch")
    with _cluster(args), tempfile.TemporaryDirectory(prefix="aapa-ray-") as notes:
        trainer = pytorch.TorchTrainer(
            work,
            train_loop_config={"words": words, "folder": os.getcwd()},
            scaling_config=train.ScalingConfig(num_workers=args.workers, use_gpu=args.gpu, resources_per_worker=_resources(args)),
            # Checkpoints are the run folder's affair, so nothing is reported to Ray and its own storage stays empty.
            run_config=train.RunConfig(
                storage_path=notes,
                failure_config=train.FailureConfig(max_failures=0, max_preemption_failures=0),
                logging_config=train.LoggingConfig(log_level="WARNING"),
            ),
        )
        pool = ThreadPoolExecutor(1)  # outside the main thread Ray leaves Ctrl-C to us, which ends the process with 130 as always
        try:
            pool.submit(trainer.fit).result()
        except train.WorkerGroupError as error:
            return _report(error.worker_failures, str(error), words)
        finally:
            pool.shutdown(wait=False)
    return 0


def work(call: dict[str, Any]) -> None:
    """What every worker does: ``call["words"]`` in ``call["folder"]``."""
    from aapa_lightning.commands.ray_worker import run_worker

    try:
        run_worker(**call)
    except SystemExit as end:  # help was printed, or Lightning heard a SIGTERM
        if end.code or type(end) is not SystemExit:
            raise
    except Exception as error:
        if is_users_error(error):
            logging.getLogger("ray.train").setLevel(logging.CRITICAL)  # the message is printed once, without this worker's traceback
        raise


def _checked(args: argparse.Namespace) -> list[str]:
    """The words that every worker runs."""
    words: list[str] = args.words[1:] if args.words[:1] == ["--"] else args.words
    if not words or words[0] not in TRAINER_COMMANDS:
        raise ConfigError(f"aapa ray: expected one of {', '.join(TRAINER_COMMANDS)} and its options, found {' '.join(words) or 'nothing'}")
    for name in ("workers", "cpus_per_worker"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')}: expected at least 1, found {getattr(args, name)}")
    return words


def _resources(args: argparse.Namespace) -> dict[str, float]:
    return {"CPU": args.cpus_per_worker} | ({"GPU": 1} if args.gpu else {})


def _import_ray(name: str) -> ModuleType:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # one actor less to start: nothing here listens to it
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            f"aapa ray: expected the package ray, found no {error.name}; pip install 'aapa-lightning[ray]'"
        ) from error


@contextmanager
def _cluster(args: argparse.Namespace) -> Iterator[None]:
    """The cluster that the process is connected to; else the one at the address, or one of this machine, left or ended afterwards."""
    ray = _import_ray("ray")
    if ray.is_initialized():
        yield
        return
    address = args.address or os.environ.get("RAY_ADDRESS") or "local"
    own: dict[str, Any] = {"include_dashboard": False, "num_cpus": args.workers * args.cpus_per_worker} if address == "local" else {}
    try:
        _knock(address)
        ray.init(address, logging_level=logging.ERROR, logging_config=ray.LoggingConfig(log_level="ERROR"), **own)
    except OSError as error:
        if address == "local":
            raise
        found = f"found none ({in_one_line(error)}); `ray start --head` starts one"
        raise ConfigError(f"--address {address}: expected a running Ray cluster, {found}") from error
    try:
        gpus = int(ray.cluster_resources().get("GPU", 0))
        if address == "local" and args.gpu and gpus < args.workers:
            raise ConfigError(f"--gpu: expected a GPU for each of {args.workers} workers, found {gpus} on this machine")
        yield
    finally:
        ray.shutdown()


def _knock(address: str) -> None:
    """Find a wrong address within seconds; Ray itself goes on trying for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if port.isdigit():
        socket.create_connection((host, int(port)), timeout=10).close()


def _report(failures: dict[int, Exception], message: str, words: list[str]) -> int:
    """Raise the first mistake in the input among the failures of ranks; else print them all and return 1."""
    causes = [getattr(failures[rank], "_base_exc", failures[rank]) for rank in sorted(failures)]
    for cause in causes:
        if is_users_error(cause):
            raise cause from None
    again = "; the same command with --resume continues from the last checkpoint" if words[0] == "fit" else ""
    say(f"aapa: error: {message}\naapa: workers {', '.join(map(str, sorted(failures)))} failed{again}", error=True)
    return 1

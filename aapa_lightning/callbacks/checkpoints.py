"""Where a user's own checkpoints lie."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint


def place_checkpoints(callbacks: Iterable[Callback], folder: Path) -> None:
    """Let every ``ModelCheckpoint`` without a ``dirpath`` write to the run's folder of checkpoints.

    Lightning would take the folder of the first logger. With ``save_last`` the file is ``own-last.ckpt``: ``last.ckpt`` is the run's.

    Args:
        callbacks: of the configuration.
        folder: ``RUN/checkpoints``.
    """
    for callback in callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
            callback.dirpath = str(folder)
            callback.CHECKPOINT_NAME_LAST = "own-last"  # of this one alone

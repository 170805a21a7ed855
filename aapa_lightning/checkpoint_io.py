"""Checkpoints that a crash cannot spoil."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from lightning.fabric.utilities.types import _PATH
from typing_extensions import override

from aapa_lightning.sharding.files import check_checkpoint, in_memory, read_checkpoint, remove, save_sealed


class AtomicCheckpointIO(CheckpointIO):
    """Writes a checkpoint beside its target and replaces the target in one step; reads tensors and primitives only.

    Lightning's own writer goes through the temporary folder, so where that is another file system it copies into place, and a kill
    leaves half a file under the good name. A file's digest is its last line, and is checked before anything is read. It also reads the
    folders that the strategy ``fsdp2`` writes, whole.
    """

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any | None = None) -> None:
        """Save ``checkpoint`` to the local file ``path``. ``storage_options`` is not supported."""
        if storage_options is not None:
            raise TypeError("AtomicCheckpointIO writes local files and takes no storage_options")
        save_sealed(checkpoint, path)

    @override
    def load_checkpoint(self, path: _PATH, map_location: Any | None = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Load ``path`` without unpickling objects, whatever ``weights_only`` says.

        Raises:
            ConfigError: there is no such file or folder, or a byte of it is not what was written.
        """
        if not Path(path).is_file():
            found: dict[str, Any] = in_memory(read_checkpoint(path))
            return found
        check_checkpoint(path)
        checkpoint: dict[str, Any] = torch.load(path, map_location=map_location or "cpu", weights_only=True)
        return checkpoint

    @override
    def remove_checkpoint(self, path: _PATH) -> None:
        """Delete the file, or the folder of a sharded checkpoint."""
        remove(Path(path))

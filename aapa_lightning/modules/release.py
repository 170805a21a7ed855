"""What a module holds beside its weights is freed after an exception too, when Lightning leaves ``teardown`` out."""

from __future__ import annotations

from typing import Any

import lightning as L


class ReleaseOnException(L.Callback):
    """Calls the module's ``release``."""

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Free what the module holds."""
        module: Any = pl_module
        if callable(getattr(module, "release", None)):
            module.release()


def release_on_exception(trainer: Any) -> list[L.Callback]:
    """The callback, or nothing where the trainer has it from an earlier call: Lightning would warn that it replaces it."""
    return [] if any(isinstance(callback, ReleaseOnException) for callback in trainer.callbacks) else [ReleaseOnException()]

"""The progress bar of a run that counts steps."""

from __future__ import annotations

from collections.abc import Iterable

from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar
from lightning_utilities.core.imports import RequirementCache


class RunProgressBar(RichProgressBar):
    """Rich's bar, without the last epoch's number where a run ends by its steps: Lightning's stands at -2 there."""

    def _get_train_description(self, current_epoch: int) -> str:
        found = super()._get_train_description(current_epoch)
        return found if self.trainer.max_epochs != -1 else found.replace("/-2", "", 1)


def progress_bars(callbacks: Iterable[Callback], enabled: bool) -> list[Callback]:
    """The bar of a run, where bars are enabled, rich is installed and the configuration has none of its own."""
    own = any(isinstance(callback, ProgressBar) for callback in callbacks)
    return [RunProgressBar()] if enabled and not own and RequirementCache("rich") else []

"""The progress bar of a run that counts steps."""

from __future__ import annotations

from lightning.pytorch.callbacks import RichProgressBar


class RunProgressBar(RichProgressBar):
    """Rich's bar, without the last epoch's number where a run ends by its steps: Lightning's stands at -2 there."""

    def _get_train_description(self, current_epoch: int) -> str:
        found = super()._get_train_description(current_epoch)
        return found if self.trainer.max_epochs != -1 else found.replace("/-2", "", 1)

"""The anchor as one more callback."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from aapa_lightning.anchor.bank import ExpertBank
from aapa_lightning.anchor.base import Discriminator
from aapa_lightning.anchor.guard import Guard
from aapa_lightning.anchor.load import load_discriminator
from aapa_lightning.anchor.schedule import Schedule
from aapa_lightning.anchor.segment import Segmenter
from aapa_lightning.anchor.signal import Combine, Granularity, Pool, Scale, Transform, Truncated
from aapa_lightning.anchor.term import AnchorTerm
from aapa_lightning.errors import ConfigError, refuse_idle
from aapa_lightning.thinking import ScoreThinking


class AnchorCallback(Callback):
    """Gives a policy module its ``AnchorTerm``; the module asks it for the signal. Nothing else of the run changes.

    It loads the discriminator when a run is set up, moves it to the module's device (no strategy knows it), lets schedule and guard learn
    when an optimiser step is done, and saves the discriminator's fingerprint with what they learned, never its weights.

    Args:
        discriminator: folder written by ``aapa fit --model DiscriminatorModule``, or a discriminator.
        weight: lambda, a number or a schedule (``class_path: aapa_lightning.anchor.schedule.Cosine``).
        transform: see ``aapa_lightning.anchor.signal.AnchorOptions``, as all options down to ``truncated``.
        tau: temperature of the transform.
        pool: from sentences to a response.
        softmin_temperature: T of ``pool=softmin``.
        scale: what centred scores are divided by.
        scale_floor: least ``batch`` scale, in units of the pooled score.
        granularity: ``response`` or ``sentence``.
        combine: ``loss``, ``advantage`` or ``reward``.
        truncated: ``score`` or ``drop`` responses that hit the length limit.
        bank: folder of an expert bank (``aapa bank build``), for ``bt_gap`` and the guard's AUROC.
        segmenter: finds sentences; the one that the discriminator was trained with by default.
        score_thinking: score ``<think>`` blocks too; ``Thinking`` names other tags.
        guard: limits that warn or stop the run when the discriminator is being gamed.
        encoder: where the discriminator's encoder lies, if it moved since training.
        trust_remote_code: run code that comes with the encoder.
    """

    def __init__(
        self,
        discriminator: str | Discriminator,
        *,
        weight: float | Schedule = 0.3,
        transform: Transform = "gan_ns",
        tau: float = 1.0,
        pool: Pool = "mean",
        softmin_temperature: float = 1.0,
        scale: Scale = "batch",
        scale_floor: float = 0.1,
        granularity: Granularity = "response",
        combine: Combine = "loss",
        truncated: Truncated = "score",
        bank: str | None = None,
        segmenter: Segmenter | None = None,
        score_thinking: ScoreThinking = False,
        guard: Guard | None = None,
        encoder: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        if not isinstance(discriminator, str):
            refuse_idle(AnchorCallback, locals(), ("encoder", "trust_remote_code"), "with a discriminator that is loaded", "anchor ")
        self.discriminator, self.bank = discriminator, bank
        self.encoder, self.trust_remote_code = encoder, trust_remote_code
        self.options: dict[str, Any] = {
            "weight": weight,
            "transform": transform,
            "tau": tau,
            "pool": pool,
            "softmin_temperature": softmin_temperature,
            "scale": scale,
            "scale_floor": scale_floor,
            "granularity": granularity,
            "combine": combine,
            "truncated": truncated,
            "segmenter": segmenter,
            "score_thinking": score_thinking,
            "guard": guard,
        }
        self.term: AnchorTerm | None = None
        self._step = 0
        self._resumed = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Build the term once and give it to the module. Raises ConfigError when the module, the folder or the options do not fit."""
        if not hasattr(pl_module, "anchor"):
            raise ConfigError(
                f"AnchorCallback expects a module that asks its attribute `anchor` for the signal, found {type(pl_module).__name__} "
                "without one; use a policy module such as SFTModule, GRPOModule or PreferenceModule, or set `self.anchor = None` in your "
                "own module and call it"
            )
        if self.term is None:
            self.term = self._build()
        host: Any = pl_module  # networks type their attributes as tensors and modules
        host.anchor = self.term

    def _build(self) -> AnchorTerm:
        discriminator = self.discriminator
        if isinstance(discriminator, str):
            discriminator = load_discriminator(discriminator, encoder=self.encoder, trust_remote_code=self.trust_remote_code)
        bank = None if self.bank is None else ExpertBank(self.bank, discriminator.fingerprint())
        return AnchorTerm(discriminator, bank=bank, **self.options)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Move the discriminator to the module's device."""
        self._place(pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Move the discriminator to the module's device."""
        self._place(pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Move the discriminator to the module's device."""
        self._place(pl_module)

    def _place(self, pl_module: LightningModule) -> None:
        if self.term is not None:
            self.term.to(pl_module.device).freeze()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember where the run starts, after what is due: a callback before this one may have saved between a step and its end."""
        if self._step < trainer.global_step and self._resumed:
            self._advance(trainer)
        self._step, self._resumed = trainer.global_step, False

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Advance the term when an optimiser step was done, not per batch; the guard warns or stops, on all ranks alike."""
        if trainer.global_step != self._step:
            self._step = trainer.global_step
            self._advance(trainer)

    def _advance(self, trainer: Trainer) -> None:
        report = self.term.advance() if self.term is not None else None
        if report is None or not report.tripped:
            return
        stops = report.action == "stop"
        if report.fresh:
            rank_zero_warn(f"anchor guard at step {trainer.global_step}: {'; '.join(report.fresh)}{'; the run stops' if stops else ''}")
        trainer.should_stop = trainer.should_stop or stops

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the module as it was found."""
        host: Any = pl_module
        if getattr(host, "anchor", None) is self.term:
            host.anchor = None

    def state_dict(self) -> dict[str, Any]:
        """The term's (a fingerprint, schedule, guard and counters) and the last step that it has learnt from."""
        return {} if self.term is None else {**self.term.state_dict(), "step": self._step}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore the term's state. Raises ConfigError for another discriminator."""
        if self.term is not None and state_dict:
            self.term.load_state_dict(state_dict)
            self._step, self._resumed = int(state_dict["step"]), True

"""Training of the encoder-and-head discriminator."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from typing_extensions import override

from aapa_lightning.anchor.context import Encoding
from aapa_lightning.anchor.continued import continued_head
from aapa_lightning.anchor.encoder import FrozenEncoder
from aapa_lightning.anchor.encoder_head import EncoderHeadDiscriminator
from aapa_lightning.anchor.head import Feature, StackedHead, feature_size
from aapa_lightning.anchor.training import (
    EncodedExamples,
    bradley_terry_loss,
    calibrate,
    check_heads,
    discriminator_loss,
    encode_examples,
    prompt_weights,
    response_weights,
)
from aapa_lightning.errors import ConfigError, choose
from aapa_lightning.metrics.functional.discrimination import calibration_error
from aapa_lightning.modules.discriminator_data import DiscriminatorData
from aapa_lightning.modules.discriminator_figures import choosing_responses, figures_of, report, reported_responses, warn_of_met
from aapa_lightning.modules.epochs import ResumableEpochs

#: Share of the training sentences that score below the floor given to responses of which nothing is seen.
FLOOR_QUANTILE = 0.01
#: The held-out figure that chooses the epoch, for each loss: pairs do not train the order of responses to different prompts.
SELECTED_BY = {"cross_entropy": "sentence_auroc", "bradley_terry": "paired_accuracy"}


class DiscriminatorModule(ResumableEpochs):
    """Trains a head that tells expert sentences from others, on embeddings of a frozen encoder computed once.

    Binary cross-entropy, in which classes weigh the same, and so do responses; or Bradley-Terry over the pairs of an expert's and another
    response to one prompt, in which prompts weigh the same. After ``fit`` the head is the one of the epoch with the best held-out sentence
    AUROC or, for Bradley-Terry, paired accuracy (``select=best``), its temperature is fitted to logits on prompts that it was not trained
    on (those that cross-fitting left out, or else held-out ones; without either, or with ``calibrate=False``, it stays 1), and
    ``export`` writes the discriminator's folder. Pairs leave the offset of the logits open: it is fitted to the same prompts (without any,
    to those of training) whatever ``calibrate`` says, so that logits are read as log-odds at equal prior after either loss.

    Half of the held-out prompts choose the epoch and fit the temperature; ``val/`` figures are theirs. The figures at the end and of
    ``test`` are of the other half, without responses whose text trained or chose. Where nothing is chosen, all are reported.

    Args:
        encoder: folder or Hub name: any encoder, or a causal language model such as an exported policy.
        loss: ``cross_entropy`` or ``bradley_terry``.
        start: folder of a discriminator with the same encoder, encoding, features, folds and hidden units; its head is trained on, with
            its scale of the features. None starts from ``seed``.
        features: ``sentence``, ``response`` (mean of the response), ``reference`` (best-matching sentence of another expert response; needs
            two expert responses for a prompt).
        hidden_units: width of the head's hidden layer; 0 for a linear head.
        dropout: of the head.
        lr: learning rate of AdamW.
        weight_decay: of AdamW.
        label_smoothing: in [0, 1).
        folds: heads for cross-fitting; head k is trained without the prompts and texts of fold k, and judges it. 1 for a single head.
        select: ``best`` or ``last`` epoch.
        calibrate: fit the temperature; otherwise it is 1, and logits are as confident as training made them.
        encoding: how text is presented to the encoder.
        seed: of the initial weights and the bootstrap.
        resamples: of the bootstrap behind the intervals.
        trust_remote_code: run code that comes with the encoder.
    """

    head: StackedHead

    def __init__(
        self,
        encoder: str,
        features: tuple[Feature, ...] = ("sentence", "response"),
        hidden_units: int = 256,
        dropout: float = 0.2,
        lr: float = 1e-3,
        weight_decay: float = 0.01,
        label_smoothing: float = 0.0,
        folds: int = 1,
        select: Literal["best", "last"] = "best",
        calibrate: bool = True,
        encoding: Encoding = Encoding(),  # noqa: B008 - frozen, so sharing it is safe
        seed: int = 0,
        resamples: int = 200,
        trust_remote_code: bool = False,
        loss: Literal["cross_entropy", "bradley_terry"] = "cross_entropy",
        start: str | None = None,
    ) -> None:
        super().__init__()
        feature_size(features, 1)
        if folds < 1 or not 0 <= label_smoothing < 1 or not 0 <= dropout < 1 or hidden_units < 0 or lr <= 0:
            raise ConfigError(
                "expected folds >= 1, label_smoothing and dropout in [0, 1), hidden_units >= 0 and lr > 0, found "
                f"{folds}, {label_smoothing}, {dropout}, {hidden_units} and {lr}"
            )
        self.loss, self.start, self._selected_by = loss, start, choose(SELECTED_BY, loss, "loss")
        self.encoder_path, self.features, self.encoding = encoder, tuple(features), encoding
        self.hidden_units, self.dropout, self.folds, self.seed = hidden_units, dropout, folds, seed
        self.lr, self.weight_decay, self.label_smoothing = lr, weight_decay, label_smoothing
        self.select, self.calibrate, self.resamples, self.trust_remote_code = select, calibrate, resamples, trust_remote_code
        self.metrics: dict[str, float] = {}
        self.encoded: dict[str, EncodedExamples] = {}
        self.frozen: FrozenEncoder | None = None
        self._best: dict[str, Any] | None = None

    @override
    def setup(self, stage: str) -> None:
        super().setup(stage)
        data = self._data()
        self._check_prompt(data)
        device = self.trainer.strategy.root_device
        if self.frozen is None:
            self.frozen = FrozenEncoder(self.encoder_path, self.encoding, trust_remote_code=self.trust_remote_code)
            self.head = self._initial_head(self.frozen)
        self.frozen.to(device)
        for split in data.examples.keys() - self.encoded.keys():
            self.encoded[split] = encode_examples(
                self.frozen, data.segmenter, self.features, data.examples[split], folds=self.folds, score_thinking=data.score_thinking
            )
        if stage == "fit":
            train = self.encoded["train"]
            self.head.temperature.fill_(1.0)
            if self.start is None:
                self.head.fit_scale(train.features[train.seen])
            data.whole_prompts = self.loss == "bradley_terry"
            if data.whole_prompts:
                self._weights = prompt_weights(train.labels, train.groups, train.folds, self.folds, train.texts)
            else:
                self._weights = response_weights(train.labels, train.folds, self.folds, train.texts)
            if self.folds > 1:
                check_heads(self._weights, train.labels)
            if "val" in self.encoded:
                warn_of_met(self.encoded["val"], train)

    @property
    def chooses(self) -> bool:
        """Whether held-out prompts choose something: the epoch, the temperature, or what a callback monitors."""
        monitored = any(getattr(callback, "monitor", None) for callback in getattr(self.trainer, "callbacks", ()))
        return self.select == "best" or monitored or (self.folds == 1 and (self.calibrate or self.loss == "bradley_terry"))

    def _initial_head(self, frozen: FrozenEncoder) -> StackedHead:
        if self.start is None:
            return StackedHead(self.folds, feature_size(self.features, frozen.hidden_size), self.hidden_units, self.dropout, self.seed)
        head = continued_head(self.start, frozen, self.features, self.folds, self.hidden_units)
        head.dropout = self.dropout
        return head

    def _data(self) -> DiscriminatorData:
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, DiscriminatorData):
            raise ConfigError(f"DiscriminatorModule is trained with --data DiscriminatorData, found {type(data).__name__}")
        return data

    def _check_prompt(self, data: DiscriminatorData) -> None:
        if data.other_prompts > 0 and not self.encoding.prompt and "reference" not in self.features:
            raise ConfigError(
                f"other_prompts={data.other_prompts} labels expert responses to other prompts as negatives, but with encoding.prompt=false "
                "the discriminator cannot see the prompt; set other_prompts=0, or let it see the prompt"
            )

    @override
    def training_plan(self) -> dict[str, Any]:
        data = self._data()
        own = {"loss": self.loss, "seed": self.seed}
        return own | {"batch_size": data.batch_size, "data.seed": data.seed, "examples": data.fingerprint()[:12]}

    @override
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.seed_step()
        examples = self.encoded["train"]
        responses = batch.cpu()
        rows, place = examples.sentences_of(responses)
        logits, place = self.head(examples.features[rows].to(self.device)), place.to(self.device)
        labels, weights = examples.labels[responses].to(self.device), self._weights[:, responses].to(self.device)
        if self.loss == "bradley_terry":
            groups = examples.groups[responses].to(self.device)
            loss = bradley_terry_loss(logits, place, labels, groups, weights, self.label_smoothing)
        else:
            loss = discriminator_loss(logits, place, labels, weights, self.label_smoothing)
        self.add_loss(loss, len(responses))
        return loss

    @override
    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log_dict(self.judge(), batch_size=1)  # one batch; a mean weighted by another size would round

    @override
    def judge(self) -> dict[str, float]:
        """Held-out figures; the head is kept where it is the best so far."""
        if "val" not in self.encoded:
            return {}
        choosing = self._choosing()
        figures = self._measure("val", choosing if bool(choosing.any()) else self._reported("val"), resamples=0)
        score = figures.get(self._selected_by)
        if not self.trainer.sanity_checking:
            self.note_judgement()
            if score is not None and (self._best is None or score > self._best["score"]):
                state = {name: value.detach().cpu().clone() for name, value in self.head.state_dict().items()}
                self._best = {"score": score, "epoch": self.current_epoch, "head": state}
        return {f"val/{name}": value for name, value in figures.items()}

    @override
    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        figures = self._measure("test", self._reported("test"), self.resamples)
        self.log_dict({f"test/{name}": value for name, value in figures.items()}, batch_size=1)

    @override
    def on_train_end(self) -> None:
        if self.select == "best" and self._best is not None:
            self.head.load_state_dict(self._best["head"])
        self.head.eval()
        self.metrics = self._calibrate()
        self._set_floor()
        if "val" in self.encoded:
            chose = int(self.encoded["val"].groups[self._choosing()].unique().numel())
            self.metrics = {"choosing_prompts": chose} | self._measure("val", self._reported("val"), self.resamples) | self.metrics
        if self.metrics:
            rank_zero_info(report(self.metrics))

    def _calibrate(self) -> dict[str, float]:
        """Set offset and temperature; the latter, and the calibration error before and after it on the logits that it was fitted to."""
        self.head.temperature.fill_(1.0)
        held_out = "train" if self.folds > 1 else "val"
        offset, scale = self.loss == "bradley_terry", self.calibrate and held_out in self.encoded
        if not (offset or scale):
            return {}
        split = held_out if held_out in self.encoded else "train"
        examples = self.encoded[split]
        responses = torch.nonzero(self._choosing()).flatten() if split == "val" else torch.arange(len(examples))
        rows, place = examples.sentences_of(responses)
        heads, labels = examples.folds[responses][place], examples.labels[responses]
        logits = self._logits(split).cpu()[heads, rows]
        offsets, temperature = calibrate(logits, heads, self.folds, place, labels, offset=offset, scale=scale)
        self.head.temperature.fill_(temperature)
        with torch.no_grad():
            self.head.bias[:, 0, 0] -= offsets.to(self.head.bias)
        if not scale:
            return {}
        logits = (logits - offsets[heads]).float()
        weights, temperature = 1.0 / torch.bincount(place, minlength=len(labels))[place], float(self.head.temperature)
        before, after = (calibration_error(values, labels[place], weights) for values in (logits, logits / temperature))
        return {"temperature": temperature, "ece_before_temperature": before, "ece_after_temperature": after}

    @torch.no_grad()
    def _set_floor(self) -> None:
        train = self.encoded["train"]
        logits = self._logits("train")[:, train.seen.to(self.device)]
        self.head.floor.copy_(torch.quantile(logits, FLOOR_QUANTILE, dim=1) if logits.numel() < 2**24 else logits.min(1).values)

    @torch.no_grad()
    def _logits(self, split: str) -> Tensor:
        was_training = self.head.training
        self.head.eval()
        logits = torch.cat([self.head(part.to(self.device)) for part in self.encoded[split].features.split(16384)], dim=1)
        self.head.train(was_training)
        return logits

    def _choosing(self) -> Tensor:
        return choosing_responses(self.encoded, self._data().choosing)

    def _reported(self, split: str) -> Tensor:
        return reported_responses(self.encoded, self._data().choosing, split)

    def _measure(self, split: str, chosen: Tensor, resamples: int) -> dict[str, float]:
        options = {"resamples": resamples, "seed": self.seed}
        return figures_of(self.encoded[split], self._logits(split).cpu(), self.head.floor.cpu(), chosen, **options)

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer = torch.optim.AdamW(self.head.parameters(), lr=self.lr, weight_decay=self.weight_decay)
        self.optimizer_resume.made(optimizer, None)
        return optimizer

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["discriminator"] = self._best

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self._best = checkpoint["discriminator"]

    def discriminator(self) -> EncoderHeadDiscriminator:
        """The discriminator as trained so far. Raises ConfigError before ``fit``."""
        if self.frozen is None:
            raise ConfigError("the discriminator has not been trained yet: call fit first")
        return EncoderHeadDiscriminator(self.frozen, copy.deepcopy(self.head), self.features, self._data().segmenter, self.metrics)

    def export(self, folder: str | Path) -> None:
        """Write the discriminator's folder (``load_discriminator`` reads it), on rank 0."""
        if self.trainer.is_global_zero:
            self.discriminator().save(Path(folder))

"""Training of a reward model on preference pairs, and on golden responses against the policy's own (APO)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torchmetrics import MeanMetric

from aapa_lightning.anchor.polar import RewardModelDiscriminator
from aapa_lightning.data.pairs import require_pairs
from aapa_lightning.errors import COUNT, WEIGHT, ConfigError, DataError, Limit, check_numbers, choose
from aapa_lightning.export import STALE
from aapa_lightning.files import whole_folder
from aapa_lightning.logprobs.inputs import rotary_limit
from aapa_lightning.loop.classifier import load_classifier
from aapa_lightning.loop.evaluate import EvalLoader, EvalStep
from aapa_lightning.loop.loader import WindowLoader, WindowStep
from aapa_lightning.loop.plan import WindowPlan
from aapa_lightning.loop.ranking import OVERLONG, PairEncoder, RankingPair, pair_scores
from aapa_lightning.loop.terms import LossTerm, column_term
from aapa_lightning.metrics.discrimination import CalibrationError
from aapa_lightning.modules.parallel import place
from aapa_lightning.modules.precision import refuse_true_precision, trainer_precision
from aapa_lightning.modules.specs import as_spec
from aapa_lightning.modules.windowed import Records, WindowedModule
from aapa_lightning.objectives.ranking import RANKINGS, ranking_loss
from aapa_lightning.policy import PolicySpec
from aapa_lightning.reduce import StepCounts
from aapa_lightning.sharding import gather_state, gathered_parameters

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: Prefixes of the figures of held-out human and golden pairs, in the order of their loaders.
FIGURES = ("", "golden_")


LIMITS = {
    **dict.fromkeys(("max_tokens", "max_response_tokens", "batch_size", "golden_batch_size", "eval_batch_size"), COUNT),
    **dict.fromkeys(("human_weight", "golden_weight"), WEIGHT),
    "seed": Limit(whole=True),
}


@dataclass(slots=True)
class PairWindow:
    """This rank's pairs of one optimiser step.

    Args:
        number: of the window.
        plan: sizes; human pairs are its prompts, golden ones its demonstrations.
        human: in the order of the micro-steps.
        golden: likewise; empty without golden data.
    """

    number: int
    plan: WindowPlan
    human: list[RankingPair]
    golden: list[RankingPair]

    @property
    def experience(self) -> None:
        """None: nothing is sampled."""

    @property
    def metrics(self) -> Mapping[str, float]:
        """Nothing: what is known of the pairs comes with their losses."""
        return {}

    def state(self) -> dict[str, Any]:
        """Its number: it ends with the optimiser step, so no checkpoint lies inside."""
        return {"number": self.number}


class RewardModelModule(WindowedModule):
    """Trains a reward model by Bradley-Terry on human pairs and, for APO (arXiv 2311.08045), on golden responses against samples.

    The loss of an optimiser step is ``human_weight`` times the mean of ``-log sigma(r_chosen - r_rejected)`` over its human pairs, from
    ``data.train``, plus ``golden_weight`` times the mean of ``golden_loss`` over its golden pairs, from ``data.golden`` (chosen: an
    expert's response, rejected: a sample of the policy). Each kind has a mean of its own, so neither micro-batches nor the sizes of the
    datasets shift the weights. Without ``data.golden`` it is a plain reward model. An epoch is a pass over the human pairs.

    Validation and test log ``accuracy`` (ties half) and ``ece``, the calibration error of the confidence ``sigma(|margin|)`` in ten bins,
    on the pairs of the split, and ``golden_accuracy`` and ``golden_ece`` on those of ``data.golden_val``.

    ``export`` writes a folder that is a Hugging Face classifier, a discriminator for ``aapa score``, ``RewardModelReward`` and
    ``AnchorCallback``, and a ``base`` to train on, head included.

    Args:
        base: any causal LM or encoder, or an earlier export; a head that it lacks is drawn from ``base.seed``.
        template: what the reward model reads, with ``{response}`` and ``{prompt}``.
        max_tokens: limit of its tokens; the authors have 512.
        max_response_tokens: limit of a response's; None is just under half of ``max_tokens``, which is the most.
        overlong: ``truncate`` a pair that is over a limit (the end of the response, the beginning of the prompt), ``drop``, or ``error``.
        batch_size: human pairs of an optimiser step, over all devices and accumulated micro-steps.
        golden_batch_size: golden pairs of an optimiser step, likewise.
        human_weight: the authors' ``rm_kl_coeff``.
        golden_weight: the authors' ``apo_loss_coeff``.
        golden_loss: ``ranking``, or ``diff``, the plain difference of scores.
        eval_batch_size: pairs of an evaluation batch on one device.
        seed: of data order; None takes ``seed_everything``'s.
        **kwargs: see ``WindowedModule``.

    Raises:
        ConfigError: a weight below 0, an unknown choice, or limits that do not fit.
    """

    #: Whether ``data.golden`` and ``data.golden_val`` are used.
    takes_golden = True

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    pairs: PairEncoder

    def __init__(
        self,
        base: PolicySpec,
        *,
        template: str = "{prompt}\n{response}",
        max_tokens: int = 1024,
        max_response_tokens: int | None = None,
        overlong: Literal["truncate", "drop", "error"] = "truncate",
        batch_size: int = 64,
        golden_batch_size: int = 64,
        human_weight: float = 1.0,
        golden_weight: float = 0.1,
        golden_loss: Literal["ranking", "diff"] = "ranking",
        eval_batch_size: int = 64,
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        check_numbers(locals(), LIMITS)
        super().__init__(**kwargs)
        choose(OVERLONG, overlong, "overlong")
        choose(RANKINGS, golden_loss, "golden_loss")
        self.base, self.overlong, self.eval_batch_size = as_spec(base, "base"), overlong, eval_batch_size
        self.batch_size, self.golden_batch_size = batch_size, golden_batch_size
        self.human_weight, self.golden_weight, self.golden_loss = human_weight, golden_weight, golden_loss
        self.seed = int(os.environ.get("PL_GLOBAL_SEED", "0")) if seed is None else seed
        limit = (max_tokens - 1) // 2 if max_response_tokens is None else max_response_tokens
        self._settings: dict[str, Any] = {"template": template, "max_tokens": max_tokens, "max_response_tokens": limit}
        RewardModelDiscriminator("", **self._settings)  # refuses limits that it could not score with
        self._golden = False
        self._loaded = False
        self._figures: list[tuple[MeanMetric, CalibrationError]] = []

    def configure_model(self) -> None:
        """Load the model, once. Raises ConfigError for one with fewer positions than ``max_tokens``."""
        if self._loaded:
            return
        refuse_true_precision(trainer_precision(self))
        self.model, self.tokenizer = load_classifier(self.base, trainer_precision(self))
        known = (getattr(self.model.config.get_text_config(), "max_position_embeddings", None), rotary_limit(self.model))
        positions = min((limit for limit in known if limit is not None), default=None)  # `dynamic` and `longrope` change beyond theirs
        if positions is not None and self._settings["max_tokens"] > positions:
            raise ConfigError(
                f"max_tokens: expected at most the {positions} positions of the model, found {self._settings['max_tokens']}; lower it, and "
                "max_response_tokens with it"
            )
        place(self, self.model)
        self.pairs = PairEncoder(self.tokenizer, **self._settings)
        self.model.train()
        self._loaded = True

    # Data ----------------------------------------------------------------------------------------------------------------------------

    def make_plan(self, accumulate: int, world_size: int) -> WindowPlan:
        """One optimiser step a window: human pairs in the place of prompts, golden ones in that of demonstrations."""
        sizes = {"batch_size": self.batch_size} | ({"golden_batch_size": self.golden_batch_size} if self._golden else {})
        shards = accumulate * world_size
        for name, size in sizes.items():
            if size < 1 or size % shards:
                raise ConfigError(
                    f"{name}: expected a multiple of devices x accumulate_grad_batches = {world_size} x {accumulate}, found {size}; "
                    f"use {max(size // shards, 1) * shards}"
                )
        return WindowPlan(
            prompts=self.batch_size, demonstrations=sizes.get("golden_batch_size", 0), accumulate=accumulate, world_size=world_size
        )

    def train_loader(self, splits: Mapping[str, Records]) -> WindowLoader:
        """Check numbers and pairs, and build the loader of this rank's steps.

        Args:
            splits: ``train``, the human pairs, and ``golden``, where there are any.

        Raises:
            ConfigError: numbers that do not divide, weights that leave nothing to train on, or what a resume refuses.
            DataError: a dataset that is empty, a record that is no pair, or what ``overlong`` refuses.
        """
        self._golden = "golden" in splits
        plan = self.make_plan(self.trainer.accumulate_grad_batches, self.trainer.world_size)
        if not self.human_weight and not (self._golden and self.golden_weight):
            raise ConfigError(
                f"human_weight={self.human_weight} and golden_weight={self.golden_weight} {'with' if self._golden else 'without'} "
                "data.golden leave nothing to train on; raise one"
            )
        human = self._checked(splits["train"], "data.train")
        return self.window_loader(plan, human, self._checked(splits["golden"], "data.golden") if self._golden else ())

    def eval_loader(self, records: Sequence[Any]) -> EvalLoader:
        """Batches of held-out pairs for this rank."""
        pairs = self._checked(records, "held-out data")
        return EvalLoader(pairs, self.eval_batch_size, rank=self.trainer.global_rank, world_size=self.trainer.world_size)

    def _checked(self, records: Records, name: str) -> Records:
        if not len(records):
            raise DataError(f"{name}: expected pairs of a chosen and a rejected response, found an empty dataset")
        require_pairs(records, "a reward model compares two responses")
        kept = self.pairs.select(records, self.overlong)
        if len(kept) < len(records):
            rank_zero_info(
                f"{name}: {len(records) - len(kept)} of {len(records)} pairs are left out: over the limits, or the same once cut"
            )
        return kept

    def open(self, step: WindowStep, plan: WindowPlan) -> PairWindow:
        """Tokenise this rank's pairs."""
        human, golden = ([self.pairs.encode(record) for _, record in records] for records in (step.prompts, step.demonstrations))
        return PairWindow(step.window, plan, human, golden)

    # Loss ----------------------------------------------------------------------------------------------------------------------------

    def loss_terms(self, window: PairWindow, micro_step: int) -> list[LossTerm]:
        """Human pairs, then golden ones, in forwards of their own: neither changes the other's padding or noise."""
        plan = window.plan
        terms = [self._term("human", window.human[plan.prompt_slice(micro_step)], plan.prompts, self.human_weight, "ranking")]
        if plan.demonstrations:
            golden = window.golden[plan.demonstration_slice(micro_step)]
            terms.append(self._term("golden", golden, plan.demonstrations, self.golden_weight, self.golden_loss))
        return terms

    def _term(self, name: str, pairs: Sequence[RankingPair], count: int, weight: float, kind: str) -> LossTerm:
        with torch.set_grad_enabled(torch.is_grad_enabled() and weight != 0):
            outputs = ranking_loss(*self._scores(pairs), kind=kind)
        if weight == 0:
            torch.clear_autocast_cache()  # casts made without a graph must not serve the other term, see loop/collect.py
        return replace(column_term(name, outputs, StepCounts(count, count)), weight=weight)

    def _scores(self, pairs: Sequence[RankingPair]) -> tuple[Tensor, Tensor]:
        return pair_scores(self.model, self.tokenizer, pairs, self.device)

    # Evaluation ----------------------------------------------------------------------------------------------------------------------

    def _evaluate(self, step: EvalStep, loader: int) -> None:
        while len(self._figures) <= loader:
            self._figures.append((MeanMetric().to(self.device), CalibrationError(bins=20, equal_prior=False).to(self.device)))
        with gathered_parameters(self.model):
            if not step.records:  # this rank has run out
                return
            chosen, rejected = self._scores([self.pairs.encode(record) for record in step.records])
        margin = chosen - rejected
        accuracy, calibration = self._figures[loader]
        accuracy.update(0.5 + 0.5 * margin.sign())
        tie = margin == 0  # half right, half wrong
        half = 0.5 * tie.float()
        calibration.update(margin.abs().repeat(2), torch.cat((margin > 0, tie)), torch.cat((1 - half, half)))

    def _log_figures(self, stage: str) -> None:
        for prefix, (accuracy, calibration) in zip(FIGURES, self._figures, strict=False):
            figures = {"accuracy": float(accuracy.compute()), "ece": float(calibration.compute())}
            # of all ranks already: equal values have this mean, and without sync_dist Lightning warns of every figure
            self.log_dict({f"{stage}/{prefix}{name}": value for name, value in figures.items()}, sync_dist=True)
        self._figures = []

    def validation_step(self, batch: EvalStep, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Score a batch of the validation pairs, or (loader 1) of the golden ones."""
        self._evaluate(batch, dataloader_idx)

    def on_validation_epoch_end(self) -> None:
        """Log ``val/...``."""
        self._log_figures("val")

    def test_step(self, batch: EvalStep, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Score a batch of the test pairs, or (loader 1) of the golden ones."""
        self._evaluate(batch, dataloader_idx)

    def on_test_epoch_end(self) -> None:
        """Log ``test/...``."""
        self._log_figures("test")

    # Export --------------------------------------------------------------------------------------------------------------------------

    def export(self, folder: str | Path) -> None:
        """Write model, tokenizer and ``discriminator.json``, on rank 0. All ranks call it together."""
        state = gather_state(self.model)
        if self.trainer.is_global_zero:
            with whole_folder(folder, STALE) as new:
                self.model.save_pretrained(new, state_dict=state)
                self.tokenizer.save_pretrained(new)
                trust = self.base.trust_remote_code
                RewardModelDiscriminator(str(new), **self._settings, trust_remote_code=trust).save(new)

"""Every preference objective, anchorable."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from aapa_lightning.data.encode import encode_demonstration, fit_lengths
from aapa_lightning.data.pairs import require_labels, require_pairs
from aapa_lightning.data.prompt_format import PromptFormat
from aapa_lightning.errors import COUNT, POSITIVE, STEPS, WEIGHT, ConfigError, check_numbers, choose
from aapa_lightning.loop.loader import WindowStep
from aapa_lightning.loop.plan import WindowPlan
from aapa_lightning.loop.preferences import (
    Preference,
    count_preferences,
    in_a_ring,
    label_inputs,
    mismatched_log_ratios,
    pair_inputs,
    preferred_texts,
    responses_of,
)
from aapa_lightning.loop.reference import ReferenceCache, ReferencePolicy, response_sums
from aapa_lightning.loop.stress import WeightStress
from aapa_lightning.loop.terms import LossTerm, column_term
from aapa_lightning.loop.window import Window
from aapa_lightning.modules.base import PolicyModule, Records
from aapa_lightning.modules.checkpointing import gather_over_ranks
from aapa_lightning.modules.parallel import load_placed
from aapa_lightning.modules.precision import trainer_precision
from aapa_lightning.modules.specs import as_spec
from aapa_lightning.objectives.pairs import per_token
from aapa_lightning.objectives.preference import PREFERENCES
from aapa_lightning.objectives.sft import sft_loss
from aapa_lightning.objectives.surrogate import clipped_surrogate
from aapa_lightning.policy import PolicySpec
from aapa_lightning.seeds import derive_seed
from aapa_lightning.types import Demonstration, PairLossInputs, Record, SumOverRanks

LIMITS = {"batch_size": COUNT, "anchor_group_size": COUNT, "sft_weight": WEIGHT, "clip_low": WEIGHT, "clip_high": WEIGHT}


@dataclass(frozen=True, slots=True)
class StressOptions:
    """How GAPO perturbs the weights.

    Args:
        rho: length of the move relative to the weights; the authors' recipe for Mistral-7B has 0.025.
        start_layer: 0 moves all layers; n > 0 the decoder layers from n on, with a cheaper probe.
        direction: ``gradient`` of the batch, or ``gaussian``, a random direction as a control.
    """

    rho: float = 0.05
    start_layer: int = 0
    direction: Literal["gradient", "gaussian"] = "gradient"

    def __post_init__(self) -> None:
        """Raise ConfigError for a number outside its limit."""
        check_numbers({"rho": self.rho, "start_layer": self.start_layer}, {"rho": POSITIVE, "start_layer": STEPS}, "stress.")

    def build(self, model: nn.Module, sum_over_ranks: SumOverRanks, world_size: int) -> WeightStress:
        """The perturbation of a policy's weights."""
        return WeightStress(
            model,
            rho=self.rho,
            start_layer=self.start_layer,
            direction=self.direction,
            sum_over_ranks=sum_over_ranks,
            world_size=world_size,
        )


class PreferenceModule(PolicyModule):
    """Learns from pairs of a chosen and a rejected response (or, with ``kto``, from single labelled responses).

    The loss is the mean of the objective over the pairs of the whole optimiser step, plus ``sft_weight`` times the negative log-likelihood
    of the chosen responses, a mean over the step's tokens. Objectives with batch statistics (``amapo``, ``dr_dpo``, ``gapo``)
    take them over a micro-step and all ranks: micro-batch size and accumulation change them. ``kto`` takes its own over the whole step.

    With an anchor it also samples ``anchor_group_size`` responses to each pair's prompt and adds the adversarial term over their tokens.
    Without one nothing is sampled in training.

    Args:
        policy: which model to train.
        objective: a row of ``aapa_lightning.objectives.preference.PREFERENCES``: ``dpo``, ``ipo``, ``simpo``, ``orpo``, ``rpo``, ``hypo``,
            ``amapo``, ``cdpo``, ``rdpo``, ``ropo``, ``sympo``, ``dr_dpo``, ``kto``, ``gapo`` or ``rrhf``.
        options: the objective's own options, such as ``{beta: 0.1}``; the others keep the authors' defaults.
        sft_weight: weight of the chosen responses' likelihood; None takes the objective's own (0 for most, 1 for ``orpo``).
        batch_size: pairs of an optimiser step, over all devices and accumulated micro-steps.
        reference: the reference policy where the objective needs one; None is the policy as it starts, under adapters without a copy.
        reference_cache: folder, on a disk that all ranks see, in which the reference's log-probs are kept. They are computed once, before
            training, and the copy of the reference is dropped; a later run with the same reference only reads. Not for ``kto``.
        stress: how ``gapo`` perturbs the weights; None for the defaults. For no other objective.
        anchor_group_size: responses per prompt when anchored.
        clip_low: lower clip of the adversarial term's ratio.
        clip_high: upper clip.
        **kwargs: see ``PolicyModule``.

    Raises:
        ConfigError: an unknown objective or option, a value that does not fit, or a reference or stress where none is needed.
    """

    trains_on_rewards = False

    def __init__(
        self,
        policy: PolicySpec,
        *,
        objective: str = "dpo",
        options: dict[str, Any] | None = None,
        sft_weight: float | None = None,
        batch_size: int = 32,
        reference: PolicySpec | None = None,
        reference_cache: str | None = None,
        stress: StressOptions | None = None,
        anchor_group_size: int = 4,
        clip_low: float = 0.2,
        clip_high: float = 0.2,
        **kwargs: Any,
    ) -> None:
        check_numbers(locals(), LIMITS)
        super().__init__(policy, **kwargs)
        self.objective = choose(PREFERENCES, objective, "objective")
        self.objective_name = objective
        self._loss = self.objective.bind(options or {})
        self._probe = self.objective.bind_probe(options or {})
        self._inputs = label_inputs if self.objective.labels else pair_inputs
        self.sft_weight = self.objective.sft_weight if sft_weight is None else sft_weight
        self.batch_size = batch_size
        self.reference = None if reference is None else as_spec(reference, "reference")
        self.reference_cache, self.stress = reference_cache, stress or StressOptions()
        self.anchor_group_size = anchor_group_size
        self._surrogate = partial(clipped_surrogate, clip_low=clip_low, clip_high=clip_high)
        self._reference: ReferencePolicy | None = None  # no module itself: neither trained nor saved
        self._stress: WeightStress | None = None
        self._mismatched: Tensor | None = None
        self._check(stress)

    def _check(self, stress: StressOptions | None) -> None:
        if self._probe is None and stress is not None:
            raise ConfigError(f"objective {self.objective_name} perturbs no weights; leave stress out")
        if not self.objective.needs_reference and (self.reference or self.reference_cache):
            raise ConfigError(f"objective {self.objective_name} has no reference policy; leave reference and reference_cache out")
        if self.reference is not None and self.reference.lora is not None:
            raise ConfigError(
                "reference.lora: a reference is not trained; leave lora out, and name a folder of adapters as reference.model"
            )
        if self.objective.labels and self.reference_cache:
            raise ConfigError(
                f"reference_cache: {self.objective_name} also asks for log-probs of responses to other prompts, which depend on the batch; "
                "leave it out"
            )

    # Reference -----------------------------------------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Load the policy and, for training with an objective that needs it, the frozen reference."""
        fresh = not self._loaded
        super().configure_model()
        fitting = self._trainer is None or self._trainer.state.fn == "fit"
        if not self.objective.needs_reference or not fitting or self._reference is not None:
            return
        # loaded before this fit, the policy may hold a checkpoint's weights by now; what lies under adapters stays as it was
        spec = self.reference or (None if fresh or self.policy.lora else self.policy)
        model = self.frozen_copy() if spec is None else self._other_policy(spec)
        cache = None if self.reference_cache is None else ReferenceCache(self.reference_cache, model, trainer_precision(self))
        self._reference = ReferencePolicy(model, self.tokenizer.pad_token_id, cache)

    def _other_policy(self, spec: PolicySpec) -> nn.Module:
        try:
            model, tokenizer = load_placed(self, spec)
        except ConfigError as error:
            raise ConfigError(f"reference: {error}") from error
        theirs = tokenizer.get_vocab()
        if wrong := next((token for token, i in self.tokenizer.get_vocab().items() if theirs.get(token) != i), None):
            raise ConfigError(
                f"reference {spec.model}: expected the tokens of the policy's tokenizer under the same ids, found {wrong!r} as "
                f"{theirs.get(wrong)}; use a reference of the same family, or name the tokenizer that it shares as reference.tokenizer"
            )
        return model

    def _responses(self, records: Records) -> Iterator[Demonstration]:
        for record in records:
            yield from responses_of([self.encode(record)])

    def on_fit_start(self) -> None:
        """Move the reference to where the policy is, and look at what is to be perturbed."""
        if self._reference is not None:
            self._reference.to(self.device)
        if self._probe is not None:
            self._stress = self.stress.build(self.model, self.sum_over_ranks, self.trainer.world_size)

    # Data ----------------------------------------------------------------------------------------------------------------------------

    def make_plan(self, accumulate: int, world_size: int) -> WindowPlan:
        """One optimiser step a window; responses are sampled only when anchored, to the prompts of the pairs."""
        plan = self.demonstration_plan(self.batch_size, self.anchor_group_size, accumulate, world_size, "pairs have none")
        if self.objective.labels and plan.demonstrations < 2:
            raise ConfigError(
                f"batch_size: {self.objective_name} holds responses to other prompts of the step: expected at least 2, found 1"
            )
        return plan

    def training_records(self, plan: WindowPlan, prompts: Records, demonstrations: Records) -> tuple[Records, Records]:
        """Pairs (or labelled responses) within the length limits, their reference log-probs at hand."""
        require = require_labels if self.objective.labels else require_pairs
        require(demonstrations, f"objective {self.objective_name} learns from {'labels' if self.objective.labels else 'pairs'}")
        pairs = fit_lengths(self.tokenizer, demonstrations, self._response_format, self.eos_token_id, preferred_texts)
        if self._reference is not None:
            with self.trainer.precision_plugin.forward_context():
                self._reference.remember(
                    self._responses(pairs),
                    batch_size=2 * plan.demonstrations_per_slice,
                    rank=self.global_rank,
                    world_size=plan.world_size,
                    gather=gather_over_ranks,
                )
        return prompts, pairs

    @property
    def _response_format(self) -> PromptFormat:
        return replace(self.prompt_format, assistant_turns="last")  # earlier turns are no part of the response

    def encode(self, record: Record) -> Preference:
        """Tokens of a pair."""
        fmt, eos = self._response_format, self.eos_token_id
        sides = {name: encode_demonstration(self.tokenizer, record, text, fmt, eos, name) for name, text in preferred_texts(record)}
        return Preference(sides.get("chosen response"), sides.get("rejected response"), record)

    def _encoded(self, step: WindowStep) -> list[Any]:
        rows = super()._encoded(step)
        loader: Any = self.trainer.train_dataloader
        return in_a_ring(rows, self.encode(loader.demonstration_before(step.window))) if self.objective.labels else rows

    def count(self, rows: Sequence[Any]) -> Tensor:
        """Tokens of the chosen responses, and losses."""
        return count_preferences(rows, self.objective.labels)

    # Loss ----------------------------------------------------------------------------------------------------------------------------

    def loss_terms(self, window: Window, micro_step: int) -> list[LossTerm]:
        """The objective, the chosen responses' likelihood where it weighs anything, and the adversarial term when anchored."""
        rows, counts = window.demonstrations_of(micro_step)
        stressed = self._stressed_margins(rows, window.number, micro_step)
        if self.objective.labels and micro_step == 0:
            slices = [window.demonstrations_of(i)[0] for i in range(window.plan.micro_steps_per_window)]
            self._mismatched = mismatched_log_ratios(slices, self._policy_sums, self._reference)
        responses = responses_of(rows)
        sums, lengths, (logprobs, mask) = response_sums(self.model, responses, self.tokenizer.pad_token_id, self.device)
        outputs = self._loss(
            self._inputs(
                rows,
                sums,
                lengths,
                reference=self._reference,
                log_ratios=self._mismatched,
                stressed_margins=stressed,
                gather=self.gather_over_ranks,
            )
        )
        terms = [column_term("preference", outputs, counts)]
        if self.sft_weight:
            chosen = sum(row.chosen is not None for row in rows)
            terms.append(LossTerm("sft", sft_loss(logprobs[:chosen], mask[:chosen]), mask[:chosen], counts, weight=self.sft_weight))
        if self.anchor is not None:
            terms.append(self.sampled_anchor_term(window, micro_step, self._surrogate))
        return terms

    @torch.no_grad()
    def _policy_sums(self, rows: Sequence[Demonstration]) -> Tensor:
        return response_sums(self.model, rows, self.tokenizer.pad_token_id, self.device)[0]

    def _stressed_margins(self, rows: Sequence[Preference], window: int, micro_step: int) -> Tensor | None:
        if self._probe is None or self._stress is None:
            return None
        objective, responses, half = self._probe, responses_of(rows), len(rows)

        def inputs() -> PairLossInputs:
            sums, lengths, _ = response_sums(self.model, responses, self.tokenizer.pad_token_id, self.device)
            return PairLossInputs(sums[:half], sums[half:], lengths[:half], lengths[half:])

        def loss() -> Tensor:
            return objective(inputs()).losses.mean()

        def margins() -> Tensor:
            found = inputs()
            return per_token(found.chosen_logprobs, found.chosen_lengths) - per_token(found.rejected_logprobs, found.rejected_lengths)

        return self._stress.evaluate(loss, margins, derive_seed("stress", self.seed, window, micro_step))

    def step_metrics(self) -> dict[str, float]:
        """Lambda, and what the last perturbation changed."""
        stress = {} if self._stress is None else {f"stress/{name}": value for name, value in self._stress.metrics.items()}
        return super().step_metrics() | stress

"""The anchor without a Trainer: frozen discriminator in, per-token advantages out.

In a loop of one's own::

    anchor = AnchorTerm(load_discriminator("runs/discriminator/export"), weight=0.3)
    signal = anchor.signal(rollouts)
    loss = task_loss + anchor.weight(step) * surrogate(logprobs, old_logprobs, signal.advantages)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from aapa_lightning.anchor.asking import ask
from aapa_lightning.anchor.base import Discriminator
from aapa_lightning.anchor.checks import Bank, check_host, check_parts, mean_expert_logits
from aapa_lightning.anchor.guard import Guard, GuardReport, measure
from aapa_lightning.anchor.schedule import Schedule, as_schedule
from aapa_lightning.anchor.segment import Segmenter, segment_rollouts
from aapa_lightning.anchor.signal import AnchorOptions, Combine, Granularity, Pool, Scale, Transform, Truncated, build_signal
from aapa_lightning.anchor.thinking import answer_view
from aapa_lightning.data.records import require_experts
from aapa_lightning.errors import ConfigError, refuse_idle
from aapa_lightning.thinking import ScoreThinking, as_thinking
from aapa_lightning.types import AnchorSignal, Record, Rollouts, SentenceSpans, SumOverRanks, identity_sum
from aapa_lightning.users_code import users_code

_COMPARES = "the discriminator compares every response with an expert's"


class AnchorTerm:
    """Scores rollouts with a frozen discriminator and turns the scores into advantages.

    Args:
        discriminator: frozen here: ``eval()`` and no gradients, asserted again at every ``signal``.
        weight: lambda, a number or a schedule.
        transform: see ``AnchorOptions``, as all options down to ``truncated``.
        tau: temperature of the transform.
        pool: from sentences to a response.
        softmin_temperature: T of ``pool=softmin``.
        scale: what centred scores are divided by.
        scale_floor: least ``batch`` scale.
        granularity: ``response`` or ``sentence``.
        combine: ``loss``, ``advantage`` or ``reward``; read by whoever owns the loss.
        truncated: ``score`` or ``drop`` responses that hit the length limit.
        bank: expert logits, for ``bt_gap`` and for the guard's AUROC.
        segmenter: finds sentences; the discriminator's own by default.
        score_thinking: score ``<think>...</think>`` like any text. Otherwise it is cut off before scoring (``aapa_lightning.thinking``);
            its tokens then belong to the first sentence without weighing in it, so that they answer for the response they led to. A
            response that is all thinking is scored as an empty answer. ``Thinking`` names other tags.
        guard: limits on what the guard measures; by default it only measures.

    Raises:
        ConfigError: for an illegal combination, or a bank of another discriminator.
    """

    def __init__(
        self,
        discriminator: Discriminator,
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
        bank: Bank | None = None,
        segmenter: Segmenter | None = None,
        score_thinking: ScoreThinking = False,
        guard: Guard | None = None,
    ) -> None:
        if pool != "softmin":
            refuse_idle(AnchorTerm, locals(), ("softmin_temperature",), f"with pool {pool}", "anchor ")
        if scale != "batch":
            refuse_idle(AnchorTerm, locals(), ("scale_floor",), f"with scale {scale}", "anchor ")
        if bank is None and guard is not None and "auroc" in guard.lowest:
            raise ConfigError("guard.min_auroc does nothing without the experts' logits; name a bank, or leave min_auroc out")
        self.options = AnchorOptions(transform, tau, pool, softmin_temperature, scale, scale_floor, granularity, combine, truncated)
        self.options.check()
        self.discriminator = discriminator
        with users_code(f"discriminator {type(discriminator).__name__}: fingerprint", owner=discriminator):
            self._fingerprint = discriminator.fingerprint()  # hashing large weights takes seconds
        if not isinstance(self._fingerprint, str):
            raise ConfigError(f"discriminator {type(discriminator).__name__}: fingerprint must give text, found {self._fingerprint!r}")
        self.bank = bank
        self._compared = bank if self.options.transform == "bt_gap" else None
        self.thinking = as_thinking(score_thinking)
        self.schedule = as_schedule(weight)
        self.guard = guard or Guard()
        self.windows = self.trips = 0
        self.segmenter = replace(
            segmenter or getattr(discriminator, "segmenter", None) or Segmenter(), whole_response=discriminator.whole_response
        )
        self._pending: dict[str, float] | None = None
        check_parts(self.options, discriminator, self.bank, self._fingerprint)
        self.freeze()

    @property
    def combine(self) -> Combine:
        """How the signal joins the task."""
        return self.options.combine

    @property
    def granularity(self) -> Granularity:
        """One advantage per response, or credit to go per sentence."""
        return self.options.granularity

    def check_host(self, *, group_size: int, ratio_level: Literal["token", "sequence"] = "token") -> None:
        """Refuse a host objective that the anchor cannot join: a group of one, or sentence credit under a sequence-level ratio.

        Args:
            group_size: responses per prompt, G.
            ratio_level: level of the host's importance ratio.

        Raises:
            ConfigError: says why.
        """
        check_host(self.options, group_size=group_size, ratio_level=ratio_level)

    def check_records(self, records: Sequence[Record]) -> None:
        """Raise DataError naming the first record without the expert responses, or their logits, that scores are compared with."""
        if self.discriminator.needs_experts:
            require_experts(records, _COMPARES)
        if self._compared is not None:
            mean_expert_logits(self._compared, records)

    def signal(self, rollouts: Rollouts, *, sum_over_ranks: SumOverRanks = identity_sum) -> AnchorSignal:
        """Score whole groups of rollouts.

        Args:
            rollouts: ``N`` responses; a group never spans calls or ranks.
            sum_over_ranks: sums a tensor over ranks; called exactly once with ``scale=batch``, and not at all otherwise.

        Returns:
            The signal, on the rollouts' device, without gradient, not multiplied by lambda.

        Raises:
            DataError: an expert is missing that the anchor needs, or the discriminator fails or answers anything but a finite number for
                each sentence; names the record.
        """
        self.freeze()
        device = rollouts.response_ids.device
        # Scores must not depend on the precision of the policy's step: the bank's were computed without autocast.
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            expert_logits = None if self._compared is None else mean_expert_logits(self._compared, rollouts.records).to(device)
            logits, spans = self._score(rollouts)
            return build_signal(logits, spans, rollouts, self.options, expert_logits=expert_logits, sum_over_ranks=sum_over_ranks)

    def _score(self, rollouts: Rollouts) -> tuple[Tensor, SentenceSpans]:
        if self.discriminator.needs_experts:
            require_experts(rollouts.records, _COMPARES)
        view = answer_view(rollouts, self.thinking)
        scored = view.rollouts
        spans = view.scored(segment_rollouts(scored, self.segmenter))
        logits = ask(self.discriminator, scored.texts, rollouts.records, spans).to(rollouts.response_ids.device)
        return logits, view.in_full_text(spans)

    def observe(
        self,
        rollouts: Rollouts,
        signal: AnchorSignal,
        task_rewards: Tensor | None = None,
        *,
        sum_over_ranks: SumOverRanks = identity_sum,
    ) -> dict[str, float]:
        """Take the guard's measures of a window; once per window, on every rank. ``advance`` acts on them.

        Args:
            rollouts: the window's.
            signal: the anchor's, of the same rollouts.
            task_rewards: ``[N]``, the task's total reward, or None without one.
            sum_over_ranks: sums a tensor over ranks, called exactly once.

        Returns:
            Measures to log, of all ranks, and how many windows have tripped the guard so far.
        """
        prompts = dict(zip(rollouts.group_ids.tolist(), rollouts.records, strict=True)).values()
        found = [] if self.bank is None else [self.bank.expert_logits(record) for record in prompts]
        experts = torch.tensor([float(logits.mean()) for logits in found if logits is not None and logits.numel()])
        measures = measure(rollouts, signal, task_rewards, experts, thinking=self.thinking, sum_over_ranks=sum_over_ranks)
        self._pending = dict(measures)
        return {**self.guard.relative(measures), "trips": float(self.trips)}

    def advance(self) -> GuardReport | None:
        """Let schedule and guard learn from the last observation. Call when an optimiser step is done.

        An observation counts when the first step that uses its window is done, and once: a run that is resumed in between collects or
        restores that window again and ends in the same state.

        Returns:
            The guard's verdict, or None when there was nothing new.
        """
        if self._pending is None:
            return None
        pending, self._pending = self._pending, None
        report = self.guard.update(pending)
        with users_code(f"anchor: the schedule {type(self.schedule).__name__}", owner=self.schedule):
            self.schedule.observe(task_reward=pending.get("task_reward"), tripped=bool(report.tripped))
        self.windows += 1
        self.trips += bool(report.tripped)
        return report

    def weight(self, step: int) -> float:
        """Lambda at an optimiser step, counted from 0. Raises ConfigError for a schedule that fails or gives no finite number."""
        name = f"anchor: the schedule {type(self.schedule).__name__}"
        with users_code(name, owner=self.schedule):
            weight = self.schedule.weight(step)
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
            raise ConfigError(f"{name} must give a finite number for step {step}, found {weight!r}")
        return float(weight)

    def freeze(self) -> None:
        """Put the discriminator's networks in evaluation mode, without gradients."""
        for module in _modules(self.discriminator):
            module.eval().requires_grad_(False)

    def to(self, device: torch.device | str) -> Self:
        """Move the discriminator; returns itself."""
        self.discriminator = self.discriminator.to(device)
        return self

    def fingerprint(self) -> str:
        """The discriminator's."""
        return self._fingerprint

    def state_dict(self) -> dict[str, Any]:
        """Fingerprint, schedule, guard and counters: primitives, never weights."""
        return {
            "fingerprint": self.fingerprint(),
            "schedule": self.schedule.state_dict(),
            "guard": self.guard.state_dict(),
            "pending": self._pending,
            "windows": self.windows,
            "trips": self.trips,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore ``state_dict``.

        Raises:
            ConfigError: the state was saved with another discriminator.
        """
        if state["fingerprint"] != self.fingerprint():
            raise ConfigError(
                f"anchor: the run was started with another discriminator: expected fingerprint {state['fingerprint'][:12]}, "
                f"found {self.fingerprint()[:12]}; resume with the same discriminator, or start a new run"
            )
        try:
            self.schedule.load_state_dict(state["schedule"])
        except KeyError as error:
            raise ConfigError(
                f"anchor: the run was started with another weight schedule: {type(self.schedule).__name__} expects {error} in its saved "
                "state; resume with the same schedule, or start a new run"
            ) from error
        self.guard.load_state_dict(state["guard"])
        self._pending = None if state["pending"] is None else dict(state["pending"])
        self.windows, self.trips = int(state["windows"]), int(state["trips"])


def _modules(holder: Any, depth: int = 2) -> Iterator[nn.Module]:
    """The holder if it is a network, else the networks among its attributes, and theirs."""
    if isinstance(holder, nn.Module):
        yield holder
    elif depth and hasattr(holder, "__dict__"):
        for value in vars(holder).values():
            yield from _modules(value, depth - 1)

"""An open window: one rank's experience and demonstrations with the counts that its optimiser steps divide by."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from aapa_lightning.data.encode import PromptFormat, encode_prompt
from aapa_lightning.logprobs import response_logprobs
from aapa_lightning.loop.demonstrations import count_demonstrations
from aapa_lightning.loop.experience import Experience, experience_state, restore_experience, slice_rollouts
from aapa_lightning.loop.loader import WindowStep
from aapa_lightning.loop.plan import WindowPlan
from aapa_lightning.objectives.correction import CorrectionOptions, correction_weights
from aapa_lightning.reduce import StepCounts, count_step
from aapa_lightning.rollout.base import RolloutRequest
from aapa_lightning.types import Record, Rollouts, SumOverRanks, TokenLossInputs, identity_sum


@dataclass(slots=True)
class Window:
    """One rank's share of a window.

    Args:
        number: which window.
        plan: its sizes.
        experience: rollouts, or None without any.
        demonstrations: tokenised demonstrations (or pairs) of all its micro-steps.
        rollout_counts: int64 ``[minibatches, 2]``, tokens and responses to the prompts of each minibatch over all ranks.
        demonstration_counts: int64 ``[steps_per_window, 2]``, of the demonstrations of each optimiser step.
        sampled_counts: int64 ``[steps_per_window, 2]``, of the responses sampled to the demonstrations' prompts.
    """

    number: int
    plan: WindowPlan
    experience: Experience | None
    demonstrations: list[Any]
    rollout_counts: Tensor
    demonstration_counts: Tensor
    sampled_counts: Tensor

    @property
    def metrics(self) -> dict[str, float]:
        """Of the rollouts; none without any."""
        return {} if self.experience is None else self.experience.metrics

    def rollouts_of(self, micro_step: int) -> tuple[Experience, StepCounts]:
        """The responses to the prompts of a micro-step and the counts of its optimiser step."""
        counts = StepCounts.from_tensor(self.rollout_counts[self.plan.minibatch_of(micro_step)])
        return self._rows(self.plan.prompt_rows(micro_step)), counts

    def sampled_of(self, micro_step: int) -> tuple[Experience, StepCounts]:
        """The responses sampled to the prompts of a micro-step's demonstrations and the counts of its optimiser step."""
        counts = StepCounts.from_tensor(self.sampled_counts[self.plan.step_of(micro_step)])
        return self._rows(self.plan.demonstration_rows(micro_step)), counts

    def _rows(self, rows: slice) -> Experience:
        if self.experience is None:
            raise RuntimeError("this window has no rollouts")
        return self.experience.rows(rows)

    def demonstrations_of(self, micro_step: int) -> tuple[list[Any], StepCounts]:
        """The demonstrations of a micro-step and the counts of its optimiser step."""
        counts = StepCounts.from_tensor(self.demonstration_counts[self.plan.step_of(micro_step)])
        return self.demonstrations[self.plan.demonstration_slice(micro_step)], counts

    def state(self) -> dict[str, Any]:
        """What a checkpoint inside the window needs: tensors and primitives. Demonstrations and records are arithmetic."""
        return {
            "number": self.number,
            "experience": None if self.experience is None else experience_state(self.experience),
            "rollout_counts": self.rollout_counts.cpu(),
            "demonstration_counts": self.demonstration_counts.cpu(),
            "sampled_counts": self.sampled_counts.cpu(),
        }


def open_window(
    number: int,
    plan: WindowPlan,
    experience: Experience | None,
    demonstrations: Sequence[Any],
    sum_over_ranks: SumOverRanks = identity_sum,
    count: Callable[[Sequence[Any]], Tensor] = count_demonstrations,
) -> Window:
    """Count what each optimiser step of the window will divide by, over micro-steps and ranks, in one reduction.

    ``count`` gives int64 ``[2]``, the tokens and rows of a slice of the demonstrations.
    """
    sizes = (plan.minibatches, plan.steps_per_window, plan.steps_per_window)
    rollout_counts, demonstration_counts, sampled_counts = (torch.zeros(size, 2, dtype=torch.int64) for size in sizes)
    for micro_step in range(plan.micro_steps_per_window):
        step = plan.step_of(micro_step)
        if experience is not None and micro_step < plan.minibatches * plan.accumulate:
            rollout_counts[step] += count_step(experience.loss_mask[plan.prompt_rows(micro_step)]).cpu()
        if experience is not None and plan.sample_demonstrations:
            sampled_counts[step] += count_step(experience.loss_mask[plan.demonstration_rows(micro_step)]).cpu()
        demonstration_counts[step] += count(demonstrations[plan.demonstration_slice(micro_step)])
    counts = sum_over_ranks(torch.cat([rollout_counts, demonstration_counts, sampled_counts])).split(sizes)
    return Window(number, plan, experience, list(demonstrations), *counts)


def rollout_requests(tokenizer: Any, step: WindowStep, prompt_format: PromptFormat, plan: WindowPlan) -> list[RolloutRequest]:
    """Tokenise what a window samples responses to, in the order of its rows."""
    return [
        RolloutRequest(encode_prompt(tokenizer, record, prompt_format), record, slot, plan.samples) for slot, record in _sampled(step, plan)
    ]


def _sampled(step: WindowStep, plan: WindowPlan) -> list[tuple[int, Record]]:
    return [*step.prompts, *(step.demonstrations if plan.sample_demonstrations else ())]


def policy_inputs(
    model: nn.Module,
    experience: Experience,
    advantages: Tensor,
    temperature: float,
    *,
    entropy: bool = False,
    entropy_grad: bool = False,
    correction: CorrectionOptions | None = None,
) -> TokenLossInputs:
    """Run the policy over a slice of experience.

    Args:
        model: the policy.
        experience: the slice.
        advantages: float32 ``[N]`` or ``[N, L]``.
        temperature: of the rollouts.
        entropy: also compute entropies.
        entropy_grad: they carry a gradient.
        correction: for the difference between the old log-probs and the engine's; None for none.

    Returns:
        Inputs of a policy objective. Without old log-probs (one update per window) the old ones are the new ones, detached: the ratio is 1.
    """
    rollouts = experience.rollouts
    logprobs, entropies = response_logprobs(
        model,
        rollouts.prompt_ids,
        rollouts.prompt_mask,
        rollouts.response_ids,
        rollouts.response_mask,
        temperature,
        entropy=entropy,
        entropy_grad=entropy_grad,
        group_size=common_group_size(rollouts.group_ids),
    )
    old = logprobs.detach() if experience.old_logprobs is None else experience.old_logprobs
    weights, weight_metrics = correction_weights(old, rollouts.engine_logprobs, experience.loss_mask, correction or CorrectionOptions())
    return TokenLossInputs(
        logprobs=logprobs,
        old_logprobs=old,
        response_mask=experience.loss_mask,
        advantages=advantages if advantages.dim() == 2 else advantages[:, None].expand_as(logprobs),
        ref_logprobs=experience.ref_logprobs,
        entropy=entropies,
        weights=weights,
        weight_metrics=weight_metrics,
    )


def common_group_size(group_ids: Tensor) -> int:
    """The size of all groups, if their rows are adjacent and they have one size; else 1."""
    groups, sizes = group_ids.unique_consecutive(return_counts=True)
    alike = len(groups) == len(group_ids.unique()) and len(sizes.unique()) == 1
    return int(sizes[0]) if alike else 1


def window_logprobs(model: nn.Module, rollouts: Rollouts, plan: WindowPlan, temperature: float) -> Tensor:
    """Old (or reference) log-probs of a window's rollouts, in the very slices that are trained on: the same forward gives the same bits.

    Args:
        model: the policy, or a reference.
        rollouts: one rank's share of a window.
        plan: its sizes.
        temperature: of the rollouts.

    Returns:
        float32 ``[N, L]`` nats, 0 on padding, without gradient.
    """
    scored = torch.zeros(rollouts.response_ids.shape, device=rollouts.response_ids.device)
    with torch.no_grad():
        for rows in _trained_rows(plan):
            part = slice_rollouts(rollouts, rows)
            parts = (part.prompt_ids, part.prompt_mask, part.response_ids, part.response_mask)
            logprobs, _ = response_logprobs(model, *parts, temperature, group_size=common_group_size(part.group_ids))
            scored[rows, : logprobs.shape[1]] = logprobs
    return scored


def _trained_rows(plan: WindowPlan) -> Iterator[slice]:
    if plan.prompts:
        yield from (plan.prompt_rows(micro_step) for micro_step in range(plan.minibatches * plan.accumulate))
    if plan.sample_demonstrations:
        yield from (plan.demonstration_rows(micro_step) for micro_step in range(plan.micro_steps_per_window))


def restore_window(
    state: dict[str, Any], plan: WindowPlan, step: WindowStep, demonstrations: Sequence[Any], device: torch.device
) -> Window:
    """The inverse of ``Window.state``, with the records and demonstrations that the loader has found again."""
    experience = None
    if state["experience"] is not None:
        records = [record for _, record in _sampled(step, plan) for _ in range(plan.samples)]
        experience = restore_experience(state["experience"], records, device)
    counts = (state[name] for name in ("rollout_counts", "demonstration_counts", "sampled_counts"))
    return Window(state["number"], plan, experience, list(demonstrations), *counts)

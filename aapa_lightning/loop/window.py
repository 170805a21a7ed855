"""An open window: one rank's experience and demonstrations with the counts that its optimiser steps divide by."""

from __future__ import annotations

from collections.abc import Sequence
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
from aapa_lightning.reduce import StepCounts, count_step
from aapa_lightning.rollout.base import RolloutRequest
from aapa_lightning.types import Demonstration, Rollouts, SumOverRanks, TokenLossInputs, identity_sum


@dataclass(slots=True)
class Window:
    """One rank's share of a window.

    Args:
        number: which window.
        plan: its sizes.
        experience: rollouts, or None without any.
        demonstrations: tokenised demonstrations of all its micro-steps.
        rollout_counts: int64 ``[minibatches, 2]``, tokens and responses of each minibatch over all ranks.
        demonstration_counts: int64 ``[steps_per_window, 2]``, likewise.
    """

    number: int
    plan: WindowPlan
    experience: Experience | None
    demonstrations: list[Demonstration]
    rollout_counts: Tensor
    demonstration_counts: Tensor

    def rollouts_of(self, micro_step: int) -> tuple[Experience, StepCounts]:
        """The slice of a micro-step and the counts of its optimiser step."""
        if self.experience is None:
            raise RuntimeError("this window has no rollouts")
        rows = group_rows(self.plan, micro_step)
        return self.experience.rows(rows), StepCounts.from_tensor(self.rollout_counts[self.plan.minibatch_of(micro_step)])

    def demonstrations_of(self, micro_step: int) -> tuple[list[Demonstration], StepCounts]:
        """The demonstrations of a micro-step and the counts of its optimiser step."""
        counts = StepCounts.from_tensor(self.demonstration_counts[self.plan.step_of(micro_step)])
        return self.demonstrations[self.plan.demonstration_slice(micro_step)], counts


def group_rows(plan: WindowPlan, micro_step: int) -> slice:
    """Rows of a rank's experience that a micro-step trains on: whole groups."""
    slots = plan.prompt_slice(micro_step)
    return slice(slots.start * plan.samples, slots.stop * plan.samples)


def open_window(
    number: int,
    plan: WindowPlan,
    experience: Experience | None,
    demonstrations: Sequence[Demonstration],
    sum_over_ranks: SumOverRanks = identity_sum,
) -> Window:
    """Count what each optimiser step of the window will divide by, over micro-steps and ranks, in one reduction."""
    rollout_counts = torch.zeros(plan.minibatches, 2, dtype=torch.int64)
    demonstration_counts = torch.zeros(plan.steps_per_window, 2, dtype=torch.int64)
    for micro_step in range(plan.micro_steps_per_window):
        if experience is not None and micro_step < plan.minibatches * plan.accumulate:
            rollout_counts[plan.minibatch_of(micro_step)] += count_step(experience.loss_mask[group_rows(plan, micro_step)]).cpu()
        demonstration_counts[plan.step_of(micro_step)] += count_demonstrations(demonstrations[plan.demonstration_slice(micro_step)])
    counts = sum_over_ranks(torch.cat([rollout_counts, demonstration_counts]))
    return Window(number, plan, experience, list(demonstrations), counts[: plan.minibatches], counts[plan.minibatches :])


def rollout_requests(tokenizer: Any, step: WindowStep, prompt_format: PromptFormat, samples: int) -> list[RolloutRequest]:
    """Tokenise a window's prompts."""
    return [RolloutRequest(encode_prompt(tokenizer, record, prompt_format), record, slot, samples) for slot, record in step.prompts]


def policy_inputs(
    model: nn.Module,
    experience: Experience,
    advantages: Tensor,
    temperature: float,
    *,
    entropy: bool = False,
    entropy_grad: bool = False,
) -> TokenLossInputs:
    """Run the policy over a slice of experience.

    Args:
        model: the policy.
        experience: the slice.
        advantages: float32 ``[N]`` or ``[N, L]``.
        temperature: of the rollouts.
        entropy: also compute entropies.
        entropy_grad: they carry a gradient.

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
    )
    old = experience.old_logprobs
    return TokenLossInputs(
        logprobs=logprobs,
        old_logprobs=logprobs.detach() if old is None else old,
        response_mask=experience.loss_mask,
        advantages=advantages if advantages.dim() == 2 else advantages[:, None].expand_as(logprobs),
        ref_logprobs=experience.ref_logprobs,
        entropy=entropies,
    )


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
        for micro_step in range(plan.minibatches * plan.accumulate):
            rows = group_rows(plan, micro_step)
            part = slice_rollouts(rollouts, rows)
            logprobs, _ = response_logprobs(model, part.prompt_ids, part.prompt_mask, part.response_ids, part.response_mask, temperature)
            scored[rows, : logprobs.shape[1]] = logprobs
    return scored


def window_state(window: Window) -> dict[str, Any]:
    """What a checkpoint inside the window needs: tensors and primitives. Demonstrations and records are arithmetic."""
    return {
        "number": window.number,
        "experience": None if window.experience is None else experience_state(window.experience),
        "rollout_counts": window.rollout_counts.cpu(),
        "demonstration_counts": window.demonstration_counts.cpu(),
    }


def restore_window(
    state: dict[str, Any], plan: WindowPlan, step: WindowStep, demonstrations: Sequence[Demonstration], device: torch.device
) -> Window:
    """The inverse of ``window_state``, with the records and demonstrations that the loader has found again."""
    experience = None
    if state["experience"] is not None:
        records = [record for _, record in step.prompts for _ in range(plan.samples)]
        experience = restore_experience(state["experience"], records, device)
    return Window(state["number"], plan, experience, list(demonstrations), state["rollout_counts"], state["demonstration_counts"])

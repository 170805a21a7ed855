"""Everything one rank knows about a window's rollouts, and slices of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from aapa_lightning.reduce import Mean
from aapa_lightning.types import Record, Rollouts


@dataclass(slots=True)
class Experience:
    """Rollouts with what was made of them. Rows are responses, whole groups, in the order of the rank's micro-steps.

    Args:
        rollouts: the responses.
        loss_mask: bool ``[N, L]``, response tokens that are trained on (truncated responses may be left out).
        rewards: float32 ``[N, R]``, one column per reward; NaN where the task rewards nothing.
        advantages: float32 ``[N]``, of the task.
        scores: float32 ``[N]``, the anchor's pooled scores, or None without an anchor.
        anchor_advantages: float32 ``[N, L]``, the anchor's, or None.
        old_logprobs: float32 ``[N, L]`` nats, or None when a window is used for one update (then the ratio is 1 by construction).
        ref_logprobs: float32 ``[N, L]`` nats, or None without a reference policy.
        metrics: scalars of the window to log: means over this rank's rows, or numbers that are the same on all ranks.
    """

    rollouts: Rollouts
    loss_mask: Tensor
    rewards: Tensor
    advantages: Tensor
    scores: Tensor | None = None
    anchor_advantages: Tensor | None = None
    old_logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None
    metrics: dict[str, float] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rollouts)

    def rows(self, rows: slice) -> Experience:
        """A view of some rows, padding that no row of them needs cut off."""
        rollouts = slice_rollouts(self.rollouts, rows)
        length = rollouts.response_ids.shape[1]

        def cut(value: Tensor | None) -> Tensor | None:
            return value if value is None else value[rows, :length] if value.dim() == 2 else value[rows]

        return Experience(
            rollouts=rollouts,
            loss_mask=self.loss_mask[rows, :length],
            rewards=self.rewards[rows],
            advantages=self.advantages[rows],
            scores=cut(self.scores),
            anchor_advantages=cut(self.anchor_advantages),
            old_logprobs=cut(self.old_logprobs),
            ref_logprobs=cut(self.ref_logprobs),
        )


def slice_rollouts(rollouts: Rollouts, rows: slice) -> Rollouts:
    """Some rows of rollouts, cut to their longest prompt and response."""
    prompt = int(rollouts.prompt_mask[rows].sum(-1).max())
    length = max(int(rollouts.response_mask[rows].sum(-1).max()), 1)
    return replace(
        rollouts,
        prompt_ids=rollouts.prompt_ids[rows, -prompt:],
        prompt_mask=rollouts.prompt_mask[rows, -prompt:],
        response_ids=rollouts.response_ids[rows, :length],
        response_mask=rollouts.response_mask[rows, :length],
        truncated=rollouts.truncated[rows],
        group_ids=rollouts.group_ids[rows],
        engine_logprobs=rollouts.engine_logprobs[rows, :length],
        token_ends=rollouts.token_ends[rows, :length],
        texts=rollouts.texts[rows],
        records=rollouts.records[rows],
        prompt_ends=rollouts.prompt_ends[rows],
    )


def experience_state(experience: Experience) -> dict[str, Any]:
    """Tensors (on the CPU) and primitives that a checkpoint may hold; records are left out, the plan finds them again."""
    own = {f.name: getattr(experience, f.name) for f in fields(Experience) if f.name != "rollouts"}
    own["metrics"] = {name: _parts(value) for name, value in experience.metrics.items()}
    return {"rollouts": rollouts_state(experience.rollouts), **_to(own, "cpu")}


def restore_experience(state: dict[str, Any], records: Sequence[Record], device: torch.device | str) -> Experience:
    """The inverse of ``experience_state``, with the rows' records."""
    own = {name: value for name, value in state.items() if name != "rollouts"}
    own["metrics"] = {name: Mean(*value) if isinstance(value, tuple) else value for name, value in own["metrics"].items()}
    return Experience(rollouts=restore_rollouts(state["rollouts"], records, device), **_to(own, device))


def _parts(value: float) -> float | tuple[float, float]:
    return (value.total, value.count) if isinstance(value, Mean) else value


def rollouts_state(rollouts: Rollouts) -> dict[str, Any]:
    """Tensors (on the CPU) and primitives that a checkpoint may hold, without the records."""
    return _to({f.name: getattr(rollouts, f.name) for f in fields(Rollouts) if f.name != "records"}, "cpu")


def restore_rollouts(state: dict[str, Any], records: Sequence[Record], device: torch.device | str) -> Rollouts:
    """The inverse of ``rollouts_state``, with the rows' records."""
    return Rollouts(records=list(records), **_to(state, device))


def _to(values: dict[str, Any], device: torch.device | str) -> dict[str, Any]:
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in values.items()}

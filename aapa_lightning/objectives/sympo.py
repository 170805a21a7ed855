"""Symmetric losses on the margin of DPO: flipped labels add a constant, not a gradient."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from aapa_lightning.errors import choose
from aapa_lightning.objectives.pairs import check_positive, log_ratios, pair_outputs
from aapa_lightning.types import LossOutputs, PairLossInputs


def _sigmoid(logits: Tensor) -> tuple[Tensor, Tensor]:
    return torch.sigmoid(-logits), torch.sigmoid(logits) * torch.sigmoid(-logits)


def _ramp(logits: Tensor) -> tuple[Tensor, Tensor]:
    return (0.5 - 0.5 * logits).clamp(0.0, 1.0), 0.5 * (logits.abs() <= 1.0).to(logits.dtype)


def _unhinged(logits: Tensor) -> tuple[Tensor, Tensor]:
    return 1.0 - logits, torch.ones_like(logits)


#: Loss and downward slope of the clipped reward margin; each satisfies ``l(z) + l(-z) = constant``.
KINDS: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {"sigmoid": _sigmoid, "ramp": _ramp, "unhinged": _unhinged}


def sympo_loss(inputs: PairLossInputs, *, beta: float = 0.1, kind: str = "sigmoid", clip: float = 10.0) -> LossOutputs:
    r"""Symmetric preference optimisation per pair.

    With rewards ``c = beta (log pi(y) - log pi_ref(y))``, each clipped to [-clip, clip] (no gradient beyond), and ``z = c_w - c_l``:

    ======== ============================
    kind     loss
    ======== ============================
    sigmoid  ``1 / (1 + exp(z))``
    ramp     ``min(1, max(0, (1 - z) / 2))``
    unhinged ``1 - z``
    ======== ============================

    Args:
        inputs: policy and reference log-probs (sums over tokens).
        beta: as in ``dpo_loss``.
        kind: ``sigmoid``, ``ramp`` (the authors' code calls it ``symmetric_ramp``) or ``unhinged``.
        clip: largest reward, without unit.

    Returns:
        Losses ``[B]``; metrics as of ``dpo_loss`` with rewards and ``margin`` before the clip, ``clipped`` (share of the pair's two
        rewards) and ``weight``, the mean of what pushes the chosen and the rejected log-prob.

    Raises:
        ConfigError: no reference log-probs, an unknown kind, or an option that is not positive.

    Reference: On Symmetric Losses for Robust Policy Optimization with Noisy Preferences, 2025, arXiv 2505.24709.

    >>> policy, lengths, ref = torch.tensor([[-4.0], [-6.0]]), torch.tensor([[2], [3]]), torch.tensor([[-5.0], [-5.0]])
    >>> [sympo_loss(PairLossInputs(*policy, *lengths, *ref), beta=0.25, kind=kind).losses.item() for kind in ("ramp", "unhinged")]
    [0.25, 0.5]
    """
    check_positive(beta=beta, clip=clip)
    chosen, rejected = log_ratios(inputs)
    rewards = beta * torch.stack((chosen, rejected))
    kept = rewards.clamp(-clip, clip)
    losses, slope = choose(KINDS, kind, "kind of sympo")(kept[0] - kept[1])
    clipped = (rewards.abs() > clip).to(slope.dtype).mean(0)
    margin = chosen - rejected
    return pair_outputs(
        inputs,
        losses,
        margin,
        beta * slope * (1.0 - clipped),
        chosen_reward=rewards[0],
        rejected_reward=rewards[1],
        clipped=clipped,
    )

"""Losses of a reward model over pairs of a preferred and another response."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from aapa_lightning.errors import choose
from aapa_lightning.types import LossOutputs

#: From margins to losses, both of one shape.
RANKINGS: dict[str, Callable[[Tensor], Tensor]] = {"ranking": lambda margin: nn.functional.softplus(-margin), "diff": Tensor.neg}


def ranking_loss(chosen_scores: Tensor, rejected_scores: Tensor, *, kind: str = "ranking") -> LossOutputs:
    r"""How far a reward model is from scoring the chosen response higher.

    With the margin :math:`m = r(x, y_w) - r(x, y_l)`, ``ranking`` is Bradley-Terry, :math:`-\log\sigma(m)`; ``diff`` is :math:`-m`, the
    difference of means that a Wasserstein critic maximises. Nothing bounds ``diff``: it needs another term, such as Bradley-Terry on
    human pairs, that keeps scores in place.

    Args:
        chosen_scores: ``[B]``, of the preferred responses.
        rejected_scores: ``[B]``, of the others.
        kind: ``ranking`` or ``diff``.

    Returns:
        Losses ``[B]``, nats for ``ranking``; metrics ``margin`` and ``accuracy`` (1 where the chosen response scores higher, a half for
        a tie), ``[B]`` each, detached.

    Raises:
        ConfigError: an unknown kind.

    References:
        Cheng et al., Adversarial Preference Optimization, arXiv 2311.08045, 2023.

    >>> import torch
    >>> outputs = ranking_loss(torch.tensor([2.0, 0.0]), torch.tensor([0.0, 0.0]))
    >>> outputs.losses
    tensor([0.1269, 0.6931])
    >>> outputs.metrics["accuracy"]
    tensor([1.0000, 0.5000])
    """
    margin = chosen_scores - rejected_scores
    losses = choose(RANKINGS, kind, "kind")(margin)
    margin = margin.detach()
    return LossOutputs(losses, {"margin": margin, "accuracy": 0.5 + 0.5 * margin.sign()})

"""Geometric anchor preference optimisation: the policy's own margin under perturbed weights as the reference."""

from __future__ import annotations

from aapa_lightning.errors import WEIGHT, ConfigError, check_numbers
from aapa_lightning.objectives.pairs import check_positive, check_smoothing, logistic, mean_logprobs, pair_outputs
from aapa_lightning.types import LossOutputs, PairLossInputs


def gapo_loss(inputs: PairLossInputs, *, beta: float = 2.0, gamma_beta_ratio: float = 0.25, label_smoothing: float = 0.0) -> LossOutputs:
    r"""Geometric anchor preference optimisation per pair.

    ``l = -log sigma(z)`` with ``z = beta (G - gamma_beta_ratio)``, the anchor gap ``G = M(theta) - sg[M(theta~)]``, and
    ``M = log pi(y_w) / |y_w| - log pi(y_l) / |y_l|`` at the weights theta and at the perturbed theta~. Its gradient is ``-w grad M`` with
    ``w = beta sigma(gamma - beta G)`` in (0, beta), ``gamma = beta * gamma_beta_ratio``: pairs whose margin breaks down under the
    perturbation weigh less. With label smoothing: ``-(1 - eps) log sigma(z) - eps log sigma(-z)``.

    Args:
        inputs: policy log-probs and lengths, and ``stressed_margins`` ``M(theta~)``; no reference.
        beta: the defaults are those of the authors' code (its recipes: Mistral-7B 2.5 and 0.1, Gemma-2-9B 10 and 0.5).
        gamma_beta_ratio: target gap in nats per token.
        label_smoothing: eps in [0, 0.5).

    Returns:
        Losses ``[B]`` in nats; metrics ``margin`` (M), ``anchor_gap`` (G), ``weight`` (w), ``accuracy`` (of M), ``chosen_logprob``,
        ``rejected_logprob``.

    Raises:
        ConfigError: no stressed margins, or an option out of range.

    Reference: Geometric Anchor Preference Optimization, 2026, arXiv 2602.04909.

    >>> import torch
    >>> logprobs, lengths, stressed = torch.tensor([[-4.0], [-9.0]]), torch.tensor([[2], [3]]), torch.tensor([0.5])
    >>> gapo_loss(PairLossInputs(*logprobs, *lengths, stressed_margins=stressed), beta=2.0, gamma_beta_ratio=0.5).losses
    tensor([0.6931])
    """
    check_positive(beta=beta)
    check_smoothing(label_smoothing)
    check_numbers({"gamma_beta_ratio": gamma_beta_ratio}, {"gamma_beta_ratio": WEIGHT})
    if inputs.stressed_margins is None:
        raise ConfigError("gapo compares each margin with the one at perturbed weights: expected stressed_margins, found None")
    chosen, rejected = mean_logprobs(inputs)
    margin = chosen - rejected
    gap = margin - inputs.stressed_margins.detach()
    losses, slope = logistic(beta * (gap - gamma_beta_ratio), label_smoothing)
    return pair_outputs(inputs, losses, margin, beta * slope, anchor_gap=gap)

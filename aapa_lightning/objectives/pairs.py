"""What preference objectives share: means per token, log-ratios to the reference, the logistic loss, the metrics of a pair."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from aapa_lightning.errors import POSITIVE, ConfigError, check_numbers
from aapa_lightning.types import LossOutputs, PairLossInputs


def widened(values: Tensor) -> Tensor:
    """The values in float32 at least."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def per_token(logprobs: Tensor, lengths: Tensor) -> Tensor:
    """Mean over the tokens of a response; 0, with a gradient of 0, for a response without tokens.

    Args:
        logprobs: ``[B]`` nats, sums over the response.
        lengths: int64 ``[B]``, tokens.

    Returns:
        ``[B]`` nats per token.

    >>> per_token(torch.tensor([-6.0, 0.0]), torch.tensor([3, 0]))
    tensor([-2.,  0.])
    """
    return widened(logprobs).masked_fill(lengths == 0, 0.0) / lengths.clamp(min=1)


def mean_logprobs(inputs: PairLossInputs) -> tuple[Tensor, Tensor]:
    """The policy's mean log-probs of the chosen and the rejected responses, each ``[B]`` nats per token."""
    return per_token(inputs.chosen_logprobs, inputs.chosen_lengths), per_token(inputs.rejected_logprobs, inputs.rejected_lengths)


def reference_logprobs(inputs: PairLossInputs) -> tuple[Tensor, Tensor]:
    """The reference's log-probs of the chosen and the rejected responses, each ``[B]`` nats, without gradient.

    Raises:
        ConfigError: there are none.
    """
    chosen, rejected = inputs.ref_chosen_logprobs, inputs.ref_rejected_logprobs
    if chosen is None or rejected is None:
        raise ConfigError(
            "this objective compares the policy with a reference: expected ref_chosen_logprobs and ref_rejected_logprobs, found None; "
            "give both, or choose an objective without a reference (simpo, orpo, amapo, gapo, rrhf)"
        )
    return widened(chosen).detach(), widened(rejected).detach()


def log_ratios(inputs: PairLossInputs, *, length_normalize: bool = False) -> tuple[Tensor, Tensor]:
    """``log pi - log pi_ref`` of the chosen and the rejected responses.

    Args:
        inputs: with the reference's log-probs, or a ``ConfigError`` is raised.
        length_normalize: means per token rather than sums.

    Returns:
        Two tensors ``[B]``, nats (per token).
    """
    ref_chosen, ref_rejected = reference_logprobs(inputs)
    chosen, rejected = widened(inputs.chosen_logprobs) - ref_chosen, widened(inputs.rejected_logprobs) - ref_rejected
    if length_normalize:
        return per_token(chosen, inputs.chosen_lengths), per_token(rejected, inputs.rejected_lengths)
    return chosen, rejected


def logistic(logits: Tensor, label_smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
    """Logistic loss ``-(1 - eps) log sigma(z) - eps log sigma(-z)`` and its downward slope ``-dl/dz = sigma(-z) - eps``.

    >>> logistic(torch.zeros(1), 0.1)
    (tensor([0.6931]), tensor([0.4000]))
    """
    # log sigma(-z) = log sigma(z) - z: one exponential, and no inf - inf at the extremes.
    return label_smoothing * logits - F.logsigmoid(logits), torch.sigmoid(-logits) - label_smoothing


def pair_outputs(inputs: PairLossInputs, losses: Tensor, margin: Tensor, weight: Tensor, **metrics: Tensor) -> LossOutputs:
    """Losses with the metrics of every preference objective, detached.

    Args:
        inputs: the pairs.
        losses: ``[B]``.
        margin: ``[B]``, what the loss pushes up.
        weight: ``[B]``, ``-d loss / d margin``: how hard it pushes.
        metrics: further ones, ``[B]``; an ``accuracy`` among them replaces the margin's.

    Returns:
        Losses; metrics ``margin``, ``weight``, ``accuracy`` (1 where the margin is positive, 0.5 where it is 0), ``chosen_logprob`` and
        ``rejected_logprob`` (nats per token), and the further ones.
    """
    chosen, rejected = mean_logprobs(inputs)
    common = {"margin": margin, "weight": weight, "accuracy": accuracy(margin), "chosen_logprob": chosen, "rejected_logprob": rejected}
    return LossOutputs(losses, {name: value.detach() for name, value in {**common, **metrics}.items()})


def accuracy(margin: Tensor) -> Tensor:
    """1 where the margin is positive, 0.5 where it is 0, else 0."""
    return 0.5 + 0.5 * margin.detach().sign()


def check_positive(**options: float) -> None:
    """Raise a ``ConfigError`` unless every option is a positive, finite number."""
    check_numbers(options, dict.fromkeys(options, POSITIVE))


def check_smoothing(label_smoothing: float) -> None:
    """Raise a ``ConfigError`` unless the share of flipped labels is in [0, 0.5): at one half, labels say nothing."""
    if not 0 <= label_smoothing < 0.5:
        raise ConfigError(f"label_smoothing: expected an assumed share of flipped labels in [0, 0.5), found {label_smoothing}")

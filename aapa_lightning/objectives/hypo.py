"""Hybrid DPO: a reference that is wrong about a pair is left out of it."""

from __future__ import annotations

from aapa_lightning.objectives.pairs import accuracy, check_positive, log_ratios, logistic, pair_outputs, reference_logprobs
from aapa_lightning.types import LossOutputs, PairLossInputs


def hypo_loss(inputs: PairLossInputs, *, beta: float = 0.1) -> LossOutputs:
    r"""Hybrid DPO per pair: a reference that ranks the pair wrongly does not lower the bar.

    ``l = -log sigma(beta (D - max(0, D_ref)))`` with ``D = log pi(y_w) - log pi(y_l)`` and ``D_ref`` the reference's.

    Args:
        inputs: policy and reference log-probs (sums over tokens).
        beta: as in ``dpo_loss``.

    Returns:
        Losses ``[B]`` in nats; metrics as of ``dpo_loss``, with ``margin`` = ``D - max(0, D_ref)``. ``accuracy`` still compares the two
        rewards, so that it means the same as DPO's. Also ``reference_clamped`` (1 where the reference ranks the pair wrongly).

    Raises:
        ConfigError: no reference log-probs, or a beta that is not positive.

    Reference: HyPO, 2026, arXiv 2602.11902.

    >>> import torch
    >>> policy, lengths, ref = torch.tensor([[-4.0], [-6.0]]), torch.tensor([[2], [3]]), torch.tensor([[-7.0], [-5.0]])
    >>> hypo_loss(PairLossInputs(*policy, *lengths, *ref), beta=1.0).losses
    tensor([0.1269])
    """
    check_positive(beta=beta)
    chosen, rejected = log_ratios(inputs)
    ref_chosen, ref_rejected = reference_logprobs(inputs)
    reference_margin = ref_chosen - ref_rejected
    # D - max(0, D_ref) in terms of the rewards, which hold D - D_ref already.
    margin = chosen - rejected + reference_margin.clamp(max=0.0)
    losses, slope = logistic(beta * margin)
    return pair_outputs(
        inputs,
        losses,
        margin,
        beta * slope,
        accuracy=accuracy(chosen - rejected),
        chosen_reward=beta * chosen,
        rejected_reward=beta * rejected,
        reference_clamped=(reference_margin < 0).to(margin.dtype),
    )

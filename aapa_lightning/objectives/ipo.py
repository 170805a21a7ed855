"""Identity preference optimisation: a squared loss with a finite target."""

from __future__ import annotations

from aapa_lightning.objectives.pairs import check_positive, log_ratios, pair_outputs
from aapa_lightning.types import LossOutputs, PairLossInputs


def ipo_loss(inputs: PairLossInputs, *, beta: float = 0.1) -> LossOutputs:
    r"""Identity preference optimisation per pair.

    ``l = (h - 1 / (2 beta))^2`` with ``h = r_w - r_l`` and r the mean per token of ``log pi - log pi_ref``: the authors average, although
    the paper's formula does not show it.

    Args:
        inputs: policy and reference log-probs, and the lengths.
        beta: the paper's tau; the margin is pulled to ``1 / (2 beta)`` nats per token, from both sides.

    Returns:
        Losses ``[B]``, squared nats per token; metrics ``margin`` (h), ``weight`` (negative past the target), ``accuracy``,
        ``chosen_logprob``, ``rejected_logprob``, ``chosen_reward`` and ``rejected_reward`` (beta r).

    Raises:
        ConfigError: no reference log-probs, or a beta that is not positive.

    Reference: Azar et al., A General Theoretical Paradigm to Understand Learning from Human Preferences, 2023, arXiv 2310.12036, eq. 17.

    >>> import torch
    >>> policy, lengths, ref = torch.tensor([[-4.0], [-6.0]]), torch.tensor([[2], [2]]), torch.tensor([[-5.0], [-5.0]])
    >>> ipo_loss(PairLossInputs(*policy, *lengths, *ref), beta=0.25).losses
    tensor([1.])
    """
    check_positive(beta=beta)
    chosen, rejected = log_ratios(inputs, length_normalize=True)
    margin = chosen - rejected
    missing = 0.5 / beta - margin
    return pair_outputs(inputs, missing.square(), margin, 2.0 * missing, chosen_reward=beta * chosen, rejected_reward=beta * rejected)

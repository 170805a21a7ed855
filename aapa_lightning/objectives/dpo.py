"""Direct preference optimisation, and RPO, which adds imitation to it."""

from __future__ import annotations

from aapa_lightning.objectives.pairs import check_positive, log_ratios, logistic, pair_outputs
from aapa_lightning.types import LossOutputs, PairLossInputs


def dpo_loss(inputs: PairLossInputs, *, beta: float = 0.1, length_normalize: bool = False) -> LossOutputs:
    r"""Direct preference optimisation per pair.

    ``l = -log sigma(beta h)`` with ``h = r_w - r_l`` and ``r = log pi(y) - log pi_ref(y)``, chosen w, rejected l. RPO is this loss with
    ``beta`` 0.01 and 0.005 times the chosen responses' NLL, which the module adds: the NLL is not in here.

    Args:
        inputs: policy and reference log-probs (sums over tokens).
        beta: strength of the pull to the reference. Means per token are smaller than sums by the response's length: such a beta is not
            comparable with one for sums (Tulu 3: 5).
        length_normalize: r as means per token.

    Returns:
        Losses ``[B]`` in nats; metrics ``margin`` (h), ``weight``, ``accuracy``, ``chosen_logprob``, ``rejected_logprob``,
        ``chosen_reward`` and ``rejected_reward`` (beta r).

    Raises:
        ConfigError: no reference log-probs, or a beta that is not positive.

    References: Rafailov et al., Direct Preference Optimization, 2023, arXiv 2305.18290, eq. 7; length-normalised: Lambert et al., Tulu 3,
    2024, arXiv 2411.15124; RPO: Liu et al., Provably Mitigating Overoptimization in RLHF, 2024, arXiv 2405.16436.

    >>> import torch
    >>> policy, lengths, ref = torch.tensor([[-4.0], [-6.0]]), torch.tensor([[2], [3]]), torch.tensor([[-5.0], [-5.0]])
    >>> dpo_loss(PairLossInputs(*policy, *lengths, *ref), beta=1.0).losses
    tensor([0.1269])
    """
    check_positive(beta=beta)
    chosen, rejected = log_ratios(inputs, length_normalize=length_normalize)
    margin = chosen - rejected
    losses, slope = logistic(beta * margin)
    return pair_outputs(inputs, losses, margin, beta * slope, chosen_reward=beta * chosen, rejected_reward=beta * rejected)

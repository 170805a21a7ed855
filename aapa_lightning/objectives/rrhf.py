"""The ranking loss of RRHF, without its imitation term."""

from __future__ import annotations

from torch.nn import functional as F

from aapa_lightning.objectives.pairs import mean_logprobs, pair_outputs
from aapa_lightning.types import LossOutputs, PairLossInputs


def rrhf_loss(inputs: PairLossInputs) -> LossOutputs:
    r"""Ranking term of RRHF per pair.

    ``l = max(0, -M)`` with ``M = log pi(y_w) / |y_w| - log pi(y_l) / |y_l|``: a pair that the policy ranks rightly pushes nothing. The
    whole objective adds the best response's NLL with weight 1, which is not in here: the module adds it, as a mean over the step's
    response tokens.

    Args:
        inputs: policy log-probs and lengths; no reference. A ranked list of responses is given as its pairs.

    Returns:
        Losses ``[B]``, nats per token; metrics ``margin`` (M), ``weight`` (1 where the pair is ranked wrongly), ``accuracy``,
        ``chosen_logprob``, ``rejected_logprob``.

    Reference: Yuan et al., RRHF: Rank Responses to Align Language Models with Human Feedback without Tears, 2023, arXiv 2304.05302.

    >>> import torch
    >>> rrhf_loss(PairLossInputs(*torch.tensor([[-9.0, -2.0], [-4.0, -9.0]]), *torch.tensor([[3, 1], [2, 3]]))).losses
    tensor([1., 0.])
    """
    chosen, rejected = mean_logprobs(inputs)
    margin = chosen - rejected
    return pair_outputs(inputs, F.relu(-margin), margin, (margin < 0).to(margin.dtype))

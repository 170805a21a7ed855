"""Group relative policy optimisation: clipped surrogate, KL to a reference, entropy bonus."""

from __future__ import annotations

from aapa_lightning.errors import ConfigError
from aapa_lightning.objectives.kl import LOG_RATIO_LIMIT, kl_loss, kl_penalty
from aapa_lightning.objectives.surrogate import clipped_surrogate, importance_ratio
from aapa_lightning.types import LossOutputs, TokenLossInputs


def grpo_loss(
    inputs: TokenLossInputs,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    ratio_level: str = "token",
    beta: float = 0.0,
    kl_estimator: str = "k3",
    kl_ratio: bool = True,
    entropy_coef: float = 0.0,
) -> LossOutputs:
    r"""Per-token loss of GRPO and its relatives (DAPO, Dr. GRPO, GSPO differ in clip, ratio level, advantages and aggregation).

    ``l_it = surrogate_it + beta * KL_it - entropy_coef * H_it``. KL and entropy are aggregated as the surrogate is; weights that
    correct for the engine multiply the surrogate alone. H is known exactly at every prefix and needs no ratio; off policy its prefixes,
    like those of the KL, stay the old policy's.

    Args:
        inputs: policy, old (and with ``beta`` reference) log-probs, advantages; entropy with ``entropy_coef``.
        clip_low: lower clip of the ratio.
        clip_high: upper clip; DAPO's clip-higher sets it above ``clip_low``.
        ratio_level: ``token``, or ``sequence`` (GSPO).
        beta: weight of the KL term; 0 needs no reference.
        kl_estimator: ``k2`` or ``k3``.
        kl_ratio: multiply the KL by the surrogate's ratio (see ``kl_loss``; TRL's ``use_bias_correction_kl``). The expected gradient of
            both estimators is then that of KL(pi || ref) per token, on and off policy. Without it ``k2`` has that of KL(pi || ref) and
            ``k3`` that of KL(ref || pi), on policy alone. A sequence ratio is no weight of a token, so under it neither is exact.
        entropy_coef: weight of the entropy bonus.

    Returns:
        Losses ``[N, L]`` in nats; the surrogate's metrics, and ``kl`` and ``kl_clamped`` (with a reference), ``entropy`` (when given).

    Raises:
        ConfigError: ``k1`` as a loss, ``beta`` without reference log-probs, ``entropy_coef`` without entropies, an unknown option.

    Reference: Shao et al., DeepSeekMath, 2024, arXiv 2402.03300, eq. 3 and 4.

    >>> import torch
    >>> zeros, mask = torch.zeros(1, 2), torch.tensor([[True, False]])
    >>> grpo_loss(TokenLossInputs(zeros, zeros, mask, zeros + 1.0, ref_logprobs=zeros - 1.0), beta=1.0, kl_estimator="k2").losses
    tensor([[-0.5000,  0.0000]])
    """
    _check(inputs, beta, kl_estimator, entropy_coef)
    outputs = clipped_surrogate(inputs, clip_low=clip_low, clip_high=clip_high, ratio_level=ratio_level)
    losses, metrics, off = outputs.losses, outputs.metrics, ~inputs.response_mask
    if inputs.ref_logprobs is not None:
        logprobs, ref_logprobs = inputs.logprobs.masked_fill(off, 0.0), inputs.ref_logprobs.masked_fill(off, 0.0)
        if kl_ratio:
            kl = kl_loss(logprobs, ref_logprobs, kl_estimator, importance_ratio(inputs, ratio_level)[1]).masked_fill(off, 0.0)
        else:
            kl = kl_penalty(logprobs, ref_logprobs, kl_estimator)
        losses = losses + beta * kl
        metrics["kl"] = kl.detach()
        metrics["kl_clamped"] = (ref_logprobs - logprobs.detach() > LOG_RATIO_LIMIT).to(kl.dtype)
    if inputs.entropy is not None:
        entropy = inputs.entropy.masked_fill(off, 0.0)
        losses = losses - entropy_coef * entropy
        metrics["entropy"] = entropy.detach()
    return LossOutputs(losses, metrics)


def _check(inputs: TokenLossInputs, beta: float, kl_estimator: str, entropy_coef: float) -> None:
    if kl_estimator == "k1":
        raise ConfigError(
            "kl_estimator k1 does nothing as a loss: on the policy's own samples its expected gradient is 0. "
            "Use k2 or k3 here, or put k1 into the reward"
        )
    if beta and inputs.ref_logprobs is None:
        raise ConfigError(f"beta = {beta} needs the reference policy's log-probs: expected ref_logprobs, found None")
    if entropy_coef and inputs.entropy is None:
        raise ConfigError(f"entropy_coef = {entropy_coef} needs the policy's entropies: expected entropy, found None")

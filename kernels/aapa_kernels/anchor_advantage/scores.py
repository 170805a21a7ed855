"""From sentence logits to a score per response, and to credit per sentence: dispatch, shapes, autograd."""

from typing import NamedTuple

import torch
from torch import Tensor

from aapa_kernels.anchor_advantage import gradients, reference
from aapa_kernels.dispatch import Impl, on_device, resolve


class ResponseScores(NamedTuple):
    """What ``response_scores`` returns.

    Args:
        logits: ``[S]``, sentences without tokens filled in; the argument itself without a floor.
        scores: ``u`` ``[N]``.
    """

    logits: Tensor
    scores: Tensor


def check_offsets(offsets: Tensor, sentences: int) -> None:
    """Raise ValueError for offsets that do not divide the sentences among responses; looked at on the CPU alone."""
    if torch.compiler.is_compiling() or offsets.device.type != "cpu":
        return
    if len(offsets) < 1 or int(offsets[0]) != 0 or int(offsets[-1]) != sentences or bool((offsets.diff() < 1).any()):
        raise ValueError(
            f"offsets must go from 0 to the number of sentences ({sentences}), with at least one sentence a response; "
            f"found {offsets.tolist()[:8]}"
        )


def response_scores(
    logits: Tensor,
    token_counts: Tensor,
    offsets: Tensor,
    *,
    transform: str = "gan_ns",
    tau: float = 1.0,
    pool: str = "mean",
    softmin_temperature: float = 1.0,
    expert_logits: Tensor | None = None,
    floor: float | None = None,
    impl: Impl = "auto",
) -> ResponseScores:
    """Transform the sentences of each response and pool them, in one launch.

    Args:
        logits: ``[S]``, finite.
        token_counts: int64 ``[S]``.
        offsets: int64 ``[N + 1]``: the sentences of response i are ``offsets[i] .. offsets[i + 1] - 1``, at least one.
        transform: ``gan_ns`` log sigma(l / tau), ``score`` l / tau, ``gan_sat`` -log(1 - sigma(l / tau)) or ``bt_gap``
            log sigma((l - l_E) / tau).
        tau: temperature, above 0.
        pool: ``mean``, ``token_mean`` (by tokens), ``min`` or ``softmin`` -T log mean exp(-g / T), exact to a few
            roundings at any T.
        softmin_temperature: T, above 0.
        expert_logits: ``[N]``, ``l_E``, for ``bt_gap``.
        floor: when given, a sentence without tokens takes the mean logit of its response's other sentences first, or the floor where none
            has tokens. Without it every logit is taken as it is.
        impl: ``auto``, ``triton`` or ``reference``.

    Returns:
        Logits and scores, float32 (float64 for float64 logits), differentiable in logits and experts' logits.

    Raises:
        ValueError: an unknown transform or pool, ``bt_gap`` without experts, or (on the CPU) offsets that do not fit.

    >>> response_scores(torch.tensor([1.0, 3.0, -1.0]), torch.tensor([4, 2, 5]), torch.tensor([0, 2, 3]), transform="score").scores
    tensor([ 2., -1.])
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    check_offsets(offsets, len(logits))
    # float32 holds no more extreme temperatures; softmin is min or mean to the last digit long before
    options = (transform, tau, pool, min(max(softmin_temperature, 1e-30), 1e30), floor, impl)
    filled, scores = _response_scores(logits, token_counts, offsets, expert_logits, *options)
    return ResponseScores(logits if floor is None else filled, scores)


def credit_to_go(
    logits: Tensor,
    token_counts: Tensor,
    offsets: Tensor,
    baseline: Tensor,
    *,
    transform: str = "gan_ns",
    tau: float = 1.0,
    expert_logits: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """``sum_{j >= k} w_ij (g_ij - baseline_i)`` with ``w_ij = n_ij / n_i``: what sentence k and its followers bring, in one launch.

    Args:
        logits: ``[S]``.
        token_counts: int64 ``[S]``; all of a response 0 stands for equal weights.
        offsets: int64 ``[N + 1]``.
        baseline: ``[N]``.
        transform: as for ``response_scores``.
        tau: temperature.
        expert_logits: ``[N]``, for ``bt_gap``.
        impl: ``auto``, ``triton`` or ``reference``.

    Returns:
        ``[S]`` float32 (float64 for float64 logits), differentiable in logits, baseline and experts' logits.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    check_offsets(offsets, len(logits))
    return _credit_to_go(logits, token_counts, offsets, baseline.to(logits.dtype), expert_logits, transform, tau, impl)


@torch.library.custom_op("aapa::response_scores", mutates_args=())
def _response_scores(
    logits: Tensor,
    token_counts: Tensor,
    offsets: Tensor,
    expert_logits: Tensor | None,
    transform: str,
    tau: float,
    pool: str,
    temperature: float,
    floor: float | None,
    impl: str,
) -> tuple[Tensor, Tensor]:
    if resolve(impl, logits) == "triton":
        from aapa_kernels.anchor_advantage import fused

        with on_device(logits):
            return fused.response_scores(logits, token_counts, offsets, expert_logits, transform, tau, pool, temperature, floor)
    filled = logits if floor is None else reference.fill_empty(logits, token_counts, offsets, floor)
    experts = None if expert_logits is None else expert_logits[reference.response_of(offsets, len(logits))]
    g = reference.transform_logits(filled, transform, tau, experts)
    return filled if floor is not None else logits.new_empty(0), reference.pool_sentences(g, token_counts, offsets, pool, temperature)


@_response_scores.register_fake
def _(logits, token_counts, offsets, expert_logits, transform, tau, pool, temperature, floor, impl):  # type: ignore[no-untyped-def]  # as above
    return logits.new_empty(0 if floor is None else logits.shape[0]), logits.new_empty(offsets.shape[0] - 1)


_response_scores_backward = torch.library.custom_op("aapa::response_scores_backward", gradients.response_scores_backward, mutates_args=())


@_response_scores_backward.register_fake
def _(filled_grad, score_grad, filled, token_counts, offsets, expert_logits, transform, tau, pool, temperature, fill):  # type: ignore[no-untyped-def]  # as above
    return torch.empty_like(filled), filled.new_empty(offsets.shape[0] - 1 if transform == "bt_gap" else 0)


def _scores_setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]  # torch.library's own context type
    logits, token_counts, offsets, expert_logits, transform, tau, pool, temperature, floor, _ = inputs
    ctx.save_for_backward(logits if floor is None else output[0], token_counts, offsets, expert_logits)
    ctx.options = (transform, tau, pool, temperature, floor is not None)


def _scores_backward(ctx, filled_grad: Tensor, score_grad: Tensor):  # type: ignore[no-untyped-def]  # torch.library's own context type
    filled, token_counts, offsets, expert_logits = ctx.saved_tensors
    grad, expert_grad = _response_scores_backward(filled_grad, score_grad, filled, token_counts, offsets, expert_logits, *ctx.options)
    reads = ctx.options[0] == "bt_gap"
    return grad, None, None, expert_grad.to(expert_logits.dtype) if reads else None, None, None, None, None, None, None


_response_scores.register_autograd(_scores_backward, setup_context=_scores_setup)


@torch.library.custom_op("aapa::credit_to_go", mutates_args=())
def _credit_to_go(
    logits: Tensor,
    token_counts: Tensor,
    offsets: Tensor,
    baseline: Tensor,
    expert_logits: Tensor | None,
    transform: str,
    tau: float,
    impl: str,
) -> Tensor:
    if resolve(impl, logits) == "triton":
        from aapa_kernels.anchor_advantage import fused

        with on_device(logits):
            return fused.credit_to_go(logits, token_counts, offsets, baseline, expert_logits, transform, tau)
    experts = None if expert_logits is None else expert_logits[reference.response_of(offsets, len(logits))]
    return reference.credit_to_go(reference.transform_logits(logits, transform, tau, experts), token_counts, offsets, baseline)


@_credit_to_go.register_fake
def _(logits, token_counts, offsets, baseline, expert_logits, transform, tau, impl):  # type: ignore[no-untyped-def]  # as above
    return torch.empty_like(logits)


_credit_to_go_backward = torch.library.custom_op("aapa::credit_to_go_backward", gradients.credit_to_go_backward, mutates_args=())


@_credit_to_go_backward.register_fake
def _(grad, logits, token_counts, offsets, expert_logits, transform, tau):  # type: ignore[no-untyped-def]  # as above
    rows = offsets.shape[0] - 1
    return torch.empty_like(logits), logits.new_empty(rows), logits.new_empty(rows if transform == "bt_gap" else 0)


def _credit_setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]  # torch.library's own context type
    logits, token_counts, offsets, _, expert_logits, transform, tau, _ = inputs
    ctx.save_for_backward(logits, token_counts, offsets, expert_logits)
    ctx.options = (transform, tau)


def _credit_backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]  # torch.library's own context type
    logits, token_counts, offsets, expert_logits = ctx.saved_tensors
    logit_grad, baseline_grad, expert_grad = _credit_to_go_backward(grad, logits, token_counts, offsets, expert_logits, *ctx.options)
    reads = ctx.options[0] == "bt_gap"
    return logit_grad, None, None, baseline_grad, expert_grad.to(expert_logits.dtype) if reads else None, None, None, None


_credit_to_go.register_autograd(_credit_backward, setup_context=_credit_setup)

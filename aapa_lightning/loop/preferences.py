"""Batches of preference pairs and labelled responses: tokens, one forward, the inputs of a preference objective."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from aapa_lightning.types import Demonstration, GatherOverRanks, LabelLossInputs, PairLossInputs, Record

#: Sums of the log-probs of responses, float32 ``[R]`` nats, without gradient.
ResponseLogprobs = Callable[[Sequence[Demonstration]], Tensor]


@dataclass(frozen=True, slots=True)
class Preference:
    """A record's chosen and rejected response, tokenised; one of them may be missing where single responses are labelled.

    Args:
        chosen: the preferred (or desirable) response.
        rejected: the other (or undesirable) one.
        record: where they came from.
        before: a response to the prompt of the record before it in the optimiser step, where single responses are labelled.
    """

    chosen: Demonstration | None
    rejected: Demonstration | None
    record: Record
    before: Demonstration | None = None


def preferred_texts(record: Record) -> list[tuple[str, str]]:
    """The chosen and the rejected response that a record has, by name."""
    return [(f"{name} response", text) for name in ("chosen", "rejected") if (text := getattr(record, name)) is not None]


def responses_of(rows: Sequence[Preference]) -> list[Demonstration]:
    """Every chosen response, then every rejected one: the order of ``R`` in all that follows."""
    sides = [row.chosen for row in rows], [row.rejected for row in rows]
    return [response for side in sides for response in side if response is not None]


def count_preferences(rows: Sequence[Preference], labels: bool) -> Tensor:
    """int64 ``[2]``: tokens of the chosen responses, and losses: pairs, or labelled responses."""
    tokens = [sum(row.chosen.response_mask[1:]) for row in rows if row.chosen is not None]
    return torch.tensor([sum(tokens), len(responses_of(rows)) if labels else len(rows)])


def pair_inputs(
    rows: Sequence[Preference],
    logprobs: Tensor,
    lengths: Tensor,
    *,
    reference: ResponseLogprobs | None,
    log_ratios: Tensor | None,
    stressed_margins: Tensor | None,
    gather: GatherOverRanks,
) -> PairLossInputs:
    """Inputs of an objective over pairs.

    Args:
        rows: ``B`` pairs.
        logprobs: float32 ``[2B]``, the policy's sums, in the order of ``responses_of``.
        lengths: int64 ``[2B]``, response tokens.
        reference: the reference, or None.
        log_ratios: not used here.
        stressed_margins: float32 ``[B]`` or None.
        gather: over ranks.
    """
    half = len(rows)
    ref = reference(responses_of(rows)) if reference is not None else None
    return PairLossInputs(
        chosen_logprobs=logprobs[:half],
        rejected_logprobs=logprobs[half:],
        chosen_lengths=lengths[:half],
        rejected_lengths=lengths[half:],
        ref_chosen_logprobs=None if ref is None else ref[:half],
        ref_rejected_logprobs=None if ref is None else ref[half:],
        stressed_margins=stressed_margins,
        gather=gather,
    )


def label_inputs(
    rows: Sequence[Preference],
    logprobs: Tensor,
    lengths: Tensor,
    *,
    reference: ResponseLogprobs | None,
    log_ratios: Tensor | None,
    stressed_margins: Tensor | None,
    gather: GatherOverRanks,
) -> LabelLossInputs:
    """Inputs of an objective over labelled responses; arguments as of ``pair_inputs``, with ``R`` responses in the place of ``2B``.

    ``log_ratios`` float32 ``[K]`` are those of ``mismatched_log_ratios``.
    """
    if reference is None or log_ratios is None:
        raise RuntimeError("an objective over labelled responses has a reference, and log-ratios of mismatched ones")
    responses = responses_of(rows)
    labels = torch.arange(len(responses), device=logprobs.device) < sum(row.chosen is not None for row in rows)
    return LabelLossInputs(logprobs, reference(responses), labels, log_ratios, gather)


def in_a_ring(rows: Sequence[Preference], before: Preference) -> list[Preference]:
    """The rows, each with a response of the row before it; ``before`` comes before the first."""
    return [replace(row, before=_either(other)) for row, other in zip(rows, [before, *rows], strict=False)]


def _either(row: Preference) -> Demonstration:
    return next(side for side in (row.chosen, row.rejected) if side is not None)


def mismatched(rows: Sequence[Preference]) -> list[Demonstration]:
    """Every response, in the order of ``responses_of``, under the prompt of the record before its own."""
    sides = ([(row.before, row.chosen) for row in rows], [(row.before, row.rejected) for row in rows])
    return [_joined(other, response) for side in sides for other, response in side if other is not None and response is not None]


def mismatched_log_ratios(slices: Sequence[Sequence[Preference]], policy: ResponseLogprobs, reference: ResponseLogprobs | None) -> Tensor:
    """``log pi - log pi_ref`` of a whole optimiser step's mismatched responses on this rank, so that its cuts change nothing.

    Args:
        slices: the rows of every micro-step.
        policy: the policy's sums, without gradient.
        reference: the reference's.

    Returns:
        float32 ``[K]`` nats.
    """
    if reference is None:
        raise RuntimeError("an objective over labelled responses has a reference")
    found = torch.cat([policy(others) - reference(others) for others in map(mismatched, slices)])
    torch.clear_autocast_cache()  # casts made without a graph must not serve the loss, see loop/collect.py
    return found


def _joined(prompt: Demonstration, response: Demonstration) -> Demonstration:
    head, tail = prompt.response_mask.index(True), response.response_mask.index(True)
    tokens, learned = response.input_ids[tail:], response.response_mask[tail:]
    return replace(prompt, input_ids=prompt.input_ids[:head] + tokens, response_mask=[False] * head + learned)

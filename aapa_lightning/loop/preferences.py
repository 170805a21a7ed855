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
    """

    chosen: Demonstration | None
    rejected: Demonstration | None
    record: Record


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
    policy: ResponseLogprobs,
    reference: ResponseLogprobs | None,
    stressed_margins: Tensor | None,
    gather: GatherOverRanks,
) -> PairLossInputs:
    """Inputs of an objective over pairs.

    Args:
        rows: ``B`` pairs.
        logprobs: float32 ``[2B]``, the policy's sums, in the order of ``responses_of``.
        lengths: int64 ``[2B]``, response tokens.
        policy: the policy without gradient; not used here.
        reference: the reference, or None.
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
    policy: ResponseLogprobs,
    reference: ResponseLogprobs | None,
    stressed_margins: Tensor | None,
    gather: GatherOverRanks,
) -> LabelLossInputs:
    """Inputs of an objective over labelled responses; arguments as of ``pair_inputs``, with ``R`` responses in the place of ``2B``.

    Every response of the micro-step gives a mismatched one, under another record's prompt.
    """
    if reference is None:
        raise RuntimeError("an objective over labelled responses has a reference")
    responses, others = responses_of(rows), mismatched(rows)
    labels = torch.arange(len(responses), device=logprobs.device) < sum(row.chosen is not None for row in rows)
    log_ratios = policy(others) - reference(others)
    return LabelLossInputs(logprobs, reference(responses), labels, log_ratios, gather)


def mismatched(rows: Sequence[Preference]) -> list[Demonstration]:
    """Every response, in the order of ``responses_of``, under the prompt of the record before its own; the first under the last one's."""
    prompts = [next(side for side in (row.chosen, row.rejected) if side is not None) for row in rows]
    before = prompts[-1:] + prompts[:-1]
    sides = (zip(before, [row.chosen for row in rows], strict=True), zip(before, [row.rejected for row in rows], strict=True))
    return [_joined(prompt, response) for side in sides for prompt, response in side if response is not None]


def _joined(prompt: Demonstration, response: Demonstration) -> Demonstration:
    head, tail = prompt.response_mask.index(True), response.response_mask.index(True)
    tokens, learned = response.input_ids[tail:], response.response_mask[tail:]
    return replace(prompt, input_ids=prompt.input_ids[:head] + tokens, response_mask=[False] * head + learned)

"""Figures of a discriminator, and the held-out responses that they are of."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from aapa_lightning.anchor.head import fill_unseen
from aapa_lightning.anchor.training import EncodedExamples
from aapa_lightning.metrics.functional.discrimination import Judged, discrimination


def choosing_responses(encoded: Mapping[str, EncodedExamples], choosing: Collection[int]) -> Tensor:
    """Responses bool ``[N]`` of ``val`` that choose the epoch and the temperature: none whose prompt or text trained.

    Args:
        encoded: the splits; ``val`` must be there.
        choosing: keys of the prompts that choose.
    """
    examples = encoded["val"]
    chosen = torch.isin(examples.groups, torch.tensor(sorted(choosing), dtype=torch.int64))
    return chosen & ~examples.met_in(encoded["train"]) if "train" in encoded else chosen


def reported_responses(encoded: Mapping[str, EncodedExamples], choosing: Collection[int], split: str) -> Tensor:
    """Responses bool ``[N]`` of a split that neither trained nor chose anything, by prompt and by text; arguments as above."""
    examples = encoded[split]
    met = torch.zeros(len(examples), dtype=torch.bool)
    if "train" in encoded:
        met |= examples.met_in(encoded["train"])
    if "val" in encoded:
        met |= examples.met_in(encoded["val"], choosing_responses(encoded, choosing))
    return ~met


def figures_of(examples: EncodedExamples, logits: Tensor, floor: Tensor, chosen: Tensor, *, resamples: int, seed: int) -> dict[str, float]:
    """Figures of some responses, each judged by the head of its prompt's fold, and the number of prompts; none without both classes.

    Args:
        examples: ``N`` responses with ``S`` sentences.
        logits: ``[K, S]``.
        floor: ``[K]``, of responses of which nothing is seen.
        chosen: bool ``[N]``, the responses to judge.
        resamples: see ``discrimination``.
        seed: see ``discrimination``.
    """
    if not (bool(chosen[examples.labels].any()) and bool(chosen[~examples.labels].any())):
        return {}
    single = examples.held_out(fill_unseen(logits, examples.unseen_as_embedded(), floor))
    rows = examples.judged_sentences()
    judged = Judged(single[rows], examples.response_index[rows], examples.labels, examples.groups, examples.lengths).within(chosen)
    return {"prompts": len(judged.groups.unique())} | discrimination(judged, resamples=resamples, seed=seed)


def warn_of_met(val: EncodedExamples, train: EncodedExamples) -> None:
    """Warn where training has all held-out expert responses, or all others, by prompt or by text."""
    unmet = ~val.met_in(train)
    if not (bool(unmet[val.labels].any()) and bool(unmet[~val.labels].any())):
        rank_zero_warn(
            "held-out prompts: all expert responses, or all others, have a prompt or a text that training has too, so there are no "
            "figures and the last epoch is kept; name prompts that training does not have in `val`"
        )


def report(metrics: dict[str, float]) -> str:
    """Figures as lines of text, intervals in brackets, and the prompts that they are of."""
    lines = ["held-out figures of the discriminator (95% interval)"]
    if "prompts" in metrics:
        chose = metrics.get("choosing_prompts", 0)
        others = f"; {chose:.0f} others chose the epoch or fitted the temperature" if chose else ""
        lines[0] += f", of {metrics['prompts']:.0f} held-out prompts that chose nothing{others}"
    for name, value in metrics.items():
        if not name.endswith(("_low", "_high", "prompts")):
            low, high = metrics.get(f"{name}_low"), metrics.get(f"{name}_high")
            lines.append(f"  {name:<24}{value:.3f}" + (f"  [{low:.3f}, {high:.3f}]" if low is not None and high is not None else ""))
    return "\n".join(lines)

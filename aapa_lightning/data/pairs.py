"""Preference pairs: checked, made out of responses, made noisy; and the best response of several."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import permutations
from typing import Any, NamedTuple

from aapa_lightning.data.dialects import prompt_hash
from aapa_lightning.data.responses import Response, join_responses
from aapa_lightning.errors import ConfigError, DataError, choose
from aapa_lightning.thinking import Thinking
from aapa_lightning.types import Record


def require_pairs(records: Sequence[Record], why: str) -> None:
    """Raise DataError unless every record has a chosen response that is not blank and another rejected one, which may be empty.

    Args:
        records: the dataset.
        why: what needs them, such as ``"DPO compares two responses"``.
    """
    for record in records:
        if problem := _problem(record):
            raise DataError(
                f"{record.source}: {problem}, but {why}; mend the row, or leave such rows out with 'aapa data pairs --chosen given'"
            )


def require_labels(records: Sequence[Record], why: str) -> None:
    """Raise DataError unless every record has a chosen or a rejected response and both kinds occur.

    Args:
        records: the dataset.
        why: what needs them, such as ``"KTO learns from labelled responses"``.
    """
    counts = {"chosen": 0, "rejected": 0}
    for record in records:
        if record.chosen is None and record.rejected is None:
            label = record.extra.get("label")
            found = "" if label is None else f" (its 'label' is {label!r:.40}, expected true or false)"
            raise DataError(
                f"{record.source}: no labelled response{found}, but {why}; write 'completion' and 'label' (true or false), "
                "or 'chosen' or 'rejected'"
            )
        if record.chosen is not None and not record.chosen.strip():
            raise DataError(f"{record.source}: empty chosen, but {why}; remove the row or fill it in")
        counts["chosen"] += record.chosen is not None
        counts["rejected"] += record.rejected is not None
    for name, label in (("chosen", "true"), ("rejected", "false")):
        if not counts[name]:
            raise DataError(
                f"{_file_of(records)}: no response is labelled {label}, but {why}; expected both labels, found {counts}: "
                f"add {name} responses"
            )


def _problem(record: Record) -> str | None:
    """What keeps a record from being a pair."""
    if record.chosen is None or record.rejected is None:
        missing = [name for name in ("chosen", "rejected") if getattr(record, name) is None]
        return f"no {' and no '.join(missing)}"
    if not record.chosen.strip():
        return "empty chosen"
    return "chosen and rejected are the same" if record.chosen == record.rejected else None


def _file_of(records: Sequence[Record]) -> str:
    return records[0].source.rpartition(":")[0] or records[0].source if records else "the dataset"


@dataclass(slots=True)
class Joined:
    """Responses of each record that are of use, and how many are not.

    Args:
        responses: a list for each record, file by file.
        read: responses in all files.
        other_prompts: of these, answers to prompts that are not among the records.
        truncated: of these, answers that were left out because the length limit stopped them.
    """

    responses: list[list[Response]] = field(default_factory=list)
    read: int = 0
    other_prompts: int = 0
    truncated: int = 0


def join_files(
    records: Sequence[Record], files: Sequence[Sequence[Response]], *, limit: int | None = None, keep_truncated: bool = False
) -> Joined:
    """Join response files with records.

    Args:
        records: the prompts.
        files: responses of each file.
        limit: keep the first so many responses of a record; None keeps all.
        keep_truncated: keep those that the length limit stopped.

    Raises:
        DataError: a file answers none of the records, or its keys are those of another dataset.
    """
    joined = Joined([[] for _ in range(len(records))], sum(map(len, files)))
    for responses in files:
        matched: dict[int, bool] = {}
        for own, found in zip(joined.responses, join_responses(records, responses), strict=True):
            matched |= {id(response): response.truncated for response in found}
            own.extend(response for response in found if keep_truncated or not response.truncated)
        joined.other_prompts += len(responses) - len(matched)
        joined.truncated += 0 if keep_truncated else sum(matched.values())
    if limit is not None:
        for own in joined.responses:
            del own[limit:]
    return joined


class Scored(NamedTuple):
    """A response and its score; higher is better."""

    response: Response
    score: float


def given_pairs(record: Record) -> list[Record]:
    """The record itself where it is a pair to train on, else nothing."""
    return [] if _problem(record) else [record]


def expert_pairs(record: Record, responses: Sequence[Response]) -> list[Record]:
    """Every expert response of a record chosen over every response that says something else."""
    return [
        replace(record, chosen=expert, rejected=response.text)
        for expert in record.experts
        for response in responses
        if expert.strip() and expert != response.text
    ]


def scored_pairs(record: Record, scored: Sequence[Scored], pairing: str = "best-worst", margin: float = 0.0) -> list[Record]:
    """Pairs of responses with different scores, which go into ``extra`` as ``score_chosen`` and ``score_rejected``.

    Equal scores and equal texts make no pair. A response that is truncated or has no answer is never chosen. Of equally
    good ones the first counts.

    Args:
        record: what they answer.
        scored: its responses.
        pairing: ``best-worst``, ``best-rest`` or ``all``.
        margin: least difference of the scores.

    Raises:
        ConfigError: an unknown pairing.
    """
    pairs = choose(PAIRINGS, pairing, "pairs")(scored)
    return [
        replace(
            record,
            chosen=chosen.response.text,
            rejected=rejected.response.text,
            extra={**record.extra, "score_chosen": chosen.score, "score_rejected": rejected.score},
        )
        for chosen, rejected in pairs
        if _beats(chosen, rejected, margin)
    ]


def best(scored: Sequence[Scored]) -> Scored | None:
    """The first response with the highest score among those that have an answer and are not truncated; None where there is none."""
    return max((one for one in scored if _may_be_chosen(one.response)), key=lambda one: one.score, default=None)


def _may_be_chosen(response: Response) -> bool:
    return not response.truncated and bool(Thinking().answer(response.text, response.prompt_end).strip())


def _beats(chosen: Scored, rejected: Scored, margin: float) -> bool:
    gap = chosen.score - rejected.score
    # 0.3 - 0.2 is a gap of 0.1
    wide = gap > 0 and (gap >= margin or math.isclose(gap, margin))
    return wide and chosen.response.text != rejected.response.text and _may_be_chosen(chosen.response)


def _best_worst(scored: Sequence[Scored]) -> list[tuple[Scored, Scored]]:
    top = best(scored)
    worst = min((one for one in scored if top and one.response.text != top.response.text), key=lambda one: one.score, default=None)
    return [(top, worst)] if top and worst else []


def _best_rest(scored: Sequence[Scored]) -> list[tuple[Scored, Scored]]:
    top = best(scored)
    return [(top, one) for one in scored] if top else []


def _all(scored: Sequence[Scored]) -> Iterator[tuple[Scored, Scored]]:
    return permutations(scored, 2)


#: Which responses are held against each other; ``_beats`` leaves out the pairs that say nothing.
PAIRINGS: dict[str, Callable[[Sequence[Scored]], Any]] = {"best-worst": _best_worst, "best-rest": _best_rest, "all": _all}

#: Which pairs may be flipped, beside that an empty response is never chosen.
FLIPS: dict[str, Callable[[str, str], bool]] = {
    "random": lambda chosen, rejected: True,
    "length": lambda chosen, rejected: len(rejected) > len(chosen),
}


def flip_pairs(pairs: Sequence[Record], rate: float, *, how: str = "random", seed: int = 0) -> list[Record]:
    """Exchange chosen and rejected of ``round(rate * pairs)`` pairs, or of all that may be flipped where these are fewer.

    Those with the smallest hash of (seed, prompt, responses) are flipped, so the order of the pairs does not matter, and a higher rate
    flips the same pairs and more. ``extra`` says ``flipped`` of every pair; ``score_chosen`` and ``score_rejected`` go along.

    Args:
        pairs: records with both responses.
        rate: share of all pairs, in [0, 1].
        how: ``random``, or ``length``: only pairs whose rejected response has more characters.
        seed: another seed, other pairs.

    Raises:
        ConfigError: a rate outside [0, 1], or an unknown ``how``.
        DataError: pairs that were flipped before.
    """
    if not 0 <= rate <= 1:
        raise ConfigError(f"flip rate: expected a number in [0, 1], found {rate}")
    may_flip = choose(FLIPS, how, "flip")
    eligible = []
    for i, pair in enumerate(pairs):
        if "flipped" in pair.extra:
            raise DataError(f"{pair.source}: has a column 'flipped' already; expected pairs as they were made: flip those")
        if (pair.rejected or "").strip() and may_flip(pair.chosen or "", pair.rejected or ""):
            eligible.append(i)
    eligible.sort(key=lambda i: _pair_rank(seed, pairs[i]))
    flipped = set(eligible[: round(rate * len(pairs))])
    return [_flipped(pair) if i in flipped else replace(pair, extra={**pair.extra, "flipped": False}) for i, pair in enumerate(pairs)]


def _pair_rank(seed: int, pair: Record) -> bytes:
    return hashlib.sha256(json.dumps([seed, prompt_hash(pair.prompt), pair.chosen, pair.rejected]).encode()).digest()


def _flipped(pair: Record) -> Record:
    scores = {}
    if {"score_chosen", "score_rejected"} <= pair.extra.keys():
        scores = {"score_chosen": pair.extra["score_rejected"], "score_rejected": pair.extra["score_chosen"]}
    return replace(pair, chosen=pair.rejected, rejected=pair.chosen, extra={**pair.extra, **scores, "flipped": True})

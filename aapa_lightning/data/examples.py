"""What a discriminator is trained on: expert responses, and responses that are not."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from aapa_lightning.data.records import prompt_hash, require_experts
from aapa_lightning.data.responses import join_responses, read_responses
from aapa_lightning.errors import DataError
from aapa_lightning.types import Record


@dataclass(frozen=True, slots=True)
class Example:
    """A response with its label.

    Args:
        record: the record whose prompt the response is judged against.
        text: the response.
        kind: ``expert`` is the positive class; ``response`` (of a policy or another model) and ``other_prompt`` (an expert's response
            to another prompt) are negatives.
        prompt_end: as in ``Response``.
    """

    record: Record
    text: str
    kind: Literal["expert", "response", "other_prompt"]
    prompt_end: str = ""


def prompt_key(record: Record) -> int:
    """Equal for records with equal prompts; fits into int64."""
    return int(prompt_hash(record.prompt)[:15], 16)


def choosing_prompts(records: Sequence[Record]) -> frozenset[int]:
    """Keys of every second prompt, in the order of their hashes: those that may choose an epoch, so that the others can be reported."""
    return frozenset(sorted(set(map(prompt_key, records)))[::2])


def text_key(text: str) -> int:
    """Equal for equal texts, whatever their white space; fits into int64."""
    return int(hashlib.sha256(" ".join(text.split()).encode("utf-8", "surrogatepass")).hexdigest()[:15], 16)


def build_examples(
    records: Sequence[Record],
    negatives: Sequence[str],
    *,
    other_prompts: float,
    seed: int,
    part: Callable[[Record], int] = lambda record: 0,
) -> list[Example]:
    """Positives and the three kinds of negatives of some records.

    Args:
        records: each with at least one expert response.
        negatives: response files: rollouts of the base policy at several temperatures, responses of other models.
        other_prompts: negatives made of expert responses to other prompts, per record; 0 for none.
        seed: of the pairing of records for ``other_prompts``.
        part: the part of the records, such as the cross-fitting fold, that a record belongs to. Its ``other_prompts`` come from its own
            part, so that no text is an example in two of them.

    Raises:
        DataError: a record has no expert response, a file matches no record, or there is nothing negative.
    """
    require_experts(records, "the discriminator's positives are expert responses")
    kept = list(records)
    examples = [Example(record, text, "expert") for record in kept for text in record.experts]
    for path in negatives:
        for record, responses in zip(kept, join_responses(kept, read_responses(path)), strict=True):
            examples += [Example(record, response.text, "response", response.prompt_end) for response in responses]
    examples += _mismatched(kept, round(other_prompts * len(kept)), seed, part)
    if all(example.kind == "expert" for example in examples):
        raise DataError(
            "the discriminator has no negatives: name response files in 'negatives', or set 'other_prompts' above 0, which needs two "
            "different prompts in each fold"
        )
    return examples


def _mismatched(records: list[Record], count: int, seed: int, part: Callable[[Record], int]) -> list[Example]:
    """Walk round shuffled circles, one for each part: each record gets an expert response of the next one, then of the one after.

    A response that is also an expert's to the record's own prompt is no negative and is left out.
    """
    order = list(range(len(records)))
    random.Random(seed).shuffle(order)  # noqa: S311 - not for security
    parts, keys = [part(record) for record in records], [prompt_key(record) for record in records]
    circles: dict[int, list[int]] = {}
    places: dict[int, int] = {}
    for i in order:
        circle = circles.setdefault(parts[i], [])
        places[i] = len(circle)
        circle.append(i)
    own: dict[int, set[int]] = {}
    for key, record in zip(keys, records, strict=True):
        own.setdefault(key, set()).update(map(text_key, record.experts))
    out = []
    for turn in range(count):
        shift, position = divmod(turn, len(order))
        i = order[position]
        circle = circles[parts[i]]
        other = records[circle[(places[i] + shift + 1) % len(circle)]]
        text = other.experts[turn % len(other.experts)]
        if keys[i] != prompt_key(other) and text_key(text) not in own[keys[i]]:
            out.append(Example(records[i], text, "other_prompt"))
    return out

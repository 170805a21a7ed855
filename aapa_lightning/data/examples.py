"""What a discriminator is trained on: expert responses, and responses that are not."""

from __future__ import annotations

import random
from collections.abc import Sequence
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


def build_examples(records: Sequence[Record], negatives: Sequence[str], *, other_prompts: float, seed: int) -> list[Example]:
    """Positives and the three kinds of negatives of some records.

    Args:
        records: each with at least one expert response.
        negatives: response files: rollouts of the base policy at several temperatures, responses of other models.
        other_prompts: negatives made of expert responses to other prompts, per record; 0 for none.
        seed: of the pairing of records for ``other_prompts``.

    Raises:
        DataError: a record has no expert response, a file matches no record, or there is nothing negative.
    """
    require_experts(records, "the discriminator's positives are expert responses")
    kept = list(records)
    examples = [Example(record, text, "expert") for record in kept for text in record.experts]
    for path in negatives:
        for record, responses in zip(kept, join_responses(kept, read_responses(path)), strict=True):
            examples += [Example(record, response.text, "response", response.prompt_end) for response in responses]
    examples += _mismatched(kept, round(other_prompts * len(kept)), seed)
    if all(example.kind == "expert" for example in examples):
        raise DataError("the discriminator has no negatives: name response files in 'negatives', or set 'other_prompts' above 0")
    return examples


def _mismatched(records: list[Record], count: int, seed: int) -> list[Example]:
    """Walk round a shuffled circle: each record gets an expert response of the next one, then of the one after."""
    order = list(range(len(records)))
    random.Random(seed).shuffle(order)  # noqa: S311 - not for security
    out = []
    for turn in range(count):
        shift, position = divmod(turn, len(order))
        record, other = records[order[position]], records[order[(position + shift + 1) % len(order)]]
        if prompt_hash(record.prompt) != prompt_hash(other.prompt):
            out.append(Example(record, other.experts[turn % len(other.experts)], "other_prompt"))
    return out

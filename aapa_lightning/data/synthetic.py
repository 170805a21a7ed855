"""A synthetic instruction world: prompts with verifiable constraints, an expert, and an objective measure of well-formedness.

A prompt reads: Describe the harbor in 3 sentences, using calmly and bright, ending with "at dawn". The expert answers with sentences of a
small grammar (``world_grammar``). ``ConstraintReward`` checks the constraints and nothing else, so a policy can game it with text that the
expert would never write. ``WellFormedness`` and ``TrueSuccess`` see that: they are for evaluation only, no reward and no discriminator uses
them.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from aapa_lightning.data.jsonl import write_jsonl
from aapa_lightning.data.world_grammar import ADJECTIVES, ADVERBS, TIMES, TOPICS, derives, sample_sentence
from aapa_lightning.errors import ConfigError, DataError
from aapa_lightning.files import whole_folder
from aapa_lightning.rewards.base import Reward
from aapa_lightning.types import Instruction, Record

#: Share of prompts in each split; a prompt belongs to one split for ever, whatever the seed.
SPLITS = {"train": range(8), "val": range(8, 9), "test": range(9, 10)}
SENTENCE_COUNTS = (2, 3, 4)
#: Chance of a second must-use word, and of a required ending.
SECOND_WORD_RATE = 0.5
ENDING_RATE = 0.5

_SENTENCE = re.compile(r"[^.!?]*[.!?]+|[^.!?]+$")


@dataclass(frozen=True, slots=True)
class Judgement:
    """What the world says about one response.

    Args:
        constraint_accuracy: share of the record's instructions that hold, in [0, 1].
        well_formed: share of the response's sentences that the grammar of the prompt's topic derives; 0 for an empty response.
        true_success: all constraints met and every sentence well formed.
    """

    constraint_accuracy: float
    well_formed: float
    true_success: bool


def split_of(prompt: str) -> str:
    """The split that a prompt belongs to, from a hash of its text."""
    bucket = hashlib.sha256(prompt.encode()).digest()[0] % 10
    return next(name for name, buckets in SPLITS.items() if bucket in buckets)


def generate_records(n: int, seed: int, split: str) -> list[Record]:
    """Draw ``n`` different prompts of a split, each with one expert response.

    Args:
        n: number of records.
        seed: seed of prompts and responses; the same arguments give the same records.
        split: ``train``, ``val`` or ``test``; no prompt occurs in two splits.

    Raises:
        ConfigError: unknown split, or more prompts asked for than the split has.
    """
    if split not in SPLITS:
        raise ConfigError(f"Expected a split among {', '.join(SPLITS)}, found {split!r}.")
    rng = random.Random(f"{seed}/{split}")  # noqa: S311 - a reproducible world, not a secret
    records: dict[str, Record] = {}
    misses = 0
    while len(records) < n:
        record = _draw(rng, key=f"{split}-{len(records)}", split=split)
        if isinstance(record.prompt, str) and split_of(record.prompt) == split and record.prompt not in records:
            records[record.prompt] = record
            misses = 0
            continue
        misses += 1
        if misses > 10_000:
            raise ConfigError(f"Expected at most {len(records)} prompts in the {split} split, found a request for {n}. Ask for fewer.")
    return list(records.values())


def _draw(rng: random.Random, key: str, split: str) -> Record:
    topic = rng.choice(list(TOPICS))
    count = rng.choice(SENTENCE_COUNTS)
    words = rng.sample(ADJECTIVES + ADVERBS, 2 if rng.random() < SECOND_WORD_RATE else 1)
    ending = rng.choice(TIMES) if rng.random() < ENDING_RATE else None
    prompt = f"Describe the {topic} in {count} sentences, using {' and '.join(words)}" + (f', ending with "{ending}".' if ending else ".")
    instructions = [
        Instruction("length_constraints:number_sentences", {"relation": "at least", "num_sentences": count}),
        Instruction("length_constraints:number_sentences", {"relation": "less than", "num_sentences": count + 1}),
        *(Instruction("keywords:existence", {"keywords": [word]}) for word in words),
        *([Instruction("startend:end_checker", {"end_phrase": f"{ending}."})] if ending else []),
    ]
    return Record(
        prompt=prompt,
        experts=(_expert(rng, topic, count, words, ending),),
        instructions=tuple(instructions),
        key=key,
        extra={"topic": topic},
        source=f"<synthetic {split}>",
    )


def _expert(rng: random.Random, topic: str, count: int, words: Sequence[str], ending: str | None) -> str:
    forced: list[dict[str, str]] = [{} for _ in range(count)]
    for word in words:
        slot = "adjective" if word in ADJECTIVES else "adverb"
        rng.choice([slots for slots in forced if slot not in slots])[slot] = word
    if ending:
        forced[-1]["time"] = ending
    return " ".join(sample_sentence(rng, topic, slots) for slots in forced)


def split_sentences(text: str) -> list[str]:
    """Sentences of a response: stretches ended by ``.``, ``!`` or ``?``, and what is left at the end."""
    return [sentence for match in _SENTENCE.finditer(text) if (sentence := match.group().strip())]


def _holds(instruction: Instruction, response: str, record: Record) -> bool:
    kwargs = instruction.kwargs
    match instruction.id:
        case "length_constraints:number_sentences":
            found, asked = len(split_sentences(response)), int(kwargs["num_sentences"])
            return found >= asked if kwargs["relation"] == "at least" else found < asked
        case "keywords:existence":
            return all(re.search(rf"\b{re.escape(word)}\b", response, re.IGNORECASE) for word in kwargs["keywords"])
        case "startend:end_checker":
            return response.strip().lower().endswith(str(kwargs["end_phrase"]).lower())
    raise DataError(
        f"{record.source}: expected an instruction of the synthetic world, found {instruction.id!r}. Use the verifiable reward."
    )


def judge(record: Record, response: str) -> Judgement:
    """Judge one response against its record.

    Raises:
        DataError: the record is not one of this world.
    """
    topic = record.extra.get("topic")
    if topic not in TOPICS or not record.instructions:
        raise DataError(
            f"{record.source}: expected a record of the synthetic world (column 'topic' and instructions), found topic {topic!r}."
        )
    held = [_holds(instruction, response, record) for instruction in record.instructions]
    sentences = split_sentences(response)
    formed = sum(derives(topic, sentence) for sentence in sentences) / max(len(sentences), 1)
    # The grammar joins sentences by one space: text around or between them that is not a sentence would slip through a per-sentence count.
    success = all(held) and formed == 1.0 and response.strip() == " ".join(sentences)
    return Judgement(sum(held) / len(held), formed, success)


class _Judge(Reward):
    """A reward-like view of one figure of the judgement."""

    name = ""
    figure = ""

    def __call__(self, responses: Sequence[str], records: Sequence[Record]) -> list[float]:
        """Judge ``N`` responses: ``N`` numbers in [0, 1]."""
        return [float(getattr(judge(record, response), self.figure)) for response, record in zip(responses, records, strict=True)]


class ConstraintReward(_Judge):
    """Share of the constraints that hold: the reward of the quickstart, blind to grammar and topic."""

    name = "constraints"
    figure = "constraint_accuracy"


class ConstraintAccuracy(_Judge):
    """Share of the constraints that hold, as a metric."""

    name = "constraint_accuracy"
    figure = "constraint_accuracy"


class WellFormedness(_Judge):
    """Share of sentences that the expert's grammar derives, on topic (evaluation only)."""

    name = "well_formedness"
    figure = "well_formed"


class TrueSuccess(_Judge):
    """All constraints met and every sentence well formed (evaluation only)."""

    name = "true_success"
    figure = "true_success"


def write_world(folder: str | Path, *, train: int = 2000, val: int = 200, test: int = 200, seed: int = 0, vocab_size: int = 600) -> Path:
    """Write ``train.jsonl``, ``val.jsonl``, ``test.jsonl`` and ``tokenizer/``.

    Args:
        folder: created where missing.
        train: records in the training split.
        val: records in the validation split.
        test: records in the test split.
        seed: seed of the world.
        vocab_size: upper bound on the tokenizer's vocabulary; it is trained on the training split and has no chat template.

    Returns:
        The folder.
    """
    from aapa_lightning.data.tokenizer import train_tokenizer

    folder = Path(folder)
    with whole_folder(folder) as new:
        for split, n in {"train": train, "val": val, "test": test}.items():
            write_jsonl(new / f"{split}.jsonl", _rows(generate_records(n, seed, split)))
        texts = [text for record in generate_records(train, seed, "train") for text in (str(record.prompt), *record.experts)]
        train_tokenizer(texts, vocab_size, chat_template=None).save_pretrained(new / "tokenizer")
    return folder


def _rows(records: Sequence[Record]) -> Iterator[dict[str, object]]:
    for record in records:
        instructions = [{"id": instruction.id, "kwargs": dict(instruction.kwargs)} for instruction in record.instructions]
        yield {"key": record.key, "prompt": record.prompt, "expert": list(record.experts), "instructions": instructions, **record.extra}

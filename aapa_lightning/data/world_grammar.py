"""The expert's grammar in the synthetic world: a lexicon for each topic, a sampler of sentences and a recogniser.

Every sentence is ``subject verb [adverb] [place] [time] .`` with the subject and the verb agreeing in number and both from the topic:

    sentence  = singular | plural
    singular  = ("The" | "Every" | "This") [adjective] noun verb"s" rest "."
    plural    = ("The" | "Two" | "Many" | "These") [adjective] noun"s" verb rest "."
    rest      = [adverb] [preposition "the" (noun | noun"s")] [time]

Nouns and verbs belong to one topic; adjectives, adverbs, prepositions and times to all.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from functools import cache

#: topic -> (nouns, verbs); plurals and third persons are formed with a plain "s".
TOPICS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "harbor": (("gull", "boat", "sailor", "crane", "sail"), ("drift", "rest", "sway", "call", "creak")),
    "forest": (("owl", "pine", "fern", "hawk", "bear"), ("hide", "climb", "grow", "hunt", "sleep")),
    "market": (("vendor", "stall", "cart", "buyer", "coin"), ("shout", "trade", "turn", "shine", "roll")),
    "kitchen": (("cook", "kettle", "oven", "spoon", "pot"), ("boil", "steam", "bake", "clink", "hum")),
    "garden": (("rose", "bee", "vine", "bird", "snail"), ("bloom", "dance", "spread", "sing", "crawl")),
    "station": (("train", "porter", "clock", "guard", "signal"), ("wait", "arrive", "tick", "leave", "blink")),
}
ADJECTIVES = ("bright", "quiet", "old", "small", "busy", "cold", "golden", "gentle")
ADVERBS = ("calmly", "slowly", "softly", "loudly", "gladly", "rarely", "quickly", "silently")
PREPOSITIONS = ("near", "beside", "behind", "above")
TIMES = ("at dawn", "at night", "in winter", "in spring", "after rain", "before noon")
SINGULAR = ("The", "Every", "This")
PLURAL = ("The", "Two", "Many", "These")

#: How often the expert fills a slot that nothing forces.
SLOT_RATES = {"adjective": 0.4, "adverb": 0.4, "place": 0.3, "time": 0.2}


def sample_sentence(rng: random.Random, topic: str, forced: Mapping[str, str]) -> str:
    """Draw one sentence of the grammar.

    Args:
        rng: source of randomness.
        topic: a key of ``TOPICS``.
        forced: words that must stand in the slots ``adjective``, ``adverb`` or ``time``.

    Returns:
        The sentence, capitalised and ended by a period.
    """
    nouns, verbs = TOPICS[topic]
    plural = rng.random() < 0.5
    place = f"{rng.choice(PREPOSITIONS)} the {rng.choice(nouns)}{rng.choice(['', 's'])}"
    optional = {"adjective": rng.choice(ADJECTIVES), "adverb": rng.choice(ADVERBS), "place": place, "time": rng.choice(TIMES)}
    slot = {name: word if rng.random() < SLOT_RATES[name] else "" for name, word in optional.items()} | dict(forced)
    subject = [rng.choice(PLURAL if plural else SINGULAR), slot["adjective"], rng.choice(nouns) + ("s" if plural else "")]
    predicate = [rng.choice(verbs) + ("" if plural else "s"), slot["adverb"], slot["place"], slot["time"]]
    return " ".join(filter(None, subject + predicate)) + "."


@cache
def _pattern(topic: str) -> re.Pattern[str]:
    nouns, verbs = ("|".join(words) for words in TOPICS[topic])
    adjective = f"(?: (?:{'|'.join(ADJECTIVES)}))?"
    singular = f"(?:{'|'.join(SINGULAR)}){adjective} (?:{nouns}) (?:{verbs})s"
    plural = f"(?:{'|'.join(PLURAL)}){adjective} (?:{nouns})s (?:{verbs})"
    place = f"(?: (?:{'|'.join(PREPOSITIONS)}) the (?:{nouns})s?)?"
    rest = f"(?: (?:{'|'.join(ADVERBS)}))?{place}(?: (?:{'|'.join(TIMES)}))?"
    return re.compile(f"(?:{singular}|{plural}){rest}\\.")


def derives(topic: str, sentence: str) -> bool:
    """Whether the grammar of a topic derives a sentence, character by character."""
    return _pattern(topic).fullmatch(sentence) is not None

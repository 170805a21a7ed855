"""Code of the user's own that fails: what is named, and what stays as it is."""

from __future__ import annotations

import pytest
import torch

from aapa_lightning.anchor.asking import ask
from aapa_lightning.anchor.base import Discriminator
from aapa_lightning.anchor.schedule import Schedule
from aapa_lightning.anchor.segment import Segmenter, segment_texts
from aapa_lightning.anchor.term import AnchorTerm
from aapa_lightning.errors import ConfigError, DataError
from aapa_lightning.types import Record
from aapa_lightning.users_code import users_code

TEXTS = ["One. Two.", "Three.", "Four. Five. Six."]
RECORDS = [Record("p", source=f"data.jsonl:{i}", key=f"k{i}") for i in range(1, 4)]


class Own(Discriminator):
    """Answers what it is told to; raises at the text that it is told to."""

    def __init__(self, answer=None, fails: str = "") -> None:
        self.answer, self.fails = answer, fails

    def fingerprint(self):
        return "own"

    def score(self, responses, records, spans):
        if self.fails and any(self.fails in text for text in responses):
            raise KeyError("boo")
        return self.answer(len(spans.response_index))


def asked(judge):
    return ask(judge, TEXTS, RECORDS, segment_texts(TEXTS, Segmenter()))


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        (lambda _: None, "NoneType"),
        (lambda n: [0.0] * n, "list"),
        (lambda _: 0.0, "float"),
        (lambda n: torch.zeros(n - 1), r"shape \(5,\)"),
        (lambda n: torch.zeros(n, 1), r"shape \(6, 1\)"),
        (lambda _: torch.tensor(1.0), r"shape \(\)"),
        (lambda n: torch.zeros(n, dtype=torch.complex64), "complex64"),
    ],
)
def test_a_discriminator_that_answers_something_else(answer, found):
    message = rf"discriminator Own must return one number per sentence.*\(6,\).*found .*{found}.*first record data\.jsonl:1 \(key k1\)"
    with pytest.raises(DataError, match=message):
        asked(Own(answer))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_discriminator_that_is_not_finite(value):
    def answer(n):
        return torch.tensor([0.0] * (n - 1) + [value])

    with pytest.raises(DataError, match=rf"data\.jsonl:3 \(key k3\): expected finite logits .* Own, found {value}.*'Four"):
        asked(Own(answer))


def test_a_discriminator_that_raises_is_named_with_its_line_and_the_record():
    message = (
        r"discriminator Own raised KeyError: 'boo' \(at data\.jsonl:2 \(key k2\), response 'Three\.'\), in .*test_users_code\.py, line"
    )
    with pytest.raises(DataError, match=message):
        asked(Own(torch.zeros, fails="Three"))


def test_whole_numbers_and_half_precision_become_float32():
    for dtype in (torch.int64, torch.bfloat16, torch.float64):
        assert asked(Own(lambda n, dtype=dtype: torch.ones(n, dtype=dtype))).dtype == torch.float32


class Weight(Schedule):
    def __init__(self, value) -> None:
        self.value = value

    def weight(self, step):
        return self.value(step)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (lambda step: 1 / step, r"the schedule Weight raised ZeroDivisionError: division by zero, in .*test_users_code\.py, line"),
        (lambda _: None, "the schedule Weight must give a finite number for step 0, found None"),
        (lambda _: float("nan"), "must give a finite number for step 0, found nan"),
        (lambda _: "1", "must give a finite number for step 0, found '1'"),
    ],
)
def test_a_schedule_that_fails(value, message):
    with pytest.raises(ConfigError, match=message):
        AnchorTerm(Own(torch.zeros), weight=Weight(value)).weight(0)


def test_a_fingerprint_that_is_no_text():
    judge = Own(torch.zeros)
    judge.fingerprint = lambda: 5
    with pytest.raises(ConfigError, match="discriminator Own: fingerprint must give text, found 5"):
        AnchorTerm(judge)


def test_faults_that_are_nobodys_stay():
    for error in (MemoryError(), torch.OutOfMemoryError("full"), DataError("said already"), KeyboardInterrupt()):
        with pytest.raises(type(error)), users_code("reward 'x'"):
            raise error
    with pytest.raises(KeyError), users_code("engine", owner=Segmenter()):
        raise KeyError("a fault of this package")

"""Hostile responses and arguments: a right verdict or a clear error within a bounded time, in a process of its own that can be ended."""

from __future__ import annotations

import subprocess
import sys

import pytest

from aapa_lightning.errors import DataError
from aapa_lightning.rewards.instructions import CHECKS, follows, follows_loosely, validate_instruction
from aapa_lightning.rewards.verifiable import InstructionReward
from aapa_lightning.types import Instruction, Record

#: Seconds for all checks of one text. A pattern that runs on from every character needs hours; all of them take about ten.
DEADLINE = 120
SIZE = 10_000_000
#: name -> an expression for N characters. Each is the worst for some naive pattern.
TEXTS = {
    "one letter": "'a' * N",
    "lines": "'\\n' * N",
    "blanks": "' ' * N + 'a'",
    "blank lines": "' \\n' * (N // 2)",
    "NULs": "'\\x00' * N",
    "surrogates": "'\\ud800' * N",
    "brackets": "'[' * N",
    "angles": "'<' * N + 'a'",
    "asterisks": "'*' * N",
    "full stops": "'.' * N",
    "quotes": "'.\"' * (N // 2)",
    "dashes": "'- ' * (N // 2)",
    "short words": "'a ' * (N // 2)",
    "digits": "'1' * N",
    "addresses": "'a@' * (N // 2)",
    "JSON arrays": "'[' * (N // 2) + ']' * (N // 2)",
    "JSON objects": "'{\"a\":' * (N // 5)",
    "paragraphs": "'a\\n\\n' * (N // 3)",
    "dividers": "'***' * (N // 3)",
    "capitals": "'A B' * (N // 3)",
    "p.": "'p. p ' * (N // 5)",
}
#: A word of 10,000 letters that almost occurs in 'one letter', and one with 5,000 boundaries that almost occurs in 'short words'.
WORDS = "['(a+)+$', 'a' * 10_000 + 'b', 'a ' * 5_000 + 'b', '\\x00', '\\ud800']"

CODE = """
import faulthandler, sys
sys.path[:0] = {path!r}
from aapa_lightning.rewards.instructions import CHECKS, follows, follows_loosely, validate_instruction
from aapa_lightning.types import Instruction
N, words = {size}, {words}
values = dict(relation="at least", let_relation="at least", capital_relation="at least", letter="a", language="de", keywords=words,
    forbidden_words=words, nth_paragraph=1, first_word="a", section_spliter=words[1], prompt_to_repeat=words[1], end_phrase=words[1])
for build in {{{texts}}}.values():
    faulthandler.dump_traceback_later({deadline}, exit=True)
    response = build()
    for name, check in CHECKS.items():
        kwargs = {{key: values.get(key, words[0] if key in ("keyword", "postscript_marker") else 3) for key in check.arguments}}
        instruction = Instruction(name, kwargs)
        validate_instruction(instruction, "f:1")
        assert follows(instruction, response) in (True, False)
print("done")
"""


@pytest.mark.parametrize("size", [1_000_000, pytest.param(SIZE, marks=pytest.mark.slow)])
def test_every_check_ends_on_every_text(size):
    texts = ", ".join(f"{name!r}: lambda: {text}" for name, text in TEXTS.items())
    code = CODE.format(path=sys.path, deadline=DEADLINE, size=size, words=WORDS, texts=texts)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=DEADLINE * len(TEXTS), check=False)
    assert done.stdout == "done\n", done.stderr[-2000:]


@pytest.mark.parametrize(
    ("name", "kwargs", "response", "verdict"),
    [
        ("keywords:existence", {"keywords": ["(a+)+$"]}, "a" * 100 + "(A+)+$", True),
        ("keywords:existence", {"keywords": ["\x00"]}, "a\x00b", True),
        ("keywords:existence", {"keywords": ["\ud800"]}, "a\ud800", True),
        ("keywords:frequency", {"keyword": "(.*)*", "frequency": 2, "relation": "at least"}, "(.*)*(.*)*", True),
        ("keywords:frequency", {"keyword": "a", "frequency": SIZE, "relation": "at least"}, "a" * SIZE, True),
        ("keywords:forbidden_words", {"forbidden_words": ["a" * 10_000]}, "a" * SIZE, True),
        ("keywords:letter_frequency", {"letter": "\x00", "let_frequency": 2, "let_relation": "less than"}, "\x00\x00", False),
        ("combination:repeat_prompt", {"prompt_to_repeat": "(a|a)*" * 1000}, "(A|a)*" * 1000 + " yes", True),
        ("length_constraints:number_paragraphs", {"num_paragraphs": 1_000_000}, "a\n***\n" * 1_000_000, True),
        (
            "length_constraints:nth_paragraph_first_word",
            {"num_paragraphs": 1_000_000, "nth_paragraph": 1_000_000, "first_word": "b"},
            "a\n\n" * 999_999 + "b",
            True,
        ),
        ("detectable_content:number_placeholders", {"num_placeholders": 1}, "[" * SIZE + "]", True),
        ("detectable_format:number_bullet_lists", {"num_bullets": 1}, "\n" * SIZE + "* a", True),
        ("detectable_format:title", {}, "<" * SIZE + "a>>", True),
        ("detectable_format:json_format", {}, "[" * 100_000 + "]" * 100_000, False),
        ("detectable_format:json_format", {}, '{"a":' * 100_000 + "1" + "}" * 100_000, False),
        ("detectable_format:json_format", {}, '"' + "a" * SIZE + '"', True),
        ("detectable_format:json_format", {}, "1" * 100_000, False),
        ("detectable_format:json_format", {}, '"a\x00"', False),
        ("startend:quotation", {}, '"' + "\ud800" * 1000 + '"', True),
        ("length_constraints:number_sentences", {"num_sentences": 5, "relation": "less than"}, "." * SIZE + " a.", True),
        ("language:response_language", {"language": "en"}, "this is only a test. " * 500_000, True),
        ("language:response_language", {"language": "en"}, "\x00\ud800" * 1000, False),
        ("punctuation:no_comma", {}, "\x00" * SIZE, True),
    ],
)
def test_verdicts_on_hostile_text(name, kwargs, response, verdict):
    instruction = Instruction(name, kwargs)
    validate_instruction(instruction, "f:1")
    assert follows(instruction, response) is verdict


@pytest.mark.parametrize(
    "instruction",
    [
        Instruction("keywords:existence", {"keywords": ["a", None]}),
        Instruction("\x00\ud800"),
        Instruction("language:response_language", {"language": "\ud800"}),
    ],
)
def test_errors_about_hostile_arguments_can_be_printed(instruction):
    with pytest.raises(DataError, match=r"^f:1: ") as error:
        validate_instruction(instruction, "f:1")
    str(error.value).encode()


def test_a_loose_verdict_on_ten_megabytes():
    assert not follows_loosely(Instruction("startend:quotation"), "*\n" * (SIZE // 2))
    assert follows_loosely(Instruction("punctuation:no_comma"), "a,\n" + "*" * SIZE)


def test_a_reward_of_hostile_responses():
    record = Record(prompt="p", instructions=tuple(Instruction(name) for name in CHECKS if not CHECKS[name].arguments), source="f:1")
    scores = InstructionReward(mode="fraction", verdicts="loose")(["\x00", "\ud800\n\ud800", "[" * 1_000_000, ""], [record] * 4)
    assert scores[-1] == 0
    assert all(0 <= score < 1 for score in scores)


def deep(levels=2000):
    value = "x"
    for _ in range(levels):
        value = [value]
    return value


ARGUMENTS = [
    10**400,
    16**9000,
    -1,
    1.5,
    float("nan"),
    float("inf"),
    True,
    None,
    "",
    "\ud800",
    b"x",
    1j,
    ...,
    [],
    [1],
    {"a": 1},
    {1},
    deep(),
    "x" * 10**7,
]


def complaint(instruction):
    try:
        validate_instruction(instruction, "f:1")
    except DataError as error:
        return str(error)
    return None


@pytest.mark.parametrize("name", CHECKS)
def test_any_argument_is_right_or_malformed(name):
    """Of every instruction, each argument in turn is anything at all: a verdict, or a DataError that is short."""
    right = {"keywords": ["a"], "forbidden_words": ["a"], "letter": "a", "language": "en"}
    for argument in (*CHECKS[name].arguments, "other"):
        for value in ARGUMENTS:
            kwargs = {key: right.get(key, "at least" if "relation" in key else "a") for key in CHECKS[name].arguments}
            kwargs |= {key: 1 for key, kind in CHECKS[name].arguments.items() if kind.expected.startswith("a whole number")}
            instruction = Instruction(name, kwargs | {argument: value})
            error = complaint(instruction)
            if error is None:
                assert follows(instruction, "A a.") in (True, False)
            else:
                assert len(error.encode()) < 1000

"""Constraints in ``ground_truth``: allenai/RLVR-IFeval and allenai/IF_multi_constraints_upto5, in their own schemas."""

from __future__ import annotations

import json
import time

import pytest

from aapa_lightning.data.check import check_dataset
from aapa_lightning.data.ground_truth import ground_truth_instructions
from aapa_lightning.data.records import parse_record, read_records
from aapa_lightning.errors import DataError
from aapa_lightning.rewards.instructions import CHECKS, follows, validate_instruction
from aapa_lightning.rewards.verifiable import InstructionReward
from aapa_lightning.types import Instruction

ARGUMENTS = ("N", "quantifier", "end_phrase", "keyword_list", "word", "forbidden_words", "letter", "i", "first_word", "postscript_marker")
ARGUMENTS += ("options", "section_splitter", "original_prompt")


def rlvr(name, **given):
    """A ground truth as the dataset writes it: every argument there is, null where the function does not take it."""
    return json.dumps({"func_name": name, **dict.fromkeys(ARGUMENTS), **given})


def row(ground_truth, **more):
    return {
        "messages": [{"content": "Say something.", "role": "user"}],
        "ground_truth": ground_truth,
        "dataset": "ifeval",
        "constraint_type": "Some Type",
        "constraint": "Do it so.",
        **more,
    }


def one(id_, **kwargs):
    return [Instruction(id_, kwargs)]


def bounds(id_, count, relation, low, high, **kwargs):
    return [
        Instruction(id_, {**kwargs, count: low, relation: "at least"}),
        Instruction(id_, {**kwargs, count: high, relation: "less than"}),
    ]


WORDS = "length_constraints:number_words"
FUNCTIONS = [
    (rlvr("verify_keywords", keyword_list=["a", "b"]), one("keywords:existence", keywords=["a", "b"])),
    (
        rlvr("verify_keyword_frequency", word="sea", N=2),
        bounds("keywords:frequency", "frequency", "relation", 2, 3, keyword="sea"),
    ),
    (rlvr("validate_forbidden_words", forbidden_words=["no"]), one("keywords:forbidden_words", forbidden_words=["no"])),
    (
        rlvr("verify_letter_frequency", letter="q", N=0),
        bounds("keywords:letter_frequency", "let_frequency", "let_relation", 0, 1, letter="q"),
    ),
    (rlvr("validate_response_language", language="de"), one("language:response_language", language="de")),
    (rlvr("validate_word_constraint", N=40, quantifier="at least"), one(WORDS, num_words=40, relation="at least")),
    (rlvr("validate_word_constraint", N=40, quantifier="at most"), one(WORDS, num_words=41, relation="less than")),
    (rlvr("validate_word_constraint", N=40, quantifier="around"), bounds(WORDS, "num_words", "relation", 36, 45)),
    (rlvr("validate_word_constraint", N=1, quantifier="around"), bounds(WORDS, "num_words", "relation", 0, 3)),
    (
        rlvr("verify_sentence_constraint", N=3, quantifier="around"),
        bounds("length_constraints:number_sentences", "num_sentences", "relation", 2, 5),
    ),
    (
        rlvr("validate_frequency_capital_words", N=30, quantifier="around"),
        bounds("change_case:capital_word_frequency", "capital_frequency", "capital_relation", 27, 34),
    ),
    (
        rlvr("validate_paragraphs", N=3, i=2, first_word="Then"),
        one("length_constraints:nth_paragraph_first_word", num_paragraphs=3, nth_paragraph=2, first_word="Then"),
    ),
    (rlvr("verify_postscript", postscript_marker="PS:"), one("detectable_content:postscript", postscript_marker="PS:")),
    (rlvr("validate_placeholders", N=2), one("detectable_content:number_placeholders", num_placeholders=2)),
    (rlvr("verify_bullet_points", N=4), one("detectable_format:number_bullet_lists", num_bullets=4)),
    (rlvr("validate_title"), one("detectable_format:title")),
    (rlvr("validate_highlighted_sections", N=2), one("detectable_format:number_highlighted_sections", num_highlights=2)),
    (
        rlvr("validate_sections", N=2, section_splitter="Part:"),
        one("detectable_format:multiple_sections", num_sections=2, section_spliter="Part:"),
    ),
    (rlvr("validate_json_format"), one("detectable_format:json_format")),
    (rlvr("validate_repeat_prompt", original_prompt="Say."), one("combination:repeat_prompt", prompt_to_repeat="Say.")),
    (rlvr("validate_two_responses"), one("combination:two_responses")),
    (rlvr("validate_uppercase"), one("change_case:english_capital")),
    (rlvr("validate_lowercase"), one("change_case:english_lowercase")),
    (rlvr("validate_end", end_phrase="That's all."), one("startend:end_checker", end_phrase="That's all.")),
    (rlvr("validate_quotation"), one("startend:quotation")),
    (rlvr("validate_no_commas"), one("punctuation:no_comma")),
]


@pytest.mark.parametrize(("ground_truth", "expected"), FUNCTIONS)
def test_functions_of_rlvr_ifeval(ground_truth, expected):
    record = parse_record(row(ground_truth), "f:1")
    assert list(record.instructions) == expected
    assert record.prompt == ({"role": "user", "content": "Say something."},)
    assert record.extra == {"ground_truth": ground_truth, "dataset": "ifeval", "constraint_type": "Some Type", "constraint": "Do it so."}
    for instruction in record.instructions:
        validate_instruction(instruction, "f:1")  # identifiers and arguments are those of the checks


@pytest.mark.parametrize(("count", "inside"), [(35, False), (36, True), (44, True), (45, False)])
def test_two_bounds_say_what_around_says(count, inside):
    record = parse_record(row(rlvr("validate_word_constraint", N=40, quantifier="around")), "f:1")
    assert all(follows(instruction, "word " * count) for instruction in record.instructions) is inside


NO_EQUIVALENT = [
    (rlvr("verify_paragraph_count", N=3), Instruction("verify_paragraph_count", {"N": 3})),
    (rlvr("validate_choice", options="yes/no/maybe"), Instruction("validate_choice", {"options": "yes/no/maybe"})),
    (rlvr("validate_word_constraint", N=3), Instruction("validate_word_constraint", {"N": 3})),
    (
        rlvr("verify_keyword_frequency", N=3, word="a", quantifier="at most"),
        Instruction("verify_keyword_frequency", {"N": 3, "word": "a", "quantifier": "at most"}),
    ),
    (rlvr("of_tomorrow", N=3), Instruction("of_tomorrow", {"N": 3})),
]


@pytest.mark.parametrize(("ground_truth", "kept"), NO_EQUIVALENT)
def test_what_ifeval_has_no_equivalent_of_keeps_its_name(ground_truth, kept):
    record = parse_record(row(ground_truth), "f:1")
    assert record.instructions == (kept,)
    with pytest.raises(DataError, match=f"f:1: unknown instruction '{kept.id}'"):
        InstructionReward()(["Yes."], [record])
    assert InstructionReward(unsupported="skip-record").skip_reason(record) == f"{kept.id} is not supported"


def test_an_argument_that_the_function_does_not_take_is_refused():
    (instruction,) = parse_record(row(rlvr("validate_lowercase", N=3)), "f:1").instructions
    with pytest.raises(DataError, match=r"f:1: 'change_case:english_lowercase' takes \[\], found \['N'\]"):
        validate_instruction(instruction, "f:1")


MULTI = {
    "instruction_id": ["letters:letter_counting2", "detectable_format:title", "last_word:last_word_answer"],
    "kwargs": [{"letter": "s", "let_frequency": 20, "let_relation": "at least", "keyword": None}, None, {"last_word": "brief"}],
}


@pytest.mark.parametrize("ground_truth", [repr([MULTI]), json.dumps([MULTI]), f"\n {[MULTI]!r} ", [MULTI], MULTI], ids=range(5))
def test_multi_constraints(ground_truth):
    record = parse_record(row(ground_truth, key="ai2/flan_1"), "f:1")
    assert record.key == "ai2/flan_1"
    assert list(record.instructions) == [
        Instruction("keywords:letter_frequency", {"letter": "s", "let_frequency": 20, "let_relation": "at least"}),
        Instruction("detectable_format:title"),
        Instruction("last_word:last_word_answer", {"last_word": "brief"}),
    ]
    assert {instruction.id in CHECKS for instruction in record.instructions[:2]} == {True}


@pytest.mark.parametrize("value", [None, "42", "\\boxed{4}", "[1, 2]", '{"answer": 4}', "{x | instruction_id}", 42, [["func_name"]], {}])
def test_other_ground_truths_stay_as_they_are(value):
    assert ground_truth_instructions(value, "f:1") is None
    record = parse_record({"prompt": "p", "ground_truth": value}, "f:1")
    assert (record.instructions, record.extra) == ((), {} if value is None else {"ground_truth": value})


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"ground_truth": "[{'instruction_id': ["}, "neither JSON nor a Python literal"),
        ({"ground_truth": "[{'instruction_id': [open('x')]}]"}, "neither JSON nor a Python literal"),
        ({"ground_truth": "[{'instruction_id': 'a', 'kwargs': []}]"}, "'ground_truth: instruction_id' must be a list, found str"),
        ({"ground_truth": "[{'instruction_id': ['a'], 'kwargs': []}]"}, "1 ids in 'ground_truth: instruction_id' but 0 entries"),
        ({"ground_truth": "[{'instruction_id': [3], 'kwargs': [None]}]"}, "instruction 0: id' must be text"),
        ({"ground_truth": "[{'instruction_id': ['a']}, 3]"}, r"'ground_truth\[1\]' must be an object"),
        ({"ground_truth": '{"func_name": 3}'}, "'func_name' must be the name of a function, found 3"),
        ({"ground_truth": rlvr("validate_word_constraint", N="3", quantifier="around")}, "needs 'N', a whole number"),
        ({"ground_truth": rlvr("verify_letter_frequency", letter="a")}, "needs 'N', a whole number, 0 or more; found None"),
        ({"ground_truth": rlvr("validate_title"), "instructions": []}, "both in 'instructions' and in 'ground_truth'"),
    ],
)
def test_malformed_constraints_name_the_record(tmp_path, more, message):
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps(row(rlvr("validate_title")) | change) + "\n" for change in ({}, more)))
    with pytest.raises(DataError, match=message) as caught:
        read_records(str(path))
    assert str(caught.value).startswith(f"{path}:2: ")


HOSTILE = ["[" * 300_000, "-" * 500_000, "1+" * 300_000, "'a'" * 200_000, "9" * 500_000, "{[" * 50_000, "not " * 200_000, "\0", "\ud800"]


@pytest.mark.parametrize("text", [*HOSTILE, "x" * 2_000_000], ids=lambda text: f"{text[:4]!a}x{len(text)}")
def test_hostile_text_ends_soon(text):
    begin = time.perf_counter()
    with pytest.raises(DataError, match="f:1: 'ground_truth'"):
        ground_truth_instructions("[{'func_name': " + text + "1}", "f:1")
    assert time.perf_counter() - begin < 10  # under a second on an idle machine


def test_check_counts_what_cannot_be_verified(tmp_path):
    path = tmp_path / "d.jsonl"
    truths = [rlvr("validate_title"), rlvr("validate_choice", options="yes/no"), rlvr("validate_end"), repr([MULTI])]
    path.write_text("".join(json.dumps(row(truth)) + "\n" for truth in truths))
    report = check_dataset(str(path))
    assert (report.rows, report.valid, report.unverifiable, report.error_count) == (4, 3, 2, 1)
    assert f"{path}:3: 'startend:end_checker' needs the argument 'end_phrase'" in report.errors[0]
    assert "rows with an instruction that no check knows: 2" in "\n".join(report.lines())
    assert report.to_dict()["unverifiable"] == 2


HOSTILE_NUMBERS = [10**400, -(10**400), 10**9 + 1, -1, 1.5, float("inf"), True, None, "7", [7], {"n": 7}, 1e300]


@pytest.mark.parametrize("quantifier", ["around", "at least", "at most", "less than", None])
@pytest.mark.parametrize("name", ["validate_word_constraint", "verify_sentence_constraint", "validate_frequency_capital_words"])
def test_numbers_that_are_no_counts_are_malformed(name, quantifier):
    for number in HOSTILE_NUMBERS:
        value = {"func_name": name, "N": number, "quantifier": quantifier}
        for spelt in (value, repr(value), repr([value])):
            with pytest.raises(DataError, match=r"^f:1: .*") as caught:
                ground_truth_instructions(spelt, "f:1")
            assert len(str(caught.value)) < 400


def test_numbers_that_cannot_be_written_are_named():
    """Python reads a hexadecimal number of any length and refuses to print it."""
    for number in ("0x" + "f" * 20_000, "-0x" + "f" * 20_000):
        with pytest.raises(DataError, match="too large to show"):
            ground_truth_instructions("{'func_name': 'validate_word_constraint', 'quantifier': 'around', 'N': " + number + "}", "f:1")


def test_check_goes_on_after_a_number_of_400_digits(tmp_path):
    path = tmp_path / "d.jsonl"
    truths = [rlvr("validate_word_constraint", N=10**400, quantifier="around"), rlvr("validate_title")]
    path.write_text("".join(json.dumps(row(truth)) + "\n" for truth in truths))
    report = check_dataset(str(path))
    assert (report.rows, report.valid, report.error_count) == (2, 1, 1)

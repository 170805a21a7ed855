"""``aapa evaluate`` as a user runs it: figures by hand, the published accuracies, refusals."""

from __future__ import annotations

import json
import re

import pytest
import torch

from aapa_lightning.cli import main
from aapa_lightning.metrics.functional.instruction_accuracy import instruction_accuracy, verdict_counts

PROMPTS = [
    {"key": 10, "prompt": "a", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]},
    {
        "key": 11,
        "prompt": "b",
        "instruction_id_list": ["punctuation:no_comma", "startend:end_checker"],
        "kwargs": [{}, {"end_phrase": "The end."}],
    },
    {"key": 12, "prompt": "c", "instruction_id_list": ["startend:end_checker"], "kwargs": [{"end_phrase": "Bye"}]},
]
#: Followed; one of two, and both without the last line; not followed.
RESPONSES = [
    {"key": 10, "response": "plain"},
    {"key": 11, "response": "No comma here. The end.\nP.S. more"},
    {"key": 12, "response": "Hello"},
]
VERDICTS = [
    {"key": 10, "strict": [True], "loose": [True]},
    {"key": 11, "strict": [True, False], "loose": [True, True]},
    {"key": 12, "strict": [False], "loose": [False]},
]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def evaluate(tmp_path, monkeypatch):
    """``evaluate("--json", responses=...)``: the exit code of the command on small files in a folder of its own."""
    monkeypatch.chdir(tmp_path)

    def run(*words, prompts=PROMPTS, responses=RESPONSES):
        write(tmp_path / "prompts.jsonl", prompts)
        write(tmp_path / "responses.jsonl", responses)
        return main(["evaluate", "--prompts", "prompts.jsonl", "--responses", "responses.jsonl", *words])

    return run


def test_figures_and_verdicts_by_hand(evaluate, tmp_path, capsys):
    assert evaluate("--json", "--out", "verdicts.jsonl") == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["prompts"], report["responses"], report["missing"]) == (3, 3, 0)
    expected = {"prompt_strict": 1 / 3, "instruction_strict": 2 / 4, "prompt_loose": 2 / 3, "instruction_loose": 3 / 4}
    assert {name: cell["value"] for name, cell in report["accuracy"].items()} == pytest.approx(expected)
    assert all(0 <= cell["low"] <= cell["value"] <= cell["high"] <= 1 for cell in report["accuracy"].values())
    assert report["types"] == {
        "punctuation:no_comma": {"count": 2, "strict": 1.0, "loose": 1.0},
        "startend:end_checker": {"count": 2, "strict": 0.0, "loose": 0.5},
    }
    assert report["bootstrap"] == {"unit": "prompt", "resamples": 1000, "seed": 0}
    assert [json.loads(line) for line in (tmp_path / "verdicts.jsonl").read_text().splitlines()] == VERDICTS


def test_the_printed_report_says_the_same(evaluate, capsys):
    assert evaluate("--allow-missing", responses=RESPONSES[:2]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "2 responses to 2 of 3 prompts"
    assert lines[1].endswith("left out of everything below: 1")
    assert any(re.fullmatch(r"prompt, strict +0\.5000   0\.0000 to 1\.0000", line) for line in lines)
    assert any(re.fullmatch(r"punctuation:no_comma +2 +1\.0000 +1\.0000", line) for line in lines)


def test_missing_prompts_are_an_error_unless_allowed_and_then_counted(evaluate, tmp_path, capsys):
    assert evaluate("--out", "verdicts.jsonl", responses=RESPONSES[:1]) == 2
    error = capsys.readouterr().err
    assert "2 of 3 prompts have no response, the first is prompts.jsonl:2 (key '11')" in error
    assert "--allow-missing" in error
    assert not (tmp_path / "verdicts.jsonl").exists()
    assert evaluate("--json", "--allow-missing", responses=RESPONSES[:1]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["responses"], report["missing"], report["accuracy"]["prompt_strict"]["value"]) == (1, 2, 1.0)


def test_a_file_that_predict_writes(evaluate, tmp_path, capsys):
    """Two samples at two temperatures, joined by prompt where records have no key."""
    prompts = [{name: value for name, value in row.items() if name != "key"} for row in PROMPTS[:1]]
    rows = [
        {"prompt": "a", "response": text, "temperature": temperature, "sample": sample, "truncated": False}
        for temperature in (0.5, 1.0)
        for sample, text in enumerate(("plain", "with, comma"))
    ]
    assert evaluate("--json", "--out", "verdicts.jsonl", prompts=prompts, responses=rows) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["prompts"], report["responses"], report["accuracy"]["prompt_strict"]["value"]) == (1, 4, 0.5)
    assert [report["accuracy"]["prompt_strict"][end] for end in ("low", "high")] == [0, 1]  # one prompt says nothing of others
    first = json.loads((tmp_path / "verdicts.jsonl").read_text().splitlines()[0])
    assert first == {"key": None, "prompt": "a", "strict": [True], "loose": [True], "sample": 0, "temperature": 0.5}
    assert evaluate(prompts=prompts, responses=[*rows, rows[2]]) == 2
    assert "responses.jsonl:5: the prompt of prompts.jsonl:1 is already answered in line 3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"instruction_id_list": []}, "prompts.jsonl:2: no instructions to verify"),
        ({"instruction_id_list": ["no:such"], "kwargs": [{}]}, "prompts.jsonl:2: unknown instruction 'no:such'"),
        ({"kwargs": [{}, {}]}, "prompts.jsonl:2: 'startend:end_checker' needs the argument 'end_phrase'"),
        ({"kwargs": [{}]}, "prompts.jsonl:2: 2 ids in 'instruction_id_list' but 1 entries in 'kwargs'"),
        ({"key": 10}, "prompts.jsonl:2: key '10' is already that of prompts.jsonl:1"),
        ({"key": "\ud800"}, "prompts.jsonl:2: 'key' holds half a surrogate pair"),
    ],
)
def test_prompts_that_cannot_be_judged(evaluate, capsys, change, message):
    prompts = [PROMPTS[0], PROMPTS[1] | change, PROMPTS[2]]
    if change == {"instruction_id_list": []}:
        prompts[1] = prompts[1] | {"kwargs": []}
    assert evaluate(prompts=prompts) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("resamples", ["0", "-3", "many"])
def test_resamples_must_be_some(evaluate, capsys, resamples):
    assert evaluate(f"--resamples={resamples}") == 2
    assert "--resamples" in capsys.readouterr().err


@pytest.mark.parametrize("seed", ["many", "99999999999999999999"])
def test_a_seed_that_cannot_be_is_refused(evaluate, capsys, seed):
    assert evaluate("--seed", seed) == 2
    assert f"--seed: expected a whole number of 64 bits, found {seed}" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["prompts", "responses"])
def test_verdicts_never_replace_what_they_were_read_from(evaluate, tmp_path, capsys, name):
    assert evaluate("--out", f"../{tmp_path.name}/{name}.jsonl") == 2
    assert f"is the file of --{name}, which would be lost" in capsys.readouterr().err
    assert len(read(tmp_path / f"{name}.jsonl")) == 3


@pytest.mark.parametrize("out", [".", "prompts.jsonl/verdicts.jsonl", "v" * 300])
def test_verdicts_that_cannot_be_written(evaluate, tmp_path, capsys, out):
    assert evaluate("--out", out) == 2
    error = capsys.readouterr().err
    assert "cannot write" in error
    assert out[:100] in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["prompts.jsonl", "responses.jsonl"]


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def has_a_letter_to_count(prompt):
    return all(kwargs.get("letter", "a").isalpha() for kwargs in prompt["kwargs"])


def test_the_published_accuracies(aapa_data, evaluate, capsys):
    """Within 0.2 points of the official checker's, on all five sets of responses.

    Of two prompts that ask for a number of "#" and "!" the official checker counts a letter drawn at random, drawn anew for the loose
    verdict, which then contradicts the strict one. They are left out here, and in the whole table may count for what they weigh.
    """
    table = (aapa_data / "README.md").read_text()
    published = re.findall(r"^\| ([\w.-]+) \| (?:expert|policy) \|((?: 0\.\d{4} \|){4})$", table, re.MULTILINE)
    assert len(published) == 5
    prompts = read(aapa_data / "ifeval" / "prompts.jsonl")
    kept = [prompt for prompt in prompts if has_a_letter_to_count(prompt)]
    assert len(kept) == len(prompts) - 2

    def accuracies(prompts, responses):
        assert evaluate("--allow-missing", "--json", "--resamples", "10", prompts=prompts, responses=responses) == 0
        report = json.loads(capsys.readouterr().out)
        assert (report["responses"], report["missing"]) == (len(responses), 1)
        return torch.tensor([cell["value"] for cell in report["accuracy"].values()], dtype=torch.float64)

    for model, cells in published:
        responses = read(aapa_data / "ifeval" / "responses" / f"{model}.jsonl")
        expected = torch.tensor([float(cell) for cell in cells.strip("| ").split("|")], dtype=torch.float64)
        assert (accuracies(prompts, responses) - expected).abs().max() <= 0.002 + 2 / 540, model
        judged = [row for row in responses if row["key"] in {prompt["key"] for prompt in kept}]
        counts = torch.tensor([verdict_counts(row["strict"], row["loose"]) for row in judged]).sum(0)
        assert (accuracies(kept, judged) - instruction_accuracy(counts)).abs().max() <= 0.002, model

"""``aapa data pairs``, ``best``, ``split`` and ``disjoint``, as their users call them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from aapa_lightning.anchor.base import Discriminator
from aapa_lightning.cli import main
from aapa_lightning.data.datamodule import AapaDataModule
from aapa_lightning.data.records import prompt_hash, read_records

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Tau?"}]
COMMA = {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
PROMPTS = [
    {"key": 1, "prompt": "a", "expert": "gold", "topic": "sea", **COMMA},
    {"prompt": CHAT, "expert": ["gold", "silver"], **COMMA},
    {"key": "c", "prompt": "c", "expert": "gold", **COMMA},
]
SAMPLES = [
    {"key": 1, "prompt": "a", "response": "one", "sample": 0, "reward": 1, "ok": [True, False]},
    {"key": 1, "prompt": "a", "response": "two, too", "sample": 1, "reward": 2, "ok": [True, True]},
    {"key": 1, "prompt": "a", "response": "", "sample": 2, "reward": 9, "ok": [True, True]},
    {"prompt": CHAT, "response": "one", "sample": 0, "reward": 0, "ok": [False]},
    {"prompt": CHAT, "response": "cut", "sample": 1, "reward": 7, "ok": [True], "truncated": True},
    {"prompt": "elsewhere", "response": "x", "reward": 0, "ok": [True]},
]


@pytest.fixture
def aapa(tmp_path, monkeypatch, capsys):
    """``aapa("data", ...)``: exit code and what was printed, in a folder with prompts and samples."""
    monkeypatch.chdir(tmp_path)
    write("prompts.jsonl", PROMPTS)
    write("samples.jsonl", SAMPLES)

    def call(*words):
        code = main([str(word) for word in words])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return code, captured.out if code == 0 else captured.err

    return call


def write(path, rows):
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def rows_of(path):
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def sides(path):
    return [(record.chosen, record.rejected) for record in read_records(str(path))]


PAIRS = ("data", "pairs", "--prompts", "prompts.jsonl", "--responses", "samples.jsonl", "--out", "pairs.jsonl")
BEST = ("data", "best", "--prompts", "prompts.jsonl", "--responses", "samples.jsonl", "--out", "best.jsonl")


def test_golden_against_samples(aapa):
    code, out = aapa(*PAIRS, "--chosen", "experts", "--json")
    assert code == 0
    assert json.loads(out) == {
        "prompts": 3, "responses": 6, "other_prompts": 1, "truncated": 1, "unanswered": 1, "without_pair": 0, "pairs": 5,
    }  # fmt: skip
    assert sides("pairs.jsonl") == [("gold", "one"), ("gold", "two, too"), ("gold", ""), ("gold", "one"), ("silver", "one")]
    first, *_, last = read_records("pairs.jsonl")
    assert (first.key, first.extra, first.experts, first.instructions[0].id) == ("1", {"topic": "sea"}, ("gold",), "punctuation:no_comma")
    assert last.prompt == tuple(CHAT)
    code, out = aapa(*PAIRS, "--chosen", "experts", "--limit", 1, "--keep-truncated")
    assert sides("pairs.jsonl") == [("gold", "one"), ("gold", "one"), ("silver", "one")]
    assert "pairs: 3\nwritten to pairs.jsonl\n" in out


def test_pairs_by_score_and_by_verdicts(aapa):
    code, out = aapa(*PAIRS, "--chosen", "best", "--score", "reward", "--json")
    assert code == 0
    assert (json.loads(out)["pairs"], json.loads(out)["without_pair"]) == (1, 1)
    (row,) = rows_of("pairs.jsonl")
    assert {name: row[name] for name in ("chosen", "rejected", "score_chosen", "score_rejected")} == {
        "chosen": "two, too", "rejected": "one", "score_chosen": 2.0, "score_rejected": 1.0,
    }  # fmt: skip
    code, _ = aapa(*PAIRS, "--chosen", "best", "--score", "ok", "--reduce", "min", "--pairs", "all", "--keep-truncated", "--margin", 1)
    assert (code, sides("pairs.jsonl")) == (0, [("two, too", "one")])


def test_verdicts_of_evaluate(aapa):
    write("answers.jsonl", [SAMPLES[1], SAMPLES[0], SAMPLES[3]])
    assert (
        aapa("evaluate", "--prompts", "prompts.jsonl", "--responses", "answers.jsonl", "--allow-missing", "--out", "verdicts.jsonl")[0] == 0
    )
    words = ["data", "pairs", "--prompts", "prompts.jsonl", "--responses", "answers.jsonl", "--chosen", "best", "--out", "pairs.jsonl"]
    assert aapa(*words, "--score", "strict", "--scores", "verdicts.jsonl", "--reduce", "min")[0] == 0
    assert sides("pairs.jsonl") == [("one", "two, too")]
    code, error = aapa(*words, "--score", "strict", "--scores", "verdicts.jsonl", "verdicts.jsonl")
    assert (code, error.startswith("aapa: error: --scores: expected a file for each of 1 --responses")) == (2, True)


class Judge(Discriminator):
    """Likes long responses."""

    def score(self, responses, records, spans):
        return torch.tensor([float(len(responses[int(i)])) for i in spans.response_index])

    def fingerprint(self):
        return "judge"


def test_scores_of_a_discriminator(aapa, monkeypatch):
    monkeypatch.setattr("aapa_lightning.anchor.load.load_discriminator", lambda *_, **__: Judge())
    write("prompts.jsonl", [{"prompt": "a"}])
    write("samples.jsonl", [{"prompt": "a", "response": text, "sample": i} for i, text in enumerate(["bb", "aaaa", "c"])])
    assert (
        aapa("score", "--discriminator", "d", "--prompts", "prompts.jsonl", "--responses", "samples.jsonl", "--out", "scores.jsonl")[0] == 0
    )
    assert aapa(*PAIRS, "--chosen", "best", "--score", "score", "--scores", "scores.jsonl", "--pairs", "best-rest")[0] == 0
    assert sides("pairs.jsonl") == [("aaaa", "bb"), ("aaaa", "c")]
    code, error = aapa(*PAIRS, "--chosen", "best", "--score", "sentences", "--scores", "scores.jsonl")
    assert code == 2
    assert "samples.jsonl:1: 'sentences' must be a finite number" in error


def test_the_best_responses_are_experts_of_a_datamodule(aapa):
    code, out = aapa(*BEST, "--score", "reward", "--json")
    assert (code, json.loads(out)) == (
        0,
        {"prompts": 3, "responses": 6, "other_prompts": 1, "truncated": 1, "unanswered": 1, "best": 2},
    )
    assert [row["reward"] for row in rows_of("best.jsonl")] == [2, 0]
    write("bare.jsonl", [{name: value for name, value in row.items() if name != "expert"} for row in PROMPTS])
    data = AapaDataModule("bare.jsonl", experts="best.jsonl", missing_experts="drop")
    data.setup()
    assert [record.experts for record in data._splits["train"]] == [("two, too",), ("one",)]


def test_repeated_prompts_are_asked_once(aapa):
    write("prompts.jsonl", [{"prompt": CHAT}, {"prompt": CHAT}, {"prompt": "a", "key": 1}, {"prompt": "a", "key": 1}])
    assert aapa(*BEST, "--score", "reward")[0] == 0
    assert len(rows_of("best.jsonl")) == 2
    assert aapa(*PAIRS, "--chosen", "best", "--score", "reward")[0] == 0
    assert len(rows_of("pairs.jsonl")) == 1


def test_given_pairs_are_cleaned_and_made_noisy(aapa):
    rows = [{"prompt": f"p{i}", "chosen": "good" * (i % 3 + 1), "rejected": "bad" * (i % 2 + 1)} for i in range(50)]
    write("given.jsonl", [*rows, {"prompt": "q", "chosen": "a", "rejected": "a"}, {"prompt": "r", "chosen": "a"}])
    words = ["data", "pairs", "--prompts", "given.jsonl", "--chosen", "given", "--json"]
    code, out = aapa(*words, "--out", "noisy.jsonl", "--flip-rate", 0.2, "--flip", "random", "--seed", 1)
    assert (code, json.loads(out)) == (0, {"prompts": 52, "without_pair": 2, "pairs": 50, "flipped": 10})
    assert sum(row["flipped"] for row in rows_of("noisy.jsonl")) == 10
    assert aapa(*words, "--out", "clean.jsonl")[0] == 0
    assert rows_of("clean.jsonl") == rows
    code, error = aapa("data", "pairs", "--prompts", "noisy.jsonl", "--chosen", "given", "--out", "again.jsonl", "--flip-rate", 0.1)
    assert (code, "noisy.jsonl:1: has a column 'flipped' already" in error) == (2, True)


def test_split_and_disjoint(aapa):
    write("all.jsonl", [{"prompt": f"p{i % 20}", "key": i, "n": i, "chosen": "a", "rejected": "b"} for i in range(40)])
    code, out = aapa("data", "split", "all.jsonl", "--parts", "rm=0.5, policy=0.5", "--out", "parts", "--seed", 3, "--json")
    assert code == 0
    assert {name: (cell["records"], cell["prompts"]) for name, cell in json.loads(out).items()} == {"rm": (20, 10), "policy": (20, 10)}
    both = [read_records(f"parts/{name}.jsonl") for name in ("rm", "policy")]
    assert not {prompt_hash(record.prompt) for record in both[0]} & {prompt_hash(record.prompt) for record in both[1]}
    assert sorted(record.extra["n"] for part in both for record in part) == list(range(40))
    assert aapa("data", "disjoint", "parts/rm.jsonl", "parts/policy.jsonl")[0] == 0
    code, error = aapa("data", "disjoint", "parts/rm.jsonl", "all.jsonl")
    assert (code, "its prompt is also that of parts/rm.jsonl:" in error) == (2, True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((*PAIRS, "--chosen", "best"), "--chosen best: expected --score COLUMN"),
        ((*PAIRS, "--chosen", "given"), "--chosen given: expected no --responses, found some"),
        (
            ("data", "pairs", "--prompts", "prompts.jsonl", "--chosen", "experts", "--out", "x.jsonl"),
            "--chosen experts: expected one or more",
        ),
        ((*PAIRS, "--chosen", "experts", "--pairs", "all"), "--pairs goes with --chosen best, found --chosen experts"),
        ((*PAIRS, "--chosen", "best", "--score", "reward", "--margin", "-1"), "--margin: expected a number, 0 or above, found -1.0"),
        ((*PAIRS, "--chosen", "best", "--score", "reward", "--margin", "nan"), "--margin: expected a number"),
        ((*PAIRS, "--chosen", "experts", "--limit", "0"), "--limit: expected a whole number above 0"),
        ((*PAIRS, "--chosen", "experts", "--flip-rate", "2"), "flip rate: expected a number in [0, 1], found 2.0"),
        ((*PAIRS, "--chosen", "best", "--score", "nothing"), "samples.jsonl:1: no score; expected a column 'nothing'"),
        ((*PAIRS, "--chosen", "best", "--score", "reward", "--margin", "100"), "prompts.jsonl: not one pair; prompts: 3;"),
        ((*PAIRS[:-1], "pairs.txt", "--chosen", "experts"), "--out pairs.txt: expected a name that ends with .jsonl"),
        ((*PAIRS[:-1], "samples.jsonl", "--chosen", "experts"), "--out samples.jsonl is the file of --responses, which would be lost"),
        (
            (*PAIRS[:-1], "prompts.jsonl/x.jsonl", "--chosen", "experts"),
            "cannot write prompts.jsonl/x.jsonl: a file lies there, expected a folder",
        ),
        ((*PAIRS, "--chosen", "experts", "--responses", "none.jsonl"), "cannot read none.jsonl"),
        ((*BEST, "--score", "reward", "--column", "prompt"), "--column: expected FIELD=NAME"),
        (
            ("data", "split", "prompts.jsonl", "--parts", "a=0.5,a=0.5", "--out", "o"),
            "--parts: expected NAME=SHARE,NAME=SHARE with different",
        ),
        (("data", "split", "prompts.jsonl", "--parts", "../a=1", "--out", "o"), "--parts: expected NAME=SHARE"),
        (("data", "split", "prompts.jsonl", "--parts", "a=half,b=0.5", "--out", "o"), "--parts: expected NAME=SHARE"),
        (("data", "split", "prompts.jsonl", "--parts", "a=0.5", "--out", "o"), "parts: expected shares above 0 that are 1 together"),
        (("data", "split", "prompts.jsonl", "--parts", "prompts=0.5,b=0.5", "--out", "."), "is the file of --path, which would be lost"),
    ],
)
def test_mistakes_are_explained(aapa, words, message, tmp_path):
    code, error = aapa(*words)
    assert (code, error.startswith(f"aapa: error: {message}") or message in error) == (2, True), error
    assert sorted(file.name for file in tmp_path.iterdir()) == ["prompts.jsonl", "samples.jsonl"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "samples.jsonl:2: malformed JSON"),
        (b'{"key": 1, "response": "\\ud83d", "reward": 1}', "samples.jsonl:2: 'response' holds half a surrogate pair"),
        (b'{"key": 1, "response": "x", "reward": "high"}', "samples.jsonl:2: 'reward' must be a finite number"),
        (b'{"key": 1, "response": "x", "reward": NaN}', "samples.jsonl:2: 'reward' must be a finite number"),
        (b'{"key": 1, "prompt": "b", "response": "x", "reward": 1}', "samples.jsonl:2: key '1' is also that of prompts.jsonl:1"),
        (b'{"key": 1, "response": "xx", "reward": 9, "odd": "\\ud83d"}', "samples.jsonl:2: a column cannot be written as JSON"),
    ],
)
def test_a_hostile_line_is_named(aapa, line, message, tmp_path):
    (tmp_path / "samples.jsonl").write_bytes(b'{"key": 1, "response": "x", "reward": 1}\n' + line + b"\n")
    code, error = aapa(*BEST, "--score", "reward")
    assert code == 2
    assert error.startswith(f"aapa: error: {message}"), error
    assert not (tmp_path / "best.jsonl").exists()


def test_the_commands_of_the_page_run(aapa, monkeypatch):
    """Every command of the section on pairs, in its order, on one small dataset."""
    monkeypatch.setattr("aapa_lightning.anchor.load.load_discriminator", lambda *_, **__: Judge())
    page = (Path(__file__).parents[1] / "docs" / "data.md").read_text(encoding="utf-8")
    section = page.split("## Preference pairs\n", 1)[1].split("\n## ", 1)[0]
    commands = [line for block in re.findall(r"```bash\n(.*?)```", section, re.DOTALL) for line in block.splitlines()]
    write("train.jsonl", PROMPTS)
    third = {"key": "c", "response": "commas, too", "reward": 1, "ok": [False]}
    write("samples.jsonl", [*SAMPLES[:5], third, {**third, "response": "none", "sample": 1, "reward": 0}])
    for command in commands:
        code, said = aapa(*command.split()[1:])
        assert code == 0, (command, said)
    assert len(commands) == 10
    assert sides("pairs.jsonl") == [("one", "two, too"), ("one", ""), ("none", "commas, too")]
    assert [row["response"] for row in rows_of("best.jsonl")] == ["two, too", "one", "commas, too"]


def test_a_way_to_flip_wants_a_rate(capsys):
    assert main(["data", "pairs", "--prompts=x.jsonl", "--chosen=given", "--flip=length", "--out=y.jsonl"]) == 2
    assert "--flip-rate" in capsys.readouterr().err

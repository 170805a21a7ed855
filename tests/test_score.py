"""``aapa score`` as a user runs it: rows by hand, resuming bit for bit, refusals before any scoring."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys

import pyarrow.parquet as pq
import pytest
import torch

from aapa_lightning.anchor.base import Discriminator
from aapa_lightning.anchor.context import Encoding
from aapa_lightning.anchor.encoder import FrozenEncoder
from aapa_lightning.anchor.encoder_head import EncoderHeadDiscriminator
from aapa_lightning.anchor.head import StackedHead, feature_size
from aapa_lightning.cli import main

TEXTS = [
    "One two. Three four five six.",
    "<think>Hm. Well.</think>One two three four.",
    "",
    "Und so?\u0000 Ja \u00fc. Nein \U0001f600 nein.",
]


class WordJudge(Discriminator):
    """Logit of a sentence: its words minus 3."""

    def __init__(self, salt="a", experts=False, explode_after=None):
        self.salt, self.needs_experts, self.left = salt, experts, explode_after
        self.sizes = []

    def score(self, responses, records, spans):
        self.sizes.append(len(responses))
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
        words = [len(text[a:b].split()) for text, row in zip(responses, spans.char_spans, strict=True) for a, b in row]
        return torch.tensor(words, dtype=torch.float32) - 3

    def fingerprint(self):
        return self.salt


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def score(tmp_path, monkeypatch):
    """``score("--resume", judge=...)``: the exit code of the command on small files in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "prompts.jsonl", [{"key": k, "prompt": f"Prompt {k}"} for k in range(9)])
    write(tmp_path / "responses.jsonl", [{"key": k, "response": text} for k, text in enumerate(TEXTS)])

    def run(*words, judge=None, out="out.jsonl"):
        monkeypatch.setattr("aapa_lightning.anchor.load.load_discriminator", lambda *_, **__: judge or WordJudge())
        files = ["--prompts", "prompts.jsonl", "--responses", "responses.jsonl", "--discriminator", "disc", "--out", out]
        return main(["score", *files, "--device", "cpu", *words])

    return run


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_by_hand(score, tmp_path, capsys):
    assert score("--transform", "score") == 0
    rows = rows_of(tmp_path / "out.jsonl")
    assert [row["key"] for row in rows] == [0, 1, 2, 3]
    assert [row["mean_logit"] for row in rows[:3]] == [0.0, 1.0, -3.0]
    assert [row["score"] for row in rows[:3]] == [0.0, 1.0, -3.0]
    assert rows[0]["sentences"] == [
        {"start": 0, "end": 9, "logit": -1.0, "probability": pytest.approx(1 / (1 + math.e), abs=1e-6)},
        {"start": 9, "end": 29, "logit": 1.0, "probability": pytest.approx(1 / (1 + math.exp(-1)), abs=1e-6)},
    ]
    assert [(s["start"], s["end"]) for s in rows[1]["sentences"]] == [(24, len(TEXTS[1]))]  # offsets count the thinking
    assert [(s["start"], s["end"]) for s in rows[2]["sentences"]] == [(0, 0)]
    covered = "".join(TEXTS[3][s["start"] : s["end"]] for s in rows[3]["sentences"])
    assert covered == TEXTS[3]
    output = capsys.readouterr()
    assert "4 responses to 4 prompts" in output.out
    assert "4/4 responses" in output.err
    assert "\r" not in output.err


def test_transform_pool_and_thinking(score, tmp_path):
    assert score("--transform", "gan_sat", "--tau", "2", "--pool", "min", "--score-thinking") == 0
    rows = rows_of(tmp_path / "out.jsonl")
    assert rows[0]["score"] == pytest.approx(math.log1p(math.exp(-0.5)), abs=1e-6)
    assert rows[1]["sentences"][0]["start"] == 0


def test_parquet_holds_the_same(score, tmp_path):
    assert score() == 0
    assert score(out="out.parquet") == 0
    rows = rows_of(tmp_path / "out.jsonl")
    found = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert [row["key"] for row in found] == ["0", "1", "2", "3"]
    for row, expected in zip(found, rows, strict=True):
        assert row["score"] == pytest.approx(expected["score"], abs=1e-6)
        assert [s["logit"] for s in row["sentences"]] == [s["logit"] for s in expected["sentences"]]
        assert [(s["start"], s["end"]) for s in row["sentences"]] == [(s["start"], s["end"]) for s in expected["sentences"]]
    assert sorted(path.name for path in tmp_path.glob("out.*")) == [
        "out.jsonl",
        "out.jsonl.meta.json",
        "out.parquet",
        "out.parquet.meta.json",
    ]


@pytest.mark.parametrize("out", ["out.jsonl", "out.parquet"])
def test_an_interrupted_run_goes_on_with_the_next_batch(score, tmp_path, out):
    write(tmp_path / "responses.jsonl", [{"key": k, "response": "word " * (k + 1)} for k in range(9)])
    assert score("--batch-size", "2", out="whole.jsonl") == 0
    assert score("--batch-size", "2", judge=WordJudge(explode_after=2), out=out) == 130
    assert not (tmp_path / out).exists()
    partial = tmp_path / f"{out}.partial"
    partial.write_bytes(partial.read_bytes() + b'{"line": 5, "key": "\xc3')
    assert score("--batch-size", "2", out=out) == 2  # only on request
    judge = WordJudge()
    assert score("--batch-size", "2", "--resume", judge=judge, out=out) == 0
    assert judge.sizes == [2, 2, 1]
    assert not partial.exists()
    if out.endswith(".jsonl"):
        assert (tmp_path / out).read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    else:
        assert [row["line"] for row in pq.read_table(tmp_path / out).to_pylist()] == list(range(1, 10))
    judge = WordJudge()
    assert score("--batch-size", "2", "--resume", judge=judge, out=out) == 0
    assert judge.sizes == []


def test_a_resumed_run_keeps_whole_batches_of_its_own_size(score, tmp_path):
    write(tmp_path / "responses.jsonl", [{"key": k, "response": "word " * (k + 1)} for k in range(9)])
    assert score("--batch-size", "3", judge=WordJudge(explode_after=1)) == 130
    judge = WordJudge()
    assert score("--batch-size", "2", "--resume", judge=judge) == 0
    assert judge.sizes == [2, 2, 2, 1]
    assert [row["line"] for row in rows_of(tmp_path / "out.jsonl")] == list(range(1, 10))


@pytest.mark.parametrize(
    ("words", "salt", "change", "named"),
    [
        ([], "b", None, "discriminator"),
        (["--tau", "2"], "a", None, "tau"),
        (["--score-thinking"], "a", None, "score_thinking"),
        ([], "a", "responses.jsonl", "responses"),
        ([], "a", "prompts.jsonl", "prompts"),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_a_run_resumes_with_nothing_else(score, tmp_path, capsys, words, salt, change, named, finished):
    judge = WordJudge(explode_after=None if finished else 1)
    assert score("--batch-size", "1", judge=judge) == (0 if finished else 130)
    if change:
        text = (tmp_path / change).read_text()
        (tmp_path / change).write_text(text.replace("Three", "Drei").replace("Prompt 2", "Prompt two"))
    before = {path.name: path.read_bytes() for path in tmp_path.glob("out*")}
    judge = WordJudge(salt)
    assert score("--resume", "--batch-size", "1", *words, judge=judge) == 2
    assert f"another value of {named}: expected" in capsys.readouterr().err
    assert judge.sizes == []
    assert {path.name: path.read_bytes() for path in tmp_path.glob("out*")} == before


def test_a_run_does_not_resume_when_two_prompts_have_changed_keys(score, tmp_path, capsys):
    assert score("--batch-size", "1", judge=WordJudge(explode_after=1)) == 130
    write(tmp_path / "prompts.jsonl", [{"key": {0: 1, 1: 0}.get(k, k), "prompt": f"Prompt {k}"} for k in range(9)])
    assert score("--resume", "--batch-size", "1") == 2
    assert "another value of prompts" in capsys.readouterr().err


def test_a_run_stopped_before_its_first_row_starts_anew(score, tmp_path):
    assert score(judge=WordJudge(explode_after=0)) == 130
    (tmp_path / "out.jsonl.meta.json").unlink()
    assert score("--resume", "--tau", "2") == 0
    assert len(rows_of(tmp_path / "out.jsonl")) == 4


def test_a_run_stopped_after_its_last_write_leaves_nothing_behind(score, tmp_path):
    assert score("--batch-size", "1", out="out.parquet") == 0
    (tmp_path / "out.parquet.partial").write_text("{}\n")
    assert score("--resume", out="out.parquet") == 0
    assert not (tmp_path / "out.parquet.partial").exists()


def test_experts_come_from_a_file_and_a_missing_one_is_named_before_scoring(score, tmp_path, capsys):
    write(tmp_path / "experts.jsonl", [{"key": k, "response": f"Expert {k}."} for k in (0, 1, 3)])
    judge = WordJudge(experts=True)
    assert score("--experts", "experts.jsonl", judge=judge) == 2
    assert "prompts.jsonl:3: no expert response" in capsys.readouterr().err
    assert judge.sizes == []
    assert not list(tmp_path.glob("out*"))
    write(tmp_path / "experts.jsonl", [{"key": k, "response": f"Expert {k}."} for k in range(4)])  # prompts nobody answers need none
    assert score("--experts", "experts.jsonl", judge=judge) == 0


def test_a_response_that_is_its_own_reference_is_spoken_of(score, tmp_path, capsys):
    write(tmp_path / "experts.jsonl", [{"key": k, "response": text or "Nothing."} for k, text in enumerate(TEXTS)])
    assert score("--experts", "experts.jsonl", judge=WordJudge(experts=True)) == 0
    assert "3 responses are the only expert response to their prompts" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--out", "out.csv"], ".jsonl or .parquet"),
        (["--out", "."], ".jsonl or .parquet"),
        (["--out", "prompts.jsonl/out.jsonl"], "cannot write prompts.jsonl/out.jsonl: "),
        (["--out", "v" * 300 + ".jsonl"], "the name is too long"),
        (["--out", "responses.jsonl", "--resume"], "is the file of --responses, which would be lost"),
        (["--batch-size", "0"], "--batch-size"),
        (["--tau", "0"], "tau"),
        (["--device", "tpu9"], "--device"),
        (["--pool", "token_mean"], "invalid choice"),
    ],
)
def test_options_that_cannot_be(score, tmp_path, capsys, words, named):
    assert score(*words) == 2
    assert named in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))


def test_a_logit_that_is_not_finite_names_the_response(score, capsys, tmp_path):
    judge = WordJudge()
    judge.score = lambda responses, records, spans: torch.tensor([math.nan] * len(spans.response_index))
    assert score(judge=judge) == 2
    assert "responses.jsonl:1: expected finite logits" in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()


KILLED = """
import os, signal, sys
from aapa_lightning.commands.journal import Journal
append = Journal.append
def dying(self, rows):
    append(self, rows)
    if self.rows >= 4:
        os.write(self._file.fileno(), b'{"line": 5, "ke')
        os.kill(os.getpid(), signal.SIGKILL)
Journal.append = dying
from aapa_lightning.cli import main
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_killed_run_of_a_real_discriminator_ends_as_an_uninterrupted_one(score, tmp_path, tiny_model_dir, monkeypatch):
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    encoder = FrozenEncoder(str(tiny_model_dir), Encoding(max_length=40))
    head = StackedHead(1, feature_size(("sentence", "reference"), encoder.hidden_size), hidden_units=4, seed=1)
    EncoderHeadDiscriminator(encoder, head, ("sentence", "reference")).save(tmp_path / "disc")
    write(tmp_path / "prompts.jsonl", [{"prompt": f"Prompt {k}", "expert": "The boats rest."} for k in range(7)])
    write(tmp_path / "responses.jsonl", [{"prompt": f"Prompt {k}", "response": "The gulls call. " * k} for k in range(7)])
    words = ["score", "--discriminator", "disc", "--prompts", "prompts.jsonl", "--responses", "responses.jsonl", "--device", "cpu"]
    words += ["--batch-size", "2", "--out"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    killed = subprocess.run([sys.executable, "-c", KILLED, *words, "out.jsonl"], env=environment, capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert (tmp_path / "out.jsonl.partial").read_bytes().endswith(b'{"line": 5, "ke')
    assert main([*words, "out.jsonl", "--resume"]) == 0
    assert main([*words, "whole.jsonl"]) == 0
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert len(rows_of(tmp_path / "out.jsonl")) == 7

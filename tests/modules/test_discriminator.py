"""Training a discriminator: examples, loss, the module, its folder and its errors."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningCLI

from aapa_lightning.anchor.context import Encoding
from aapa_lightning.anchor.encoder_head import fold_of
from aapa_lightning.anchor.load import load_discriminator
from aapa_lightning.anchor.segment import Segmenter, segment_texts
from aapa_lightning.anchor.training import discriminator_loss, encode_examples, fit_temperature, response_weights
from aapa_lightning.data.examples import build_examples
from aapa_lightning.data.records import read_records
from aapa_lightning.errors import ConfigError, DataError
from aapa_lightning.modules.discriminator import DiscriminatorModule, report
from aapa_lightning.modules.discriminator_data import DiscriminatorData
from aapa_lightning.types import Record

GOOD = ["The boats rest calmly", "The gulls call softly", "The crew sleeps below"]
BAD = ["zq xx kk", "qq zz 000", "kk 11 zz"]


def sentence(rng, words):
    return f"{rng.choice(words)} {rng.choice('abcdef')}."


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """40 prompts with two experts each, and one file of bad responses."""
    folder, rng = tmp_path_factory.mktemp("data"), random.Random(0)

    def text(words):
        return " ".join(sentence(rng, words) for _ in range(rng.randint(1, 3)))

    rows = [{"prompt": f"Describe {i}.", "expert": [f"{text(GOOD)} a{i}.", f"{text(GOOD)} b{i}."]} for i in range(40)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    bad = [{"prompt": f"Describe {i}.", "response": f"{text(BAD)} a{i}." if i else ""} for i in range(40)]
    (folder / "bad.jsonl").write_text("".join(json.dumps(row) + "\n" for row in bad))
    return folder


def fit(files, encoder, *, epochs=15, data=None, **options):
    torch.manual_seed(0)
    module = DiscriminatorModule(str(encoder), **{"hidden_units": 16, "lr": 1e-2, "resamples": 20, **options})
    source = {"train": str(files / "train.jsonl"), "negatives": [str(files / "bad.jsonl")], "other_prompts": 0.0, "batch_size": 16}
    trainer = Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=files,
    )  # fmt: skip
    trainer.fit(module, datamodule=DiscriminatorData(**{**source, **(data or {})}))
    return module


def test_three_kinds_of_negatives(files):
    records = list(read_records(str(files / "train.jsonl")))
    examples = build_examples(records, [str(files / "bad.jsonl")], other_prompts=1.5, seed=0)
    kinds = [example.kind for example in examples]
    assert (kinds.count("expert"), kinds.count("response"), kinds.count("other_prompt")) == (80, 40, 60)
    for example in examples:
        if example.kind == "other_prompt":
            owner = next(record for record in records if example.text in record.experts)
            assert owner.prompt != example.record.prompt
    assert examples == build_examples(records, [str(files / "bad.jsonl")], other_prompts=1.5, seed=0)
    assert examples != build_examples(records, [str(files / "bad.jsonl")], other_prompts=1.5, seed=1)


def test_examples_refuse(files):
    with pytest.raises(DataError, match=r"data.jsonl:3: no expert response"):
        build_examples([Record("p", source="data.jsonl:3")], [], other_prompts=1, seed=0)
    with pytest.raises(DataError, match="no negatives"):
        build_examples([Record("p", experts=("a",))], [], other_prompts=1, seed=0)  # no other prompt to take from


def test_weights_balance_classes_in_every_fold():
    labels = torch.tensor([True, False, False, True, False, False])
    folds = torch.tensor([0, 0, 1, 1, 2, 2])
    torch.testing.assert_close(response_weights(labels, folds, 1)[0], torch.tensor([1.5, 0.75, 0.75, 1.5, 0.75, 0.75]))
    weights = response_weights(labels, folds, 3)
    for k in range(3):
        assert bool((weights[k, folds == k] == 0).all())
        assert float(weights[k, labels].sum()) == pytest.approx(3)
        assert float(weights[k, ~labels].sum()) == pytest.approx(3)


def test_loss_by_hand_in_double():
    logits = torch.tensor([[0.3, -1.0, 2.0], [1.0, 0.0, -30.0]], requires_grad=True)
    place, labels = torch.tensor([0, 0, 1]), torch.tensor([True, False])
    weights = torch.tensor([[1.0, 2.0], [0.0, 3.0]])
    found = discriminator_loss(logits, place, labels, weights, smoothing=0.2)
    p = torch.sigmoid(logits.detach().double())
    bce = -(0.9 * p[:, :2].log() + 0.1 * (1 - p[:, :2]).log())
    other = -(0.1 * p[:, 2].log() + 0.9 * torch.log1p(-p[:, 2]))
    expected = (bce[0].mean() + 2 * other[0] + 3 * other[1]) / 4
    assert float(found.detach()) == pytest.approx(float(expected), rel=1e-6)
    found.backward()
    assert bool((logits.grad[1, :2] == 0).all())
    assert bool(discriminator_loss(torch.full((1, 2), -1e4), place[:2], labels, torch.ones(1, 2)).isfinite())


def test_equal_weights_leave_no_prior_in_the_logit():
    # one feature-less head; 3 experts and 30 others: the best constant logit is 0
    labels = torch.arange(33) < 3
    weights = response_weights(labels, torch.zeros(33, dtype=torch.int64), 1)
    bias = torch.zeros(1, 1, requires_grad=True)
    discriminator_loss(bias.expand(1, 33), torch.arange(33), labels, weights).backward()
    assert float(bias.grad) == pytest.approx(0, abs=1e-7)


def test_trains_exports_and_loads(files, tiny_model_dir, tmp_path):
    module = fit(files, tiny_model_dir, select="last", data={"val_fraction": 0.4})
    assert module.metrics["sentence_auroc"] > 0.95
    assert module.metrics["response_auroc"] > 0.95
    assert "held-out figures" in report(module.metrics)
    module.export(tmp_path / "export")
    written = json.loads((tmp_path / "export" / "discriminator.json").read_text())
    assert written["metrics"] == module.metrics
    judge = load_discriminator(tmp_path / "export")
    texts, rows = ["The boats rest calmly a.", "qq zz 000 b.", ""], [Record("Describe 77.")] * 3
    good, bad, silent = judge.score(texts, rows, segment_texts(texts, Segmenter())).tolist()
    assert good > 0 > bad
    assert silent < 0
    trained = module.encoded["train"]
    assert float(trained.features[trained.seen].mean(0).sub(module.head.mean).abs().max()) < 1e-4


def test_same_seed_same_head(files, tiny_model_dir):
    first, second = (fit(files, tiny_model_dir, epochs=2, features=("sentence",)) for _ in range(2))
    assert first.discriminator().fingerprint() == second.discriminator().fingerprint()


def test_cross_fitting_never_trains_a_head_on_its_own_fold(files, tiny_model_dir):
    module = fit(files, tiny_model_dir, epochs=4, folds=3, dropout=0.0, select="last")
    head, examples = module.head, module.encoded["train"]
    # the only difference between heads is their data: change fold 1's labels and see which heads would move
    head.train()
    rows, place = examples.sentences_of(torch.nonzero(examples.folds == 1).squeeze(-1))
    chosen = examples.folds == 1
    loss = discriminator_loss(head(examples.features[rows]), place, examples.labels[chosen], module._weights[:, chosen])
    loss.backward()
    moved = head.weight.grad.abs().sum((1, 2)) > 0
    assert moved.tolist() == [True, False, True]
    judge = module.discriminator()
    assert judge.cross_fitted
    record = next(iter(read_records(str(files / "train.jsonl"))))
    assert 0 <= fold_of(record.prompt, 3) < 3


@pytest.mark.parametrize("folds", [1, 3])
def test_temperature_is_fitted_to_held_out_logits(folds, files, tiny_model_dir):
    module = fit(files, tiny_model_dir, epochs=3, folds=folds, dropout=0.5, data={"val_fraction": 0.5})
    split = module.encoded["train" if folds > 1 else "val"]
    temperature = module.metrics["temperature"]
    assert float(module.head.temperature) == pytest.approx(temperature)
    assert temperature != 1
    chosen = torch.arange(len(split)) if folds > 1 else torch.nonzero(module._choosing()).flatten()
    rows, place = split.sentences_of(chosen)
    logits = module.head(split.features)[split.folds[chosen][place], rows] * temperature
    assert fit_temperature(logits.detach(), place, split.labels[chosen]) == pytest.approx(temperature, rel=1e-4)
    # the fit is of the loss, not of this error, which a few dozen sentences leave rough
    assert module.metrics["ece_after_temperature"] <= module.metrics["ece_before_temperature"] + 0.05
    # judged on the calibrated scale, and so is the floor
    floor = torch.quantile(module.head(module.encoded["train"].features[module.encoded["train"].seen]), 0.01, dim=1)
    torch.testing.assert_close(module.head.floor, floor.detach())


def test_prompt_conditioning_learns_which_prompt(tmp_path, tiny_model_dir):
    rng = random.Random(1)
    rows = [{"prompt": f"Say {i % 2}.", "expert": f"{['abc', 'jkl'][i % 2]} {rng.choice('def')}{i}."} for i in range(60)]
    for i, row in enumerate(rows):
        row["prompt"] += f" {i}"
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"train": str(tmp_path / "train.jsonl"), "negatives": [], "other_prompts": 2.0, "val_fraction": 0.0}
    module = fit(tmp_path, tiny_model_dir, epochs=2, data=data)
    assert module.metrics == {}
    kinds = [example.kind for example in module._data().examples["train"]]
    assert kinds.count("other_prompt") == 120


def test_reference_features_and_their_errors(files, tiny_model_dir, tmp_path):
    module = fit(files, tiny_model_dir, epochs=2, features=("sentence", "reference"))
    judge = module.discriminator()
    assert judge.needs_experts
    (tmp_path / "one.jsonl").write_text('{"prompt": "p", "expert": "a."}\n{"prompt": "q", "expert": "b."}\n')
    data = {"train": str(tmp_path / "one.jsonl"), "negatives": [], "other_prompts": 1.0, "val_fraction": 0.0}
    with pytest.raises(DataError, match=r"one.jsonl:1.*needs another expert response"):
        fit(files, tiny_model_dir, features=("reference",), data=data)


def test_best_epoch_is_kept(files, tiny_model_dir):
    module = fit(files, tiny_model_dir, epochs=3)
    assert module._best["score"] == pytest.approx(module._measure("val", module._choosing(), 0)["sentence_auroc"])
    checkpoint = {}
    module.on_save_checkpoint(checkpoint)
    other = DiscriminatorModule(str(tiny_model_dir))
    other.on_load_checkpoint(checkpoint)
    assert other._best is module._best


def test_unseen_sentences_are_not_trained_on(files, tiny_model_dir):
    examples = build_examples(list(read_records(str(files / "train.jsonl"))), [str(files / "bad.jsonl")], other_prompts=0, seed=0)
    from aapa_lightning.anchor.encoder import FrozenEncoder

    encoded = encode_examples(FrozenEncoder(str(tiny_model_dir), Encoding()), Segmenter(), ("sentence",), examples, folds=1)
    empty = next(i for i, example in enumerate(examples) if example.text == "")
    rows, _ = encoded.sentences_of(torch.arange(len(encoded)))
    assert empty not in encoded.response_index[rows].tolist()
    assert len(rows) == len(encoded.response_index) - 1
    cut = replace(encoded, seen=encoded.seen & (torch.arange(len(encoded.seen)) % 3 > 0))
    judged = cut.judged_sentences()
    assert set(encoded.response_index[judged].tolist()) == set(range(len(encoded)))  # every response is judged
    for row in set(range(len(cut.seen))) - set(judged.tolist()):
        assert not cut.seen[row]


def test_refusals(files, tiny_model_dir):
    with pytest.raises(ConfigError, match="cannot see the prompt"):
        fit(files, tiny_model_dir, data={"other_prompts": 1.0}, encoding=Encoding(prompt=False))
    with pytest.raises(ConfigError, match="folds >= 1"):
        DiscriminatorModule("x", folds=0)
    with pytest.raises(ConfigError, match="distinct names"):
        DiscriminatorModule("x", features=())
    with pytest.raises(ConfigError, match="has not been trained"):
        DiscriminatorModule("x").discriminator()
    with pytest.raises(ConfigError, match="batch_size"):
        DiscriminatorData("x", batch_size=0)
    trainer = Trainer(logger=False, enable_checkpointing=False, accelerator="cpu", max_steps=1)
    with pytest.raises(ConfigError, match="DiscriminatorData, found NoneType"):
        trainer.fit(DiscriminatorModule("x"), torch.utils.data.DataLoader(torch.arange(2)))


def test_records_without_experts(files, tmp_path):
    lines = (files / "train.jsonl").read_text() + '{"prompt": "Describe 5000."}\n'
    (tmp_path / "some.jsonl").write_text(lines)
    data = DiscriminatorData(str(tmp_path / "some.jsonl"), [str(files / "bad.jsonl")], val_fraction=0.0)
    with pytest.raises(DataError, match=r"some.jsonl:41: no expert response"):
        data.setup("fit")
    data = DiscriminatorData(str(tmp_path / "some.jsonl"), [str(files / "bad.jsonl")], val_fraction=0.0, missing_experts="drop")
    data.setup("fit")
    assert len({example.record.prompt for example in data.examples["train"]}) == 40


def test_held_out_file_and_test_experts(files, tmp_path):
    rows = [json.loads(line) for line in (files / "train.jsonl").read_text().splitlines()]
    renamed = [{"prompt": row["prompt"], "answer": row["expert"]} for row in rows[:8]]
    (tmp_path / "val.jsonl").write_text("".join(json.dumps(row) + "\n" for row in renamed))
    other = [{"prompt": row["prompt"], "response": "Another expert."} for row in rows[:5]]
    (tmp_path / "other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in other))
    data = DiscriminatorData(
        str(tmp_path / "val.jsonl"), [str(files / "bad.jsonl")], val=str(tmp_path / "val.jsonl"), columns={"expert": "answer"},
        test_experts=str(tmp_path / "other.jsonl"), other_prompts=0.0,
    )  # fmt: skip
    data.setup("fit")
    assert {name: len(examples) for name, examples in data.examples.items()} == {"train": 24, "val": 24}
    data.setup("test")
    assert [example.text for example in data.examples["test"] if example.kind == "expert"] == ["Another expert."] * 5
    assert len(data.examples["test"]) == 10
    with pytest.raises(ConfigError, match="expected val, or val_fraction above 0"):
        DiscriminatorData(str(tmp_path / "val.jsonl"), columns={"expert": "answer"}, val_fraction=0.0).setup("test")


def test_command_line_and_test_split(files, tiny_model_dir, tmp_path):
    arguments = [
        "fit", "--model=DiscriminatorModule", f"--model.encoder={tiny_model_dir}", "--model.hidden_units=0",
        "--model.encoding.max_length=64",
        "--model.features=[sentence]", "--data=DiscriminatorData", f"--data.train={files / 'train.jsonl'}",
        f"--data.negatives=[{files / 'bad.jsonl'}]", "--data.segmenter.language=en", "--data.batch_size=16",
        "--trainer.max_epochs=2", "--trainer.accelerator=cpu", "--trainer.logger=false", "--trainer.enable_checkpointing=false",
        "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false",
    ]  # fmt: skip
    from lightning.pytorch import LightningDataModule, LightningModule

    cli = LightningCLI(
        LightningModule, LightningDataModule, subclass_mode_model=True, subclass_mode_data=True, args=arguments,
        save_config_callback=None, auto_configure_optimizers=False, trainer_defaults={"default_root_dir": str(tmp_path)},
    )  # fmt: skip
    cli.model.export(tmp_path / "export")
    assert load_discriminator(tmp_path / "export").encoder.encoding.max_length == 64
    (figures,) = cli.trainer.test(cli.model, datamodule=cli.datamodule, verbose=False)
    assert figures["test/sentence_auroc"] == pytest.approx(cli.model.metrics["sentence_auroc"])

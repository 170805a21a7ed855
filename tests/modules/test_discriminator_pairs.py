"""The Bradley-Terry loss of a discriminator, batches of whole prompts, the offset of its logits, and training on from an earlier head."""

from __future__ import annotations

import json
import math
import random

import pytest
import torch
from lightning.pytorch import Trainer
from torch.autograd import gradcheck

from aapa_lightning.anchor.context import Encoding
from aapa_lightning.anchor.load import load_discriminator
from aapa_lightning.anchor.training import bradley_terry_loss, calibrate, fit_offset, prompt_weights
from aapa_lightning.errors import ConfigError
from aapa_lightning.modules.discriminator import DiscriminatorModule
from aapa_lightning.modules.discriminator_data import DiscriminatorData

GOOD = ["The boats rest calmly", "The gulls call softly", "The crew sleeps below"]
BAD = ["zq xx kk", "qq zz 000", "kk 11 zz"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """30 prompts with one or two experts each, and one file of bad responses to all but the last five."""
    folder, rng = tmp_path_factory.mktemp("data"), random.Random(0)

    def text(words):
        return " ".join(f"{rng.choice(words)} {rng.choice('abcdef')}." for _ in range(rng.randint(1, 3)))

    rows = [{"prompt": f"Describe {i}.", "expert": [f"{text(GOOD)} {j}{i}." for j in range(1 + i % 2)]} for i in range(30)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    bad = [{"prompt": f"Describe {i}.", "response": f"{text(BAD)} {j}{i}."} for i in range(25) for j in range(2)]
    (folder / "bad.jsonl").write_text("".join(json.dumps(row) + "\n" for row in bad))
    return folder


def fit(files, encoder, *, epochs=8, data=None, **options):
    torch.manual_seed(0)
    module = DiscriminatorModule(str(encoder), **{"loss": "bradley_terry", "hidden_units": 16, "lr": 1e-2, "resamples": 0, **options})
    source = {"train": str(files / "train.jsonl"), "negatives": [str(files / "bad.jsonl")], "other_prompts": 0.0, "batch_size": 16}
    trainer = Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=files,
    )  # fmt: skip
    trainer.fit(module, datamodule=DiscriminatorData(**{**source, **(data or {})}))
    return module


def batch(seed=0, heads=2, dtype=torch.float32):
    """12 responses to 4 prompts: one with two experts, one without an expert, one without another; response 5 has no sentence."""
    generator = torch.Generator().manual_seed(seed)
    groups = torch.tensor([7, 7, 7, 7, 2, 2, 2, 4, 4, 9, 9, 7])
    labels = torch.tensor([1, 1, 0, 0, 1, 0, 0, 0, 0, 1, 1, 0], dtype=torch.bool)
    place = torch.tensor([0, 0, 1, 2, 2, 2, 3, 4, 6, 6, 7, 8, 9, 10, 11])
    logits = torch.randn(heads, len(place), generator=generator, dtype=dtype) * 3
    weights = torch.rand(heads, 10, generator=generator, dtype=dtype)[:, groups]
    return logits, place, labels, groups, weights


def by_pairs(logits, place, labels, groups, weights, smoothing=0.0):
    """The definition in double, pair by pair."""
    total, prompts = 0.0, 0
    rows = range(len(labels))
    means = [[float(head[place == i].double().mean()) for i in rows] for head in logits.detach()]
    for group in groups.unique().tolist():
        pairs = [
            (i, j)
            for i in rows for j in rows
            if groups[i] == groups[j] == group and labels[i] and not labels[j] and (place == i).any() and (place == j).any()
        ]  # fmt: skip
        prompts += bool(pairs)
        for mine, weight in zip(means, weights, strict=True):
            for i, j in pairs:
                gap = mine[i] - mine[j]
                nats = (1 - smoothing / 2) * math.log1p(math.exp(-gap)) + smoothing / 2 * math.log1p(math.exp(gap))
                total += float(weight[i]) * nats / len(pairs)
    return total / (len(logits) * prompts)


def test_loss_by_hand():
    # prompt 0: an expert with sentences 1 and 3, others at 0 and 2; prompt 1: experts at 0 and 1, another at 1
    logits = torch.tensor([[1.0, 3.0, 0.0, 2.0, 0.0, 1.0, 1.0]])
    place, labels = torch.tensor([0, 0, 1, 2, 3, 4, 5]), torch.tensor([True, False, False, True, True, False])
    groups = torch.tensor([0, 0, 0, 1, 1, 1])
    first = (math.log1p(math.exp(-2)) + math.log(2)) / 2
    second = (math.log1p(math.exp(1)) + math.log(2)) / 2
    assert float(bradley_terry_loss(logits, place, labels, groups, torch.ones(1, 6))) == pytest.approx((first + second) / 2, rel=1e-6)
    weights = torch.tensor([[0.5, 0.5, 0.5, 3.0, 3.0, 3.0]])
    assert float(bradley_terry_loss(logits, place, labels, groups, weights)) == pytest.approx((first / 2 + 3 * second) / 2, rel=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("heads", [1, 3])
def test_loss_against_a_loop_over_pairs(heads, smoothing):
    for seed in range(5):
        inputs = batch(seed, heads)
        assert float(bradley_terry_loss(*inputs, smoothing)) == pytest.approx(by_pairs(*inputs, smoothing), rel=1e-5)


def test_gradient():
    logits, place, labels, groups, weights = batch(dtype=torch.float64)
    logits.requires_grad_()
    assert gradcheck(lambda x: bradley_terry_loss(x, place, labels, groups, weights, 0.1), logits)
    bradley_terry_loss(logits, place, labels, groups, weights).backward()
    idle = ~torch.isin(groups[place], torch.tensor([7, 2]))
    assert bool((logits.grad[:, idle] == 0).all())
    assert bool((logits.grad[:, ~idle] != 0).all())
    torch.testing.assert_close(logits.grad.sum(1), torch.zeros(2, dtype=torch.float64), atol=1e-12, rtol=0)  # an offset changes nothing


def test_extremes_and_batches_without_a_pair():
    place, labels, groups = torch.tensor([0, 1]), torch.tensor([True, False]), torch.tensor([3, 3])
    for gap in (1e4, -1e4):
        logits = torch.tensor([[gap, -gap]], requires_grad=True)
        loss = bradley_terry_loss(logits, place, labels, groups, torch.ones(1, 2))
        loss.backward()
        assert float(loss.detach()) == pytest.approx(max(-2 * gap, 0))
        assert logits.grad.flatten().tolist() == pytest.approx([-1, 1] if gap < 0 else [0, 0])
    half = torch.tensor([[1.0, 2.0]], dtype=torch.bfloat16)
    assert bradley_terry_loss(half, place, labels, groups, torch.ones(1, 2)).dtype == torch.float32
    logits = torch.ones(1, 2, requires_grad=True)
    loss = bradley_terry_loss(logits, place, torch.tensor([True, True]), groups, torch.ones(1, 2))
    loss.backward()
    assert float(loss.detach()) == 0
    assert logits.grad.tolist() == [[0, 0]]


def test_order_of_responses_does_not_matter():
    logits, place, labels, groups, weights = batch()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(3))
    moved = order.argsort()[place]
    found = bradley_terry_loss(logits, moved, labels[order], groups[order], weights[:, order])
    torch.testing.assert_close(found, bradley_terry_loss(logits, place, labels, groups, weights))


def test_weights_of_prompts():
    groups, labels = torch.tensor([0, 0, 0, 1, 1, 2, 3, 3]), torch.tensor([1, 0, 0, 1, 0, 1, 0, 1], dtype=torch.bool)
    assert prompt_weights(labels, groups, torch.zeros(8, dtype=torch.int64), 1).tolist() == [[1, 1, 1, 1, 1, 0, 1, 1]]
    folds = torch.tensor([0, 0, 0, 1, 1, 1, 1, 1])
    expected = [[0, 0, 0, 1.5, 1.5, 0, 1.5, 1.5], [3, 3, 3, 0, 0, 0, 0, 0]]
    torch.testing.assert_close(prompt_weights(labels, groups, folds, 2), torch.tensor(expected))


def test_offset_and_calibration():
    generator = torch.Generator().manual_seed(0)
    labels, heads = torch.arange(4000) % 4 == 0, torch.arange(4000) // 4 % 2
    place = torch.arange(4000)
    # N(+-1, 1): the log-odds at equal prior of x are 2 x
    odds = 2 * (torch.randn(4000, generator=generator) + labels.float() * 2 - 1)
    assert fit_offset(odds + 5, place, labels) == pytest.approx(5, abs=0.15)
    true = torch.tensor([5.0, -3.0])
    offsets, temperature = calibrate(odds * 3 + true[heads], heads, 2, place, labels, offset=True, scale=True)
    assert temperature == pytest.approx(3, rel=0.1)
    assert offsets.tolist() == pytest.approx(true.tolist(), abs=0.6)
    probability = torch.sigmoid((odds * 3 + true[heads] - offsets[heads]) / temperature)
    for k in range(2):  # at equal prior, one half on average
        assert float(sum(probability[(heads == k) & (labels == side)].mean() for side in (True, False))) == pytest.approx(1, abs=1e-3)
    assert calibrate(odds + 5, heads, 3, place, labels, offset=False, scale=False) == (pytest.approx([0, 0, 0]), 1.0)
    assert fit_offset(odds[labels], place[: int(labels.sum())], torch.ones(4000, dtype=torch.bool)) == 0


def test_a_batch_holds_whole_prompts(files):
    data = DiscriminatorData(str(files / "train.jsonl"), [str(files / "bad.jsonl")], other_prompts=0.0, val_fraction=0.0, batch_size=16)
    data.setup("fit")
    data.whole_prompts = True
    examples, loader = data.examples["train"], data.train_dataloader()
    batches = list(loader)
    assert len(batches) == len(loader) == 5  # 25 prompts of 3 to 4 responses, 5 of them in a batch
    assert all(rows.dtype == torch.int64 and 15 <= len(rows) <= 20 for rows in batches)
    owners = [{examples[i].record.prompt for i in rows.tolist()} for rows in batches]
    assert sum(map(len, owners)) == len(set().union(*owners)) == 25
    everything = torch.cat(batches).tolist()
    assert sorted(everything) == [i for i, example in enumerate(examples) if int(example.record.prompt[9:-1]) < 25]
    loader.position = lambda: (1, 0)
    assert everything != torch.cat(list(loader)).tolist()  # another order every epoch


def test_learns_to_tell_apart_and_centres(files, tiny_model_dir, tmp_path):
    untrained = fit(files, tiny_model_dir, epochs=1, lr=1e-9).metrics
    module = fit(files, tiny_model_dir)
    assert untrained["paired_accuracy"] < 0.9 < module.metrics["paired_accuracy"]
    assert module._best["score"] == pytest.approx(module._measure("val", module._choosing(), 0)["paired_accuracy"])
    val, chosen = module.encoded["val"], torch.nonzero(module._choosing()).flatten()
    rows, place = val.sentences_of(chosen)
    logits = module.head(val.features)[0, rows].detach()
    assert fit_offset(logits, place, val.labels[chosen]) == pytest.approx(0, abs=0.05)
    module.export(tmp_path / "export")
    assert load_discriminator(tmp_path / "export").fingerprint() == module.discriminator().fingerprint()


@pytest.mark.parametrize("folds", [1, 3])
def test_the_offset_is_fitted_whatever_calibrate_says(folds, files, tiny_model_dir):
    module = fit(files, tiny_model_dir, epochs=2, folds=folds, calibrate=False, data={"val_fraction": 0.0})
    assert float(module.head.temperature) == 1
    train = module.encoded["train"]
    rows, place = train.sentences_of(torch.arange(len(train)))
    for k in range(folds):  # the first without a held-out split, the others on the fold that they did not see
        mine = train.folds[place] == k
        logits = module.head(train.features)[k, rows[mine]].detach()
        assert fit_offset(logits, place[mine], train.labels) == pytest.approx(0, abs=1e-4)


def test_an_experts_response_to_another_prompt_loses_to_the_prompts_own(files, tiny_model_dir):
    module = fit(files, tiny_model_dir, epochs=1, data={"negatives": [], "other_prompts": 1.0, "val_fraction": 0.0})
    assert len(torch.cat(list(module._data().train_dataloader()))) == 45 + 30
    assert {example.kind for example in module._data().examples["train"]} == {"expert", "other_prompt"}


def test_training_on_from_an_earlier_head(files, tiny_model_dir, tmp_path):
    first = fit(files, tiny_model_dir, epochs=4)
    first.export(tmp_path / "first")
    still = fit(files, tiny_model_dir, epochs=1, lr=1e-9, start=str(tmp_path / "first"), calibrate=False)
    for name in ("weight", "hidden_weight", "mean", "std"):
        torch.testing.assert_close(still.head.state_dict()[name], first.head.state_dict()[name], msg=name)
    assert still.head.dropout == 0.2
    fresh = fit(files, tiny_model_dir, epochs=1, lr=1e-9)
    assert still.metrics["paired_accuracy"] == pytest.approx(first.metrics["paired_accuracy"])
    assert fresh.metrics["paired_accuracy"] < still.metrics["paired_accuracy"]
    further = fit(files, tiny_model_dir, epochs=1, start=str(tmp_path / "first"), loss="cross_entropy")
    assert not torch.equal(further.head.weight, first.head.weight)


def test_refuses_to_train_on_from_another_discriminator(files, tiny_model_dir, tmp_path):
    start = str(tmp_path / "first")
    fit(files, tiny_model_dir, epochs=1, encoding=Encoding(batch_tokens=512)).export(start)
    for name, options in {
        "features": {"features": ("sentence",)},
        "folds": {"folds": 2},
        "hidden_units": {"hidden_units": 8},
        "encoding": {"encoding": Encoding(max_length=64)},
    }.items():
        with pytest.raises(ConfigError, match=rf"discriminator.json cannot be trained on: expected {name} "):
            fit(files, tiny_model_dir, start=start, **options)
    settings = json.loads((tmp_path / "first" / "discriminator.json").read_text())
    (tmp_path / "first" / "discriminator.json").write_text(json.dumps(settings | {"encoder_fingerprint": "another"}))
    with pytest.raises(ConfigError, match=r"expected encoder \(fingerprint\) .*found another"):
        fit(files, tiny_model_dir, start=start)
    (tmp_path / "first" / "discriminator.json").write_text(json.dumps(settings | {"fingerprint": "another"}))
    with pytest.raises(ConfigError, match="fingerprints differ"):
        fit(files, tiny_model_dir, start=start)
    with pytest.raises(ConfigError, match=r"expected a folder that holds a discriminator\.json"):
        fit(files, tiny_model_dir, start=str(tmp_path / "nowhere"))


def test_refuses_data_without_pairs(files, tiny_model_dir, tmp_path):
    (tmp_path / "other.jsonl").write_text("".join(json.dumps({"prompt": f"p{i}", "expert": "a."}) + "\n" for i in range(2)))
    (tmp_path / "own.jsonl").write_text('{"prompt": "p1", "response": "b."}\n')
    data = DiscriminatorData(str(tmp_path / "other.jsonl"), [str(tmp_path / "own.jsonl")], other_prompts=0.0, val_fraction=0.0)
    data.setup("fit")
    data.examples["train"] = [example for example in data.examples["train"] if example.record.prompt != "p1" or example.kind != "expert"]
    data.whole_prompts = True
    with pytest.raises(ConfigError, match="found none among 2 prompts with 1 expert responses and 1 others"):
        data.train_dataloader()
    with pytest.raises(ConfigError, match="loss: expected one of cross_entropy, bradley_terry"):
        DiscriminatorModule("x", loss="hinge")

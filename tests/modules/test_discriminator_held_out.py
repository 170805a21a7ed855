"""What a head has seen, and what it is judged on: cross-fitting by prompt and by text, and figures of prompts that chose nothing."""

from __future__ import annotations

import json

import pytest
import torch
from lightning.pytorch import Trainer

from aapa_lightning.anchor.bank import ExpertBank
from aapa_lightning.anchor.encoder_head import fold_of
from aapa_lightning.anchor.head import StackedHead
from aapa_lightning.anchor.segment import Segmenter, segment_texts
from aapa_lightning.anchor.training import (
    EncodedExamples,
    bradley_terry_loss,
    discriminator_loss,
    fit_temperature,
    prompt_weights,
    response_weights,
    trained_on,
)
from aapa_lightning.data.examples import build_examples, choosing_prompts, prompt_key, text_key
from aapa_lightning.errors import DataError
from aapa_lightning.metrics.functional.discrimination import Judged, weighted_auroc
from aapa_lightning.modules.discriminator import DiscriminatorModule, report
from aapa_lightning.modules.discriminator_data import DiscriminatorData
from aapa_lightning.types import Record


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def files(tmp_path):
    """48 prompts; some rows share a prompt, some prompts an expert's text, some a response; white space differs."""
    rows = [{"prompt": f"Describe {i}.", "expert": [f"The boats rest {i}.", f"The gulls call {i}."]} for i in range(48)]
    for i in range(0, 48, 6):
        rows[i]["expert"][0] = f"A  shared answer {i % 4}."
        rows.append({"prompt": f"Describe {i}.", "expert": f"Another row of {i}."})
    bad = [{"prompt": f"Describe {i}.", "response": "I cannot say.\n" if i % 9 == 0 else f"zq xx {i}."} for i in range(48)]
    bad[5]["response"] = "The boats rest 6."  # an expert's text, as a response to another prompt
    return write(tmp_path / "train.jsonl", rows), write(tmp_path / "bad.jsonl", bad)


def fit(files, encoder, *, data=None, epochs=1, **options):
    torch.manual_seed(0)
    module = DiscriminatorModule(str(encoder), **{"hidden_units": 8, "lr": 1e-2, "resamples": 20, **options})
    trainer = Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, datamodule=DiscriminatorData(**{"train": files[0], "negatives": [files[1]], "other_prompts": 2.0, **(data or {})}))
    return module


@pytest.mark.parametrize("loss", ["cross_entropy", "bradley_terry"])
@pytest.mark.parametrize("folds", [2, 3])
def test_no_head_has_seen_a_text_or_a_prompt_of_its_own_fold(folds, loss, files, tiny_model_dir):
    module = fit(files, tiny_model_dir, folds=folds, loss=loss)
    examples, train = module._data().examples["train"], module.encoded["train"]
    assert {example.kind for example in examples} == {"expert", "response", "other_prompt"}
    texts = [" ".join(example.text.split()) for example in examples]
    home = [fold_of(example.record.prompt, folds) for example in examples]
    for k in range(folds):
        known = [i for i, weight in enumerate(module._weights[k].tolist()) if weight > 0]
        own = [i for i, fold in enumerate(home) if fold == k]
        assert len(known) > len(texts) * 0.2
        assert {texts[i] for i in known}.isdisjoint({texts[i] for i in own})
        assert {examples[i].record.prompt for i in known}.isdisjoint({examples[i].record.prompt for i in own})
        # and the loss asks nothing of them: with other features there, the head's gradient stays the same, bit for bit
        barred = torch.tensor([texts[i] in {texts[j] for j in own} for i in range(len(texts))])
        gradients = []
        for shift in (0.0, 3.0):
            rows, place = train.sentences_of(torch.arange(len(train)))
            features = train.features[rows] + shift * barred[place, None]
            module.head.zero_grad()
            module.head.train()
            module.head.dropout = 0.0
            labels = (module.head(features), place, train.labels)
            value = bradley_terry_loss(*labels, train.groups, module._weights) if loss == "bradley_terry" else None
            (discriminator_loss(*labels, module._weights) if value is None else value).backward()
            gradients.append(module.head.weight.grad[k].clone())
        assert torch.equal(*gradients)


def test_partners_come_from_the_same_part_and_are_no_experts_of_the_prompt():
    records = [Record(f"p{i}", experts=(f"e{i}", "common")) for i in range(12)] + [Record("p3", experts=("e4",))]
    examples = build_examples(records, [], other_prompts=3.0, seed=1, part=lambda record: int(record.prompt[1:]) % 2)
    others = [example for example in examples if example.kind == "other_prompt"]
    assert len(others) > 12
    for example in others:
        assert example.text != "common"
        assert int(example.text[1:]) % 2 == int(example.record.prompt[1:]) % 2 or example.text == "e4"
        assert (example.record.prompt, example.text) != ("p3", "e4")
        assert example.text != f"e{example.record.prompt[1:]}"
    with pytest.raises(DataError, match="two different prompts in each fold"):
        build_examples(records[:2], [], other_prompts=1.0, seed=0, part=lambda record: int(record.prompt[1:]))


def test_weights_by_hand():
    folds, texts = torch.tensor([0, 0, 1, 1, 2]), torch.tensor([7, 8, 7, 9, 9])
    assert trained_on(folds, 3, texts).tolist() == [[0, 0, 0, 1, 1], [0, 1, 0, 0, 0], [1, 1, 1, 0, 0]]
    assert trained_on(folds, 1, texts).tolist() == [[1] * 5]
    labels = torch.tensor([True, False, True, False, False])
    assert response_weights(labels, folds, 3, texts)[2].tolist() == [1.25, 2.5, 1.25, 0, 0]
    # prompt 1 has a pair only with the response that head 0 must not see; prompts 2 and 3 are whole
    groups = torch.tensor([1, 1, 2, 2, 3, 3, 4])
    labels, folds = torch.tensor([1, 0, 1, 0, 1, 0, 1]).bool(), torch.tensor([1, 1, 1, 1, 1, 1, 0])
    texts = torch.tensor([1, 2, 3, 4, 5, 6, 2])
    assert prompt_weights(labels, groups, folds, 2, texts)[0].tolist() == [0, 0, 1.5, 1.5, 1.5, 1.5, 0]


def test_pairs_with_a_response_that_a_head_must_not_see_are_left_out():
    logits, place = torch.tensor([[1.0, 0.5, -2.0], [0.3, 0.1, 4.0]]), torch.arange(3)
    labels, groups = torch.tensor([True, False, False]), torch.zeros(3, dtype=torch.int64)
    found = bradley_terry_loss(logits, place, labels, groups, torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]]))
    nats = torch.nn.functional.softplus(torch.tensor([-0.5, -0.2, 3.7]))
    torch.testing.assert_close(found, (nats[0] + (nats[1] + nats[2]) / 2) / 2)


def test_texts_that_every_fold_shares_leave_nothing_to_train_on(tmp_path, tiny_model_dir):
    rows = [{"prompt": f"Is it {i}?", "expert": "Yes."} for i in range(30)]
    bad = [{"prompt": f"Is it {i}?", "response": f"No {i}."} for i in range(30)]
    files = write(tmp_path / "train.jsonl", rows), write(tmp_path / "bad.jsonl", bad)
    with pytest.raises(DataError, match=r"folds=2: head 0 is trained without .* leaves 0 expert responses and .* set folds: 1"):
        fit(files, tiny_model_dir, folds=2, data={"other_prompts": 0.0})


# ---- labels that are noise: experts' texts and others are draws from one distribution, features are random vectors of the texts


def features_of(texts, width=24):
    return torch.stack([torch.randn(width, generator=torch.Generator().manual_seed(text_key(text) % 2**31)) for text in texts])


def noise_encode(_encoder, _segmenter, _names, examples, *, folds, score_thinking):
    texts = [example.text for example in examples]
    return EncodedExamples(
        features=features_of(texts),
        response_index=torch.arange(len(texts)),
        seen=torch.ones(len(texts), dtype=torch.bool),
        labels=torch.tensor([example.kind == "expert" for example in examples]),
        groups=torch.tensor([prompt_key(example.record) for example in examples]),
        texts=torch.tensor(list(map(text_key, texts))),
        folds=torch.tensor([fold_of(example.record.prompt, folds) for example in examples]),
        lengths=torch.tensor(list(map(len, texts))),
    )


def cross_fitted_auroc(path, seed, folds, other_prompts, loss):
    """Of experts' responses against others by heads that memorise."""
    prompts = [f"{seed} {i}" for i in range(60)]
    records = [Record(prompt, experts=(f"expert {prompt} a", f"expert {prompt} b")) for prompt in prompts]
    negatives = write(
        path / "bad.jsonl", [{"prompt": prompt, "response": f"other {prompt} {j}", "sample": j} for prompt in prompts for j in (0, 1)]
    )
    examples = build_examples(
        records, [negatives], other_prompts=other_prompts, seed=seed, part=lambda record: fold_of(record.prompt, folds)
    )
    encoded = noise_encode(None, None, (), examples, folds=folds, score_thinking=False)
    head = StackedHead(folds, encoded.features.shape[1], 64, dropout=0.0, seed=seed).train()
    groups = encoded.groups.unique(return_inverse=True)[1]
    weigh = prompt_weights if loss == "bradley_terry" else response_weights
    weights = weigh(encoded.labels, *((groups,) if loss == "bradley_terry" else ()), encoded.folds, folds, encoded.texts)
    optimizer = torch.optim.Adam(head.parameters(), lr=0.04)
    for _ in range(25):
        logits = head(encoded.features)
        if loss == "bradley_terry":
            value = bradley_terry_loss(logits, encoded.response_index, encoded.labels, groups, weights)
        else:
            value = discriminator_loss(logits, encoded.response_index, encoded.labels, weights)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    rows = torch.tensor([example.kind != "other_prompt" for example in examples])
    logits = encoded.held_out(head.eval()(encoded.features).detach())
    return float(weighted_auroc(logits[rows], encoded.labels[rows], torch.ones(1, int(rows.sum())))[0])


@pytest.mark.parametrize(
    ("folds", "other_prompts", "loss"),
    [(2, 1.0, "cross_entropy"), (3, 2.0, "cross_entropy"), pytest.param(2, 2.0, "bradley_terry", marks=pytest.mark.slow)],
)
def test_noise_labels_give_a_held_out_auroc_of_a_half(folds, other_prompts, loss, tmp_path):
    found = torch.tensor([cross_fitted_auroc(tmp_path, seed, folds, other_prompts, loss) for seed in range(24)])
    error = float(found.std() / len(found) ** 0.5)
    assert error < 0.012
    assert abs(float(found.mean()) - 0.5) < 2.5 * error


@pytest.fixture
def noise(tmp_path, tiny_model_dir, monkeypatch):
    """``noise(seed)``: a module fitted to labels that are noise, through a Trainer."""
    monkeypatch.setattr("aapa_lightning.modules.discriminator.encode_examples", noise_encode)
    monkeypatch.setattr("aapa_lightning.modules.discriminator.feature_size", lambda names, size: 24)

    def run(seed, *, prompts=100, **options):
        names = [f"{seed} {i}" for i in range(prompts)]
        rows = [{"prompt": name, "expert": f"expert {name}"} for name in names]
        bad = [{"prompt": name, "response": f"other {name}"} for name in names]
        files = write(tmp_path / "train.jsonl", rows), write(tmp_path / "bad.jsonl", bad)
        data = {"other_prompts": 0.0, "val_fraction": 0.4, "batch_size": 1000, "seed": seed}
        return fit(files, tiny_model_dir, data=data, **{"epochs": 12, "lr": 0.03, **options})

    return run


@pytest.mark.slow
def test_figures_are_of_prompts_that_chose_nothing(noise):
    modules = [noise(seed) for seed in range(16)]
    reported = torch.tensor([module.metrics["sentence_auroc"] for module in modules])
    chose = torch.tensor([module._best["score"] for module in modules])
    error = float(reported.std() / 4)
    assert abs(float(reported.mean()) - 0.5) < 2.5 * error
    assert float(chose.mean()) > 0.5 + 2 * float(chose.std() / 4)  # what the epoch was chosen by flatters


def test_which_prompts_are_reported(noise):
    module = noise(0)
    val, data = module.encoded["val"], module._data()
    choosing, reported = module._choosing(), module._reported("val")
    assert int(choosing.sum()) == int(reported.sum()) == 40
    assert not bool((choosing & reported).any())
    assert set(val.groups[choosing].tolist()) == data.choosing == choosing_prompts([example.record for example in data.examples["val"]])
    assert (module.metrics["prompts"], module.metrics["choosing_prompts"]) == (20, 20)
    assert report(module.metrics).splitlines()[0].endswith(
        "of 20 held-out prompts that chose nothing; 20 others chose the epoch or fitted the temperature"
    )  # fmt: skip
    judged = Judged(module._logits("val")[0].cpu(), val.response_index, val.labels, val.groups, val.lengths)
    expected = weighted_auroc(judged.logits[reported], judged.labels[reported], torch.ones(1, 40))
    assert module.metrics["sentence_auroc"] == pytest.approx(float(expected[0]))
    last = noise(0, select="last", folds=2)
    assert (last.metrics["prompts"], last.metrics["choosing_prompts"]) == (40, 0)
    assert "chose the epoch" not in report(last.metrics)


def test_a_text_that_trained_or_chose_is_not_reported(files, tiny_model_dir):
    module = fit(files, tiny_model_dir, data={"val_fraction": 0.5})
    val, train, examples = module.encoded["val"], module.encoded["train"], module._data().examples["val"]
    reported = module._reported("val")
    earlier = set(train.texts.tolist()) | set(val.texts[module._choosing()].tolist())
    left_out = [
        example.text
        for example, keep in zip(examples, reported.tolist(), strict=True)
        if not keep and prompt_key(example.record) not in module._data().choosing
    ]
    assert any("shared answer" in text for text in left_out)
    assert earlier.isdisjoint(val.texts[reported].tolist())


def test_held_out_prompts_that_were_trained_on_give_no_figures(files, tiny_model_dir):
    with pytest.warns(UserWarning, match="training has too, so there are no figures"):
        module = fit(files, tiny_model_dir, data={"val": files[0]})
    assert "sentence_auroc" not in module.metrics
    assert module._best is None


# ---- one scale


def test_rollouts_bank_and_temperature_have_one_scale(files, tiny_model_dir, tmp_path):
    module = fit(files, tiny_model_dir, folds=3, epochs=3)
    judge, train = module.discriminator(), module._data().examples["train"]
    texts, records = [example.text for example in train], [example.record for example in train]
    spans = segment_texts(texts, Segmenter())
    logits, temperature = judge.score(texts, records, spans), module.metrics["temperature"]
    labels = torch.tensor([example.kind == "expert" for example in train])
    assert fit_temperature(logits * temperature, spans.response_index, labels) == pytest.approx(temperature, rel=1e-3)
    bank = ExpertBank.build(tmp_path / "bank", records[:3], judge)
    for record in records[:3]:
        experts = list(record.experts)
        again = judge.score(experts, [record] * len(experts), segment_texts(experts, Segmenter()))
        torch.testing.assert_close(bank.expert_logits(record)[: len(again)], again, rtol=1e-5, atol=1e-5)

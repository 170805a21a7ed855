"""The reward model's module: loss, skipping, resume, export, errors."""

import math
import shutil
import sys
from pathlib import Path

import pytest
import torch

from aapa_lightning.anchor.load import load_discriminator
from aapa_lightning.errors import ConfigError, DataError
from aapa_lightning.loop.evaluate import EvalStep
from aapa_lightning.policy import PolicySpec
from aapa_lightning.rewards.reward_model import RewardModelReward
from aapa_lightning.types import Record


@pytest.fixture(scope="module")
def rewards():
    """The builders of ``reward_kit.py``."""
    sys.path.insert(0, str(Path(__file__).parent))  # as it is when a worker runs by itself
    import reward_kit

    yield reward_kit
    sys.path.remove(str(Path(__file__).parent))


def logged(rewards, spec, *, steps=1, golden=True, module=None, **options):
    """Metrics of the last step, and the module."""
    module = module or rewards.make_reward_model(spec, **options)
    trainer = rewards.make_trainer(steps)
    rewards.fit(module, trainer, golden=rewards.make_golden() if golden else None)
    return {name: float(value) for name, value in trainer.callback_metrics.items()}, module


def score(model, tokenizer, text):
    """The classifier's output for one text without padding."""
    with torch.no_grad():
        return float(model(input_ids=torch.tensor([tokenizer(text)["input_ids"]])).logits)


@pytest.mark.parametrize("kind", ["ranking", "diff"])
def test_the_loss_of_a_step_by_hand(rewards, spec, kind):
    frozen = {"optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.0), "lr_scheduler": None}
    human, golden = rewards.make_records(4), rewards.make_golden(4)  # one step takes all of them
    module = rewards.make_reward_model(spec, golden_loss=kind, human_weight=0.8, golden_weight=0.3, **frozen)
    trainer = rewards.make_trainer(1)
    rewards.fit(module, trainer, human=human, golden=golden)

    def margins(records):
        texts = [[f"{record.prompt}\n{text}" for text in (record.chosen, record.rejected)] for record in records]
        pairs = [[score(module.model, module.tokenizer, text) for text in pair] for pair in texts]
        return [chosen - rejected for chosen, rejected in pairs]

    def ranking(margin):
        return math.log1p(math.exp(-margin))

    first = sum(map(ranking, margins(human))) / 4
    second = sum(ranking(margin) if kind == "ranking" else -margin for margin in margins(golden)) / 4
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert metrics["train/losses/human"] == pytest.approx(first, abs=1e-5)
    assert metrics["train/losses/golden"] == pytest.approx(second, abs=1e-5)
    assert metrics["train/loss"] == pytest.approx(0.8 * first + 0.3 * second, abs=1e-5)
    assert metrics["train/golden/accuracy"] == sum(margin > 0 for margin in margins(golden)) / 4


@pytest.mark.parametrize("sizes", [{"batch_size": 8, "golden_batch_size": 4}, {"batch_size": 4, "golden_batch_size": 12}])
def test_accumulation_does_not_change_the_step(rewards, spec, same, sizes):
    weights = []
    for accumulate in (1, 2, 4):
        module = rewards.make_reward_model(spec, sgd=True, **sizes)
        rewards.fit(module, rewards.make_trainer(2, accumulate=accumulate), golden=rewards.make_golden())
        weights.append(rewards.weights(module))
    same(weights[0], weights[1], atol=1e-5)
    same(weights[0], weights[2], atol=1e-5)


def test_golden_pairs_of_weight_0_are_as_if_they_were_not_there(rewards, spec, same, differ):
    dropout = PolicySpec(spec.model, config={"attention_dropout": 0.3}, disable_dropout=False)
    bare, with_golden, weighted = (
        logged(rewards, dropout, steps=4, golden=golden, golden_weight=weight)
        for golden, weight in ((False, 0.5), (True, 0.0), (True, 0.5))
    )
    same(rewards.weights(bare[1]), rewards.weights(with_golden[1]))
    assert bare[0]["train/loss"] == with_golden[0]["train/loss"]
    assert "train/golden/accuracy" in with_golden[0]
    assert "train/golden/accuracy" not in bare[0]
    assert differ(rewards.weights(bare[1]), rewards.weights(weighted[1]))


def test_human_pairs_of_weight_0_leave_the_golden_ones(rewards, spec, differ):
    _, module = logged(rewards, spec, human_weight=0.0)
    start = rewards.make_reward_model(spec)
    start.configure_model()
    assert differ(rewards.weights(module), rewards.weights(start))


def test_an_epoch_is_a_pass_over_the_human_pairs(rewards, spec):
    module = rewards.make_reward_model(spec)
    trainer = rewards.make_trainer(-1, max_epochs=1)
    rewards.fit(module, trainer, human=rewards.make_records(12), golden=rewards.make_golden(40))
    assert trainer.global_step == 3


@pytest.mark.parametrize("golden", [False, True])
def test_resume_from_every_step(rewards, kit, spec, tmp_path, golden):
    def run(folder, ckpt=None):
        module, rows = rewards.make_reward_model(spec), kit.Rows()
        trainer = rewards.make_trainer(5, accumulate=2, callbacks=[kit.SaveAt(folder)], logger=rows)
        pairs = {"human": rewards.make_records(8), "golden": rewards.make_golden(6) if golden else None}
        rewards.fit(module, trainer, **pairs, val=rewards.make_records(3), ckpt=ckpt)
        return rewards.weights(module), trainer.strategy.optimizer_state(trainer.optimizers[0])["state"], rows.rows

    whole = run(tmp_path / "whole")
    for step in range(1, 5):
        again = run(tmp_path / "again", tmp_path / "whole" / f"step={step}.ckpt")
        torch.testing.assert_close(again[:2], whole[:2], rtol=0, atol=0)
        trained = [[row for row in rows if "train/loss" in row[1] and row[0] >= step] for rows in (whole[2], again[2])]
        assert trained[0] == trained[1]


def test_a_step_that_is_not_finite_is_left_out(rewards, spec, same):
    def run(poisoned):
        module = rewards.make_reward_model(spec)
        plain = module.loss_terms

        def terms(window, micro_step):
            found = plain(window, micro_step)
            if poisoned and window.number == 1:
                found[1].outputs.losses = found[1].outputs.losses * float("inf")
            return found

        module.loss_terms = terms
        trainer = rewards.make_trainer(2 if poisoned else 1)
        rewards.fit(module, trainer, golden=rewards.make_golden())
        return rewards.weights(module), float(trainer.callback_metrics["train/skipped_steps"])

    (clean, none), (poisoned, one) = run(False), run(True)
    assert (none, one) == (0.0, 1.0)
    same(poisoned, clean)


def test_an_export_scores_as_in_training_and_is_trained_on(rewards, spec, tmp_path, same):
    _, module = logged(rewards, spec, steps=3, template="Q: {prompt}\nA: {response}", max_tokens=41, max_response_tokens=20)
    module.export(tmp_path)
    records = [
        *rewards.make_records(6),
        Record("short", chosen="<think>Hm.</think> The answer. ", rejected=""),
        Record("a very long prompt " * 9, chosen="x y z " * 20, rejected="b"),
    ]
    module.eval()
    with torch.no_grad():
        chosen, rejected = module._scores([module.pairs.encode(record) for record in records])
    moved = tmp_path.with_name(f"{tmp_path.name}-moved")
    shutil.copytree(tmp_path, moved)
    assert load_discriminator(moved).settings["model"] == str(moved)
    judge = load_discriminator(tmp_path)
    torch.testing.assert_close(judge.raw([record.chosen for record in records], records), chosen, rtol=0, atol=1e-5)
    reward = RewardModelReward(judge)
    torch.testing.assert_close(reward([record.rejected for record in records], records), rejected, rtol=0, atol=1e-5)
    again = rewards.make_reward_model(PolicySpec(str(tmp_path)))
    again.configure_model()
    same(rewards.weights(again), rewards.weights(module))


def test_the_head_comes_from_the_seed(rewards, spec, same, differ):
    heads = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(heads))
        module = rewards.make_reward_model(PolicySpec(spec.model, seed=seed))
        module.configure_model()
        heads.append(rewards.weights(module))
    same(heads[0], heads[1])
    assert differ(heads[0], heads[2])
    assert "score.weight" in heads[0]
    assert "score.bias" not in heads[0]


@pytest.mark.parametrize(
    ("config", "model"),
    [("qwen3", "Qwen3ForSequenceClassification"), ("bert", "BertForSequenceClassification")],
)
def test_models_from_scratch_with_and_without_a_causal_mask(rewards, tiny_model_dir, tmp_path, config, model):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "max_position_embeddings": 160}
    extra = {"num_key_value_heads": 2, "head_dim": 8} if config == "qwen3" else {}
    spec = PolicySpec(config={"model_type": config, **sizes, **extra}, tokenizer=str(tiny_model_dir))
    metrics, module = logged(rewards, spec)
    assert type(module.model).__name__ == model
    assert math.isfinite(metrics["train/loss"])
    module.export(tmp_path)
    record = rewards.make_records(1)[0]
    module.eval()
    with torch.no_grad():
        expected, _ = module._scores([module.pairs.encode(record)])
    torch.testing.assert_close(load_discriminator(tmp_path).raw([record.chosen], [record]), expected, rtol=0, atol=1e-5)


PAIR = Record("p", chosen="a", rejected="b", source="f:1")


@pytest.mark.parametrize(
    ("human", "golden", "message"),
    [
        ([Record("p", chosen="a", rejected="a", source="f:7")], None, r"f:7: chosen and rejected are the same.*reward model"),
        ([Record("p", chosen=" ", rejected="a", source="f:8")], None, r"f:8: empty chosen"),
        ([PAIR], [Record("p", experts=("a",), source="g:1")], r"g:1: no chosen and no rejected"),
        ([PAIR], [], r"data.golden: expected pairs.*empty"),
        ([], [PAIR], r"data.train: expected pairs.*empty"),
    ],
)
def test_records_that_are_no_pairs(rewards, spec, human, golden, message):
    module = rewards.make_reward_model(spec, batch_size=1, golden_batch_size=1)
    with pytest.raises(DataError, match=message):
        rewards.fit(module, rewards.make_trainer(1), human=human, golden=golden)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"golden_weight": -0.1}, r"golden_weight.*at least 0.*-0.1"),
        ({"human_weight": 0.0, "golden_weight": 0.0}, r"leave nothing to train on"),
        ({"golden_loss": "hinge"}, r"golden_loss.*hinge"),
        ({"overlong": "cut"}, r"overlong.*cut"),
        ({"batch_size": 3}, r"batch_size: expected a multiple.*1 x 2, found 3; use 2"),
        ({"golden_batch_size": 5}, r"golden_batch_size: expected a multiple.*found 5; use 4"),
        ({"template": "{prompt}"}, r"template: expected \{response\}"),
        ({"template": "{reference} {response}"}, r"template: .*no \{reference\}"),
        ({"max_tokens": 100, "max_response_tokens": 60}, r"more than twice max_response_tokens"),
        ({"max_tokens": 4096}, r"max_tokens: expected at most the 512 positions"),
    ],
)
def test_options_that_do_not_fit(rewards, spec, options, message):
    with pytest.raises(ConfigError, match=message):
        rewards.fit(rewards.make_reward_model(spec, **options), rewards.make_trainer(1, accumulate=2), golden=rewards.make_golden())


def test_golden_pairs_to_measure_need_a_split_to_join(rewards, spec):
    with pytest.raises(ConfigError, match=r"data.golden_val: expected `val` or `test`"):
        rewards.fit(rewards.make_reward_model(spec), rewards.make_trainer(1), golden_val=rewards.make_golden(4))


def test_a_base_that_is_not_there(rewards):
    with pytest.raises(ConfigError, match=r"base.tokenizer: cannot load a tokenizer from 'no/where'"):
        rewards.make_reward_model(PolicySpec("no/where")).configure_model()


def test_overlong_pairs(rewards, spec):
    pairs = [PAIR, Record("p", chosen="word " * 60, rejected="b", source="f:2"), Record("q " * 90, chosen="a", rejected="b", source="f:3")]

    def fit(overlong, human):
        module = rewards.make_reward_model(spec, batch_size=1, max_tokens=60, max_response_tokens=24, overlong=overlong)
        trainer = rewards.make_trainer(-1, max_epochs=1)
        rewards.fit(module, trainer, human=human)
        return trainer.global_step

    assert fit("truncate", pairs) == 3
    assert fit("drop", pairs) == 1
    with pytest.raises(DataError, match=r"f:2: .*max_tokens=60.*2 of 3 pairs.*truncate or drop"):
        fit("error", pairs)
    with pytest.raises(DataError, match=r"f:2: .*2 of 2 pairs.*truncate$"):
        fit("drop", pairs[1:])


def test_pairs_that_are_the_same_once_cut_are_left_out_before_training(rewards, spec):
    thought = [Record(f"q{i}", chosen=f"<think>{i}</think>yes", rejected="yes", source=f"h.jsonl:{i}") for i in range(4)]
    module = rewards.make_reward_model(spec)
    with pytest.raises(DataError, match=r"h\.jsonl:0: once thinking and overlong ends are cut"):
        rewards.fit(module, rewards.make_trainer(1), human=thought)
    module.configure_model()
    assert [record.prompt for record in module.pairs.select([*thought, Record("x", chosen="a", rejected="b")], "truncate")] == ["x"]


def test_sixteen_bit_precision_is_refused(rewards, spec):
    with pytest.raises(ConfigError, match=r"bf16-true.*base\.dtype"):
        rewards.fit(rewards.make_reward_model(spec), rewards.make_trainer(1, precision="bf16-true"))


def test_ties_are_half_right_and_calibrated_as_such(rewards, spec):
    module = rewards.make_reward_model(spec)
    module.configure_model()
    module._scores = lambda pairs: (torch.zeros(len(pairs)), torch.zeros(len(pairs)))
    module._evaluate(EvalStep([0, 1], rewards.make_records(2)), 0)
    accuracy, calibration = module._figures[0]
    assert (float(accuracy.compute()), float(calibration.compute())) == (0.5, pytest.approx(0.0, abs=1e-6))

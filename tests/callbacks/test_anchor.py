"""``AnchorCallback`` in a real Trainer with a module of a few lines."""

import warnings
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from aapa_lightning.anchor.guard import Guard
from aapa_lightning.anchor.schedule import Adaptive
from aapa_lightning.anchor.term import AnchorTerm
from aapa_lightning.callbacks.anchor import AnchorCallback
from aapa_lightning.errors import ConfigError
from aapa_lightning.types import Record, Rollouts


class Judge(nn.Module):
    needs_experts = whole_response = False

    def __init__(self, weight=1.0):
        super().__init__()
        self.linear = nn.Linear(1, 1)
        nn.init.constant_(self.linear.weight, weight)
        nn.init.zeros_(self.linear.bias)

    def score(self, responses, records, spans):
        lengths = [[float(b - a)] for row in spans.char_spans for a, b in row]
        return self.linear(torch.tensor(lengths))[:, 0]

    def fingerprint(self):
        return f"{self.linear.weight.item():.6f}".ljust(64, "0")

    def save(self, folder: Path):
        raise AssertionError


def rollouts_of(step):
    texts = [f"{'a' * (step + 2)}.", "bb."]
    ends = torch.tensor([[len(text)] for text in texts])
    ones = torch.ones(2, 1)
    return Rollouts(
        prompt_ids=ones.long(),
        prompt_mask=ones.bool(),
        response_ids=ones.long(),
        response_mask=ones.bool(),
        truncated=torch.zeros(2, dtype=torch.bool),
        group_ids=torch.zeros(2, dtype=torch.int64),
        engine_logprobs=-ones,
        token_ends=ends,
        texts=texts,
        records=[Record(prompt="p")] * 2,
    )


class Policy(L.LightningModule):
    """Moves one parameter by the task, and by the anchor when there is one."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.anchor: AnchorTerm | None = None
        self.seen = []

    def training_step(self, batch, batch_idx):
        loss = (self.weight - 1.0).square().sum()
        if self.anchor is not None:
            rollouts = rollouts_of(self.global_step)
            signal = self.anchor.signal(rollouts)
            self.anchor.observe(rollouts, signal, torch.tensor([1.0 - 0.05 * self.global_step, 0.0]))
            weight = self.anchor.weight(self.global_step)
            self.seen.append((self.global_step, weight))
            if weight:
                loss = loss + weight * (self.weight * signal.advantages[0, 0]).sum()
            self.log_dict({f"anchor/{name}": value for name, value in signal.metrics.items()})
        return loss

    def validation_step(self, batch, batch_idx):
        assert not getattr(getattr(self.anchor, "discriminator", None), "training", False)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.1)


def fit(callback, folder, *, steps=6, accumulate=1, ckpt_path=None, extra=(), module=None):
    module = module or Policy()
    trainer = L.Trainer(
        max_steps=steps,
        accumulate_grad_batches=accumulate,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in extra),
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[*([callback] if callback else []), *extra],
        default_root_dir=folder,
        val_check_interval=4,
        limit_val_batches=1,
    )
    loader = DataLoader(torch.zeros(24, 1))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*workers.*")
        trainer.fit(module, loader, loader, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    return module, trainer


def test_anchored_fit_leaves_the_discriminator_as_it_was(tmp_path):
    judge = Judge()
    before = {name: value.clone() for name, value in judge.state_dict().items()}
    callback = AnchorCallback(judge, weight=0.5)
    anchored, trainer = fit(callback, tmp_path)
    bare, _ = fit(None, tmp_path)
    assert not torch.equal(anchored.weight, bare.weight)
    assert all(torch.equal(value, before[name]) for name, value in judge.state_dict().items())
    assert not judge.training
    assert not any(p.requires_grad for p in judge.parameters())
    assert callback.term.windows == 6
    assert "anchor/score" in trainer.callback_metrics
    assert anchored.anchor is None  # as it was found
    assert not any("judge" in name or "anchor" in name for name in anchored.state_dict())


def test_weight_zero_is_the_bare_objective_and_still_logs(tmp_path):
    zero, trainer = fit(AnchorCallback(Judge(), weight=0.0), tmp_path)
    bare, _ = fit(None, tmp_path)
    assert torch.equal(zero.weight, bare.weight)
    assert trainer.callback_metrics["anchor/score_std_within"] >= 0
    assert len(zero.seen) == 6


def test_schedule_advances_by_optimiser_step_not_by_batch(tmp_path):
    callback = AnchorCallback(Judge(), weight=Adaptive(0.4))
    module, _ = fit(callback, tmp_path, steps=4, accumulate=3)
    assert callback.term.windows == 4
    assert [step for step, _ in module.seen] == [step for step in range(4) for _ in range(3)]


def build_adaptive():
    return AnchorCallback(Judge(), weight=Adaptive(0.4, tolerance=0.0), guard=Guard(max_length_vs_expert=0.1))


def test_resumed_run_ends_as_the_uninterrupted_one(tmp_path):
    whole, _ = fit(build_adaptive(), tmp_path / "whole", steps=6)
    saver = ModelCheckpoint(tmp_path, filename="half", every_n_train_steps=3, save_top_k=-1, enable_version_counter=False)
    fit(build_adaptive(), tmp_path, steps=3, extra=[saver])
    resumed, _ = fit(build_adaptive(), tmp_path, steps=6, ckpt_path=tmp_path / "half.ckpt")
    assert torch.equal(resumed.weight, whole.weight)
    assert resumed.seen == whole.seen[3:]
    assert resumed.seen[-1][1] < 0.4
    state = torch.load(tmp_path / "half.ckpt", weights_only=True)["callbacks"]["AnchorCallback"]
    assert set(state) == {"fingerprint", "schedule", "guard", "pending", "windows", "trips", "step"}
    with pytest.raises(ConfigError, match="another discriminator"):
        fit(AnchorCallback(Judge(2.0), weight=Adaptive(0.4)), tmp_path, ckpt_path=tmp_path / "half.ckpt")


@pytest.mark.parametrize(("action", "steps"), [("warn", 6), ("stop", 5)])
def test_guard_warns_or_stops(tmp_path, action, steps):
    # the first window has equal scores, so no correlation: the limit is broken in windows 2 to 5
    guard = Guard(min_correlation=2.0, patience=4, action=action)
    with pytest.warns(UserWarning, match="correlation is .* below 2 for 4 windows"):
        _, trainer = fit(AnchorCallback(Judge(), guard=guard), tmp_path)
    assert trainer.global_step == steps


def test_errors_before_any_step(tmp_path):
    class Deaf(Policy):
        def __init__(self):
            super().__init__()
            del self.anchor

    with pytest.raises(ConfigError, match="Deaf"):
        fit(AnchorCallback(Judge()), tmp_path, module=Deaf())
    with pytest.raises(ConfigError, match="aapa fit --model DiscriminatorModule"):
        fit(AnchorCallback(str(tmp_path / "nowhere")), tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="aapa fit --model DiscriminatorModule"):
        fit(AnchorCallback(str(tmp_path / "empty")), tmp_path)
    with pytest.raises(ConfigError, match="aapa bank build"):
        fit(AnchorCallback(Judge(), bank=str(tmp_path / "nowhere")), tmp_path)
    with pytest.raises(ConfigError, match="expects a bank"):
        fit(AnchorCallback(Judge(), transform="bt_gap"), tmp_path)


def test_a_folder_and_its_bank(tmp_path, tiny_model_dir):
    from aapa_lightning.anchor.bank import ExpertBank
    from aapa_lightning.anchor.context import Encoding
    from aapa_lightning.anchor.encoder import FrozenEncoder
    from aapa_lightning.anchor.encoder_head import EncoderHeadDiscriminator
    from aapa_lightning.anchor.head import StackedHead, feature_size

    encoder = FrozenEncoder(str(tiny_model_dir), Encoding(max_length=64))
    head = StackedHead(2, feature_size(["sentence"], encoder.hidden_size), hidden_units=4)
    judge = EncoderHeadDiscriminator(encoder, head, ["sentence"])
    judge.save(tmp_path / "judge")
    ExpertBank.build(tmp_path / "bank", [Record(prompt="p", experts=("An answer. And more.",))], judge)
    callback = AnchorCallback(str(tmp_path / "judge"), bank=str(tmp_path / "bank"), transform="bt_gap", granularity="sentence")
    anchored, _ = fit(callback, tmp_path)
    bare, _ = fit(None, tmp_path)
    assert not torch.equal(anchored.weight, bare.weight)
    assert callback.term.discriminator.fingerprint() == judge.fingerprint()
    assert not any(p.requires_grad for p in callback.term.discriminator.encoder.model.parameters())
    head.bias.data += 1
    judge.save(tmp_path / "other")
    with pytest.raises(ConfigError, match="bank"):
        fit(AnchorCallback(str(tmp_path / "other"), bank=str(tmp_path / "bank")), tmp_path)


def test_arguments_parse_from_yaml():
    from jsonargparse import ArgumentParser

    anchor = "aapa_lightning.anchor"
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(AnchorCallback, "callback")
    config = {
        "class_path": "aapa_lightning.callbacks.anchor.AnchorCallback",
        "init_args": {
            "discriminator": "runs/discriminator/export",
            "weight": {
                "class_path": f"{anchor}.schedule.Warmup",
                "init_args": {
                    "schedule": {"class_path": f"{anchor}.schedule.Adaptive", "init_args": {"schedule": 0.3}},
                    "steps": 10,
                },
            },
            "transform": "gan_sat",
            "guard": {"class_path": f"{anchor}.guard.Guard", "init_args": {"min_auroc": 0.4, "action": "stop"}},
            "segmenter": {"language": "de"},
        },
    }
    callback = parser.instantiate_classes(parser.parse_object({"callback": config})).callback
    assert callback.options["weight"].weight(5) == pytest.approx(0.15)
    assert callback.options["guard"].lowest == {"auroc": 0.4}
    plain = parser.parse_object({"callback": {"class_path": config["class_path"], "init_args": {"discriminator": "x", "weight": 0.1}}})
    assert parser.instantiate_classes(plain).callback.options["weight"] == 0.1

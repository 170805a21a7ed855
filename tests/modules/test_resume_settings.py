"""What a resume does with settings that have changed: applied as if they had been there, refused by name, or told."""

from __future__ import annotations

import logging
from functools import partial

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR, LinearLR, SequentialLR, StepLR

from aapa_lightning.errors import ConfigError

ADAMW = partial(torch.optim.AdamW, lr=1e-2)
SLOW = partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.1)


class Rates:
    """The learning rate and weight decay of every step."""

    def __init__(self, kit):
        class Callback(kit.L.Callback):
            def on_before_optimizer_step(_, trainer, module, optimizer):
                (group,) = optimizer.param_groups
                self.seen.append((round(group["lr"], 12), group["weight_decay"]))

        self.seen = []
        self.callback = Callback()


def run(kit, spec, folder, steps, ckpt=None, name="sft", data=None, **options):
    rates = Rates(kit)
    module = kit.make_module(name, spec, **options)
    trainer = kit.make_trainer(steps, callbacks=[rates.callback, kit.SaveAt(folder)])
    kit.fit(module, trainer, data=kit.make_records(8) if data is None else data, ckpt=ckpt)
    return rates.seen


def warm_up(optimizer, steps=2):
    parts = [LinearLR(optimizer, start_factor=0.5, total_iters=steps), StepLR(optimizer, step_size=1, gamma=0.5)]
    return SequentialLR(optimizer, parts, milestones=[steps])


SCHEDULES = {
    "rate": ({"optimizer": SLOW, "lr_scheduler": None}, {"optimizer": ADAMW, "lr_scheduler": None}),
    "rate under a schedule": ({"optimizer": SLOW}, {"optimizer": ADAMW}),
    "gamma": (
        {"lr_scheduler": partial(StepLR, step_size=2, gamma=0.1)},
        {"lr_scheduler": partial(StepLR, step_size=2, gamma=0.9)},
    ),
    "another schedule": ({"lr_scheduler": warm_up}, {"lr_scheduler": partial(StepLR, step_size=2, gamma=0.9)}),
    "a function": (
        {"lr_scheduler": partial(LambdaLR, lr_lambda=lambda step: 1 / (1 + step))},
        {"lr_scheduler": partial(LambdaLR, lr_lambda=lambda step: 1 / (2 + step))},
    ),
    "none any more": ({"lr_scheduler": None}, {"lr_scheduler": warm_up}),
    "a first one": ({"lr_scheduler": warm_up}, {"lr_scheduler": None}),
}


@pytest.mark.parametrize(("after", "before"), SCHEDULES.values(), ids=SCHEDULES)
def test_a_changed_rate_or_schedule_counts_as_if_it_had_been_there_from_the_start(kit, spec, tmp_path, after, before):
    whole = run(kit, spec, tmp_path / "whole", 5, **after)
    old = run(kit, spec, tmp_path / "old", 3, **before)
    assert old != whole[:3]
    resumed = run(kit, spec, tmp_path / "new", 5, ckpt=tmp_path / "old" / "step=3.ckpt", **after)
    assert resumed == whole[3:]


def test_and_once_more_after_another_resume(kit, spec, tmp_path):
    whole = run(kit, spec, tmp_path / "whole", 5, optimizer=SLOW)
    run(kit, spec, tmp_path / "old", 2, optimizer=ADAMW)
    run(kit, spec, tmp_path / "new", 3, ckpt=tmp_path / "old" / "step=2.ckpt", optimizer=SLOW)
    assert run(kit, spec, tmp_path / "new", 5, ckpt=tmp_path / "new" / "step=3.ckpt", optimizer=SLOW) == whole[3:]


@pytest.mark.parametrize("name", ["grpo", "preference"])
def test_in_every_module_a_rate_of_zero_moves_nothing(kit, spec, tmp_path, name):
    still = partial(torch.optim.AdamW, lr=0.0, weight_decay=0.0)
    run(kit, spec, tmp_path, 1, name=name)
    run(kit, spec, tmp_path, 2, name=name, ckpt=tmp_path / "step=1.ckpt", optimizer=still)
    before, after = (torch.load(tmp_path / f"step={step}.ckpt", weights_only=True)["state_dict"] for step in (1, 2))
    torch.testing.assert_close(after, before, rtol=0, atol=0)


REFUSED = {
    "optimiser": (
        {"optimizer": partial(torch.optim.SGD, lr=0.1)},
        r"state of torch\.optim\.adamw\.AdamW .* this run has torch\.optim\.sgd\.SGD",
    ),
    "seed": ({"seed": 4}, "began with seed 3, and this one has 4"),
}


@pytest.mark.parametrize(("options", "said"), REFUSED.values(), ids=REFUSED)
def test_what_would_make_another_run_of_it_is_refused_by_name(kit, spec, tmp_path, options, said):
    run(kit, spec, tmp_path, 1)
    with pytest.raises(ConfigError, match=said):
        run(kit, spec, tmp_path, 2, ckpt=tmp_path / "step=1.ckpt", **options)


def test_changed_data_are_refused_and_grown_ones_told_but_not_inside_a_window(kit, spec, tmp_path, caplog):
    data = kit.make_records(8)
    options = {"name": "grpo", "minibatches": 2}
    run(kit, spec, tmp_path, 2, data=data, **options)
    for changed in ([*data[1:], data[0]], data[:-1], [*data[:-1], kit.make_records(9)[-1]]):
        with pytest.raises(ConfigError, match=r"data\.train has changed since the checkpoint"):
            run(kit, spec, tmp_path, 3, ckpt=tmp_path / "step=2.ckpt", data=changed, **options)
    with caplog.at_level(logging.WARNING):
        run(kit, spec, tmp_path / "grown", 3, ckpt=tmp_path / "step=2.ckpt", data=kit.make_records(9), **options)
    assert "data.train has grown from 8 rows to 9" in caplog.text
    with pytest.raises(ConfigError, match=r"data\.train has changed since the checkpoint"):
        run(kit, spec, tmp_path, 3, ckpt=tmp_path / "step=1.ckpt", data=kit.make_records(9), **options)


def test_a_kl_is_not_switched_on_inside_a_window(kit, spec, tmp_path):
    options = {"name": "grpo", "minibatches": 2}
    run(kit, spec, tmp_path, 2, **options)
    with pytest.raises(ConfigError, match="beta or reward_kl is above 0 and was 0"):
        run(kit, spec, tmp_path / "again", 2, ckpt=tmp_path / "step=1.ckpt", beta=0.1, **options)
    run(kit, spec, tmp_path / "again", 3, ckpt=tmp_path / "step=2.ckpt", beta=0.1, **options)

"""What ``--resume`` says of a configuration that is not the checkpoint's."""

from __future__ import annotations

import pytest
import torch
import yaml

from aapa_lightning.commands.resume import compare, read_run
from aapa_lightning.errors import ConfigError

BASE = {
    "seed_everything": 0,
    "run_dir": "a",
    "trainer": {"max_steps": 3, "callbacks": [{"class_path": "A", "init_args": {"patience": 1}}]},
    "model": {
        "class_path": "GRPOModule",
        "init_args": {"beta": 0.1, "seed": None, "policy": {"model": "x", "packing": "auto", "lora": None}, "server": {"body": "secret"}},
    },
}


def changed(**leaves):
    """The configuration with values at dotted names, ``__`` for a dot."""
    config = yaml.safe_load(yaml.safe_dump(BASE))
    for name, value in leaves.items():
        *path, last = name.split("__")
        place = config
        for part in path:
            place = place[int(part) if part.isdecimal() else part]
        place[last] = value
    return yaml.safe_dump(config)


@pytest.mark.parametrize(
    ("leaves", "name"),
    [
        ({"seed_everything": 1}, "seed_everything"),
        ({"model__class_path": "SFTModule"}, r"model\.class_path"),
        ({"model__init_args__seed": 7}, r"model\.init_args\.seed"),
        ({"model__init_args__policy__model": "y"}, r"model\.init_args\.policy\.model"),
    ],
)
def test_what_makes_another_run_is_refused_by_name(leaves, name):
    with pytest.raises(ConfigError, match=rf"resume: {name} has changed since the checkpoint"):
        compare(yaml.safe_dump(BASE), changed(**leaves))


def test_the_rest_is_told_numbers_and_classes_with_their_values_text_without():
    now = changed(
        run_dir="b",
        trainer__max_steps=6,
        trainer__callbacks__0__init_args={"patience": 2},
        model__init_args__beta=0.2,
        model__init_args__policy__packing=False,
        model__init_args__server={"body": "another secret"},
    )
    told = compare(yaml.safe_dump(BASE), now)
    assert sorted(told) == [
        "model.init_args.beta 0.1 -> 0.2",
        "model.init_args.policy.packing",
        "model.init_args.server.body",
        "trainer.callbacks.0.init_args.patience 1 -> 2",
        "trainer.max_steps 3 -> 6",
    ]


def test_nothing_has_changed_and_nothing_is_known():
    assert compare(yaml.safe_dump(BASE), yaml.safe_dump(BASE)) == []
    assert compare(None, changed(seed_everything=1)) == []


def test_under_adapters_the_base_model_may_have_moved():
    lora = {"model": "x", "packing": "auto", "lora": {"r": 4}}
    now = changed(model__init_args__policy=lora | {"model": "y"})
    assert compare(changed(model__init_args__policy=lora), now) == ["model.init_args.policy.model"]


def test_a_checkpoint_of_weights_alone_is_no_run_but_can_be_measured(tmp_path):
    path = tmp_path / "weights.ckpt"
    torch.save({"state_dict": {}, "global_step": 3, "pytorch-lightning_version": "2.6.0"}, path)
    assert read_run(str(path), training=False)["global_step"] == 3
    with pytest.raises(ConfigError, match=r"weights\.ckpt is no checkpoint of a run: it lacks epoch, loops, optimizer_states"):
        read_run(str(path), training=True)

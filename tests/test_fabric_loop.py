"""The loop of docs/fabric.md, executed as it stands there, gives the Trainer's weights bit for bit."""

import importlib.util
import re
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning import Fabric

from aapa_lightning.anchor.schedule import Adaptive
from aapa_lightning.anchor.term import AnchorTerm
from aapa_lightning.callbacks.anchor import AnchorCallback
from aapa_lightning.logprobs import response_logprobs
from aapa_lightning.policy import PolicySpec, load_policy
from aapa_lightning.rewards.compose import RewardSet
from aapa_lightning.rollout.base import SamplingParams

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def train():
    """``train`` of the page's code block."""
    [block] = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "fabric.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    namespace = {}
    exec(compile(block, "docs/fabric.md", "exec"), namespace)  # noqa: S102  # our own page
    return namespace["train"]


@pytest.fixture(scope="module")
def kit():
    source = importlib.util.spec_from_file_location("modules_kit", ROOT / "tests" / "modules" / "kit.py")
    module = importlib.util.module_from_spec(source)
    sys.modules["modules_kit"] = module
    source.loader.exec_module(module)
    return module


def test_the_documented_loop_equals_the_trainer(train, kit, tiny_model_dir):
    spec = PolicySpec(str(tiny_model_dir))

    def schedule():
        return Adaptive(0.7, decay=0.5, fast=1.0, slow=3.0, tolerance=0.0)

    anchor = AnchorTerm(kit.ByteJudge(), weight=schedule())
    fabric = Fabric(accelerator="cpu", devices=1)
    model = train(fabric, spec, kit.make_records(), RewardSet([kit.TextReward()]), anchor, epochs=2)

    module = kit.make_module(
        "grpo",
        spec,
        updates_per_window=2,
        optimizer=partial(torch.optim.AdamW, lr=1e-2),
        lr_scheduler=None,
        sampling=SamplingParams(max_new_tokens=6),
        seed=0,
    )
    callback = AnchorCallback(kit.ByteJudge(), weight=schedule())
    trainer = kit.make_trainer(max_epochs=2, accumulate=2, gradient_clip_val=1.0, callbacks=[callback])
    kit.fit(module, trainer)
    assert trainer.global_step == 12
    assert callback.term.state_dict() == anchor.state_dict()
    assert anchor.weight(12) < 0.7
    state = model.state_dict()
    for name, value in module.model.state_dict().items():
        torch.testing.assert_close(state[name], value, rtol=0, atol=0)


def test_wrappers_do_not_hide_position_ids(tiny_model_dir):
    """Left padding needs explicit positions, also when a wrapper has a signature of its own."""
    absolute = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32, "initializer_range": 0.5}
    model, _ = load_policy(PolicySpec(config=absolute, tokenizer=str(tiny_model_dir)))
    ids, mask = torch.tensor([[1, 2, 3, 4]]), torch.ones(1, 4, dtype=torch.bool)
    padded, holes = torch.tensor([[9, 9, 1, 2, 3, 4]]), torch.tensor([[False, False, True, True, True, True]])
    response, kept = torch.tensor([[5, 6]]), torch.ones(1, 2, dtype=torch.bool)
    expected, _ = response_logprobs(model, ids, mask, response, kept)
    for wrapped in (Fabric(accelerator="cpu", devices=1).setup_module(model), torch.compile(model, backend="eager")):
        found, _ = response_logprobs(wrapped, padded, holes, response, kept)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)

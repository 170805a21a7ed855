"""The README's Python example runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from aapa_lightning.anchor.context import Encoding
from aapa_lightning.anchor.encoder import FrozenEncoder
from aapa_lightning.anchor.encoder_head import EncoderHeadDiscriminator
from aapa_lightning.anchor.head import StackedHead, feature_size
from aapa_lightning.anchor.segment import Segmenter

README = Path(__file__).resolve().parent.parent / "README.md"


@pytest.fixture
def discriminator(tiny_model_dir, tmp_path) -> Path:
    """An untrained discriminator over the tiny policy, saved."""
    encoder = FrozenEncoder(str(tiny_model_dir), Encoding())
    head = StackedHead(1, feature_size(("sentence",), encoder.hidden_size), 0, 0.0, 0)
    EncoderHeadDiscriminator(encoder, head, ("sentence",), Segmenter(), {}).save(tmp_path / "export")
    return tmp_path / "export"


def test_the_example_trains_an_anchored_policy(tiny_model_dir, discriminator, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (example,) = (block for block in re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL) if "import lightning" in block)
    for shown, used in {
        "Qwen/Qwen3-0.6B": str(tiny_model_dir),
        "runs/discriminator/export": str(discriminator),
        "max_new_tokens=64": "max_new_tokens=8",
        "max_steps=100": "max_steps=2, accelerator='cpu', logger=False, enable_checkpointing=False, enable_progress_bar=False",
    }.items():
        assert shown in example
        example = example.replace(shown, used)
    names: dict = {}
    exec(compile(example, "README.md", "exec"), names)  # noqa: S102 - our own page
    assert names["trainer"].global_step == 2
    assert "train/anchor/score" in names["trainer"].callback_metrics
    assert "train/losses/anchor" in names["trainer"].callback_metrics

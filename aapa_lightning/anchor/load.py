"""From a folder to a discriminator."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aapa_lightning.anchor.base import Discriminator
from aapa_lightning.documents import read_json
from aapa_lightning.errors import ConfigError

#: Names in ``discriminator.json`` and the classes that they mean.
DISCRIMINATORS = {
    "encoder_head": "aapa_lightning.anchor.encoder_head.EncoderHeadDiscriminator",
    "reward_model": "aapa_lightning.anchor.polar.RewardModelDiscriminator",
    "sequence_classifier": "aapa_lightning.anchor.classifier.SequenceClassifierDiscriminator",
}


def load_discriminator(
    folder: str | Path, *, allow: Sequence[str] = (), encoder: str | None = None, trust_remote_code: bool = False
) -> Discriminator:
    """Load a discriminator that ``save`` wrote.

    Args:
        folder: holds ``discriminator.json`` and weights.
        allow: class paths of your own discriminators that a folder may name; each has ``load(folder, *, encoder, trust_remote_code)``.
            A folder is data and never chooses code by itself.
        encoder: where the encoder lies now, if it moved since.
        trust_remote_code: for the encoder.

    Raises:
        ConfigError: the folder is missing or damaged, names a class that is not allowed, or does not fit its encoder.
    """
    file = Path(folder) / "discriminator.json"
    if not file.is_file():
        raise ConfigError(
            f"no discriminator at {str(folder)!r}: expected a folder with discriminator.json; "
            "train one with `aapa fit --model DiscriminatorModule`"
        )
    name = read_json(file).get("class")
    path = DISCRIMINATORS.get(str(name)) or (name if name in allow else None)
    if path is None:
        raise ConfigError(
            f"{file}: class {name!r} is not one of {sorted(DISCRIMINATORS)}; a class of your own must be "
            f"allowed by name, found allowed: {list(allow)}"
        )
    return _find(path).load(Path(folder), encoder=encoder, trust_remote_code=trust_remote_code)


def _find(path: str) -> Any:
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"cannot import the discriminator class {path!r}: {error}") from error

"""A discriminator trained before, as the start of the next one."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from aapa_lightning.anchor.encoder import FrozenEncoder
from aapa_lightning.anchor.encoder_head import HEAD_FILE, KINDS, EncoderHeadDiscriminator
from aapa_lightning.anchor.files import read_tensors
from aapa_lightning.anchor.head import Feature, StackedHead
from aapa_lightning.anchor.segment import Segmenter
from aapa_lightning.documents import read_json
from aapa_lightning.errors import ConfigError


def continued_head(folder: str | Path, frozen: FrozenEncoder, features: Sequence[Feature], folds: int, hidden_units: int) -> StackedHead:
    """The head of a discriminator trained before, to be trained on: its weights, and the scale of features that they go with.

    Raises:
        ConfigError: a file is missing or damaged, or the folder's encoder, encoding, features, folds or hidden units are others.
    """
    file = Path(folder) / "discriminator.json"
    settings = read_json(file, **KINDS)
    layout = settings.get("head") or {}
    ours, theirs = (_presentation(encoding) for encoding in (asdict(frozen.encoding), settings.get("encoding") or {}))
    checks = [
        ("class", "encoder_head", settings.get("class")),
        ("encoder (fingerprint)", frozen.fingerprint(), settings.get("encoder_fingerprint")),
        ("encoding", ours, theirs),
        ("features", list(features), settings.get("features")),
        ("folds", folds, layout.get("folds")),
        ("hidden_units", hidden_units, layout.get("hidden_units")),
    ]
    for name, expected, found in checks:
        if expected != found:
            raise ConfigError(
                f"start: {file} cannot be trained on: expected {name} {expected}, as configured, found {found}; use the settings that it "
                "was trained with, or leave `start` out to train a new head"
            )
    try:
        head = StackedHead(**layout)
        head.load_state_dict(read_tensors(Path(folder) / HEAD_FILE))
        found = EncoderHeadDiscriminator(frozen, copy.deepcopy(head), features, Segmenter(**settings["segmenter"])).fingerprint()
    except (RuntimeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"start: {folder} is damaged or of another version ({type(error).__name__}); train it again") from error
    if found != settings.get("fingerprint"):
        raise ConfigError(f"start: {folder}: {HEAD_FILE} is not the file written with {file.name} (fingerprints differ); train it again")
    return head


def _presentation(encoding: Mapping[str, Any]) -> dict[str, Any]:
    """What of an encoding decides the features, as JSON has it."""
    plain: dict[str, Any] = json.loads(json.dumps(encoding))
    return {name: value for name, value in plain.items() if name != "batch_tokens"}

"""JSON and safetensors of a discriminator's folder, with errors that a user can mend."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from aapa_lightning.errors import ConfigError
from aapa_lightning.files import atomic_write


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises ConfigError when it is missing or damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path} ({error.strerror}); expected a folder that holds a {path.name}") from error
    except ValueError as error:
        raise ConfigError(f"{path} is damaged: {error}; expected a JSON object") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write safetensors, whole or not at all."""
    from safetensors.torch import save

    with atomic_write(path) as file:
        file.write(save({name: value.detach().cpu().contiguous() for name, value in tensors.items()}))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read safetensors onto the CPU. Raises ConfigError when the file is missing or damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from error
    except SafetensorError as error:
        raise ConfigError(f"{path} is damaged: {error}; expected a safetensors file") from error

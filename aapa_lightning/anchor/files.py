"""Safetensors of a discriminator's folder, with errors that a user can mend."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from aapa_lightning.errors import ConfigError
from aapa_lightning.files import atomic_write


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

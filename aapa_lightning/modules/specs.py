"""What users write for a policy: a spec, a folder or name, or a mapping."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from aapa_lightning.adapters import LoraSpec
from aapa_lightning.errors import ConfigError, in_one_line
from aapa_lightning.policy import PolicySpec


def as_spec(value: Any, option: str) -> PolicySpec:
    """A spec out of what a user wrote for one: a spec, a folder or Hub name, or a mapping of its fields.

    Raises:
        ConfigError: it is none of these, or has a field that specs lack.
    """
    if isinstance(value, PolicySpec):
        return value
    if isinstance(value, str | os.PathLike):
        return PolicySpec(os.fspath(value))
    settings = _settings(value)
    if settings is None:
        raise ConfigError(f"{option}: expected a PolicySpec, a folder or name, or a mapping of its fields; found {value!r:.80}")
    known = [field.name for field in fields(PolicySpec)]
    if unknown := sorted(set(settings) - set(known)):
        raise ConfigError(f"{option}: expected fields of PolicySpec ({', '.join(known)}), found {', '.join(unknown)[:80]}")
    lora = _settings(settings.get("lora"))
    if lora is not None:
        try:
            settings["lora"] = LoraSpec(**lora)
        except TypeError as error:
            raise ConfigError(f"{option}.lora: {in_one_line(error)}") from error
    return PolicySpec(**settings)


def _settings(value: Any) -> dict[str, Any] | None:
    """Fields out of a mapping, or out of what a parser that knows no type makes of one; None of anything else."""
    fields_of = vars(value) if isinstance(value, argparse.Namespace) else value
    if not isinstance(fields_of, Mapping):
        return None
    inside = fields_of.get("init_args")
    if inside is not None:
        return _settings(inside)
    return {str(name): part for name, part in fields_of.items() if name != "class_path"}

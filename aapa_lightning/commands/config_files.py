"""What a call's configuration files say, before the real parser reads them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

from aapa_lightning.documents import read_yaml


def names_data_class(arguments: Sequence[str]) -> bool:
    """Whether the arguments or one of their configuration files choose the class of ``data``.

    Only where nobody does may there be a default: the parser would hand the default class's argument values on to whatever class replaces
    it, wherever two arguments share a name.

    Raises:
        ConfigError: a file is not YAML or out of bounds; the parser would not say which.
    """
    named = [word for word in arguments if word.partition("=")[0] in ("--data", "--data.class_path")]
    return any([_chooses(path) for path in _config_paths(arguments)]) or bool(named)


def _config_paths(arguments: Sequence[str]) -> Iterator[str]:
    for i, word in enumerate(arguments):
        name, given, value = word.partition("=")
        if name in ("-c", "--config"):
            yield value if given else arguments[i + 1] if i + 1 < len(arguments) else ""


def _chooses(path: str) -> bool:
    if not os.path.isfile(path):
        return False  # the parser says what is wrong with it
    config: Any = read_yaml(path, "--config")
    data = config.get("data") if isinstance(config, dict) else None
    return isinstance(data, str) or (isinstance(data, dict) and "class_path" in data)


def as_list(value: Any) -> list[Any]:
    """The value as a list; empty for None and the like."""
    return list(value) if isinstance(value, list | tuple) else [value] if value else []


def default_run_dir(model: Any, trainer: Any) -> str:
    """Of a run whose configuration names none: its objective, else its module, with ``aapa-`` before it where it is anchored."""
    kind = model.class_path.rsplit(".", 1)[-1].removesuffix("Module").lower()
    name = (model.get("init_args") or {}).get("objective") or kind  # objectives of one module are different runs
    anchored = any(callback.class_path.endswith(".AnchorCallback") for callback in as_list(trainer.callbacks))
    return f"runs/{'aapa-' if anchored else ''}{name}"

"""Parts of a model that training leaves as they are."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from aapa_lightning.errors import ConfigError

#: What peft puts before the names of a model under adapters.
_PREFIX = "base_model.model."


def freeze_parameters(model: nn.Module, patterns: Sequence[str], option: str) -> None:
    """Take parameters out of training, by name.

    Args:
        model: changed in place.
        patterns: each names parameters, or a module and all inside it, with ``*``, ``?`` and ``[...]`` as in file names:
            ``model.embed_tokens``, ``model.layers.[0-3]``, ``*.bias``. A weight that layers share goes by the name of each of them.
        option: what the patterns are called, for messages.

    Raises:
        ConfigError: a pattern that matches no trainable parameter, or nothing left to train.
    """
    if not patterns:
        return
    named = [(name.removeprefix(_PREFIX), p) for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad]
    for pattern in patterns:
        matched = [p for name, p in named if fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")]
        if not matched:
            known = ", ".join(dict.fromkeys(name for name, _ in named[:3]))
            raise ConfigError(
                f"{option}: {pattern!r} matches no trainable parameter of {type(model).__name__}, whose names begin with {known}; write "
                "a name, the name of a module, or a pattern such as model.layers.[0-3] or *.bias"
            )
        for p in matched:
            p.requires_grad_(False)
    if not any(p.requires_grad for p in model.parameters()):
        raise ConfigError(f"{option}: {', '.join(patterns)} leave nothing to train; name fewer")

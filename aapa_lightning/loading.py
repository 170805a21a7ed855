"""What a loaded model lacks: weights that its files do not hold would stay random, without a word."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from aapa_lightning.errors import ConfigError

#: Names that a message lists.
_LISTED = 3


def named(names: Collection[str]) -> str:
    """A few names and how many there are in all.

    >>> named(["b", "a"])
    'a, b (2 in all)'
    """
    return f"{', '.join(sorted(names)[:_LISTED])} ({len(names)} in all)"


def check_weights(
    info: Mapping[str, Any], what: str, *, new: Iterable[str] = (), allow: Collection[str] | None = None, option: str = "allow_missing"
) -> None:
    """Refuse a model that has weights which its files do not hold; warn of weights that the files hold and the model does not read.

    Args:
        info: what ``from_pretrained(..., output_loading_info=True, ignore_mismatched_sizes=True)`` gave beside the model.
        what: the option and the folder, for messages.
        new: missing weights that are new by design, such as the head of a reward model out of a policy.
        allow: names of weights that may stay random; None where there is no such option.
        option: what ``allow`` is called.

    Raises:
        ConfigError: weights are missing, or have another shape.
    """
    if wrong := [f"{name} {list(found)}, expected {list(expected)}" for name, found, expected in info.get("mismatched_keys") or ()]:
        raise ConfigError(f"{what} holds weights of other shapes than its config says: {named(wrong)}; use the config that they belong to")
    missing = set(info["missing_keys"]) - set(new) - set(allow or ())
    if missing:
        mend = "put the missing file back, or the config that the weights belong to"
        if any("lm_head" in name for name in missing):
            mend += " (a head that shares the embeddings' weights needs tie_word_embeddings: true there)"
        if allow is not None:
            mend += f"; to train them from random values, name each in {option}"
        raise ConfigError(f"{what} lacks the weights {named(missing)}; random ones would be used: {mend}")
    if unread := info.get("unexpected_keys"):
        warnings.warn(f"{what} holds weights that the model does not read: {named(unread)}", stacklevel=3)

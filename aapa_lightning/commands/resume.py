"""What ``--resume`` makes of settings that have changed since the checkpoint: refused by name, or said to count from here on.

A checkpoint keeps the resolved configuration of its run. ``REFUSED`` names the settings that make a run another one. Every other setting is
read by the new process and counts from the next step (or window) on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

from aapa_lightning.errors import ConfigError
from aapa_lightning.sharding.files import is_deepspeed_folder, read_checkpoint, read_step

#: What a checkpoint must have for its weights to be measured, and for a run to go on from it.
_PARTS = ("state_dict", "global_step", "pytorch-lightning_version")
_PARTS_OF_RUN = (*_PARTS, "epoch", "loops")
#: Names by which Lightning finds a checkpoint itself.
_FOUND_BY_LIGHTNING = ("best", "last", "hpc")
#: Settings that a resume refuses, and why. The first pattern that fits counts; None lets a setting pass.
REFUSED: dict[str, str | None] = {
    "seed_everything": "the order of the data and all that is drawn hang on it",
    "model.init_args.seed": "the order of the data and all that is drawn hang on it",
    "model.class_path": "the state of one module means nothing to another",
    "model.init_args.objective": "a run with another objective is another run",
    **{
        f"model.init_args.policy.{name}": None
        for name in ("attn_implementation", "trust_remote_code", "activation_checkpointing", "logprob_backend", "packing")
    },
    **{
        f"model.init_args.{name}{rest}": "the weights and the reference are those of the model that the run began with"
        for name in ("policy", "base", "reference")
        for rest in ("", ".*")
    },
    **{
        f"model.init_args.{name}{rest}": "the head is trained on what the encoder made of it"
        for name in ("encoder", "encoding", "features", "hidden_units", "folds", "loss", "start")
        for rest in ("", ".*")
    },
}
_SHOWN = 12


def read_run(path: str, *, training: bool) -> dict[str, Any]:
    """Read the checkpoint whose weights are measured or, in training, that a run shall go on from.

    Raises:
        ConfigError: nothing is there, or it is no checkpoint of a run: weights alone, or of another program.
    """
    if path in _FOUND_BY_LIGHTNING and not Path(path).exists():
        return {"global_step": 0}
    if (Path(path) / "meta.pt").is_file():  # of Lightning's own strategy, which loads it
        return {"global_step": read_step(path)}
    checkpoint = read_checkpoint(path)
    parts: tuple[str, ...] = _PARTS_OF_RUN if training else _PARTS
    parts += () if not training or is_deepspeed_folder(Path(path)) else ("optimizer_states",)
    missing = [name for name in parts if not isinstance(checkpoint, dict) or name not in checkpoint]
    if missing:
        raise ConfigError(
            f"{path} is no checkpoint of a run: it lacks {', '.join(missing)}; expected a file that `aapa fit` wrote, such as "
            "RUN/checkpoints/last.ckpt"
        )
    return checkpoint


def compare(saved: str | None, now: str) -> list[str]:
    """Compare the configuration of a checkpoint with the one of its resume.

    Args:
        saved: YAML, or None of a checkpoint that keeps none.
        now: YAML.

    Returns:
        The settings that have changed, to be told: ``name old -> new``, values where they are numbers or classes.

    Raises:
        ConfigError: one of them is among ``REFUSED``.
    """
    if saved is None:
        return []
    changed = [change for change in _changes(yaml.safe_load(saved), yaml.safe_load(now)) if change[0] != "run_dir"]
    for name, before, after in changed:
        why = next((why for pattern, why in REFUSED.items() if fnmatchcase(name, pattern)), None)
        if why is not None and not _checked_elsewhere(name, now):
            raise ConfigError(
                f"resume: {name} has changed since the checkpoint, from {_short(before)} to {_short(after)}, and {why}; set it as it was "
                "(a folder that has moved: link its old name to it), or start a new run"
            )
    told = [f"{name} {_short(before)} -> {_short(after)}" if _is_plain(name, before, after) else name for name, before, after in changed]
    return told[:_SHOWN] + ([f"and {len(told) - _SHOWN} more"] if len(told) > _SHOWN else [])


def _checked_elsewhere(name: str, now: str) -> bool:
    """Return whether the model is known by its fingerprint: under adapters its folder may have moved."""
    policy = yaml.safe_load(now)["model"].get("init_args", {}).get("policy") or {}
    return name in ("model.init_args.policy.model", "model.init_args.policy.tokenizer") and bool(policy.get("lora"))


def _changes(before: Any, after: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Dotted names and both values of what differs. What only one version of the library knows is no change."""
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        if before.get("class_path") != after.get("class_path"):  # the arguments of two classes have nothing to do with each other
            yield f"{name}.class_path".lstrip("."), before.get("class_path"), after.get("class_path")
            return
        for key in before.keys() & after.keys():
            yield from _changes(before[key], after[key], f"{name}.{key}".lstrip("."))
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for i, (old, new) in enumerate(zip(before, after, strict=True)):
            yield from _changes(old, new, f"{name}.{i}")
    elif before != after:
        yield name, before, after


def _is_plain(name: str, *values: Any) -> bool:
    """Return whether values may be printed: text may be a secret, unless it names a class."""
    return name.endswith("class_path") or all(value is None or isinstance(value, bool | int | float) for value in values)


def _short(value: Any) -> str:
    text = repr(value) if not isinstance(value, str) else value
    return text if len(text) <= 80 else f"{text[:80]}..."

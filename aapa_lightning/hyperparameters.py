"""What a module was made with, as plain values: for loggers, for ``module.hparams``, and to make it again from a checkpoint."""

from __future__ import annotations

import copy
import functools
import inspect
import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import PurePath
from typing import Any, Self

import lightning as L
import torch
from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters

from aapa_lightning.errors import AapaError, ConfigError, in_one_line

_HIDDEN = "***"
_SECRET = re.compile(r"(?:^|[_-])(?:token|secret|password|passwd|api[_-]?key|authorization|credentials?)$", re.IGNORECASE)
#: Names of special tokens, which are no secrets.
_SPECIAL = re.compile(r"^(?:pad|bos|eos|unk|sep|cls|mask|stop)_token$")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
_LOGIN = re.compile(r"//[^/@\s]*@")


def constructor_arguments(cls: type, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Every argument of a class by name, defaults of the class and its bases included, as it was called."""
    found: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        parameters = inspect.signature(base.__init__).parameters.values() if "__init__" in vars(base) else ()  # type: ignore[misc]
        found |= {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
    positional = [
        name
        for name, parameter in inspect.signature(cls.__init__).parameters.items()  # type: ignore[misc]
        if parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    ][1:]
    return found | dict(zip(positional, args, strict=False)) | dict(kwargs)


def plain(value: Any) -> Any:
    """The value as JSON could have it: no tensor, no object, no secret.

    A dataclass becomes its fields, a class or function its path, a ``partial`` or another object ``class_path`` and ``init_args``. Tokens,
    passwords and keys, logins in addresses, and texts in the body or headers of a request become ``***``.
    """
    value = value.value if isinstance(value, Enum) else value
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str | PurePath):
        return _LOGIN.sub(f"//{_HIDDEN}@", str(value))
    if is_dataclass(value) and not isinstance(value, type):
        value = {each.name: getattr(value, each.name) for each in fields(value) if each.init}
    if isinstance(value, Mapping):
        return {str(key): _entry(str(key), item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    return _object(value)


def _entry(key: str, value: Any) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if key == "api_key_env":  # the name of a variable, if it is not the key itself
        return value if isinstance(value, str) and _VARIABLE.fullmatch(value) and not re.search(r"\d{3}", value) else _HIDDEN
    if _SECRET.search(key) and not _SPECIAL.match(key):
        return _HIDDEN
    return _without_texts(plain(value)) if key in ("body", "headers") else plain(value)


def _without_texts(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_texts(item) for key, item in value.items()}
    return [_without_texts(item) for item in value] if isinstance(value, list) else _HIDDEN if isinstance(value, str) else value


def _object(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return f"tensor {tuple(value.shape)}"
    if isinstance(value, functools.partial):
        return {"class_path": _path(value.func), "init_args": plain(value.keywords)}
    if isinstance(value, type) or inspect.isroutine(value):
        return _path(value)
    return str(value) if isinstance(value, torch.dtype | torch.device) else {"class_path": _path(type(value))}


def _path(value: Any) -> str:
    return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', type(value).__qualname__)}"


def remember(holder: Any, arguments: Mapping[str, Any]) -> None:
    """Make plain arguments the ``hparams`` of a module or datamodule, which loggers and checkpoints get."""
    # what save_hyperparameters does, without its look at the frames of callers, which compares their values with each other
    holder._set_hparams(dict(arguments))
    holder._hparams_initial = copy.deepcopy(holder._hparams)
    holder._hparams_name, holder._log_hyperparams = "kwargs", True


class RemembersArguments(L.LightningModule):
    """A module whose ``hparams`` are the arguments it was made with, as plain values."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Keep the arguments until ``__init__`` has something to put them into."""
        module = super().__new__(cls)
        object.__setattr__(module, "_given", (args, kwargs))
        return module

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        args, kwargs = self.__dict__.pop("_given", ((), {}))
        given = _given_hyperparameters.get()  # the command line's, which can make objects again
        arguments = constructor_arguments(type(self), args, kwargs) if given is None else given
        remember(self, plain({"_instantiator": "lightning.pytorch.cli.instantiate_module", **arguments}))

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Self:
        """Make the module again and load its weights.

        Args:
            checkpoint_path: ``last.ckpt`` of a run.
            *args: see ``LightningModule.load_from_checkpoint``.
            **kwargs: likewise, and arguments that replace those of the run: objects that it was given from Python.

        Raises:
            ConfigError: the checkpoint does not say enough to make it again, or holds another module's weights.
        """
        try:
            return super().load_from_checkpoint(checkpoint_path, *args, **kwargs)
        except (AapaError, OSError):
            raise
        except Exception as error:
            raise ConfigError(
                f"{cls.__name__}.load_from_checkpoint: cannot make the module of {checkpoint_path} again ({in_one_line(error)}); pass the "
                "arguments that were objects, such as policy=... and rewards=..., or use the run's folder: `aapa export`, --ckpt_path"
            ) from error

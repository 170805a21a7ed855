"""The parser of the trainer commands: short class names, help with an example, errors of a line or two."""

from __future__ import annotations

import importlib
import pkgutil
from typing import NoReturn, Union, get_args

from jsonargparse import _loaders_dumpers
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser
from typing_extensions import override

from aapa_lightning.cli import COMMANDS
from aapa_lightning.commands.explain import explain
from aapa_lightning.documents import PlainLoader
from aapa_lightning.errors import ConfigError

#: Packages whose classes a configuration may name without their path.
COMPONENTS = ("modules", "data", "callbacks", "rewards", "anchor", "rollout")

# What jsonargparse reads a value or file of a configuration with: no public function replaces it where a text inside a value is read.
setattr(_loaders_dumpers, "yaml_default_loader", PlainLoader)  # noqa: B010 - typed as the None that it begins as


def import_components() -> None:
    """Import the classes that a configuration names, so that ``--model GRPOModule`` is enough."""
    for name in COMPONENTS:
        package = importlib.import_module(f"aapa_lightning.{name}")
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{package.__name__}.{module.name}")


def tell_numbers_apart() -> None:
    """Have the trainer's options that take an int or a float, such as ``limit_val_batches``, read 1 as 1 batch, not as 1.0, all of them.

    jsonargparse tries a union's members in order, and ``typing`` caches unions without regard to it: what Lightning spells
    ``Optional[Union[int, float]]`` comes out the other way round where another library's ``Optional[Union[float, int]]`` was cached.
    """
    hints = Trainer.__init__.__annotations__
    for name, hint in hints.items():
        members = get_args(hint)
        if int in members and float in members:
            hints[name] = Union[tuple(sorted(members, key=lambda member: member is not int))]  # noqa: UP007  # as many as there are


class Parser(LightningArgumentParser):
    """Says what is wrong in a line or two instead of listing every option."""

    @override
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:
            super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", None) or self
        options = [name for action in parser._actions for name in (*action.option_strings, action.dest)]
        raise ConfigError(explain(message, options, parser.prog.replace(" [options]", "")))


def parser_kwargs(command: str) -> dict[str, str]:
    """What the parser of a command is made with: its description."""
    row = COMMANDS[command]
    return {"description": f"{row.summary[0].upper()}{row.summary[1:]}. Example: {row.example}"}

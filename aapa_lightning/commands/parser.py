"""The parser of the trainer commands: short class names, help with an example, errors of a line or two."""

from __future__ import annotations

import importlib
import itertools
import pkgutil
import re
from typing import NoReturn, Union, get_args

from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser
from typing_extensions import override

from aapa_lightning.cli import COMMANDS
from aapa_lightning.errors import ConfigError

#: Packages whose classes a configuration may name without their path.
COMPONENTS = ("modules", "data", "callbacks", "rewards", "anchor", "rollout")

_PROBLEM = "Problem with given class_path"


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
        raise ConfigError(f"{in_short(message)}\n{parser.prog.replace(' [options]', '')} --help lists the options")


def in_short(message: str) -> str:
    """Where a value stands, what was expected and what was found, out of jsonargparse's account of every type that it tried.

    Messages that are not of a single value, or that are short, stay as they are.
    """
    lines = _first_attempt([(len(line) - len(line.lstrip(" -")), line.strip(" -")) for line in message.splitlines()])
    keys = [(indent, found[1]) for indent, line in lines if (found := re.match(r'Parser key "([^"]+)":', line))]
    given = re.search(r"(?:Given|Got) value: (?:NestedArg\(.*val=(.*)\)|(.*))", message)
    if not keys or given is None or any(b <= a for (a, _), (b, _) in itertools.pairwise(keys)):
        return message
    where = keys[0][1] + "".join(f".init_args.{key}" if place == 1 else f".{key}" for place, (_, key) in enumerate(keys[1:], 1))
    problem = max((i for i, (_, line) in enumerate(lines) if line.startswith(_PROBLEM)), default=None)
    if problem is not None and problem + 1 < len(lines) and not lines[problem + 1][1].startswith("Parser key"):
        return f"{where}: {lines[problem + 1][1]}"
    inner = [line for indent, line in lines if indent > keys[-1][0] and line.startswith("Expected a ") and "path but" not in line]
    expected = " or ".join(dict.fromkeys(map(_in_words, inner)))
    return f"{where}: expected {expected}; found {given[1] or repr(given[2])}" if expected else message


def _first_attempt(lines: list[tuple[int, str]]) -> list[tuple[int, str]]:
    """Lines, with their indent, up to where a second class is tried in the same place: the first is the one that was named."""
    tried: set[int] = set()
    for i, (indent, line) in enumerate(lines):
        if line.startswith(_PROBLEM):
            if indent in tried:
                return lines[:i]
            tried.add(indent)
    return lines


def _in_words(line: str) -> str:
    kind = re.sub(r"\. Got value:.*", "", line.removeprefix("Expected a "))
    if kind.startswith("dot import path"):
        return "a class path"
    if found := re.match(r"typing\.Literal\[(.*)\]", kind):
        return f"one of {found[1]}"
    return re.sub(r"<class '(.*)'>", lambda found: "null" if found[1] == "NoneType" else found[1], kind)


def parser_kwargs(command: str) -> dict[str, str]:
    """What the parser of a command is made with: its description."""
    row = COMMANDS[command]
    return {"description": f"{row.summary[0].upper()}{row.summary[1:]}. Example: {row.example}"}

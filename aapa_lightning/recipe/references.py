"""References in a recipe: what a stage knows of the recipe, of itself and of earlier stages.

``${run_dir}``, ``${round}`` (from 1), ``${self.run_dir}``, ``${self.name}``, ``${vars.NAME}``, ``${env.NAME}``,
``${stages.NAME.run_dir}`` (an earlier stage; its latest round), ``${previous.NAME.run_dir}`` (the stage in the round before).
In ``${A or B}`` the first that exists counts.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from aapa_lightning.errors import ConfigError

#: Characters that a recipe may come to when its references are written out; every value counts for 20 besides.
MOST_CHARACTERS = 1 << 24
_REFERENCE = re.compile(r"\$\{([^{}]*)\}")


@dataclass(frozen=True, slots=True)
class Stage:
    """A stage with every reference resolved.

    Args:
        name: its name, with ``-ROUND`` where stages repeat.
        base: its name in the recipe.
        command: words of the ``aapa`` command, such as ``("data", "synthetic")``.
        run_dir: where its outputs go.
        arguments: arguments after the command.
        settings: inline configuration, written to ``settings_file`` before the stage starts.
        settings_file: where to.
        launcher: words before ``-m aapa_lightning.cli``; the interpreter when empty.
        env: additional environment variables.
        fingerprint: hex digest of all that, of the configuration files and of the stages referred to.
    """

    name: str
    base: str
    command: tuple[str, ...]
    run_dir: str
    arguments: tuple[str, ...]
    settings: dict[str, Any]
    settings_file: str
    launcher: tuple[str, ...]
    env: dict[str, str]
    fingerprint: str


@dataclass(slots=True)
class Scope:
    """What references see.

    ``used`` collects the fingerprints of the stages that were named, ``planned`` the names of all stages. ``characters`` counts what has
    been written out: a variable may name another ten times, which names another ten times.
    """

    source: str
    run_dir: str
    variables: Mapping[str, Any]
    round: int | None = None
    stages: dict[str, Stage] = field(default_factory=dict)
    previous: dict[str, Stage] = field(default_factory=dict)
    self_values: dict[str, str] = field(default_factory=dict)
    used: list[str] = field(default_factory=list)
    planned: list[str] = field(default_factory=list)
    characters: int = 0

    def count(self, characters: int) -> None:
        """Add to what has been written out. Raises ConfigError above ``MOST_CHARACTERS``."""
        self.characters += characters
        if self.characters > MOST_CHARACTERS:
            raise ConfigError(f"{self.source}: its references come to more than {MOST_CHARACTERS} characters when they are written out")


def resolve(value: Any, scope: Scope) -> Any:
    """Replace the references in every string; a string that is one reference keeps the type of what it names.

    Raises:
        ConfigError: a reference to nothing, or references that come to too much.
    """
    scope.count(20)
    if isinstance(value, dict):
        return {key: resolve(item, scope) for key, item in value.items()}
    if isinstance(value, list):
        return [resolve(item, scope) for item in value]
    if not isinstance(value, str):
        return value
    scope.count(len(value))
    if whole := _REFERENCE.fullmatch(value):
        return _counted(_lookup(whole[1], scope), scope)
    return _REFERENCE.sub(lambda match: _spelled(_lookup(match[1], scope), scope), value)


def _counted(value: Any, scope: Scope) -> Any:
    """The value, whose size now counts once more."""
    scope.count(20 + (len(value) if isinstance(value, str) else 0))
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _counted(item, scope)
    return value


def _spelled(value: Any, scope: Scope) -> str:
    text = str(_counted(value, scope))
    scope.count(len(text))
    return text


def _lookup(expression: str, scope: Scope) -> Any:
    for choice in expression.split(" or "):
        found = _find(choice.strip(), scope)
        if found is not None:
            return found
    known = ["run_dir", "self.run_dir", *(f"stages.{name}.run_dir" for name in scope.stages), *(f"vars.{name}" for name in scope.variables)]
    raise ConfigError(f"{scope.source}: ${{{expression}}} refers to nothing; known here: {', '.join(known)} and env.NAME")


def _find(reference: str, scope: Scope) -> Any:
    if reference in ("run_dir", "round"):
        return getattr(scope, reference)
    kind, _, rest = reference.partition(".")
    if kind in ("vars", "env", "self"):
        return {"vars": scope.variables, "env": os.environ, "self": scope.self_values}[kind].get(rest)
    name, _, attribute = rest.rpartition(".")
    stage = {"stages": scope.stages, "previous": scope.previous}.get(kind, {}).get(name)
    if stage is None or attribute not in ("run_dir", "name"):
        return None
    scope.used.append(stage.fingerprint)
    return getattr(stage, attribute)

"""A recipe: stages that run one after the other, each an ``aapa`` command; later stages name what earlier ones made.

```yaml
run_dir: runs/example
vars: {model: Qwen/Qwen3-0.6B}
stages:
  - name: sft
    config: [sft.yaml]                        # relative to the recipe's folder, else to the current one
    settings: {model: {init_args: {policy: {model: "${vars.model}"}}}}
  - rounds: 2                                 # the stages below, twice: grpo-1, grpo-2
    stages:
      - name: grpo
        config: [grpo.yaml]
        settings: {model: {init_args: {policy: {model: "${previous.grpo.run_dir or stages.sft.run_dir}/export"}}}}
```

``references`` says what ``${...}`` may name.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aapa_lightning.documents import parse_yaml, read_text, read_yaml
from aapa_lightning.errors import ConfigError
from aapa_lightning.recipe.references import Scope, Stage, resolve

TRAINER_COMMANDS = ("fit", "validate", "test", "predict")
RECIPE_KEYS = {"run_dir", "vars", "rounds", "stages", "summary"}
BLOCK_KEYS = {"rounds", "stages"}
STAGE_KEYS = {"name", "command", "config", "settings", "args", "launcher", "env", "run_dir"}
#: Stages of a recipe, every round counted.
MOST_STAGES = 1000
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass(slots=True)
class Recipe:
    """A recipe file, planned: its stages in order."""

    path: str
    run_dir: str
    stages: list[Stage]
    summary: dict[str, Any] | None


def load_recipe(path: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read and plan a recipe.

    Args:
        path: the YAML file.
        overrides: ``key=value`` with dotted keys; a stage is named by its name: ``stages.sft.settings.trainer.max_steps=10``.

    Raises:
        ConfigError: no such file, unknown keys, a reference to nothing.
    """
    raw = _read(path)
    for override in overrides:
        _override(raw, override)
    _known(raw, RECIPE_KEYS, path)
    if not isinstance(raw.get("run_dir"), str) or not raw.get("stages"):
        raise ConfigError(f"{path}: expected `run_dir` and at least one entry under `stages`, found {sorted(raw)}")
    variables: dict[str, Any] = {}
    scope = Scope(path, raw["run_dir"], variables)
    for name, value in _mapping(raw, "vars", path).items():  # a variable may name the environment and those before it
        variables[name] = resolve(value, scope)
    scope.run_dir = resolve(raw["run_dir"], scope)
    stages = list(_plan_block({"stages": raw["stages"]} | ({"rounds": raw["rounds"]} if "rounds" in raw else {}), scope))
    names = [stage.name for stage in stages]
    if twice := {name for name, count in Counter(names).items() if count > 1}:
        raise ConfigError(f"{path}: stage names must differ, found twice: {', '.join(sorted(twice))}")
    return Recipe(path, scope.run_dir, stages, raw.get("summary"))


def _read(path: str) -> dict[str, Any]:
    raw = read_yaml(path, "recipe")
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected a mapping with `run_dir` and `stages`, found {type(raw).__name__}")
    return raw


def _override(raw: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator:
        raise ConfigError(f"--set: expected key=value, found {override!r}")
    *parents, last = key.split(".")
    node: Any = raw
    for word in parents:
        node = _child(node, word, override)
    if not isinstance(node, dict):
        raise ConfigError(f"--set {override}: {'.'.join(parents)} holds no keys")
    node[last] = parse_yaml(text, f"--set {key}")


def _child(node: Any, word: str, override: str) -> Any:
    if isinstance(node, dict):
        return node.setdefault(word, {})
    stages = list(_stage_entries(node)) if isinstance(node, list) else []
    for entry in stages:
        if entry.get("name") == word:
            return entry
    raise ConfigError(f"--set {override}: no stage {word!r}; expected one of {', '.join(str(entry.get('name')) for entry in stages)}")


def _stage_entries(entries: Sequence[Any]) -> Iterator[dict[str, Any]]:
    for entry in entries:
        if isinstance(entry, dict):
            yield from _stage_entries(entry["stages"]) if "stages" in entry else [entry]


def _plan_block(block: Mapping[str, Any], scope: Scope) -> Iterator[Stage]:
    rounds = block.get("rounds")
    if rounds is not None and (not isinstance(rounds, int) or isinstance(rounds, bool) or rounds < 1):
        raise ConfigError(f"{scope.source}: rounds: expected a whole number from 1, found {rounds!r}")
    if rounds is not None and scope.round is not None:
        raise ConfigError(f"{scope.source}: rounds inside rounds are not supported")
    if not isinstance(block["stages"], list):
        raise ConfigError(f"{scope.source}: stages: expected a list, found {type(block['stages']).__name__}")
    if (planned := (rounds or 1) * len(block["stages"])) > MOST_STAGES:
        raise ConfigError(f"{scope.source}: rounds: expected at most {MOST_STAGES} stages in all, found {planned}; lower rounds")
    outside = scope.round
    for number in [scope.round] if rounds is None else range(1, rounds + 1):
        if rounds is not None:
            scope.previous = dict(scope.stages) if number and number > 1 else {}
        scope.round = number
        yield from _plan_entries(block["stages"], scope)
    scope.round, scope.previous = outside, scope.previous if rounds is None else {}


def _plan_entries(entries: Sequence[Any], scope: Scope) -> Iterator[Stage]:
    for entry in entries:
        if not isinstance(entry, dict):
            raise ConfigError(f"{scope.source}: stages: expected mappings with a `name`, found {entry!r}")
        if len(scope.planned) >= MOST_STAGES:
            raise ConfigError(f"{scope.source}: expected at most {MOST_STAGES} stages in all, found more")
        if "stages" in entry:
            _known(entry, BLOCK_KEYS, f"{scope.source}: block of stages")
            yield from _plan_block(entry, scope)
        else:
            stage = _plan_stage(entry, scope)
            scope.stages[stage.base] = stage
            scope.planned.append(stage.name)
            yield stage


def _plan_stage(entry: Mapping[str, Any], scope: Scope) -> Stage:
    base = entry.get("name")
    if not isinstance(base, str) or not _NAME.fullmatch(base):
        raise ConfigError(f"{scope.source}: a stage needs a `name` of letters, digits, - and _, found {base!r}")
    where = f"{scope.source}: stage {base}"
    _known(entry, STAGE_KEYS, where)
    name = base if scope.round is None else f"{base}-{scope.round}"
    scope.used = []
    scope.self_values = {"name": name}
    run_dir = str(resolve(entry.get("run_dir", f"{scope.run_dir}/{name}"), scope))
    scope.self_values["run_dir"] = run_dir
    words = _command(entry.get("command", "fit"), where)
    settings = resolve(_mapping(entry, "settings", where), scope)
    settings_file = f"{scope.run_dir}/configs/{name}.yaml"
    configs = [_config_path(path, scope) for path in resolve(_list(entry, "config", where), scope)]
    trainer = words[0] in TRAINER_COMMANDS
    if (configs or settings) and not trainer:
        raise ConfigError(f"{where}: `config` and `settings` belong to {', '.join(TRAINER_COMMANDS)}; give `args` to {' '.join(words)}")
    arguments = [f"--config={path}" for path in [*configs, *([settings_file] if settings else [])]]
    arguments += [f"--run_dir={run_dir}"] if trainer else []
    arguments += list(_flags(resolve(entry.get("args") or {}, scope), trainer, where))
    launcher = tuple(map(str, resolve(_list(entry, "launcher", where), scope)))
    env = {key: str(value) for key, value in resolve(_mapping(entry, "env", where), scope).items()}
    files = [_config_text(path, where) for path in configs if not _inside(path, scope.run_dir)]
    parts = [words, arguments, _text_keys(settings), launcher, env, files, scope.used]
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    return Stage(name, base, words, run_dir, tuple(arguments), settings, settings_file, launcher, env, digest)


def _text_keys(value: Any) -> Any:
    """The value with text for every key, as JSON has it: keys of several types have no order."""
    if isinstance(value, dict):
        return {str(key): _text_keys(item) for key, item in value.items()}
    return [_text_keys(item) for item in value] if isinstance(value, list) else value


def _command(command: Any, where: str) -> tuple[str, ...]:
    words = tuple(command.split()) if isinstance(command, str) else tuple(map(str, command)) if isinstance(command, list) else ()
    if not words:
        raise ConfigError(f"{where}: command: expected the words of an `aapa` command, such as fit or data check, found {command!r}")
    return words


def _mapping(holder: Mapping[str, Any], key: str, where: str) -> dict[str, Any]:
    """Return what a key holds, empty where it is absent. Raises ConfigError for anything but a mapping from names."""
    value = holder.get(key) or {}
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        raise ConfigError(f"{where}: {key}: expected a mapping from names to values, found {value!r}")
    return value


def _list(holder: Mapping[str, Any], key: str, where: str) -> list[Any]:
    """Return what a key holds, empty where it is absent. Raises ConfigError for anything but a list."""
    value = holder.get(key) or []
    if not isinstance(value, list):
        raise ConfigError(f"{where}: {key}: expected a list, found {value!r}")
    return value


def _config_text(path: str, where: str) -> str:
    """Return what a configuration file says, empty for one that an earlier stage will write; it is read as the stage will read it."""
    if not Path(path).is_file():
        return ""
    text = read_text(path, f"{where}: config")
    parse_yaml(text, f"{where}: config {path}")
    return text


def _config_path(path: Any, scope: Scope) -> str:
    beside = Path(scope.source).parent / str(path)
    if beside.is_file():
        return str(beside)
    if not Path(path).is_file() and not _inside(str(path), scope.run_dir):
        raise ConfigError(f"{scope.source}: config: no file {path}, neither beside the recipe nor from the current folder")
    return str(path)


def _inside(path: str, folder: str) -> bool:
    return Path(os.path.abspath(path)).is_relative_to(os.path.abspath(folder))


def _flags(args: Any, trainer: bool, where: str) -> Iterator[str]:
    """``args`` as words: a list as it stands, a mapping as ``--key=value``."""
    if isinstance(args, list):
        yield from map(str, args)
    elif isinstance(args, dict):
        for key, value in args.items():
            yield from _flag(str(key), value, trainer)
    else:
        raise ConfigError(f"{where}: args: expected a mapping or a list, found {args!r}")


def _flag(key: str, value: Any, trainer: bool) -> Iterator[str]:
    if isinstance(value, bool) and not trainer:
        yield from [f"--{key}"] if value else []
    elif isinstance(value, list) and not trainer:
        yield from [f"--{key}", *map(str, value)]
    else:
        yield f"--{key}={value if isinstance(value, str) else json.dumps(value)}"


def _known(mapping: Mapping[str, Any], keys: set[str], where: str) -> None:
    if unknown := sorted(map(str, set(mapping) - keys)):
        raise ConfigError(f"{where}: unknown keys {', '.join(unknown)}; expected {', '.join(sorted(keys))}")

"""YAML and JSON from outside: read within bounds, and refused in one message that names the place.

YAML aliases let nine lines stand for a billion values, and a document may hold itself. A document is measured before it is built, with
every alias counted as what it stands for.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import yaml

from aapa_lightning.errors import AapaError, ConfigError

#: Characters of a YAML document.
MOST_CHARACTERS = 1 << 20
#: Values of a YAML document, every alias counted as all that it stands for.
MOST_VALUES = 20_000
#: Levels of lists and mappings in each other.
MOST_LEVELS = 64

_FLOAT = re.compile(
    r"""^(?:[-+]?(?:[0-9][0-9_]*)\.[0-9_]*(?:[eE][-+]?[0-9]+)?
        |[-+]?(?:[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)
        |\.[0-9_]+(?:[eE][-+]?[0-9]+)?
        |[-+]?\.(?:inf|Inf|INF)
        |\.(?:nan|NaN|NAN))$""",
    re.VERBOSE,
)


class OutOfBounds(yaml.YAMLError):
    """A document that is larger or deeper than any configuration."""


_Base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class PlainLoader(_Base):
    """YAML's safe loader within bounds: ``1e-6`` is a number, a date is text, and nothing is built but what JSON has.

    Args:
        stream: the document.

    Raises:
        yaml.YAMLError: the document is out of bounds; ``get_single_data`` raises it for one that is malformed or has a tag of an object.
    """

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {
        first: [(tag, pattern) for tag, pattern in rules if not tag.endswith((":timestamp", ":float"))]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, stream: str) -> None:
        _measure(stream)
        super().__init__(stream)

    def get_single_data(self) -> Any:
        """The document's value."""
        try:
            return super().get_single_data()
        except (ArithmeticError, LookupError, RecursionError, TypeError, ValueError) as error:  # such as a key that is a list
            raise yaml.YAMLError(f"{type(error).__name__}: {error}") from error


PlainLoader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))
for _kind in ("timestamp", "binary", "set", "omap", "pairs"):
    PlainLoader.add_constructor(f"tag:yaml.org,2002:{_kind}", yaml.SafeLoader.construct_undefined)


def load_yaml(text: str) -> Any:
    """Build a YAML document of plain values: texts, numbers, booleans, None, and lists and mappings of them.

    Raises:
        yaml.YAMLError: it is malformed, has a tag that stands for an object, or is out of bounds.
    """
    return yaml.load(text, Loader=PlainLoader)  # noqa: S506 - a subclass of the safe loader


def _measure(text: str) -> None:
    """Raise OutOfBounds for a document that would hold too much; nothing is built."""
    if len(text) > MOST_CHARACTERS:
        raise OutOfBounds(f"expected at most {MOST_CHARACTERS} characters, found {len(text)}")
    sizes: dict[str, tuple[int, int]] = {}  # of every anchor: its values and its levels
    open_nodes: list[list[Any]] = [[None, 0, 0]]  # anchor, values, levels
    for event in yaml.parse(text, Loader=_Base):
        if isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append([event.anchor, 1, 0])
            _refuse_depth(len(open_nodes))  # before it is closed: a parser of many open brackets is slow
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, values, levels = open_nodes.pop()
            _add(open_nodes, anchor, (values, levels + 1), sizes)
        elif isinstance(event, yaml.ScalarEvent):
            _add(open_nodes, event.anchor, (1, 0), sizes)
        elif isinstance(event, yaml.AliasEvent):
            if any(anchor == event.anchor for anchor, *_ in open_nodes):
                raise OutOfBounds(f"&{event.anchor} holds itself")
            _add(open_nodes, None, sizes.get(str(event.anchor), (1, 0)), sizes)


def _add(open_nodes: list[list[Any]], anchor: str | None, size: tuple[int, int], sizes: dict[str, tuple[int, int]]) -> None:
    """Count a node that is complete in the one that holds it."""
    if anchor is not None:
        sizes[anchor] = size
    parent = open_nodes[-1]
    parent[1], parent[2] = parent[1] + size[0], max(parent[2], size[1])
    if parent[1] > MOST_VALUES:
        raise OutOfBounds(f"expected at most {MOST_VALUES} values, found more (an alias counts as all that it stands for)")
    _refuse_depth(len(open_nodes) + size[1])


def _refuse_depth(levels: int) -> None:
    if levels > MOST_LEVELS:
        raise OutOfBounds(f"expected at most {MOST_LEVELS} levels, found more")


def parse_yaml(text: str, where: str) -> Any:
    """``load_yaml`` for a user's text. Raises ConfigError that begins with ``where``."""
    try:
        return load_yaml(text)
    except OutOfBounds as error:
        raise ConfigError(f"{where}: {error}; write out what it needs, or split it") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: expected YAML of plain values, found: {_account(error)}") from error


def _account(error: yaml.YAMLError) -> str:
    """Return what is wrong and where, in one line."""
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return " ".join(str(error).split())
    return f"{getattr(error, 'problem', None) or getattr(error, 'context', '')} (line {mark.line + 1}, column {mark.column + 1})"


def read_text(path: str | os.PathLike[str], what: str) -> str:
    """A file as UTF-8 text, without a byte order mark. Raises ConfigError that begins with ``what`` and names the file."""
    try:
        with open(path, "rb") as file:
            content = file.read()
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{what} {path}: expected UTF-8 text, found byte {content[error.start]:#04x} at byte {error.start + 1}"
        ) from error
    except OSError as error:
        raise ConfigError(f"{what}: cannot read {path}: {error.strerror or error}") from error


def read_yaml(path: str | os.PathLike[str], what: str) -> Any:
    """A YAML file. Raises ConfigError that names the file."""
    return parse_yaml(read_text(path, what), f"{what} {path}")


def parse_json(text: str | bytes, where: str, kind: type[AapaError] = ConfigError) -> Any:
    """Build a JSON document. Raises ``kind`` that begins with ``where`` for one that is malformed or too deep."""
    try:
        found = json.loads(text)
        deep = _deeper_than(found, MOST_LEVELS)
    except RecursionError:
        deep = True
    except UnicodeDecodeError as error:
        raise kind(f"{where} is damaged: expected UTF-8 text, found another byte at byte {error.start + 1}") from error
    except ValueError as error:  # also a whole number of thousands of digits
        raise kind(f"{where} is damaged: {error}; expected JSON") from error
    if deep:
        raise kind(f"{where} is damaged: expected at most {MOST_LEVELS} levels of JSON, found more")
    return found


def _deeper_than(value: Any, levels: int) -> bool:
    """Return whether lists and mappings lie in each other more than ``levels`` deep."""
    layer = [value]
    for _ in range(levels + 1):
        layer = [item for holder in layer for item in _items(holder) if isinstance(item, list | dict)]
        if not layer:
            return False
    return True


def _items(holder: Any) -> Iterator[Any]:
    yield from holder.values() if isinstance(holder, dict) else holder if isinstance(holder, list) else ()


def read_json(path: str | os.PathLike[str], **kinds: Any) -> dict[str, Any]:
    """A JSON object of a file.

    Args:
        path: the file.
        **kinds: for every key that is checked, its type or a tuple of types; a key that is not there is not missed.

    Raises:
        ConfigError: the file is missing or damaged, or a key holds another type.
    """
    file = Path(path)
    try:
        content = file.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {file} ({error.strerror or error}); expected a folder that holds a {file.name}") from error
    found = parse_json(content, str(file))
    if not isinstance(found, dict):
        raise ConfigError(f"{file}: expected a JSON object, found {type(found).__name__}")
    check_kinds(found, str(file), kinds)
    return found


def check_kinds(found: dict[str, Any], where: str, kinds: dict[str, Any]) -> None:
    """Raise ConfigError for a key that holds another type than ``kinds`` says; a whole number will do for a float."""
    for name, kind in kinds.items():
        wanted = kind if isinstance(kind, tuple) else (kind,)
        allowed = (*wanted, int) if float in wanted else wanted
        value = found.get(name)
        if name in found and (not isinstance(value, allowed) or (isinstance(value, bool) and bool not in wanted)):
            spelled = " or ".join("null" if each is type(None) else each.__name__ for each in wanted)
            raise ConfigError(f"{where} is damaged: expected {spelled} under {name!r}, found {type(value).__name__}")

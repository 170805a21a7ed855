"""What is wrong with a configuration, in a line or two, out of jsonargparse's account of every type that it tried."""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from jsonargparse import ArgumentParser
from jsonargparse._util import import_object

_PROBLEM = "Problem with given class_path"
#: Classes that stand for "none was named yet" where an option of it comes first.
_BASES = ("lightning.LightningModule", "lightning.LightningDataModule", "lightning.Callback")
#: Characters of a value that is repeated.
_LONGEST_VALUE = 200
#: How values are written that are often written otherwise, by the last word of their option.
_SPELLINGS = {
    "rewards": "a function is written {class_path: TRLReward, init_args: {function: 'my_rewards.py:name'}} (or FunctionReward)",
    "lr_scheduler": "a class that takes the optimiser and plain values is named by its path: torch.optim.lr_scheduler.CosineAnnealingLR",
    "optimizer": "a class is named by its path: torch.optim.AdamW",
}
#: Lines that say nothing of why a value was refused.
_SILENT = (
    *("Expected a path but", "Does not validate", "Subtypes:", "Errors:"),
    *("Given value", "Not a valid subclass", "Subclass types", "a class path", "a dict with"),
)


@dataclass(frozen=True, slots=True)
class _Account:
    """jsonargparse's lines with their indents, up to the second class that it tried in one place, and the keys in them."""

    lines: list[tuple[int, str]]
    keys: list[tuple[int, str]]

    @property
    def where(self) -> str:
        """The option, as a configuration file nests it."""
        inner = [f".init_args.{key}" if place == 1 else f".{key}" for place, (_, key) in enumerate(self.keys[1:], 1)]
        return self.keys[0][1] + "".join(inner)

    @property
    def classes(self) -> list[str]:
        """Paths of the classes on the way, the innermost last."""
        return [path[1] for _, line in self.lines if (path := re.match(rf"{_PROBLEM} '([^']+)'", line))]

    @property
    def inner(self) -> list[str]:
        """The lines of the innermost key."""
        return [line for indent, line in self.lines if indent > self.keys[-1][0]]


def explain(message: str, options: Iterable[str] = (), program: str = "aapa") -> str:
    """The message for a user: where, what was expected, what was found, and which help lists the options.

    Args:
        message: jsonargparse's.
        options: dotted names of the parser's own options.
        program: ``aapa fit``.
    """
    if re.match(r"the following arguments are required: (?:\w+\.)?model$", message):
        return f"expected a model, found none; name one: --model CLASS, or --config FILE with a file that does\n{program} --help lists more"
    if found := re.match(r"unrecognized arguments: (\S+)", message):
        return f"{message}{_suggestion(found[1], options)}\n{program} --help lists the options"
    account = _read(message)
    short = in_short(message)
    program = "aapa fit" if program == "aapa" else program
    if account is None or not account.classes:
        misspelt = re.search(r"expected .*a class path.*; found '(\w+)'$", short)
        return f"{short}{_suggestion(misspelt[1], _class_names()) if misspelt else ''}\n{program} --help lists the options"
    key, path = account.keys[0][1], account.classes[0]
    if path in _BASES:
        hint = f"; name the class first, in a file or option before this one: --{key} CLASS"
        return f"{short}{hint}\n{program} --help lists the options"
    wrong = re.search(r"(?:Option '([^']+)' is not accepted|unrecognized arguments: (\S+))", short)
    suggestion = "" if wrong is None else _suggestion(wrong[1] or wrong[2], _options_of(account.classes[-1]))
    return f"{short}{suggestion}\n{program} --{key}.help {path.rpartition('.')[2]} lists the options"


def in_short(message: str) -> str:
    """Where a value stands, what was expected and what was found. Messages that are not of a single value, or that are short, stay."""
    account = _read(message)
    given = re.search(r"(?:Given|Got) value: (?:NestedArg\(.*val=(.*)\)|(.*))", message)
    if account is None or given is None:
        return message
    lines, where = account.lines, account.where
    problem = max((i for i, (_, line) in enumerate(lines) if line.startswith(_PROBLEM)), default=None)
    if problem is not None and problem + 1 < len(lines) and not lines[problem + 1][1].startswith("Parser key"):
        return f"{where}: {lines[problem + 1][1]}"
    inner = account.inner
    tried = [line for line in inner if line.startswith("Expected a ") and not line.startswith(_SILENT)]
    reasons = [line for line in inner if line not in tried and not line.startswith(_SILENT)]
    expected = _in_words(tried) if not reasons else _of_types(inner) or _in_words(tried)
    if not expected:
        return message
    spelling = _SPELLINGS.get(account.keys[-1][1]) if reasons else None
    said = [*(_reason(line) for line in reasons[:1]), f"expected {expected}", f"found {_value(given)}", *([spelling] if spelling else [])]
    return f"{where}: {'; '.join(said)}"


def _read(message: str) -> _Account | None:
    """The account, or None where it is not of a single value."""
    lines = _first_attempt([(len(line) - len(line.lstrip(" -")), line.strip(" -")) for line in message.splitlines()])
    keys = [(indent, found[1]) for indent, line in lines if (found := re.match(r'Parser key "([^"]+)":', line))]
    if not keys or any(b <= a for (a, _), (b, _) in itertools.pairwise(keys)):
        return None
    return _Account(lines, keys)


def _first_attempt(lines: list[tuple[int, str]]) -> list[tuple[int, str]]:
    """Lines, with their indent, up to where a second class is tried in the same place: the first is the one that was named."""
    tried: set[int] = set()
    for i, (indent, line) in enumerate(lines):
        if line.startswith(_PROBLEM):
            if indent in tried:
                return lines[:i]
            tried.add(indent)
    return lines


def _value(given: re.Match[str]) -> str:
    text = given[1] or (given[2] if given[2][:1] in ("[", "{") else repr(given[2]))
    text = re.sub(r"^'?Namespace\(class_path='([^']+)'.*", r"\1", text.strip('"'))
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]} [{len(text) - _LONGEST_VALUE} characters left out]"


def _reason(line: str) -> str:
    """A line that says why, without the type that it was tried for."""
    return re.sub(r"^Type .* expects a function or a callable class: ", "", line)


def _in_words(tried: Sequence[str]) -> str:
    """Of the lines ``Expected a ...``."""
    kinds = (re.sub(r"\. Got value:.*", "", line.removeprefix("Expected a ")) for line in tried)
    return " or ".join(dict.fromkeys(_kind(kind) for kind in kinds))


def _of_types(inner: Sequence[str]) -> str:
    """Of the line that lists the types."""
    types = next((line.removeprefix("Subtypes: [").removesuffix("]") for line in inner if line.startswith("Subtypes: [")), "")
    parts = re.split(r", (?=<class|list\[|collections|dict\[|typing|type)", types) if types else []
    return " or ".join(dict.fromkeys(_kind(part) for part in parts))


def _kind(kind: str) -> str:
    if kind.startswith("dot import path"):
        return "a class path"
    if found := re.match(r"typing\.Literal\[(.*)\]", kind):
        return f"one of {found[1]}"
    if found := re.match(r"list\[(?:[\w.]+\.)?(\w+)\]", kind):
        return f"a list of {found[1]}"
    if found := re.match(r"collections\.abc\.Callable\[.*, (?:[\w.]+\.)?(\w+)\]", kind):
        return f"what makes a {found[1]}"
    found = re.match(r"<class '(?:([\w.]+)\.)?(\w+)'>", kind)
    if found is None:
        return kind
    return "null" if found[2] == "NoneType" else f"a {found[2]}" if (found[1] or "").count(".") else found[2]


def _suggestion(wrong: str, options: Iterable[str]) -> str:
    """``; did you mean ...?`` where an option is near, or where a file stands without its ``--config``."""
    if not wrong.startswith("-") and wrong.endswith((".yaml", ".yml")):
        return f"; did you mean --config {wrong}?"
    name = wrong.lstrip("-").partition("=")[0]
    near = get_close_matches(name, list(options), n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""


def _class_names() -> list[str]:
    """Of the classes that need no path."""
    modules = [module for name, module in sys.modules.items() if name.startswith("aapa_lightning.")]
    return [name for module in modules for name, value in vars(module).items() if isinstance(value, type) and name[0].isupper()]


def _options_of(path: str) -> list[str]:
    """Dotted names of a class's options, nested ones included."""
    parser = ArgumentParser(exit_on_error=False)
    names: list[Any] = []
    with suppress(Exception):  # a hint is no reason to fail
        parser.add_class_arguments(import_object(path), fail_untyped=False)
        names = [action.dest for action in parser._actions]
    return [name for name in names if name not in ("help", "config") and not name.endswith(".help")]

"""Where a dataset lies and what reads it: files of JSON, Parquet, a folder of either, what ``datasets`` saved, or a Hub name.

JSON has one reader (``jsonl.py``), whether a file is named, a folder that holds it, or its compressed form: the same JSON gives the same
values. Nothing that is here, or is spelled like a path, is ever looked up on the Hub.
"""

from __future__ import annotations

import gzip
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from aapa_lightning.data.dialects import refuse_missing_columns
from aapa_lightning.data.jsonl import GZIP
from aapa_lightning.data.parquet import check_parquet
from aapa_lightning.errors import ConfigError, DataError
from aapa_lightning.files import refuse_missing

if TYPE_CHECKING:
    from datasets import Dataset

T = TypeVar("T")

JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")

EXPECTED = "expected a file of JSON Lines (also .gz) or Parquet, a folder, or a Hub name name@config:split"


def json_files(path: str, split: str | None) -> list[str] | None:
    """Files to be read as JSON, in order: the file itself, or those of a folder's split. None for everything else.

    Raises:
        DataError: a file that is neither JSON nor Parquet, or a folder without the split.
        ConfigError: a split of one file.
    """
    place = Path(path)
    if place.is_dir():
        return None if _saved(place) else _json_files_of(path, split or "train")
    if not _reads_as_json(place):
        return None
    refuse_split(path, split)
    return [path]


def _reads_as_json(place: Path) -> bool:
    suffixes = [suffix.lower() for suffix in place.suffixes if suffix.lower() != ".gz"]
    last = suffixes[-1] if suffixes else ""
    if last in JSON_SUFFIXES:
        return True
    if last == ".parquet" or not place.exists():
        return False
    if not place.is_file():
        return True  # a pipe: its beginning can be read once
    begin = _beginning(place)
    if begin.startswith(b"PAR1"):
        return False
    if begin.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] not in (b"{", b""):
        raise DataError(f"{place}: the ending {place.suffix!r} is not known and the file holds no JSON objects; {EXPECTED}: convert it")
    return True


def _beginning(place: Path) -> bytes:
    try:
        with open(place, "rb") as file:
            begin = file.read(64)
        if not begin.startswith(GZIP):
            return begin
        with gzip.open(place) as unpacked:
            return unpacked.read(64)
    except (OSError, EOFError) as error:
        raise DataError(f"cannot read {place}: {getattr(error, 'strerror', None) or error}; {EXPECTED}") from error


def _saved(folder: Path) -> bool:
    return (folder / "state.json").exists() or (folder / "dataset_dict.json").exists()


def _json_files_of(path: str, split: str) -> list[str] | None:
    from datasets.packaged_modules.json.json import Json

    builder, files = _data_files(path)
    if not issubclass(builder, Json):
        return None
    return _of_split(path, files, split)


def _data_files(path: str) -> tuple[type, dict[str, list[str]]]:
    """The builder of a folder, as ``datasets`` finds it, and its data files by split."""
    import datasets

    builder: Any = loading(path, lambda: datasets.load_dataset_builder(str(path)))
    return type(builder), {str(name): list(map(str, files)) for name, files in (builder.config.data_files or {}).items()}


def _of_split(path: str, splits: Mapping[str, T], split: str) -> T:
    if split not in splits:
        raise DataError(f"{path}: no split {split!r}; it has {sorted(splits)}")
    return splits[split]


def open_dataset(path: str, split: str | None, columns: Mapping[str, str] | None = None) -> Dataset:
    """Open a Parquet file, a folder or a Hub dataset, memory-mapped; arguments as of ``read_records``. Raises DataError or ConfigError."""
    rows = _opened(path, split)
    if not {"prompt", "messages", "chosen"} & {*rows.column_names, *(columns or {})}:
        raise DataError(f"{path}: expected a column 'prompt', 'messages' or 'chosen', found {sorted(rows.column_names)}")
    refuse_missing_columns(columns, rows.column_names, f"{path}:row 0")
    return rows


def _opened(path: str, split: str | None) -> Dataset:
    import datasets

    place = Path(path)
    if place.is_dir():
        return _open_folder(path, split or "train")
    if place.suffix.lower() == ".parquet" or place.exists():
        refuse_split(path, split)
        loading(path, partial(check_parquet, path))
        return loading(path, lambda: datasets.Dataset.from_parquet(str(path)))
    name, config, inner = _hub_name(path)
    if inner and split and inner != split:
        raise ConfigError(f"{path} names the split {inner!r} and split={split!r}; give one")
    return loading(path, lambda: datasets.load_dataset(name, config, split=inner or split or "train"))


def _open_folder(path: str, split: str) -> Dataset:
    import datasets

    if not _saved(Path(path)):
        builder, files = _data_files(path)
        if builder.__name__.startswith("Parquet"):
            for file in _of_split(path, files, split):
                loading(path, partial(check_parquet, file))
        return loading(path, lambda: datasets.load_dataset(str(path), split=split))
    saved = loading(path, lambda: datasets.load_from_disk(str(path)))
    return saved if isinstance(saved, datasets.Dataset) else _of_split(path, saved, split)


def loading(path: str, load: Callable[[], T]) -> T:
    """Return what ``load`` gives; any error that is not ours becomes a DataError that names the path."""
    try:
        return load()
    except DataError:
        raise
    except Exception as error:  # datasets raises its own, pyarrow's, fsspec's and the Hub client's errors
        cause = f"{type(error).__name__}: {error}".splitlines()[0]
        raise DataError(f"cannot open {path!r} ({cause}); {EXPECTED}") from error


def _hub_name(path: str) -> tuple[str, str | None, str | None]:
    refuse_missing(path, EXPECTED, DataError)
    name, _, split = path.partition(":")
    name, _, config = name.partition("@")
    refuse_missing(name, EXPECTED, DataError)
    return name, config or None, split or None


def refuse_split(path: str, split: str | None) -> None:
    """Raise ConfigError for a split of one file."""
    if split is not None:
        raise ConfigError(f"{path} is one file and has no split {split!r}; leave split out, or give a folder or a Hub name")

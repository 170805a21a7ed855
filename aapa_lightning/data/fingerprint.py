"""A short digest of a dataset as it is trained on, by which a resumed run knows its data again."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from aapa_lightning.errors import ConfigError

#: Rows up to which every row is digested; of more, this many, spread evenly.
DIGESTED = 100_000

logger = logging.getLogger(__name__)


def fingerprint(rows: Sequence[Any], count: int | None = None) -> dict[str, Any]:
    """Number and digest of the first ``count`` rows (all by default): dataclasses such as records, without where they come from.

    Of more than ``DIGESTED`` rows that many are read, from the first to the last at equal distances, so that a large file costs seconds.

    Returns:
        ``rows``, an int, and ``digest``, hexadecimal.
    """
    count = len(rows) if count is None else count
    digest, read = hashlib.blake2b(digest_size=16), min(count, DIGESTED)
    for i in range(read):
        row = rows[i * (count - 1) // max(read - 1, 1)]
        digest.update(repr(_plain(row)).encode(errors="surrogatepass"))
    return {"rows": count, "digest": digest.hexdigest()}


def _plain(value: Any) -> Any:
    if hasattr(value, "__dataclass_fields__"):
        return [_plain(getattr(value, field.name)) for field in fields(value) if field.name != "source"]
    if isinstance(value, Mapping):
        return [(key, _plain(part)) for key, part in value.items()]
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return value


def check_data(saved: Mapping[str, Mapping[str, Any]], now: Mapping[str, Sequence[Any]], *, may_grow: bool = True) -> None:
    """Compare the data of a resume with what its checkpoint was taken with. Data that have only grown are said to have.

    Args:
        saved: fingerprints by name.
        now: rows by the same names.
        may_grow: whether rows may have been added behind the old ones; not where rollouts of old rows wait to be trained on.

    Raises:
        ConfigError: rows have changed, moved or gone.
    """
    for name in saved.keys() & now.keys():
        before, rows = saved[name], now[name]
        if before == fingerprint(rows):
            continue
        if may_grow and len(rows) > before["rows"] and before == fingerprint(rows, before["rows"]):
            logger.warning(
                "resume: %s has grown from %d rows to %d since the checkpoint; from here on their order is another",
                name,
                before["rows"],
                len(rows),
            )
            continue
        changed = (
            "its rows are others, or in another order"
            if len(rows) == before["rows"]
            else f"it had {before['rows']} rows, and has {len(rows)}"
        )
        raise ConfigError(
            f"resume: {name} has changed since the checkpoint ({changed}); put the data back as they were, or start a new run from the "
            "weights: aapa export writes them"
        )

"""Records in a plain DataLoader."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.utils.data._utils.collate import default_collate_fn_map

from aapa_lightning.types import Record


def _as_list(batch: Sequence[Record], *, collate_fn_map: Any = None) -> list[Record]:
    return list(batch)


# A plain DataLoader gives batches of records as lists.
default_collate_fn_map[Record] = _as_list

"""Whether a Parquet file unpacks to a size that its own size explains; a file of some kilobytes can hold gigabytes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from aapa_lightning.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

#: Any file and row group may unpack to so many bytes, and larger ones to so many times their packed size.
ALWAYS, RATIO = 2**28, 100
#: Rows that are unpacked at a time.
_ROWS = 64
#: Least bytes of a value in memory, by Parquet's physical type.
_WIDTHS = {"BOOLEAN": 1 / 8, "INT32": 4, "INT64": 8, "INT96": 8, "FLOAT": 4, "DOUBLE": 8, "BYTE_ARRAY": 4}


def check_parquet(path: str) -> None:
    """Look at a file row group by row group: at what its metadata declare, then at what comes out, a few rows at a time.

    Texts that repeat are kept once while they are counted, so that a bomb is found before it is unpacked.

    Raises:
        DataError: a row group, or the file, unpacks to more than ``ALWAYS`` bytes and ``RATIO`` times its packed size.
    """
    import pyarrow.parquet as pq

    flat = [field.name for field in pq.read_schema(path) if _is_text(field.type)]
    with pq.ParquetFile(path, read_dictionary=flat) as file:
        total, packed = 0, Path(path).stat().st_size
        for number in range(file.metadata.num_row_groups):
            group = file.metadata.row_group(number)
            columns = [group.column(i) for i in range(group.num_columns)]
            limit = max(ALWAYS, RATIO * sum(column.total_compressed_size for column in columns))
            _refuse(path, number, max(group.total_byte_size, sum(map(_least, columns))), limit)
            size = 0
            for batch in file.iter_batches(_ROWS, row_groups=[number], use_threads=False):
                size += _unpacked(batch)
                _refuse(path, number, size, limit)
            total += size
            _refuse(path, number, total, max(ALWAYS, RATIO * packed))


def _is_text(kind: pa.DataType) -> bool:
    import pyarrow as pa

    return any(test(kind) for test in (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary))


def _least(column: Any) -> int:
    """Bytes that the values of a column chunk take at least; those inside lists count, too."""
    return int(column.num_values * _WIDTHS.get(column.physical_type, 1))


def _unpacked(batch: pa.RecordBatch) -> int:
    """Bytes of a batch whose dictionaries are written out."""
    import pyarrow as pa
    import pyarrow.compute as pc

    size = 0
    for column in batch.columns:
        if pa.types.is_dictionary(column.type):
            lengths = pc.binary_length(column.dictionary).take(column.indices)
            size += (pc.sum(lengths).as_py() or 0) + 4 * len(column)
        else:
            size += column.nbytes
    return size


def _refuse(path: str, number: int, size: int, limit: int) -> None:
    if size > limit:
        raise DataError(
            f"{path}: row group {number} brings the file to {size / 2**20:.0f} MiB or more once unpacked, over the limit of "
            f"{limit / 2**20:.0f} MiB ({RATIO} times its packed size, at least {ALWAYS // 2**20} MiB); expected an ordinary table: write "
            "it anew without what repeats, or as JSON Lines"
        )

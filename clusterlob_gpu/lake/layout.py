"""Where the lake's files lie, and how one is written.

A partition is a folder `<lake>/<table>/exchange=<exchange>/date=YYYY-MM-DD/`, its day the UTC day of
`ts_local_us`.  In it every source file has one Parquet file of its own, `<SYMBOL>-<file_id>.parquet`,
with rows sorted by (symbol_id, ts_local_us, file_id, file_line_number).  A file appears under its name
only when it is complete: until then it has a hidden name that no reader of `*.parquet` matches.
"""

from __future__ import annotations

import datetime as dt
import glob
import os
import re
import uuid
from pathlib import Path
from types import TracebackType

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clusterlob_gpu.schema import LAKE_TABLES, US_PER_DAY

ROW_GROUP_ROWS = 131_072
SNAPSHOT_ROW_GROUP_ROWS = 32_768

_EPOCH = dt.date(1970, 1, 1)
_STEM = re.compile(r"(?P<symbol>.+)-(?P<file_id>\d{6,})\.parquet")


def day_start_us(day: dt.date) -> int:
    """Midnight UTC at which `day` begins, us since the epoch."""
    return (day - _EPOCH).days * US_PER_DAY


def day_of_us(ts: int) -> dt.date:
    """UTC day that holds the time `ts`, us since the epoch."""
    return _EPOCH + dt.timedelta(days=int(ts) // US_PER_DAY)


def partition_dir(lake: Path, table: str, exchange: str, day: dt.date) -> Path:
    """Folder of one table, exchange and UTC day."""
    return Path(lake) / table / f"exchange={exchange}" / f"date={day.isoformat()}"


def file_stem(symbol: str, file_id: int) -> str:
    """Name, without suffix, of the file that holds one symbol's rows from one source file."""
    return f"{symbol}-{file_id:06d}"


def symbol_files(lake: Path, table: str, exchange: str, day: dt.date, symbol: str) -> list[Path]:
    """Finished files of one symbol in a partition, in the order of their file_id."""
    found = []
    for path in partition_dir(lake, table, exchange, day).glob(f"{glob.escape(symbol)}-*.parquet"):
        match = _STEM.fullmatch(path.name)
        if match and match["symbol"] == symbol:
            found.append((int(match["file_id"]), path))
    return [path for _, path in sorted(found)]


class PartitionWriter:
    """One lake file in the making: `write` rows in order, then `close`, or `abort`.

    Rows come as tables or record batches with at least the columns of the lake table, sorted as the
    lake wants them, and are gathered into row groups of even size.  As a context manager it closes at
    the end of the block and aborts when the block raises.
    """

    def __init__(self, lake: Path, table: str, exchange: str, day: dt.date, stem: str) -> None:
        self.path = partition_dir(lake, table, exchange, day) / f"{stem}.parquet"
        self.staged_path = self.path.with_name(f".{stem}.{uuid.uuid4().hex[:12]}.tmp")
        self.rows = 0
        self._schema = LAKE_TABLES[table]
        snapshots = table == "book_snapshot_25"
        self._group_rows = SNAPSHOT_ROW_GROUP_ROWS if snapshots else ROW_GROUP_ROWS
        self._waiting: list[pa.Table] = []
        self._waiting_rows = 0
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._writer = pq.ParquetWriter(self.staged_path, self._schema, **_parquet_options(self._schema))

    def write(self, rows: pa.Table | pa.RecordBatch) -> None:
        """Append rows; columns that the table does not have are left out.

        Raises KeyError for a missing column and pa.ArrowInvalid for values that do not fit its type.
        """
        table = pa.Table.from_batches([rows]) if isinstance(rows, pa.RecordBatch) else rows
        if table.schema != self._schema:
            table = table.select(self._schema.names).cast(self._schema)
        self._waiting.append(table)
        self._waiting_rows += len(table)
        self.rows += len(table)
        if self._waiting_rows >= self._group_rows:
            self._flush(self._waiting_rows // self._group_rows * self._group_rows)

    def stage(self) -> Path:
        """Complete the file under its hidden name, for a caller that renames several at once."""
        self._flush(self._waiting_rows)
        self._writer.close()
        return self.staged_path

    def close(self) -> Path:
        """Complete the file and give it its name; an older file of that name is replaced."""
        os.replace(self.stage(), self.path)
        return self.path

    def abort(self) -> None:
        """Drop everything written; an older file of that name stays as it was."""
        self._writer.close()
        self.staged_path.unlink(missing_ok=True)

    def _flush(self, rows: int) -> None:
        if rows:
            table = pa.concat_tables(self._waiting)
            self._writer.write_table(table.slice(0, rows), row_group_size=self._group_rows)
            rest = table.slice(rows)
            self._waiting, self._waiting_rows = [rest], len(rest)

    def __enter__(self) -> PartitionWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()


def _parquet_options(schema: pa.Schema) -> dict[str, object]:
    """Zstandard, and delta packing for integers: neighbours of a sorted tick table differ by little."""
    encoding = {}
    for field in schema:
        if pa.types.is_list(field.type):
            encoding[f"{field.name}.list.element"] = "DELTA_BINARY_PACKED"
        elif pa.types.is_integer(field.type):
            encoding[field.name] = "DELTA_BINARY_PACKED"
    return {
        "compression": "zstd",
        "use_dictionary": False,
        "write_batch_size": 1 << 14,  # sooner than Arrow's 1024: a list is 25 values
        "column_encoding": encoding,
        # Or a flipped bit gives wrong numbers that nobody notices.
        "write_page_checksum": True,
    }


def list_column(values: np.ndarray, missing: np.ndarray) -> pa.ListArray:
    """A list<i64> column of equally long lists.

    values : (n_rows, n_levels) int64; missing : same shape, bool, true where the list holds a null.
    """
    n_rows, n_levels = values.shape
    flat = pa.array(values.ravel(), mask=missing.ravel())
    offsets = pa.array(np.arange(n_rows + 1, dtype=np.int32) * n_levels)
    return pa.ListArray.from_arrays(offsets, flat)

"""Rows of one source file into the lake's order, in bounded memory.

Blocks arrive nearly sorted by time.  As long as they are, they stream into the final file of their day;
when a block begins before the last one ended, a new sorted run begins, and the runs are merged at the
end, batch by batch.  To find repeated trades, eight bytes per trade are kept.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from clusterlob_gpu.lake.layout import PartitionWriter

ID_COLUMNS = {"trades": "trade_id", "liquidations": "liq_id"}

_MERGE_ROWS = 131_072
_CONTENT = ("ts_exch_us", "side", "price_int", "qty_int")
_NUMBER = "^-?[0-9]{1,17}$"


class FileOutput:
    """Everything that one source file writes: a partition file for each day that it touches."""

    def __init__(self, lake: Path, table: str, exchange: str, stem: str) -> None:
        self._target = (lake, table, exchange, stem)
        self._days: dict[dt.date, DayRuns] = {}
        self._id_column = ID_COLUMNS.get(table)
        self._ids = IdKeys()

    def add(self, day: dt.date, rows: pa.Table) -> None:
        """Append rows that are sorted by (ts_local_us, line); lines never fall behind earlier rows'."""
        if not len(rows):
            return
        if self._id_column:
            self._ids.add(rows[self._id_column])
        if day not in self._days:
            lake, table, exchange, stem = self._target
            self._days[day] = DayRuns(lambda: PartitionWriter(lake, table, exchange, day, stem))
        self._days[day].add(rows)

    def finish(self) -> tuple[list[PartitionWriter], dict[str, int]]:
        """Complete all files under their hidden names; what was dropped or found, by name.

        A trade that repeats the id, exchange time, side, price and quantity of an earlier one is dropped;
        one that shares only the id is kept.
        """
        for runs in self._days.values():
            runs.close()
        repeated = self._ids.repeated()
        drop, conflicting = np.zeros(0, np.int32), 0
        if self._id_column and len(repeated):
            drop, conflicting = self._duplicates(self._id_column, repeated)
        writers = [
            writer for day in sorted(self._days) if (writer := self._days[day].finish(drop)) is not None
        ]
        return writers, {"duplicates_dropped": len(drop), "conflicting_ids": conflicting}

    def abort(self) -> None:
        """Remove everything written."""
        for runs in self._days.values():
            runs.abort()

    def _duplicates(self, id_column: str, repeated: np.ndarray) -> tuple[np.ndarray, int]:
        """Lines to drop, and the number of rows whose id belongs to an earlier, different trade."""
        found = [
            suspects
            for runs in self._days.values()
            for batch in runs.batches([id_column, *_CONTENT, "file_line_number"])
            if len(suspects := batch.filter(pa.array(np.isin(id_keys(batch[id_column]), repeated))))
        ]
        rows = pa.Table.from_batches(found).to_pandas()
        rows = rows[rows[id_column] != ""].sort_values("file_line_number")
        same = rows.duplicated([id_column, *_CONTENT])
        conflicting = rows[~same].duplicated(id_column)
        return np.sort(rows["file_line_number"][same].to_numpy()), int(conflicting.sum())


class DayRuns:
    """Sorted runs of one day, each a hidden Parquet file."""

    def __init__(self, open_writer: Callable[[], PartitionWriter]) -> None:
        self._open_writer = open_writer
        self._runs: list[PartitionWriter] = []
        self._last_ts = 0

    def add(self, rows: pa.Table) -> None:
        """Append to the current run, or begin another where time steps back."""
        ts = rows["ts_local_us"]
        if not self._runs or ts[0].as_py() < self._last_ts:
            if self._runs:
                self._runs[-1].stage()
            self._runs.append(self._open_writer())
        self._runs[-1].write(rows)
        self._last_ts = ts[-1].as_py()

    def close(self) -> None:
        """Complete the last run, so that all can be read."""
        self._runs[-1].stage()

    def batches(self, columns: list[str]) -> Iterator[pa.RecordBatch]:
        """The rows written so far, run after run."""
        for run in self._runs:
            with pq.ParquetFile(run.staged_path) as file:
                yield from file.iter_batches(_MERGE_ROWS, columns=columns)

    def finish(self, drop: np.ndarray) -> PartitionWriter | None:
        """The one file of the day, without the lines `drop`; None if no row is left."""
        if len(self._runs) > 1 or len(drop):
            merged = self._open_writer()
            old, self._runs = self._runs, [merged, *self._runs]
            for rows in merge_runs([run.staged_path for run in old]):
                merged.write(_without(rows, drop))
            merged.stage()
            for run in old:
                run.abort()
            self._runs = [merged]
        if self._runs[0].rows:
            return self._runs[0]
        self.abort()
        return None

    def abort(self) -> None:
        """Remove every run."""
        for run in self._runs:
            run.abort()


def _without(rows: pa.Table, drop: np.ndarray) -> pa.Table:
    if not len(drop):
        return rows
    return rows.filter(pa.array(~np.isin(rows["file_line_number"].to_numpy(), drop)))


def merge_runs(paths: Sequence[Path]) -> Iterator[pa.Table]:
    """Rows of runs that are each sorted by (ts_local_us, file_line_number), in that order overall.

    Memory holds one batch of each run, about 131,072 rows together.
    """
    streams = [_batches(path, max(_MERGE_ROWS // len(paths), 1024)) for path in paths]
    heads = [(stream, head) for stream in streams if (head := next(stream, None)) is not None]
    while heads:
        # Up to the smallest last key nothing can come any more from a later batch.
        bound = min(_key(head, len(head) - 1) for _, head in heads)
        cuts = [_rows_up_to(head, bound) for _, head in heads]
        ready = pa.concat_tables([head.slice(0, cut) for (_, head), cut in zip(heads, cuts, strict=True)])
        yield ready.take(_order(ready))
        rest = [(stream, head.slice(cut)) for (stream, head), cut in zip(heads, cuts, strict=True)]
        refilled = [(stream, head if len(head) else next(stream, None)) for stream, head in rest]
        heads = [(stream, head) for stream, head in refilled if head is not None]


def _batches(path: Path, rows: int) -> Iterator[pa.Table]:
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(rows):
            yield pa.Table.from_batches([batch])


def _key(rows: pa.Table, at: int) -> tuple[int, int]:
    return rows["ts_local_us"][at].as_py(), rows["file_line_number"][at].as_py()


def _rows_up_to(rows: pa.Table, bound: tuple[int, int]) -> int:
    ts, line = rows["ts_local_us"].to_numpy(), rows["file_line_number"].to_numpy()
    begin, end = np.searchsorted(ts, bound[0], "left"), np.searchsorted(ts, bound[0], "right")
    return int(begin + np.searchsorted(line[begin:end], bound[1], "right"))


def _order(rows: pa.Table) -> np.ndarray:
    return np.lexsort((rows["file_line_number"].to_numpy(), rows["ts_local_us"].to_numpy()))


class IdKeys:
    """64-bit keys of all ids of a file; equal ids have equal keys."""

    def __init__(self) -> None:
        self._keys: list[np.ndarray] = []
        self._rising = True
        self._last = np.iinfo(np.int64).min

    def add(self, ids: pa.ChunkedArray) -> None:
        """Remember more ids; empty ones are not compared."""
        keys = id_keys(ids.filter(pc.not_equal(ids, "")))
        if len(keys):
            self._rising = self._rising and keys[0] > self._last and bool((keys[1:] > keys[:-1]).all())
            self._last = keys[-1]
            self._keys.append(keys)

    def repeated(self) -> np.ndarray:
        """Sorted keys that occur more than once; rising numbers, the usual case, need no search."""
        if self._rising:
            return np.zeros(0, np.int64)
        keys = np.sort(np.concatenate(self._keys))
        return np.unique(keys[1:][keys[1:] == keys[:-1]])


def id_keys(ids: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """Int64 keys: the number itself where an id is one of up to 17 digits, else a hash of the text."""
    longest = pc.max(pc.binary_length(ids)).as_py() or 0
    if longest <= 17:
        try:
            return pc.cast(ids, pa.int64()).to_numpy()
        except pa.ArrowInvalid:
            pass
    numeric = pc.match_substring_regex(ids, _NUMBER).to_numpy(zero_copy_only=False)
    texts = np.asarray(ids.to_pylist(), dtype=object)
    keys = pd.util.hash_array(texts, categorize=False).view(np.int64)
    keys[numeric] = texts[numeric].astype(np.int64)
    return keys

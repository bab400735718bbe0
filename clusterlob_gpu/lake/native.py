"""Reading the lake: which days it has, and one day of trades or book rows as plain columns.

A partition may hold several files and several symbols, in any order of files; what comes out is in
the lake's order (ts_local_us, file_id, file_line_number), in the symbol's common integer units.
Snapshots are decoded in small batches, one list column at a time, and reduced at once to the few
integers that are needed, so that memory stays small.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from clusterlob_gpu import kernels
from clusterlob_gpu.errors import LakeError
from clusterlob_gpu.lake import manifest
from clusterlob_gpu.lake.layout import day_start_us, partition_dir
from clusterlob_gpu.lake.symbols import Symbol, find_symbol
from clusterlob_gpu.schema import NO_ID, US_PER_DAY, BookRows, Fills, Trades

_SNAPSHOT_BATCH = 16_384
_TRADE_COLUMNS = ["side", "price_int", "qty_int"]
_ORDER = ("ts_local_us", "file_id", "file_line_number")


def days_between(first: date, last: date) -> list[date]:
    """Every day from first to last, both included."""
    return [first + timedelta(days=n) for n in range((last - first).days + 1)]


class _Part(NamedTuple):
    """The row groups of one file that hold the symbol."""

    path: Path
    row_groups: list[int]


@dataclass(frozen=True)
class SymbolLake:
    """One symbol of one lake."""

    root: Path
    symbol: Symbol

    def _folder(self, table: str) -> Path:
        return self.root / table / f"exchange={self.symbol.exchange}"

    def days(self, table: str) -> list[date]:
        """Days on which the table has a partition, with rows of this symbol or not, in order."""
        found = []
        for folder in self._folder(table).glob("date=*"):
            try:
                found.append(date.fromisoformat(folder.name.removeprefix("date=")))
            except ValueError:
                raise LakeError(f"{folder}: not a partition; it must read date=YYYY-MM-DD") from None
        return sorted(found)

    def has(self, table: str, day: date) -> bool:
        """Whether the table has at least one row of this symbol on that day."""
        return bool(self._parts(table, day))

    def row_count(self, table: str, day: date) -> int:
        """Rows in the row groups that hold the symbol: exact where a file holds one symbol."""
        total = 0
        for part in self._parts(table, day):
            meta = pq.read_metadata(part.path)
            total += sum(meta.row_group(group).num_rows for group in part.row_groups)
        return total

    def fingerprint(self, table: str, day: date) -> str:
        """Hash of the files behind a day: names, sizes, times of change and Parquet footers."""
        digest = hashlib.sha256(self._symbol_key.encode())
        for part in self._parts(table, day):
            stat = part.path.stat()
            digest.update(f"{part.path.name} {stat.st_size} {stat.st_mtime_ns}".encode())
            with part.path.open("rb") as file:
                file.seek(max(0, stat.st_size - 65_536))
                digest.update(file.read())
        return digest.hexdigest()

    @cached_property
    def _symbol_key(self) -> str:
        return str(self.symbol.rows.to_csv())

    def _parts(self, table: str, day: date) -> list[_Part]:
        folder = partition_dir(self.root, table, self.symbol.exchange, day)
        files = sorted(path for path in folder.glob("*.parquet") if not path.name.startswith((".", "_")))
        parts = (_Part(path, self._row_groups(path)) for path in files)
        return [part for part in parts if part.row_groups]

    def _row_groups(self, path: Path) -> list[int]:
        """Row groups with rows of the symbol; statistics decide where they can, else the column."""
        try:
            file = pq.ParquetFile(path)
        except (pa.ArrowInvalid, OSError) as error:
            raise LakeError(
                f"{path}: not a readable Parquet file ({_line(error)}); ingest it again"
            ) from None
        with file:
            names = file.schema_arrow.names
            if "symbol_id" not in names:
                raise LakeError(f"{path}: column symbol_id is missing, found {', '.join(names)}")
            leaf = _leaf(file.metadata, "symbol_id")
            found = []
            for group in range(file.num_row_groups):
                stats = file.metadata.row_group(group).column(leaf).statistics
                if stats is not None and stats.has_min_max:
                    if not any(stats.min <= key <= stats.max for key in self.symbol.ids):
                        continue
                    if stats.min == stats.max:
                        found.append(group)
                        continue
                ids = file.read_row_group(group, columns=["symbol_id"])["symbol_id"]
                if pc.any(pc.is_in(ids, pa.array(self.symbol.ids, pa.int64()))).as_py():
                    found.append(group)
            return found

    def read_trades(self, day: date, last: int | None = None) -> Trades:
        """The day's trades, or at least the `last` of them where the file allows to read only those.

        Raises LakeError if there are none or a file is broken.
        """
        parts = self._parts("trades", day)
        if last is not None and len(parts) == 1:
            parts = [_last_groups(parts[0], last)]
        return self._trades(self._ordered("trades", day, _TRADE_COLUMNS, parts))

    def _trades(self, columns: dict[str, np.ndarray]) -> Trades:
        price, qty = columns["price_int"], columns["qty_int"]
        ts, side = columns["ts_local_us"], columns["side"].astype(np.uint8)
        _check_notional(price, qty, f"trades of {self.symbol.name} from ts_local_us = {ts[0]}")
        return Trades(ts, side, price, qty)

    def read_fills(self, day: date) -> Fills:
        """The day's trades with the exchange's time and id of each, from which orders are rebuilt."""
        columns = self._ordered("trades", day, [*_TRADE_COLUMNS, "ts_exch_us", "trade_id"])
        return Fills(self._trades(columns), columns["ts_exch_us"], columns["trade_id"])

    def read_ticker(self, day: date, names: list[str]) -> dict[str, np.ndarray]:
        """Columns of the day's `derivative_ticker`, float64 with NaN for null, and ts_local_us."""
        parts = self._parts("derivative_ticker", day)
        if not parts:
            raise LakeError(self.absent("derivative_ticker", day))
        # Some lakes keep no file and line for this table: then time alone orders it.
        there = pq.read_schema(parts[0].path).names
        keys = tuple(name for name in _ORDER if name in there)
        chunks = list(self._scalars(parts, day, names, keys))
        columns = {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]}
        order = np.lexsort([columns[name] for name in reversed(keys)])
        return {name: values[order] for name, values in columns.items()}

    def _ordered(
        self, table: str, day: date, names: list[str], parts: list[_Part] | None = None
    ) -> dict[str, np.ndarray]:
        """Columns of a day in the lake's order; raises LakeError if there are no rows."""
        chunks = list(self._scalars(self._parts(table, day) if parts is None else parts, day, names))
        if not chunks:
            raise LakeError(self.absent(table, day))
        columns = {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]}
        order = _order(columns)
        return columns if order is None else {name: values[order] for name, values in columns.items()}

    def read_book(self, day: date, table: str, depth: int) -> BookRows:
        """The day's book rows from `book_snapshot_25` or `quotes`, depth summed over `depth` levels."""
        read = self._snapshots if table == "book_snapshot_25" else self._quotes
        chunks = list(read(day, depth))
        if not chunks:
            raise LakeError(self.absent(table, day))
        columns = {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]}
        order = _order(columns)
        names = ("ts_local_us", "bid", "ask", "bid_sz", "ask_sz", "bid_depth", "ask_depth", "tick")
        ordered = [columns[name] if order is None else columns[name][order] for name in names]
        return BookRows(*ordered)

    def absent(self, table: str, day: date) -> str:
        """Message for a day without rows of the symbol: where it was looked for, what there is."""
        days = self.days(table)
        held = f"the lake holds {days[0]} to {days[-1]}" if days else "the lake has no day of it"
        return (
            f"no {table} for {self.symbol.exchange} {self.symbol.name} on {day}: "
            f"{self._folder(table) / f'date={day}'} has no rows of it, {held}. "
            "Shorten the range, set on_bad_day=skip, or list the gaps with `clusterlob check`"
        )

    def _scalars(
        self, parts: list[_Part], day: date, names: list[str], order: tuple[str, ...] = _ORDER
    ) -> Iterator[dict[str, np.ndarray]]:
        """Plain columns of every part, filtered to the symbol, integers in common units."""
        for path, groups in parts:
            columns = [*order, "symbol_id", *names]
            table_ = _read(path, groups, columns)
            chunk = {name: _column(table_[name], path, name) for name in columns}
            mask = self._mine(chunk["symbol_id"])
            if mask is not None:
                chunk = {name: values[mask] for name, values in chunk.items()}
            yield self._normalise(chunk, path, day)

    def _mine(self, ids: np.ndarray) -> np.ndarray | None:
        mask = np.isin(ids, self.symbol.ids)
        return None if mask.all() else mask

    def _normalise(self, chunk: dict[str, np.ndarray], path: Path, day: date) -> dict[str, np.ndarray]:
        """Check the day, scale integers of every period to the symbol's units, add the tick."""
        ts = chunk["ts_local_us"]
        start = day_start_us(day)
        outside = (ts < start) | (ts >= start + US_PER_DAY)
        if outside.any():
            at = int(np.argmax(outside))
            when = datetime.fromtimestamp(int(ts[at]) / 1e6, UTC)
            raise LakeError(
                f"{path}: row {at} has ts_local_us = {ts[at]} ({when:%Y-%m-%d}), not the day {day}"
            )
        rows = self.symbol.rows
        if len(rows) == 1 and rows["valid_from_ts"][0] <= start < rows["valid_until_ts"][0] - US_PER_DAY:
            chunk["tick"] = np.full(len(ts), self.symbol.ticks()[0])
            return chunk
        period = self.symbol.row_at(chunk["symbol_id"], ts, str(path))
        chunk["tick"] = self.symbol.ticks()[period]
        scales = {
            "price": self.symbol.factors("price_increment")[period],
            "size": self.symbol.factors("amount_increment")[period],
        }
        for name, values in chunk.items():
            kind = _UNITS.get(name)
            if kind is not None:
                missing = values == kernels.NO_LEVEL
                largest = float(np.abs(np.where(missing, 0, values)).max(initial=0)) * scales[kind].max()
                if largest >= 2.0**62:
                    raise LakeError(
                        f"{path}: {name} reaches {largest:.3g} in the symbol's finest unit, beyond 2^62; "
                        "coarsen the increments in dim_symbol"
                    )
                chunk[name] = np.where(missing, values, values * scales[kind])
        return chunk

    def _quotes(self, day: date, _depth: int) -> Iterator[dict[str, np.ndarray]]:
        names = ["bid_px_int", "ask_px_int", "bid_sz_int", "ask_sz_int"]
        for chunk in self._scalars(self._parts("quotes", day), day, names):
            for short, long in zip(("bid", "ask", "bid_sz", "ask_sz"), names, strict=True):
                chunk[short] = chunk.pop(long)
            chunk["bid_depth"] = np.maximum(chunk["bid_sz"], 0)
            chunk["ask_depth"] = np.maximum(chunk["ask_sz"], 0)
            yield chunk

    def _snapshots(self, day: date, depth: int) -> Iterator[dict[str, np.ndarray]]:
        for path, groups in self._parts("book_snapshot_25", day):
            table = _read(path, groups, [*_ORDER, "symbol_id"])
            chunk = {name: _int_column(table[name], path, name) for name in table.column_names}
            n = len(chunk["symbol_id"])
            for column, best, total in _LIST_COLUMNS:
                chunk[best] = np.empty(n, np.int64)
                sums = np.empty(n, np.int64)
                _reduce_column(path, groups, column, depth, chunk[best], sums)
                if total:
                    chunk[total] = sums
            mask = self._mine(chunk["symbol_id"])
            if mask is not None:
                chunk = {name: values[mask] for name, values in chunk.items()}
            yield self._normalise(chunk, path, day)


_LIST_COLUMNS = (
    ("bids_px", "bid", None),
    ("bids_sz", "bid_sz", "bid_depth"),
    ("asks_px", "ask", None),
    ("asks_sz", "ask_sz", "ask_depth"),
)
_UNITS = {
    "price_int": "price",
    "qty_int": "size",
    "bid": "price",
    "ask": "price",
    "bid_px_int": "price",
    "ask_px_int": "price",
    "bid_sz": "size",
    "ask_sz": "size",
    "bid_sz_int": "size",
    "ask_sz_int": "size",
    "bid_depth": "size",
    "ask_depth": "size",
}


def open_symbol(root: Path, exchange: str, name: str) -> SymbolLake:
    """One symbol of the lake at `root`; raises LakeError if the lake does not know it."""
    root = Path(root)
    if not root.is_dir():
        raise LakeError(f"{root}: no such lake; make one with `clusterlob ingest`")
    if manifest.pending(root):
        raise LakeError(
            f"{root}: an ingest was cut off between two renames; give its command again to finish it"
        )
    return SymbolLake(root, find_symbol(root, exchange, name))


def _last_groups(part: _Part, rows: int) -> _Part:
    """The last row groups with at least `rows` rows, if all earlier times are below theirs, else all."""
    meta = pq.read_metadata(part.path)
    leaf = _leaf(meta, "ts_local_us")
    groups, held = list(part.row_groups), 0
    for at in range(len(groups) - 1, 0, -1):
        held += meta.row_group(groups[at]).num_rows
        if held < rows:
            continue
        early, late = (
            [meta.row_group(group).column(leaf).statistics for group in side]
            for side in (groups[:at], groups[at:])
        )
        if all(stats is not None and stats.has_min_max for stats in early + late) and max(
            stats.max for stats in early
        ) < min(stats.min for stats in late):
            return _Part(part.path, groups[at:])
    return part


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _leaf(meta: pq.FileMetaData, name: str) -> int:
    """Index of a flat column among the leaves of the Parquet schema."""
    return next(i for i in range(len(meta.schema)) if meta.schema.column(i).path == name)


def _read(path: Path, groups: list[int], columns: list[str]) -> pa.Table:
    try:
        with pq.ParquetFile(path) as file:
            missing = [name for name in columns if name not in file.schema_arrow.names]
            if missing:
                raise LakeError(
                    f"{path}: column {missing[0]} is missing, found {', '.join(file.schema_arrow.names)}"
                )
            return file.read_row_groups(groups, columns=columns, use_threads=False)
    except (pa.ArrowInvalid, OSError) as error:
        raise LakeError(f"{path}: not a readable Parquet file ({_line(error)}); ingest it again") from None


def _column(column: pa.ChunkedArray, path: Path, name: str) -> np.ndarray:
    """A flat column as NumPy: trade ids as numbers, floats with NaN for null, integers as int64."""
    if name == "trade_id":
        return numeric_ids(column)
    if pa.types.is_floating(column.type):
        return column.to_numpy().astype(np.float64, copy=False)
    return _int_column(column, path, name)


def numeric_ids(ids: pa.ChunkedArray) -> np.ndarray:
    """Trade ids as int64; NO_ID for one that is not a plain decimal number of 1 to 18 digits."""
    if not pa.types.is_string(ids.type):
        ids = ids.cast(pa.string())
    short = pc.less_equal(pc.binary_length(ids), 18)
    plain = pc.fill_null(pc.and_(short, pc.and_(pc.string_is_ascii(ids), pc.utf8_is_decimal(ids))), False)
    return pc.if_else(plain, ids, str(NO_ID)).cast(pa.int64()).to_numpy()


def _int_column(column: pa.ChunkedArray, path: Path, name: str) -> np.ndarray:
    """An integer column as int64; nulls become NO_LEVEL (allowed in quotes only)."""
    if column.null_count:
        if _UNITS.get(name) is None or name in ("price_int", "qty_int"):
            raise LakeError(f"{path}: column {name} has {column.null_count} nulls; it may have none")
        column = pc.fill_null(column, pa.scalar(kernels.NO_LEVEL, pa.int64()))
    return column.to_numpy().astype(np.int64, copy=False)


def _reduce_column(
    path: Path, groups: list[int], column: str, depth: int, best: np.ndarray, total: np.ndarray
) -> None:
    """First entry and depth sum of one list column, batch by batch."""
    done = 0
    try:
        with pq.ParquetFile(path) as file:
            if column not in file.schema_arrow.names:
                raise LakeError(f"{path}: column {column} is missing; is this book_snapshot_25?")
            batches = file.iter_batches(_SNAPSHOT_BATCH, groups, [column], use_threads=False)
            for batch in batches:
                lists = batch.column(0)
                offsets, values = _list_buffers(lists)
                stop = done + len(lists)
                kernels.reduce_levels(offsets, values, depth, best[done:stop], total[done:stop])
                done = stop
    except (pa.ArrowInvalid, OSError) as error:
        raise LakeError(f"{path}: not a readable Parquet file ({_line(error)}); ingest it again") from None


def _list_buffers(lists: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Offsets and end-to-end values of a list column; a null list is empty, a null entry NO_LEVEL."""
    if pa.types.is_fixed_size_list(lists.type) or lists.null_count:
        lists = pc.fill_null(lists.cast(pa.list_(pa.int64())), [])
    values = lists.values
    if values.null_count:
        values = pc.fill_null(values, pa.scalar(kernels.NO_LEVEL, pa.int64()))
    return lists.offsets.to_numpy().astype(np.int64), values.to_numpy()


def _order(columns: dict[str, np.ndarray]) -> np.ndarray | None:
    """Permutation into the lake's order, None where the rows are in it already."""
    keys = [columns[name] for name in _ORDER]
    return None if kernels.is_sorted(*keys) else np.lexsort(keys[::-1])


def _check_notional(price: np.ndarray, qty: np.ndarray, where: str) -> None:
    """Raise unless every price * qty fits an int64."""
    largest = float(np.abs(price).max()) * float(np.abs(qty).max())
    if largest >= 2.0**62:
        raise LakeError(
            f"{where}: price_int * qty_int reaches {largest:.3g}, beyond 2^62; "
            "coarsen price_increment or amount_increment in dim_symbol"
        )

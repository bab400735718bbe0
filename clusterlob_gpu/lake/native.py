"""Reading the lake: which days it has, and one day of trades or book rows as plain columns.

A partition may hold several files and several symbols, in any order of files; what comes out is in
the lake's order (ts_local_us, file_id, file_line_number), in the symbol's common integer units.
Snapshots are decoded in small batches and reduced at once to the few integers that are needed, so that
memory stays small.

A day is looked at once: a listing, and the end of each file, which holds its Parquet footer.  What was
seen there is what is read later, or the read fails: a file must not change under a run.
"""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from clusterlob_gpu import kernels
from clusterlob_gpu.errors import LakeError
from clusterlob_gpu.files import Entry, Location, parquet_faults
from clusterlob_gpu.lake import manifest
from clusterlob_gpu.lake.layout import day_start_us
from clusterlob_gpu.lake.symbols import DIM_SYMBOL_FILE, Symbol, find_symbol
from clusterlob_gpu.schema import LAKE_TABLES, NO_ID, US_PER_DAY, BookRows, Fills, Trades

_LOOKERS = 16
"""Threads that look at days: an object store answers slowly, but many at a time."""
_TAIL = 65_536
"""Bytes at the end of a file that go into its fingerprint; they nearly always hold its footer."""
_SNAPSHOT_BATCH = 16_384
_WIDEST = (-(2**63), 2**63 - 1)
_TRADE_COLUMNS = ["side", "price_int", "qty_int"]
_ORDER = ("ts_local_us", "file_id", "file_line_number")
_FLOATS = {f.name for f in LAKE_TABLES["derivative_ticker"] if pa.types.is_floating(f.type)}


def days_between(first: date, last: date) -> list[date]:
    """Every day from first to last, both included."""
    return [first + timedelta(days=n) for n in range((last - first).days + 1)]


class _Part(NamedTuple):
    """One file as it was when it was looked at, and its row groups that hold the symbol."""

    where: Location
    state: str
    footer: bytes
    """Parsed again at every use: parsed, it would take eight times the memory."""
    row_groups: list[int]

    @property
    def meta(self) -> pq.FileMetaData:
        return pq.read_metadata(pa.BufferReader(self.footer))


class _Look(NamedTuple):
    """What a day holds of the symbol."""

    parts: list[_Part]
    fingerprint: str
    rows: int
    stored: int
    """Bytes."""


@dataclass(frozen=True)
class SymbolLake:
    """One symbol of one lake, as this object first saw it.

    A day is looked at when it is first asked for and then remembered, in this process only: a copy that
    was pickled looks again.  Threads may share the object.

    Methods raise LakeError where a file is broken or there are no rows to read; as far as one day is to
    blame, the error says which: its attributes `table` and `day`.  They raise OSError where a file
    cannot be reached, or has changed since it was looked at.
    """

    root: Location
    symbol: Symbol
    without: frozenset[tuple[str, date]] = frozenset()
    """(table, day) of which the lake is taken to have no rows."""
    _memory: dict[tuple[str, date], _Look] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __reduce__(self) -> tuple[Any, ...]:
        return SymbolLake, (self.root, self.symbol, self.without)

    def leaving_out(self, pairs: Iterable[tuple[str, date]]) -> SymbolLake:
        """The lake as if it had no rows of the symbol in these (table, day); what was seen is kept."""
        other = SymbolLake(self.root, self.symbol, self.without | frozenset(pairs))
        other._memory.update(self._memory.copy())
        return other

    def _folder(self, table: str) -> Location:
        return self.root / table / f"exchange={self.symbol.exchange}"

    def days(self, table: str) -> list[date]:
        """Days on which the table has a partition, with rows of this symbol or not, in order."""
        found, folder = [], self._folder(table)
        for entry in folder.entries():
            if entry.name.startswith("date="):
                try:
                    found.append(date.fromisoformat(entry.name.removeprefix("date=")))
                except ValueError:
                    raise LakeError(
                        f"{folder / entry.name}: not a partition; it must read date=YYYY-MM-DD"
                    ) from None
        return sorted(found)

    def look(self, table: str, days: Iterable[date]) -> None:
        """Look at many days at a time.

        Raises LakeError for the first broken one after all have been looked at, and OSError at once.
        """
        faults = []
        with ThreadPoolExecutor(_LOOKERS) as pool:
            for looking in [pool.submit(self._look, table, day) for day in days]:
                try:
                    looking.result()
                except LakeError as error:
                    faults.append(error)
                except BaseException:
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise
        if faults:
            raise faults[0]

    def seen(self) -> dict[str, str | None]:
        """Fingerprint of every day looked at, by "table YYYY-MM-DD", sorted; None for no rows or left out."""
        found = {key: look.fingerprint if look.parts else None for key, look in self._memory.copy().items()}
        found |= dict.fromkeys(self.without)
        return {f"{table} {day}": found[table, day] for table, day in sorted(found)}

    def has(self, table: str, day: date) -> bool:
        """Whether the table has at least one row of this symbol on that day."""
        return bool(self._look(table, day).parts)

    def size(self, table: str, day: date) -> tuple[int, int]:
        """Rows in the row groups that hold the symbol, and bytes as stored.

        Both are the symbol's where a file holds one symbol; of another file's bytes, row groups have the
        share that they have before compression.
        """
        look = self._look(table, day)
        return look.rows, look.stored

    def fingerprint(self, table: str, day: date) -> str:
        """Hash of the files behind a day: names, sizes, times of change and Parquet footers."""
        return self._look(table, day).fingerprint

    @cached_property
    def _symbol_key(self) -> str:
        return str(self.symbol.rows.to_csv())

    def _look(self, table: str, day: date) -> _Look:
        key = table, day
        if key in self.without:
            return self._summary([])
        if key not in self._memory:
            with _fault_of(table, day):
                # Of two threads that look at the same time, the first to finish is right for both.
                self._memory.setdefault(key, self._summary(self._files(table, day)))
        return self._memory[key]

    def _files(self, table: str, day: date) -> list[tuple[Location, Entry]]:
        """Parquet files of a partition, sorted by name."""
        folder = self._folder(table) / f"date={day}"
        found = [(folder / entry.name, entry) for entry in folder.entries()]
        if not found and (self.root / DIM_SYMBOL_FILE).entry() is None:
            # An unmounted disk or a bucket that was deleted must not pass for a lake without this day.
            raise FileNotFoundError(errno.ENOENT, "the lake has gone", str(self.root))
        return [
            (where, entry)
            for where, entry in found
            if entry.name.endswith(".parquet") and not entry.name.startswith((".", "_"))
        ]

    def _summary(self, files: list[tuple[Location, Entry]]) -> _Look:
        digest = hashlib.sha256(self._symbol_key.encode())
        parts, rows, stored = [], 0, 0
        for where, entry in files:
            with where.open() as file, parquet_faults(where):
                state = where.state(file)
                if file.size() != entry.size:
                    raise _changed(where)
                tail = file.read_at(min(entry.size, _TAIL), max(0, entry.size - _TAIL))
                footer = _footer(file, tail)
                meta = pq.read_metadata(pa.BufferReader(footer))
                groups = self._row_groups(where, file, meta)
            if groups:
                parts.append(_Part(where, state, footer, groups))
                digest.update(f"{entry.name} {entry.size} {entry.changed_ns}".encode())
                digest.update(tail)
                rows += _total(meta, groups, "num_rows")
                whole = _total(meta, range(meta.num_row_groups), "total_byte_size")
                stored += entry.size * _total(meta, groups, "total_byte_size") // max(1, whole)
        return _Look(parts, digest.hexdigest(), rows, stored)

    def _row_groups(self, where: Location, source: pa.NativeFile, meta: pq.FileMetaData) -> list[int]:
        """Row groups with rows of the symbol; statistics decide where they can, else the column."""
        leaf, wanted = _leaf(meta, "symbol_id", where), self.symbol.ids
        found = []
        for group in range(meta.num_row_groups):
            low, high = _bounds(meta, group, leaf)
            if not any(low <= key <= high for key in wanted):
                continue
            if low == high:
                found.append(group)
                continue
            ids = _parquet(where, source, meta).read_row_group(group, columns=["symbol_id"])["symbol_id"]
            if np.isin(_int_column(ids, where, "symbol_id"), wanted).any():
                found.append(group)
        return found

    def read_trades(self, day: date, last: int | None = None) -> Trades:
        """The day's trades, or at least the `last` of them where the file allows to read only those."""
        parts = self._look("trades", day).parts
        if last is not None and len(parts) == 1:
            with _fault_of("trades", day):
                parts = [_last_groups(parts[0], last)]
        return self._trades(day, self._gather("trades", day, self._scalars(parts, day, _TRADE_COLUMNS)))

    def read_fills(self, day: date) -> Fills:
        """The day's trades with the exchange's time and id of each, from which orders are rebuilt."""
        names = [*_TRADE_COLUMNS, "ts_exch_us", "trade_id"]
        columns = self._gather("trades", day, self._scalars(self._look("trades", day).parts, day, names))
        return Fills(self._trades(day, columns), columns["ts_exch_us"], columns["trade_id"])

    def _trades(self, day: date, columns: dict[str, np.ndarray]) -> Trades:
        price, qty = columns["price_int"], columns["qty_int"]
        ts, side = columns["ts_local_us"], columns["side"].astype(np.uint8)
        with _fault_of("trades", day):
            _check_notional(price, qty, f"trades of {self.symbol.name} from ts_local_us = {ts[0]}")
        return Trades(ts, side, price, qty)

    def read_ticker(self, day: date, names: list[str]) -> dict[str, np.ndarray]:
        """Columns of the day's `derivative_ticker`, float64 with NaN for null, and ts_local_us."""
        parts = self._look("derivative_ticker", day).parts
        # Some lakes keep no file and line for this table: then time alone orders it.
        there = parts[0].meta.schema.to_arrow_schema().names if parts else []
        order = ("ts_local_us", *(name for name in _ORDER[1:] if name in there))
        return self._gather("derivative_ticker", day, self._scalars(parts, day, names, order))

    def read_book(self, day: date, table: str, depth: int) -> BookRows:
        """The day's book rows from `book_snapshot_25` or `quotes`, depth summed over `depth` levels."""
        read = self._snapshots if table == "book_snapshot_25" else self._quotes
        columns = self._gather(table, day, read(self._look(table, day).parts, day, depth))
        names = ("ts_local_us", "bid", "ask", "bid_sz", "ask_sz", "bid_depth", "ask_depth", "tick")
        return BookRows(*(columns[name] for name in names))

    def _gather(
        self, table: str, day: date, chunks: Iterator[dict[str, np.ndarray]]
    ) -> dict[str, np.ndarray]:
        """Columns of a day in the lake's order; raises LakeError if there are no rows."""
        with _fault_of(table, day):
            held = list(chunks)
            if not held:
                raise LakeError(self.absent(table, day))
        columns = held[0] if len(held) == 1 else _concatenated(held)
        order = _order(columns)
        return columns if order is None else {name: values[order] for name, values in columns.items()}

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
        for part in parts:
            columns = [*order, "symbol_id", *names]
            with _opened(part, columns) as file:
                table = file.read_row_groups(part.row_groups, columns=columns, use_threads=False)
            chunk = {name: _column(table[name], part.where, name) for name in columns}
            yield self._normalise(self._filtered(chunk), part.where, day)

    def _filtered(self, chunk: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The symbol's rows."""
        mine = np.isin(chunk["symbol_id"], self.symbol.ids)
        return chunk if mine.all() else {name: values[mine] for name, values in chunk.items()}

    def _normalise(self, chunk: dict[str, np.ndarray], where: Location, day: date) -> dict[str, np.ndarray]:
        """Check the day, scale integers of every period to the symbol's units, add the tick."""
        ts = chunk["ts_local_us"]
        start = day_start_us(day)
        outside = (ts < start) | (ts >= start + US_PER_DAY)
        if outside.any():
            at = int(np.argmax(outside))
            when = datetime.fromtimestamp(int(ts[at]) / 1e6, UTC)
            raise LakeError(
                f"{where}: row {at} has ts_local_us = {ts[at]} ({when:%Y-%m-%d}), not the day {day}"
            )
        rows = self.symbol.rows
        if len(rows) == 1 and rows["valid_from_ts"][0] <= start < rows["valid_until_ts"][0] - US_PER_DAY:
            chunk["tick"] = np.full(len(ts), self.symbol.ticks()[0])
            return chunk
        period = self.symbol.row_at(chunk["symbol_id"], ts, str(where))
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
                        f"{where}: {name} reaches {largest:.3g} in the symbol's finest unit, beyond 2^62; "
                        "coarsen the increments in dim_symbol"
                    )
                chunk[name] = np.where(missing, values, values * scales[kind])
        return chunk

    def _quotes(self, parts: list[_Part], day: date, _depth: int) -> Iterator[dict[str, np.ndarray]]:
        names = ["bid_px_int", "ask_px_int", "bid_sz_int", "ask_sz_int"]
        for chunk in self._scalars(parts, day, names):
            for short, long in zip(("bid", "ask", "bid_sz", "ask_sz"), names, strict=True):
                chunk[short] = chunk.pop(long)
            chunk["bid_depth"] = np.maximum(chunk["bid_sz"], 0)
            chunk["ask_depth"] = np.maximum(chunk["ask_sz"], 0)
            yield chunk

    def _snapshots(self, parts: list[_Part], day: date, depth: int) -> Iterator[dict[str, np.ndarray]]:
        for part in parts:
            plain = [*_ORDER, "symbol_id"]
            with _opened(part, [*plain, *_LISTS]) as file:
                table = file.read_row_groups(part.row_groups, columns=plain, use_threads=False)
                chunk = {name: _int_column(table[name], part.where, name) for name in plain}
                for name in _LISTS:
                    kind = file.schema_arrow.field(name).type
                    _expect(_lists_integers(kind), kind, "list of integers", part.where, name)
                chunk |= _reduced(file, part.row_groups, len(table), depth)
            yield self._normalise(self._filtered(chunk), part.where, day)


_LISTS = {
    "bids_px": ("bid", "unused"),
    "bids_sz": ("bid_sz", "bid_depth"),
    "asks_px": ("ask", "unused"),
    "asks_sz": ("ask_sz", "ask_depth"),
}
"""List columns of a snapshot: what their first entry is, and what the sum of the first ones."""
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


def open_symbol(root: str | Path | Location, exchange: str, name: str) -> SymbolLake:
    """One symbol of the lake at a path or s3:// address.

    Raises LakeError if the lake does not know it, OSError if the lake cannot be reached.
    """
    lake = Location.of(root)
    there = lake.entry()
    if there is None or not there.is_folder:
        raise LakeError(f"{lake}: no such lake; make one with `clusterlob ingest`")
    if manifest.pending(lake):
        raise LakeError(
            f"{lake}: an ingest was cut off between two renames; give its command again to finish it"
        )
    return SymbolLake(lake, find_symbol(lake, exchange, name))


@contextmanager
def _fault_of(table: str, day: date) -> Iterator[None]:
    """Let a LakeError say which day is to blame; the attributes travel between processes with it."""
    try:
        yield
    except LakeError as error:
        vars(error).update(table=table, day=day)
        raise


def _changed(where: Location) -> OSError:
    return OSError(errno.ESTALE, "has changed while it was in use; run again", str(where))


def _parquet(where: Location, source: pa.NativeFile, meta: pq.FileMetaData) -> pq.ParquetFile:
    """A Parquet reader that finds damage where the file has checksums.

    On S3 it joins the reads of neighbouring columns into few requests; a disk needs no such buffers.
    """
    return pq.ParquetFile(
        source, metadata=meta, pre_buffer=where.path is None, page_checksum_verification=True
    )


@contextmanager
def _opened(part: _Part, columns: list[str]) -> Iterator[pq.ParquetFile]:
    """The file as it was looked at, with these columns.

    Raises LakeError if it lacks one or the block finds it broken, OSError if it is another file by now.
    """
    with part.where.open() as file, parquet_faults(part.where):
        if part.where.state(file) != part.state:
            raise _changed(part.where)
        meta = part.meta
        _require(columns, meta.schema.to_arrow_schema().names, part.where)
        yield _parquet(part.where, file, meta)


def _require(columns: list[str], there: list[str], where: Location) -> None:
    missing = [name for name in columns if name not in there]
    if missing:
        raise LakeError(f"{where}: column {missing[0]} is missing, found {', '.join(there)}")


def _footer(file: pa.NativeFile, tail: bytes) -> bytes:
    """The end of a Parquet file from its metadata on; what is no Parquet file comes back as it is."""
    size = int.from_bytes(tail[-8:-4], "little") + 8
    if size <= len(tail):
        return tail[-size:]
    if tail[-4:] != b"PAR1" or size > file.size():
        return tail
    return bytes(file.read_at(size, file.size() - size))


def _total(meta: pq.FileMetaData, groups: Iterable[int], what: str) -> int:
    return sum(getattr(meta.row_group(group), what) for group in groups)


def _last_groups(part: _Part, rows: int) -> _Part:
    """The last row groups with at least `rows` rows, if all earlier times are below theirs, else all."""
    meta, groups, held = part.meta, part.row_groups, 0
    leaf = _leaf(meta, "ts_local_us", part.where)
    for at in range(len(groups) - 1, 0, -1):
        held += meta.row_group(groups[at]).num_rows
        if held < rows:
            continue
        early, late = ([_bounds(meta, group, leaf) for group in side] for side in (groups[:at], groups[at:]))
        if max(high for _, high in early) < min(low for low, _ in late):
            return part._replace(row_groups=groups[at:])
    return part


def _leaf(meta: pq.FileMetaData, name: str, where: Location) -> int:
    """Index of a flat column among the leaves of the Parquet schema; raises LakeError if it is missing."""
    _require([name], meta.schema.to_arrow_schema().names, where)
    return next(i for i in range(len(meta.schema)) if meta.schema.column(i).path == name)


def _bounds(meta: pq.FileMetaData, group: int, leaf: int) -> tuple[int, int]:
    """Bounds of an integer column in a row group, the widest where the file does not say."""
    chunk = meta.row_group(group).column(leaf)
    if chunk.physical_type != meta.schema.column(leaf).physical_type:
        return _WIDEST  # a damaged footer: Arrow ends the process over its statistics, not over its pages
    stats = chunk.statistics if chunk.physical_type in ("INT32", "INT64") else None
    return (stats.min_raw, stats.max_raw) if stats is not None and stats.has_min_max else _WIDEST


def _column(column: pa.ChunkedArray, where: Location, name: str) -> np.ndarray:
    """A flat column as NumPy: trade ids as numbers, floats with NaN for null, integers as int64."""
    if name == "trade_id":
        return numeric_ids(column)
    if name in _FLOATS:
        _expect(pa.types.is_floating(column.type), column.type, "float", where, name)
        return column.to_numpy().astype(np.float64, copy=False)
    return _int_column(column, where, name)


def _expect(ok: bool, kind: pa.DataType, wanted: str, where: Location, name: str) -> None:
    if not ok:
        raise LakeError(f"{where}: column {name} is {kind}, it must be {wanted}; ingest it again")


def numeric_ids(ids: pa.ChunkedArray) -> np.ndarray:
    """Trade ids as int64; NO_ID for one that is not a plain decimal number of 1 to 18 digits."""
    if not pa.types.is_string(ids.type):
        ids = ids.cast(pa.string())
    short = pc.less_equal(pc.binary_length(ids), 18)
    plain = pc.fill_null(pc.and_(short, pc.and_(pc.string_is_ascii(ids), pc.utf8_is_decimal(ids))), False)
    return pc.if_else(plain, ids, str(NO_ID)).cast(pa.int64()).to_numpy()


def _int_column(column: pa.ChunkedArray, where: Location, name: str) -> np.ndarray:
    """An integer column as int64; nulls become NO_LEVEL (allowed in quotes only)."""
    _expect(pa.types.is_integer(column.type), column.type, "integer", where, name)
    if column.null_count:
        if _UNITS.get(name) is None or name in ("price_int", "qty_int"):
            raise LakeError(f"{where}: column {name} has {column.null_count} nulls; it may have none")
        column = pc.fill_null(column, pa.scalar(kernels.NO_LEVEL, pa.int64()))
    return column.to_numpy().astype(np.int64, copy=False)


def _reduced(file: pq.ParquetFile, groups: list[int], rows: int, depth: int) -> dict[str, np.ndarray]:
    """First entries and depth sums of the list columns; ArrowInvalid unless they have `rows` rows."""
    found = _concatenated(
        [
            _reduced_batch(batch, depth)
            for group in groups  # one by one: what is buffered for a reader stays until it ends
            for batch in file.iter_batches(_SNAPSHOT_BATCH, [group], list(_LISTS), use_threads=False)
        ]
    )
    if len(found["bid"]) != rows:
        raise pa.ArrowInvalid(f"{len(found['bid'])} rows of lists beside {rows} of the other columns")
    return found


def _reduced_batch(batch: pa.RecordBatch, depth: int) -> dict[str, np.ndarray]:
    found = {name: np.empty(len(batch), np.int64) for names in _LISTS.values() for name in names}
    for name, (best, total) in _LISTS.items():
        kernels.reduce_levels(*_list_buffers(batch[name]), depth, found[best], found[total])
    del found["unused"]
    return found


def _lists_integers(kind: pa.DataType) -> bool:
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return is_list and pa.types.is_integer(kind.value_type)


def _list_buffers(lists: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Offsets and end-to-end values of a list column; a null list is empty, a null entry NO_LEVEL."""
    if pa.types.is_fixed_size_list(lists.type) or lists.null_count:
        lists = pc.fill_null(lists.cast(pa.list_(pa.int64())), [])
    values = lists.values
    if values.null_count:
        values = pc.fill_null(values, pa.scalar(kernels.NO_LEVEL, pa.int64()))
    return lists.offsets.to_numpy().astype(np.int64), values.to_numpy()


def _concatenated(chunks: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]}


def _order(columns: dict[str, np.ndarray]) -> np.ndarray | None:
    """Permutation into the lake's order, None where the rows are in it already."""
    keys = [columns[name] for name in _ORDER if name in columns]
    if len(keys) == len(_ORDER) and kernels.is_sorted(*keys):
        return None
    return np.lexsort(keys[::-1])


def _check_notional(price: np.ndarray, qty: np.ndarray, where: str) -> None:
    """Raise unless every price * qty fits an int64."""
    largest = float(np.abs(price).max()) * float(np.abs(qty).max())
    if largest >= 2.0**62:
        raise LakeError(
            f"{where}: price_int * qty_int reaches {largest:.3g}, beyond 2^62; "
            "coarsen price_increment or amount_increment in dim_symbol"
        )

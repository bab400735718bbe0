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
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clusterlob_gpu import kernels
from clusterlob_gpu.backend import CPU, Backend
from clusterlob_gpu.errors import LakeError
from clusterlob_gpu.files import Entry, Location, parquet_faults
from clusterlob_gpu.lake import decode, manifest
from clusterlob_gpu.lake.layout import day_start_us
from clusterlob_gpu.lake.symbols import DIM_SYMBOL_FILE, Symbol, find_symbol
from clusterlob_gpu.schema import US_PER_DAY, BookRows, Fills, Trades

_LOOKERS = 16
"""Threads that look at days: an object store answers slowly, but many at a time."""
_TAIL = 65_536
"""Bytes at the end of a file that go into its fingerprint; they nearly always hold its footer."""
_WIDEST = (-(2**63), 2**63 - 1)
_TRADE_COLUMNS = ["side", "price_int", "qty_int"]
_ORDER = ("ts_local_us", "file_id", "file_line_number")

Chunk = dict[str, Any]
"""Columns of some rows of a day, arrays of the backend."""


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
    only: int | None
    """The one symbol_id of these row groups, None where there may be several."""

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
                groups, only = self._row_groups(where, file, meta)
            if groups:
                parts.append(_Part(where, state, footer, groups, only))
                digest.update(f"{entry.name} {entry.size} {entry.changed_ns}".encode())
                digest.update(tail)
                rows += _total(meta, groups, "num_rows")
                whole = _total(meta, range(meta.num_row_groups), "total_byte_size")
                stored += entry.size * _total(meta, groups, "total_byte_size") // max(1, whole)
        return _Look(parts, digest.hexdigest(), rows, stored)

    def _row_groups(
        self, where: Location, source: pa.NativeFile, meta: pq.FileMetaData
    ) -> tuple[list[int], int | None]:
        """Row groups with rows of the symbol, and their one symbol_id where statistics tell it.

        Statistics decide where they can, else the column.
        """
        leaf, wanted = _leaf(meta, "symbol_id", where), self.symbol.ids
        found, ids = [], set[int | None]()
        for group in range(meta.num_row_groups):
            low, high = _bounds(meta, group, leaf)
            if not any(low <= key <= high for key in wanted):
                continue
            if low == high:
                found.append(group)
                ids.add(low)
                continue
            there = decode.flat(where, source, meta, [group], ["symbol_id"])["symbol_id"]
            if np.isin(there, wanted).any():
                found.append(group)
                ids.add(None)
        return found, ids.pop() if len(ids) == 1 else None

    def read_trades(self, day: date, last: int | None = None, *, on: Backend = CPU) -> Trades:
        """The day's trades, or at least the `last` of them where the file allows to read only those."""
        parts = self._look("trades", day).parts
        if last is not None and len(parts) == 1:
            with _fault_of("trades", day):
                parts = [_last_groups(parts[0], last)]
        chunks = self._scalars(parts, day, _TRADE_COLUMNS, on)
        return self._trades(day, self._gather("trades", day, chunks, on))

    def trade_stretches(self, day: date, rows: int | None, *, on: Backend = CPU) -> Iterator[Trades]:
        """The day's trades in order, some `rows` at a time as far as its file allows; None: all at once."""
        parts = self._look("trades", day).parts
        if rows is None or len(parts) != 1:
            yield self.read_trades(day, on=on)
            return
        (part,), columns, latest = parts, [*_ORDER, *_TRADE_COLUMNS], -1
        with _fault_of("trades", day), _opened(part, [*columns, "symbol_id"]) as (file, meta):
            for groups in _stretches(part, rows):
                some = part._replace(row_groups=groups)
                chunk = self._normalise(self._flat(some, file, meta, columns, on), some, day, on)
                held = self._gather("trades", day, iter([chunk]), on)
                trades = self._trades(day, held)
                if int(trades.ts[0]) <= latest:
                    said = "its row groups are not what their statistics say"
                    raise LakeError(f"{part.where}: {said}; ingest it again")
                latest = int(trades.ts[-1])
                yield trades

    def read_fills(self, day: date, *, on: Backend = CPU) -> Fills:
        """The day's trades with the exchange's time and id of each, from which orders are rebuilt."""
        names = [*_TRADE_COLUMNS, "ts_exch_us", "trade_id"]
        chunks = self._scalars(self._look("trades", day).parts, day, names, on)
        columns = self._gather("trades", day, chunks, on)
        return Fills(self._trades(day, columns), columns["ts_exch_us"], columns["trade_id"])

    def _trades(self, day: date, columns: Chunk) -> Trades:
        price, qty = columns["price_int"], columns["qty_int"]
        ts, side = columns["ts_local_us"], columns["side"].astype(np.uint8, copy=False)
        with _fault_of("trades", day):
            _check_notional(price, qty, f"trades of {self.symbol.name} from ts_local_us = {int(ts[0])}")
        return Trades(ts, side, price, qty)

    def read_ticker(self, day: date, names: list[str]) -> dict[str, np.ndarray]:
        """Columns of the day's `derivative_ticker`, float64 with NaN for null, and ts_local_us."""
        parts = self._look("derivative_ticker", day).parts
        # Some lakes keep no file and line for this table: then time alone orders it.
        there = parts[0].meta.schema.to_arrow_schema().names if parts else []
        order = ("ts_local_us", *(name for name in _ORDER[1:] if name in there))
        chunks = self._scalars(parts, day, names, CPU, order)
        return self._gather("derivative_ticker", day, chunks, CPU)

    def read_book(self, day: date, table: str, depth: int, *, on: Backend = CPU) -> BookRows:
        """The day's book rows from `book_snapshot_25` or `quotes`, depth summed over `depth` levels."""
        read = self._snapshots if table == "book_snapshot_25" else self._quotes
        columns = self._gather(table, day, read(self._look(table, day).parts, day, depth, on), on)
        names = ("ts_local_us", "bid", "ask", "bid_sz", "ask_sz", "bid_depth", "ask_depth", "tick")
        return BookRows(*(columns[name] for name in names))

    def _gather(self, table: str, day: date, chunks: Iterator[Chunk], on: Backend) -> Chunk:
        """Columns of a day in the lake's order; raises LakeError if there are no rows."""
        with _fault_of(table, day):
            held = list(chunks)
            if not held:
                raise LakeError(self.absent(table, day))
        columns = held[0] if len(held) == 1 else _concatenated(held, on)
        order = _order(columns, on)
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
        self, parts: list[_Part], day: date, names: list[str], on: Backend, order: tuple[str, ...] = _ORDER
    ) -> Iterator[Chunk]:
        """Plain columns of every part, filtered to the symbol, integers in common units."""
        for part in parts:
            columns = [*order, *names]
            with _opened(part, [*columns, "symbol_id"]) as (file, meta):
                chunk = self._flat(part, file, meta, columns, on)
            yield self._normalise(chunk, part, day, on)

    def _flat(
        self, part: _Part, file: pa.NativeFile, meta: pq.FileMetaData, names: list[str], on: Backend
    ) -> Chunk:
        """Flat columns of a part, and symbol_id where the rows are not known to have the same."""
        names = names if part.only is not None else [*names, "symbol_id"]
        chunk: Chunk = on.decode.flat(part.where, file, meta, part.row_groups, names)
        return chunk

    def _filtered(self, chunk: Chunk, part: _Part, on: Backend) -> Chunk:
        """The symbol's rows."""
        if part.only is not None:
            return chunk
        mine = on.xp.isin(chunk["symbol_id"], on.xp.asarray(self.symbol.ids))
        return chunk if bool(mine.all()) else {name: values[mine] for name, values in chunk.items()}

    def _normalise(self, chunk: Chunk, part: _Part, day: date, on: Backend) -> Chunk:
        """The symbol's rows, of that day, with integers in the symbol's units and with the tick of a book."""
        chunk = self._filtered(chunk, part, on)
        ts, start, where = chunk["ts_local_us"], day_start_us(day), part.where
        symbol_id = chunk.pop("symbol_id", None)
        if len(ts) and not (start <= int(ts.min()) and int(ts.max()) < start + US_PER_DAY):
            at = int(on.xp.argmax((ts < start) | (ts >= start + US_PER_DAY)))
            when = datetime.fromtimestamp(int(ts[at]) / 1e6, UTC)
            raise LakeError(
                f"{where}: row {at} has ts_local_us = {int(ts[at])} ({when:%Y-%m-%d}), not the day {day}"
            )
        rows, is_book = self.symbol.rows, "bid" in chunk or "bid_px_int" in chunk
        if len(rows) == 1 and rows["valid_from_ts"][0] <= start < rows["valid_until_ts"][0] - US_PER_DAY:
            return chunk | ({"tick": on.xp.full(len(ts), self.symbol.ticks()[0])} if is_book else {})
        times = on.to_host(ts)
        ids = np.full(len(ts), part.only) if symbol_id is None else on.to_host(symbol_id)
        period = self.symbol.row_at(ids, times, str(where))
        if is_book:
            chunk["tick"] = on.xp.asarray(self.symbol.ticks()[period])
        for kind, increment in (("price", "price_increment"), ("size", "amount_increment")):
            factor = self.symbol.factors(increment)
            scale = on.xp.asarray(factor[period])
            for name in (name for name in chunk if _UNITS.get(name) == kind):
                chunk[name] = _scaled(chunk[name], scale, int(factor.max()), f"{where}: {name}", on)
        return chunk

    def _quotes(self, parts: list[_Part], day: date, _depth: int, on: Backend) -> Iterator[Chunk]:
        names = ["bid_px_int", "ask_px_int", "bid_sz_int", "ask_sz_int"]
        for chunk in self._scalars(parts, day, names, on):
            for short, long in zip(("bid", "ask", "bid_sz", "ask_sz"), names, strict=True):
                chunk[short] = chunk.pop(long)
            chunk["bid_depth"] = on.xp.maximum(chunk["bid_sz"], 0)
            chunk["ask_depth"] = on.xp.maximum(chunk["ask_sz"], 0)
            yield chunk

    def _snapshots(self, parts: list[_Part], day: date, depth: int, on: Backend) -> Iterator[Chunk]:
        for part in parts:
            with _opened(part, [*_ORDER, "symbol_id", *decode.LISTS]) as (file, meta):
                chunk = self._flat(part, file, meta, list(_ORDER), on)
                chunk |= on.decode.levels(part.where, file, meta, part.row_groups, depth)
            yield self._normalise(chunk, part, day, on)


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


@contextmanager
def _opened(part: _Part, columns: list[str]) -> Iterator[tuple[pa.NativeFile, pq.FileMetaData]]:
    """The file as it was looked at, and its metadata, which has these columns.

    Raises LakeError if it lacks one or the block finds it broken, OSError if it is another file by now.
    """
    with part.where.open() as file, parquet_faults(part.where):
        if part.where.state(file) != part.state:
            raise _changed(part.where)
        meta = part.meta
        _require(columns, meta.schema.to_arrow_schema().names, part.where)
        yield file, meta


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


def _stretches(part: _Part, rows: int) -> Iterator[list[int]]:
    """Row groups in stretches of at least `rows` rows where they have them, each later than those before."""
    meta, groups = part.meta, part.row_groups
    bounds = [_bounds(meta, group, _leaf(meta, "ts_local_us", part.where)) for group in groups]
    earliest = list(accumulate((low for low, _ in reversed(bounds)), min))[::-1]
    begin, held, latest = 0, 0, bounds[0][0]
    for at, group in enumerate(groups):
        if held >= rows and earliest[at] > latest:
            yield groups[begin:at]
            begin, held = at, 0
        held, latest = held + meta.row_group(group).num_rows, max(latest, bounds[at][1])
    yield groups[begin:]


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


def _concatenated(chunks: list[Chunk], on: Backend) -> Chunk:
    return {name: on.xp.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]}


def _order(columns: Chunk, on: Backend) -> Any:
    """Permutation into the lake's order, None where the rows are in it already."""
    keys = [columns[name] for name in _ORDER if name in columns]
    if len(keys) == len(_ORDER) and on.kernels.is_sorted(*keys):
        return None
    return on.xp.lexsort(on.xp.stack([key.astype(np.int64, copy=False) for key in keys[::-1]]))


def _scaled(values: Any, scale: Any, largest_scale: int, what: str, on: Backend) -> Any:
    """Integers times a whole number each, missing ones as they are; LakeError beyond 2^62."""
    missing = values == kernels.NO_LEVEL
    known = on.xp.where(missing, 0, values)
    largest = _magnitude(known) * float(largest_scale)
    if largest >= 2.0**62:
        raise LakeError(
            f"{what} reaches {largest:.3g} in the symbol's finest unit, beyond 2^62; "
            "coarsen the increments in dim_symbol"
        )
    return on.xp.where(missing, values, values * scale)


def _magnitude(values: Any) -> float:
    """Largest absolute value of an integer column, 0 of an empty one."""
    return max(-float(values.min()), float(values.max())) if len(values) else 0.0


def _check_notional(price: Any, qty: Any, where: str) -> None:
    """Raise unless every price * qty fits an int64."""
    largest = _magnitude(price) * _magnitude(qty)
    if largest >= 2.0**62:
        raise LakeError(
            f"{where}: price_int * qty_int reaches {largest:.3g}, beyond 2^62; "
            "coarsen price_increment or amount_increment in dim_symbol"
        )

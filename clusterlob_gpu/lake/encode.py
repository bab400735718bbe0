"""Rows of Tardis CSV files as rows of the lake: checked, counted, in integers.

An `Encoder` takes the blocks of one file in order.  What a row may not be raises LakeError with the
line; what is odd but usable is counted by name in `counts`.
"""

from __future__ import annotations

import datetime as dt
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clusterlob_gpu.errors import LakeError
from clusterlob_gpu.lake.csv_blocks import CsvBlock
from clusterlob_gpu.lake.evidence import FileValues, Step, Values, joined
from clusterlob_gpu.lake.increments import NotMultipleError, StepTracker, to_integers
from clusterlob_gpu.lake.layout import day_of_us, list_column
from clusterlob_gpu.lake.periods import Period, Periods, period_of
from clusterlob_gpu.lake.symbols import canonical_symbol, exchange_id, symbol_id
from clusterlob_gpu.schema import BOOK_LEVELS, LAKE_TABLES, SIDE_BUY, SIDE_SELL, SIDE_UNKNOWN, US_PER_DAY

TABLE_OF = {
    "trades": "trades",
    "book_snapshot_25": "book_snapshot_25",
    "book_snapshot_5": "book_snapshot_25",
    "quotes": "quotes",
    "book_ticker": "quotes",
    "derivative_ticker": "derivative_ticker",
    "liquidations": "liquidations",
}
"""Lake table of each vendor data type; of two types for one table the one named first is preferred."""

SIDES = {"buy": SIDE_BUY, "sell": SIDE_SELL, "unknown": SIDE_UNKNOWN, "": SIDE_UNKNOWN}

_NAMES = pa.dictionary(pa.int32(), pa.string())
_COMMON = {"exchange": _NAMES, "symbol": _NAMES, "timestamp": pa.int64(), "local_timestamp": pa.int64()}
_TRADES = _COMMON | {"id": pa.string(), "side": _NAMES, "price": pa.float64(), "amount": pa.float64()}
_QUOTES = _COMMON | dict.fromkeys(("bid_price", "bid_amount", "ask_price", "ask_amount"), pa.float64())
_TICKER_VALUES = {
    "mark_px": "mark_price",
    "index_px": "index_price",
    "last_px": "last_price",
    "funding_rate": "funding_rate",
    "predicted_funding_rate": "predicted_funding_rate",
    "open_interest": "open_interest",
}
_TICKER = _COMMON | {"funding_timestamp": pa.int64()} | dict.fromkeys(_TICKER_VALUES.values(), pa.float64())
_LEVEL = re.compile(r"(?:asks|bids)\[(\d+)\]\.(?:price|amount)")
_SAMPLED_LATENCIES = 4096
"""Rows of each block whose latency is kept for the median."""


class MisfitError(Exception):
    """Values that are no whole multiples of the increment that holds at `ts`, the first of them in `line`."""

    def __init__(
        self, path: Path, line: int, ts: int, unit: str, increment: Fraction, values: np.ndarray
    ) -> None:
        super().__init__(f"{path}, line {line}: {unit} {values[0]!r}")
        self.path = path
        self.line = line
        self.ts = ts
        self.unit = unit
        """`price` or `amount`."""
        self.increment = increment
        self.values = values


class Steps:
    """Divisors of the prices and amounts of one file, by the UTC day of the rows."""

    def __init__(self) -> None:
        self._trackers: dict[tuple[dt.date, str, Fraction], StepTracker] = {}

    def add(self, day: dt.date, unit: str, increment: Fraction, integers: np.ndarray) -> None:
        """Take integers in units of `increment` into account; `unit`: price or amount."""
        self._trackers.setdefault((day, unit, increment), StepTracker()).add(integers)

    def values(self) -> FileValues:
        """What all of them say; days with nothing but zeros are left out."""
        found: FileValues = {}
        for (day, unit, increment), tracker in self._trackers.items():
            if tracker.divisor:
                old = found.get(day, Values())
                step = joined(getattr(old, unit), Step(tracker.divisor * increment, tracker.varied))
                found[day] = old._replace(**{unit: step})
        return found


def column_types(path: Path, kind: str, header: Sequence[str]) -> dict[str, pa.DataType]:
    """Columns to read from a file of data type `kind`, found by name.

    Raises LakeError naming the first column that the file lacks.
    """
    if kind.startswith("book_snapshot"):
        types = _COMMON | dict.fromkeys(_level_columns(_n_levels(header)), pa.float64())
    else:
        types = {"trades": _TRADES, "liquidations": _TRADES, "derivative_ticker": _TICKER}.get(kind, _QUOTES)
    for name in types:
        if name not in header:
            raise LakeError(
                f"{path}, line 1: column {name} is missing, found {','.join(header[:12])}; "
                f"is this a file of {kind}?"
            )
    return types


def _n_levels(header: Sequence[str]) -> int:
    found = [int(match[1]) for match in map(_LEVEL.fullmatch, header) if match]
    return min(max(found, default=0) + 1, BOOK_LEVELS)


def _level_columns(n_levels: int) -> list[str]:
    return [
        f"{side}[{level}].{what}"
        for level in range(n_levels)
        for side in ("bids", "asks")
        for what in ("price", "amount")
    ]


@dataclass(frozen=True)
class _Rows:
    """Rows of one UTC day and one period, in the lake's order."""

    table: pa.Table
    lines: np.ndarray
    ts_local: np.ndarray
    ts_exch: np.ndarray
    day: dt.date
    period: Period

    def __getitem__(self, name: str) -> np.ndarray:
        """A column of numbers as float64, NaN where the cell is empty."""
        return self.table[name].to_numpy()

    def filter(self, keep: np.ndarray) -> _Rows:
        table = self.table.filter(pa.array(keep))
        return _Rows(table, self.lines[keep], self.ts_local[keep], self.ts_exch[keep], self.day, self.period)


@dataclass
class Encoder:
    """The state of one file on its way into the lake."""

    path: Path
    kind: str
    exchange: str
    symbol: str
    file_id: int
    periods: Periods
    steps: Steps = field(default_factory=Steps)
    counts: Counter[str] = field(default_factory=Counter)
    rows_in: int = 0
    _last_ts: int = 0
    _latencies: list[np.ndarray] = field(default_factory=list)

    def encode(self, block: CsvBlock) -> Iterator[tuple[dt.date, pa.Table]]:
        """Lake rows of a block by UTC day of ts_local_us, each sorted by (ts_local_us, line).

        Raises LakeError for what a file may not hold and MisfitError for a too coarse increment.
        """
        self.counts["blank_lines"] += block.blank_lines
        if not len(block.lines):
            return
        table, lines = block.table.combine_chunks(), block.lines
        self.rows_in += len(lines)
        self._check_names(table, lines, "exchange", self.exchange)
        self._check_names(table, lines, "symbol", self.symbol)
        ts_local = self._times(table, lines, "local_timestamp", np.zeros(0))
        ts_exch = self._times(table, lines, "timestamp", ts_local)
        self._clock(table, ts_local, ts_exch)
        late = np.diff(ts_local, prepend=self._last_ts) < 0
        self._last_ts = int(ts_local[-1])
        if late.any():
            self.counts["out_of_order"] += int(late.sum())
            order = np.argsort(ts_local, kind="stable")
            table, lines, ts_local, ts_exch = table.take(order), lines[order], ts_local[order], ts_exch[order]
        convert = getattr(self, f"_{TABLE_OF[self.kind]}")
        for rows in self._cut(table, lines, ts_local, ts_exch):
            yield rows.day, convert(rows)

    def latency(self) -> tuple[float, int] | None:
        """Share of rows received before the exchange's own time, and the median latency, us."""
        if not self._latencies:
            return None
        share = self.counts["negative_latency"] / self.rows_in
        return share, int(np.median(np.concatenate(self._latencies)))

    def _cut(
        self, table: pa.Table, lines: np.ndarray, ts_local: np.ndarray, ts_exch: np.ndarray
    ) -> Iterator[_Rows]:
        """Slices that stay within one day and one period."""
        first, last = int(ts_local[0]), int(ts_local[-1])
        midnights = range((first // US_PER_DAY + 1) * US_PER_DAY, last + 1, US_PER_DAY)
        starts = [period.start for period in self.periods] + [period.end for period in self.periods]
        edges = sorted({*midnights, *(ts for ts in starts if first < ts <= last)})
        cuts = [0, *np.searchsorted(ts_local, edges).tolist(), len(lines)]
        for begin, end in pairwise(cuts):
            if begin == end:
                continue
            index = int(period_of(self.periods, ts_local[begin : begin + 1])[0])
            if index < 0:
                raise self._error(
                    lines[begin],
                    f"local_timestamp {ts_local[begin]} lies in no period of {self.exchange} {self.symbol}; "
                    "extend its validity in the symbol table",
                )
            part = slice(begin, end)
            day = day_of_us(ts_local[begin])
            rows = table.slice(begin, end - begin)
            yield _Rows(rows, lines[part], ts_local[part], ts_exch[part], day, self.periods[index])

    def _trades(self, rows: _Rows) -> pa.Table:
        return self._events(rows, "trade_id")

    def _liquidations(self, rows: _Rows) -> pa.Table:
        return self._events(rows, "liq_id")

    def _events(self, rows: _Rows, id_name: str) -> pa.Table:
        """Trades or liquidations; those without a positive price and amount are dropped."""
        price, amount = self._filled(rows, "price"), self._filled(rows, "amount")
        positive = (price > 0) & (amount > 0)
        if not positive.all():
            self.counts["nonpositive_dropped"] += int((~positive).sum())
            rows, price, amount = rows.filter(positive), price[positive], amount[positive]
        side = self._sides(rows)
        self.counts["unknown_side"] += int((side == SIDE_UNKNOWN).sum())
        price_int, qty_int = self._integers(rows, price, "price"), self._integers(rows, amount, "amount")
        columns = {id_name: rows.table["id"], "side": side, "price_int": price_int, "qty_int": qty_int}
        if self.kind == "trades":
            columns["exchange_id"] = np.full(len(side), exchange_id(self.exchange), np.int16)
        return self._lake_table(rows, columns)

    def _book_snapshot_25(self, rows: _Rows) -> pa.Table:
        """Lists with as many levels as the file has; a level without price or amount is null."""
        n_levels = sum(name.startswith("bids[") for name in rows.table.column_names) // 2
        columns: dict[str, pa.Array] = {}
        best = {}
        empty_sides = np.zeros(len(rows.lines), dtype=bool)
        for side in ("bids", "asks"):
            price, amount = (_levels(rows, side, what, n_levels) for what in ("price", "amount"))
            missing = np.isnan(price) | np.isnan(amount)
            price[missing] = amount[missing] = np.nan
            best[side] = price[:, 0]
            empty_sides |= missing.all(axis=1)
            self.counts["empty_levels"] += int(missing.sum())
            for name, values, unit in (("px", price, "price"), ("sz", amount, "amount")):
                integers = self._integers(rows, values, unit)
                columns[f"{side}_{name}"] = list_column(integers, missing)
        self.counts["empty_side"] += int(empty_sides.sum())
        self._touch(best["bids"], best["asks"])
        return self._lake_table(rows, columns)

    def _quotes(self, rows: _Rows) -> pa.Table:
        """One level a side; null where the file has none."""
        columns: dict[str, pa.Array] = {}
        best = {}
        empty_sides = np.zeros(len(rows.lines), dtype=bool)
        for side in ("bid", "ask"):
            price, amount = rows[f"{side}_price"], rows[f"{side}_amount"]
            missing = np.isnan(price) | np.isnan(amount)
            empty_sides |= missing
            best[side] = np.where(missing, np.nan, price)
            for name, values, unit in (("px", price, "price"), ("sz", amount, "amount")):
                integers = self._integers(rows, np.where(missing, np.nan, values), unit)
                columns[f"{side}_{name}_int"] = pa.array(integers, mask=missing)
        self.counts["empty_side"] += int(empty_sides.sum())
        self._touch(best["bid"], best["ask"])
        return self._lake_table(rows, columns)

    def _derivative_ticker(self, rows: _Rows) -> pa.Table:
        """Floats as they are; an empty cell is null."""
        columns: dict[str, pa.Array] = {ours: rows.table[theirs] for ours, theirs in _TICKER_VALUES.items()}
        return self._lake_table(rows, columns | {"funding_ts_us": rows.table["funding_timestamp"]})

    def _lake_table(self, rows: _Rows, columns: dict[str, pa.Array | np.ndarray]) -> pa.Table:
        n_rows = len(rows.lines)
        columns |= {
            "ts_local_us": rows.ts_local,
            "ts_exch_us": rows.ts_exch,
            "symbol_id": np.full(n_rows, symbol_id(self.exchange, self.symbol)),
            "file_id": np.full(n_rows, self.file_id, np.int32),
            "file_line_number": rows.lines,
        }
        schema = LAKE_TABLES[TABLE_OF[self.kind]]
        return pa.table([columns[name] for name in schema.names], schema=schema)

    def _integers(self, rows: _Rows, values: np.ndarray, unit: str) -> np.ndarray:
        increment = rows.period.price if unit == "price" else rows.period.amount
        try:
            found = to_integers(values, increment)
        except NotMultipleError as error:
            at = error.index // (values.size // len(values))
            line, ts = int(rows.lines[at]), int(rows.ts_local[at])
            raise MisfitError(self.path, line, ts, unit, increment, error.misfits) from None
        self.counts["rounded_values"] += found.rounded
        self.steps.add(rows.day, unit, increment, found.integers)
        return found.integers

    def _touch(self, bid: np.ndarray, ask: np.ndarray) -> None:
        """Comparisons with NaN are false, so a row with an empty side is neither."""
        self.counts["crossed"] += int((bid > ask).sum())
        self.counts["locked"] += int((bid == ask).sum())

    def _filled(self, rows: _Rows, name: str) -> np.ndarray:
        values = rows[name]
        empty = np.isnan(values)
        if empty.any():
            raise self._error(rows.lines[np.argmax(empty)], f"{name} is empty; a number was expected")
        return values

    def _sides(self, rows: _Rows) -> np.ndarray:
        column = rows.table["side"].combine_chunks()
        texts = column.dictionary.to_pylist()
        for text in texts:
            if text not in SIDES:
                at = pc.index(column.cast(pa.string()), text).as_py()
                if at >= 0:
                    raise self._error(rows.lines[at], f"side is {text!r}; expected buy, sell or unknown")
        codes = np.array([SIDES.get(text, SIDE_UNKNOWN) for text in texts], dtype=np.uint8)
        return codes[column.indices.to_numpy()]

    def _check_names(self, table: pa.Table, lines: np.ndarray, name: str, expected: str) -> None:
        column = table[name].combine_chunks()
        for text in column.dictionary.to_pylist():
            if canonical_symbol(text) != canonical_symbol(expected):
                at = pc.index(column.cast(pa.string()), text).as_py()
                raise self._error(
                    lines[at],
                    f"{name} is {text!r}, the path says {expected!r}; move the file or mend the row",
                )

    def _times(self, table: pa.Table, lines: np.ndarray, name: str, default: np.ndarray) -> np.ndarray:
        column = table[name].combine_chunks()
        if column.null_count:
            empty = column.is_null().to_numpy(zero_copy_only=False)
            if not len(default):
                raise self._error(lines[np.argmax(empty)], f"{name} is empty; the lake is ordered by it")
            self.counts["empty_exchange_time"] += int(empty.sum())
            values = np.where(empty, default, column.fill_null(0).to_numpy())
        else:
            values = column.to_numpy()
        wrong = (values < 10**15) | (values >= 10**16)
        if wrong.any():
            at = int(np.argmax(wrong))
            digits = len(str(abs(int(values[at]))))
            meant = {10: "seconds", 13: "milliseconds", 19: "nanoseconds"}.get(digits, "no time since 2001")
            raise self._error(
                lines[at],
                f"{name} is {values[at]} ({digits} digits: {meant}); expected 16 digits, microseconds",
            )
        return values

    def _clock(self, table: pa.Table, ts_local: np.ndarray, ts_exch: np.ndarray) -> None:
        latency = ts_local - ts_exch
        self.counts["negative_latency"] += int((latency < 0).sum())
        told = latency[table["timestamp"].is_valid().to_numpy()] if table["timestamp"].null_count else latency
        if len(told):
            self._latencies.append(told[:: -(-len(told) // _SAMPLED_LATENCIES)].copy())

    def _error(self, line: int, what: str) -> LakeError:
        return LakeError(f"{self.path}, line {line}: {what}")


def _levels(rows: _Rows, side: str, what: str, n_levels: int) -> np.ndarray:
    """(n_rows, n_levels) float64, NaN where a cell is empty."""
    values = np.empty((len(rows.lines), n_levels))
    for level in range(n_levels):
        values[:, level] = rows[f"{side}[{level}].{what}"]
    return values

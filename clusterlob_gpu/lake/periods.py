"""A symbol's periods of constant units: as rows of `dim_symbol`, from a symbol table, and rows rescaled
from one set of periods to another.  What the periods of a symbol are is said in `evidence`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from clusterlob_gpu.errors import InputError, LakeError
from clusterlob_gpu.lake.increments import MAX_INTEGER
from clusterlob_gpu.lake.symbols import canonical_symbol, exchange_id, split_assets, symbol_id
from clusterlob_gpu.schema import MAX_TS

PRICE_COLUMNS = ("price_int", "bids_px", "asks_px", "bid_px_int", "ask_px_int")
SIZE_COLUMNS = ("qty_int", "bids_sz", "asks_sz", "bid_sz_int", "ask_sz_int")

_TABLE_COLUMNS = (
    "exchange",
    "exchange_symbol",
    "tick_size",
    "lot_size",
    "price_increment",
    "amount_increment",
)


@dataclass(frozen=True)
class Period:
    """Units from `start` (included) to `end` (excluded), us; a step that nothing has told yet is None."""

    start: int
    end: int
    price: Fraction
    amount: Fraction
    tick: Fraction | None = None
    lot: Fraction | None = None
    contract_size: float = 1.0


Periods = tuple[Period, ...]

WHOLE_NUMBERS: Periods = (Period(0, MAX_TS, Fraction(1), Fraction(1)),)
"""Of a symbol of which nothing is known."""


def period_of(periods: Periods, ts: np.ndarray) -> np.ndarray:
    """Index of the period that holds each time, -1 where none does."""
    index = np.searchsorted([period.start for period in periods], ts, side="right") - 1
    ends = np.array([period.end for period in periods], dtype=np.int64)
    return np.where((index >= 0) & (ts < ends[index]), index, -1)


def from_dim_rows(rows: pd.DataFrame) -> Periods:
    """Periods of one symbol's rows of `dim_symbol`, in the order of time."""
    return tuple(
        Period(
            int(row["valid_from_ts"]),
            int(row["valid_until_ts"]),
            _decimal(row["price_increment"]),
            _decimal(row["amount_increment"]),
            _decimal(row["tick_size"]),
            _decimal(row["lot_size"]),
            float(row["contract_size"]),
        )
        for row in rows.sort_values("valid_from_ts", kind="stable").to_dict("records")
    )


def to_dim_rows(exchange: str, symbol: str, periods: Periods) -> pd.DataFrame:
    """Rows of `dim_symbol`; an unknown step is given as the increment."""
    base, quote = split_assets(symbol)
    return pd.DataFrame(
        {
            "symbol_id": symbol_id(exchange, symbol),
            "exchange_id": exchange_id(exchange),
            "exchange": exchange,
            "exchange_symbol": symbol,
            "base_asset": base,
            "quote_asset": quote,
            "tick_size": [float(period.tick or period.price) for period in periods],
            "lot_size": [float(period.lot or period.amount) for period in periods],
            "price_increment": [float(period.price) for period in periods],
            "amount_increment": [float(period.amount) for period in periods],
            "contract_size": [period.contract_size for period in periods],
            "valid_from_ts": [period.start for period in periods],
            "valid_until_ts": [period.end for period in periods],
        }
    )


def read_symbol_table(path: Path) -> dict[tuple[str, str], Periods]:
    """Periods by (exchange, symbol) from a CSV or Parquet file with columns of `dim_symbol`.

    Validity may be absent, and then a row holds for ever.  Raises InputError for a missing file, column
    or value, and for periods that overlap.
    """
    try:
        table = pq.read_table(path) if path.suffix == ".parquet" else pacsv.read_csv(path)
    except (OSError, pa.ArrowInvalid) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: no readable symbol table ({reason}); give a CSV or Parquet file") from None
    rows = table.to_pandas()
    defaults = {"contract_size": 1.0, "valid_from_ts": 0, "valid_until_ts": MAX_TS}
    rows = rows.assign(**{name: value for name, value in defaults.items() if name not in rows})
    for name in _TABLE_COLUMNS:
        if name not in rows:
            raise InputError(f"{path}: column {name} is missing, found {', '.join(rows.columns)}; add it")
    for name in (*_TABLE_COLUMNS[2:], "contract_size"):
        bad = ~(rows[name] > 0)
        if bad.any():
            at = int(np.argmax(bad))
            raise InputError(f"{path}, row {at + 1}: {name} is {rows[name].iloc[at]}; it must be positive")
    found = {}
    for (exchange, symbol), mine in rows.groupby(["exchange", "exchange_symbol"]):
        periods = from_dim_rows(mine)
        for before, after in pairwise(periods):
            if before.end > after.start:
                raise InputError(
                    f"{path}: periods of {exchange} {symbol} overlap at {after.start}; part them"
                )
        found[str(exchange), canonical_symbol(str(symbol))] = periods
    return found


def same_units(ours: Periods, theirs: Periods, start: int = 0, end: int = MAX_TS) -> bool:
    """Whether an integer means the same under both, at every time of [start, end) that both cover."""
    return all(
        (a.price, a.amount) == (b.price, b.amount)
        for a in ours
        for b in theirs
        if max(a.start, b.start, start) < min(a.end, b.end, end)
    )


def rescaled(table: pa.Table, old: Periods, new: Periods, where: str) -> pa.Table:
    """Rows of a lake table with their integers brought from the units of `old` to those of `new`.

    Every value must be whole in the units of `new`.  Raises LakeError, naming `where`, if a result needs
    more than 53 bits.
    """
    ts = table["ts_local_us"].to_numpy()
    before, after = period_of(old, ts), period_of(new, ts)
    for columns, unit in ((PRICE_COLUMNS, "price"), (SIZE_COLUMNS, "amount")):
        times, over = _ratios([getattr(p, unit) for p in old], [getattr(p, unit) for p in new])
        times, over = times[before, after], over[before, after]
        if (times == over).all():
            continue
        for name in columns:
            if name in table.column_names:
                at = table.column_names.index(name)
                column = _scaled(table[name].combine_chunks(), times, over, f"{where}: {name}")
                table = table.set_column(at, table.schema.field(name), column)
    return table


def _scaled(column: pa.Array, times: np.ndarray, over: np.ndarray, where: str) -> pa.Array:
    """Each row's integers times `times` over `over`, which are in lowest terms."""
    lists = pa.types.is_list(column.type)
    values = column.flatten() if lists else column
    if lists:
        lengths = np.diff(column.offsets.to_numpy())
        times, over = np.repeat(times, lengths), np.repeat(over, lengths)
    if (np.abs(values.fill_null(0).to_numpy() / over) * times >= MAX_INTEGER).any():
        raise LakeError(
            f"{where}: the finer increment needs more than 53 bits; ingest into a lake of its own"
        )
    product = pc.multiply(pc.divide(values, pa.array(over)), pa.array(times))
    if not lists:
        return product
    offsets = pa.array(column.offsets.to_numpy() - column.offsets[0].as_py())
    return pa.ListArray.from_arrays(offsets, product)


def _ratios(old: Sequence[Fraction], new: Sequence[Fraction]) -> tuple[np.ndarray, np.ndarray]:
    """(n_old, n_new) numerators and denominators of the old over the new increments."""
    ratios = [[a / b for b in new] for a in old]
    return (
        np.array([[ratio.numerator for ratio in row] for row in ratios], dtype=np.int64),
        np.array([[ratio.denominator for ratio in row] for row in ratios], dtype=np.int64),
    )


def _decimal(value: float) -> Fraction:
    return Fraction(repr(float(value)))

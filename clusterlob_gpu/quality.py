"""What a lake holds, and signs that it should not be trusted.

Besides days, rows and gaps, every day with trades and a book is joined both ways.  On a sound lake
nearly all trades print at or through the touch that stood strictly before them; a share that is higher
when the book at the same time counts too, or that is low on both, says that a clock or a side is wrong.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

import numpy as np

from clusterlob_gpu import kernels
from clusterlob_gpu.backend import Columns
from clusterlob_gpu.context import valid_rows
from clusterlob_gpu.errors import LakeError
from clusterlob_gpu.files import Location
from clusterlob_gpu.lake.native import SymbolLake, days_between, open_symbol
from clusterlob_gpu.lake.symbols import read_dim_symbol
from clusterlob_gpu.schema import LAKE_TABLES, SIDE_BUY, SIDE_SELL, Trades

BOOKS = ("book_snapshot_25", "quotes")


@dataclass(frozen=True)
class TableCheck:
    """One table of one symbol."""

    exchange: str
    symbol: str
    table: str
    days: list[date]
    rows: int
    gaps: list[date]
    broken: list[str]


@dataclass(frozen=True)
class DayCheck:
    """One day of trades against one book table; shares are of the trades that met a book row."""

    exchange: str
    symbol: str
    book: str
    day: date
    trades: int
    book_rows: int
    skipped: dict[str, int]
    touch_strict: float
    """Share of trades at or through the touch that stood strictly before them."""
    touch_inclusive: float
    """The same against the touch at or before their time."""
    buy_share: float
    longest_book_gap_s: float


@dataclass(frozen=True)
class LakeCheck:
    """Everything that `check_lake` found."""

    tables: list[TableCheck] = field(default_factory=list)
    days: list[DayCheck] = field(default_factory=list)


def check_lake(
    root: str | Path | Location, exchange: str | None = None, symbol: str | None = None
) -> LakeCheck:
    """Check every symbol of a lake, or the chosen ones.

    Raises LakeError if there is none of them, OSError if a file cannot be reached.
    """
    rows = read_dim_symbol(root)
    names = sorted(set(zip(rows["exchange"], rows["exchange_symbol"], strict=True)))
    wanted = [(e, s) for e, s in names if exchange in (None, e) and symbol in (None, s)]
    if not wanted:
        known = ", ".join(f"{e} {s}" for e, s in names) or "nothing"
        raise LakeError(f"{root}: no such symbol; the lake has {known}")
    found = LakeCheck()
    for exchange_name, name in wanted:
        lake = open_symbol(root, exchange_name, name)
        tables = list(_tables(lake))
        found.days.extend(_days(lake, tables))
        found.tables.extend(tables)
    return found


def _tables(lake: SymbolLake) -> Iterator[TableCheck]:
    for table in LAKE_TABLES:
        days, broken, rows, held = [], [], 0, lake.days(table)
        with suppress(LakeError):  # told day by day below
            lake.look(table, held)
        for day in held:
            try:
                if lake.has(table, day):
                    days.append(day)
                    rows += lake.size(table, day)[0]
            except LakeError as error:
                broken.append(str(error))
        if days or broken:
            gaps = sorted(set(days_between(days[0], days[-1])) - set(days)) if days else []
            yield TableCheck(lake.symbol.exchange, lake.symbol.name, table, days, rows, gaps, broken)


def _days(lake: SymbolLake, tables: list[TableCheck]) -> Iterator[DayCheck]:
    """Every day with trades and a book; one that cannot be read joins the book's broken files."""
    held = {check.table: check for check in tables}
    traded = held["trades"].days if "trades" in held else []
    for book in BOOKS:
        if book not in held:
            continue
        for day in sorted(set(traded) & set(held[book].days)):
            try:
                yield check_day(lake, book, day)
            except LakeError as error:
                held[book].broken.append(str(error))


def check_day(lake: SymbolLake, book: str, day: date) -> DayCheck:
    """Join one day's trades with one book table, strictly and inclusively."""
    trades = lake.read_trades(day)
    rows, skipped = valid_rows(lake.read_book(day, book, 1))
    known = trades.side <= SIDE_SELL
    gaps = np.diff(rows["ts"])
    return DayCheck(
        exchange=lake.symbol.exchange,
        symbol=lake.symbol.name,
        book=book,
        day=day,
        trades=len(trades.ts),
        book_rows=len(rows["ts"]) + sum(skipped.values()),
        skipped=skipped,
        touch_strict=touch_share(trades, rows, inclusive=False),
        touch_inclusive=touch_share(trades, rows, inclusive=True),
        buy_share=float((trades.side[known] == SIDE_BUY).mean()) if known.any() else np.nan,
        longest_book_gap_s=float(gaps.max() / 1e6) if len(gaps) else np.nan,
    )


def touch_share(trades: Trades, rows: Columns, *, inclusive: bool) -> float:
    """Share of trades of known side at or through the touch: buys >= ask, sells <= bid; NaN if none."""
    row = np.empty(len(trades.ts), np.int64)
    kernels.asof_before(rows["ts"], trades.ts, inclusive, row)
    met = (row >= 0) & (trades.side <= SIDE_SELL)
    if not met.any():
        return float("nan")
    row, price, buys = row[met], trades.price[met], trades.side[met] == SIDE_BUY
    bid, ask = rows["bid"][row], rows["ask"][row]
    return float(np.where(buys, price >= ask, price <= bid).mean())

"""A synthetic market written as a lake: what `clusterlob ingest synthetic` and the demo make.

The table `truth` holds the planted type of every trade, so that a run can be judged against it; how
the market works stands in `synthetic_market`.  Days are made one after the other in bounded memory.
Their values depend on the config alone, and the first days do not depend on how many are asked for.
Running the same config again writes the same files, and more or fewer days of it may follow in another
call; `synthetic.json` tells which market a symbol is, and another one in its place is refused.
"""

from __future__ import annotations

import datetime as dt
import json
import math
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from numba import njit

from clusterlob_gpu.errors import ConfigError, LakeError
from clusterlob_gpu.lake.layout import (
    ROW_GROUP_ROWS,
    SNAPSHOT_ROW_GROUP_ROWS,
    PartitionWriter,
    day_start_us,
    file_stem,
    symbol_files,
)
from clusterlob_gpu.lake.manifest import lake_lock
from clusterlob_gpu.lake.symbols import (
    exchange_id,
    read_dim_symbol,
    split_assets,
    symbol_id,
    write_dim_symbol,
)
from clusterlob_gpu.lake.synthetic_market import (
    LEVELS_STREAM,
    BookPath,
    MarketDay,
    Midnight,
    Trades,
    fill_levels,
    market_rates,
    opening,
    simulate_day,
    stream_key,
)
from clusterlob_gpu.schema import BOOK_LEVELS, DIM_SYMBOL, LAKE_TABLES, MAX_TS, US_PER_DAY

LATENCY_US = 2_500
"""Time from the exchange to the recorder; exchange stamps are cut to whole milliseconds besides."""

TICKER_ROWS = 28_800
"""Rows of `derivative_ticker` a day: one every three seconds."""

MARKETS_FILE = "synthetic.json"
"""What makes each symbol's market, by `<exchange>/<symbol>`: `MarketConfig` without names and days."""

_WRITERS = 2
"""Files of a day that are written at a time: its snapshots take as long as all the others."""

_FILE_ID = 0
_FIRST_LINE = 2
_ID_DIGITS = 13
_FUNDING_US = US_PER_DAY // 3
_FULL_TRADES, _FULL_SNAPSHOTS = 3_950_000, 864_000
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass(frozen=True, kw_only=True)
class MarketConfig:
    """A synthetic market; raises ConfigError, naming the field, for a value that cannot be used.

    The planted types are the clusters that K-means finds while trades and snapshots keep the ratio
    of a real BTCUSDT, near 4.6; `make_market` sees to that.
    """

    exchange: str = "synthetic"

    symbols: tuple[str, ...] = ("BTCUSDT",)
    """Independent markets; each has its own stream of random numbers."""

    start: dt.date = dt.date(2024, 5, 1)
    """First UTC day."""

    days: int = 3

    trades_per_day: int = 200_000
    """Exact number of trades of every day."""

    snapshots_per_day: int = 43_500
    """Exact number of book rows of every day."""

    seed: int = 7

    strength: float = 1.0
    """0 plants nothing: types and sides are random, the mid is a martingale; 1 plants all."""

    price: float = 60_000.0
    """Mid at the start, quote units."""

    tick: float = 0.1
    """Price increment and tick size, quote units."""

    lot: float = 0.001
    """Amount increment and lot size, base units."""

    def __post_init__(self) -> None:
        _require(bool(_NAME.fullmatch(self.exchange)), "exchange", self.exchange, "letters, digits, . _ -")
        _require(len(self.symbols) > 0, "symbols", self.symbols, "give at least one")
        _require(len(set(self.symbols)) == len(self.symbols), "symbols", self.symbols, "give each once")
        for name in self.symbols:
            _require(bool(_NAME.fullmatch(name)), "symbols", name, "letters, digits, . _ -")
        _require(dt.date(1970, 1, 2) <= self.start, "start", str(self.start), "must be 1970-01-02 or later")
        _require_between("days", self.days, 1, 10_000)
        _require_between("trades_per_day", self.trades_per_day, 1, 10**8 - 1)
        _require_between("snapshots_per_day", self.snapshots_per_day, 1, 10**8)
        _require_between("seed", self.seed, 0, 2**63 - 1)
        _require(0 <= self.strength <= 1, "strength", self.strength, "must be in [0, 1]")
        for field in ("price", "tick", "lot"):
            value = getattr(self, field)
            _require(math.isfinite(value) and value > 0, field, value, "must be positive and finite")
        ticks = self.price / self.tick
        _require(1e4 <= ticks <= 1e9, "price", self.price, f"must be 1e4 to 1e9 ticks, is {ticks:g}")

    @property
    def end(self) -> dt.date:
        """Last UTC day."""
        return self.start + dt.timedelta(days=self.days - 1)


def _require(ok: bool, field: str, value: object, rule: str) -> None:
    if not ok:
        raise ConfigError(f"synthetic.{field} = {value!r}: {rule}")


def _require_between(field: str, value: int, low: int, high: int) -> None:
    whole = isinstance(value, int) and not isinstance(value, bool)
    _require(whole and low <= value <= high, field, value, f"must be a whole number from {low} to {high}")


def make_market(
    *,
    trades_per_day: int = 200_000,
    snapshots_per_day: int | None = None,
    full_size: bool = False,
    **settings: Any,
) -> MarketConfig:
    """A MarketConfig with as many snapshots as its trades would meet in a real market.

    `full_size` takes the 3.95M trades and 864k snapshots of a day of BTCUSDT in May 2024 and leaves
    the other two sizes aside; `settings` are fields of MarketConfig.
    """
    if full_size:
        trades_per_day, snapshots_per_day = _FULL_TRADES, _FULL_SNAPSHOTS
    elif snapshots_per_day is None:
        snapshots_per_day = max(1, round(trades_per_day * _FULL_SNAPSHOTS / _FULL_TRADES))
    return MarketConfig(trades_per_day=trades_per_day, snapshots_per_day=snapshots_per_day, **settings)


def demo_market() -> MarketConfig:
    """The market of `clusterlob demo`: three days of one symbol, made in seconds."""
    return make_market(days=3, trades_per_day=150_000)


@dataclass(frozen=True)
class SyntheticDay:
    """One day of one symbol as it was written; `bytes` counts its four files."""

    symbol: str
    day: dt.date
    trades: int
    snapshots: int
    bytes: int


@dataclass(frozen=True)
class SyntheticReport:
    """What `ingest_synthetic` wrote, and in how long; the totals are over all symbols and days."""

    days: tuple[SyntheticDay, ...]
    seconds: float

    @property
    def trades(self) -> int:
        """Trades written."""
        return sum(day.trades for day in self.days)

    @property
    def snapshots(self) -> int:
        """Book rows written."""
        return sum(day.snapshots for day in self.days)

    @property
    def bytes(self) -> int:
        """Size of the files written."""
        return sum(day.bytes for day in self.days)

    def __str__(self) -> str:
        symbols = ", ".join(dict.fromkeys(day.symbol for day in self.days))
        return (
            f"{symbols} from {self.days[0].day} to {self.days[-1].day}: {self.trades:,} trades and "
            f"{self.snapshots:,} snapshots, {self.bytes / 1e6:,.1f} MB in {self.seconds:.1f} s"
        )


def ingest_synthetic(
    lake: Path, config: MarketConfig, *, progress: Callable[[SyntheticDay], None] | None = None
) -> SyntheticReport:
    """Write trades, book_snapshot_25, derivative_ticker, truth and dim_symbol of a synthetic market.

    `progress` is called after every day of every symbol.  Raises LakeError, before anything is written, if
    the lake has rows of one of the symbols that are not of this market.
    """
    started, lake = time.perf_counter(), Path(lake)
    with lake_lock(lake):
        _claim_symbols(lake, config)
        _write_symbols(lake, config)
    written = []
    with ThreadPoolExecutor(_WRITERS) as pool:
        try:
            for finished in _write_days(lake, config, pool):
                written.append(finished)
                if progress is not None:
                    progress(finished)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return SyntheticReport(tuple(written), time.perf_counter() - started)


def _write_days(lake: Path, config: MarketConfig, pool: Executor) -> Iterator[SyntheticDay]:
    """Write all days of all symbols; while the files of one day are written the next is made."""
    before: Callable[[], SyntheticDay] | None = None
    for name in config.symbols:
        for number, market_day in enumerate(simulate(config, name)):
            writing = _write_day(lake, config, name, number, market_day, pool)
            if before is not None:
                yield before()
            before = writing
    if before is not None:
        yield before()


def simulate(config: MarketConfig, symbol: str) -> Iterator[MarketDay]:
    """The days of one symbol in memory, one after the other."""
    rates = market_rates(config.strength, config.snapshots_per_day)
    state: Midnight = opening(round(config.price / config.tick))
    for number in range(config.days):
        start = day_start_us(config.start) + number * US_PER_DAY
        market_day = simulate_day(
            config.seed,
            symbol_id(config.exchange, symbol),
            number,
            start,
            rates,
            config.snapshots_per_day,
            config.trades_per_day,
            TICKER_ROWS,
            state,
        )
        state = market_day.state
        yield market_day


def snapshot_tables(config: MarketConfig, symbol: str, number: int, book: BookPath) -> Iterator[pa.Table]:
    """Row groups of `book_snapshot_25` of day `number`; each is valid until the next is asked for."""
    key_id = symbol_id(config.exchange, symbol)
    key = stream_key(config.seed, key_id, number, LEVELS_STREAM)
    n = len(book.ts) - 1
    size = min(n, SNAPSHOT_ROW_GROUP_ROWS)
    # One set of buffers for all groups: touching fresh memory would cost more than filling it.
    levels = [np.empty((size, BOOK_LEVELS), dtype=np.int64) for _ in range(4)]
    offsets = np.arange(size + 1, dtype=np.int32) * BOOK_LEVELS
    for first in range(0, n, size):
        rows = min(size, n - first)
        fill_levels(key, book, first + 1, *(part[:rows] for part in levels))
        lists = [
            pa.ListArray.from_arrays(pa.array(offsets[: rows + 1]), pa.array(part[:rows].reshape(-1)))
            for part in levels
        ]
        ts = book.ts[first + 1 : first + 1 + rows]
        columns = [ts, _exchange_time(ts), np.full(rows, key_id), *lists, *_source(first, rows)]
        yield _table("book_snapshot_25", columns)


def _claim_symbols(lake: Path, config: MarketConfig) -> None:
    """Note in MARKETS_FILE that the symbols are this market."""
    path = lake / MARKETS_FILE
    market = _identity(config)
    markets = _read_markets(path)
    for name in config.symbols:
        key = f"{config.exchange}/{name}"
        if markets.get(key) != market and (rows := _any_rows(lake, config.exchange, name)):
            raise LakeError(
                f"{lake}: {config.exchange} {name} is there from {_difference(markets.get(key), market)}; "
                f"ingest into another lake, or delete its files, such as {rows}"
            )
        markets[key] = market
    staged = path.with_name(f".{path.name}.tmp")
    staged.write_text(json.dumps(markets, indent=1, sort_keys=True))
    staged.replace(path)


def _identity(config: MarketConfig) -> dict[str, Any]:
    """Everything that shapes a day's rows; how many days are asked for does not."""
    shaping = vars(config) | {"start": config.start.isoformat()}
    return {name: value for name, value in shaping.items() if name not in ("exchange", "symbols", "days")}


def _read_markets(path: Path) -> dict[str, dict[str, Any]]:
    if not path.exists():
        return {}
    try:
        return dict(json.loads(path.read_text()))
    except (ValueError, TypeError):
        raise LakeError(f"{path}: not readable; delete it together with the synthetic symbols") from None


def _any_rows(lake: Path, exchange: str, name: str) -> Path | None:
    """A file of the symbol, if the lake has one."""
    for folder in sorted(lake.glob(f"*/exchange={exchange}/date=*")):
        day = dt.date.fromisoformat(folder.name.removeprefix("date="))
        if files := symbol_files(lake, folder.parents[1].name, exchange, day, name):
            return files[0]
    return None


def _difference(there: dict[str, Any] | None, asked: dict[str, Any]) -> str:
    if there is None:
        return f"a source that {MARKETS_FILE} does not know"
    return "another market: " + ", ".join(
        f"{name} {there.get(name)} (asked for: {asked.get(name)})"
        for name in asked | there
        if there.get(name) != asked.get(name)
    )


def _write_symbols(lake: Path, config: MarketConfig) -> None:
    """Put the market's instruments into `dim_symbol`, in place of rows of the same names."""
    known = read_dim_symbol(lake)
    ours = (known["exchange"] == config.exchange) & known["exchange_symbol"].isin(config.symbols)
    rows = [_symbol_row(config, name) for name in config.symbols]
    fresh = pa.Table.from_pylist(rows, schema=DIM_SYMBOL).to_pandas()
    kept = known[~ours]
    write_dim_symbol(lake, fresh if kept.empty else pd.concat([kept, fresh], ignore_index=True))


def _symbol_row(config: MarketConfig, name: str) -> dict[str, object]:
    base, quote = split_assets(name)
    return {
        "symbol_id": symbol_id(config.exchange, name),
        "exchange_id": exchange_id(config.exchange),
        "exchange": config.exchange,
        "exchange_symbol": name,
        "base_asset": base,
        "quote_asset": quote,
        "tick_size": config.tick,
        "lot_size": config.lot,
        "price_increment": config.tick,
        "amount_increment": config.lot,
        "contract_size": 1.0,
        "valid_from_ts": 0,
        "valid_until_ts": MAX_TS,
    }


def _write_day(
    lake: Path, config: MarketConfig, name: str, number: int, market_day: MarketDay, pool: Executor
) -> Callable[[], SyntheticDay]:
    """Begin to write the four files of one symbol and day; what is given back waits for them."""
    day = config.start + dt.timedelta(days=number)

    def write(table: str, parts: Iterator[pa.Table]) -> int:
        with PartitionWriter(lake, table, config.exchange, day, file_stem(name, _FILE_ID)) as writer:
            for part in parts:
                writer.write(part)
        return writer.path.stat().st_size

    snapshots = snapshot_tables(config, name, number, market_day.book)
    sizes = [pool.submit(write, "book_snapshot_25", snapshots)]
    trades = market_day.trades  # made here, while the snapshots are being written
    others = {
        "trades": _trade_tables(config, name, day, trades),
        "truth": _truth_tables(config, name, trades),
        "derivative_ticker": iter([_ticker_table(config, name, day, market_day)]),
    }
    sizes += [pool.submit(write, *table) for table in others.items()]

    def written() -> SyntheticDay:
        size = sum(one.result() for one in sizes)
        return SyntheticDay(name, day, config.trades_per_day, config.snapshots_per_day, size)

    return written


def _trade_tables(config: MarketConfig, name: str, day: dt.date, trades: Trades) -> Iterator[pa.Table]:
    days_since_epoch = day_start_us(day) // US_PER_DAY
    for first in range(0, len(trades.ts), ROW_GROUP_ROWS):
        part = slice(first, first + ROW_GROUP_ROWS)
        ts = trades.ts[part]
        columns = [
            ts,
            _exchange_time(ts),
            np.full(len(ts), symbol_id(config.exchange, name)),
            np.full(len(ts), exchange_id(config.exchange), dtype=np.int16),
            _trade_ids(days_since_epoch * 10**8 + first, len(ts)),
            trades.side[part],
            trades.price[part],
            trades.qty[part],
            *_source(first, len(ts)),
        ]
        yield _table("trades", columns)


def _truth_tables(config: MarketConfig, name: str, trades: Trades) -> Iterator[pa.Table]:
    for first in range(0, len(trades.ts), ROW_GROUP_ROWS):
        part = slice(first, first + ROW_GROUP_ROWS)
        ts = trades.ts[part]
        ids = np.full(len(ts), symbol_id(config.exchange, name))
        yield _table("truth", [ts, ids, trades.trade_type[part], *_source(first, len(ts))])


def _ticker_table(config: MarketConfig, name: str, day: dt.date, market_day: MarketDay) -> pa.Table:
    """Mark and index around the mid, funding per 8 h from the premium, open interest as it walks."""
    book, (log_interest, premium) = market_day.book, market_day.ticker.T
    start, step = day_start_us(day), US_PER_DAY // TICKER_ROWS
    ts = start + step // 2 + step * np.arange(TICKER_ROWS)
    row = np.searchsorted(book.ts, ts, side="left") - 1
    mid = (book.bid[row] + book.ask[row]) * (config.tick / 2)
    predicted = np.round(1e-4 + 5e-5 * premium, 8)
    period = (ts - start) // _FUNDING_US
    opened = np.searchsorted(period, period, side="left")
    columns = [
        ts,
        _exchange_time(ts),
        np.full(TICKER_ROWS, symbol_id(config.exchange, name)),
        mid * (1 + 2e-5 * premium),
        mid * (1 - 2e-5 * premium),
        mid,
        predicted[opened],
        predicted,
        start + (period + 1) * _FUNDING_US,
        np.round(np.exp(log_interest), 3),
        *_source(0, TICKER_ROWS),
    ]
    return _table("derivative_ticker", columns)


def _table(name: str, columns: list[np.ndarray | pa.Array]) -> pa.Table:
    schema = LAKE_TABLES[name]
    return pa.Table.from_arrays([pa.array(column) for column in columns], schema=schema)


def _exchange_time(ts: np.ndarray) -> np.ndarray:
    return (ts - LATENCY_US) // 1000 * 1000


def _source(first: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """`file_id` and `file_line_number` of `rows` rows from row `first` on."""
    lines = np.arange(first + _FIRST_LINE, first + _FIRST_LINE + rows, dtype=np.int32)
    return np.full(rows, _FILE_ID, dtype=np.int32), lines


def _trade_ids(first: int, rows: int) -> pa.Array:
    """Consecutive numbers as text of equal length, without a Python object per row."""
    text = np.empty((rows, _ID_DIGITS), dtype=np.uint8)
    _write_digits(first, text)
    offsets = np.arange(rows + 1, dtype=np.int32) * _ID_DIGITS
    return pa.StringArray.from_buffers(rows, pa.py_buffer(offsets), pa.py_buffer(text))


@njit(nogil=True, cache=True)
def _write_digits(first: int, text: np.ndarray) -> None:
    """ASCII decimals of first, first + 1, ... in the rows of `text`."""
    for row in range(len(text)):
        rest = first + row
        for i in range(text.shape[1] - 1, -1, -1):
            text[row, i] = 48 + rest % 10
            rest //= 10

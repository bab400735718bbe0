"""Tiny lakes: what to write into one, named markets whose answers fit in the head, and random ones.

Rows are written with integers only, as the lake holds them.  `TradeIn` and `BookIn` name no line: the
place in the list is the line, so it is also the order of equal times.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st

from clusterlob_gpu.schema import BOOK_LEVELS, DIM_SYMBOL, LAKE_TABLES, MAX_TS

EXCHANGE, SYMBOL, DECOY = "testex", "AAAUSDT", "ZZZUSDT"
SYMBOL_ID, NEXT_ID, DECOY_ID = 11, 12, 7

SECOND, MINUTE, HOUR, DAY = 1_000_000, 60_000_000, 3_600_000_000, 86_400_000_000
DAYS = ("2024-02-28", "2024-02-29", "2024-03-01", "2024-03-02", "2024-03-03")
BUY, SELL, UNKNOWN = 0, 1, 2


def at(day: int, us: int = 0) -> int:
    """Microseconds of the time `us` after the midnight that opens DAYS[day]."""
    return (date.fromisoformat(DAYS[day]).toordinal() - date(1970, 1, 1).toordinal()) * DAY + us


def iso(ts: int) -> str:
    return date.fromordinal(ts // DAY + date(1970, 1, 1).toordinal()).isoformat()


class TradeIn(NamedTuple):
    ts: int
    side: int
    price: int
    qty: int
    symbol_id: int = SYMBOL_ID


class BookIn(NamedTuple):
    """Levels (price, size), best first; None is a missing level, an empty list an empty side."""

    ts: int
    bids: Sequence[tuple[int | None, int | None]]
    asks: Sequence[tuple[int | None, int | None]]
    symbol_id: int = SYMBOL_ID


class PeriodIn(NamedTuple):
    """One row of `dim_symbol`."""

    symbol_id: int = SYMBOL_ID
    start: int = 0
    end: int = MAX_TS
    price_increment: float = 0.1
    amount_increment: float = 0.001
    tick_size: float = 0.1
    name: str = SYMBOL


@dataclass(frozen=True)
class Market:
    """The content of a lake; its `quotes` are level 1 of `books`."""

    trades: list[TradeIn]
    books: list[BookIn]
    periods: list[PeriodIn] = field(default_factory=lambda: [PeriodIn()])

    def before(self, ts: int) -> Market:
        """What was known before `ts`."""
        return replace(
            self,
            trades=[row for row in self.trades if row.ts < ts],
            books=[row for row in self.books if row.ts < ts],
        )

    def write(self, lake: Path, **how: Any) -> Path:
        return write_lake(lake, trades=self.trades, books=self.books, symbols=self.periods, **how)


# ---- writing ----------------------------------------------------------------------------------------


def write_lake(
    lake: Path,
    *,
    trades: Sequence[TradeIn] = (),
    books: Sequence[BookIn] = (),
    quotes: Sequence[BookIn] | None = None,
    symbols: Sequence[PeriodIn] = (PeriodIn(),),
    exchange: str = EXCHANGE,
    parts: int = 1,
    shuffle: int | None = None,
) -> Path:
    """Write a lake and return its path.

    Each day of a table becomes `parts` files whose rows interleave; each file is sorted as the lake
    asks.  `shuffle` seeds which row goes to which file and the order of the file names.  `quotes` are
    level 1 of `books` unless given.
    """
    _write_symbols(lake, exchange, symbols)
    tables = {
        "trades": [_trade_row(row) for row in trades],
        "book_snapshot_25": [_book_row(row) for row in books],
        "quotes": [_quote_row(row) for row in (books if quotes is None else quotes)],
    }
    for table, rows in tables.items():
        _write_table(lake / table / f"exchange={exchange}", table, rows, parts, shuffle)
    return lake


def _write_symbols(lake: Path, exchange: str, symbols: Sequence[PeriodIn]) -> None:
    rows = [
        {
            "symbol_id": row.symbol_id,
            "exchange_id": 9999,
            "exchange": exchange,
            "exchange_symbol": row.name,
            "tick_size": row.tick_size,
            "lot_size": row.amount_increment,
            "price_increment": row.price_increment,
            "amount_increment": row.amount_increment,
            "contract_size": 1.0,
            "valid_from_ts": row.start,
            "valid_until_ts": row.end,
        }
        for row in symbols
    ]
    lake.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=DIM_SYMBOL), lake / "dim_symbol.parquet")


def _trade_row(row: TradeIn) -> dict[str, Any]:
    return {
        "ts_local_us": row.ts,
        "symbol_id": row.symbol_id,
        "exchange_id": 9999,
        "trade_id": "",
        "side": row.side,
        "price_int": row.price,
        "qty_int": row.qty,
    }


def _book_row(row: BookIn) -> dict[str, Any]:
    return {
        "ts_local_us": row.ts,
        "symbol_id": row.symbol_id,
        **{
            f"{side}_{what}": [level[i] for level in levels] + [None] * (BOOK_LEVELS - len(levels))
            for side, levels in (("bids", row.bids), ("asks", row.asks))
            for i, what in enumerate(("px", "sz"))
        },
    }


def _quote_row(row: BookIn) -> dict[str, Any]:
    return {
        "ts_local_us": row.ts,
        "symbol_id": row.symbol_id,
        **{
            f"{side}_{what}_int": levels[0][i] if levels else None
            for side, levels in (("bid", row.bids), ("ask", row.asks))
            for i, what in enumerate(("px", "sz"))
        },
    }


def _write_table(root: Path, table: str, rows: list[dict[str, Any]], parts: int, shuffle: int | None) -> None:
    """Split by day; a day is one source file, and the place of a row in it is its line."""
    rng = random.Random(shuffle)
    by_day: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        by_day[iso(row["ts_local_us"])].append(row)
    for file_id, (day, source) in enumerate(sorted(by_day.items()), start=1):
        for line, row in enumerate(source, start=2):
            row |= {"ts_exch_us": row["ts_local_us"] - 1, "file_id": file_id, "file_line_number": line}
        pieces: list[list[dict[str, Any]]] = [[] for _ in range(parts)]
        for i, row in enumerate(source):
            pieces[i % parts if shuffle is None else rng.randrange(parts)].append(row)
        if shuffle is not None:
            rng.shuffle(pieces)
        folder = root / f"date={day}"
        folder.mkdir(parents=True, exist_ok=True)
        for number, piece in enumerate(pieces):
            piece.sort(key=lambda r: (r["symbol_id"], r["ts_local_us"], r["file_id"], r["file_line_number"]))
            if piece:
                content = pa.Table.from_pylist(piece, schema=LAKE_TABLES[table])
                pq.write_table(content, folder / f"part-{number:05d}.parquet")


# ---- named markets ----------------------------------------------------------------------------------


def book(ts: int, bid: int = 1000, ask: int = 1001, size: int = 1000, levels: int = 2) -> BookIn:
    """A valid row of equal sizes, one increment between levels."""
    return BookIn(ts, [(bid - i, size) for i in range(levels)], [(ask + i, size) for i in range(levels)])


def flips(start: int, end: int, step: int) -> list[BookIn]:
    """Best bid and ask both move by one increment, up and down, at every step: no null change times
    from the second row on."""
    return [book(ts, 1000 + i % 2, 1002 + i % 2) for i, ts in enumerate(range(start, end, step))]


def trades_every(start: int, end: int, step: int) -> list[TradeIn]:
    """Buys and sells in turn, sizes 1, 2, 3, ... lots in a cycle of 7."""
    return [TradeIn(ts, (BUY, SELL)[i % 2], 1001, 1 + i % 7) for i, ts in enumerate(range(start, end, step))]


def plain() -> Market:
    """One day, a book row every second and a trade between each two, for ten minutes from 12:00."""
    noon = at(0, 12 * HOUR)
    return Market(
        trades_every(noon + SECOND // 2, noon + 600 * SECOND, SECOND),
        flips(noon, noon + 600 * SECOND, SECOND),
    )


def ties() -> Market:
    """Four trades to each time, each time also that of two book rows of which the second holds."""
    noon = at(0, 12 * HOUR)
    books, trades = [], []
    for i in range(100):
        ts = noon + i * SECOND
        books += [book(ts, 900, 901), book(ts, 1000 + i % 3, 1002 + i % 3, size=1000 + i)]
        trades += [TradeIn(ts, side, 1001, qty) for qty, side in enumerate((BUY, SELL, SELL, BUY), start=1)]
    return Market(trades, books)


def constant() -> Market:
    """Every window is constant in v_rel, sbs, obs and spread: those z are 0."""
    market = plain()
    return replace(market, trades=[row._replace(side=BUY, qty=5) for row in market.trades])


def broken_books() -> Market:
    """Every valid row is followed, half a second later, by rows with each fault."""
    market, books = plain(), []
    for row in market.books:
        ts = row.ts + SECOND // 4
        bid, ask = row.bids[0], row.asks[0]
        books += [
            row,
            BookIn(ts, [], row.asks),
            BookIn(ts, row.bids, []),
            BookIn(ts, [(None, None), bid], row.asks),
            BookIn(ts, [(0, 5)], row.asks),
            BookIn(ts, [(bid[0], 0)], row.asks),
            BookIn(ts, row.bids, [(ask[0], -1)]),
            BookIn(ts, [ask], [ask]),
            BookIn(ts, [ask], [bid]),
        ]
    return replace(market, books=books)


def unknown_sides() -> Market:
    """Every third trade has no side."""
    market = plain()
    trades = [row._replace(side=UNKNOWN) if i % 3 == 0 else row for i, row in enumerate(market.trades)]
    return replace(market, trades=trades)


def finer_ticks(new_id: bool = False) -> Market:
    """Price increment and tick fall from 0.1 to 0.01 half way, under the same symbol_id or a new one.

    The prices go on as if nothing had happened: integers become ten times as large.
    """
    market = plain()
    turn = at(0, 12 * HOUR) + 300 * SECOND
    after = NEXT_ID if new_id else SYMBOL_ID

    def finer(levels: Sequence[tuple[int | None, int | None]]) -> list[tuple[int | None, int | None]]:
        return [(price * 10 if price is not None else None, size) for price, size in levels]

    return Market(
        [t._replace(price=t.price * 10, symbol_id=after) if t.ts >= turn else t for t in market.trades],
        [BookIn(b.ts, finer(b.bids), finer(b.asks), after) if b.ts >= turn else b for b in market.books],
        [PeriodIn(end=turn), PeriodIn(after, turn, price_increment=0.01, tick_size=0.01)],
    )


def over_midnight(
    days: int = 3, missing_trades: Sequence[int] = (), missing_books: Sequence[int] = ()
) -> Market:
    """Ten minutes on each side of every midnight, without the days that are named as missing."""
    books, trades = [], []
    for day in range(days):
        for start in (at(day), at(day, DAY - 10 * MINUTE)):
            if day not in missing_books:
                books += flips(start + SECOND, start + 10 * MINUTE, 3 * SECOND)
            if day not in missing_trades:
                trades += trades_every(start + SECOND // 2, start + 10 * MINUTE, 2 * SECOND)
    return Market(trades, books)


def crossed_day() -> Market:
    """Of three days, every book row of the middle one is crossed."""
    market = over_midnight()
    middle = range(at(1), at(2))
    books = [BookIn(b.ts, b.asks, b.bids) if b.ts in middle else b for b in market.books]
    return replace(market, books=books)


def late_book() -> Market:
    """The first book row comes five minutes after the first trade, on the first day of the lake."""
    market = plain()
    return replace(market, books=market.books[300:])


def stale_book() -> Market:
    """The book falls silent for the middle six minutes: trades go on without context."""
    market = plain()
    return replace(market, books=market.books[:121] + market.books[480:])


NAMED: dict[str, Callable[[], Market]] = {
    "plain": plain,
    "ties": ties,
    "constant": constant,
    "broken_books": broken_books,
    "unknown_sides": unknown_sides,
    "finer_ticks": finer_ticks,
    "finer_ticks_new_id": lambda: finer_ticks(new_id=True),
    "over_midnight": over_midnight,
    "trades_missing": lambda: over_midnight(missing_trades=[1]),
    "books_missing": lambda: over_midnight(missing_books=[1]),
    "crossed_day": crossed_day,
    "late_book": late_book,
    "stale_book": stale_book,
}
"""Every named market by its name, for parametrised tests."""


# ---- random markets ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Habits:
    """How a random market behaves: shares of rows, and scales."""

    tie: float
    unknown: float
    fault: float
    still: float
    scales: tuple[int, int]
    """Price around which the market moves, and the largest size; their product stays far inside int64."""
    spacing: int

    @property
    def price(self) -> int:
        return self.scales[0]

    @property
    def qty_scale(self) -> int:
        return self.scales[1]


HABITS = st.builds(
    Habits,
    tie=st.sampled_from([0.0, 0.4]),
    unknown=st.sampled_from([0.0, 0.1]),
    fault=st.sampled_from([0.0, 0.2]),
    still=st.sampled_from([0.0, 0.8, 1.0]),
    scales=st.sampled_from([(30, 3), (30_000, 1_000), (30, 1_000_000_000), (1_000_000_000, 1_000)]),
    spacing=st.sampled_from([SECOND, 15 * SECOND]),
)

ON_THE_GRID = (0, 0, 0, 1, 500_000)
"""Most times are whole steps, so trades and book rows often share one, and gaps are often exact."""


@st.composite
def markets(draw: st.DrawFn, max_days: int = 3, max_rows: int = 40, gaps: bool = True) -> Market:
    """A small market of 1 to `max_days` days, with up to 3 `max_rows` trades and book rows a day.

    It mixes ties, unknown sides, broken and still books, days without trades or books, ticks and lots
    that change anywhere, and another instrument in the same files.  Without `gaps` no day goes without.
    """
    rng = random.Random(draw(st.integers(0, 2**32 - 1)))
    habits = draw(HABITS)
    days = draw(st.integers(1, max_days))
    counts = st.lists(st.integers(0, max_rows), min_size=3, max_size=3)
    books, trades = [], []
    for day in range(days):
        for segment, n_trades, n_books in zip((0, 12 * HOUR, DAY), draw(counts), draw(counts), strict=True):
            times = _segment(at(day), segment, habits, rng)
            trades += _random_trades(times(n_trades), habits, rng)
            books += _random_books(times(n_books), habits, rng)
    gap = draw(st.sampled_from(["none", "trades", "books", "both"])) if gaps else "none"
    gone = draw(st.integers(0, days - 1))
    market = Market(
        trades if gap in ("none", "books") else [row for row in trades if row.ts // DAY != at(gone) // DAY],
        books if gap in ("none", "trades") else [row for row in books if row.ts // DAY != at(gone) // DAY],
    )
    return _with_decoy(
        _with_periods(market, draw(st.sampled_from(["one", "same_id", "new_id"])), days, rng), days
    )


def _segment(midnight: int, offset: int, habits: Habits, rng: random.Random) -> Callable[[int], list[int]]:
    """Sorted times of a busy stretch; the last one of a day ends at its midnight."""
    length = 40 * habits.spacing
    start = midnight + min(offset, DAY - length)

    def times(n: int) -> list[int]:
        out: list[int] = []
        for _ in range(n):
            again = out and rng.random() < habits.tie
            step = rng.randrange(40) * habits.spacing + rng.choice(ON_THE_GRID)
            out.append(out[-1] if again else start + step)
        return sorted(out)

    return times


def _random_trades(times: list[int], habits: Habits, rng: random.Random) -> list[TradeIn]:
    rows: list[TradeIn] = []
    for ts in times:
        if rows and rng.random() < habits.still:
            rows.append(rows[-1]._replace(ts=ts))
        else:
            side = UNKNOWN if rng.random() < habits.unknown else rng.choice((BUY, SELL))
            price = habits.price + rng.randrange(-3, 4)
            rows.append(TradeIn(ts, side, price, rng.randint(1, habits.qty_scale)))
    return rows


def _random_books(times: list[int], habits: Habits, rng: random.Random) -> list[BookIn]:
    rows: list[BookIn] = []
    good: BookIn | None = None
    for ts in times:
        if good is None or rng.random() >= habits.still:
            bid = habits.price + rng.randrange(-2, 2)
            ask = bid + rng.choice((1, 1, 1, 2, 5))
            good = BookIn(ts, _side(bid, -1, habits, rng), _side(ask, 1, habits, rng))
        good = good._replace(ts=ts)
        rows.append(_break(good, rng) if rng.random() < habits.fault else good)
    return rows


def _side(best: int, step: int, habits: Habits, rng: random.Random) -> list[tuple[int | None, int | None]]:
    """One to seven levels; the deeper ones may be missing."""
    sizes: list[int | None] = [rng.randint(1, habits.qty_scale) for _ in range(rng.randint(1, 7))]
    return [
        (best + step * i, size) if i == 0 or rng.random() < 0.9 else (None, None)
        for i, size in enumerate(sizes)
    ]


def _break(row: BookIn, rng: random.Random) -> BookIn:
    bid, ask = row.bids[0], row.asks[0]
    return rng.choice(
        (
            row._replace(bids=[]),
            row._replace(asks=[(None, None), *row.asks[1:]]),
            row._replace(bids=[(0, 1), *row.bids[1:]]),
            row._replace(asks=[(ask[0], 0), *row.asks[1:]]),
            row._replace(bids=[ask, *row.bids]),
            row._replace(bids=[ask], asks=[bid]),
        )
    )


def _with_periods(market: Market, kind: str, days: int, rng: random.Random) -> Market:
    """From a random moment on, prices are ten times and sizes a hundred times as fine.

    Rows written in the coarse units keep their value; the tick becomes half the old one.
    """
    if kind == "one":
        return market
    turn = at(0) + rng.choice((rng.randrange(days) * DAY, rng.randrange(days * DAY), 12 * HOUR + SECOND))
    new_id = NEXT_ID if kind == "new_id" else SYMBOL_ID

    def finer(levels: Sequence[tuple[int | None, int | None]]) -> list[tuple[int | None, int | None]]:
        return [(None if p is None else p * 10, None if s is None else s * 100) for p, s in levels]

    return Market(
        [
            t._replace(price=t.price * 10, qty=t.qty * 100, symbol_id=new_id) if t.ts >= turn else t
            for t in market.trades
        ],
        [BookIn(b.ts, finer(b.bids), finer(b.asks), new_id) if b.ts >= turn else b for b in market.books],
        [
            PeriodIn(end=turn),
            PeriodIn(new_id, turn, price_increment=0.01, amount_increment=0.00001, tick_size=0.05),
        ],
    )


def _with_decoy(market: Market, days: int) -> Market:
    """Another instrument trades every day at absurd prices: its rows must never be seen."""
    trades, books = list(market.trades), list(market.books)
    for day in range(days):
        ts = at(day, 12 * HOUR)
        trades.append(TradeIn(ts, BUY, 77, 77, DECOY_ID))
        books.append(BookIn(ts, [(76, 7)], [(77, 7)], DECOY_ID))
    periods = [*market.periods, PeriodIn(DECOY_ID, name=DECOY)]
    return Market(sorted(trades, key=lambda r: r.ts), sorted(books, key=lambda r: r.ts), periods)


CONFIGS: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries(
    {
        "book": st.sampled_from(["book_snapshot_25", "quotes"]),
        "depth": st.integers(1, 6),
        "window": st.integers(2, 6),
        "same_side": st.sampled_from(["own", "consumed"]),
        "spread": st.sampled_from(["ticks", "bps"]),
        "asof": st.sampled_from(["strict", "inclusive"]),
        "max_staleness": st.sampled_from([MINUTE, 15 * SECOND, 3 * DAY]),
        "bucket": st.just(5 * MINUTE),
        "horizons": st.just([HOUR, 3 * HOUR]),
    }
)
"""Plain configs for the reference; durations in microseconds."""

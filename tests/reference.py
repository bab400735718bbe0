"""Second opinion on every ClusterLOB number: slow, plain, and written apart from the package.

Whole lakes are read into lists of rows; prices and sizes are `Fraction`s of the decimals that
`dim_symbol` prints, so nothing is rounded before a formula asks for a float.  Only sums of the
z-scores and correlations are floats, and those go through `math.fsum`.

The config is a plain dict with the keys of the package's own config: book, depth, window, same_side,
spread, asof, max_staleness, bucket, horizons; durations are int microseconds.  Times are int
microseconds UTC, a day is `ts // DAY`.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq

Config = Mapping[str, Any]

DAY = 86_400_000_000
FEATURES = ("v_rel", "sbs", "obs", "spread", "t_m", "t_age")
ALL_CLUSTERS = -1


# ---- the lake ---------------------------------------------------------------------------------------


class Period(NamedTuple):
    """One row of `dim_symbol`: what integers mean for start <= ts < end."""

    symbol_id: int
    start: int
    end: int
    price: Fraction
    amount: Fraction
    tick: Fraction


class Trade(NamedTuple):
    ts: int
    file_id: int
    line: int
    side: int
    price: Fraction
    qty: Fraction

    @property
    def sign(self) -> int:
        """+1 taker buy, -1 taker sell, 0 unknown."""
        return {0: 1, 1: -1}.get(self.side, 0)


class Book(NamedTuple):
    """`fault` is None for a valid row; of the others only the time and the fault mean anything."""

    ts: int
    file_id: int
    line: int
    fault: str | None
    bid: Fraction
    ask: Fraction
    bid_sizes: list[Fraction]
    ask_sizes: list[Fraction]
    tick: Fraction


def read_periods(lake: Path, exchange: str, symbol: str) -> list[Period]:
    """Every `dim_symbol` row of the instrument; floats are read as the decimals they print as."""
    return [
        Period(
            row["symbol_id"],
            row["valid_from_ts"],
            row["valid_until_ts"],
            Fraction(repr(row["price_increment"])),
            Fraction(repr(row["amount_increment"])),
            Fraction(repr(row["tick_size"])),
        )
        for row in pq.ParquetFile(Path(lake) / "dim_symbol.parquet").read().to_pylist()
        if (row["exchange"], row["exchange_symbol"]) == (exchange, symbol)
    ]


def period_at(periods: list[Period], symbol_id: int, ts: int) -> Period:
    (period,) = (p for p in periods if p.symbol_id == symbol_id and p.start <= ts < p.end)
    return period


def _rows(lake: Path, table: str, exchange: str, symbol: str) -> Iterator[tuple[dict[str, Any], Period]]:
    """Rows of the symbol from every partition, with the `dim_symbol` row that holds for each."""
    periods = read_periods(lake, exchange, symbol)
    ids = {p.symbol_id for p in periods}
    root = Path(lake) / table / f"exchange={exchange}"
    for path in sorted(root.glob("date=*/*.parquet")):
        day = day_of(path.parent.name.removeprefix("date="))
        for row in pq.ParquetFile(path).read().to_pylist():
            if row["symbol_id"] in ids:
                assert row["ts_local_us"] // DAY == day, f"{path} holds a row of another day"
                yield row, period_at(periods, row["symbol_id"], row["ts_local_us"])


def _in_lake_order(rows: Iterable[Any]) -> list[Any]:
    return sorted(rows, key=lambda row: (row.ts, row.file_id, row.line))


def read_trades(lake: Path, exchange: str, symbol: str) -> list[Trade]:
    """All trades of the lake, price in quote units and quantity in base units."""
    return _in_lake_order(
        Trade(
            row["ts_local_us"],
            row["file_id"],
            row["file_line_number"],
            row["side"],
            row["price_int"] * period.price,
            row["qty_int"] * period.amount,
        )
        for row, period in _rows(lake, "trades", exchange, symbol)
    )


def read_book(
    lake: Path, exchange: str, symbol: str, book: str = "book_snapshot_25", depth: int = 5
) -> list[Book]:
    """All rows of the book table, valid or not; `quotes` have one level whatever `depth` says."""
    return _in_lake_order(
        _book_row(row, period, depth) for row, period in _rows(lake, book, exchange, symbol)
    )


def _book_row(row: dict[str, Any], period: Period, depth: int) -> Book:
    if "bids_px" not in row:
        row |= {
            f"{side}s_{what}": [row[f"{side}_{what}_int"]] for side in ("bid", "ask") for what in ("px", "sz")
        }
    best = [next(iter(row[name]), None) for name in ("bids_px", "asks_px", "bids_sz", "asks_sz")]
    fault = book_fault(*best)
    bid, ask = (Fraction(0), Fraction(0)) if fault else (best[0] * period.price, best[1] * period.price)
    bid_sizes, ask_sizes = (
        [(size or 0) * period.amount for size in row[name][:depth]] for name in ("bids_sz", "asks_sz")
    )
    key = row["ts_local_us"], row["file_id"], row["file_line_number"]
    return Book(*key, fault, bid, ask, bid_sizes, ask_sizes, period.tick)


def book_fault(bid: int | None, ask: int | None, bid_size: int | None, ask_size: int | None) -> str | None:
    """Why a row is no valid book row, from its level 1; None if it is one."""
    if bid is None or ask is None or bid_size is None or ask_size is None:
        return "empty_side"
    if min(bid, ask, bid_size, ask_size) <= 0:
        return "non_positive"
    return "crossed" if bid >= ask else None


def fault_counts(book: list[Book]) -> Counter[str]:
    return Counter(row.fault for row in book if row.fault)


# ---- days and chains --------------------------------------------------------------------------------


def day_of(iso: str) -> int:
    return date.fromisoformat(iso).toordinal() - date(1970, 1, 1).toordinal()


def days_of(rows: Iterable[Trade | Book]) -> set[int]:
    """Days on which the lake has rows of the symbol, valid or not."""
    return {row.ts // DAY for row in rows}


def chain_start(day: int, present: set[int]) -> int:
    """First day whose state reaches `day`: back to the last day that the lake lacks."""
    while day - 1 in present:
        day -= 1
    return day


# ---- the book at a time -----------------------------------------------------------------------------


class BookState(NamedTuple):
    """A valid row and the last changes that its chain has seen up to and including it."""

    row: Book
    chain: int
    mid_changed: int | None
    bid_changed: int | None
    ask_changed: int | None


class BookHistory:
    """Every valid state of the book, to be asked for the one that was known at a time."""

    def __init__(self, book: list[Book]) -> None:
        self.present = days_of(book)
        self.states: list[BookState] = []
        for row in book:
            if row.fault is None:
                self.states.append(self._next(row))
        self.times = [state.row.ts for state in self.states]

    def _next(self, row: Book) -> BookState:
        chain = chain_start(row.ts // DAY, self.present)
        last = self.states[-1] if self.states else None
        if last is None or last.chain != chain:
            return BookState(row, chain, None, None, None)
        return BookState(
            row,
            chain,
            row.ts if row.bid + row.ask != last.row.bid + last.row.ask else last.mid_changed,
            row.ts if row.bid != last.row.bid else last.bid_changed,
            row.ts if row.ask != last.row.ask else last.ask_changed,
        )

    def last(self, ts: int, day: int, asof: str = "strict") -> BookState | None:
        """Last state before `ts` (at or before it, if inclusive) that reaches `day`, however old."""
        find = bisect_left if asof == "strict" else bisect_right
        i = find(self.times, ts) - 1
        if i < 0 or self.states[i].chain != chain_start(day, self.present):
            return None
        return self.states[i]

    def mid(self, ts: int, max_staleness: int) -> Fraction | None:
        """mid(t), null when the row is too old or the lake has no book for the instant before t."""
        day = (ts - 1) // DAY
        state = self.last(ts, day) if day in self.present else None
        if state is None or ts - state.row.ts > max_staleness:
            return None
        return (state.row.bid + state.row.ask) / 2

    def log_return(self, start: int, end: int, max_staleness: int) -> float | None:
        """ln mid(end)/mid(start); the ratio minus one is exact before it is rounded."""
        first, last = self.mid(start, max_staleness), self.mid(end, max_staleness)
        return None if first is None or last is None else math.log1p(float(last / first - 1))


# ---- features ---------------------------------------------------------------------------------------


@dataclass
class Row:
    """A trade with what was computed for it; `drop` says why it has no z-features."""

    trade: Trade
    drop: str | None = None
    raw: dict[str, float | int | None] | None = None
    z: dict[str, float] | None = None
    window: list[dict[str, float | int | None]] | None = None


def features(trades: list[Trade], history: BookHistory, config: Config) -> list[Row]:
    """A row per trade: context first, then z-scores over the eligible trades of its chain."""
    present = days_of(trades)
    rows: list[Row] = []
    eligible: dict[int, list[dict[str, float | int | None]]] = {}
    for trade in trades:
        row = add_context(trade, history, config)
        rows.append(row)
        past = eligible.setdefault(chain_start(trade.ts // DAY, present), [])
        if row.drop is None:
            past.append(row.raw)
            add_zscores(row, past[-config["window"] :], config["window"])
    return rows


def add_context(trade: Trade, history: BookHistory, config: Config) -> Row:
    if trade.sign == 0:
        return Row(trade, "side_unknown")
    state = history.last(trade.ts, trade.ts // DAY, config["asof"])
    if state is None:
        return Row(trade, "no_book")
    if trade.ts - state.row.ts > config["max_staleness"]:
        return Row(trade, "stale_book")
    return Row(trade, raw=raw_features(trade, state, config))


def raw_features(trade: Trade, state: BookState, config: Config) -> dict[str, float | int | None]:
    book, buys = state.row, trade.sign > 0
    own, opposite = (book.bid_sizes, book.ask_sizes) if buys else (book.ask_sizes, book.bid_sizes)
    if config["same_side"] == "consumed":
        own, opposite = opposite, own
    width = book.ask - book.bid
    consumed_changed = state.ask_changed if buys else state.bid_changed
    return {
        "v_rel": float(trade.qty / (book.bid_sizes[0] + book.ask_sizes[0])),
        "sbs": math.log1p(float(sum(own))),
        "obs": math.log1p(float(sum(opposite))),
        "spread": float(
            width / book.tick if config["spread"] == "ticks" else 10_000 * width / ((book.bid + book.ask) / 2)
        ),
        "t_m": None if state.mid_changed is None else trade.ts - state.mid_changed,
        "t_age": None if consumed_changed is None else trade.ts - consumed_changed,
    }


def add_zscores(row: Row, window: list[dict[str, float | int | None]], size: int) -> None:
    if len(window) < size:
        row.drop = "warmup"
    elif any(value is None for raw in window for value in raw.values()):
        row.drop = "null_change_time"
    else:
        row.window = window
        row.z = {name: zscore([raw[name] for raw in window]) for name in FEATURES}


def zscore(values: Sequence[float]) -> float:
    """(last - mean)/std over all values, ddof = 1, two passes; 0 if all are equal."""
    if min(values) == max(values):
        return 0.0
    mean = math.fsum(values) / len(values)
    variance = math.fsum((x - mean) ** 2 for x in values) / (len(values) - 1)
    return (values[-1] - mean) / math.sqrt(variance)


def zscore_noise(values: Sequence[float]) -> float:
    """How far z may move if every value moves by its last float64 bit: eps max|x|/std."""
    if min(values) == max(values):
        return 0.0
    mean = math.fsum(values) / len(values)
    std = math.sqrt(math.fsum((x - mean) ** 2 for x in values) / (len(values) - 1))
    return 2.0**-52 * max(abs(x) for x in values) / std


def kept(rows: list[Row]) -> list[Row]:
    return [row for row in rows if row.drop is None]


def drop_counts(rows: list[Row]) -> Counter[str]:
    return Counter(row.drop for row in rows if row.drop)


# ---- labels, buckets, returns -----------------------------------------------------------------------


def distances(z: Sequence[float], centroids: Sequence[Sequence[float]]) -> list[float]:
    """Squared Euclidean distance to every centroid."""
    return [math.fsum((a - b) ** 2 for a, b in zip(z, c, strict=True)) for c in centroids]


def nearest(z: Sequence[float], centroids: Sequence[Sequence[float]]) -> int:
    """Number of the nearest centroid, the first one at a tie."""
    to_each = distances(z, centroids)
    return to_each.index(min(to_each))


def labels(rows: list[Row], centroids: Sequence[Sequence[float]]) -> list[int]:
    """Cluster of every kept row; centroids in the order of FEATURES."""
    return [nearest([row.z[name] for name in FEATURES], centroids) for row in rows]


def bucket_starts(start: str, end: str, bucket: int) -> range:
    """Starts of all buckets from the first moment of `start` to the last of `end`, ISO dates."""
    return range(day_of(start) * DAY, (day_of(end) + 1) * DAY, bucket)


def bucket_sums(
    rows: list[Row], clusters: list[int], k: int, starts: range
) -> dict[tuple[int, int], tuple[Fraction, int, Fraction]]:
    """(bucket_ts, cluster) -> exact ofi_size, ofi_count, ofi_notional; -1 is all clusters together."""
    sums = {(b, c): (Fraction(0), 0, Fraction(0)) for b in starts for c in (ALL_CLUSTERS, *range(k))}
    for row, cluster in zip(rows, clusters, strict=True):
        trade = row.trade
        bucket_ts = trade.ts // starts.step * starts.step
        for key in ((bucket_ts, cluster), (bucket_ts, ALL_CLUSTERS)):
            if key in sums:
                size, count, notional = sums[key]
                signed = trade.sign * trade.qty
                sums[key] = size + signed, count + trade.sign, notional + signed * trade.price
    return sums


def bucket_returns(history: BookHistory, bucket_ts: int, config: Config) -> dict[str, float | None]:
    """conr, frnb, freb, and one entry per horizon under the key of its microseconds."""
    b, w = bucket_ts, config["bucket"]
    midnight = (b // DAY + 1) * DAY

    def between(start: int, end: int) -> float | None:
        return history.log_return(start, end, config["max_staleness"])

    return {
        "conr": between(b, b + w),
        "frnb": between(b + w, b + 2 * w),
        "freb": between(b + w, midnight),
        **{str(h): between(b + w, b + w + h) for h in config["horizons"]},
    }


def markout_bps(trade: Trade, history: BookHistory, horizon: int, max_staleness: int) -> float | None:
    """1e4 s (mid(t+h) - mid(t))/mid(t): the signed mid move after the trade, in bps."""
    before, after = history.mid(trade.ts, max_staleness), history.mid(trade.ts + horizon, max_staleness)
    if before is None or after is None:
        return None
    return float(10_000 * trade.sign * (after - before) / before)


# ---- correlation ------------------------------------------------------------------------------------


def pearson(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Sum of (x - mx)(y - my) over the root of the two sums of squares; null without variation."""
    if len(x) < 2 or min(x) == max(x) or min(y) == max(y):
        return None
    dx, dy = ([v - math.fsum(values) / len(values) for v in values] for values in (x, y))
    cross = math.fsum(a * b for a, b in zip(dx, dy, strict=True))
    return cross / math.sqrt(math.fsum(a * a for a in dx) * math.fsum(b * b for b in dy))


def ranks(x: Sequence[float]) -> list[float]:
    """1 for the smallest; equal values share the mean of their places."""
    return [sum(b < a for b in x) + (sum(b == a for b in x) + 1) / 2 for a in x]


def _correlate(
    formula: Callable[[list[float], list[float]], float | None],
    signal: Sequence[float | None],
    target: Sequence[float | None],
) -> float | None:
    pairs = [(s, t) for s, t in zip(signal, target, strict=True) if s is not None and t is not None]
    return formula([s for s, _ in pairs], [t for _, t in pairs])


def ic(signal: Sequence[float | None], target: Sequence[float | None]) -> float | None:
    """Pearson over the rows that have both."""
    return _correlate(pearson, signal, target)


def rank_ic(signal: Sequence[float | None], target: Sequence[float | None]) -> float | None:
    """Spearman over the rows that have both: ranks are taken among those rows only."""
    return _correlate(lambda x, y: pearson(ranks(x), ranks(y)), signal, target)

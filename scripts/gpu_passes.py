"""Every pass over columns that both machines have: arguments for it, and the bytes that it has to move.

`scripts/bench_gpu` times the passes and `tests/test_gpu.py` compares them, both over the same columns:
random ones (`random_columns`), or those of a day of a lake.  What a pass needs besides (book rows that
trades met, scores, labels, bins) is made on the CPU, so that every pass is looked at alone.

Bytes are those that no implementation can do without: a column that is read or written in full counts once,
whatever is read again, looked up or kept between two kernels counts nothing.  So the GB/s of a pass say how
well it uses the memory, not how busy it keeps it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from clusterlob_gpu import context, features, kernels
from clusterlob_gpu.backend import CPU, Backend
from clusterlob_gpu.context import ROW_COLUMNS
from clusterlob_gpu.flow_kernels import N_BINS, N_LARGEST
from clusterlob_gpu.returns import MARKOUTS_US
from clusterlob_gpu.schema import BOOK_LEVELS, FEATURES, US_PER_DAY, US_PER_SECOND, Trades

BAR = 300 * US_PER_SECOND
STALE = 3600 * US_PER_SECOND
WINDOW, DEPTH, K = 100, 5, 3
QUANTILES = (0.5, 0.85)
QTY_UNIT = Fraction(1, 1000)

F = len(FEATURES)


class Columns:
    """Columns of days that lie end to end from time 0, as arrays of a backend: attributes by name."""

    def __init__(self, on: Backend, held: Mapping[str, np.ndarray]) -> None:
        self.on = on
        self.held = {name: on.xp.asarray(values) for name, values in held.items()}
        self.n, self.m = len(held["ts"]), len(held["book_ts"])
        self.days = -(-int(max(held["ts"][-1], held["book_ts"][-1]) + 1) // US_PER_DAY)

    def __getattr__(self, name: str) -> Any:
        return self.held[name]

    @property
    def bars(self) -> int:
        """Number of bars."""
        return self.days * US_PER_DAY // BAR

    def new(self, shape: Any, kind: Any = np.int64) -> Any:
        """An array of zeros on the backend; its pages are there, so that no pass pays for them."""
        return self.on.xp.full(shape, 0, kind)

    def host(self, name: str) -> np.ndarray:
        """A column on the host."""
        return self.on.to_host(self.held[name])


# ---- columns ------------------------------------------------------------------------------------------


def random_columns(trades: int, book_rows: int, days: int = 1, seed: int = 7) -> dict[str, np.ndarray]:
    """A market that moves at random, with many equal times: that many trades and book rows in all."""
    rng = np.random.default_rng(seed)
    instants = days * US_PER_DAY // 1000

    def times(n: int) -> np.ndarray:
        return np.sort(rng.integers(0, instants, n)) * 1000

    bid = 600_000 + np.cumsum(rng.integers(-1, 2, book_rows))
    sizes = {name: rng.integers(1, 10**5, book_rows) for name in ("bid_sz", "ask_sz")}
    given = {
        "ts": times(trades),
        "side": rng.integers(0, 2, trades).astype(np.uint8),
        "price": 600_000 + rng.integers(-50, 50, trades),
        "qty": np.ceil(rng.lognormal(3, 2, trades)).astype(np.int64),
        "trade_id": np.cumsum(rng.choice([1, 1, 1, 2], trades)),
        "book_ts": times(book_rows),
        "bid": bid,
        "ask": bid + rng.choice([1, 1, 1, 2], book_rows),
        **sizes,
        "bid_depth": 3 * sizes["bid_sz"],
        "ask_depth": 3 * sizes["ask_sz"],
        "tick": np.ones(book_rows),
    }
    return with_derived(given)


def day_columns(lake: Any, day: Any, start: int) -> dict[str, np.ndarray]:
    """Columns of a day of a `SymbolLake`; times count from its midnight `start`."""
    fills = lake.read_fills(day)
    rows, _ = context.valid_rows(lake.read_book(day, "book_snapshot_25", DEPTH))
    trades = {name: getattr(fills.trades, name) for name in ("ts", "side", "price", "qty")}
    book = {"book_ts" if name == "ts" else name: rows[name] for name in ROW_COLUMNS}
    held = trades | {"trade_id": fills.trade_id} | book
    return with_derived(held | {name: held[name] - start for name in ("ts", "book_ts")})


def with_derived(given: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The columns, and all that is made of them on the way through both experiments."""
    rng, n, m = np.random.default_rng(1), len(given["ts"]), len(given["book_ts"])
    made = {
        "ts_exch": given["ts"] // 10_000,
        "file_id": np.ones(n, np.int32),
        "line": np.arange(n, dtype=np.int32),
        "offsets": np.arange(m + 1) * BOOK_LEVELS,
        "levels": rng.integers(-1, 10**6, m * BOOK_LEVELS),
        "notional": given["price"] * given["qty"],
    }
    made["bins"] = np.empty(n, np.uint16)
    CPU.flow_kernels.bin_sizes(made["notional"], made["bins"], np.zeros(N_BINS, np.int64))
    return {**given, **made, **_met(given)}


def _met(given: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Context, the trades that met it, and their features, scores and labels."""
    rows = {name: given["book_ts" if name == "ts" else name] for name in ROW_COLUMNS}
    around = context.make_context(rows, None, QTY_UNIT, "ticks")
    trades = Trades(*(given[name] for name in ("ts", "side", "price", "qty")))
    met = features.meet(trades, around, max_staleness=STALE, inclusive=False)
    raw, z = np.empty((F, len(met))), np.empty((F, len(met)), np.float32)
    features.raw_features(met, around, raw, own_side=True)
    kernels.rolling_z(raw, WINDOW, 0, z)
    scored = z.copy()
    known = kernels.void_nulls(scored)
    at = np.flatnonzero(~np.isnan(scored[0]))[:: max(1, known // K)][:K]
    centroids, label = scored[:, at].T.astype(np.float64), np.empty(len(met), np.int8)
    kernels.nearest_centroid(scored, *unbounded(), centroids, label)
    book = {name: getattr(around, name) for name in vars(around) if name != "ts"}
    trade = {f"met_{name}": getattr(met, name) for name in ("ts", "price", "qty", "row")}
    scores = {"raw": raw, "z": z, "scored": scored, "centroids": centroids, "label": label}
    return book | trade | {"sign": met.sign} | scores


def unbounded() -> tuple[np.ndarray, np.ndarray]:
    """Bounds that clip nothing."""
    return np.full(F, -np.inf), np.full(F, np.inf)


# ---- passes -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pass:
    """A pass of `kernels` or `flow_kernels`, and what it needs."""

    name: str
    arguments: Callable[[Columns], Sequence[Any]]
    """Fresh ones: columns of the backend, tables of the host, and zeros to write into."""
    trade: int = 0
    """Bytes that have to be moved for a trade."""
    row: int = 0
    """Bytes that have to be moved for a book row."""
    room: str = "kernels"
    scratch: tuple[int, ...] = ()
    """Places of arguments that are left in different states by the two machines."""

    def run(self, on: Backend, arguments: Sequence[Any]) -> Any:
        """Run it on a backend."""
        return getattr(getattr(on, self.room), self.name)(*arguments)

    def moved(self, columns: Columns) -> int:
        """Bytes that have to be moved."""
        return self.trade * columns.n + self.row * columns.m

    @property
    def formula(self) -> str:
        """Bytes by n trades and m book rows."""
        parts = [(self.trade, "n"), (self.row, "m")]
        return " + ".join(f"{size} {letter}" for size, letter in parts if size)


def _meet(d: Columns) -> Sequence[Any]:
    return d.ts, d.side, d.book_ts, STALE, False, d.new(d.n, np.int32), d.new(d.n, np.uint8)


def _taken(d: Columns) -> Sequence[Any]:
    """All of the trades."""
    columns = d.ts, d.side, d.price, d.qty, d.new(d.n, np.int32)
    return d.new(d.n, np.uint8), *columns, *(d.new(d.n, column.dtype) for column in columns)


def _raw(d: Columns) -> Sequence[Any]:
    changes = d.mid_change, d.bid_change, d.ask_change
    book = d.touch_qty, d.log_bid, d.log_ask, d.spread, *changes
    return d.met_ts, d.sign, d.met_qty, d.met_row, *book, True, d.new(d.raw.shape, np.float64)


def _lloyd(d: Columns) -> Sequence[Any]:
    return d.scored, *unbounded(), d.host("centroids"), np.zeros((K, F)), np.zeros(K, np.int64)


def _flow(d: Columns) -> Sequence[Any]:
    size, high, low = (np.zeros((d.bars, K), np.int64) for _ in range(3))
    trades = d.met_ts, d.sign, d.met_price, d.met_qty, d.label
    return *trades, 0, BAR, size, np.zeros((d.bars, K, 2), np.int64), high, low


def _markouts(d: Columns) -> Sequence[Any]:
    shape, horizons = (d.bars, K, len(MARKOUTS_US)), np.array(MARKOUTS_US, np.int64)
    sums = np.zeros(shape, np.int64), np.zeros(shape)
    trades = d.met_ts, d.sign, d.met_row, d.label
    return *trades, d.book_ts, d.mid2, d.days * US_PER_DAY, STALE, horizons, 0, BAR, *sums


def _kept(d: Columns) -> Sequence[Any]:
    """As for thresholds: the rows of the few bins that hold a wanted rank."""
    number = np.full(N_BINS, -1)
    number[np.unique(np.quantile(d.host("bins"), QUANTILES).astype(np.int64))] = 0
    edges = _edges(d)
    kept = d.new(d.n, np.uint16), d.new(d.n), np.zeros_like(edges)
    return d.bins, d.notional, number, edges, *kept


def _edges(d: Columns) -> np.ndarray:
    return np.searchsorted(d.host("ts"), np.arange(0, d.days * US_PER_DAY, BAR))


def _ranks(d: Columns) -> Sequence[Any]:
    """Quantiles of the trailing half of all time, at every bar."""
    edges = _edges(d)
    high = edges[len(edges) // 2 :]
    low = edges[: len(high)]
    rank = (np.maximum(high - low - 1, 0)[:, None] * QUANTILES).astype(np.int64)
    rank[high == low] = -1
    count = np.bincount(d.host("bins")[low[0] : high[0]], minlength=N_BINS)
    return d.bins, low, high, np.zeros_like(rank), rank, count, np.zeros_like(rank), np.zeros_like(rank)


def _orders(d: Columns) -> Sequence[Any]:
    out = d.new(d.n), d.new(d.n, np.uint8), d.new(d.n)
    return d.ts, d.ts_exch, d.side, d.trade_id, d.notional, 0, BAR, *out


def _edges(d: Columns) -> np.ndarray:
    return np.searchsorted(d.host("ts"), BAR * np.arange(d.bars + 1)).astype(np.int64)


def _prices(d: Columns) -> Sequence[Any]:
    return _edges(d), d.price, d.qty, np.zeros((d.bars, 4), np.int64), np.zeros((d.bars, 2), np.int64)


def _largest(d: Columns) -> Sequence[Any]:
    return _edges(d), d.notional, np.zeros((d.bars, N_LARGEST), np.int64)


def _classes(d: Columns) -> Sequence[Any]:
    """All, large and small."""
    small, large = np.quantile(d.host("notional"), QUANTILES).astype(np.int64)
    least, most = (
        np.repeat(np.array([each]).T, d.bars, 1) for each in ([0, large, 0], [2**62, 2**62, small])
    )
    sums = np.zeros((3, d.bars), np.int64), np.zeros((3, d.bars, 3, 2), np.int64)
    return _edges(d), d.side, d.notional, least, most, *sums


PASSES = (
    Pass("is_sorted", lambda d: (d.ts, d.file_id, d.line), trade=8),
    Pass(
        "reduce_levels",
        lambda d: (d.offsets, d.levels, DEPTH, d.new(d.m), d.new(d.m)),
        row=8 + 8 * DEPTH + 16,
    ),
    Pass("book_fault", lambda d: (d.bid, d.ask, d.bid_sz, d.ask_sz, d.new(d.m, np.uint8)), row=33),
    Pass("last_changes", lambda d: (d.book_ts, d.bid, kernels.NO_TIME, d.new(d.m)), row=24),
    Pass("asof_before", lambda d: (d.book_ts, d.ts, False, d.new(d.n)), trade=16, row=8),
    Pass("meet_book", _meet, trade=14, row=8),
    Pass("take_kept", _taken, trade=59),
    Pass("raw_features", _raw, trade=21 + 8 * F, row=56),
    Pass("rolling_z", lambda d: (d.raw, WINDOW, 0, d.new(d.raw.shape, np.float32)), trade=12 * F),
    Pass("void_nulls", lambda d: (d.z.copy(),), trade=4 * F),
    Pass(
        "nearest_centroid",
        lambda d: (d.scored, *unbounded(), d.host("centroids"), d.new(len(d.label), np.int8)),
        trade=4 * F + 1,
    ),
    Pass("lloyd_partial", _lloyd, trade=4 * F),
    Pass(
        "clip_columns",
        lambda d: (d.scored, np.full(F, -1.0), np.full(F, 1.0), d.new(d.scored.shape, np.float32)),
        trade=8 * F,
    ),
    Pass("count_high_bits", lambda d: (d.scored[0].view(np.uint32), np.zeros(1 << 16, np.int64)), trade=4),
    Pass(
        "count_low_bits",
        lambda d: (d.scored[0].view(np.uint32), np.uint32(0xBF80), np.zeros(1 << 16, np.int64)),
        trade=4,
    ),
    Pass("bucket_flow", _flow, trade=18),
    Pass("cluster_sums", lambda d: (d.scored, d.label, np.zeros((K, F))), trade=4 * F + 1),
    Pass("markout_sums", _markouts, trade=14, row=16),
    Pass(
        "bin_sizes",
        lambda d: (d.notional, d.new(d.n, np.uint16), np.zeros(N_BINS, np.int64)),
        trade=10,
        room="flow_kernels",
    ),
    Pass("count_keys", lambda d: (d.bins, np.zeros(N_BINS, np.int64)), trade=2, room="flow_kernels"),
    Pass(
        "sub_keys",
        lambda d: (d.notional, d.bins, np.arange(N_BINS), d.new(d.n)),
        trade=18,
        room="flow_kernels",
    ),
    Pass("keep_marked", _kept, trade=2, room="flow_kernels"),
    Pass("sliding_ranks", _ranks, trade=4, room="flow_kernels", scratch=(5,)),
    Pass("merge_orders", _orders, trade=33, room="flow_kernels", scratch=(7, 8, 9)),
    Pass("bar_prices", _prices, trade=16, room="flow_kernels"),
    Pass("bar_largest", _largest, trade=8, room="flow_kernels"),
    Pass("class_flow", _classes, trade=9, room="flow_kernels"),
)
"""Every pass that both machines have."""

"""Taker-flow bars: prices, buy and sell notional, large and small flow, and the factors made of them.

A bar [b, b + width) holds the trades with b <= ts < b + width, is labelled by its start and known at
its end.  A day's bars are exact integer sums (`DayBars`, `DayClasses`); `bar_table` turns them into real
units, and `rolled_columns` adds sums over time across days.

Trades of unknown side are part of prices, trade_count, total_notional, the top shares, the thresholds
and the counts of large and small trades; buy and sell notional, of all or of a class, leave them out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import pandas as pd

from clusterlob_gpu.backend import CPU, Backend
from clusterlob_gpu.config import format_duration
from clusterlob_gpu.errors import LakeError
from clusterlob_gpu.flow_kernels import N_LARGEST
from clusterlob_gpu.schema import FACTORS, ROLL_UPS, US_PER_DAY, Trades
from clusterlob_gpu.thresholds import NEVER_LARGE, NEVER_SMALL

CLASS_COLUMNS = (
    "large_count",
    "small_count",
    "buy_notional_large",
    "sell_notional_large",
    "buy_notional_small",
    "sell_notional_small",
    "flow_imbalance_large",
    "flow_imbalance_small",
    "flow_share_large",
    "large_net_share",
    "large_small_disagreement",
)
"""Columns that need the thresholds: null where these are."""

BAR_COLUMNS = (
    "bar_ts",
    *("open", "high", "low", "close", "vwap"),
    *("trade_count", "large_count", "small_count"),
    *("total_notional", "buy_notional", "sell_notional"),
    *("buy_notional_large", "sell_notional_large", "buy_notional_small", "sell_notional_small"),
    *FACTORS,
)
_FLOAT_COLUMNS = tuple(name for name in BAR_COLUMNS if name not in ("bar_ts", "trade_count"))


@dataclass(frozen=True)
class Takers:
    """A day's trades, or its taker orders, in order of time: what is large or small.

    Arrays of the backend.
    """

    ts: Any
    side: Any
    notional: Any
    """price_int * qty_int, of an order the sum over its fills; common units, int64."""


def trade_takers(trades: Trades, *, on: Backend = CPU) -> Takers:
    """Trades as they are.

    Raises LakeError for a price that is not positive or a size below 0.  price * qty must fit an
    int64, as the reader of the lake makes sure.
    """
    if len(trades.ts) and (trades.price.min() <= 0 or trades.qty.min() < 0):
        at = int(on.xp.argmax((trades.price <= 0) | (trades.qty < 0)))
        ts, price, qty = (int(column[at]) for column in (trades.ts, trades.price, trades.qty))
        raise LakeError(
            f"trade {at} of the day at ts_local_us = {ts}: price_int = {price}, "
            f"qty_int = {qty}; prices must be above 0 and sizes not below it, ingest again"
        )
    return Takers(trades.ts, trades.side, trades.price * trades.qty)


def order_takers(
    trades: Trades, ts_exch: Any, trade_id: Any, *, start: int, width: int, on: Backend = CPU
) -> Takers:
    """Taker orders rebuilt from their fills, `trades` in the lake's order with exchange times and ids.

    Neighbouring fills are one order if they have one exchange time, one known side, and ids that
    count up by one (`Fills`); its time is that of its last fill.  A fill whose id is not a number,
    or whose side is not known, is an order of its own.  An order ends with its bar: of a sweep whose
    receipt straddles the end of a bar, each bar holds its part as an order, since at the end of the
    first the rest was not known.  So no order reaches over midnight either, and days need nothing of
    each other.  Two takers of one side in one tick of the exchange's clock with ids in a row cannot be
    told apart and count as one.

    Raises LakeError as `trade_takers` does, and where a notional passes 2^62.
    """
    fills = trade_takers(trades, on=on)
    ts, side, notional = (on.xp.empty_like(column) for column in (fills.ts, fills.side, fills.notional))
    n = on.flow_kernels.merge_orders(
        fills.ts, ts_exch, fills.side, trade_id, fills.notional, start, width, ts, side, notional
    )
    if n < 0:
        at = -1 - n
        raise LakeError(
            f"trade {at} of the day at ts_local_us = {int(fills.ts[at])}: the notional of its order "
            "passes 2^62; coarsen price_increment or amount_increment in dim_symbol"
        )
    return Takers(ts[:n], side[:n], notional[:n])


@dataclass(frozen=True)
class DayBars:
    """Integer sums of a day's bars that need no thresholds; sums in halves high 2^32 + low."""

    prices: np.ndarray
    """(n_bars, 4) int64: open, high, low, close; 0 where nothing traded."""
    size: np.ndarray
    """(n_bars, 2) int64."""
    count: np.ndarray
    """(n_bars,) int64: trades or orders."""
    notional: np.ndarray
    """(n_bars, 3, 2) int64: of buys, sells, unknown."""
    largest: np.ndarray
    """(n_bars, 5) int64: largest notionals, falling."""


def bar_edges(ts: Any, *, start: int, width: int, on: Backend = CPU) -> np.ndarray:
    """(n_bars + 1,) int64: rows of the day that begins at `start`, in order of time, before each bar and
    before its end: bar b has the rows edges[b] to edges[b + 1] - 1.
    """
    times = start + width * np.arange(US_PER_DAY // width + 1, dtype=np.int64)
    return on.to_host(on.xp.searchsorted(ts, on.xp.asarray(times))).astype(np.int64)


def day_bars(trades: Trades, takers: Takers, *, start: int, width: int, on: Backend = CPU) -> DayBars:
    """Sum the day that begins at `start` into bars of `width` us: prices and sizes of its trades, and
    counts and notionals of its takers, which are the trades again or their orders.
    """
    edges, n_bars = bar_edges(trades.ts, start=start, width=width, on=on), US_PER_DAY // width
    prices, size = np.zeros((n_bars, 4), np.int64), np.zeros((n_bars, 2), np.int64)
    on.flow_kernels.bar_prices(edges, trades.price, trades.qty, prices, size)
    edges = bar_edges(takers.ts, start=start, width=width, on=on)
    everything = np.zeros((1, n_bars), np.int64), np.full((1, n_bars), NEVER_LARGE)
    count, notional = _class_flow(edges, takers.side, takers.notional, *everything, on)
    largest = np.zeros((n_bars, N_LARGEST), np.int64)
    on.flow_kernels.bar_largest(edges, takers.notional, largest)
    return DayBars(prices, size, count[0], notional[0], largest)


def _class_flow(
    edges: np.ndarray, side: Any, notional: Any, least: np.ndarray, most: np.ndarray, on: Backend
) -> tuple[np.ndarray, np.ndarray]:
    """Counts and notionals of classes of sizes, each [least, most] per bar: `flow_kernels.class_flow`."""
    count, sums = np.zeros(least.shape, np.int64), np.zeros((*least.shape, 3, 2), np.int64)
    on.flow_kernels.class_flow(edges, side, notional, least, most, count, sums)
    return count, sums


@dataclass(frozen=True)
class DayClasses:
    """Integer sums of a day's large and small flow."""

    count: np.ndarray
    """(n_bars, 2) int64: large and small trades or orders, of any side."""
    notional: np.ndarray
    """(n_bars, 2, 3, 2) int64: of large and small, by buys, sells, unknown, in halves."""
    known: np.ndarray
    """(n_bars,) bool: whether the thresholds are not null."""


Bounds = tuple[np.ndarray, np.ndarray]
"""Least notional that is large, and largest that is small, of every bar: (n_bars,) int64 each."""


def day_classes(
    edges: np.ndarray, side: Any, notional: Any, bounds: Sequence[Bounds], *, on: Backend = CPU
) -> list[DayClasses]:
    """Split a day's flow by size under each of many bounds, in one pass.

    `edges` are those of the bars (`bar_edges`), `side` and `notional` as in `Takers`.  Large if
    notional >= large_from, small if notional <= small_to.  Bounds come from `thresholds.Cuts`; where
    either is null the bar's classes are.
    """
    n_bars = len(edges) - 1
    large_from, small_to = np.array(bounds, np.int64).reshape(-1, 2, n_bars).transpose(1, 0, 2)
    least = np.concatenate([large_from, np.zeros_like(small_to)])
    most = np.concatenate([np.full_like(large_from, NEVER_LARGE), small_to])
    # Settings share bounds: of one window and quantile, a class is summed once.
    classes, place = np.unique(np.hstack([least, most]), axis=0, return_inverse=True)
    count, sums = _class_flow(edges, side, notional, classes[:, :n_bars], classes[:, n_bars:], on)
    pairs = place.reshape(2, -1).T
    known = (large_from != NEVER_LARGE) & (small_to != NEVER_SMALL)
    return [
        DayClasses(count[pair].T, sums[pair].swapaxes(0, 1), there)
        for pair, there in zip(pairs, known, strict=True)
    ]


def no_classes(width: int) -> DayClasses:
    """Classes of a day without thresholds: all null."""
    n_bars = US_PER_DAY // width
    count, notional = np.zeros((n_bars, 2), np.int64), np.zeros((n_bars, 2, 3, 2), np.int64)
    return DayClasses(count, notional, np.zeros(n_bars, np.bool_))


def bar_table(
    bars: DayBars,
    classes: DayClasses,
    *,
    start: int,
    width: int,
    price_unit: Fraction,
    qty_unit: Fraction,
) -> pd.DataFrame:
    """Bars of a day in real units, one row per bar; each value is the float nearest to the exact one.

    bar_ts (us); open, high, low, close, vwap = notional / size (quote units, null where nothing traded);
    trade_count, large_count, small_count; total_, buy_ and sell_notional, and buy_ and sell_notional of
    large and small (quote units).  Factors, null where the denominator is 0:

    flow_imbalance_x = (buy - sell) / (buy + sell) for x = large, small, total;
    flow_share_large = (buy_large + sell_large) / total; large_net_share = (buy_large - sell_large) / total;
    large_small_disagreement = (net_large - net_small) / total; flow_toxicity = |buy - sell| / total;
    top1_share, top3_share, top5_share = share of the largest trades in total.

    Columns of large and small are null where a threshold is.
    """
    size, by_side = _whole(bars.size), _whole(bars.notional)
    buy, sell, total = by_side[:, 0], by_side[:, 1], by_side.sum(axis=1)
    (large_buy, large_sell, _), (small_buy, small_sell, _) = _whole(classes.notional).transpose(1, 2, 0)
    large, small = large_buy - large_sell, small_buy - small_sell
    largest = bars.largest.astype(object)
    traded = bars.count > 0
    prices = {
        name: np.where(traded, _real(bars.prices[:, column].astype(object), price_unit), np.nan)
        for column, name in enumerate(("open", "high", "low", "close"))
    }
    notionals = {
        "total_notional": total,
        "buy_notional": buy,
        "sell_notional": sell,
        "buy_notional_large": large_buy,
        "sell_notional_large": large_sell,
        "buy_notional_small": small_buy,
        "sell_notional_small": small_sell,
    }
    ratios = {
        "flow_imbalance_large": (large, large_buy + large_sell),
        "flow_imbalance_small": (small, small_buy + small_sell),
        "flow_imbalance_total": (buy - sell, buy + sell),
        "flow_share_large": (large_buy + large_sell, total),
        "large_net_share": (large, total),
        "large_small_disagreement": (large - small, total),
        "flow_toxicity": (abs(buy - sell), total),
    }
    ratios |= {f"top{k}_share": (largest[:, :k].sum(axis=1), total) for k in (1, 3, 5)}
    columns = {
        "bar_ts": start + width * np.arange(len(total), dtype=np.int64),
        **prices,
        "vwap": _ratio(total * price_unit.numerator, size * price_unit.denominator),
        "trade_count": bars.count,
        "large_count": classes.count[:, 0].astype(np.float64),
        "small_count": classes.count[:, 1].astype(np.float64),
        **{name: _real(values, price_unit * qty_unit) for name, values in notionals.items()},
        **{name: _ratio(*parts) for name, parts in ratios.items()},
    }
    for name in CLASS_COLUMNS:
        columns[name] = np.where(classes.known, columns[name], np.nan)
    return pd.DataFrame(columns)


def empty_bar_table(*, start: int, width: int) -> pd.DataFrame:
    """Bars of a day that the lake does not have: no trades, and flow that is null, not zero."""
    bars = np.arange(start, start + US_PER_DAY, width, dtype=np.int64)
    nothing = dict.fromkeys(_FLOAT_COLUMNS, np.nan)
    return pd.DataFrame({"bar_ts": bars, "trade_count": np.int64(0), **nothing})[list(BAR_COLUMNS)]


def _whole(halves: np.ndarray) -> np.ndarray:
    """Sums held in halves (..., 2), as Python integers."""
    return halves[..., 0].astype(object) * 2**32 + halves[..., 1].astype(object)


def _real(whole: np.ndarray, unit: Fraction) -> np.ndarray:
    """Python integers in real units: Python divides integers of any size with one rounding."""
    return (whole * unit.numerator / unit.denominator).astype(np.float64)


def _ratio(top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
    """Quotient of Python integers with one rounding, NaN where the denominator is 0."""
    nonzero = bottom != 0
    out = np.full(len(top), np.nan)
    out[nonzero] = (top[nonzero] / bottom[nonzero]).astype(np.float64)
    return out


def rolled_columns(table: pd.DataFrame, *, width: int) -> pd.DataFrame:
    """Sums of every factor over 30 min, 1 h and 3 h, and its acceleration, for each row of `table`.

    `table` holds bars of one symbol, sorted by bar_ts, from at least 3 h before the first row that
    matters.  <factor>_sum_<h>(b) sums the factor over the bars that end in (b + w - h, b + w], by time
    and not by rows; <factor>_acceleration = sum_30m - sum_3h / 6.  A bar whose factor is null because
    its denominator is 0 had no such flow and adds 0.  Null where a bar of the window is not in the
    table, has no flow (its day is missing) or no thresholds, or where h is no whole number of bars.
    """
    starts = table["bar_ts"].to_numpy()
    grid = np.arange(starts[0], starts[-1] + width, width) if len(starts) else starts
    on_grid = table.set_index("bar_ts").reindex(grid)
    columns: dict[str, np.ndarray] = {}
    for factor in FACTORS:
        known = on_grid["large_count" if factor in CLASS_COLUMNS else "total_notional"].notna()
        value = on_grid[factor].fillna(0.0).where(known).to_numpy()
        sums = {
            h: pd.Series(_trailing_sum(value, h, width), grid).reindex(starts).to_numpy() for h in ROLL_UPS
        }
        columns |= {f"{factor}_sum_{format_duration(h)}": sums[h] for h in ROLL_UPS}
        half_hour, three_hours = sums[ROLL_UPS[0]], sums[ROLL_UPS[-1]]
        columns[f"{factor}_acceleration"] = half_hour - three_hours / 6
    return pd.DataFrame(columns, index=table.index)


def _trailing_sum(value: np.ndarray, length: int, width: int) -> np.ndarray:
    """Sum of the last length / width values at each place, every window summed on its own."""
    out = np.full(len(value), np.nan)
    n, rest = divmod(length, width)
    if rest == 0 and len(value) >= n:
        out[n - 1 :] = np.lib.stride_tricks.sliding_window_view(value, n).sum(axis=1)
    return out


def large_set(table: pd.DataFrame) -> dict[str, float]:
    """Shares of the large trades or orders over all bars with thresholds: of the count and of the notional.

    count_share = large_count / trade_count and notional_share = (buy_large + sell_large) / total_notional,
    each a quotient of sums; null without any.  The same table under both units shows what rebuilding
    orders changes.
    """
    known = table[table["large_count"].notna()]
    large = known["buy_notional_large"].sum() + known["sell_notional_large"].sum()
    count, total = known["trade_count"].sum(), known["total_notional"].sum()
    return {
        "bars": float(len(known)),
        "count": float(count),
        "large_count": float(known["large_count"].sum()),
        "count_share": float(known["large_count"].sum() / count) if count else np.nan,
        "notional_share": float(large / total) if total else np.nan,
    }

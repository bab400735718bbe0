"""Returns by quantile of a signal, with edges from the past.

The edges of UTC day D are quantiles of the signal over the bars that ended by the start of D: all of them, or
those of a trailing window.  A bar's own day moves no edge that the bar is compared with.

- Null signal: no quantile; counted as `null`.
- Signal exactly 0, nobody traded or buys equal sells: quantile 0, apart; it moves no edge.
- Fewer than `min_rows` past values: no quantile; counted as `warmup`.
- A value that equals edges: the outermost quantile if it touches one of the two (a flow of +1 or -1 is common
  where bars are thin), else the middle of those that it touches, the lower of two middles.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from clusterlob_gpu.evaluation import (
    LEVEL,
    Z_95,
    Signal,
    Target,
    block_resamples,
    hac_lags,
    long_run_sum,
    on_grid,
)
from clusterlob_gpu.plain_statistics import rank_correlation, two_sided
from clusterlob_gpu.schema import US_PER_DAY

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

NO_QUANTILE, ZERO_FLOW = -1, 0
MIN_ROWS = 50
"""Past values that the first edges need."""
BPS = 1e4


@dataclass(frozen=True)
class Edges:
    """How the quantiles are cut."""

    count: int = 10
    window_us: int | None = None
    """Trailing window; None is all of the past."""
    min_rows: int = MIN_ROWS


DECILES = Edges()


def past_edges(signal: Floats, ts: Ints, width_us: int, edges: Edges) -> tuple[Ints, Floats]:
    """(D,) day numbers and (D, count - 1) edges of every UTC day that the bars touch; null while unknown.

    signal: (T,); ts: (T,) starts of the bars, increasing, us.  Linear interpolation between order statistics.
    """
    days = np.unique(ts // US_PER_DAY)
    counted = np.isfinite(signal) & (signal != 0)
    known, values = ts[counted] + width_us, signal[counted]
    levels = np.arange(1, edges.count) / edges.count
    cut = np.full((len(days), edges.count - 1), np.nan)
    for row, day in enumerate(days):
        start = day * US_PER_DAY
        last = np.searchsorted(known, start, side="right")
        first = 0 if edges.window_us is None else np.searchsorted(ts[counted], start - edges.window_us)
        if last - first >= edges.min_rows:
            cut[row] = np.quantile(values[first:last], levels)
    return days, cut


def assign_quantiles(signal: Floats, ts: Ints, width_us: int, edges: Edges) -> Ints:
    """(T,) quantile of every bar: 1 (lowest) to `count`, 0 for zero flow, -1 for none (null or warm-up)."""
    days, cut = past_edges(signal, ts, width_us, edges)
    mine = cut[np.searchsorted(days, ts // US_PER_DAY)]
    below = (mine < signal[:, None]).sum(axis=1)
    not_above = (mine <= signal[:, None]).sum(axis=1)
    ready = np.isfinite(signal) & np.isfinite(mine).all(axis=1)
    middle = 1 + (below + not_above) // 2
    lowest, highest = below == 0, not_above == edges.count - 1
    outer = np.where(lowest, 1, edges.count)
    quantile = np.where(ready, np.where(lowest != highest, outer, middle), NO_QUANTILE)
    return np.where(ready & (signal == 0), ZERO_FLOW, quantile).astype(np.int64)


def mean_error(values: Floats, mask: NDArray[np.bool_], lags: int) -> float:
    """HAC standard error of the mean of the masked places, the others scoring 0; null below 2 places.

    sqrt(V n / (n - 1)) / n, V the Bartlett variance of the sum of deviations.
    """
    n = int(mask.sum())
    if n < 2:
        return float("nan")
    scores = np.where(mask, values - values[mask].mean(), 0.0)
    return float(np.sqrt(long_run_sum(scores, lags) * n / (n - 1)) / n)


@dataclass(frozen=True)
class _Sorted:
    """One signal's quantiles beside one target on the grid."""

    quantile: Ints
    y: Floats
    count: int
    lags: int

    def mask(self, quantile: int) -> NDArray[np.bool_]:
        return (self.quantile == quantile) & np.isfinite(self.y)

    @property
    def held(self) -> NDArray[np.bool_]:
        return (self.quantile >= 1) & np.isfinite(self.y)


def quantile_tables(
    panel: pd.DataFrame,
    signals: Sequence[Signal],
    targets: Sequence[Target],
    *,
    width_us: int,
    edges: Edges = DECILES,
    draws: int = 1000,
    seed: int = 7,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Quantile portfolios of one symbol and their top minus bottom spreads.

    Takes the panel of `evaluation.ic_table` (bucket_ts and the columns of signals and targets).

    Returns
    -------
    quantiles : a row per signal, target and quantile (0 = zero flow, 1 = lowest, ...): signal, target,
        horizon_us, quantile, n, mean_bps, median_bps, se_bps, ci_low, ci_high (mean -+ 1.96 se_bps), hit_rate
        (share of returns above 0 among those that are not 0).  se_bps: HAC, Bartlett,
        max(2H - 1, r + H - 1) lags, at most a quarter of the bars that have a quantile.
    spreads : a row per signal and target: n_top, n_bottom; null (bars without signal), zero (in quantile 0),
        warmup (before the first edges); spread_bps = mean of top - mean of bottom; se_bps, t, p (HAC of the
        joint scores, normal p); ci_low, ci_high: 95 % circular block bootstrap, blocks of lags + 1 bars;
        monotonicity: Spearman correlation of quantile and mean, over quantiles 1..count; hit_rate: share of
        the top's returns above 0 and the bottom's below 0; turnover: mean |p_t - p_(t-1)| over the bars from
        the first to the last with edges, p = +1 in the top, -1 in the bottom, 0 elsewhere.

    A quantile without bars has n = 0 and null statistics.  Raises InputError as `ic_table`.
    """
    columns = list(dict.fromkeys([s.column for s in signals] + [t.column for t in targets]))
    values, ts = on_grid(panel, columns, width_us)
    grid = dict(zip(columns, values.T, strict=True))
    cells, spreads = [], []
    for signal in signals:
        x = grid[signal.column]
        quantile = assign_quantiles(x, ts, width_us, edges)
        for target in targets:
            horizon = -(-target.horizon_us // width_us)
            y = grid[target.column]
            n = int(((quantile >= 1) & np.isfinite(y)).sum())
            mine = _Sorted(quantile, BPS * y, edges.count, hac_lags(horizon, signal.rollup_bars, n))
            key = {"signal": signal.name, "target": target.name, "horizon_us": target.horizon_us}
            cells += [key | _cell(mine, q) for q in range(edges.count + 1)]
            spreads.append(key | _spread(mine, x, draws, seed))
    return pd.DataFrame(cells), pd.DataFrame(spreads)


def _cell(table: _Sorted, quantile: int) -> dict[str, float]:
    mask = table.mask(quantile)
    y = table.y[mask]
    mean, se = _mean(y), mean_error(table.y, mask, table.lags)
    half = Z_95 * se
    return {
        "quantile": quantile,
        "n": len(y),
        "mean_bps": mean,
        "median_bps": float(np.median(y)) if len(y) else np.nan,
        "se_bps": se,
        "ci_low": mean - half,
        "ci_high": mean + half,
        "hit_rate": _mean((y[y != 0] > 0).astype(np.float64)),
    }


def _mean(values: Floats) -> float:
    return float(values.mean()) if len(values) else np.nan


def _spread(table: _Sorted, signal: Floats, draws: int, seed: int) -> dict[str, float]:
    top, bottom = table.mask(table.count), table.mask(1)
    known = np.isfinite(signal)
    counts = {
        "n_top": int(top.sum()),
        "n_bottom": int(bottom.sum()),
        "null": int((~known).sum()),
        "zero": int((table.quantile == ZERO_FLOW).sum()),
        "warmup": int((known & (table.quantile == NO_QUANTILE)).sum()),
    }
    names = ("spread_bps", "se_bps", "t", "p", "ci_low", "ci_high", "monotonicity", "hit_rate", "turnover")
    if min(counts["n_top"], counts["n_bottom"]) < 2:
        return counts | dict.fromkeys(names, np.nan)
    means = [table.y[mask].mean() for mask in (top, bottom)]
    spread, se = float(means[0] - means[1]), _spread_error(table, top, bottom)
    t = spread / se if se > 0 else np.nan
    low, high = _spread_interval(table, top, bottom, draws, seed)
    agree = np.where(top, np.sign(table.y), np.where(bottom, -np.sign(table.y), 0.0))
    numbers = (
        spread,
        se,
        t,
        two_sided(t),
        low,
        high,
        _monotonicity(table),
        _mean((agree[agree != 0] > 0).astype(np.float64)),
        _turnover(table),
    )
    return counts | dict(zip(names, numbers, strict=True))


def _spread_error(table: _Sorted, top: NDArray[np.bool_], bottom: NDArray[np.bool_]) -> float:
    """Both means move together when a return spans bars of both: one score for the two."""
    n_top, n_bottom = int(top.sum()), int(bottom.sum())
    scores = np.zeros(len(table.y))
    scores[top] = (table.y[top] - table.y[top].mean()) / n_top
    scores[bottom] = -(table.y[bottom] - table.y[bottom].mean()) / n_bottom
    n = n_top + n_bottom
    return float(np.sqrt(long_run_sum(scores, table.lags) * n / (n - 2)))


def _spread_interval(
    table: _Sorted, top: NDArray[np.bool_], bottom: NDArray[np.bool_], draws: int, seed: int
) -> tuple[float, float]:
    held = np.flatnonzero(table.held)
    span = slice(held[0], held[-1] + 1)
    y = np.where(table.held, table.y, 0.0)
    moments = np.column_stack([top, top * y, bottom, bottom * y]).astype(np.float64)[span]
    block = min(table.lags + 1, max(len(moments) // 4, 1))
    n_top, y_top, n_bottom, y_bottom = block_resamples(moments, block, draws, seed).T
    kept = (n_top > 0.5) & (n_bottom > 0.5)
    if not kept.any():
        return np.nan, np.nan
    drawn = y_top[kept] / n_top[kept] - y_bottom[kept] / n_bottom[kept]
    low, high = np.quantile(drawn, [LEVEL / 2, 1 - LEVEL / 2])
    return float(low), float(high)


def _monotonicity(table: _Sorted) -> float:
    means = np.array([_mean(table.y[table.mask(q)]) for q in range(1, table.count + 1)])
    kept = np.isfinite(means)
    if kept.sum() < 3 or np.ptp(means[kept]) == 0:
        return np.nan
    return rank_correlation(np.flatnonzero(kept).astype(np.float64), means[kept])


def _turnover(table: _Sorted) -> float:
    edged = np.flatnonzero(table.quantile >= 0)
    book = np.where(table.quantile == table.count, 1.0, np.where(table.quantile == 1, -1.0, 0.0))
    return _mean(np.abs(np.diff(book[edged[0] : edged[-1] + 1])))

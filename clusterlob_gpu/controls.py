"""Targets of taker-flow bars, and what was known of the market at a bar's end t = b + w.

Book and ticker columns are states strictly before t, asked of the day that holds the microsecond before
t (`returns.day_before`).  Returns and volatilities come from a series of prices by time; forward returns
are the only thing here that reads past t.  Trailing statistics compare a bar with the `TRAILING_US`
before it, the bar itself not among them, on the grid of time: bars that are absent take their place as
nulls.  So a bar's controls depend on the lake from `LOOKBACK_US` before it, and on nothing after t.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction

import numpy as np
import pandas as pd

from clusterlob_gpu import flow_kernels, kernels
from clusterlob_gpu.config import format_duration
from clusterlob_gpu.lake.symbols import decode
from clusterlob_gpu.schema import US_PER_SECOND

_HOUR = 3600 * US_PER_SECOND

PAST_RETURNS = (_HOUR, 3 * _HOUR)
"""Lengths of the past returns and realised volatilities: 1 h, 3 h."""

TRAILING_US = 72 * _HOUR
"""Window of every trailing statistic."""

LOOKBACK_US = TRAILING_US + max(PAST_RETURNS)
"""How far before a bar's start its controls reach."""

KNOWN_SHARE = 6
"""A trailing statistic is null where fewer than one in KNOWN_SHARE of its window's bars are known."""

TICKER_MAX_AGE_US = _HOUR
"""An open interest or funding rate older than this is not known any more."""

BOOK_CONTROLS = ("spread_bps", "depth1", "depth5")
TICKER_CONTROLS = {"oi": "open_interest", "funding": "funding_rate"}
"""Control, and the column of `derivative_ticker` that it is."""

CALM_RV, STRESS_RV, STRESS_FUNDING = 0.6, 1.3, 1.0
"""calm: z_RV below the first; stress: z_RV above the second and z_F above the third."""

LARGE_D_OI = 2.0
"""d_oi_z beyond which, up or down, open interest moved much."""


def book_at(
    times: np.ndarray, rows: Mapping[str, np.ndarray], *, max_staleness: int, qty_unit: Fraction
) -> pd.DataFrame:
    """Book states at sorted `times` (us) that one day decides, from columns of `context.ROW_COLUMNS`.

    mid2 = bid + ask (common price integers as float64), spread_bps = 1e4 (ask - bid) / mid, depth1 =
    bid_sz1 + ask_sz1 and depth5 = the same over the levels that the rows sum up (base units).  The last
    row strictly before the time counts; null where there is none or it is older than `max_staleness` us.
    """
    row, known = _asof(times, rows["ts"], max_staleness)
    bid, ask, *sizes = (
        rows[name][row[known]] for name in ("bid", "ask", "bid_sz", "ask_sz", "bid_depth", "ask_depth")
    )
    columns = {
        "mid2": (bid + ask).astype(np.float64),
        "spread_bps": 2e4 * (ask - bid) / (bid + ask),
        "depth1": decode(sizes[0] + sizes[1], qty_unit),
        "depth5": decode(sizes[2] + sizes[3], qty_unit),
    }
    return _spread_out(times, known, columns)


def ticker_at(times: np.ndarray, ts: np.ndarray, values: Mapping[str, np.ndarray]) -> pd.DataFrame:
    """oi and funding at sorted `times` (us): the last value that is not null, strictly before the time.

    `ts` and the `values` (`open_interest`, `funding_rate`) are rows of `derivative_ticker` in order of
    time, of the day that decides and of the TICKER_MAX_AGE_US before it.  Null where the last value is
    older than TICKER_MAX_AGE_US.  Funding is the rate of the running period, as the exchange shows it.
    """
    columns = {}
    for name, source in TICKER_CONTROLS.items():
        given = ~np.isnan(values[source])
        row, known = _asof(times, ts[given], TICKER_MAX_AGE_US)
        columns[name] = np.full(len(times), np.nan)
        columns[name][known] = values[source][given][row[known]]
    return pd.DataFrame(columns, index=pd.Index(times, name="ts"))


def _asof(times: np.ndarray, ts: np.ndarray, max_age: int) -> tuple[np.ndarray, np.ndarray]:
    """Last row strictly before each time, and whether there is one that is not older than `max_age`."""
    row = np.empty(len(times), np.int64)
    kernels.asof_before(ts, times, False, row)
    known = row >= 0
    known[known] &= times[known] - ts[row[known]] <= max_age
    return row, known


def _spread_out(times: np.ndarray, known: np.ndarray, columns: Mapping[str, np.ndarray]) -> pd.DataFrame:
    table = pd.DataFrame(np.nan, index=pd.Index(times, name="ts"), columns=list(columns))
    for name, values in columns.items():
        table.loc[known, name] = values
    return table


def state_times(starts: np.ndarray, width: int) -> np.ndarray:
    """Every time (us) at which `control_columns` needs the states of the bars at `starts`, sorted."""
    return np.union1d(starts, np.asarray(starts) + width)


def price_times(starts: np.ndarray, width: int, horizons: Sequence[int]) -> np.ndarray:
    """Every time (us) at which targets and controls of the bars at `starts` need a price, sorted."""
    ends = np.asarray(starts) + width
    back = np.arange(0, max(PAST_RETURNS) + 1, width)
    offsets = {*(-back).tolist(), *(-h for h in PAST_RETURNS), *horizons}
    return np.unique(np.concatenate([ends + offset for offset in sorted(offsets)]))


def vwap_prices(table: pd.DataFrame, width: int) -> pd.Series:
    """p(t) = vwap of the bar that ends at t, by t (us); null where it has no trades."""
    return pd.Series(table["vwap"].to_numpy(), index=table["bar_ts"].to_numpy() + width)


def forward_returns(
    starts: np.ndarray, prices: pd.Series, width: int, horizons: Sequence[int]
) -> pd.DataFrame:
    """ret_fwd_<h>(b) = ln p(b + w + h) / p(b + w), from prices by time (us).

    By time, not by rows: null where either price is null or not in `prices`.  The unit of the prices
    does not matter; twice the integer mid will do.
    """
    ends = np.asarray(starts) + width
    return pd.DataFrame(
        {f"ret_fwd_{format_duration(h)}": _log_return(prices, ends, ends + h) for h in horizons}
    )


def past_returns(starts: np.ndarray, prices: pd.Series, width: int) -> pd.DataFrame:
    """ret_<h>(b) = ln p(b + w) / p(b + w - h) for 1 h and 3 h; null where either price is."""
    ends = np.asarray(starts) + width
    return pd.DataFrame(
        {f"ret_{format_duration(h)}": _log_return(prices, ends - h, ends) for h in PAST_RETURNS}
    )


def realised_volatility(starts: np.ndarray, prices: pd.Series, width: int) -> pd.DataFrame:
    """rv_<h>(b) = root of the sum of squared log returns, from bar end to bar end, over (b + w - h, b + w].

    Null where any of them is null, or where h is no whole number of bars.
    """
    ends = np.asarray(starts) + width
    columns = {}
    for h in PAST_RETURNS:
        n, rest = divmod(h, width)
        squares = [_log_return(prices, ends - (j + 1) * width, ends - j * width) ** 2 for j in range(n)]
        total = np.sum(squares, axis=0) if n and not rest else np.full(len(ends), np.nan)
        columns[f"rv_{format_duration(h)}"] = np.sqrt(total)
    return pd.DataFrame(columns)


def _log_return(prices: pd.Series, first: np.ndarray, last: np.ndarray) -> np.ndarray:
    """ln(p(last) / p(first)); the difference of integer-valued prices is exact before it is divided."""
    before, after = (prices.reindex(times).to_numpy() for times in (first, last))
    return np.log1p((after - before) / before)


def control_columns(
    table: pd.DataFrame,
    prices: pd.Series,
    states: pd.DataFrame,
    markets: Mapping[str, pd.Series],
    *,
    width: int,
) -> pd.DataFrame:
    """Controls of every bar of `table` (bars of one symbol, sorted by bar_ts), one row each.

    `table` has bar_ts and total_notional; `prices` are p by time (us), from `price_times`; `states` has
    spread_bps, depth1, depth5, oi and funding by time, at `state_times`; what the lake cannot give is
    left out and null; `markets` has the prices of the market symbols by name.

    spread_bps, depth1, depth5; rv_1h, rv_3h; ret_1h, ret_3h; log_notional = ln total_notional, null
    where nothing traded; oi, d_oi_z (z of oi(t) - oi(t - w)), funding, funding_z, rv_z (z of rv_3h);
    <market>_ret_1h, <market>_ret_3h; low_liquidity and the regimes.  A z-score is (x - mean) / std
    (ddof = 1) of the `TRAILING_US` before the bar; all of it null as the module and `KNOWN_SHARE` say.
    Rows within `LOOKBACK_US` of the table's first are only as good as what the table shows them.
    """
    starts = table["bar_ts"].to_numpy()
    states = states.reindex(columns=[*BOOK_CONTROLS, *TICKER_CONTROLS])
    notional = table["total_notional"].to_numpy(np.float64)
    out = states.reindex(starts + width).reset_index(drop=True)
    out = out.join(realised_volatility(starts, prices, width)).join(past_returns(starts, prices, width))
    out["log_notional"] = np.log(notional, where=notional > 0, out=np.full(len(out), np.nan))
    before = states["oi"].reindex(starts).to_numpy()
    past = Trailing(starts, width)
    out["d_oi_z"] = past.z(out["oi"].to_numpy() - before)
    out["funding_z"] = past.z(out["funding"].to_numpy())
    out["rv_z"] = past.z(out["rv_3h"].to_numpy())
    for name, market in markets.items():
        out = out.join(past_returns(starts, market, width).add_prefix(f"{name}_"))
    out["low_liquidity"] = low_liquidity(out, past)
    return out.join(regimes(out, past)).set_index(table.index)


class Trailing:
    """Statistics of the `TRAILING_US` before each bar, by time; the bar itself is not among them."""

    def __init__(self, starts: np.ndarray, width: int) -> None:
        self.starts = starts
        self.window = TRAILING_US // width
        self.least = max(2, self.window // KNOWN_SHARE)
        self.grid = np.arange(starts[0], starts[-1] + width, width) if len(starts) else starts

    def _on_grid(self, values: np.ndarray) -> pd.Series:
        return pd.Series(values, index=self.starts, dtype=np.float64).reindex(self.grid)

    def z(self, values: np.ndarray) -> np.ndarray:
        """(x - mean) / std of the past, ddof = 1; a constant past gives 0 if x continues it, else null."""
        out = np.empty(len(self.grid))
        flow_kernels.trailing_z(self._on_grid(values).to_numpy(), self.window, self.least, out)
        return pd.Series(out, index=self.grid).reindex(self.starts).to_numpy()

    def quantile(self, values: np.ndarray, q: float) -> np.ndarray:
        """Quantile of the past, linear interpolation."""
        rolled = self._on_grid(values).rolling(self.window, min_periods=self.least).quantile(q)
        return rolled.shift(1).reindex(self.starts).to_numpy()


def low_liquidity(controls: pd.DataFrame, past: Trailing) -> np.ndarray:
    """1 where depth5 is below its trailing 30 % quantile or spread_bps above its trailing 70 % quantile.

    0 where neither is, null where that is not known.
    """
    depth, spread = controls["depth5"].to_numpy(), controls["spread_bps"].to_numpy()
    thin, wide = past.quantile(depth, 0.3), past.quantile(spread, 0.7)
    low = (depth < thin) | (spread > wide)
    unknown = np.isnan(depth) | np.isnan(thin) | np.isnan(spread) | np.isnan(wide)
    return np.where(low, 1.0, np.where(unknown, np.nan, 0.0))


def regimes(controls: pd.DataFrame, past: Trailing) -> pd.DataFrame:
    """Regime labels of every bar (str, null where not known), all decided by the past.

    funding_regime: high or low beyond the trailing 70 % and 30 % quantiles of funding, else middle.
    d_oi_regime: large where |d_oi_z| > LARGE_D_OI, else normal.  volatility_regime: low, middle, high,
    the trailing terciles of rv_3h.  liquidity_regime: low where low_liquidity, else normal.
    stress_regime: calm where rv_z < CALM_RV; stress where rv_z > STRESS_RV and funding_z >
    STRESS_FUNDING; else neither.
    """
    rv, funding, d_oi = (controls[name].to_numpy() for name in ("rv_3h", "funding", "d_oi_z"))
    rv_z, funding_z, low = (controls[name].to_numpy() for name in ("rv_z", "funding_z", "low_liquidity"))
    calm, stress = rv_z < CALM_RV, (rv_z > STRESS_RV) & (funding_z > STRESS_FUNDING)
    # A quiet bar is calm whatever the funding; a wild one needs it, to be told from stress.
    settled = ~np.isnan(rv_z) & ((rv_z <= STRESS_RV) | ~np.isnan(funding_z))
    columns = {
        "funding_regime": _by_quantiles(funding, past.quantile(funding, 0.3), past.quantile(funding, 0.7)),
        "d_oi_regime": _label(~np.isnan(d_oi), [np.abs(d_oi) > LARGE_D_OI], ["large"], "normal"),
        "volatility_regime": _by_quantiles(rv, past.quantile(rv, 1 / 3), past.quantile(rv, 2 / 3)),
        "liquidity_regime": _label(~np.isnan(low), [low > 0], ["low"], "normal"),
        "stress_regime": _label(settled, [calm, stress], ["calm", "stress"], "neither"),
    }
    return pd.DataFrame(columns)


def _by_quantiles(values: np.ndarray, lower: np.ndarray, upper: np.ndarray) -> pd.Series:
    known = ~(np.isnan(values) | np.isnan(lower) | np.isnan(upper))
    return _label(known, [values < lower, values > upper], ["low", "high"], "middle")


def _label(known: np.ndarray, tests: list[np.ndarray], names: list[str], other: str) -> pd.Series:
    labels = pd.Series(np.select(tests, names, other), dtype="str")
    return labels.where(known)

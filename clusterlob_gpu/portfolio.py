"""A long/short book of overlapping sleeves, before and after costs.

At the end of every bar one sleeve of 1/H of the book opens in the direction of the signal and the sleeve that
is H bars old closes, so that the position is the mean of the last H wishes.  A wish is made at the end b + w
of its bar, from values known then; it earns from b + w on.

- Wishes: "sign" = sign(x); "scaled" = clip(x / (2 s), -1, 1) with s the root mean square of x over the bars
  that ended by the start of the UTC day (at least 50, else no wish).  A null signal wishes 0.
- Trades take place at the mid of the bar's end and pay, on the traded notional |p_t - p_(t-1)|, fee, half the
  spread then and slippage.  Where the mid is null nothing is traded and the position is kept; the return to
  the next mid falls on the bar that ends there.  Everything is closed at the last mid.
- Returns are simple, on a constant book of 1, added up without compounding.  No funding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from clusterlob_gpu.evaluation import Signal, hac_lags, long_run_sum, on_grid
from clusterlob_gpu.plain_statistics import two_sided
from clusterlob_gpu.schema import US_PER_DAY

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

BPS = 1e4
DAYS_PER_YEAR = 365
RULES = ("sign", "scaled")
MIN_SCALE_ROWS = 50
US_PER_HOUR = US_PER_DAY // 24


@dataclass(frozen=True)
class Costs:
    """Per side, bps of the traded notional; half the spread comes on top."""

    fee_bps: float = 5.0
    slippage_bps: float = 0.0


@dataclass(frozen=True)
class Book:
    """One book on the grid of bars: what is held over the bar that starts at `ts`.

    position[t] is set at the start of bar t, traded[t] = |position[t] - position[t - 1]|; gross[t] is earned
    over the bar; fee, spread, slippage are what the trade at its start costs.
    """

    ts: Ints
    position: Floats
    traded: Floats
    gross: Floats
    fee: Floats
    spread: Floats
    slippage: Floats

    @property
    def net(self) -> Floats:
        return self.gross - self.fee - self.spread - self.slippage


def wishes(signal: Floats, ts: Ints, width_us: int, rule: str) -> Floats:
    """(T,) direction and size in [-1, 1] of the sleeve that each bar opens; 0 where the signal is null."""
    known = np.isfinite(signal)
    if rule == "sign":
        return np.where(known, np.sign(np.where(known, signal, 0.0)), 0.0)
    squares = np.concatenate([[0.0], np.cumsum(np.where(known, signal, 0.0) ** 2)])
    counts = np.concatenate([[0], np.cumsum(known)])
    past = np.searchsorted(ts + width_us, ts // US_PER_DAY * US_PER_DAY, side="right")
    ready = known & (counts[past] >= MIN_SCALE_ROWS) & (squares[past] > 0)
    scale = 2 * np.sqrt(squares[past][ready] / counts[past][ready])
    out = np.zeros(len(signal))
    out[ready] = np.clip(signal[ready] / scale, -1.0, 1.0)
    return out


def make_book(
    wish: Floats, mid: Floats, spread_bps: Floats, ts: Ints, width_us: int, sleeves: int, costs: Costs
) -> Book:
    """Positions, trades and returns.

    wish, mid, spread_bps: (T,), known at the end of bar t, ts[t] + width_us; mid and spread of that moment.
    A null spread is the last one known, before any it is 0.  Gives arrays of T bars that start one width
    later; the last one only closes.
    """
    running = np.concatenate([np.zeros(sleeves), np.cumsum(wish)])
    wanted = (running[sleeves:] - running[:-sleeves]) / sleeves
    priced = np.isfinite(mid) & (mid > 0)
    wanted[np.abs(wanted) < 1e-12] = 0.0  # what is left of a running sum is no position
    if priced.any():
        wanted[np.flatnonzero(priced)[-1] :] = 0.0
    position = _last_known(np.where(priced, wanted, np.nan))
    price = _last_known(np.where(priced, mid, np.nan), before=np.nan)
    earned = np.zeros(len(mid))
    earned[:-1] = np.nan_to_num(price[1:] / price[:-1] - 1)
    traded = np.abs(np.diff(position, prepend=0.0))
    return Book(
        ts=ts + width_us,
        position=position,
        traded=traded,
        gross=position * earned,
        fee=traded * costs.fee_bps / BPS,
        spread=traded * _last_known(spread_bps) / 2 / BPS,
        slippage=traded * costs.slippage_bps / BPS,
    )


def _last_known(values: Floats, before: float = 0.0) -> Floats:
    """Nulls replaced by the value before them."""
    at = np.maximum.accumulate(np.where(np.isfinite(values), np.arange(len(values)), -1))
    return np.where(at >= 0, values[np.maximum(at, 0)], before)


def backtest_tables(
    panel: pd.DataFrame,
    signals: Sequence[Signal],
    horizons_us: Sequence[int],
    *,
    width_us: int,
    costs: Costs,
    mid: str = "mid",
    spread: str = "spread_bps",
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Books of one symbol for every signal, horizon and rule, long where the signal is positive.

    Takes the panel of `evaluation.ic_table` with the mid at the end of each bar and the spread then (bps; may
    be absent: 0, and `spread_known` says so).

    Returns
    -------
    backtest : a row per signal, horizon and rule: signal, horizon_us, sleeves (H), rule; bars (from the first
        trade to the close), days (bars times width); fee_bps, slippage_bps, half_spread_bps (mean paid per
        side), spread_known.

        - gross, net: sum of returns of a book of 1 (0.01 = 1 %).  gross_bps_per_day, net_bps_per_day.
        - sharpe_gross, sharpe_net = mean / std * sqrt(bars of 365 days), ddof = 1, bars as if independent;
          sharpe_lo_gross, sharpe_lo_net: with the Bartlett long-run variance over 2H - 1 lags in place of the
          variance (Lo 2002: overlapping sleeves are autocorrelated); gross_t, net_t = mean over its HAC
          error, gross_p, net_p two-sided normal.
        - sortino = mean net / sqrt(mean min(net, 0)^2), annualised the same way; max_drawdown: largest fall
          of the cumulated net from its highest so far (0 at the start included); calmar = net per 365 days /
          max_drawdown.
        - hit_rate: share of bars with gross > 0 among those with gross not 0; day_hit_rate: share of UTC
          days with net > 0.  turnover: traded notional per day, in books.  mean_position: mean |position|.
        - breakeven_fee_bps: fee per side at which net = 0, spread and slippage still paid (negative: not even
          for free); breakeven_cost_bps: gross over traded notional, all costs together.

        Never traded: bars = 0 and null statistics.
    path : a row per signal, horizon, rule and hour: ts (start of the hour, us), gross, net, traded (sums over
        its bars), position (mean).
    """
    columns = list(dict.fromkeys([mid, *(s.column for s in signals)]))
    has_spread = spread in panel.columns
    values, ts = on_grid(panel, [*columns, spread] if has_spread else columns, width_us)
    grid = dict(zip(columns, values.T, strict=False))
    spreads = values[:, -1] if has_spread else np.full(len(ts), np.nan)
    rows, paths = [], []
    for signal in signals:
        for horizon_us in horizons_us:
            for rule in RULES:
                sleeves = -(-horizon_us // width_us)
                wish = wishes(grid[signal.column], ts, width_us, rule)
                book = make_book(wish, grid[mid], spreads, ts, width_us, sleeves, costs)
                key = {"signal": signal.name, "horizon_us": horizon_us, "sleeves": sleeves, "rule": rule}
                key |= {"fee_bps": costs.fee_bps, "slippage_bps": costs.slippage_bps}
                rows.append(key | {"spread_known": has_spread} | book_statistics(book, width_us, sleeves))
                paths.append(_hourly(book).assign(signal=signal.name, horizon_us=horizon_us, rule=rule))
    return pd.DataFrame(rows), pd.concat(paths, ignore_index=True)


STATISTICS = (
    "half_spread_bps",
    "gross",
    "net",
    "gross_bps_per_day",
    "net_bps_per_day",
    "sharpe_gross",
    "sharpe_net",
    "sharpe_lo_gross",
    "sharpe_lo_net",
    "gross_t",
    "gross_p",
    "net_t",
    "net_p",
    "sortino",
    "max_drawdown",
    "calmar",
    "hit_rate",
    "day_hit_rate",
    "turnover",
    "mean_position",
    "breakeven_fee_bps",
    "breakeven_cost_bps",
)


def book_statistics(book: Book, width_us: int, sleeves: int) -> dict[str, float]:
    """The numbers of `backtest_tables` for one book."""
    active = np.flatnonzero(book.traded > 0)
    if len(active) < 2:
        return {"bars": 0, "days": 0.0} | dict.fromkeys(STATISTICS, np.nan)
    span = slice(active[0], active[-1] + 1)
    gross, net, traded = book.gross[span], book.net[span], float(book.traded[span].sum())
    days = len(gross) * width_us / US_PER_DAY
    bars_per_year = DAYS_PER_YEAR * US_PER_DAY / width_us
    lags = hac_lags(sleeves, 1, len(gross))
    t_gross, t_net = _mean_t(gross, lags), _mean_t(net, lags)
    yearly = np.sqrt(bars_per_year / len(gross))  # from a t-value to a Sharpe ratio
    daily = np.bincount((book.ts[span] - book.ts[span][0] // US_PER_DAY * US_PER_DAY) // US_PER_DAY, net)
    drawdown = _drawdown(net)
    paid = float((book.spread[span] + book.slippage[span]).sum())
    numbers = {
        "half_spread_bps": BPS * float(book.spread[span].sum()) / traded,
        "gross": float(gross.sum()),
        "net": float(net.sum()),
        "gross_bps_per_day": BPS * float(gross.sum()) / days,
        "net_bps_per_day": BPS * float(net.sum()) / days,
        "sharpe_gross": _sharpe(gross, bars_per_year),
        "sharpe_net": _sharpe(net, bars_per_year),
        "sharpe_lo_gross": t_gross * yearly,
        "sharpe_lo_net": t_net * yearly,
        "gross_t": t_gross,
        "gross_p": two_sided(t_gross),
        "net_t": t_net,
        "net_p": two_sided(t_net),
        "sortino": _ratio(float(net.mean()), float(np.sqrt((np.minimum(net, 0) ** 2).mean())))
        * float(np.sqrt(bars_per_year)),
        "max_drawdown": drawdown,
        "calmar": _ratio(float(net.sum()) / days * DAYS_PER_YEAR, drawdown),
        "hit_rate": _share(gross[gross != 0] > 0),
        "day_hit_rate": _share(daily > 0),
        "turnover": traded / days,
        "mean_position": float(np.abs(book.position[span]).mean()),
        "breakeven_fee_bps": BPS * (float(gross.sum()) - paid) / traded,
        "breakeven_cost_bps": BPS * float(gross.sum()) / traded,
    }
    return {"bars": len(gross), "days": days} | numbers


def _mean_t(values: Floats, lags: int) -> float:
    n = len(values)
    error = np.sqrt(long_run_sum(values - values.mean(), lags) * n / (n - 1)) / n
    return _ratio(float(values.mean()), float(error))


def _sharpe(values: Floats, bars_per_year: float) -> float:
    return _ratio(float(values.mean()), float(values.std(ddof=1))) * float(np.sqrt(bars_per_year))


def _drawdown(returns: Floats) -> float:
    wealth = np.concatenate([[0.0], np.cumsum(returns)])
    return float((np.maximum.accumulate(wealth) - wealth).max())


def _ratio(a: float, b: float) -> float:
    return a / b if b > 0 else float("nan")


def _share(hits: NDArray[np.bool_]) -> float:
    return float(hits.mean()) if len(hits) else float("nan")


def _hourly(book: Book) -> pd.DataFrame:
    table = pd.DataFrame(
        {
            "ts": book.ts // US_PER_HOUR * US_PER_HOUR,
            "gross": book.gross,
            "net": book.net,
            "traded": book.traded,
            "position": book.position,
        }
    )
    sums = dict.fromkeys(("gross", "net", "traded"), "sum") | {"position": "mean"}
    return table.groupby("ts", sort=True).agg(sums).reset_index()

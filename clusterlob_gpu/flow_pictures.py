"""Figures of a taker-flow run: tables of one symbol in, a matplotlib Figure out; see `pictures`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from clusterlob_gpu.config import format_duration
from clusterlob_gpu.flow_evaluation import LARGE, SMALL, TOTAL
from clusterlob_gpu.flow_view import NAMES, FlowView, kind_name
from clusterlob_gpu.pictures import (
    BAND,
    FAINT,
    INK,
    count_range,
    dates,
    frame,
    ic_bar,
    legend,
    offsets,
    panel_title,
    plain,
)

COLOURS = {LARGE: "#cc6644", SMALL: "#4477aa", TOTAL: "#3c4450"}
SUFFIXES = ("", "_sum_30m", "_sum_1h", "_sum_3h")
_WHISKERS = "Whiskers: 95 % block bootstrap."
_THIN = "Hollow: too thin to judge."


def _title(view: FlowView, what: str, caption: str, height: float) -> Figure:
    return frame(f"{view.symbol}: {what}", caption, height)


def _point(axes: Axes, x: float, row: pd.Series, colour: str) -> None:
    axes.vlines(x, row["ci_low"], row["ci_high"], color=colour, linewidth=1.5)
    hollow = bool(row["thin"])
    axes.plot(x, row["ic"], "o", markersize=5, color=colour, markerfacecolor="white" if hollow else colour)


def ic_bars(view: FlowView) -> Figure:
    """IC of large, small and total flow and of their sums, a panel per target."""
    rows = view.tables["ic"]
    shown = rows[rows["signal"].isin([f"{factor}{suffix}" for factor in NAMES for suffix in SUFFIXES])]
    caption = (
        f"n = {count_range(shown['n'])} bars of {view.info['config']['bar']}. {_WHISKERS} "
        f"Grey band: IC too small to be found with 80 % power. {_THIN}"
    )
    figure = _title(view, "IC of taker flow by size of trade", caption, 3.8)
    panels = figure.subplots(1, len(view.targets), sharey=True, squeeze=False)[0]
    shifts = dict(zip(NAMES, offsets(3, 0.8), strict=True))
    for axes, target in zip(panels, view.targets, strict=True):
        for x, suffix in enumerate(SUFFIXES):
            for factor in NAMES:
                for _, row in view.rows("ic", target=target, signal=f"{factor}{suffix}").iterrows():
                    label = NAMES[factor] if x == 0 else None
                    ic_bar(axes, x + shifts[factor], row, COLOURS[factor], width=0.2, band=0.26, label=label)
        plain(axes, "IC (Pearson)" if target == view.targets[0] else "")
        panel_title(axes, target)
        kinds = [
            kind_name(suffix.removeprefix("_")) or f"one bar\n{view.info['config']['bar']}"
            for suffix in SUFFIXES
        ]
        axes.set_xticks(range(len(SUFFIXES)), kinds, fontsize=8)
    legend(panels[-1], 3)
    return figure


def ic_factors(view: FlowView) -> Figure:
    """IC of every factor, one bar and its longest sum, on the longest horizon."""
    rows = view.rows("ic", target=view.target).set_index("signal")
    factors = [name for name in rows.index if f"{name}_sum_3h" in rows.index]
    caption = (
        f"n = {count_range(rows['n'])} bars. {_WHISKERS} {_THIN} Grey band: IC too small to be found with "
        "80 % power. Toxicity and shares of all trades have no sign: no direction is expected of them."
    )
    figure = _title(view, f"IC of every factor on {view.target}", caption, 1.6 + 0.32 * len(factors))
    panels = figure.subplots(1, 2, sharey=True)
    for axes, suffix, title in zip(panels, ("", "_sum_3h"), ("one bar", "3h sum"), strict=True):
        for y, factor in enumerate(reversed(factors)):
            row = rows.loc[f"{factor}{suffix}"]
            colour = COLOURS.get(factor, "#77808c")
            mde = min(row["mde"], 1.0)
            axes.fill_betweenx([y - 0.4, y + 0.4], -mde, mde, color=BAND, linewidth=0)
            axes.hlines(y, row["ci_low"], row["ci_high"], color=colour, linewidth=1.5)
            face = "white" if row["thin"] else colour
            axes.plot(row["ic"], y, "o", markersize=5, color=colour, markerfacecolor=face)
        plain(axes, zero=False)
        axes.axvline(0, color=INK, linewidth=0.9)
        axes.grid(axis="y", visible=False)
        axes.grid(axis="x", color=FAINT, linewidth=0.6)
        panel_title(axes, title)
        axes.set_yticks(range(len(factors)), [f.replace("_", " ") for f in reversed(factors)], fontsize=8)
        axes.set_xlabel("IC (Pearson)", fontsize=8.5)
    return figure


def ic_decay(view: FlowView) -> Figure:
    """IC over the horizons, of one bar of flow and of its 3 h sum."""
    rows = view.tables["ic"]
    caption = f"n = {count_range(rows['n'])} bars. {_WHISKERS} {_THIN} Horizons start when the bar ends."
    figure = _title(view, "IC by horizon", caption, 3.4)
    panels = figure.subplots(1, 2, sharey=True)
    horizons = sorted(rows["horizon_us"].unique())
    for axes, suffix, title in zip(panels, ("", "_sum_3h"), ("one bar", "3h sum"), strict=True):
        for shift, factor in zip(offsets(3, 0.4), NAMES, strict=True):
            mine = view.rows("ic", signal=f"{factor}{suffix}").sort_values("horizon_us")
            x = np.array([horizons.index(h) for h in mine["horizon_us"]]) + shift
            axes.plot(x, mine["ic"], color=COLOURS[factor], linewidth=1, label=NAMES[factor])
            for at, (_, row) in zip(x, mine.iterrows(), strict=True):
                _point(axes, at, row, COLOURS[factor])
        plain(axes, "IC (Pearson)" if not suffix else "")
        panel_title(axes, title)
        axes.set_xticks(range(len(horizons)), [format_duration(int(h)) for h in horizons], fontsize=9)
        axes.set_xlim(-0.5, len(horizons) - 0.5)
    legend(panels[-1], 3)
    return figure


def quantile_returns(view: FlowView) -> Figure:
    """Mean forward return by quantile of large, small and total flow."""
    rows = view.rows("quantiles", target=view.target)
    inside = rows[(rows["quantile"] >= 1) & rows["signal"].isin(NAMES)]
    caption = (
        f"n = {count_range(inside['n'])} bars per quantile; edges from the days before. "
        "Whiskers: 95 %, HAC. 0: bars whose flow is exactly zero. Before costs."
    )
    figure = _title(view, f"{view.target} by quantile of flow", caption, 3.6)
    panels = figure.subplots(1, 3, sharey=True)
    for axes, factor in zip(panels, NAMES, strict=True):
        mine = rows[(rows["signal"] == factor) & (rows["n"] > 0)]
        axes.bar(mine["quantile"], mine["mean_bps"], width=0.7, color=COLOURS[factor], alpha=0.8)
        axes.vlines(mine["quantile"], mine["ci_low"], mine["ci_high"], color=INK, linewidth=1.1)
        plain(axes, "mean return (bps)" if factor == LARGE else "")
        spread = view.rows("spreads", target=view.target, signal=factor).iloc[0]
        panel_title(axes, f"{NAMES[factor]}\n{_spread_words(spread)}", 7.5)
        axes.set_xticks(sorted(mine["quantile"]))
        axes.set_xlabel("quantile", fontsize=8.5)
    return figure


def _spread_words(row: pd.Series) -> str:
    if pd.isna(row["spread_bps"]):
        return "top - bottom: too few bars"
    return f"top - bottom {row['spread_bps']:+.3g} [{row['ci_low']:+.3g}, {row['ci_high']:+.3g}] bps"


def slices(view: FlowView, table: str, what: str) -> Figure:
    """IC of large flow on the longest horizon in every slice of a table of slices."""
    rows = view.rows(table, target=view.target, signal=LARGE)
    groups = [(str(by), mine) for by, mine in rows.groupby("by", sort=False)]
    different = int(rows["verdict"].isin(["larger", "smaller"]).sum())
    caption = (
        f"{_WHISKERS} {_THIN} Numbers: bars. Dashed: all bars. {different} of {len(rows)} slices differ from "
        "the rest of their group after correction."
    )
    figure = _title(view, f"IC of large flow on {view.target} by {what}", caption, 3.6)
    widths = [max(len(mine), 2) for _, mine in groups]
    panels = figure.subplots(1, len(groups), sharey=True, squeeze=False, width_ratios=widths)[0]
    whole = view.rows("ic", target=view.target, signal=LARGE)["ic"].iloc[0]
    for axes, (by, mine) in zip(panels, groups, strict=True):
        for x, (_, row) in enumerate(mine.iterrows()):
            _point(axes, x, row, COLOURS[LARGE])
        axes.axhline(whole, color=COLOURS[LARGE], linewidth=0.9, linestyle="--")
        plain(axes, "IC (Pearson)" if axes is panels[0] else "")
        panel_title(axes, by.replace("_regime", "").replace("_", " "))
        labels = [f"{row['bucket']}\n{int(row['n']):,}" for _, row in mine.iterrows()]
        axes.set_xticks(range(len(mine)), labels, fontsize=7.5, rotation=90 if len(mine) > 4 else 0)
        axes.set_xlim(-0.5, len(mine) - 0.5)
    return figure


def regimes(view: FlowView) -> Figure:
    """IC of large flow in every regime."""
    return slices(view, "regimes", "regime")


def stability(view: FlowView) -> Figure:
    """IC of large flow by month, volatility and liquidity."""
    return slices(view, "stability", "month, volatility and liquidity")


def backtest(view: FlowView) -> Figure:
    """Cumulated gross and net return of the books on large, small and total flow."""
    keys = {"horizon_us": view.horizon_us, "rule": "sign"}
    row = view.rows("backtest", signal=LARGE, **keys).iloc[0]
    held = format_duration(view.horizon_us)
    caption = (
        f"Sign of the flow, held {held} in {row['sleeves']} overlapping sleeves; simple returns of a book of "
        f"1, summed. Net: fee {row['fee_bps']:g} + slippage {row['slippage_bps']:g} bps + half the spread, "
        "per side, on the traded notional. No funding."
    )
    figure = _title(view, "cumulated return of the long/short books", caption, 4.6)
    panels = figure.subplots(2, 1, sharex=True)
    for axes, kind in zip(panels, ("gross", "net"), strict=True):
        for factor in NAMES:
            path = view.rows("backtest_path", signal=factor, **keys)
            times = pd.to_datetime(path["ts"].to_numpy(), unit="us")
            axes.plot(
                times, 100 * path[kind].cumsum(), color=COLOURS[factor], linewidth=1.2, label=NAMES[factor]
            )
        plain(axes, f"{kind} (%)")
    legend(panels[0], 3)
    dates(panels[-1])
    return figure


def pictures(view: FlowView) -> list[tuple[str, Callable[[FlowView], Figure]]]:
    """Name and maker of every picture that the tables of the symbol allow."""
    wanted: Sequence[tuple[str, Callable[[FlowView], Figure], bool]] = (
        ("ic", ic_bars, True),
        ("ic_decay", ic_decay, True),
        ("ic_factors", ic_factors, True),
        ("quantiles", quantile_returns, True),
        ("regimes", regimes, len(view.rows("regimes", signal=LARGE)) > 0),
        ("stability", stability, True),
        ("backtest", backtest, True),
    )
    return [(name, make) for name, make, possible in wanted if possible]

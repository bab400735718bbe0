"""Figures of a cluster run: tables of one symbol in, a matplotlib Figure out.

Every picture states what it counts (n), draws the interval of every estimate and a line at zero, and carries
the stamp IN SAMPLE when the clusters were fitted on the days that are shown.  A cluster has one colour
throughout.  Figures are objects: no global state, no display.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from textwrap import fill

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.dates import AutoDateLocator, ConciseDateFormatter
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator

from clusterlob_gpu.config import format_duration, parse_duration
from clusterlob_gpu.evaluation import OFI_KINDS, on_grid
from clusterlob_gpu.margins import EDGE, Margins
from clusterlob_gpu.schema import ALL_CLUSTERS, US_PER_DAY, Z_FEATURES
from clusterlob_gpu.view import SIDES, View, distinct_targets

WIDTH_IN, DPI = 7.6, 150
_CAPTION_CHARS, _LEGEND_CHARS = 120, 18
INK, FAINT, BAND, STAMP = "#222831", "#d8dde3", "#e3e7ec", "#b3261e"
_ALL = "#3c4450"
_ROLES = {0: "#4477aa", 1: "#228833", 2: "#cc6644"}
_FURTHER = ("#aa3377", "#ccaa33", "#66bbdd", "#7755aa", "#999933", "#bb5577", "#558888")


def colour(cluster: int) -> str:
    """The cluster's colour; the three roles and the aggregate have fixed ones."""
    if cluster == ALL_CLUSTERS:
        return _ALL
    return _ROLES.get(cluster, _FURTHER[(cluster - 3) % len(_FURTHER)])


def frame(heading: str, caption: str, height: float) -> Figure:
    """An empty figure with a heading, and below it what it counts and what its marks mean."""
    figure = Figure(figsize=(WIDTH_IN, height), dpi=DPI, facecolor="white")
    figure.set_layout_engine(Margins())
    edge = EDGE / 72 / height
    figure.suptitle(heading, x=0.01, y=1 - edge, ha="left", fontsize=12, fontweight="bold", color=INK)
    figure.supxlabel(fill(caption, _CAPTION_CHARS), x=0.01, y=edge, ha="left", fontsize=8, color="#59636e")
    return figure


def _figure(view: View, title: str, caption: str, height: float) -> Figure:
    figure = frame(f"{view.symbol}: {title}", caption, height)
    if view.in_sample:
        box = {"boxstyle": "round,pad=0.3", "facecolor": "white", "edgecolor": STAMP}
        figure.text(
            0.99, 1 - 0.1 / height, "IN SAMPLE", ha="right", va="top", fontsize=9, color=STAMP, bbox=box
        )
    return figure


def plain(axes: Axes, ylabel: str = "", zero: bool = True) -> None:
    """The house's axes: two spines, a faint grid, a line at zero."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#9aa4af")
    axes.tick_params(labelsize=8, color="#9aa4af")
    axes.set_ylabel(ylabel, fontsize=9)
    axes.grid(axis="y", color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    if zero:
        axes.axhline(0, color=INK, linewidth=0.9)


def panel_title(axes: Axes, text: str, size: float = 9.5) -> None:
    """Title of a panel, at a place that need not be searched for."""
    axes.set_title(text, fontsize=size, loc="left", y=1.0)


def colour_bar(axes: Axes, image: AxesImage) -> None:
    """The scale of an image, on the right of the axes."""
    bar = axes.inset_axes((1.01, 0, 0.025, 1))
    axes.figure.colorbar(image, cax=bar)
    bar.tick_params(labelsize=8)


def legend(axes: Axes, entries: int) -> None:
    """Legend on the right of the axes."""
    axes.legend(
        fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0), ncols=1 + entries // 16
    )


def _label(view: View, cluster: int) -> str:
    """Name in a legend, on as many lines as it needs."""
    return fill(view.name(cluster), _LEGEND_CHARS)


def _clusters(table: pd.DataFrame) -> list[int]:
    """Cluster numbers, the aggregate last."""
    found = sorted(int(c) for c in table["cluster"].unique())
    return [c for c in found if c != ALL_CLUSTERS] + [c for c in found if c == ALL_CLUSTERS]


def offsets(count: int, width: float) -> np.ndarray:
    """Offsets that put `count` marks side by side around 0."""
    return (np.arange(count) - (count - 1) / 2) * width / max(count, 1)


def centroids(view: View) -> Figure:
    """Heatmap of the mean z of every feature in every cluster."""
    table = view.latest
    values = table[list(Z_FEATURES)].to_numpy(np.float64)
    window = f"Last window ({view.last_days}), " if view.walks else ""
    caption = (
        f"{window}n = {table['count'].sum():,} trades. Mean z-score over the cluster's trades; "
        f"sbs on the side: {view.side}, spread in {view.info['config']['spread']}."
    )
    figure = _figure(view, "centroids", caption, 1.7 + 0.42 * len(table))
    axes = figure.add_subplot()
    bound = max(float(np.nanmax(np.abs(values), initial=0.0)), 1e-9)
    image = axes.imshow(values, cmap="RdBu_r", vmin=-bound, vmax=bound, aspect="auto")
    for (i, j), value in np.ndenumerate(values):
        shade = "white" if abs(value) > 0.6 * bound else INK
        axes.text(
            j,
            i,
            f"{value:+.2f}" if np.isfinite(value) else "-",
            ha="center",
            va="center",
            fontsize=9,
            color=shade,
        )
    axes.set_xticks(range(len(Z_FEATURES)), Z_FEATURES, fontsize=9)
    axes.set_yticks(range(len(table)), [view.last_name(int(c)) for c in table["cluster"]], fontsize=9)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    colour_bar(axes, image)
    return figure


def shares(view: View) -> Figure:
    """Share of the trades in each cluster."""
    table = view.latest
    window = f" of the last window ({view.last_days})" if view.walks else ""
    caption = f"n = {table['count'].sum():,} trades{window}."
    figure = _figure(view, "share of trades per cluster", caption, 1.4 + 0.36 * len(table))
    axes = figure.add_subplot()
    at = np.arange(len(table))[::-1]
    percent = 100 * table["share"].to_numpy(np.float64)
    axes.barh(at, percent, color=[colour(int(c)) for c in table["cluster"]], height=0.65)
    for y, value, count in zip(at, percent, table["count"], strict=True):
        axes.text(value + 0.6, y, f"{value:.1f} %   {count:,}", va="center", fontsize=8.5, color=INK)
    plain(axes, zero=False)
    axes.grid(axis="x", color=FAINT, linewidth=0.6)
    axes.grid(axis="y", visible=False)
    axes.set_yticks(at, [view.last_name(int(c)) for c in table["cluster"]], fontsize=9)
    axes.set_xlim(0, min(1.28 * percent.max(), 128))
    axes.set_xlabel("% of trades", fontsize=9)
    return figure


def ic_bars(view: View, target: str = "frnb") -> Figure:
    """IC of every cluster's flow on one target, with bootstrap intervals and the detectable band."""
    rows = view.ic[view.ic["target"] == target]
    caption = (
        f"n = {count_range(rows['n'])} buckets of {view.info['config']['bucket']}. "
        "Whiskers: 95 % block bootstrap. Grey band: IC too small to be found with 80 % power. "
        "Hollow: too thin to judge."
    )
    figure = _figure(view, f"IC of order flow imbalance on {target}", caption, 3.6)
    panels = figure.subplots(1, len(OFI_KINDS), sharey=True)
    for axes, kind in zip(panels, OFI_KINDS, strict=True):
        mine = rows[rows["signal"] == kind]
        order = _clusters(mine)
        for x, cluster in enumerate(order):
            row = mine[mine["cluster"] == cluster].iloc[0]
            ic_bar(axes, x, row, colour(cluster), width=0.55, band=0.9, label=_label(view, cluster))
        plain(axes, "IC (Pearson)" if kind == OFI_KINDS[0] else "")
        panel_title(axes, kind)
        numbers = ["all" if c == ALL_CLUSTERS else str(c) for c in order]
        axes.set_xticks(range(len(order)), numbers, fontsize=9 if len(order) <= 12 else 6)
    legend(panels[-1], len(order))
    return figure


def ic_bar(
    axes: Axes, x: float, row: pd.Series, shade: str, *, width: float, band: float, label: str | None
) -> None:
    """A bar of IC with its interval, hollow where the row is thin, on the band of undetectable ICs."""
    mde = min(row["mde"], 1.0)  # no IC is larger
    axes.fill_between([x - band / 2, x + band / 2], -mde, mde, color=BAND, linewidth=0)
    face = "none" if row["thin"] else shade
    axes.bar(x, row["ic"], width=width, facecolor=face, edgecolor=shade, alpha=0.85, label=label)
    axes.vlines(x, row["ci_low"], row["ci_high"], color=INK, linewidth=1.3)


def ic_horizons(view: View, kind: str = "ofi_size") -> Figure:
    """IC of one kind of imbalance at every horizon."""
    rows = view.ic[(view.ic["signal"] == kind) & view.ic["predictive"].astype(bool)]
    targets = distinct_targets(rows)
    order = _clusters(rows)
    caption = (
        f"n = {count_range(rows['n'])} buckets. Whiskers: 95 % block bootstrap. "
        "Horizons start when the bucket ends. Hollow: too thin to judge."
    )
    figure = _figure(view, f"IC of {kind} by horizon", caption, 3.6)
    axes = figure.add_subplot()
    for shift, cluster in zip(offsets(len(order), 0.7), order, strict=True):
        mine = rows[rows["cluster"] == cluster].set_index("target").reindex(targets)
        x = np.arange(len(targets)) + shift
        axes.vlines(x, mine["ci_low"], mine["ci_high"], color=colour(cluster), linewidth=1.6, alpha=0.75)
        axes.plot(x, mine["ic"], "o", markersize=5, color=colour(cluster), label=_label(view, cluster))
        thin = (mine["verdict"] == "thin").to_numpy()
        axes.plot(x[thin], mine["ic"][thin], "o", markersize=3, color="white")
    plain(axes, "IC (Pearson)")
    axes.set_xticks(range(len(targets)), [_target_name(rows, target) for target in targets], fontsize=8.5)
    axes.set_xlim(-0.6, len(targets) - 0.4)
    for edge in range(1, len(targets)):
        axes.axvline(edge - 0.5, color=FAINT, linewidth=0.8)
    legend(axes, len(order))
    return figure


def _target_name(rows: pd.DataFrame, target: str) -> str:
    if target == "freb":
        return "freb\nto midnight"
    horizon = format_duration(int(rows.loc[rows["target"] == target, "horizon_us"].iloc[0]))
    return f"{target}\n{horizon}"


def count_range(counts: pd.Series) -> str:
    """Smallest to largest count, as text."""
    low, high = int(counts.min()), int(counts.max())
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def markouts(view: View) -> Figure:
    """Mean signed move of the mid after a cluster's trades."""
    caption = (
        f"n = {count_range(view.markouts['n'])} trades per point. Whiskers: 95 %, buckets as sampling units. "
        "Above 0: the mid moves on in the taker's direction. Before fees and spread."
    )
    figure = _figure(view, "mark-out after the trade", caption, 3.6)
    axes = figure.add_subplot()
    horizons = sorted(view.markouts["horizon_us"].unique())
    order = _clusters(view.markouts)
    for shift, cluster in zip(offsets(len(order), 0.35), order, strict=True):
        mine = view.markouts[view.markouts["cluster"] == cluster].set_index("horizon_us").reindex(horizons)
        x = np.arange(len(horizons)) + shift
        axes.vlines(x, mine["ci_low"], mine["ci_high"], color=colour(cluster), linewidth=1.6, alpha=0.75)
        axes.plot(
            x,
            mine["mean_bps"],
            "o-",
            markersize=5,
            linewidth=1,
            color=colour(cluster),
            label=_label(view, cluster),
        )
    plain(axes, "signed mid move (bps)")
    axes.set_xticks(range(len(horizons)), [format_duration(int(h)) for h in horizons], fontsize=9)
    axes.set_xlabel("time after the trade", fontsize=9)
    legend(axes, len(order))
    return figure


def side_audit(view: View) -> Figure:
    """Mark-outs of the clusters in the order of their names, under either side convention."""
    horizons = sorted(view.markouts["horizon_us"].unique())
    moves = view.markouts.set_index(["cluster", "horizon_us"])
    names = view.markouts[view.markouts["cluster"] != ALL_CLUSTERS].drop_duplicates("cluster")
    caption = (
        "The clusters and their mark-outs are the same on both sides, only the names differ. "
        "Whiskers: 95 %, buckets as sampling units. "
        "own: sbs is the depth on the taker's side (bids for a buy). "
        "consumed: sbs is the depth that the trade hits (asks for a buy)."
    )
    figure = _figure(view, "which cluster gets which name", caption, 4.0)
    panels = figure.subplots(1, 2, sharey=True)
    sides = ((view.side, "label", "used here"), (SIDES[view.side], "label_other", "the other convention"))
    for axes, (side, column, remark) in zip(panels, sides, strict=True):
        named = sorted(zip(names[column], names["cluster"].astype(int), strict=True), key=_by_role)
        for x, (_, cluster) in enumerate(named):
            mine = moves.reindex([(cluster, h) for h in horizons])
            at = x + offsets(len(horizons), 0.8)
            axes.bar(at, mine["mean_bps"], width=0.68 / len(horizons), color=colour(cluster), alpha=0.85)
            axes.vlines(at, mine["ci_low"], mine["ci_high"], color=INK, linewidth=1)
        plain(axes, "mark-out (bps)" if column == "label" else "")
        panel_title(axes, f"same_side: {side} ({remark})")
        ticks = [f"{fill(label, _LEGEND_CHARS)}\ncluster {c}" for label, c in named]
        axes.set_xticks(range(len(named)), ticks, fontsize=8, rotation=90 if len(named) > 4 else 0)
        axes.set_xlabel("bars: " + ", ".join(format_duration(int(h)) for h in horizons), fontsize=8)
    return figure


def _by_role(named: tuple[str, int]) -> tuple[int, int]:
    roles = ("opportunistic", "directional", "passive")
    label, cluster = named
    role = label.split(" in ")[0]  # directional in 2 of 4 windows
    return roles.index(role) if role in roles else len(roles), cluster


def flow_and_price(view: View) -> Figure:
    """Cumulated signed flow of every cluster above the path of the mid."""
    every = view.buckets[view.buckets["cluster"] == ALL_CLUSTERS].sort_values("bucket_ts")
    times, path, stretches = _return_path(every, parse_duration(view.info["config"]["bucket"]))
    moves = "sum of conr"
    if stretches > 1:
        moves += (
            f" within each of {stretches} stretches that have a mid, from 0 on; what the mid did over the "
            "gaps between them is left out"
        )
    caption = f"{len(every):,} buckets. Flow: sum of taker buys minus sells, base units. Return: {moves}."
    figure = _figure(view, "flow and price", caption, 4.4)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    order = _clusters(view.buckets)
    for cluster in order:
        mine = view.buckets[view.buckets["cluster"] == cluster].sort_values("bucket_ts")
        width, dash = (1.6, "--") if cluster == ALL_CLUSTERS else (1.2, "-")
        upper.plot(
            _times(mine),
            mine["ofi_size"].cumsum(),
            dash,
            linewidth=width,
            color=colour(cluster),
            label=_label(view, cluster),
        )
    lower.plot(times, 1e4 * path, color=INK, linewidth=1)
    plain(upper, "cumulated flow")
    plain(lower, "return of mid (bps)")
    dates(lower)
    legend(upper, len(order))
    return figure


def _return_path(every: pd.DataFrame, width_us: int) -> tuple[pd.DatetimeIndex, pd.Series, int]:
    """Ends of the buckets, conr summed from 0 in every stretch without a null, and how many stretches.

    A bucket without conr is null and separates: the mid's move across it is not known.
    """
    values, starts = on_grid(every, ["conr"], width_us)
    conr = pd.Series(values[:, 0])
    gap = conr.isna()
    stretches = int((~gap & gap.shift(fill_value=True)).sum())
    return pd.to_datetime(starts + width_us, unit="us"), conr.groupby(gap.cumsum()).cumsum(), stretches


def shares_over_time(view: View) -> Figure:
    """Share of each cluster in the trades, bucket by bucket, smoothed by summing an hour or a day."""
    own = view.buckets[view.buckets["cluster"] != ALL_CLUSTERS]
    span = int(own["bucket_ts"].max() - own["bucket_ts"].min())
    step = US_PER_DAY // 24 if span <= 31 * US_PER_DAY else US_PER_DAY
    summed = (
        own.assign(bucket_ts=own["bucket_ts"] // step * step)
        .groupby(["bucket_ts", "cluster"])["n_trades"]
        .sum()
    )
    counts = summed.unstack(fill_value=0)  # noqa: PD010  the index is unique by construction
    percent = 100 * counts.div(counts.sum(axis=1).where(counts.sum(axis=1) > 0), axis=0)
    caption = f"n = {int(counts.to_numpy().sum()):,} labelled trades, summed over {format_duration(step)}."
    figure = _figure(view, "shares over time", caption, 2.9)
    axes = figure.add_subplot()
    times = pd.to_datetime(percent.index.to_numpy(), unit="us")
    for cluster in map(int, percent.columns):
        axes.plot(times, percent[cluster], color=colour(cluster), linewidth=1.2, label=_label(view, cluster))
    plain(axes, "% of trades", zero=False)
    axes.set_ylim(0, None)
    dates(axes)
    legend(axes, len(percent.columns))
    return figure


def drift(view: View) -> Figure:
    """Distance of every centroid to its match in the window before."""
    table = view.centroids
    disagree = table["agrees"].astype("boolean").eq(False).fillna(False)
    caption = (
        f"{len(set(table['window_id']))} windows. Distance in z to the matched centroid (Hungarian). "
        f"Crosses ({int(disagree.sum())}): the naming rule gives another number than the match."
    )
    figure = _figure(view, "drift of the centroids", caption, 2.9)
    axes = figure.add_subplot()
    for cluster in _clusters(table):
        mine = table[table["cluster"] == cluster].sort_values("window_id")
        axes.plot(
            mine["window_id"],
            mine["drift"],
            "o-",
            color=colour(cluster),
            linewidth=1,
            label=_label(view, cluster),
        )
        moved = mine[disagree.loc[mine.index]]
        axes.plot(moved["window_id"], moved["drift"], "x", color=STAMP, markersize=10)
    plain(axes, "distance (z)", zero=False)
    axes.margins(y=0.1)
    axes.set_ylim(0, None)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("window", fontsize=9)
    legend(axes, len(_clusters(table)))
    return figure


def _times(table: pd.DataFrame) -> pd.DatetimeIndex:
    return pd.to_datetime(table["bucket_ts"].to_numpy(), unit="us")


def dates(axes: Axes) -> None:
    """Dates on the x axis."""
    locator = AutoDateLocator()
    axes.xaxis.set_major_locator(locator)
    axes.xaxis.set_major_formatter(ConciseDateFormatter(locator))
    axes.xaxis.get_offset_text().set_fontsize(8)
    axes.set_xlabel("UTC", fontsize=9)


def pictures(view: View) -> list[tuple[str, Callable[[View], Figure]]]:
    """Name and maker of every picture that the tables of the symbol allow."""
    wanted: Sequence[tuple[str, Callable[[View], Figure], bool]] = (
        ("centroids", centroids, True),
        ("shares", shares, True),
        ("ic", ic_bars, "frnb" in set(view.ic["target"])),
        ("ic_horizons", ic_horizons, not view.ic.empty),
        ("markouts", markouts, not view.markouts.empty),
        ("sides", side_audit, not view.markouts.empty),
        ("flow", flow_and_price, not view.buckets.empty),
        ("shares_over_time", shares_over_time, not view.buckets.empty),
        ("drift", drift, view.walks),
    )
    return [(name, make) for name, make, possible in wanted if possible]

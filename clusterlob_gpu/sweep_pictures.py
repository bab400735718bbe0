"""Pictures of a sweep: ICs by setting, heat maps, p-values against chance."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from clusterlob_gpu.evaluation import LEVEL
from clusterlob_gpu.pictures import (
    BAND,
    FAINT,
    INK,
    STAMP,
    colour_bar,
    count_range,
    frame,
    panel_title,
    plain,
)
from clusterlob_gpu.sweep_view import TITLES, Headline, SweepView, capital, count_text, is_standing

MAX_LABELLED = 64
"""Evaluations that a picture names one by one; more are sorted by their IC."""
MAX_PRINTED = 16
"""Columns of a heat map, over all panels, whose cells have room for a number."""
_LEAST_P = 1e-16

_POINT, _GREY = "#4477aa", "#8a939e"


def _figure(headline: Headline, what: str, caption: str, height: float) -> Figure:
    title = f"{headline.symbol}, {TITLES[headline.experiment]}: {what}"
    figure = frame(title, caption, height)
    if headline.in_sample:
        box = {"boxstyle": "round,pad=0.3", "facecolor": "white", "edgecolor": STAMP}
        y = 1 - 0.1 / height
        figure.text(0.99, y, "IN SAMPLE", ha="right", va="top", fontsize=9, color=STAMP, bbox=box)
    return figure


def _points_words(headline: Headline) -> str:
    """How many points of the settings there are, and of how many evaluations."""
    points = len(headline.points) if headline.settings else 1
    shared = f" (of {headline.evaluations:,} evaluations)" if headline.evaluations > points else ""
    return f"{count_text(points, 'setting')} tried{shared}, n = {count_range(headline.rows['n'])} buckets"


def ic_by_setting(headline: Headline) -> Figure:
    """IC with its interval at every point of the settings, a panel per label or signal.

    Up to MAX_LABELLED points are named, in the order of the settings; more are sorted by their IC.
    """
    points = headline.points
    named = len(points) <= MAX_LABELLED
    order = f"in order of {', '.join(headline.settings)}" if named else "each panel sorted by its own IC"
    caption = (
        f"{_points_words(headline)}, {order}. Whiskers: 95 % block bootstrap of the test alone. "
        "Grey band: IC too small to be found with 80 % power. Blue: stands after correction for the whole "
        "sweep; grey: does not; hollow: too thin to judge."
    )
    height = 1.9 + (0.17 * len(points) if named else 4.5)
    figure = _figure(headline, f"IC of {headline.pair}", caption, height)
    panels = figure.subplots(1, len(headline.panels), sharey=True, sharex=True, squeeze=False)[0]
    for axes, panel in zip(panels, headline.panels, strict=True):
        _draw_ics(axes, _placed(headline, panel, points, named), named)
        panel_title(axes, panel)
    if named:
        labels = [" | ".join(map(str, point)) for point in points.itertuples(index=False)]
        panels[0].set_yticks(range(len(points)), labels, fontsize=7.5)
    else:
        panels[0].set_yticks([])
    panels[0].set_ylabel(" | ".join(headline.settings), fontsize=8.5)
    panels[0].set_ylim(len(points) - 0.4, -0.6)
    return figure


def _placed(headline: Headline, panel: str, points: pd.DataFrame, named: bool) -> pd.DataFrame:
    """Rows of a panel with their place `y`; clusters of one name stand side by side."""
    rows = headline.rows[headline.rows["panel"] == panel]
    if not named:
        return rows.sort_values("ic", ascending=False).assign(y=np.linspace(0, len(points) - 1, len(rows)))
    places = points.assign(y=np.arange(len(points), dtype=float))
    rows = rows.merge(places, on=headline.settings, how="left")
    again = rows.groupby("y").cumcount()
    return rows.assign(y=rows["y"] + 0.25 * again)


def _draw_ics(axes: Axes, rows: pd.DataFrame, named: bool) -> None:
    """Points with whiskers on the band of undetectable ICs, one below the other; finer where unnamed."""
    mde = rows["mde"].fillna(0.0).clip(upper=1.0)
    height = 1.0 if named else 1.1 * np.ptp(rows["y"]) / len(rows)
    axes.barh(rows["y"], 2 * mde, left=-mde, height=height, color=BAND, linewidth=0)
    sure, thin = is_standing(rows), rows["thin"].astype(bool)
    width, strength, size = (1.4, 1.0, 4.0) if named else (0.7, 0.45, 2.0)
    for mine, shade in ((rows[~sure], _GREY), (rows[sure], _POINT)):
        axes.hlines(mine["y"], mine["ci_low"], mine["ci_high"], color=shade, linewidth=width, alpha=strength)
    for mine, shade, face in (
        (rows[thin], _GREY, "white"),
        (rows[~sure & ~thin], _GREY, _GREY),
        (rows[sure], _POINT, _POINT),
    ):
        at = mine["ic"], mine["y"]
        axes.plot(*at, "o", linestyle="none", color=shade, markerfacecolor=face, markersize=size)
    plain(axes, zero=False)
    axes.axvline(0, color=INK, linewidth=0.9)
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", color=FAINT, linewidth=0.6)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.set_xlabel("IC (Pearson)", fontsize=8.5)


def widest(headline: Headline) -> tuple[str, str]:
    """The two settings that take most values, that with more of them first."""
    values = {name: headline.rows[name].nunique() for name in headline.settings}
    first, second = sorted(values, key=lambda name: -values[name])[:2]
    return first, second


def cells(headline: Headline, panel: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Mean IC, and share of ICs that stand, over the two settings that take most values."""
    rows = headline.rows[headline.rows["panel"] == panel]
    down, across = widest(headline)
    table = rows.assign(stands=is_standing(rows).astype(float)).groupby([down, across], observed=True)
    every = [headline.points[name].cat.remove_unused_categories().cat.categories for name in (down, across)]
    made = [
        table[column].mean().unstack().reindex(index=every[0], columns=every[1])  # noqa: PD010
        for column in ("ic", "stands")
    ]
    return made[0], made[1]


def ic_map(headline: Headline) -> Figure:
    """Heat maps of the IC over the two settings that take most values, a panel per label or signal."""
    down, across = widest(headline)
    maps = {panel: cells(headline, panel) for panel in headline.panels}
    shape = next(iter(maps.values()))[0].shape
    rest = [name for name in headline.settings if name not in (down, across)]
    over = f"mean over {', '.join(rest)}; " if rest else ""
    caption = (
        f"{_points_words(headline)}. Colour: IC; {over}star: "
        f"{'every test of the cell' if rest else 'the test'} stands after correction for the whole sweep. "
        "Neighbours that agree are evidence; a lone cell is not."
    )
    figure = _figure(headline, f"IC over {down} and {across}", caption, 2.0 + _map_height(shape[0]))
    panels = figure.subplots(1, len(maps), sharey=True, squeeze=False)[0]
    bound = max(float(np.nanmax([np.nanmax(np.abs(ic), initial=0.0) for ic, _ in maps.values()])), 1e-9)
    printed = shape[1] * len(maps) <= MAX_PRINTED
    for axes, (panel, (ic, stands)) in zip(panels, maps.items(), strict=True):
        image = axes.imshow(ic.to_numpy(), cmap="RdBu_r", vmin=-bound, vmax=bound, aspect="auto")
        _print_cells(axes, ic.to_numpy(), stands.to_numpy() == 1.0, bound, printed)
        panel_title(axes, panel)
        axes.set_xlabel(across, fontsize=8.5)
        _name_columns(axes, list(ic.columns), shape[1] * len(maps))
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    panels[0].set_yticks(range(shape[0]), list(ic.index), fontsize=8 if shape[0] <= 40 else 6)
    panels[0].set_ylabel(down, fontsize=8.5)
    colour_bar(panels[-1], image)
    return figure


def _map_height(rows: int) -> float:
    return 0.2 * max(rows, 5) if rows <= 20 else max(4.0, 0.11 * rows)


def _name_columns(axes: Axes, names: Sequence[str], columns: int) -> None:
    """Names of the columns, upright where they would touch; every so many where even that is too close."""
    step = max(1, columns // 40)
    upright = sum(map(len, names)) * max(columns // len(names), 1) > 60
    shown = list(names)[::step]
    axes.set_xticks(range(0, len(names), step), shown, fontsize=7.5, rotation=90 if upright else 0)


def _print_cells(axes: Axes, ic: np.ndarray, stands: np.ndarray, bound: float, printed: bool) -> None:
    for (i, j), value in np.ndenumerate(ic):
        text = (f"{value:+.2f}" if printed and np.isfinite(value) else "") + ("*" if stands[i, j] else "")
        shade = "white" if abs(value) > 0.6 * bound else INK
        axes.text(j, i, text, ha="center", va="center", fontsize=7, color=shade)


def p_values(view: SweepView) -> Figure:
    """Histogram of all p-values against the uniform, and their quantiles on a log scale."""
    tests = view.tests
    found = int((tests["hac_p"] < LEVEL).sum())
    caption = (
        f"{len(tests):,} distinct predictive tests, thin ones left out; {found:,} below {LEVEL}, where noise "
        f"alone gives {LEVEL * len(tests):,.1f}. Line: uniform. Grey: 95 % of each quantile for independent "
        "tests; tests that share returns stray further. Dashed: Benjamini-Hochberg's "
        f"bound at {LEVEL}."
    )
    figure = frame("p-values of all tests before correction", caption, 3.6)
    left, right = figure.subplots(1, 2)
    left.hist(tests["hac_p"], bins=np.linspace(0, 1, 21), color=_POINT, alpha=0.8)
    left.axhline(len(tests) / 20, color=INK, linewidth=1)
    plain(left, "tests", zero=False)
    left.set_xlabel("p (HAC)", fontsize=8.5)
    _draw_quantiles(right, np.sort(tests["hac_p"].to_numpy()))
    return figure


def _draw_quantiles(axes: Axes, p: np.ndarray) -> None:
    from scipy.special import betaincinv  # half a second of imports, for sweeps alone

    rank = np.arange(1, len(p) + 1)
    expected = rank / (len(p) + 1)
    low, high = betaincinv(rank, len(p) + 1 - rank, [[0.025], [0.975]])
    axes.fill_between(expected, low, high, color=BAND, linewidth=0)
    axes.plot(expected, expected, color=INK, linewidth=1)
    axes.plot(expected, LEVEL * rank / len(p), "--", color=STAMP, linewidth=1)
    axes.plot(expected, np.maximum(p, _LEAST_P), "o", markersize=2.5, color=_POINT, linestyle="none")
    axes.set_xscale("log")
    axes.set_yscale("log")
    plain(axes, "p found", zero=False)
    axes.grid(axis="x", color=FAINT, linewidth=0.6)
    axes.set_xlabel("p expected of noise", fontsize=8.5)


def _has_grid(headline: Headline) -> bool:
    """Whether two settings vary, and at least half of their pairs were tried."""
    if len(headline.settings) < 2:
        return False
    return any(cells(headline, panel)[0].notna().to_numpy().mean() >= 0.5 for panel in headline.panels)


def symbol_pictures(found: Iterable[Headline]) -> Iterator[tuple[str, str, Callable[[], Figure]]]:
    """Name, caption and maker of every picture that the headlines of a symbol allow."""
    for headline in found:
        if not headline.settings:
            continue
        title = capital(TITLES[headline.experiment])
        name = headline.experiment
        yield (
            f"ic_{name}",
            f"{title}: does the IC of {headline.pair} depend on the settings?",
            partial(ic_by_setting, headline),
        )
        if _has_grid(headline):
            yield f"map_{name}", f"{title}: do neighbouring settings agree?", partial(ic_map, headline)

"""What a finished sweep says: words, pictures and one self-contained page; see `report`.

A sweep searches, and the best of many tests is large by choice.  So the page counts what was tried, says what
chance alone would have given, and calls only that a result which stands after correction for all of it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.table import Table
from scipy.stats import beta, norm

from clusterlob_gpu import page
from clusterlob_gpu.config import ClusterConfig, FlowConfig, RunConfig, make_config, parse_duration
from clusterlob_gpu.evaluation import LEVEL
from clusterlob_gpu.findings import HEADLINE_SIGNAL, HEADLINE_TARGET
from clusterlob_gpu.flow_evaluation import LARGE
from clusterlob_gpu.flow_pictures import signal_name
from clusterlob_gpu.flow_report import Section
from clusterlob_gpu.page import interval, number, text_table
from clusterlob_gpu.pictures import BAND, FAINT, INK, STAMP, count_range, frame, plain
from clusterlob_gpu.schema import ALL_CLUSTERS

EXPERIMENT = "sweep"
CONFIGS: dict[str, type[RunConfig]] = {"cluster": ClusterConfig, "flow": FlowConfig}
TITLES = {"cluster": "ClusterLOB", "flow": "taker flow"}
ROLES = ("opportunistic", "directional", "passive")
LONG_SUM = f"{LARGE}_sum_3h"
STANDING = ("positive", "negative")

MAX_TRIALS, SHOWN_TRIALS = 40, 20
"""Of more trials than the first the terminal shows the second number, the strongest."""
MAX_ROWS = 200
"""Rows of a table on the page; the tables themselves have all."""
MAX_LABELLED = 64
"""Evaluations that a picture names one by one; more are sorted by their IC."""
MAX_PRINTED = 16
"""Columns of a heat map, over all panels, whose cells have room for a number."""
MIN_P_VALUES = 20
"""Fewer tests than this have no distribution worth drawing."""
_LEAST_P = 1e-16

_TEST = ["evaluation", "cluster", "signal", "target"]
_NUMBERS = ["experiment", "symbol", "cluster", "signal", "target", "n", "ic", "hac_p"]
"""Tests that agree in all of these are one measurement under two settings."""
_COLUMNS = (
    *("trial", "evaluation", "experiment", "symbol", "cluster", "label", "signal", "target", "horizon_us"),
    *("n", "ic", "ci_low", "ci_high", "hac_t", "hac_p", "mde", "predictive", "thin"),
    *("p_fdr", "verdict", "p_fdr_alone", "verdict_alone"),
)
_FLAGS = ("predictive", "thin")
_TEXTS = ("experiment", "symbol", "label", "signal", "target", "verdict", "verdict_alone")

_POINT, _GREY = "#4477aa", "#8a939e"


@dataclass(frozen=True)
class SweepView:
    """The tables of a sweep."""

    info: dict[str, Any]
    """run.json"""
    trials: pd.DataFrame
    ic: pd.DataFrame
    """Every test of every trial."""
    evaluations: pd.DataFrame
    """By number: experiment, symbol, sample, how many trials share it, and its settings that vary."""

    @property
    def settings(self) -> list[str]:
        """Settings in which the trials differ."""
        names = self.trials.columns[2 : list(self.trials.columns).index("status")]
        return [name for name in names if _varies(self.trials[name])]

    @property
    def failed(self) -> pd.DataFrame:
        return self.trials[self.trials["status"] != "done"]

    @property
    def rows(self) -> pd.DataFrame:
        """Every distinct row of ICs, of trials that share an evaluation once."""
        return self.ic.drop_duplicates(_TEST)

    @property
    def tests(self) -> pd.DataFrame:
        """The distinct tests for which p was corrected, the strongest first."""
        return _tested(self.rows).sort_values(["hac_p", "evaluation"], kind="stable")

    @property
    def symbols(self) -> list[str]:
        """Symbols with results."""
        return sorted(self.evaluations["symbol"].unique())

    @property
    def in_sample(self) -> bool:
        return bool((self.evaluations["sample"] == "in sample").any())


def _tested(rows: pd.DataFrame) -> pd.DataFrame:
    return rows[rows["predictive"] & ~rows["thin"] & rows["hac_p"].notna()]


def _varies(values: pd.Series) -> bool:
    return len(values.unique()) > 1


def _stands(rows: pd.DataFrame) -> pd.Series:
    return rows["verdict"].isin(STANDING)


def read_run(out: Path) -> SweepView:
    """The tables of a sweep; raises InputError naming a missing file."""
    info = page.read_info(out)
    trials = page.read_results(Path(out), "sweep")
    found = page.read_results(Path(out), "sweep_ic").reindex(columns=_COLUMNS)
    kinds = dict.fromkeys(_COLUMNS, "float64") | dict.fromkeys(_TEXTS, "object")
    kinds |= {"trial": "int64", "evaluation": "int64"} | dict.fromkeys(_FLAGS, "bool")
    ic = found.astype(kinds)
    view = SweepView(info, trials, ic, pd.DataFrame())
    return SweepView(info, trials, ic, _evaluations(view))


def _evaluations(view: SweepView) -> pd.DataFrame:
    shared = view.ic.groupby("evaluation")["trial"].nunique()
    first = view.ic.drop_duplicates("evaluation").set_index("evaluation").sort_index()
    trials = view.trials.set_index("trial")
    configs = [_config(view.info, trials.loc[row["trial"]], row["experiment"]) for _, row in first.iterrows()]
    return pd.DataFrame(
        {
            "experiment": first["experiment"],
            "symbol": first["symbol"],
            "sample": [_sample(config) for config in configs],
            "trials": shared,
        }
        | {name: _ordered([config.get(name) for config in configs]) for name in view.settings},
        index=first.index,
    )


def _config(info: Mapping[str, Any], trial: pd.Series, experiment: str) -> dict[str, Any]:
    """All settings of a trial's experiment, those that nobody gave at their defaults."""
    kind = CONFIGS[experiment]
    given = dict(info["sweep"]["config"])
    given |= {str(name): json.loads(trial[name]) for name in trial.index if _is_given(trial, name, kind)}
    return make_config(
        {name: given[name] for name in given if name in kind.model_fields}, (), kind
    ).resolved()


def _is_given(trial: pd.Series, name: Any, kind: type[RunConfig]) -> bool:
    return name in kind.model_fields and isinstance(trial[name], str)


def _sample(config: Mapping[str, Any]) -> str:
    if "train_days" not in config:
        return "nothing fitted"
    return "in sample" if config["train_days"] is None else "out of sample"


# ---- settings


def _text(value: Any) -> str:
    """A setting in a label: `0.8, 0.5`."""
    if isinstance(value, list | tuple):
        return ", ".join(map(_text, value))
    return page.NOTHING if value is None else str(value)


def _rank(value: Any) -> Any:
    """Where a setting stands among others of its kind; durations by length."""
    if isinstance(value, list | tuple):
        return tuple(map(_rank, value))
    try:
        return parse_duration(value)
    except ValueError:
        return value


def _ordered(values: Sequence[Any]) -> Any:
    """Settings as text, a categorical in rising order, or as they came where they have none."""
    distinct = {_text(value): _rank(value) for value in values}
    try:
        order = sorted(distinct, key=lambda name: (name != page.NOTHING, distinct[name]))
    except TypeError:
        order = list(distinct)
    return pd.Categorical([_text(value) for value in values], order, ordered=True)


def settings_that_matter(rows: pd.DataFrame, names: Sequence[str], within: Sequence[str]) -> list[str]:
    """Names without which the settings would not tell the ICs apart.

    A setting is left out if it does not vary, or if rows that differ in it alone all have the same IC.
    """
    kept = [name for name in names if _varies(rows[name])]
    for name in list(kept):
        others = [other for other in kept if other != name]
        same = rows.groupby([*within, *others], observed=True, dropna=False)["ic"]
        if same.size().max() > 1 and same.nunique(dropna=False).max() == 1:
            kept.remove(name)
    return kept


@dataclass(frozen=True)
class Headline:
    """ICs of the pairs that an experiment is about, of one symbol, over the settings that matter to them."""

    symbol: str
    experiment: str
    rows: pd.DataFrame
    """A row per panel and point of the settings; where a name holds for two clusters, per cluster."""
    settings: list[str]
    evaluations: int
    """How many evaluations the rows are of; those whose settings make no difference are one point."""
    in_sample: bool

    @property
    def panels(self) -> list[str]:
        return list(dict.fromkeys(self.rows["panel"]))

    @property
    def points(self) -> pd.DataFrame:
        """The settings, each point once, in order."""
        return self.rows[self.settings].drop_duplicates().sort_values(self.settings, ignore_index=True)

    @property
    def pair(self) -> str:
        """Signal and target, as text."""
        if self.experiment == "cluster":
            return f"{HEADLINE_SIGNAL} on {HEADLINE_TARGET}"
        return f"large flow on {' or '.join(dict.fromkeys(self.rows['target']))}"


def headlines(view: SweepView, symbol: str) -> list[Headline]:
    """The headline of every experiment that the sweep has of a symbol."""
    found = []
    for experiment, take in (("cluster", _cluster_pairs), ("flow", _flow_pairs)):
        rows = view.rows
        rows = take(rows[(rows["experiment"] == experiment) & (rows["symbol"] == symbol)])
        if rows["ic"].notna().any():
            found.append(_headline(view, symbol, experiment, rows))
    return found


def _headline(view: SweepView, symbol: str, experiment: str, rows: pd.DataFrame) -> Headline:
    names = [name for name in view.settings if name in CONFIGS[experiment].model_fields]
    rows = rows.join(view.evaluations[["sample", *names]], on="evaluation")
    within = ["panel", "cluster"]
    settings = settings_that_matter(rows, names, within)
    kept = rows.drop_duplicates([*within, *settings])
    in_sample = bool((rows["sample"] == "in sample").any())
    return Headline(symbol, experiment, kept, settings, rows["evaluation"].nunique(), in_sample)


def _cluster_pairs(rows: pd.DataFrame) -> pd.DataFrame:
    """ofi_size on the next bucket, of all clusters and of the named ones."""
    rows = rows[(rows["signal"] == HEADLINE_SIGNAL) & (rows["target"] == HEADLINE_TARGET)]
    role = rows["label"].astype(str).str.split(" in ").str[0]  # directional in 2 of 4 windows
    role = role.where(rows["cluster"] != ALL_CLUSTERS, "all clusters")
    return _panels(rows.assign(panel=role), ("all clusters", *ROLES))


def _flow_pairs(rows: pd.DataFrame) -> pd.DataFrame:
    """Large flow of one bar and its 3 h sum, on the longest horizon of each evaluation."""
    rows = rows[rows["signal"].isin([LARGE, LONG_SUM])]
    longest = rows.groupby("evaluation")["horizon_us"].transform("max")
    rows = rows[rows["horizon_us"] == longest]
    names = {LARGE: "large, one bar", LONG_SUM: "large, 3h sum"}
    return _panels(rows.assign(panel=rows["signal"].map(names)), tuple(names.values()))


def _panels(rows: pd.DataFrame, order: Sequence[str]) -> pd.DataFrame:
    kept = rows[rows["panel"].isin(order)]
    return kept.sort_values("panel", key=lambda panel: panel.map(order.index), kind="stable")


# ---- words


def _count(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def findings(view: SweepView) -> list[str]:
    """How much was searched and what is left of it, most important first."""
    return [
        *_search_words(view),
        *_standing_words(view),
        *_chance_words(view),
        *_best_words(view),
        *_sample_words(view),
        *_size_words(view),
    ]


def _search_words(view: SweepView) -> list[str]:
    tests, failed = view.tests, len(view.failed)
    repeated = len(tests) - len(tests.drop_duplicates(_NUMBERS))
    words = (
        f"{_count(len(view.trials), 'trial')}, of which {failed or 'none'} failed, gave "
        f"{_count(len(view.evaluations), 'distinct evaluation')} with {_count(len(tests), 'distinct test')}"
    )
    if repeated:
        words += f"; {repeated:,} of these only repeat the numbers of another, untouched by what was varied"
    return [words + "."]


def _standing_words(view: SweepView) -> list[str]:
    tests = view.tests
    if tests.empty:
        return ["Nothing could be tested."]
    sure = tests[_stands(tests)]
    alone = int(tests["verdict_alone"].isin(STANDING).sum())
    corrected = f"correction for all {_count(len(tests), 'test')} of the sweep"
    before = f"with each evaluation corrected alone, as if nothing else had been tried, {alone:,} would"
    if sure.empty:
        return [f"No test stands after {corrected}; {before}."]
    kinds = sure.drop_duplicates(["symbol", "experiment", "label", "signal", "target"])
    listed = "; ".join(
        f"{name_of(row, view)} {row['ic']:+.3f} [{interval(row, 'ci_low', 'ci_high', '+.3f')}]"
        for _, row in kinds.head(5).iterrows()
    )
    more = "; and others" if len(kinds) > 5 else ""
    stand = "1 stands" if len(sure) == 1 else f"{len(sure):,} stand"
    return [
        f"{stand} after {corrected}; {before}. The strongest, each where its p is smallest: {listed}{more}."
    ]


def _chance_words(view: SweepView) -> list[str]:
    tests = view.tests
    if tests.empty:
        return []
    return [
        f"{int((tests['hac_p'] < LEVEL).sum()):,} of {len(tests):,} tests have p below {LEVEL} before any "
        f"correction; from noise alone one expects {LEVEL * len(tests):,.1f}. Tests of one sample share its "
        "returns, so that what noise gives strays much further from this number than for independent tests."
    ]


def median_largest_t(tests: int) -> float:
    """|t| that the strongest of so many independent tests of pure noise passes half of the time."""
    return float(norm.isf((1 - 0.5 ** (1 / tests)) / 2))


def _best_words(view: SweepView) -> list[str]:
    tests = view.tests
    if tests.empty:
        return []
    best = tests.iloc[0]
    different = len(tests.drop_duplicates(_NUMBERS))
    return [
        f"The strongest test is {name_of(best, view)} in trial {int(best['trial'])}: IC {best['ic']:+.4f}, "
        f"95 % {interval(best, 'ci_low', 'ci_high', '+.4f')}, HAC t {best['hac_t']:+.2f}, corrected p "
        f"{best['p_fdr']:.3f} ({best['verdict']}). It is the best of {different:,}, so its IC is biased "
        "upwards, and its interval does not know that it was chosen. Of as many independent tests of noise "
        f"the strongest passes |t| = {median_largest_t(different):.2f} half of the time."
    ]


def _sample_words(view: SweepView) -> list[str]:
    words = []
    if view.in_sample:
        words.append(
            "In sample: clusters were fitted on days on which their ICs are measured. Read their numbers as "
            "optimistic; trials with train_days give out-of-sample ones."
        )
    if len(view.evaluations) > 1:
        words.append(
            "Whatever setting is chosen by this page is chosen on these days; test it on days that the sweep "
            "has not seen."
        )
    return words


def _size_words(view: SweepView) -> list[str]:
    words, rows = [], view.rows[view.rows["predictive"]]
    small = view.tests["mde"].dropna()
    if len(small):
        words.append(
            "The smallest IC that a test would find with 80 % power, before correction, is "
            f"{small.median():.3f} in the median ({small.min():.3f} to {small.max():.3f}): undecided is not "
            "evidence of no effect."
        )
    for verdict, why in (
        ("thin", "too thin to judge"),
        ("mixed", "of clusters whose trades changed (mixed)"),
    ):
        found = int((rows["verdict"] == verdict).sum())
        if found:
            words.append(f"{found:,} of {len(rows):,} predictive ICs are {why}.")
    return words


def headline_words(headline: Headline) -> str:
    """How the headline of an experiment holds over the settings."""
    over = f" over {' x '.join(headline.settings)}" if headline.settings else ""
    words = f"{_capital(TITLES[headline.experiment])}, {headline.pair}{over}: "
    panels = headline.rows.groupby("panel", sort=False)
    return words + "; ".join(_panel_words(rows) for _, rows in panels) + "."


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _panel_words(rows: pd.DataFrame) -> str:
    low, high = rows["ic"].min(), rows["ic"].max()
    name, span = rows["panel"].iloc[0], number(low, "+.3f")
    if high > low:
        span += f" to {high:+.3f}"
    return f"{name} {span}, {int(_stands(rows).sum())} of {len(rows)} stand"


def name_of(row: pd.Series, view: SweepView) -> str:
    """A test in words: `opportunistic: ofi_size on frnb`, `large, 3h sum on ret_fwd_3h`."""
    name = f"{signal_name(row['signal'])} on {row['target']}"
    if pd.notna(row["cluster"]):
        all_of_them = row["cluster"] == ALL_CLUSTERS
        name = f"{'all clusters' if all_of_them else row['label']}: {row['signal']} on {row['target']}"
    return f"{row['symbol']} {name}" if len(view.symbols) > 1 else name


# ---- tables


def _test_cells(row: pd.Series) -> dict[str, str]:
    return {
        "IC": number(row["ic"], "+.4f"),
        "95 % interval": interval(row, "ci_low", "ci_high", "+.3f"),
        "MDE": number(row["mde"], ".3f"),
        "p corrected": number(row["p_fdr"], ".3f"),
        "verdict": number(row["verdict"], "s"),
    }


def _strongest_trials(view: SweepView, most: int, shown: int) -> pd.DataFrame:
    """Finished trials; if there are more than `most`, the `shown` strongest, the strongest first."""
    done = view.trials[view.trials["status"] == "done"]
    if len(done) <= most:
        return done
    order = done.assign(size=-done["best_hac_t"].astype(float).abs())
    return order.sort_values(["best_p_fdr", "size"], kind="stable", na_position="last").head(shown)


def trial_rows(view: SweepView, trials: pd.DataFrame) -> list[dict[str, str]]:
    """Trials, as text: settings, how many tests stand, and the strongest one."""
    tests = _tested(view.ic)
    best = tests.loc[tests.groupby("trial")["hac_p"].idxmin()].set_index("trial").reindex(trials["trial"])
    return [
        {
            "trial": str(trial["trial"]),
            **_given(view, trial),
            "tests": number(trial["tests"], ",d"),
            "stand": number(trial["stand"], ",d"),
            "strongest": name_of(row, view) if isinstance(row["signal"], str) else page.NOTHING,
            **_test_cells(row),
        }
        for (_, trial), (_, row) in zip(trials.iterrows(), best.iterrows(), strict=True)
    ]


def _given(view: SweepView, trial: pd.Series) -> dict[str, str]:
    """The settings that vary, as the trial gives them."""
    return {name: _given_text(trial[name]) for name in view.settings}


def _given_text(value: Any) -> str:
    return _text(json.loads(value)) if isinstance(value, str) else page.NOTHING


def failed_rows(view: SweepView) -> list[dict[str, str]]:
    """Failed trials, as text, with the reason."""
    return [
        {
            "trial": str(row["trial"]),
            **_given(view, row),
            "status": row["status"],
            "reason": str(row["error"]),
        }
        for _, row in view.failed.iterrows()
    ]


def rows_of(view: SweepView, tests: pd.DataFrame) -> list[dict[str, str]]:
    """Distinct tests, as text, with the settings of their evaluation."""
    joined = tests.join(view.evaluations.drop(columns=["experiment", "symbol"]), on="evaluation")
    names = [name for name in view.settings if name in view.evaluations.columns and name != "symbols"]
    return [
        {
            "test": name_of(row, view),
            **{name: str(row[name]) for name in names},
            "sample": str(row["sample"]),
            "trials": number(row["trials"], ",d"),
            "n": number(row["n"], ",.0f"),
            **_test_cells(row),
            "HAC t": number(row["hac_t"], "+.2f"),
            "p": number(row["hac_p"], ".4f"),
            "p in its own evaluation": number(row["p_fdr_alone"], ".3f"),
            "verdict there": number(row["verdict_alone"], "s"),
        }
        for _, row in joined.iterrows()
    ]


def _heading(what: str, shown: int, of: int) -> str:
    return f"{what} ({of:,})" if shown == of else f"{what} (the strongest {shown:,} of {of:,})"


def _tables(view: SweepView) -> Iterator[tuple[str, list[dict[str, str]], bool]]:
    """Tables of the whole sweep that have rows: heading, rows, whether it is open."""
    trials, tests = _strongest_trials(view, MAX_ROWS, MAX_ROWS), view.tests
    done = len(view.trials) - len(view.failed)
    sure = tests[_stands(tests)]
    weak = tests[~_stands(tests)]
    for heading, every, rows, is_open in (
        ("Failed trials", len(view.failed), failed_rows(view), True),
        ("Finished trials", done, trial_rows(view, trials), len(trials) <= MAX_TRIALS),
        ("Tests that stand", len(sure), rows_of(view, sure.head(MAX_ROWS)), len(sure) <= MAX_TRIALS),
        ("Tests that do not stand", len(weak), rows_of(view, weak.head(SHOWN_TRIALS)), False),
    ):
        if rows:
            yield _heading(heading, len(rows), every), rows, is_open


# ---- pictures


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
    return f"{_count(points, 'setting')} tried{shared}, n = {count_range(headline.rows['n'])} buckets"


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
        axes.set_title(panel, fontsize=9.5, loc="left")
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
    sure, thin = _stands(rows), rows["thin"].astype(bool)
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
    table = rows.assign(stands=_stands(rows).astype(float)).groupby([down, across], observed=True)
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
        axes.set_title(panel, fontsize=9.5, loc="left")
        axes.set_xlabel(across, fontsize=8.5)
        _name_columns(axes, list(ic.columns), shape[1] * len(maps))
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    panels[0].set_yticks(range(shape[0]), list(ic.index), fontsize=8 if shape[0] <= 40 else 6)
    panels[0].set_ylabel(down, fontsize=8.5)
    figure.colorbar(image, ax=list(panels), pad=0.01, fraction=0.03).ax.tick_params(labelsize=8)
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
    rank = np.arange(1, len(p) + 1)
    expected = rank / (len(p) + 1)
    low, high = beta.ppf([[0.025], [0.975]], rank, len(p) + 1 - rank)
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


def _pictures(found: Iterable[Headline]) -> Iterator[tuple[str, str, Figure]]:
    """Name, caption and figure of every picture that the headlines of a symbol allow."""
    for headline in found:
        if not headline.settings:
            continue
        title = _capital(TITLES[headline.experiment])
        name = headline.experiment
        yield (
            f"ic_{name}",
            f"{title}: does the IC of {headline.pair} depend on the settings?",
            ic_by_setting(headline),
        )
        if _has_grid(headline):
            yield f"map_{name}", f"{title}: do neighbouring settings agree?", ic_map(headline)


# ---- terminal and page


def console_tables(out: Path) -> list[Table]:
    """Failed trials, finished trials, how much was searched, and the strongest tests.

    Raises InputError as `read_run`.
    """
    view = read_run(Path(out))
    trials, tests = _strongest_trials(view, MAX_TRIALS, SHOWN_TRIALS), view.tests
    done = len(view.trials) - len(view.failed)
    best = tests.drop_duplicates(_NUMBERS).head(10)
    left_out = ("sample", "n", "HAC t", "p", "p in its own evaluation", "verdict there")
    parts = {
        _heading("finished trials", len(trials), done): trial_rows(view, trials),
        _heading("failed trials", len(view.failed), len(view.failed)): failed_rows(view),
        "strongest distinct tests, the best of many: biased upwards": [
            {name: text for name, text in row.items() if name not in left_out} for row in rows_of(view, best)
        ],
        "how much was searched" + (", in sample" if view.in_sample else ""): [_search_row(view)],
    }
    return [text_table(title, rows) for title, rows in parts.items() if rows]


def _search_row(view: SweepView) -> dict[str, str]:
    tests = view.tests
    return {
        "trials": number(len(view.trials), ",d"),
        "failed": number(len(view.failed), ",d"),
        "evaluations": number(len(view.evaluations), ",d"),
        "tests": number(len(tests), ",d"),
        f"p < {LEVEL} by chance": number(LEVEL * len(tests), ",.1f"),
        "found": number(int((tests["hac_p"] < LEVEL).sum()), ",d"),
        "stand alone": number(int(tests["verdict_alone"].isin(STANDING).sum()), ",d"),
        "stand in the sweep": number(int(_stands(tests).sum()), ",d"),
    }


def render(out: Path) -> list[Path]:
    """Write plots/*.png and report.html of a finished sweep; gives the files written, the page last.

    Raises InputError as `read_run`.
    """
    out = Path(out)
    view = read_run(out)
    enough = len(view.tests) >= MIN_P_VALUES
    caption = "Are there more small p-values than chance gives?"
    written, images = page.draw(
        out, EXPERIMENT, [("p_values", p_values(view))] if enough else [], {"p_values": caption}
    )
    sections = [Section("All trials", findings(view), images, list(_tables(view)))]
    for symbol in view.symbols:
        files, section = _symbol_section(out, view, symbol)
        written += files
        sections.append(section)
    report = out / "report.html"
    page.write(report, page.page("sweep.html.j2", _page_info(view), sections))
    return [*written, report]


def _symbol_section(out: Path, view: SweepView, symbol: str) -> tuple[list[Path], Section]:
    found = headlines(view, symbol)
    made = list(_pictures(found))
    captions = {name: caption for name, caption, _ in made}
    files, images = page.draw(out, symbol, ((name, figure) for name, _, figure in made), captions)
    words = [headline_words(headline) for headline in found]
    tables = [
        (f"{_capital(TITLES[h.experiment])}: IC of {h.pair} ({len(rows)})", rows, False)
        for h in found
        if (rows := _headline_rows(h))
    ]
    return files, Section(symbol, words or ["No headline IC."], images, tables)


def _headline_rows(headline: Headline) -> list[dict[str, str]]:
    """What the pictures show, as text."""
    ordered = (
        headline.rows.sort_values(headline.settings, kind="stable") if headline.settings else headline.rows
    )
    return [
        {
            "of": row["panel"],
            **{name: str(row[name]) for name in headline.settings},
            "target": row["target"],
            "sample": row["sample"],
            "n": number(row["n"], ",.0f"),
            **_test_cells(row),
        }
        for _, row in ordered.head(MAX_ROWS).iterrows()
    ]


def _page_info(view: SweepView) -> dict[str, Any]:
    """run.json with what the page says of every run."""
    sweep = view.info["sweep"]
    days = (date.fromisoformat(sweep["end"]) - date.fromisoformat(sweep["start"])).days + 1
    return view.info | {
        "exchange": sweep["exchange"],
        "symbols": view.symbols or sweep["symbols"],
        "start": sweep["start"],
        "end": sweep["end"],
        "days": days,
        "config": sweep,
        "notes": [],
        "in_sample": view.in_sample,
    }

"""What a finished run says: words, pictures and one self-contained page.

Reads the run directory of `run cluster` or `label` and nothing else.  The words state what the numbers
allow: which convention named the clusters, whether the sample is in-sample, what was dropped, which ICs
differ from zero after correction, and how much data the rest would need.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from rich.table import Table

from clusterlob_gpu import flow_report, page, pictures
from clusterlob_gpu.config import format_duration, parse_duration
from clusterlob_gpu.errors import InputError
from clusterlob_gpu.evaluation import ALL_CLUSTERS, Z_95, Z_POWER
from clusterlob_gpu.page import interval, number, text_table
from clusterlob_gpu.pictures import SIDES, View
from clusterlob_gpu.schema import FEATURES, US_PER_DAY, Z_FEATURES

EXPERIMENTS = ("cluster", "label")
"""Runs that leave the tables shown here; those of `flow_report` are passed on to it."""

HEADLINE_SIGNAL, HEADLINE_TARGET = "ofi_size", "frnb"
"""The pair for which the research log reports an IC."""

_CAPTIONS = {
    "centroids": "Mean z-score of each feature in each cluster.",
    "shares": "Share of trades.",
    "ic": "IC of the next bucket's return, against aggregate flow and the smallest IC that could be found.",
    "ic_horizons": "The same signal at longer horizons.",
    "markouts": "Does the mid follow the taker? Signed move after the trade.",
    "sides": "Side audit: the same clusters under both conventions of the same side.",
    "flow": "Where the flow came from, and where the mid went.",
    "shares_over_time": "Do the clusters keep their weight?",
    "drift": "Do the centroids stay where they are from window to window?",
}
_WIDE_IC = ("target", "lags", "n eff.")
"""IC columns that the terminal leaves out."""

_DROPS = {
    "side_unknown": "unknown side",
    "no_book": "no book yet",
    "stale_book": "stale book",
    "warmup": "too little history",
    "null_change_time": "no change of the book seen yet",
}


@dataclass(frozen=True)
class Section:
    """What the page says of one symbol."""

    symbol: str
    findings: list[str]
    images: list[tuple[str, str, str]]
    """Name, caption, PNG as base64."""
    clusters: list[dict[str, str]]
    meanings: list[str]
    raw: list[dict[str, str]]
    ic: list[dict[str, str]]
    markouts: list[dict[str, str]]
    published: list[dict[str, str]]


def read_run(out: Path) -> tuple[dict[str, Any], list[View]]:
    """run.json, and the tables of every symbol.

    Raises InputError, naming the file, if the directory is not that of a finished run.
    """
    info = page.read_info(out)
    if info.get("experiment") not in EXPERIMENTS:
        found, known = info.get("experiment"), ", ".join([*EXPERIMENTS, flow_report.EXPERIMENT])
        raise InputError(
            f"{Path(out) / 'run.json'}: experiment = {found!r}; only runs of {known} can be shown"
        )
    tables = {name: page.read_results(Path(out), name) for name in ("centroids", "buckets", "ic", "markouts")}
    tables["ic"] = tables["ic"][tables["ic"]["sample"] == info["sample"]]
    views = [
        View(symbol, info, **{name: _of(table, symbol) for name, table in tables.items()})
        for symbol in info["symbols"]
    ]
    return info, [view for view in views if not view.centroids.empty]


def _of(table: pd.DataFrame, symbol: str) -> pd.DataFrame:
    return table[table["symbol"] == symbol].reset_index(drop=True)


# ---- words


def findings(view: View) -> list[str]:
    """What may be concluded for one symbol, most important first; one sentence or two each."""
    return [
        *_sample_words(view),
        *_ic_words(view),
        *_benchmark_words(view),
        *_needed_words(view),
        *_markout_words(view),
        *_name_words(view),
        *_drop_words(view),
        *_window_words(view),
    ]


def _sample_words(view: View) -> list[str]:
    if not view.in_sample:
        return ["Out of sample: no day was labelled by clusters that were fitted on that day."]
    return [
        "In-sample: the clusters were fitted on days on which their ICs are measured. Read every "
        "number as optimistic; a walk-forward run (train_days) gives out-of-sample ones."
    ]


def _predictive(view: View) -> pd.DataFrame:
    return view.ic[view.ic["predictive"].astype(bool)]


def _ic_words(view: View) -> list[str]:
    rows = _predictive(view)
    tests = int(rows["hac_p"].notna().sum())
    sure = rows[rows["verdict"].isin(["positive", "negative"])]
    words = []
    if tests == 0:
        words.append("No IC could be tested: too few buckets have both flow and return.")
    elif sure.empty:
        words.append(
            f"No cluster's IC differs from zero after correction for {tests} tests; the smallest IC "
            f"this sample could detect is {_smallest(rows)} (80 % power, before correction)."
        )
    else:
        order = pd.DataFrame({"other": sure["signal"] != HEADLINE_SIGNAL, "small": -sure["ic"].abs()})
        best = sure.loc[order.sort_values(["other", "small"], kind="stable").index]
        best = best[best["target"].isin(pictures.distinct_targets(rows))]
        listed = "; ".join(_one_ic(view, row) for _, row in best.head(5).iterrows())
        more = "; and others" if len(sure) > 5 else ""
        words.append(f"{len(sure)} of {tests} ICs differ from zero after correction: {listed}{more}.")
    thin = rows[rows["verdict"] == "thin"]
    if len(thin):
        which = ", ".join(thin["target"].unique())
        words.append(
            f"{len(thin)} of {len(rows)} rows ({which}) are too thin to judge: constant, fewer than 30 "
            "buckets, or less than four horizons."
        )
    return words


def _smallest(rows: pd.DataFrame) -> str:
    shown = rows[(rows["signal"] == HEADLINE_SIGNAL) & (rows["target"] == HEADLINE_TARGET)]
    detectable = (shown if len(shown) else rows)["mde"]
    return f"{detectable.min():.3f}"


def _one_ic(view: View, row: pd.Series) -> str:
    who = view.name(int(row["cluster"]))
    return f"{row['signal']} of {who} on {row['target']} {row['ic']:+.3f} {_brackets(row, '+.3f')}"


def _brackets(row: pd.Series, form: str) -> str:
    return f"[{row['ci_low']:{form}}, {row['ci_high']:{form}}]"


def _headline(view: View) -> pd.DataFrame:
    """IC rows of the headline signal and target, one per cluster."""
    return view.ic[(view.ic["signal"] == HEADLINE_SIGNAL) & (view.ic["target"] == HEADLINE_TARGET)]


def _benchmark_words(view: View) -> list[str]:
    rows = _headline(view)
    rows = rows[rows["diff"].notna()]
    if rows.empty:
        return []
    apart = int(((rows["diff_low"] > 0) | (rows["diff_high"] < 0)).sum())
    row = rows.iloc[int(rows["diff"].abs().to_numpy().argmax())]
    largest = f"{row['diff']:+.3f} [{row['diff_low']:+.3f}, {row['diff_high']:+.3f}]"
    whose = view.name(int(row["cluster"]))
    pair = f"{HEADLINE_SIGNAL} on {HEADLINE_TARGET}"
    if not apart:
        return [
            f"No cluster differs from aggregate flow ({pair}): the largest paired difference in IC is "
            f"{largest}, {whose}."
        ]
    return [
        f"{apart} of {len(rows)} clusters differ from aggregate flow ({pair}, paired bootstrap, not "
        f"corrected for the number of clusters); the largest difference in IC is {largest}, {whose}."
    ]


def needed_buckets(row: pd.Series, difference: float) -> float:
    """Buckets with which `difference` in IC is found with 80 % power, from the row's paired interval.

    n (2.80 se / difference)^2, se = interval / (2 * 1.96); null without an interval or a difference.
    """
    se = (row["diff_high"] - row["diff_low"]) / (2 * Z_95)
    return float(row["n"] * (Z_POWER * se / difference) ** 2) if difference else math.nan


def _needed_words(view: View) -> list[str]:
    gap = _published_gap(view)
    if gap is None:
        return []
    cluster, difference = gap
    rows = _headline(view)
    rows = rows[rows["cluster"] == cluster]
    buckets = needed_buckets(rows.iloc[0], difference) if len(rows) else math.nan
    if not math.isfinite(buckets):
        return []
    days = math.ceil(buckets * parse_duration(view.info["config"]["bucket"]) / US_PER_DAY)
    return [
        f"To find the published difference of {difference:+.4f} between {view.name(cluster)} and aggregate "
        f"flow with 80 % power, about {buckets:,.0f} buckets ({days:,} days) are needed; this sample has "
        f"{int(rows['n'].iloc[0]):,}."
    ]


def _published_gap(view: View) -> tuple[int, float] | None:
    """The cluster with the largest published IC, and its lead over the published benchmark."""
    published = view.info.get("published") or {}
    ics = {
        int(entry["cluster"]): float(entry["ic"])
        for entry in published.get("ic", [])
        if (entry["signal"], entry["target"]) == (HEADLINE_SIGNAL, HEADLINE_TARGET)
    }
    benchmark = ics.pop(ALL_CLUSTERS, None)
    if benchmark is None or not ics:
        return None
    best = max(ics, key=lambda cluster: ics[cluster])
    return best, ics[best] - benchmark


def _markout_words(view: View) -> list[str]:
    if view.markouts.empty:
        return []
    longest = int(view.markouts["horizon_us"].max())
    rows = view.markouts[view.markouts["horizon_us"] == longest]
    rows = rows[rows["cluster"] != ALL_CLUSTERS]
    listed = "; ".join(
        f"{view.name(int(row['cluster']))} {row['mean_bps']:+.2f} {_brackets(row, '+.2f')}"
        for _, row in rows.head(6).iterrows()
    )
    return [f"Mark-out after {format_duration(longest)} in bps, before costs: {listed}."]


def _name_words(view: View) -> list[str]:
    table = view.latest
    other = "; ".join(
        f"cluster {int(row['cluster'])} {row['label']} becomes {row['label_other']}"
        for _, row in table.iterrows()
        if row["label"] != row["label_other"]
    )
    meaning = "the taker's own side" if view.side == "own" else "the side that the trade hits"
    words = [
        f"Names follow same_side: {view.side} (sbs is the depth on {meaning}). Under {SIDES[view.side]} "
        + (f"{other}." if other else "every cluster keeps its name.")
    ]
    missing = int((table["label"] == "unassigned").sum())
    if missing:
        words.append(f"{missing} cluster(s) reach no role by the margin and are called unassigned.")
    return words


def _drop_words(view: View) -> list[str]:
    rows = view.info["rows"].get(view.symbol)
    if not rows or not rows["trades"]:
        return []
    total, kept = int(rows["trades"]), int(rows["kept"])
    reasons = ", ".join(
        f"{count:,} {_DROPS.get(reason, reason.replace('_', ' '))}"
        for reason, count in rows["dropped"].items()
        if count
    )
    dropped = f"{total - kept:,} dropped: {reasons}" if reasons else "none dropped"
    words = f"{kept:,} of {total:,} trades were used ({kept / total:.2%}), {dropped}."
    skipped = {reason: count for reason, count in rows.get("book_skipped", {}).items() if count}
    if skipped:
        listed = ", ".join(f"{count:,} {reason.replace('_', ' ')}" for reason, count in skipped.items())
        words += f" Of {int(rows['book_rows']):,} book rows these were no valid book and skipped: {listed}."
    return [words]


def _window_words(view: View) -> list[str]:
    if not view.walks:
        return []
    agrees = view.centroids["agrees"].astype("boolean")
    known, differ = int(agrees.notna().sum()), int((~agrees).sum())
    return [
        f"Over {len(set(view.centroids['window_id']))} windows the naming rule and the tracked match "
        f"disagree {differ} of {known} times; mean drift {view.centroids['drift'].mean():.3f} in z."
    ]


# ---- tables


def cluster_rows(view: View) -> list[dict[str, str]]:
    """Clusters of the last window, as text."""
    return [
        {
            "cluster": str(int(row["cluster"])),
            "label": str(row["label"]),
            f"under {SIDES[view.side]}": str(row["label_other"]),
            "count": number(row["count"], ",.0f"),
            "share": number(row["share"], ".1%"),
            "score": number(row["score"], "+.2f"),
        }
        | {name: number(row[name], "+.2f") for name in Z_FEATURES}
        for _, row in view.latest.iterrows()
    ]


def raw_rows(view: View) -> list[dict[str, str]]:
    """Mean raw features of the clusters of the last window, as text."""
    units = {"spread": view.info["config"]["spread"], "t_m": "us", "t_age": "us"}
    headings = {name: f"{name} ({units[name]})" if name in units else name for name in FEATURES}
    return [
        {"cluster": view.name(int(row["cluster"]))}
        | {headings[name]: number(row[name], ",.0f" if row[name] >= 1000 else ".4g") for name in FEATURES}
        for _, row in view.latest.iterrows()
    ]


def _meanings(view: View) -> list[str]:
    return [
        f"{view.name(int(row['cluster']))}: {row['interpretation']}"
        for _, row in view.latest.iterrows()
        if row["interpretation"]
    ]


def ic_rows(view: View) -> list[dict[str, str]]:
    """Every IC, as text, the headline target first."""
    keys = pd.DataFrame(
        {
            "headline": view.ic["target"] != HEADLINE_TARGET,
            "horizon": view.ic["horizon_us"],
            "target": view.ic["target"],
            "signal": view.ic["signal"] != HEADLINE_SIGNAL,
            "kind": view.ic["signal"],
            "aggregate": view.ic["cluster"] == ALL_CLUSTERS,
            "cluster": view.ic["cluster"],
        }
    )
    table = view.ic.loc[keys.sort_values(keys.columns.tolist(), kind="stable").index]
    return [
        {
            "signal": str(row["signal"]),
            "cluster": view.name(int(row["cluster"])),
            "target": str(row["target"]) + ("" if row["predictive"] else " (same bucket)"),
            "n": number(row["n"], ",.0f"),
            "IC": number(row["ic"], "+.4f"),
            "95 % interval": interval(row, "ci_low", "ci_high", "+.3f"),
            "rank IC": number(row["rank_ic"], "+.4f"),
            "HAC t": number(row["hac_t"], "+.2f"),
            "lags": number(row["lags"], "d"),
            "p corrected": number(row["p_fdr"], ".3f"),
            "MDE": number(row["mde"], ".3f"),
            "less benchmark": number(row["diff"], "+.4f"),
            "its 95 % interval": interval(row, "diff_low", "diff_high", "+.3f"),
            "n eff.": number(row["n_eff"], ",.0f"),
            "verdict": str(row["verdict"]),
        }
        for _, row in table.iterrows()
    ]


def markout_rows(view: View) -> list[dict[str, str]]:
    """Every mark-out, as text, the aggregate last."""
    table = view.markouts.assign(last=view.markouts["cluster"] == ALL_CLUSTERS)
    table = table.sort_values(["last", "cluster", "horizon_us"], kind="stable")
    return [
        {
            "cluster": view.name(int(row["cluster"])),
            "after": format_duration(int(row["horizon_us"])),
            "n": number(row["n"], ",.0f"),
            "mean (bps)": number(row["mean_bps"], "+.3f"),
            "95 % interval": interval(row, "ci_low", "ci_high", "+.3f"),
            "t": number(row["t"], "+.1f"),
        }
        for _, row in table.iterrows()
    ]


def published_rows(view: View) -> list[dict[str, str]]:
    """Published numbers beside the run's, cluster by cluster number."""
    published: Mapping[str, Any] = view.info.get("published") or {}
    if not published:
        return []
    trades = int(view.info["rows"].get(view.symbol, {}).get("trades", 0))
    rows = [_compared("trades", published.get("trades"), trades, ",.0f")]
    measured = view.latest.set_index("cluster")
    for entry in published.get("clusters", []):
        if entry["cluster"] not in measured.index:
            continue
        mine, who = measured.loc[entry["cluster"]], f"cluster {entry['cluster']}"
        rows.append(_compared(f"{who} name", entry["label"], mine["label"], "s"))
        rows.append(_compared(f"{who} count", entry.get("count"), mine["count"], ",.0f"))
        rows.append(_compared(f"{who} share", entry.get("share"), mine["share"], ".1%"))
        rows += [_compared(f"{who} {z}", entry.get(z), mine[z], "+.2f") for z in ("z_sbs", "z_obs", "z_t_m")]
    return rows + [_compared_ic(view, entry) for entry in published.get("ic", [])]


def _compared(what: str, published: Any, measured: Any, form: str, remark: str = "") -> dict[str, str]:
    return {
        "what": what,
        "published": number(published, form),
        "measured": number(measured, form),
        "remark": remark,
    }


def _compared_ic(view: View, entry: Mapping[str, Any]) -> dict[str, str]:
    what = f"IC of {entry['signal']} on {entry['target']}, {view.name(int(entry['cluster']))}"
    found = view.ic[
        (view.ic["cluster"] == entry["cluster"])
        & (view.ic["signal"] == entry["signal"])
        & (view.ic["target"] == entry["target"])
    ]
    if found.empty or pd.isna(found["ci_low"].iloc[0]):
        return _compared(what, entry["ic"], None, "+.4f")
    row = found.iloc[0]
    inside = row["ci_low"] <= entry["ic"] <= row["ci_high"]
    remark = (
        f"published value {'inside' if inside else 'outside'} {interval(row, 'ci_low', 'ci_high', '+.3f')}"
    )
    return _compared(what, entry["ic"], row["ic"], "+.4f", remark)


# ---- terminal


def console_tables(out: Path) -> list[Table]:
    """Per symbol: clusters, ICs of the headline target, mark-outs and, where there is one, the comparison.

    Raises InputError as `read_run`.
    """
    if page.read_info(out).get("experiment") == flow_report.EXPERIMENT:
        return flow_report.console_tables(out)
    info, views = read_run(Path(out))
    sample = info["sample"].replace("_", " ")
    tables = []
    for view in views:
        headline = [row for row in ic_rows(view) if row["target"] == HEADLINE_TARGET]
        parts = {
            "clusters": cluster_rows(view),
            f"IC on {HEADLINE_TARGET}, {sample}": [
                _without(row, "target", "lags", "n eff.") for row in headline
            ],
            "mark-outs": markout_rows(view),
            "published and measured": published_rows(view),
        }
        tables += [text_table(f"{view.symbol}: {title}", rows) for title, rows in parts.items() if rows]
    return tables


def _without(row: dict[str, str], *names: str) -> dict[str, str]:
    return {name: text for name, text in row.items() if name not in names}


# ---- page


def render_run(out: Path) -> list[Path]:
    """Write plots/*.png and report.html of a finished run; gives the files written, the page last.

    The page needs no other file, server or network.  Each file appears only when complete.
    Raises InputError as `read_run`.
    """
    out = Path(out)
    if page.read_info(out).get("experiment") == flow_report.EXPERIMENT:
        return flow_report.render(out)
    info, views = read_run(out)
    written: list[Path] = []
    sections = []
    for view in views:
        figures = ((name, make(view)) for name, make in pictures.pictures(view))
        files, images = page.draw(out, view.symbol, figures, _CAPTIONS)
        written += files
        sections.append(
            Section(
                view.symbol,
                findings(view),
                images,
                cluster_rows(view),
                _meanings(view),
                raw_rows(view),
                ic_rows(view),
                markout_rows(view),
                published_rows(view),
            )
        )
    report = out / "report.html"
    page.write(report, page.page("report.html.j2", info, sections))
    return [*written, report]

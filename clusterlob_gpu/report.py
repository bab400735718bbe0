"""What a finished run says: words, pictures and one self-contained page.

Reads the run directory of `run cluster` or `label` and nothing else.  What is said of the numbers stands in
`findings`, what is drawn of them in `pictures`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from rich.table import Table

from clusterlob_gpu import flow_report, page, sweep_report
from clusterlob_gpu.config import format_duration
from clusterlob_gpu.errors import InputError
from clusterlob_gpu.evaluation import MIXED
from clusterlob_gpu.findings import HEADLINE_SIGNAL, HEADLINE_TARGET, findings
from clusterlob_gpu.page import Drawing, Drawn, Images, ic_cells, interval, number, text_table
from clusterlob_gpu.schema import ALL_CLUSTERS, FEATURES, Z_FEATURES
from clusterlob_gpu.view import SIDES, View

EXPERIMENTS = ("cluster", "label")
"""Runs that leave the tables shown here."""
_PASSED_ON = {report.EXPERIMENT: report for report in (flow_report, sweep_report)}
"""Reports of other experiments' runs."""

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
_WIDE_IC = ("signal", "target", "HAC t", "lags", "n eff.")
"""IC columns that the terminal leaves out."""


@dataclass(frozen=True)
class Section:
    """What the page says of one symbol."""

    symbol: str
    findings: list[str]
    images: Images
    """Name, caption, PNG as base64."""
    clusters: list[dict[str, str]]
    meanings: list[str]
    raw: list[dict[str, str]]
    ic: list[dict[str, str]]
    markouts: list[dict[str, str]]
    published: list[dict[str, str]]
    window: str
    """Says that the clusters are those of the last window, where there are several."""
    pooled: bool
    """Some label held in some windows only."""
    mixed: bool
    """Some cluster's trades changed between windows."""


def read_run(out: Path) -> tuple[dict[str, Any], list[View]]:
    """run.json, and the tables of every symbol.

    Raises InputError, naming the file, if the directory is not that of a finished run.
    """
    info = page.read_info(out)
    if info.get("experiment") not in EXPERIMENTS:
        found, known = info.get("experiment"), ", ".join([*EXPERIMENTS, *_PASSED_ON])
        raise InputError(
            f"{Path(out) / 'run.json'}: experiment = {found!r}; only runs of {known} can be shown"
        )
    tables = {name: page.read_results(Path(out), name) for name in ("centroids", "buckets", "ic", "markouts")}
    tables["ic"] = tables["ic"][tables["ic"]["sample"] == info["sample"]]
    tests = int(tables["ic"]["p_fdr"].notna().sum())
    views = [
        View(symbol, info, tests=tests, **{name: _of(table, symbol) for name, table in tables.items()})
        for symbol in info["symbols"]
    ]
    return info, [view for view in views if not view.centroids.empty]


def _of(table: pd.DataFrame, symbol: str) -> pd.DataFrame:
    return table[table["symbol"] == symbol].reset_index(drop=True)


def _window(view: View) -> str:
    return f" of the last window ({view.last_days})" if view.walks else ""


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
        {"cluster": view.last_name(int(row["cluster"]))}
        | {headings[name]: number(row[name], ",.0f" if row[name] >= 1000 else ".4g") for name in FEATURES}
        for _, row in view.latest.iterrows()
    ]


def _meanings(view: View) -> list[str]:
    return [
        f"{view.last_name(int(row['cluster']))}: {row['interpretation']}"
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
            **ic_cells(row),
            "less benchmark": number(row["diff"], "+.4f"),
            "its 95 % interval": interval(row, "diff_low", "diff_high", "+.3f"),
            "n eff.": number(row["n_eff"], ",.0f"),
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
    """Per symbol: clusters, ICs of the headline pair, mark-outs and, where there is one, the comparison.

    Raises InputError as `read_run`.
    """
    other = _PASSED_ON.get(page.read_info(out).get("experiment"))
    if other is not None:
        return other.console_tables(out)
    info, views = read_run(Path(out))
    sample = info["sample"].replace("_", " ")
    tables = []
    for view in views:
        pair = (HEADLINE_SIGNAL, HEADLINE_TARGET)
        headline = [row for row in ic_rows(view) if (row["signal"], row["target"]) == pair]
        parts = {
            f"clusters{_window(view)}": cluster_rows(view),
            f"IC of {HEADLINE_SIGNAL} on {HEADLINE_TARGET}, {sample}": [
                _without(row, *_WIDE_IC) for row in headline
            ],
            "mark-outs": markout_rows(view),
            "published and measured": published_rows(view),
        }
        tables += [text_table(f"{view.symbol}: {title}", rows) for title, rows in parts.items() if rows]
    return tables


def _without(row: dict[str, str], *names: str) -> dict[str, str]:
    return {name: text for name, text in row.items() if name not in names}


# ---- page


def drawings(out: Path) -> list[Drawing]:
    """Every picture of a finished run of any experiment, to be drawn; raises InputError as `read_run`."""
    other = _PASSED_ON.get(page.read_info(out).get("experiment"))
    if other is not None:
        return other.drawings(out)
    from clusterlob_gpu import pictures

    _, views = read_run(out)
    return [
        Drawing(view.symbol, name, _CAPTIONS[name], partial(make, view))
        for view in views
        for name, make in pictures.pictures(view)
    ]


def render_run(out: Path) -> list[Path]:
    """Write plots/*.png and report.html of a finished run; gives the files written, the page last.

    The page needs no other file, server or network.  Each file appears only when complete.
    Raises InputError as `read_run`.
    """
    out = Path(out)
    other = _PASSED_ON.get(page.read_info(out).get("experiment"))
    if other is not None:
        return other.render(out)
    drawn = Drawn(out, drawings)
    info, views = read_run(out)
    sections = []
    for view in views:
        sections.append(
            Section(
                view.symbol,
                findings(view),
                partial(drawn.images, view.symbol),
                cluster_rows(view),
                _meanings(view),
                raw_rows(view),
                ic_rows(view),
                markout_rows(view),
                published_rows(view),
                _window(view),
                view.pooled,
                bool((view.ic["verdict"] == MIXED).any()),
            )
        )
    report = out / "report.html"
    page.write(report, page.page("report.html.j2", info, sections))
    return [*drawn.files, report]

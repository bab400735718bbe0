"""What a finished taker-flow run says: words, pictures and one self-contained page; see `report`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from rich.table import Table

from clusterlob_gpu import page
from clusterlob_gpu.config import format_duration
from clusterlob_gpu.flow_evaluation import LARGE, SMALL, TOTAL
from clusterlob_gpu.flow_view import NAMES, FlowView, signal_name
from clusterlob_gpu.page import Drawing, Drawn, Images, ic_cells, interval, number, text_table
from clusterlob_gpu.regression import CONTROLLED, INTERACTED, INTERACTION

EXPERIMENT = "flow"
TABLES = (
    "ic",
    "ic_differences",
    "quantiles",
    "spreads",
    "regressions",
    "regimes",
    "stability",
    "backtest",
    "backtest_path",
)
WANTED_IC = 0.02
"""An IC that would be worth having: how much data would show it?"""

_CAPTIONS = {
    "ic": "IC of large, small and total flow, against the smallest IC that could be found.",
    "ic_decay": "The same signals at every horizon.",
    "ic_factors": "Every factor of the bars.",
    "quantiles": "Is the return higher where the flow was higher?",
    "regimes": "Does it depend on the state of the market?",
    "stability": "Does it last?",
    "backtest": "What a book would have made, before and after costs.",
}


@dataclass(frozen=True)
class Section:
    """What the page says of one symbol."""

    symbol: str
    findings: list[str]
    images: Images
    """Name, caption, PNG as base64."""
    tables: list[tuple[str, list[dict[str, str]], bool]]
    """Heading, rows, and whether it is open."""


def read_run(out: Path) -> tuple[dict[str, Any], list[FlowView]]:
    """run.json, and the tables of every symbol that has bars; raises InputError naming a missing file."""
    info = page.read_info(out)
    tables = {name: page.read_results(Path(out), name) for name in TABLES}
    tests = {name: int(tables[name]["p_fdr"].notna().sum()) for name in ("ic", "regimes")}
    views = []
    for symbol in info["symbols"]:
        mine = {name: table[table["symbol"] == symbol] for name, table in tables.items()}
        if len(mine["ic"]):
            views.append(FlowView(symbol, info, mine, tests))
    return info, views


# ---- words


def findings(view: FlowView) -> list[str]:
    """What may be concluded for one symbol, most important first; one sentence or a few each."""
    return [
        *_answer_words(view),
        *_difference_words(view),
        *_spread_words(view),
        *_regression_words(view),
        *_slice_words(view, "regimes"),
        *_month_words(view),
        *_book_words(view),
        *_test_words(view),
        *_size_words(view),
        *_row_words(view),
    ]


def _answer_words(view: FlowView) -> list[str]:
    """Does large taker flow predict the longest horizon's return?"""
    row = view.rows("ic", target=view.target, signal=LARGE).iloc[0]
    question = f"Does large taker flow predict the return of the next {format_duration(view.horizon_us)}?"
    if row["verdict"] == "thin":
        return [f"{question} This sample cannot tell: {int(row['n']):,} bars have both (thin)."]
    measured = (
        f"IC {row['ic']:+.4f}, 95 % {interval(row, 'ci_low', 'ci_high', '+.4f')}, HAC t {row['hac_t']:+.2f}, "
        f"p {row['hac_p']:.3f}, corrected for all signals tested {row['p_fdr']:.3f}"
    )
    answers = {
        "positive": "Yes, in this sample: more large buying was followed by higher returns",
        "negative": "Yes, but the other way: more large buying was followed by lower returns",
        "undecided": "Not distinguishably from zero",
    }
    words = [f"{question} {answers[row['verdict']]} ({measured}; n = {int(row['n']):,} bars)."]
    if row["verdict"] == "undecided":
        words.append(
            f"The smallest IC that this sample would find with 80 % power, before correction, is "
            f"{row['mde']:.3f}: undecided is not evidence of no effect. An IC of {WANTED_IC} would need "
            f"about {needed_days(row, view):,} days of such bars."
        )
    return words


def needed_days(row: pd.Series, view: FlowView) -> int:
    """Days of bars with which WANTED_IC is found with 80 % power: n (mde / wanted)^2, as many bars a day."""
    days = max(int(view.info["days"]), 1)
    return math.ceil(days * (row["mde"] / WANTED_IC) ** 2)


def _difference_words(view: FlowView) -> list[str]:
    words = []
    for other in (SMALL, TOTAL):
        for _, row in view.rows(
            "ic_differences", target=view.target, signal=LARGE, benchmark=other
        ).iterrows():
            if row["thin"]:
                continue
            verdict = {"larger": "higher than", "smaller": "lower than"}.get(
                str(row["verdict"]), "not distinguishable from"
            )
            words.append(
                f"the IC of large flow is {verdict} that of {NAMES[other]} flow (paired difference "
                f"{row['diff']:+.4f}, 95 % {interval(row, 'diff_low', 'diff_high', '+.4f')})"
            )
    return ["On the same bars and after correction, " + "; ".join(words) + "."] if words else []


def _spread_words(view: FlowView) -> list[str]:
    row = view.rows("spreads", target=view.target, signal=LARGE).iloc[0]
    if pd.isna(row["spread_bps"]):
        return ["Quantiles of large flow: too few bars lie after the first edges."]
    return [
        f"Top minus bottom quantile of large flow: {row['spread_bps']:+.2f} bps, 95 % "
        f"{interval(row, 'ci_low', 'ci_high', '+.2f')}, t {row['t']:+.2f}; rank correlation of quantile and "
        f"mean {number(row['monotonicity'], '+.2f')}; before costs, one of {len(view.tables['spreads'])} "
        "spreads, not corrected for their number."
    ]


def _regression_words(view: FlowView) -> list[str]:
    rows = view.rows("regressions", target=view.target, signal=LARGE)
    words = []
    for _, row in rows[(rows["model"] == CONTROLLED) & (rows["term"] == LARGE)].iterrows():
        if pd.isna(row["t"]):
            words.append("The regression with controls could not be made.")
        else:
            words.append(
                f"With controls, one standard deviation of large flow goes with {row['coef_bps']:+.2f} bps "
                f"(t {row['t']:+.2f}, p {row['p']:.3f}); it adds {row['incremental_r2']:.5f} to R2 "
                f"({int(row['dropped']):,} bars without a control left out)."
            )
        if row["notes"]:
            words.append(f"Controls left out: {row['notes']}.")
    for _, row in rows[(rows["model"] == INTERACTED) & (rows["term"] == INTERACTION)].iterrows():
        words.append(
            f"Thin liquidity changes the slope by {1e4 * row['coef']:+.2f} bps per unit of imbalance "
            f"(t {row['t']:+.2f}, p {row['p']:.3f})."
        )
    return words


def _slice_words(view: FlowView, table: str) -> list[str]:
    rows = view.tables[table]
    tested = int(rows["p_fdr"].notna().sum())
    sure = rows[rows["verdict"].isin(["larger", "smaller"])]
    if not tested:
        return []
    if sure.empty:
        return [f"No regime differs from the rest in IC after {_corrected(view, table, tested)}."]
    listed = "; ".join(
        f"{signal_name(row['signal'])} on {row['target']}, {_slice_name(row)}: {row['ic']:+.3f} against "
        f"{row['ic_rest']:+.3f}"
        for _, row in sure.head(4).iterrows()
    )
    more = "; and others" if len(sure) > 4 else ""
    return [
        f"{len(sure)} of {tested} comparisons of a regime with the rest hold after "
        f"{_corrected(view, table, tested)}: {listed}{more}."
    ]


def _corrected(view: FlowView, table: str, mine: int) -> str:
    tests = view.tests[table]
    return f"correction for {tests} tests" + (" of all symbols" if mine < tests else "")


def _slice_name(row: pd.Series) -> str:
    by = str(row["by"]).replace("_regime", "").replace("_", " ")
    return f"{by} {row['bucket']}"


def _month_words(view: FlowView) -> list[str]:
    rows = view.rows("stability", by="month", target=view.target, signal=LARGE)
    rows = rows[~rows["thin"].astype(bool)]
    if len(rows) < 2:
        return []
    positive = int((rows["ic"] > 0).sum())
    return [f"The IC of large flow is positive in {positive} of {len(rows)} months."]


def _book_words(view: FlowView) -> list[str]:
    row = view.rows("backtest", horizon_us=view.horizon_us, signal=LARGE, rule="sign").iloc[0]
    if not row["bars"]:
        return ["The book on large flow never traded."]
    doubt = "" if row["gross_p"] < 0.05 else ", not distinguishable from zero"
    even = row["breakeven_fee_bps"]
    earns = f"breaks even at a fee of {even:.2f} bps per side" if even > 0 else "loses even without a fee"
    return [
        f"Long/short book on the sign of large flow, {row['sleeves']} sleeves, {row['days']:.1f} days: gross "
        f"{row['gross']:+.2%} (t {row['gross_t']:+.2f}{doubt}), net {row['net']:+.2%} after a fee of "
        f"{row['fee_bps']:g} bps, slippage of {row['slippage_bps']:g} bps and half the spread per side; "
        f"turnover {row['turnover']:.1f} books a day; it {earns}. Sharpe net "
        f"{row['sharpe_net']:+.1f} (365 days), {row['sharpe_lo_net']:+.1f} corrected for autocorrelation; "
        f"largest drawdown {row['max_drawdown']:.2%}."
    ]


def _test_words(view: FlowView) -> list[str]:
    rows = view.tables["ic"]
    tests = int(rows["p_fdr"].notna().sum())
    sure = rows[rows["verdict"].isin(["positive", "negative"])]
    words = []
    if tests and sure.empty:
        words.append(
            f"None of the {tests} ICs of all factors and sums differs from zero after "
            f"{_corrected(view, 'ic', tests)}."
        )
    elif tests:
        best = sure.reindex(sure["hac_p"].sort_values(kind="stable").index).head(5)
        listed = "; ".join(
            f"{signal_name(row['signal'])} on {row['target']} {row['ic']:+.3f} "
            f"[{row['ci_low']:+.3f}, {row['ci_high']:+.3f}]"
            for _, row in best.iterrows()
        )
        more = "; and others" if len(sure) > 5 else ""
        words.append(
            f"{len(sure)} of {tests} ICs differ from zero after {_corrected(view, 'ic', tests)}: "
            f"{listed}{more}."
        )
    thin = int((rows["verdict"] == "thin").sum())
    if thin:
        words.append(f"{thin} of {len(rows)} ICs are too thin to judge: constant, or too few bars.")
    return words


def _size_words(view: FlowView) -> list[str]:
    """What is large, under each unit that the run looked at."""
    sets = view.info.get("large_set", {}).get(view.symbol, {})
    shares = [
        f"{values['count_share']:.1%} of the {unit}s and {values['notional_share']:.1%} of their notional"
        for unit, values in sets.items()
        if number(values.get("count_share"), "f") != page.NOTHING
    ]
    return [f"Large were {', against '.join(shares)}."] if shares else []


def _row_words(view: FlowView) -> list[str]:
    rows = view.info.get("rows", {}).get(view.symbol)
    if not rows or not rows["trades"]:
        return []
    trades, unknown, orders = (int(rows[name]) for name in ("trades", "side_unknown", "orders"))
    words = f"{trades:,} trades were used"
    if orders < trades:
        words += f", put together to {orders:,} orders"
    words += f"; {unknown:,} of unknown side count as volume, in no imbalance." if unknown else "."
    skipped = page.counted(rows["book_skipped"])
    if skipped:
        words += f" Of {int(rows['book_rows']):,} book rows these were no valid book and skipped: {skipped}."
    return [words]


# ---- tables


def ic_rows(view: FlowView) -> list[dict[str, str]]:
    """Every IC, as text, the longest horizon first."""
    table = view.tables["ic"].sort_values("horizon_us", ascending=False, kind="stable")
    return [
        {
            "signal": signal_name(row["signal"]),
            "target": str(row["target"]),
            **ic_cells(row),
            "n eff.": number(row["n_eff"], ",.0f"),
            "every H-th bar": number(row["non_overlap_mean"], "+.4f"),
            "daily t": number(row["daily_ic_t"], "+.2f"),
        }
        for _, row in table.iterrows()
    ]


def difference_rows(view: FlowView) -> list[dict[str, str]]:
    """Paired differences in IC, as text."""
    return [
        {
            "signal": signal_name(row["signal"]),
            "less": signal_name(row["benchmark"]),
            "target": str(row["target"]),
            "n": number(row["n"], ",.0f"),
            "difference": number(row["diff"], "+.4f"),
            "95 % interval": interval(row, "diff_low", "diff_high", "+.3f"),
            "p corrected": number(row["p_fdr"], ".3f"),
            "verdict": str(row["verdict"]),
        }
        for _, row in view.tables["ic_differences"].iterrows()
    ]


def spread_rows(view: FlowView) -> list[dict[str, str]]:
    """Top minus bottom spreads, as text."""
    return [
        {
            "signal": signal_name(row["signal"]),
            "target": str(row["target"]),
            "n top": number(row["n_top"], ",d"),
            "n bottom": number(row["n_bottom"], ",d"),
            "spread (bps)": number(row["spread_bps"], "+.2f"),
            "95 % interval": interval(row, "ci_low", "ci_high", "+.2f"),
            "t": number(row["t"], "+.2f"),
            "monotonicity": number(row["monotonicity"], "+.2f"),
            "hit rate": number(row["hit_rate"], ".1%"),
            "turnover per bar": number(row["turnover"], ".3f"),
            "zero flow": number(row["zero"], ",d"),
            "null": number(row["null"], ",d"),
            "warm-up": number(row["warmup"], ",d"),
        }
        for _, row in view.tables["spreads"].iterrows()
    ]


def regression_rows(view: FlowView, every_term: bool = False) -> list[dict[str, str]]:
    """Regressions, as text: the signal and its interaction, or every term."""
    table = view.tables["regressions"]
    if not every_term:
        table = table[(table["term"] == table["signal"]) | (table["term"] == INTERACTION)]
    return [
        {
            "signal": signal_name(row["signal"]),
            "target": str(row["target"]),
            "model": str(row["model"]),
            "term": signal_name(row["term"]),
            "n": number(row["n"], ",d"),
            "dropped": number(row["dropped"], ",d"),
            "bps per std": number(row["coef_bps"], "+.2f"),
            "t": number(row["t"], "+.2f"),
            "p": number(row["p"], ".3f"),
            "VIF": number(row["vif"], ".1f"),
            "added R2": number(row["incremental_r2"], ".5f"),
            "partial IC": number(row["partial_ic"], "+.4f"),
            "condition": number(row["condition_number"], ".1f"),
        }
        for _, row in table.iterrows()
    ]


def slice_rows(view: FlowView, table: str) -> list[dict[str, str]]:
    """ICs by slice, as text."""
    return [
        {
            "by": str(row["by"]).replace("_regime", "").replace("_", " "),
            "slice": str(row["bucket"]),
            "signal": signal_name(row["signal"]),
            "target": str(row["target"]),
            "n": number(row["n"], ",d"),
            "IC": number(row["ic"], "+.4f"),
            "95 % interval": interval(row, "ci_low", "ci_high", "+.3f"),
            "rest": number(row["ic_rest"], "+.4f"),
            "difference": number(row["diff"], "+.4f"),
            "its 95 % interval": interval(row, "diff_low", "diff_high", "+.3f"),
            "p corrected": number(row["p_fdr"], ".3f"),
            "difference is": str(row["verdict"]),
        }
        for _, row in view.tables[table].iterrows()
    ]


def book_rows(view: FlowView) -> list[dict[str, str]]:
    """Books, as text, the longest horizon first."""
    table = view.tables["backtest"].sort_values("horizon_us", ascending=False, kind="stable")
    return [
        {
            "signal": signal_name(row["signal"]),
            "held": format_duration(int(row["horizon_us"])),
            "rule": str(row["rule"]),
            "gross": number(row["gross"], "+.2%"),
            "net": number(row["net"], "+.2%"),
            "gross t": number(row["gross_t"], "+.2f"),
            "Sharpe gross": number(row["sharpe_gross"], "+.2f"),
            "Sharpe net": number(row["sharpe_net"], "+.2f"),
            "net, Lo": number(row["sharpe_lo_net"], "+.2f"),
            "Sortino": number(row["sortino"], "+.2f"),
            "Calmar": number(row["calmar"], "+.2f"),
            "drawdown": number(row["max_drawdown"], ".2%"),
            "hit rate": number(row["hit_rate"], ".1%"),
            "books a day": number(row["turnover"], ".1f"),
            "break-even fee (bps)": number(row["breakeven_fee_bps"], "+.2f"),
        }
        for _, row in table.iterrows()
    ]


def _short(rows: Sequence[dict[str, str]], *left_out: str) -> list[dict[str, str]]:
    """Rows of large, small and total flow of one bar, without the columns left out."""
    kept = [row for row in rows if row["signal"] in NAMES.values()]
    return [{name: text for name, text in row.items() if name not in left_out} for row in kept]


# ---- terminal and page


def console_tables(out: Path) -> list[Table]:
    """Per symbol: ICs, differences, spreads, regressions and books of one bar of flow.

    Raises InputError as `read_run`.
    """
    _, views = read_run(Path(out))
    tables = []
    for view in views:
        parts = {
            "IC": _short(ic_rows(view), "lags", "n eff.", "every H-th bar", "daily t"),
            "paired differences in IC": _short(difference_rows(view)),
            "top minus bottom quantile": _short(spread_rows(view), "zero flow", "null", "warm-up"),
            "regressions": _short(regression_rows(view)),
            "long/short books": _short(book_rows(view), "Sortino", "Calmar"),
        }
        tables += [text_table(f"{view.symbol}: {title}", rows) for title, rows in parts.items() if rows]
    return tables


def drawings(out: Path) -> list[Drawing]:
    """Every picture of a finished run, to be drawn; raises InputError as `read_run`."""
    from clusterlob_gpu import flow_pictures

    _, views = read_run(out)
    return [
        Drawing(view.symbol, name, _CAPTIONS[name], partial(make, view))
        for view in views
        for name, make in flow_pictures.pictures(view)
    ]


def render(out: Path) -> list[Path]:
    """Write plots/*.png and report.html of a finished run; gives the files written, the page last.

    Raises InputError as `read_run`.
    """
    drawn = Drawn(out, drawings)
    info, views = read_run(out)
    sections = []
    for view in views:
        tables = [
            ("Information coefficients", ic_rows(view), True),
            ("Paired differences in IC", difference_rows(view), False),
            ("Top minus bottom quantile", spread_rows(view), False),
            ("Regressions: flow and its interaction with thin liquidity", regression_rows(view), False),
            ("Regressions: every term", regression_rows(view, every_term=True), False),
            ("IC by regime", slice_rows(view, "regimes"), False),
            ("IC by symbol, month, volatility and liquidity", slice_rows(view, "stability"), False),
            ("Long/short books", book_rows(view), True),
        ]
        sections.append(
            Section(
                view.symbol, findings(view), partial(drawn.images, view.symbol), [t for t in tables if t[1]]
            )
        )
    report = out / "report.html"
    page.write(report, page.page("flow.html.j2", info, sections))
    return [*drawn.files, report]

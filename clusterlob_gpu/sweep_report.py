"""What a finished sweep says: words, pictures and one self-contained page; see `report`.

A sweep searches, and the best of many tests is large by choice.  So the page counts what was tried, says what
chance alone would have given, and calls only that a result which stands after correction for all of it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from rich.table import Table

from clusterlob_gpu import page
from clusterlob_gpu.evaluation import LEVEL
from clusterlob_gpu.flow_report import Section
from clusterlob_gpu.flow_view import signal_name
from clusterlob_gpu.page import Drawing, Drawn, interval, number, text_table
from clusterlob_gpu.plain_statistics import normal_quantile
from clusterlob_gpu.schema import ALL_CLUSTERS
from clusterlob_gpu.sweep_view import (
    STANDING,
    TITLES,
    Headline,
    SweepView,
    capital,
    count_text,
    counted_tests,
    headlines,
    is_standing,
    read_run,
    value_text,
)

EXPERIMENT = "sweep"
MAX_TRIALS, SHOWN_TRIALS = 40, 20
"""Of more trials than the first the terminal shows the second number, the strongest."""
MAX_ROWS = 200
"""Rows of a table on the page; the tables themselves have all."""
MIN_P_VALUES = 20
"""Fewer tests than this have no distribution worth drawing."""


# ---- words


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
    repeated = len(counted_tests(view.rows)) - len(tests)
    evaluations = count_text(len(view.evaluations), "distinct evaluation")
    words = (
        f"{count_text(len(view.trials), 'trial')}, of which {failed or 'none'} failed, gave {evaluations} "
        f"with {count_text(len(tests), 'distinct test')}"
    )
    if repeated:
        words += (
            f"; {repeated:,} further ones only repeat the numbers of another, untouched by what was varied"
        )
    return [words + "."]


def _standing_words(view: SweepView) -> list[str]:
    tests = view.tests
    if tests.empty:
        return ["Nothing could be tested."]
    sure = tests[is_standing(tests)]
    alone = int(tests["verdict_alone"].isin(STANDING).sum())
    corrected = f"correction for all {count_text(len(tests), 'test')} of the sweep"
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
    return -normal_quantile((1 - 0.5 ** (1 / tests)) / 2)


def _best_words(view: SweepView) -> list[str]:
    tests = view.tests
    if tests.empty:
        return []
    best = tests.iloc[0]
    return [
        f"The strongest test is {name_of(best, view)} in trial {int(best['trial'])}: IC {best['ic']:+.4f}, "
        f"95 % {interval(best, 'ci_low', 'ci_high', '+.4f')}, HAC t {best['hac_t']:+.2f}, corrected p "
        f"{best['p_fdr']:.3f} ({best['verdict']}). It is the best of {len(tests):,}, so its IC is biased "
        "upwards, and its interval does not know that it was chosen. Of as many independent tests of noise "
        f"the strongest passes |t| = {median_largest_t(len(tests)):.2f} half of the time."
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
    words = f"{capital(TITLES[headline.experiment])}, {headline.pair}{over}: "
    panels = headline.rows.groupby("panel", sort=False)
    return words + "; ".join(_panel_words(rows) for _, rows in panels) + "."


def _panel_words(rows: pd.DataFrame) -> str:
    low, high = rows["ic"].min(), rows["ic"].max()
    name, span = rows["panel"].iloc[0], number(low, "+.3f")
    if high > low:
        span += f" to {high:+.3f}"
    return f"{name} {span}, {int(is_standing(rows).sum())} of {len(rows)} stand"


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
    tests = counted_tests(view.ic)
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
    return value_text(json.loads(value)) if isinstance(value, str) else page.NOTHING


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
    sure = tests[is_standing(tests)]
    weak = tests[~is_standing(tests)]
    for heading, every, rows, is_open in (
        ("Failed trials", len(view.failed), failed_rows(view), True),
        ("Finished trials", done, trial_rows(view, trials), len(trials) <= MAX_TRIALS),
        ("Tests that stand", len(sure), rows_of(view, sure.head(MAX_ROWS)), len(sure) <= MAX_TRIALS),
        ("Tests that do not stand", len(weak), rows_of(view, weak.head(SHOWN_TRIALS)), False),
    ):
        if rows:
            yield _heading(heading, len(rows), every), rows, is_open


# ---- terminal and page


def console_tables(out: Path) -> list[Table]:
    """Failed trials, finished trials, how much was searched, and the strongest tests.

    Raises InputError as `read_run`.
    """
    view = read_run(Path(out))
    trials, tests = _strongest_trials(view, MAX_TRIALS, SHOWN_TRIALS), view.tests
    done = len(view.trials) - len(view.failed)
    best = tests.head(10)
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
        "stand in the sweep": number(int(is_standing(tests).sum()), ",d"),
    }


def drawings(out: Path) -> list[Drawing]:
    """Every picture of a finished sweep, to be drawn; raises InputError as `read_run`."""
    from clusterlob_gpu import sweep_pictures

    view = read_run(out)
    made = []
    if len(view.tests) >= MIN_P_VALUES:
        caption = "Are there more small p-values than chance gives?"
        made.append(Drawing(EXPERIMENT, "p_values", caption, partial(sweep_pictures.p_values, view)))
    return made + [
        Drawing(symbol, name, caption, make)
        for symbol in view.symbols
        for name, caption, make in sweep_pictures.symbol_pictures(headlines(view, symbol))
    ]


def render(out: Path) -> list[Path]:
    """Write plots/*.png and report.html of a finished sweep; gives the files written, the page last.

    Raises InputError as `read_run`.
    """
    out = Path(out)
    drawn = Drawn(out, drawings)
    view = read_run(out)
    sections = [
        Section("All trials", findings(view), partial(drawn.images, EXPERIMENT), list(_tables(view))),
        *(_symbol_section(drawn, view, symbol) for symbol in view.symbols),
    ]
    report = out / "report.html"
    page.write(report, page.page("sweep.html.j2", _page_info(view), sections))
    return [*drawn.files, report]


def _symbol_section(drawn: Drawn, view: SweepView, symbol: str) -> Section:
    found = headlines(view, symbol)
    words = [headline_words(headline) for headline in found]
    tables = [
        (f"{capital(TITLES[h.experiment])}: IC of {h.pair} ({len(rows)})", rows, False)
        for h in found
        if (rows := _headline_rows(h))
    ]
    return Section(symbol, words or ["No headline IC."], partial(drawn.images, symbol), tables)


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

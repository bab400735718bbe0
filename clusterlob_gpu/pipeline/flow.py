"""The taker-flow experiment: its check and its results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from clusterlob_gpu import flow_bars, flow_evaluation
from clusterlob_gpu.days import BookDay
from clusterlob_gpu.pipeline import trials
from clusterlob_gpu.pipeline.flow_parts import FlowRequest, FlowRun, bar_days, prepare_flow
from clusterlob_gpu.pipeline.run import (
    Bad,
    Outcome,
    SymbolRun,
    Work,
    added,
    check_range,
    execute,
    fingerprint,
    missing_notes,
)
from clusterlob_gpu.pipeline.stages import Stages
from clusterlob_gpu.workers import Workers


@dataclass(frozen=True)
class FlowExperiment:
    """`run flow`."""

    name: str = "flow"

    def check(self, request: FlowRequest, bad: Bad) -> list[FlowRun]:
        """`check_range`."""
        return check_flow(request, bad)

    def compute(self, request: FlowRequest, runs: list[FlowRun], work: Work) -> Outcome:
        """Every result of a checked request."""
        (parts,), markets = prepare_flow(request, [request.config], runs, work)
        plain = _trade_bars(runs, request, work.stages) if request.config.unit == "order" else {}
        with work.clock.stage("evaluate"):
            tables = trials.tables_of(parts, work.stages)
            tables = flow_evaluation.judge_tables(tables)
        bars = tables["features"]
        summary = {
            "sample": "out_of_sample",
            "rows": {run.name: _row_counts(run, request) for run in runs},
            "large_set": {run.name: _large_sets(bars, run, request, plain) for run in runs},
            "notes": _notes(request, runs, markets, work.bad),
            "markets": {name: fingerprint(run) for name, run in markets.items()},
        }
        asked = request.config.markets
        seen = {name: markets[name].lake.seen() if name in markets else None for name in asked}
        return Outcome(tables, summary, _headline(tables["ic"]), seen)

    def expected(self, _: FlowRequest, runs: Sequence[FlowRun]) -> dict[str, int]:
        """Every day of the range is reduced and cut into bars; a symbol has tables."""
        count = sum(len(run.wanted) for run in runs)
        return {"book": count, "trades": count, "bars": count, "states": count, "tables": len(runs)}


FLOW = FlowExperiment()


def run_flow(request: FlowRequest, workers: Workers) -> Path:
    """Run the whole experiment and return the output directory."""
    return execute(request, FLOW, workers)


def check_flow(request: FlowRequest, bad: Bad) -> list[FlowRun]:
    """The runs of a request."""
    return [FlowRun(run.lake, run.wanted, run.missing) for run in check_range(request, bad)]


def _row_counts(run: FlowRun, request: FlowRequest) -> dict[str, Any]:
    inside = [day for day in request.days if day in run.trades[request.config.unit]]
    made = [run.trades[request.config.unit][day] for day in inside]
    books: list[BookDay] = [run.books[day] for day in request.days if day in run.books]
    trades, unknown = sum(day.trades for day in made), sum(day.unknown for day in made)
    return {
        "trades": trades,
        "kept": trades,
        "dropped": {},
        "side_unknown": unknown,
        "orders": sum(day.takers for day in made),
        "book_rows": sum(book.rows + sum(book.skipped.values()) for book in books),
        "book_skipped": added([book.skipped for book in books]) if books else {},
    }


def _trade_bars(runs: Sequence[FlowRun], request: FlowRequest, stages: Stages) -> dict[str, pd.DataFrame]:
    """Bars of trades as given, by symbol, beside those of rebuilt orders."""
    held = bar_days(runs, request, "trade", stages)
    return {
        name: pd.concat([made.table(stages.store, 0) for _, made in days_ if made], ignore_index=True)
        for name, days_ in held.items()
    }


def _large_sets(
    bars: pd.DataFrame, run: FlowRun, request: FlowRequest, plain: Mapping[str, pd.DataFrame]
) -> dict[str, dict[str, float]]:
    """What is large under the run's unit; with unit = order, beside the same for trades as given."""
    config = request.config
    mine = bars[bars["symbol"] == run.name]
    found: dict[str, dict[str, float]] = {config.unit: flow_bars.large_set(mine)}
    if run.name in plain:
        other = plain[run.name]
        both = mine[mine["large_count"].notna()].merge(other[other["large_count"].notna()], on="bar_ts")
        for unit, table in ((config.unit, mine), ("trade", other)):
            found[unit] = flow_bars.large_set(table[table["bar_ts"].isin(both["bar_ts"])])
    return found


def _notes(
    request: FlowRequest, runs: Sequence[FlowRun], markets: Mapping[str, SymbolRun], bad: Bad
) -> list[str]:
    notes = missing_notes(runs, bad)
    absent = [name for name in request.config.markets if name not in markets]
    if absent:
        notes.append(f"the lake has no {', '.join(absent)} of {request.exchange}: no such market control")
    for run in runs:
        gaps = [day for day in request.days if not run.lake.has("derivative_ticker", day)]
        if gaps:
            when = "" if len(gaps) == len(request.days) else f" on {', '.join(map(str, gaps))}"
            notes.append(f"{run.name}: no derivative_ticker{when}, so open interest and funding are null")
    return notes


def _headline(ic: pd.DataFrame) -> dict[str, float | None]:
    """What the ledger says of a finished run: IC of large, small and total flow."""
    flows = (flow_evaluation.LARGE, flow_evaluation.SMALL, flow_evaluation.TOTAL)
    main = ic[ic["signal"].isin(flows)]
    columns = (main[name].tolist() for name in ("symbol", "signal", "target", "ic"))
    return {
        f"{symbol} ic {target} {signal}": round(ic, 6) if np.isfinite(ic) else None
        for symbol, signal, target, ic in zip(*columns, strict=True)
    }

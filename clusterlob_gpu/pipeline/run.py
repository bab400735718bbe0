"""What every experiment shares: the request, its check against the lake, the books, the record.

A run is planned and checked before anything is computed or written.  Its output appears under its
name only when it is whole; the ledger gets a line whether it succeeds or not.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Generic

import pandas as pd

from clusterlob_gpu import __version__, report
from clusterlob_gpu.clustering import Model
from clusterlob_gpu.config import Config, RunConfig, config_hash
from clusterlob_gpu.context import BookCarry
from clusterlob_gpu.days import BookDay, DayJob
from clusterlob_gpu.errors import InputError, LakeError
from clusterlob_gpu.lake.native import SymbolLake, days_between, open_symbol
from clusterlob_gpu.store import RunDirectory, append_ledger
from clusterlob_gpu.workers import Workers


@dataclass(frozen=True, kw_only=True)
class RunRequest(Generic[Config]):
    """What the user asked for."""

    lake: Path
    exchange: str
    symbols: tuple[str, ...]
    start: date
    end: date
    out: Path
    config: Config
    store: Path | None = None
    backend: str = "cpu"
    models: Mapping[str, Model] | None = None
    """Models by symbol that label the days; None fits them."""
    published: dict[str, Any] | None = None
    pictures: bool = True

    @property
    def days(self) -> list[date]:
        """Every day of the range."""
        return days_between(self.start, self.end)

    @property
    def artefacts(self) -> Path:
        """Folder of the day artefacts."""
        return self.store or self.out.absolute().parent / "store"

    @property
    def hash(self) -> str:
        """Hash of what was asked for: config, symbols, range and given models."""
        asked = {"exchange": self.exchange, "symbols": self.symbols, "start": self.start, "end": self.end}
        if self.models is not None:
            asked["models"] = {name: model.as_json() for name, model in self.models.items()}
        return config_hash({"config": self.config.resolved()} | asked)


@dataclass
class SymbolRun:
    """A symbol on its way through the stages."""

    lake: SymbolLake
    wanted: list[date]
    """Days of the range on which the lake has trades and book."""
    missing: list[date]
    books: dict[date, BookDay] = field(default_factory=dict)
    carries: dict[date, BookCarry | None] = field(default_factory=dict)
    """Book state at the start of each day."""
    read: dict[str, set[date]] = field(default_factory=dict)
    """Days that the run has read, by table."""

    @property
    def name(self) -> str:
        """Name of the instrument."""
        return self.lake.symbol.name

    def has_read(self, table: str, days_: Iterable[date]) -> None:
        """Take note of days that were read."""
        self.read.setdefault(table, set()).update(days_)

    def job(self, request: RunRequest[Config], day: date) -> DayJob[Config]:
        """What the tasks of a day need to know."""
        return DayJob(self.lake, request.artefacts, request.config, day)


class Clock:
    """Seconds by stage."""

    def __init__(self) -> None:
        self.started_at = datetime.now(UTC)
        self.started = time.perf_counter()
        self.stages: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time of the block to a stage."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.stages[name] = self.stages.get(name, 0.0) + time.perf_counter() - began

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self.started


@dataclass(frozen=True)
class Outcome:
    """What an experiment computed: tables by name, more for run.json, and its line in the ledger."""

    tables: dict[str, pd.DataFrame]
    summary: dict[str, Any]
    headline: dict[str, float | None]


def check_range(request: RunRequest[RunConfig]) -> list[SymbolRun]:
    """The symbols and days of a request, checked against the lake.

    Raises LakeError naming the first day without trades or book (unless on_bad_day is skip) and
    InputError where the range is empty or the output cannot be written.
    """
    RunDirectory(request.out)
    if request.end < request.start:
        raise InputError(f"--end {request.end} lies before --start {request.start}")
    repeated = [name for name in request.symbols if request.symbols.count(name) > 1]
    if repeated:
        raise InputError(f"--symbol {repeated[0]}: given twice")
    return [_check_symbol(request, name) for name in request.symbols]


def _check_symbol(request: RunRequest[RunConfig], name: str) -> SymbolRun:
    lake = open_symbol(request.lake, request.exchange, name)
    tables = ("trades", request.config.book)
    gaps = {day: [table for table in tables if not lake.has(table, day)] for day in request.days}
    missing = [day for day in request.days if gaps[day]]
    wanted = [day for day in request.days if not gaps[day]]
    if missing and request.config.on_bad_day == "fail":
        raise LakeError(lake.absent(gaps[missing[0]][0], missing[0]))
    if not wanted:
        raise LakeError(f"{lake.absent(gaps[missing[0]][0], missing[0])}; no day of the range is left")
    return SymbolRun(lake, wanted, missing)


def execute(
    request: RunRequest[RunConfig],
    experiment: str,
    runs: Sequence[SymbolRun],
    workers: Workers,
    compute: Callable[[RunDirectory, Clock], Outcome],
) -> Path:
    """Compute, write, draw and publish a run, and add it to the ledger; gives the output folder."""
    clock = Clock()
    try:
        with RunDirectory(request.out) as directory:
            outcome = compute(directory, clock)
            for name, table in outcome.tables.items():
                directory.write_table(name, table)
            summary = _summary(request, experiment, runs, workers, clock) | outcome.summary
            directory.write_run(summary)
            if request.pictures:
                with clock.stage("report"):
                    report.render_run(directory.work)
            directory.write_run(summary | {"timings": clock.stages, "seconds": clock.seconds})
            directory.publish()
    except BaseException as error:
        status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        with suppress(OSError):  # a full disk must not hide what went wrong first
            problem = f"{type(error).__name__}: {error}"
            _record(request, experiment, clock, {"status": status, "error": problem})
        raise
    rows = {name: counts["kept"] for name, counts in outcome.summary["rows"].items()}
    _record(request, experiment, clock, {"status": "done", "headline": outcome.headline, "rows": rows})
    return request.out


def _summary(
    request: RunRequest[RunConfig], experiment: str, runs: Sequence[SymbolRun], workers: Workers, clock: Clock
) -> dict[str, Any]:
    """Content of run.json that every experiment has."""
    return {
        "experiment": experiment,
        "status": "done",
        "exchange": request.exchange,
        "symbols": list(request.symbols),
        "start": str(request.start),
        "end": str(request.end),
        "days": len(request.days),
        "config": request.config.resolved(),
        "config_hash": request.hash,
        "versions": _versions(),
        "backend": request.backend,
        "workers": workers.name,
        "machine": {"cores": os.cpu_count(), "system": platform.system(), "machine": platform.machine()},
        "lake": {
            "path": str(request.lake),
            "fingerprint": {run.name: fingerprint(run) for run in runs},
        },
        "timings": clock.stages,
        "seconds": clock.seconds,
        "started_at": clock.started_at.isoformat(timespec="seconds"),
        "published": request.published,
    }


def _versions() -> dict[str, str]:
    names = ("numpy", "pandas", "pyarrow", "numba", "scikit-learn", "dask", "statsmodels")
    python = {"clusterlob_gpu": __version__, "python": platform.python_version()}
    return python | {name: metadata.version(name) for name in names}


def fingerprint(run: SymbolRun) -> str:
    """Hash of all lake files that the run has read, those of the days around the range included."""
    return config_hash({f"{t} {d}": run.lake.fingerprint(t, d) for t, ds in run.read.items() for d in ds})


def missing_notes(runs: Sequence[SymbolRun]) -> list[str]:
    """A note per symbol whose range has days without trades or book."""
    return [
        f"{run.name}: the lake has no trades or no book on {', '.join(map(str, run.missing))}; "
        "what needs them is null there"
        for run in runs
        if run.missing
    ]


def added(counts: Sequence[Mapping[str, int]]) -> dict[str, int]:
    """Counts by reason, summed."""
    return {name: sum(count[name] for count in counts) for name in counts[0]}


def _record(request: RunRequest[RunConfig], experiment: str, clock: Clock, outcome: dict[str, Any]) -> None:
    """Add the run to the ledger."""
    line = {
        "id": f"{request.hash}-{clock.started_at.isoformat(timespec='milliseconds')}",
        "experiment": experiment,
        "out": str(request.out),
        "config_hash": request.hash,
        "symbols": request.symbols,
        "start": request.start,
        "end": request.end,
        "seconds": round(clock.seconds, 3),
    }
    append_ledger(request.out.absolute().parent, line | outcome)

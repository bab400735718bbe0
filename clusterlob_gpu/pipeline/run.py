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
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import pandas as pd

from clusterlob_gpu import __version__, report
from clusterlob_gpu.backend import Name
from clusterlob_gpu.clustering import Model
from clusterlob_gpu.config import Config, RunConfig, config_hash
from clusterlob_gpu.context import BookCarry
from clusterlob_gpu.days import BookDay, DayJob
from clusterlob_gpu.errors import ClusterlobError, InputError, LakeError
from clusterlob_gpu.files import Location
from clusterlob_gpu.lake.native import SymbolLake, days_between, open_symbol
from clusterlob_gpu.output import RunDirectory, append_ledger, read_seen
from clusterlob_gpu.pipeline.stages import BadDaysError, Partition, Stages, blaming_lake
from clusterlob_gpu.store import Store
from clusterlob_gpu.versions import CODE_VERSION, computing_versions, library_versions
from clusterlob_gpu.workers import Workers

Bad = dict[str, dict[Partition, ClusterlobError]]
"""Days that are left out, by symbol, and what is wrong with them."""


Seen = Mapping[str, str | None]
"""Fingerprint of every partition of a symbol that was looked at, by "table day"; see `SymbolLake.seen`."""


@dataclass(frozen=True, kw_only=True)
class RunRequest(Generic[Config]):
    """What the user asked for."""

    lake: Path | Location
    exchange: str
    symbols: tuple[str, ...]
    start: date
    end: date
    out: Path
    config: Config
    store: Path | Location | None = None
    backend: Name = "cpu"
    models: Mapping[str, Model] | None = None
    """Models by symbol that label the days; None fits them."""
    published: dict[str, Any] | None = None
    pictures: bool = True
    keep_current: bool = False
    """Leave a finished run as it is whose request, code and lake are still the same."""

    @property
    def days(self) -> list[date]:
        """Every day of the range."""
        return days_between(self.start, self.end)

    @property
    def artefacts(self) -> Location:
        """Where the day artefacts are."""
        return Location.of(self.store or self.out.absolute().parent / "store")

    @property
    def hash(self) -> str:
        """Hash of what was asked for: config, symbols, range and given models."""
        asked = {"exchange": self.exchange, "symbols": self.symbols, "start": self.start, "end": self.end}
        if self.models is not None:
            asked["models"] = {name: model.as_json() for name, model in self.models.items()}
        return config_hash({"config": self.config.resolved()} | asked)

    @property
    def identity(self) -> str:
        """`made_of` of the request: what must be the same for a run that was cut off to be gone on with."""
        return made_of(self.hash, self.lake)


def made_of(asked: str, lake: Path | Location) -> str:
    """Hash of what was asked for, of the code and libraries, and of where the lake lies."""
    held = {"asked": asked, "lake": str(Location.of(lake)), "code": CODE_VERSION}
    return config_hash(held | {"libraries": computing_versions()})


@dataclass
class SymbolRun:
    """A symbol on its way through the stages."""

    lake: SymbolLake
    wanted: list[date]
    """Days of the range on which the lake has trades and book."""
    missing: list[date]
    """Days of the range on which it has not."""
    books: dict[date, BookDay] = field(default_factory=dict)
    carries: dict[date, BookCarry | None] = field(default_factory=dict)
    """Book state at the start of each day."""

    @property
    def name(self) -> str:
        """Name of the instrument."""
        return self.lake.symbol.name

    def held(self, table: str, days_: Sequence[date]) -> list[date]:
        """Days of `days_` on which the lake has rows of the table; BadDaysError where a file is broken."""
        with blaming_lake(self.name):
            self.lake.look(table, days_)
            return [day for day in days_ if self.lake.has(table, day)]

    def job(self, request: RunRequest[Config], day: date) -> DayJob[Config]:
        """What the tasks of a day need to know."""
        return DayJob(self.lake, request.artefacts, request.config, day, request.backend)


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
    markets: Mapping[str, Seen | None] = field(default_factory=dict)
    """Further symbols that were looked at; None for one that the lake does not have."""


@dataclass(frozen=True)
class Work:
    """What a computation works with besides its request."""

    stages: Stages
    clock: Clock
    folder: Path | None
    """Where large results are written by the workers themselves; None where nothing may be written."""
    bad: Bad


Run = TypeVar("Run", bound=SymbolRun)


class Experiment(Protocol[Run]):
    """One kind of run: how a request is checked, and what is computed."""

    @property
    def name(self) -> str:
        """As the ledger calls it."""
        ...

    def check(self, request: RunRequest[Any], bad: Bad) -> list[Run]:
        """The symbols and days of the request; raises InputError where it cannot be met."""
        ...

    def compute(self, request: RunRequest[Any], runs: list[Run], work: Work) -> Outcome:
        """Every result of the checked request."""
        ...

    def expected(self, request: RunRequest[Any], runs: Sequence[Run], /) -> Mapping[str, int]:
        """How many artefacts the stages of the range will have, by stage in their order."""
        ...


def check_range(request: RunRequest[RunConfig], bad: Bad) -> list[SymbolRun]:
    """The symbols and days of a request, checked against the lake without its bad days.

    Raises LakeError naming the first day without trades or book (unless on_bad_day is skip), BadDaysError
    where a file is broken, and InputError where the range is empty or the output cannot be written.
    """
    RunDirectory(request.out, request.identity)
    if request.end < request.start:
        raise InputError(f"--end {request.end} lies before --start {request.start}")
    repeated = [name for name in request.symbols if request.symbols.count(name) > 1]
    if repeated:
        raise InputError(f"--symbol {repeated[0]}: given twice")
    return [_check_symbol(request, name, bad) for name in request.symbols]


def open_lake(request: RunRequest[RunConfig], name: str, bad: Bad) -> SymbolLake:
    """A symbol of the lake, without its bad days."""
    return open_symbol(request.lake, request.exchange, name).leaving_out(bad.get(name, {}))


def _check_symbol(request: RunRequest[RunConfig], name: str, bad: Bad) -> SymbolRun:
    lake = open_lake(request, name, bad)
    tables = ("trades", request.config.book)
    run = SymbolRun(lake, [], [])
    held = {table: set(run.held(table, request.days)) for table in tables}
    gaps = {day: [table for table in tables if day not in held[table]] for day in request.days}
    missing = [day for day in request.days if gaps[day]]
    wanted = [day for day in request.days if not gaps[day]]
    if missing and request.config.on_bad_day == "fail":
        raise LakeError(lake.absent(gaps[missing[0]][0], missing[0]))
    if not wanted:
        raise LakeError(f"{lake.absent(gaps[missing[0]][0], missing[0])}; no day of the range is left")
    return replace(run, wanted=wanted, missing=missing)


Answer = TypeVar("Answer")


def without_bad_days(
    request: RunRequest[RunConfig], attempt: Callable[[Bad], Answer], bad: Bad | None = None
) -> Answer:
    """`attempt` with the days that turned out bad left out, until it succeeds; on_bad_day: fail raises."""
    bad = {} if bad is None else bad
    while True:
        try:
            return attempt(bad)
        except BadDaysError as found:
            if request.config.on_bad_day == "fail":
                raise
            new = False
            for symbol, days in found.days.items():
                new = new or bool(set(days) - set(bad.get(symbol, {})))
                bad.setdefault(symbol, {}).update(days)
            if not new:  # what was left out is in the way all the same
                raise


def execute(request: RunRequest[RunConfig], experiment: Experiment[Any], workers: Workers) -> Path:
    """Check, compute, write, draw and publish a run, and add it to the ledger; gives the output folder."""
    clock = Clock()
    bad: Bad = {}
    checked = [without_bad_days(request, lambda bad: experiment.check(request, bad), bad)]
    if request.keep_current and is_current(request.out, request.identity, request.lake, request.exchange):
        return request.out
    store = Store(request.artefacts)
    store.check_writable()
    with RunDirectory(request.out, request.identity) as directory, watching(workers, directory):
        try:

            def attempt(bad: Bad) -> tuple[list[SymbolRun], Work, Outcome]:
                # Looked at once: a further attempt has other bad days.
                runs = checked.pop() if checked else experiment.check(request, bad)
                directory.clear_results()
                work = Work(Stages(workers, store), clock, directory.work / "results", bad)
                return runs, work, experiment.compute(request, runs, work)

            runs, work, outcome = without_bad_days(request, attempt, bad)
            for name, table in outcome.tables.items():
                directory.write_table(name, table)
            summary = _summary(request, experiment.name, runs, workers, work) | outcome.summary
            directory.write_run(summary)
            if request.pictures:
                with clock.stage("report"):
                    report.render_run(directory.work)
            directory.write_run(summary | {"timings": clock.stages, "seconds": clock.seconds})
            seen = [(run.name, run.lake.seen()) for run in runs]
            directory.write_seen(what_was_seen([*seen, *outcome.markets.items()]))
            rows = {name: counts["kept"] for name, counts in outcome.summary["rows"].items()}
            end = {"status": "done", "headline": outcome.headline, "rows": rows}
            directory.publish([_ledger_line(request, experiment.name, directory, clock, end)])
        except BaseException as error:
            status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
            end = {"status": status, "error": f"{type(error).__name__}: {error}"}
            with suppress(OSError):  # a full disk must not hide what went wrong first
                line = _ledger_line(request, experiment.name, directory, clock, end)
                append_ledger(directory.out.parent, [] if directory.told else [line])
            raise
    return request.out


@contextmanager
def watching(workers: Workers, directory: RunDirectory) -> Iterator[None]:
    """Note the progress of the workers in the run's folder too, where `clusterlob info` finds it."""
    told = workers.progress

    def tell(stage: str, done: int, of: int) -> None:
        told(stage, done, of)
        directory.progress(stage, done, of)

    workers.progress = tell
    try:
        yield
    finally:
        workers.progress = told


_CHANGED = "changed"
"""Stands for a partition that was another one when it was looked at again: no later look matches it."""


def what_was_seen(seen: Iterable[tuple[str, Seen | None]]) -> dict[str, Any]:
    """The partitions of every symbol that a run has looked at, for inputs.json.

    A symbol may come several times; None stands for one that the lake does not have.
    """
    held: dict[str, dict[str, str | None]] = {}
    for name, partitions in seen:
        mine = held.setdefault(name, {})
        for key, found in (partitions or {}).items():
            mine[key] = found if mine.get(key, found) == found else _CHANGED
    return {"lake": {name: dict(sorted(held[name].items())) for name in sorted(held)}}


def is_current(out: Path, made: str, root: Path | Location, exchange: str) -> bool:
    """Whether `out` holds a run that was made of the same (`made_of`), and the lake is the same too."""
    held = read_seen(out, made)
    return held is not None and all(
        _is_same(root, exchange, name, found) for name, found in held["lake"].items()
    )


def _is_same(root: Path | Location, exchange: str, name: str, found: Seen) -> bool:
    """Whether the lake still shows of a symbol what was found; nothing for one that it did not have."""
    days_of: dict[str, list[date]] = {}
    for key in found:
        table, day = key.split(" ")
        days_of.setdefault(table, []).append(date.fromisoformat(day))
    try:
        lake = open_symbol(root, exchange, name)
        for table, days_ in days_of.items():
            lake.look(table, days_)
    except LakeError:
        return not found
    return bool(found) and lake.seen() == found


def _summary(
    request: RunRequest[RunConfig], experiment: str, runs: Sequence[SymbolRun], workers: Workers, work: Work
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
        "versions": {"clusterlob_gpu": __version__} | library_versions(),
        "backend": request.backend,
        "workers": workers.name,
        "machine": {"cores": os.cpu_count(), "system": platform.system(), "machine": platform.machine()},
        "lake": {
            "path": str(request.lake),
            "fingerprint": {run.name: fingerprint(run) for run in runs},
        },
        "store": str(request.artefacts),
        "artefacts": {name: tally.as_record() for name, tally in work.stages.tallies.items()},
        "bad_days": bad_day_rows(work.bad),
        "timings": work.clock.stages,
        "seconds": work.clock.seconds,
        "started_at": work.clock.started_at.isoformat(timespec="seconds"),
        "published": request.published,
    }


def bad_day_rows(bad: Bad) -> list[dict[str, str]]:
    """Days left out, a row each."""
    return [
        {"symbol": symbol, "table": table, "day": str(day), "error": str(error)}
        for symbol, days in bad.items()
        for (table, day), error in sorted(days.items())
    ]


def fingerprint(run: SymbolRun) -> str:
    """Hash of all lake files that the run has looked at, those of the days around the range included."""
    return config_hash(run.lake.seen())


def missing_notes(runs: Sequence[SymbolRun], bad: Bad) -> list[str]:
    """A note per symbol whose range has days without trades or book, and one per bad day."""
    notes = [
        f"{run.name}: the lake has no trades or no book on {', '.join(map(str, run.missing))}; "
        "what needs them is null there"
        for run in runs
        if run.missing
    ]
    return notes + [f"{row['symbol']} {row['day']} was left out: {row['error']}" for row in bad_day_rows(bad)]


def added(counts: Sequence[Mapping[str, int]]) -> dict[str, int]:
    """Counts by reason, summed."""
    return {name: sum(count[name] for count in counts) for name in counts[0]}


def _ledger_line(
    request: RunRequest[RunConfig],
    experiment: str,
    directory: RunDirectory,
    clock: Clock,
    end: dict[str, Any],
) -> dict[str, Any]:
    """The run's line in the ledger."""
    line = {
        "id": directory.attempt.id,
        "experiment": experiment,
        "out": str(request.out),
        "config_hash": request.hash,
        "symbols": request.symbols,
        "start": request.start,
        "end": request.end,
        "attempts": directory.attempt.number,
        "seconds": round(clock.seconds, 3),
    }
    return line | end

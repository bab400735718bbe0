"""The order of the steps: plan, features, fit, label, aggregate, evaluate, write.

A run is planned and checked before anything is computed or written.  Its output appears under its
name only when it is whole.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from clusterlob_gpu import __version__, bars, clustering, context, days, evaluation, features, report, returns
from clusterlob_gpu.clustering import Bounds, Fit, Model
from clusterlob_gpu.config import ClusterConfig, config_hash, format_duration
from clusterlob_gpu.context import BookCarry
from clusterlob_gpu.days import (
    BookDay,
    DayJob,
    FeatureDay,
    LabelJob,
    LabelledDay,
    State,
    TrainDay,
    next_day,
    previous_day,
)
from clusterlob_gpu.errors import InputError, LakeError
from clusterlob_gpu.lake.layout import day_of_us, day_start_us
from clusterlob_gpu.lake.native import SymbolLake, days_between, open_symbol
from clusterlob_gpu.schema import FEATURES, US_PER_DAY, Z_FEATURES
from clusterlob_gpu.store import RunDirectory, append_ledger
from clusterlob_gpu.workers import Workers

FEATURE_KEYS = ("book", "depth", "window", "same_side", "spread", "asof", "max_staleness")
"""Config fields on which the features depend; a model may only label days made with the same ones."""


@dataclass(frozen=True, kw_only=True)
class RunRequest:
    """What the user asked for: `run cluster`, or `label` if models are given."""

    lake: Path
    exchange: str
    symbols: tuple[str, ...]
    start: date
    end: date
    out: Path
    config: ClusterConfig
    store: Path | None = None
    backend: str = "cpu"
    models: Mapping[str, Model] | None = None
    published: dict[str, Any] | None = None
    pictures: bool = True


@dataclass(frozen=True)
class Window:
    """One fit and the days it labels; they are the same days in sample."""

    id: int
    train: list[date]
    test: list[date]
    train_until: int
    """First time (us) that the fit may not see."""


@dataclass
class SymbolRun:
    """A symbol on its way through the stages."""

    lake: SymbolLake
    wanted: list[date]
    """Days of the range that the lake has."""
    missing: list[date]
    books: dict[date, BookDay] = field(default_factory=dict)
    carries: dict[date, BookCarry | None] = field(default_factory=dict)
    states: dict[date, State] = field(default_factory=dict)
    features: dict[date, FeatureDay] = field(default_factory=dict)
    models: list[Model] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.lake.symbol.name


class Clock:
    """Seconds by stage."""

    def __init__(self) -> None:
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


def check_request(request: RunRequest) -> list[SymbolRun]:
    """The symbols and days of a request, checked against the lake.

    Raises LakeError naming the first day without trades or book (unless on_bad_day is skip), and
    InputError where nothing is left or the range is too short for the walk-forward.
    """
    if request.end < request.start:
        raise InputError(f"--end {request.end} lies before --start {request.start}")
    if request.config.engine.startswith("cuml"):
        raise InputError(
            f"engine = {request.config.engine!r}: needs the gpu backend; use auto, lloyd or sklearn"
        )
    windows(request)
    runs = []
    for name in request.symbols:
        lake = open_symbol(request.lake, request.exchange, name)
        asked = days_between(request.start, request.end)
        tables = ("trades", request.config.book)
        gaps = {day: [table for table in tables if not lake.has(table, day)] for day in asked}
        missing = [day for day in asked if gaps[day]]
        wanted = [day for day in asked if not gaps[day]]
        if missing and request.config.on_bad_day == "fail":
            raise LakeError(lake.absent(gaps[missing[0]][0], missing[0]))
        if not wanted:
            raise LakeError(f"{lake.absent(gaps[missing[0]][0], missing[0])}; no day of the range is left")
        runs.append(SymbolRun(lake, wanted, missing))
    return runs


def windows(request: RunRequest) -> list[Window]:
    """Fits of the run: one in sample, or one per walk-forward step."""
    config, asked = request.config, days_between(request.start, request.end)
    after = day_start_us(next_day(request.end))
    if request.models is not None:
        return [Window(0, [], asked, after)]
    if config.train_days is None:
        return [Window(0, asked, asked, after)]
    found = []
    for number, at in enumerate(
        range(config.train_days, len(asked) - config.test_days + 1, config.step_days)
    ):
        test = asked[at : at + config.test_days]
        train = asked[at - config.train_days : at]
        found.append(Window(number, train, test, day_start_us(test[0]) - config.purge_us))
    if not found:
        raise InputError(
            f"--start {request.start} --end {request.end}: {len(asked)} days hold no walk-forward window "
            f"of {config.train_days} training and {config.test_days} test days"
        )
    return found


def run_cluster(request: RunRequest, workers: Workers) -> Path:
    """Run the whole experiment and return the output directory; the ledger gets a line either way."""
    runs = check_request(request)
    started_at = datetime.now(UTC)
    try:
        summary, ic = _run(request, runs, workers, started_at)
    except Exception as error:
        _record(request, started_at, {"status": "failed", "error": f"{type(error).__name__}: {error}"})
        raise
    _record(request, started_at, _headline(summary, ic))
    return request.out


def _run(
    request: RunRequest, runs: list[SymbolRun], workers: Workers, started_at: datetime
) -> tuple[dict[str, Any], pd.DataFrame]:
    """Compute, write and publish: the content of run.json, and the table of ICs."""
    clock = Clock()
    store = request.store or request.out.absolute().parent / "store"
    with RunDirectory(request.out) as directory:
        parts: dict[str, list[pd.DataFrame]] = {}
        for run in runs:
            for name, table in _run_symbol(run, request, store, directory, workers, clock).items():
                parts.setdefault(name, []).append(table)
        tables = {name: pd.concat(part, ignore_index=True) for name, part in parts.items()}
        with clock.stage("evaluate"):
            tables["ic"] = _evaluate(request, tables["buckets"], tables["centroids"])
        for name, table in tables.items():
            directory.write_table(name, table)
        clustering.write_models([run.models[-1] for run in runs], directory.work / "model.json")
        summary = _summary(request, runs, workers, clock, started_at)
        directory.write_run(summary)
        if request.pictures:
            with clock.stage("report"):
                report.render_run(directory.work)
        summary |= {"timings": clock.stages, "seconds": clock.seconds}
        directory.write_run(summary)
        directory.publish()
    return summary, tables["ic"]


def _run_symbol(
    run: SymbolRun,
    request: RunRequest,
    store: Path,
    directory: RunDirectory,
    workers: Workers,
    clock: Clock,
) -> dict[str, pd.DataFrame]:
    """Every stage of one symbol: its result tables by name."""
    with clock.stage("book"):
        _prepare_states(run, request, store, workers)
    with clock.stage("features"):
        _make_features(run, request.config, store, workers)
    centroids, flows, markouts, fits = [], [], [], []
    for window in windows(request):
        with clock.stage("fit"):
            model = _window_model(run, request, window, store, workers)
        previous = run.models[-1] if run.models else None
        run.models.append(model)
        with clock.stage("label"):
            labelled = _label(run, request, window, store, directory, workers)
        flows.append(_window_flow(run, request, window, labelled))
        markouts += [day.markouts for day in labelled]
        table = _centroids(model, previous, labelled, request)
        centroids.append(table.assign(symbol=run.name, window_id=np.int32(window.id)))
        fits.append({"symbol": run.name, "window_id": np.int32(window.id)} | _fit_row(model, window))
    with clock.stage("returns"):
        buckets = pd.concat(flows, ignore_index=True)
        buckets = buckets.merge(_returns(run, request, buckets, store, workers), on="bucket_ts", how="left")
    with clock.stage("evaluate"):
        tables = {
            "centroids": _front(pd.concat(centroids, ignore_index=True), ["symbol", "window_id"]),
            "buckets": _front(buckets, ["symbol", "window_id"]),
            "markouts": _markouts(run, request, markouts),
        }
    if request.config.train_days is not None and request.models is None:
        tables["windows"] = _front(pd.DataFrame(fits), ["symbol", "window_id"])
    return tables


def _front(table: pd.DataFrame, names: list[str]) -> pd.DataFrame:
    return table[[*names, *(name for name in table.columns if name not in names)]]


def _job(run: SymbolRun, config: ClusterConfig, store: Path, day: date) -> DayJob:
    return DayJob(run.lake, store, config, day)


def _prepare_states(run: SymbolRun, request: RunRequest, store: Path, workers: Workers) -> None:
    """Reduce the books of the range and of the days around it, and carry the state over midnights.

    Days before the range are added one by one until nothing earlier could alter the first state.
    """
    config, first, last = request.config, request.start, request.end
    reach = max(config.reach, 2 * config.bucket, max(returns.MARKOUTS_US))
    last_needed = day_of_us(day_start_us(next_day(last)) + reach)
    held = [day for day in days_between(first, last_needed) if run.lake.has(config.book, day)]
    _reduce(run, config, store, held, "book", workers)
    earliest = first
    while True:
        _carry_books(run, earliest)
        _carry_tails(run, config, store, days_between(earliest, last), workers)
        before = previous_day(earliest)
        if _settled(run, config, earliest, first):
            break
        if run.lake.has(config.book, before):
            _reduce(run, config, store, [before], "book before", workers)
        earliest = before


def _reduce(
    run: SymbolRun, config: ClusterConfig, store: Path, wanted: list[date], stage: str, workers: Workers
) -> None:
    books = workers.map(stage, days.reduce_book, [_job(run, config, store, day) for day in wanted])
    run.books |= {book.day: book for book in books}


def _carry_books(run: SymbolRun, earliest: date) -> None:
    """Book state at the start of every day from `earliest` on; a missing day breaks the chain."""
    carry: BookCarry | None = None
    run.carries = {}
    for day in days_between(earliest, max(run.books)):
        run.carries[day] = carry
        book = run.books.get(day)
        carry = context.fold(carry, book.summary) if book else None
    run.carries[next_day(max(run.books))] = carry


def _carry_tails(
    run: SymbolRun, config: ClusterConfig, store: Path, chain: list[date], workers: Workers
) -> None:
    """State at the start of every day of a chain, from the tails of the days before that have trades."""
    traded = [day for day in chain[:-1] if run.lake.has("trades", day)]
    tasks = [(_job(run, config, store, day), run.books.get(day), run.carries.get(day)) for day in traded]
    own = dict(zip(traded, workers.map("tails", days.own_tail, tasks), strict=True))
    nothing = np.empty((len(FEATURES), 0))
    tail, run.states = nothing, {}
    for day in chain:
        run.states[day] = State(run.carries.get(day), tail)
        tail = features.last_columns(tail, own[day], config.window) if day in own else nothing


def _settled(run: SymbolRun, config: ClusterConfig, earliest: date, first: date) -> bool:
    """Whether no day before `earliest` could alter the state at the start of the range."""
    state = run.states[first]
    around = days_between(previous_day(earliest), previous_day(first))
    book_ends = any(not run.lake.has(config.book, day) for day in around)
    trades_end = any(not run.lake.has("trades", day) for day in around)
    book_known = book_ends or (state.book is not None and state.book.complete)
    full = state.tail.shape[1] == config.window - 1 and not np.isnan(state.tail).any()
    return book_known and (full or (trades_end and book_ends))


def _make_features(run: SymbolRun, config: ClusterConfig, store: Path, workers: Workers) -> None:
    tasks = [(_job(run, config, store, day), run.books[day], run.states[day]) for day in run.wanted]
    made = workers.map("features", days.make_features, tasks)
    run.features = {day.day: day for day in made}


def _window_model(
    run: SymbolRun, request: RunRequest, window: Window, store: Path, workers: Workers
) -> Model:
    """The model that labels a window: the given one, or one fitted on its training days."""
    config = request.config
    if request.models is not None:
        return request.models[run.name]
    train = [
        TrainDay(_job(run, config, store, day), run.features[day], window.train_until)
        for day in window.train
        if day in run.features
    ]
    fit, bounds = _fit(train, config, workers)
    return clustering.make_model(
        fit,
        config.margin,
        bounds,
        symbol=run.name,
        exchange=request.exchange,
        train_days=[str(day.features.day) for day in train],
        features=config.model_dump(mode="json", include=set(FEATURE_KEYS)),
    )


def _fit(train: list[TrainDay], config: ClusterConfig, workers: Workers) -> tuple[Fit, Bounds]:
    """Bounds, starting centres from a seeded sample, and the fit on all training rows."""
    counts = workers.map("count", days.train_rows, train) if train else []
    total = sum(counts)
    if total < config.k:
        found = sum(day.features.trades for day in train)
        raise InputError(
            f"k = {config.k}: {total} of {found} trades of the training days have features; "
            "use a shorter window, or see the drop counts with more days"
        )
    bounds = _bounds(train, config, workers)
    samples = workers.map("sample", days.sample_day, [(day, total, config.seed) for day in train])
    sample = bounds.clip(np.concatenate(samples, axis=1))
    centres = clustering.starting_centres(sample, config.k, config.seed, config.n_init)
    if config.engine == "sklearn":
        merged = np.concatenate(workers.map("merge", days.all_rows, train), axis=1)
        return clustering.fit_sklearn(bounds.clip(merged), centres), bounds

    def one_pass(centroids: np.ndarray) -> Sequence[clustering.Partial]:
        return workers.map("fit", days.lloyd_day, [(day, bounds, centroids) for day in train])

    return clustering.lloyd(centres, one_pass), bounds


def _bounds(train: list[TrainDay], config: ClusterConfig, workers: Workers) -> Bounds:
    if config.winsorize is None:
        return Bounds.none()
    high = np.sum(workers.map("quantiles", days.high_counts_day, train), axis=0)

    def low_pass(bins: np.ndarray) -> np.ndarray:
        parts = workers.map("quantiles", days.low_counts_day, [(day, bins) for day in train])
        return np.sum(parts, axis=0)

    return clustering.winsor_bounds(config.winsorize, high, low_pass)


def _label(
    run: SymbolRun,
    request: RunRequest,
    window: Window,
    store: Path,
    directory: RunDirectory,
    workers: Workers,
) -> list[LabelledDay]:
    config = request.config
    folder = directory.work / "results" / "trade_features.parquet"
    tasks = [
        LabelJob(
            job=_job(run, config, store, day),
            book=run.books[day],
            next_book=run.books.get(next_day(day)),
            state=run.states[day],
            features=run.features[day],
            model=run.models[-1],
            trades_file=folder / f"{run.name}-{day}.parquet" if config.keep_trades else None,
        )
        for day in window.test
        if day in run.features
    ]
    return workers.map("label", days.label_day, tasks)


def _window_flow(
    run: SymbolRun, request: RunRequest, window: Window, labelled: list[LabelledDay]
) -> pd.DataFrame:
    """Every bucket of a window's test days; null flow on days that the lake does not have."""
    config, numbers = request.config, run.models[-1].numbers
    flows = {day.day: day.flow for day in labelled}
    for day in window.test:
        if day not in flows:
            start = day_start_us(day)
            flows[day] = bars.empty_flow_table(start=start, width=config.bucket, numbers=numbers)
    table = pd.concat([flows[day] for day in window.test], ignore_index=True)
    return table.assign(symbol=run.name, window_id=np.int32(window.id))


def _centroids(
    model: Model, previous: Model | None, labelled: list[LabelledDay], request: RunRequest
) -> pd.DataFrame:
    """Clusters of the labelled days: counts, shares, means, names under both side conventions."""
    k = len(model.numbers)
    counts = np.sum([day.counts for day in labelled], axis=0) if labelled else np.zeros(k, np.int64)
    z_sums, raw_sums = np.zeros((k, len(FEATURES))), np.zeros((k, len(FEATURES)))
    for day in labelled:
        z_sums += day.z_sums
        raw_sums += day.raw_sums
    some = np.where(counts > 0, counts, np.nan)[:, None]
    table = pd.DataFrame(
        {
            "cluster": model.numbers,
            "label": model.labels,
            "label_other": clustering.names_other_side(model.centroids, model.margin),
            "count": counts,
            "share": counts / max(1, counts.sum()),
            "score": clustering.scores(model.centroids),
        }
    )
    table[list(Z_FEATURES)] = z_sums / some
    table[list(FEATURES)] = raw_sums / some
    table["interpretation"] = clustering.interpret(model.centroids, request.config.same_side)
    tracked = clustering.track(model, previous)
    return table.merge(tracked, on="cluster", validate="one_to_one")


def _fit_row(model: Model, window: Window) -> dict[str, Any]:
    days_ = {"train": window.train, "test": window.test}
    ends = {
        f"{name}_{end}": str(days[at]) if days else None
        for name, days in days_.items()
        for end, at in (("start", 0), ("end", -1))
    }
    how = model.fit
    return ends | {"n_train": how["rows"], "inertia": how["inertia"], "iterations": how["passes"]}


def _returns(
    run: SymbolRun, request: RunRequest, buckets: pd.DataFrame, store: Path, workers: Workers
) -> pd.DataFrame:
    """Returns of every bucket, from mids asked of the days that decide them."""
    config = request.config
    starts = np.unique(buckets["bucket_ts"].to_numpy())
    times = returns.bucket_times(starts, config.bucket, config.horizons)
    deciding = returns.day_before(times)
    tasks, asked = [], []
    for number in np.unique(deciding):
        day = day_of_us(int(number) * US_PER_DAY)
        if day in run.books:
            asked.append(times[deciding == number])
            tasks.append((_job(run, config, store, day), run.books[day], run.carries.get(day), asked[-1]))
    mids = workers.map("returns", days.mids_day, tasks)
    found = pd.Series(np.concatenate([*mids, []]), index=np.concatenate([*asked, []]).astype(np.int64))
    return returns.return_columns(starts, found, config.bucket, config.horizons)


def _evaluate(request: RunRequest, buckets: pd.DataFrame, centroids: pd.DataFrame) -> pd.DataFrame:
    """IC of every cluster's flow, and of all flow, against every target, corrected over the whole run."""
    config = request.config
    table = evaluation.cluster_ic(buckets, _targets(config), width_us=config.bucket, seed=config.seed)
    last = centroids.drop_duplicates(["symbol", "cluster"], keep="last")[["symbol", "cluster", "label"]]
    table = table.merge(last, on=["symbol", "cluster"], how="left").fillna({"label": "all"})
    return _front(table.assign(sample=_sample(request)), ["symbol", "sample", "cluster", "label"])


def _targets(config: ClusterConfig) -> list[evaluation.Target]:
    width = config.bucket
    ahead = {f"r_{format_duration(h)}": h for h in config.horizons if h != width}
    return [
        evaluation.Target("frnb", "frnb", width),
        *(evaluation.Target(name, name, h) for name, h in ahead.items()),
        evaluation.Target("freb", "freb", US_PER_DAY),
        evaluation.Target("conr", "conr", width, predictive=False),
    ]


def _markouts(run: SymbolRun, request: RunRequest, tables: list[pd.DataFrame]) -> pd.DataFrame:
    model = run.models[-1]
    table = evaluation.markout_table(pd.concat(tables, ignore_index=True), width_us=request.config.bucket)
    other = clustering.names_other_side(model.centroids, model.margin)
    names = pd.DataFrame({"cluster": model.numbers, "label": model.labels, "label_other": other})
    table = table.merge(names.astype({"cluster": table["cluster"].dtype}), on="cluster", how="left")
    return _front(table.assign(symbol=run.name), ["symbol", "cluster", "label", "label_other"])


def _sample(request: RunRequest) -> str:
    """Whether the labelled days were trained on."""
    config = request.config
    if request.models is None:
        return "in_sample" if config.train_days is None else "out_of_sample"
    asked = {str(day) for day in days_between(request.start, request.end)}
    trained = any(asked & set(model.train_days) for model in request.models.values())
    return "in_sample" if trained else "out_of_sample"


def _summary(
    request: RunRequest, runs: list[SymbolRun], workers: Workers, clock: Clock, started_at: datetime
) -> dict[str, Any]:
    """Content of run.json."""
    config = request.config.resolved()
    return {
        "experiment": "label" if request.models is not None else "cluster",
        "status": "done",
        "exchange": request.exchange,
        "symbols": list(request.symbols),
        "start": str(request.start),
        "end": str(request.end),
        "days": len(days_between(request.start, request.end)),
        "config": config,
        "config_hash": _request_hash(request),
        "sample": _sample(request),
        "versions": _versions(),
        "backend": request.backend,
        "workers": workers.name,
        "machine": {"cores": os.cpu_count(), "system": platform.system(), "machine": platform.machine()},
        "lake": {"fingerprint": {run.name: _lake_fingerprint(run, request) for run in runs}},
        "rows": {run.name: _row_counts(run) for run in runs},
        "timings": clock.stages,
        "seconds": clock.seconds,
        "started_at": started_at.isoformat(timespec="seconds"),
        "published": request.published,
        "notes": _notes(request, runs),
    }


def _request_hash(request: RunRequest) -> str:
    """Hash of what was asked for: config, symbols and range."""
    asked = {"symbols": request.symbols, "start": request.start, "end": request.end}
    return config_hash({"config": request.config.resolved()} | asked)


def _versions() -> dict[str, str]:
    names = ("numpy", "pandas", "pyarrow", "numba", "scikit-learn", "dask", "statsmodels")
    python = {"clusterlob_gpu": __version__, "python": platform.python_version()}
    return python | {name: metadata.version(name) for name in names}


def _lake_fingerprint(run: SymbolRun, request: RunRequest) -> str:
    """Hash of the lake files that the range was read from."""
    tables = ("trades", request.config.book)
    return config_hash({f"{t} {d}": run.lake.fingerprint(t, d) for t in tables for d in run.wanted})


def _row_counts(run: SymbolRun) -> dict[str, Any]:
    made = [run.features[day] for day in run.wanted]
    books = [run.books[day] for day in run.wanted]

    def added(counts: list[dict[str, int]]) -> dict[str, int]:
        return {name: sum(count[name] for count in counts) for name in counts[0]}

    return {
        "trades": sum(day.trades for day in made),
        "kept": sum(day.kept for day in made),
        "dropped": added([day.dropped for day in made]),
        "book_rows": sum(book.rows for book in books) + sum(sum(book.skipped.values()) for book in books),
        "book_skipped": added([book.skipped for book in books]),
        "reused_artefacts": sum(day.reused for day in made) + sum(book.reused for book in books),
    }


def _notes(request: RunRequest, runs: list[SymbolRun]) -> list[str]:
    notes = []
    for run in runs:
        if run.missing:
            days_ = ", ".join(str(day) for day in run.missing)
            notes.append(f"{run.name}: the lake has no trades or no book on {days_}; those buckets are null")
        slow = [str(i) for i, model in enumerate(run.models) if not model.fit.get("converged", True)]
        if slow:
            notes.append(f"{run.name}: the fit of window {', '.join(slow)} stopped before it converged")
    if request.config.asof == "inclusive":
        notes.append("asof = inclusive lets a trade see the book it has moved: a leak, for comparison only")
    return notes


def _headline(summary: dict[str, Any], ic: pd.DataFrame) -> dict[str, Any]:
    """What the ledger says of a finished run."""
    main = ic[(ic["signal"] == "ofi_size") & (ic["target"] == "frnb")]
    columns = (main[name].tolist() for name in ("symbol", "label", "cluster", "ic"))
    headline = {
        f"{symbol} ic frnb {label} ({cluster})": round(ic, 6) if np.isfinite(ic) else None
        for symbol, label, cluster, ic in zip(*columns, strict=True)
    }
    rows = {name: counts["kept"] for name, counts in summary["rows"].items()}
    return {"status": "done", "headline": headline, "seconds": round(summary["seconds"], 3), "rows": rows}


def _record(request: RunRequest, started_at: datetime, outcome: dict[str, Any]) -> None:
    """Add the run to the ledger."""
    key, when = _request_hash(request), started_at.isoformat(timespec="milliseconds")
    line = {
        "id": f"{key}-{when}",
        "experiment": "label" if request.models is not None else "cluster",
        "out": str(request.out),
        "config_hash": key,
        "symbols": request.symbols,
        "start": request.start,
        "end": request.end,
    }
    append_ledger(request.out.absolute().parent, line | outcome)


def label(request: RunRequest, workers: Workers) -> Path:
    """Label the days of a request with given models, which must have been made with its features.

    Raises InputError naming the symbol without a model, or the field in which the two differ.
    """
    assert request.models is not None
    kept = request.config
    for name in request.symbols:
        if name not in request.models:
            known = ", ".join(request.models)
            raise InputError(f"--model: no model of {name}; the file has {known}")
        model = request.models[name]
        mine = kept.model_dump(mode="json", include=set(FEATURE_KEYS))
        for key, value in model.features.items():
            if mine.get(key) != value:
                raise InputError(
                    f"{key} = {mine.get(key)!r}: the model of {name} was fitted with {value!r}; use that"
                )
    fields = {name: request.models[name] for name in request.symbols}
    return run_cluster(replace(request, models=fields), workers)

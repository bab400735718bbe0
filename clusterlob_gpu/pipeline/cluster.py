"""ClusterLOB: features, fit, labels, buckets, returns, evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from clusterlob_gpu import bars, clustering, days, evaluation, returns
from clusterlob_gpu.clustering import Bounds, Fit, Model
from clusterlob_gpu.config import ClusterConfig, format_duration
from clusterlob_gpu.days import FeatureDay, LabelJob, LabelledDay, TrainDay, next_day
from clusterlob_gpu.errors import InputError
from clusterlob_gpu.lake.layout import day_of_us, day_start_us
from clusterlob_gpu.pipeline.carry import CarriedRun, prepare_states
from clusterlob_gpu.pipeline.run import (
    Clock,
    Outcome,
    RunRequest,
    added,
    check_range,
    execute,
    missing_notes,
)
from clusterlob_gpu.schema import FEATURES, US_PER_DAY, Z_FEATURES
from clusterlob_gpu.store import RunDirectory
from clusterlob_gpu.workers import Workers

FEATURE_KEYS = ("book", "depth", "window", "same_side", "spread", "asof", "max_staleness")
"""Config fields on which the features depend; a model may only label days made with the same ones."""


FIT_KEYS = ("k", "seed", "n_init", "engine", "margin", "winsorize")
"""Config fields on which a fit depends besides; a model brings them along."""

ClusterRequest = RunRequest[ClusterConfig]


@dataclass(frozen=True)
class Window:
    """One fit and the days it labels; they are the same days in sample."""

    id: int
    train: list[date]
    test: list[date]
    train_until: int
    """First time (us) that the fit may not see."""


@dataclass
class ClusterRun(CarriedRun):
    """A symbol on its way through the stages of ClusterLOB."""

    features: dict[date, FeatureDay] = field(default_factory=dict)
    models: list[Model] = field(default_factory=list)
    labelled: int = 0
    """Trades that a model has labelled."""
    unfitted: list[Window] = field(default_factory=list)
    """Windows of the walk-forward whose training days have too few trades."""


def check_request(request: ClusterRequest) -> list[ClusterRun]:
    """`check_range`, and whether the walk-forward and the engine are possible.

    Raises InputError naming what is not.
    """
    engine = request.config.engine
    if engine.startswith("cuml"):
        raise InputError(f"engine = {engine!r}: needs the gpu backend; use auto, lloyd or sklearn")
    runs = check_range(request)
    windows(request)
    return [ClusterRun(run.lake, run.wanted, run.missing) for run in runs]


def windows(request: ClusterRequest) -> list[Window]:
    """Fits of the run: one in sample, or one per walk-forward step."""
    config, asked = request.config, request.days
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


def run_cluster(request: ClusterRequest, workers: Workers) -> Path:
    """Run the whole experiment and return the output directory."""
    return _run(request, check_request(request), workers)


def _run(request: ClusterRequest, runs: Sequence[ClusterRun], workers: Workers) -> Path:
    """Run a checked request."""

    def compute(directory: RunDirectory, clock: Clock) -> Outcome:
        parts: dict[str, list[pd.DataFrame]] = {}
        for run in runs:
            for name, table in _run_symbol(run, request, directory, workers, clock).items():
                parts.setdefault(name, []).append(table)
        tables = {name: pd.concat(part, ignore_index=True) for name, part in parts.items()}
        with clock.stage("evaluate"):
            tables["ic"] = _evaluate(request, tables["buckets"], tables["centroids"])
        clustering.write_models([run.models[-1] for run in runs], directory.work / "model.json")
        summary = {
            "sample": _sample(request),
            "rows": {run.name: _row_counts(run) for run in runs},
            "notes": _notes(request, runs),
        }
        return Outcome(tables, summary, _headline(tables["ic"]))

    experiment = "cluster" if request.models is None else "label"
    return execute(request, experiment, runs, workers, compute)


def _run_symbol(
    run: ClusterRun,
    request: ClusterRequest,
    directory: RunDirectory,
    workers: Workers,
    clock: Clock,
) -> dict[str, pd.DataFrame]:
    """Every stage of one symbol: its result tables by name."""
    with clock.stage("book"):
        prepare_states(run, request, workers)
    with clock.stage("features"):
        _make_features(run, request, workers)
    centroids, flows, markouts, fits = [], [], [], []
    for window in windows(request):
        with clock.stage("fit"):
            model = _window_model(run, request, window, workers)
        if model is None:
            run.unfitted.append(window)
            continue
        previous = run.models[-1] if run.models else None
        run.models.append(model)
        with clock.stage("label"):
            labelled = _label(run, request, window, directory, workers)
        run.labelled += sum(int(day.counts.sum()) for day in labelled)
        flows.append(_window_flow(run, request, window, labelled))
        markouts += [day.markouts for day in labelled]
        table = _centroids(model, previous, labelled, request)
        centroids.append(table.assign(symbol=run.name, window_id=np.int32(window.id)))
        fits.append({"symbol": run.name, "window_id": np.int32(window.id)} | _fit_row(model, window))
    if not flows:
        raise InputError(
            f"k = {request.config.k}: no window of {run.name} has that many trades with features; see the "
            "drop counts, and use a shorter window, a shorter purge or more days"
        )
    with clock.stage("returns"):
        buckets = pd.concat(flows, ignore_index=True)
        buckets = buckets.merge(_returns(run, request, buckets, workers), on="bucket_ts", how="left")
    with clock.stage("evaluate"):
        tables = {
            "centroids": _front(pd.concat(centroids, ignore_index=True), ["symbol", "window_id"]),
            "buckets": _front(buckets, ["symbol", "window_id"]),
        }
        tables["markouts"] = _markouts(request, markouts, tables["centroids"])
    if request.config.train_days is not None and request.models is None:
        tables["windows"] = _front(pd.DataFrame(fits), ["symbol", "window_id"])
    return tables


def _front(table: pd.DataFrame, names: list[str]) -> pd.DataFrame:
    return table[[*names, *(name for name in table.columns if name not in names)]]


def _make_features(run: ClusterRun, request: ClusterRequest, workers: Workers) -> None:
    tasks = [(run.job(request, day), run.books[day], run.states[day]) for day in run.wanted]
    run.has_read("trades", run.wanted)
    made = workers.map("features", days.make_features, tasks)
    run.features = {day.day: day for day in made}


def _window_model(run: ClusterRun, request: ClusterRequest, window: Window, workers: Workers) -> Model | None:
    """The model that labels a window: the given one, or one fitted on its training days; None where a
    walk-forward window has fewer training rows than clusters.
    """
    config = request.config
    if request.models is not None:
        return request.models[run.name]
    train = [
        TrainDay(run.job(request, day), run.features[day], window.train_until)
        for day in window.train
        if day in run.features
    ]
    counts = workers.map("count", days.train_rows, train) if train else []
    if sum(counts) < config.k:
        if config.train_days is not None:
            return None
        found = sum(run.features[day].trades for day in run.features)
        raise InputError(
            f"k = {config.k}: {sum(counts)} of {found} trades of the training days have features; "
            "use a shorter window, or see the drop counts with more days"
        )
    fit, bounds = _fit(train, sum(counts), config, workers)
    return clustering.make_model(
        fit,
        config.margin,
        bounds,
        symbol=run.name,
        exchange=request.exchange,
        train_days=[str(day.features.day) for day in train],
        features=config.model_dump(mode="json", include=set(FEATURE_KEYS)),
        fitted=config.model_dump(mode="json", include=set(FIT_KEYS)),
    )


def _fit(train: list[TrainDay], total: int, config: ClusterConfig, workers: Workers) -> tuple[Fit, Bounds]:
    """Bounds, starting centres from a seeded sample, and the fit on all `total` training rows."""
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
    run: ClusterRun,
    request: ClusterRequest,
    window: Window,
    directory: RunDirectory,
    workers: Workers,
) -> list[LabelledDay]:
    config = request.config
    folder = directory.work / "results" / "trade_features.parquet"
    tasks = [
        LabelJob(
            job=run.job(request, day),
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
    run: ClusterRun, request: ClusterRequest, window: Window, labelled: list[LabelledDay]
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
    model: Model, previous: Model | None, labelled: list[LabelledDay], request: ClusterRequest
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
    run: ClusterRun, request: ClusterRequest, buckets: pd.DataFrame, workers: Workers
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
            tasks.append((run.job(request, day), run.books[day], run.carries.get(day), asked[-1]))
    mids = workers.map("returns", days.mids_day, tasks)
    found = pd.Series(np.concatenate([*mids, []]), index=np.concatenate([*asked, []]).astype(np.int64))
    return returns.return_columns(starts, found, config.bucket, config.horizons)


def _evaluate(request: ClusterRequest, buckets: pd.DataFrame, centroids: pd.DataFrame) -> pd.DataFrame:
    """IC of every cluster's flow, and of all flow, against every target, corrected over the whole run."""
    config = request.config
    table = evaluation.cluster_ic(buckets, _targets(config), width_us=config.bucket, seed=config.seed)
    pooled = _pooled(centroids).drop(columns="label_other")
    table = table.merge(pooled, on=["symbol", "cluster"], how="left").fillna({"label": "all"})
    # Beyond the named roles a number may stand for other trades in every window.
    table.loc[table.pop("mixed").eq(True), "verdict"] = "mixed"
    return _front(table.assign(sample=_sample(request)), ["symbol", "sample", "cluster", "label"])


def _pooled(centroids: pd.DataFrame) -> pd.DataFrame:
    """What each cluster number was over all windows: label, label_other, and whether its trades changed.

    A label that held in some windows only reads "directional in 2 of 4 windows".  `mixed`: a cluster
    beyond the named roles that the Hungarian matching, somewhere, matched with another number.
    """

    def common(labels: pd.Series) -> str:
        counts = labels.value_counts()
        name, held = counts.index[0], counts.iloc[0]
        return str(name) if held == len(labels) else f"{name} in {held} of {len(labels)} windows"

    groups = centroids.groupby(["symbol", "cluster"], sort=True)
    table = groups[["label", "label_other"]].agg(common).reset_index()
    changed = groups["agrees"].agg(lambda agrees: bool(agrees.eq(False).any())).to_numpy(bool)
    return table.assign(mixed=changed & (table["cluster"] > clustering.DIRECTIONAL))


def _targets(config: ClusterConfig) -> list[evaluation.Target]:
    width = config.bucket
    ahead = {f"r_{format_duration(h)}": h for h in config.horizons if h != width}
    return [
        evaluation.Target("frnb", "frnb", width),
        *(evaluation.Target(name, name, h) for name, h in ahead.items()),
        evaluation.Target("freb", "freb", US_PER_DAY),
        evaluation.Target("conr", "conr", width, predictive=False),
    ]


def _markouts(request: ClusterRequest, tables: list[pd.DataFrame], centroids: pd.DataFrame) -> pd.DataFrame:
    table = evaluation.markout_table(pd.concat(tables, ignore_index=True), width_us=request.config.bucket)
    names = _pooled(centroids).drop(columns="mixed")
    names = names.astype({"cluster": table["cluster"].dtype})
    return _front(table.merge(names, on="cluster", how="left"), ["symbol", "cluster", "label", "label_other"])


def _sample(request: ClusterRequest) -> str:
    """Whether a model has seen the days that it labels, or days after them."""
    if request.models is None:
        return "in_sample" if request.config.train_days is None else "out_of_sample"
    known = [date.fromisoformat(day) for model in request.models.values() for day in model.train_days]
    return "in_sample" if max(known, default=date.min) >= request.start else "out_of_sample"


def _row_counts(run: ClusterRun) -> dict[str, Any]:
    made = [run.features[day] for day in run.wanted]
    books = [run.books[day] for day in run.wanted]

    return {
        "trades": sum(day.trades for day in made),
        "kept": sum(day.kept for day in made),
        "labelled": run.labelled,
        "dropped": added([day.dropped for day in made]),
        "book_rows": sum(book.rows for book in books) + sum(sum(book.skipped.values()) for book in books),
        "book_skipped": added([book.skipped for book in books]),
        "reused_artefacts": sum(day.reused for day in made) + sum(book.reused for book in books),
    }


def _notes(request: ClusterRequest, runs: Sequence[ClusterRun]) -> list[str]:
    config = request.config
    notes = missing_notes(runs)
    for run in runs:
        slow = [str(i) for i, model in enumerate(run.models) if not model.fit.get("converged", True)]
        if slow:
            notes.append(f"{run.name}: the fit of window {', '.join(slow)} stopped before it converged")
        for window in run.unfitted:
            days_ = f"{window.test[0]} to {window.test[-1]}"
            notes.append(f"{run.name}: too few trades to fit window {window.id}; {days_} is not tested")
    tested = {day for window in windows(request) for day in window.test}
    left = [day for day in request.days if day not in tested]
    if config.train_days is not None and request.models is None:
        left = left[config.train_days :]
        if left:
            notes.append(f"{', '.join(map(str, left))}: no whole test window is left for these days")
    if config.asof == "inclusive":
        notes.append("asof = inclusive lets a trade see the book it has moved: a leak, for comparison only")
    for name, model in (request.models or {}).items():
        if model.train_days and max(model.train_days) > str(request.end):
            notes.append(
                f"{name}: the model was trained on days after the labelled ones: it knows their future"
            )
    return notes


def _headline(ic: pd.DataFrame) -> dict[str, float | None]:
    """What the ledger says of a finished run."""
    main = ic[(ic["signal"] == "ofi_size") & (ic["target"] == "frnb")]
    columns = (main[name].tolist() for name in ("symbol", "label", "cluster", "ic"))
    return {
        f"{symbol} ic frnb {label} ({cluster})": round(ic, 6) if np.isfinite(ic) else None
        for symbol, label, cluster, ic in zip(*columns, strict=True)
    }


def label(request: ClusterRequest, workers: Workers) -> Path:
    """Label the days of a request with given models, which must have been made with its features.

    Raises InputError naming the symbol without a model, or the field in which the two differ.
    """
    runs = check_request(request)
    models = {name: _model_for(request, name) for name in request.symbols}
    settled = request.config.model_copy(update=_fitted_settings(request, list(models.values())))
    return _run(replace(request, models=models, config=settled), runs, workers)


def _model_for(request: ClusterRequest, name: str) -> Model:
    models = request.models or {}
    if name not in models:
        raise InputError(f"--model: no model of {name}; the file has {', '.join(models)}")
    model = models[name]
    if model.exchange != request.exchange:
        raise InputError(f"--exchange {request.exchange}: the model of {name} is of {model.exchange}")
    mine = request.config.model_dump(mode="json", include=set(FEATURE_KEYS))
    for key, value in model.features.items():
        if mine.get(key) != value:
            raise InputError(
                f"{key} = {mine.get(key)!r}: the model of {name} was fitted with {value!r}; use that"
            )
    return model


def _fitted_settings(request: ClusterRequest, models: Sequence[Model]) -> dict[str, Any]:
    """The settings of the fit, which a model brings along; one that was given must not contradict."""
    settled = request.config.model_fields_set & set(FIT_KEYS)
    if settled:
        raise InputError(f"{min(settled)}: is the model's own when labelling; leave it out")
    fitted = ClusterConfig(**{**request.config.resolved(), **models[0].fitted})
    return {name: getattr(fitted, name) for name in FIT_KEYS}

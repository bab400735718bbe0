"""ClusterLOB for many configs at once: features, fits, labels, mids, and the result tables of each.

A run has one config, a sweep has many that share their features: both go through the same steps, in which
every day is read once, every pass of k-means serves all fits, and every labelled day all models.  A `Part`
is one symbol under one config, on its way to its tables.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from clusterlob_gpu import bars, beside, cluster_days, clustering, cores, days, evaluation, returns
from clusterlob_gpu.cluster_days import FitJob, Fitted, LabelJob, LabelledDay, Labelling, TrainDay
from clusterlob_gpu.clustering import Model
from clusterlob_gpu.config import ClusterConfig, format_duration
from clusterlob_gpu.days import FeatureDay, FeatureTask, MidsDay, next_day
from clusterlob_gpu.errors import InputError
from clusterlob_gpu.files import Location
from clusterlob_gpu.lake.layout import day_of_us, day_start_us
from clusterlob_gpu.pipeline.carry import CarriedRun, prepare_states
from clusterlob_gpu.pipeline.fits import fit_all
from clusterlob_gpu.pipeline.run import (
    RunRequest,
    Work,
)
from clusterlob_gpu.pipeline.stages import Stages
from clusterlob_gpu.schema import FEATURES, US_PER_DAY, Z_FEATURES
from clusterlob_gpu.store import Store

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

    def feature_task(self, request: ClusterRequest, day: date) -> FeatureTask:
        """What makes the features of a day."""
        return self.job(request, day), self.books[day], self.states[day]


@dataclass
class Part:
    """One symbol under one config: what its evaluation needs, and where it is."""

    symbol: str
    exchange: str
    config: ClusterConfig
    store: Location
    windows: list[Window]
    models: dict[int, Model] = field(default_factory=dict)
    """By number of the window; a walk-forward window with too few training rows has none."""
    labelled: dict[int, list[LabelledDay]] = field(default_factory=dict)
    """Days that the lake has, in order, by number of the window."""
    mids: list[MidsDay] = field(default_factory=list)
    problem: InputError | None = None
    """Why there is nothing to evaluate."""

    @property
    def fitted(self) -> list[Window]:
        """Windows with a model."""
        return [window for window in self.windows if window.id in self.models]


def windows(request: ClusterRequest, config: ClusterConfig) -> list[Window]:
    """Fits of the run: one in sample, or one per walk-forward step."""
    asked = request.days
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


def prepare_parts(
    request: ClusterRequest, configs: Sequence[ClusterConfig], runs: Sequence[ClusterRun], work: Work
) -> list[list[Part]]:
    """Every symbol under every config (which share the features of the request's), up to its evaluation."""
    stages, clock = work.stages, work.clock
    with clock.stage("book"):
        prepare_states(runs, request, max(_reach(config) for config in configs), stages)
    with clock.stage("features"):
        _make_features(runs, request, stages)
    parts = [
        [
            Part(run.name, request.exchange, config, request.artefacts, windows(request, config))
            for run in runs
        ]
        for config in configs
    ]
    pairs = [(run, part) for row in parts for run, part in zip(runs, row, strict=True)]
    with clock.stage("fit"):
        _fit(pairs, request, stages)
    pairs = [(run, part) for run, part in pairs if part.problem is None]
    with clock.stage("label"):
        _label(pairs, request, work)
    with clock.stage("returns"):
        _find_mids(pairs, request, stages)
    return parts


def _reach(config: ClusterConfig) -> int:
    """How far past the end of the range a book is looked at (us)."""
    return max(config.reach, 2 * config.bucket, max(returns.MARKOUTS_US))


def _make_features(runs: Sequence[ClusterRun], request: ClusterRequest, stages: Stages) -> None:
    wanted = [(run, day) for run in runs for day in run.wanted]
    tasks = [run.feature_task(request, day) for run, day in wanted]
    made = stages.make("features", days.feature_artefact, days.make_features, tasks)
    for (run, day), found in zip(wanted, made, strict=True):
        run.features[day] = found


Pairs = Sequence[tuple[ClusterRun, Part]]


def _fit(pairs: Pairs, request: ClusterRequest, stages: Stages) -> None:
    """Give every part its models: the given one, or one fitted on the training days of each window.

    A walk-forward window with fewer training rows than clusters has none.
    """
    if request.models is not None:
        for _, part in pairs:
            part.models = {window.id: request.models[part.symbol] for window in part.windows}
        return
    asked = [(run, part, window) for run, part in pairs for window in part.windows]
    trains = _train_days(asked, request, stages)
    jobs: list[tuple[Part, Window, FitJob]] = []
    for run, part, window, train, total in trains:
        if total >= part.config.k:
            folder = run.job(request, window.train[0]).symbol_folder
            jobs.append((part, window, FitJob(folder, train, total, part.config)))
    fits = fit_all([job for _, _, job in jobs], stages)
    for (part, window, job), fitted in zip(jobs, fits, strict=True):
        if isinstance(fitted, InputError):
            part.problem = part.problem or fitted
        else:
            part.models[window.id] = _model(part, job, fitted)
    for run, part in pairs:
        if part.problem is None and not part.models:
            part.problem = _no_fit(run, part)


Trained = tuple[ClusterRun, Part, Window, tuple[TrainDay, ...], int]
"""What a fit trains on: its days, and their rows in all."""


def _train_days(
    asked: Sequence[tuple[ClusterRun, Part, Window]], request: ClusterRequest, stages: Stages
) -> list[Trained]:
    """Training days and rows of every window; only days that a purge cuts have to be looked at."""
    held = [
        [_train_day(run, request, day, window) for day in window.train if day in run.features]
        for run, _, window in asked
    ]
    days_ = {day.key: day for train in held for day in train}
    cut = [day for day in days_.values() if not day.whole]
    counted = stages.map("count", cluster_days.train_rows, cut)
    rows = {key: day.features.kept for key, day in days_.items() if day.whole}
    for day, (met, known) in zip(cut, counted, strict=True):
        days_[day.key], rows[day.key] = replace(day, cut=met), known
    return [
        (*one, tuple(days_[day.key] for day in train), sum(rows[day.key] for day in train))
        for one, train in zip(asked, held, strict=True)
    ]


def _train_day(run: ClusterRun, request: ClusterRequest, day: date, window: Window) -> TrainDay:
    return TrainDay(run.feature_task(request, day), run.features[day], window.train_until)


def _no_fit(run: ClusterRun, part: Part) -> InputError:
    kept, found = (sum(getattr(day, name) for day in run.features.values()) for name in ("kept", "trades"))
    if part.config.train_days is None:
        return InputError(
            f"k = {part.config.k}: {kept} of {found} trades of the training days have features; "
            "use a shorter window, or see the drop counts with more days"
        )
    return InputError(
        f"k = {part.config.k}: no window of {run.name} has that many trades with features; see the "
        "drop counts, and use a shorter window, a shorter purge or more days"
    )


def _model(part: Part, job: FitJob, fitted: Fitted) -> Model:
    return clustering.make_model(
        fitted.fit,
        part.config.margin,
        fitted.bounds,
        symbol=part.symbol,
        exchange=part.exchange,
        train_days=[str(day.features.day) for day in job.train],
        features=part.config.model_dump(mode="json", include=set(FEATURE_KEYS)),
        fitted=part.config.model_dump(mode="json", include=set(FIT_KEYS)),
    )


def _label(pairs: Pairs, request: ClusterRequest, work: Work) -> None:
    """Label the test days of every part's windows; a day is read once for all models that label it."""
    asked: dict[tuple[str, date], list[tuple[Part, Window, Labelling]]] = {}
    jobs: dict[tuple[str, date], LabelJob] = {}
    for run, part in pairs:
        for window in part.fitted:
            for day in window.test:
                if day in run.features:
                    labelling = (part.models[window.id], part.config.bucket)
                    asked.setdefault((run.name, day), []).append((part, window, labelling))
                    jobs.setdefault((run.name, day), _label_job(run, request, day, work))
    hashes: dict[int, str] = {}

    def known(labelling: Labelling) -> tuple[str, int]:
        """What tells a labelling from others; models are hashed once."""
        model, width = labelling
        if id(model) not in hashes:
            hashes[id(model)] = cluster_days.model_hash(model)
        return hashes[id(model)], width

    distinct = {key: {known(labelling): labelling for _, _, labelling in asked[key]} for key in jobs}
    tasks = [replace(job, asked=tuple(distinct[key].values())) for key, job in jobs.items()]
    made = work.stages.make("label", cluster_days.label_artefacts, cluster_days.label_day, tasks)
    for key, labelled in zip(jobs, made, strict=True):
        found = dict(zip(distinct[key], labelled, strict=True))
        for part, window, labelling in asked[key]:
            part.labelled.setdefault(window.id, []).append(found[known(labelling)])


def _label_job(run: ClusterRun, request: ClusterRequest, day: date, work: Work) -> LabelJob:
    keep = request.config.keep_trades and work.folder is not None
    file = work.folder / "trade_features.parquet" / f"{run.name}-{day}.parquet" if keep else None  # type: ignore[operator]
    return LabelJob(
        job=run.job(request, day),
        book=run.books[day],
        next_book=run.books.get(next_day(day)),
        state=run.states[day],
        features=run.features[day],
        asked=(),
        trades_file=file,
    )


def _find_mids(pairs: Pairs, request: ClusterRequest, stages: Stages) -> None:
    """Mids at all times at which the buckets of any part need one, asked of the days that decide them."""
    spans: dict[str, set[tuple[date, date, int, tuple[int, ...]]]] = {}
    runs: dict[str, ClusterRun] = {}
    for run, part in pairs:
        runs[run.name] = run
        asked = spans.setdefault(run.name, set())
        asked |= {
            (window.test[0], window.test[-1], part.config.bucket, part.config.horizons)
            for window in part.fitted
        }
    tasks, owners = [], []
    for name, asked in spans.items():
        run, all_times = runs[name], _bucket_times(asked)
        deciding = returns.day_before(all_times)
        for number in np.unique(deciding):
            day = day_of_us(int(number) * US_PER_DAY)
            if day in run.books:
                mine = all_times[deciding == number]
                tasks.append((run.job(request, day), run.books[day], run.carries.get(day), mine))
                owners.append(name)
    made = stages.make("mids", days.mids_artefact, days.mids_day, tasks, request.config.book)
    for _, part in pairs:
        part.mids = [mids for name, mids in zip(owners, made, strict=True) if name == part.symbol]


def _bucket_times(spans: Iterable[tuple[date, date, int, tuple[int, ...]]]) -> np.ndarray:
    """Every time (us) at which the buckets of spans (first and last day, bucket, horizons) need a mid."""
    times = [np.empty(0, np.int64)]
    for first, last, bucket, horizons in spans:
        starts = np.arange(day_start_us(first), day_start_us(next_day(last)), bucket)
        times.append(returns.bucket_times(starts, bucket, horizons))
    return np.unique(np.concatenate(times))


def part_tables(part: Part) -> dict[str, pd.DataFrame]:
    """Result tables of a part by name; `windows` too where its walk-forward was fitted here."""
    store, previous = Store(part.store), None
    centroids, flows, markouts, fits = [], [], [], []
    for window in part.fitted:
        model, labelled = part.models[window.id], part.labelled.get(window.id, [])
        flows.append(_window_flow(part, window, labelled, store))
        markouts += [day.markouts(store) for day in labelled]
        table = _centroids(model, previous, labelled, part.config)
        centroids.append(table.assign(symbol=part.symbol, window_id=np.int32(window.id)))
        fits.append({"symbol": part.symbol, "window_id": np.int32(window.id)} | _fit_row(model, window))
        previous = model
    buckets = pd.concat(flows, ignore_index=True)
    starts = np.unique(buckets["bucket_ts"].to_numpy())
    mids = days.read_mids(store, part.mids)
    ahead = returns.return_columns(starts, mids, part.config.bucket, part.config.horizons)
    tables = {
        "centroids": front(pd.concat(centroids, ignore_index=True), ["symbol", "window_id"]),
        "buckets": front(buckets.merge(ahead, on="bucket_ts", how="left"), ["symbol", "window_id"]),
    }
    tables["markouts"] = _markouts(part.config, markouts, tables["centroids"])
    if part.config.train_days is not None and all(window.train for window in part.fitted):
        tables["windows"] = front(pd.DataFrame(fits), ["symbol", "window_id"])
    return tables


def front(table: pd.DataFrame, names: list[str]) -> pd.DataFrame:
    """The table with some columns first."""
    return table[[*names, *(name for name in table.columns if name not in names)]]


def _window_flow(part: Part, window: Window, labelled: Sequence[LabelledDay], store: Store) -> pd.DataFrame:
    """Every bucket of a window's test days; null flow on days that the lake does not have."""
    numbers = part.models[window.id].numbers
    flows = {day.day: day.flow(store) for day in labelled}
    for day in window.test:
        if day not in flows:
            start = day_start_us(day)
            flows[day] = bars.empty_flow_table(start=start, width=part.config.bucket, numbers=numbers)
    table = pd.concat([flows[day] for day in window.test], ignore_index=True)
    return table.assign(symbol=part.symbol, window_id=np.int32(window.id))


def _centroids(
    model: Model, previous: Model | None, labelled: Sequence[LabelledDay], config: ClusterConfig
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
    table["interpretation"] = clustering.interpret(model.centroids, config.same_side)
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


def ic_of(config: ClusterConfig, buckets: pd.DataFrame, centroids: pd.DataFrame) -> pd.DataFrame:
    """`evaluation.cluster_ic` with the clusters' names, corrected over the symbols of the table."""
    make = partial(evaluation.cluster_ic, width_us=config.bucket, seed=config.seed)
    targets = _targets(config)
    with cores.spare(len(targets) - 1) as more:
        table = beside.ask("tables", make, buckets, targets, hands=1 + more)()
    pooled = _pooled(centroids).drop(columns="label_other")
    table = table.merge(pooled, on=["symbol", "cluster"], how="left").fillna({"label": "all"})
    # Beyond the named roles a number may stand for other trades in every window.
    table.loc[table.pop("mixed").eq(True), "verdict"] = evaluation.MIXED
    return table


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


def _markouts(config: ClusterConfig, tables: list[pd.DataFrame], centroids: pd.DataFrame) -> pd.DataFrame:
    table = evaluation.markout_table(pd.concat(tables, ignore_index=True), width_us=config.bucket)
    names = _pooled(centroids).drop(columns="mixed")
    names = names.astype({"cluster": table["cluster"].dtype})
    return front(table.merge(names, on="cluster", how="left"), ["symbol", "cluster", "label", "label_other"])

"""Tasks of one (symbol, day) that fit and label; see `days` for what a task is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from clusterlob_gpu import bars, clustering, context, features, kernels, returns, schema
from clusterlob_gpu.clustering import Bounds, Fit, Model, Partial
from clusterlob_gpu.config import ClusterConfig, config_hash
from clusterlob_gpu.days import (
    BookDay,
    ClusterDay,
    FeatureDay,
    State,
    book_rows,
    day_context,
    feature_artefact,
    scored_day,
)
from clusterlob_gpu.errors import ClusterlobError, InputError
from clusterlob_gpu.files import Location
from clusterlob_gpu.lake import symbols
from clusterlob_gpu.lake.layout import day_start_us
from clusterlob_gpu.schema import FEATURES, US_PER_DAY, Z_FEATURES, Context
from clusterlob_gpu.store import Artefact, Made, Store, load_column, read_frame, save_columns, source_hash

FIT_CODE = source_hash(__file__, [kernels, clustering, Path(__file__).parent / "pipeline" / "fits.py"])
LABEL_CODE = source_hash(__file__, [kernels, bars, clustering, context, features, returns, schema])

# ---- training -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainDay:
    """A training day: its features, up to the time (us) at which the purge begins."""

    store: Location
    features: FeatureDay
    until: int

    @property
    def key(self) -> tuple[str, int]:
        """What tells its rows from those of any other training day."""
        return self.features.made.address, self.until

    @property
    def whole(self) -> bool:
        """Whether every row of the day may be trained on."""
        return self.until >= day_start_us(self.features.day) + US_PER_DAY

    def z(self) -> np.ndarray:
        """z-scores (6, n) float32 of the rows that may be trained on."""
        folder = Store(self.store).folder(self.features.made.address)
        z = load_column(folder, "z")
        if self.whole:
            return z
        rows = int(np.searchsorted(load_column(folder, "ts"), self.until))
        return np.ascontiguousarray(z[:, :rows])


def train_rows(train: TrainDay) -> int:
    """Rows of a training day."""
    return train.z().shape[1]


@dataclass(frozen=True)
class SampleJob:
    """The share of a day in the seeded sample of a training of `total` rows."""

    train: TrainDay
    symbol: str
    total: int
    seed: int


@dataclass(frozen=True)
class Sample:
    """Sampled rows of a day: where they are."""

    made: Made


def sample_artefact(task: SampleJob) -> Artefact:
    """Name of a day's sample: of its features and of how much is wanted."""
    inputs = {
        "code": FIT_CODE,
        "features": task.train.features.made.address,
        "until": None if task.train.whole else task.train.until,
        "total": task.total,
        "seed": task.seed,
    }
    return Artefact("sample", task.symbol, task.train.features.day.isoformat(), inputs)


def sample_day(task: SampleJob) -> Sample:
    """Sample a day's rows (6, m)."""

    def fill(folder: Path) -> dict[str, Any]:
        z, number = task.train.z(), (task.train.features.day - date(1970, 1, 1)).days
        save_columns(folder, z=z[:, clustering.sample_rows(z.shape[1], task.total, task.seed, number)])
        return {}

    return Sample(Store(task.train.store).make(sample_artefact(task), fill).brief())


@dataclass(frozen=True)
class FitJob:
    """One fit: the rows of its training days, `total` in all."""

    symbol: str
    train: tuple[TrainDay, ...]
    total: int
    config: ClusterConfig

    def artefact(self) -> Artefact:
        """Name of the fit: of the features it sees and of its settings."""
        days = [day.features.day.isoformat() for day in self.train]
        cuts = [None if day.whole else day.until for day in self.train]
        inputs = {
            "code": FIT_CODE,
            "features": [day.features.made.address for day in self.train],
            "until": cuts,
            "config": self.config.model_dump(include={"k", "seed", "n_init", "engine", "winsorize"}),
        }
        return Artefact("fit", self.symbol, f"{days[0]}..{days[-1]}", inputs)


@dataclass(frozen=True)
class Fitted:
    """A fit that the store holds, the bounds at which its rows were clipped, and where it is."""

    fit: Fit
    bounds: Bounds
    made: Made


def save_fit(store: Store, job: FitJob, fit: Fit, bounds: Bounds) -> Fitted:
    """Keep a fit in the store."""

    def fill(folder: Path) -> dict[str, Any]:
        save_columns(folder, centroids=fit.centroids, counts=fit.counts, low=bounds.low, high=bounds.high)
        return {"inertia": fit.inertia, "passes": fit.passes, "converged": fit.converged}

    return load_fit(store, store.make(job.artefact(), fill))


def load_fit(store: Store, made: Made) -> Fitted:
    """A fit from the store."""
    folder = store.folder(made.address)
    centroids, counts, low, high = (
        np.array(load_column(folder, name)) for name in ("centroids", "counts", "low", "high")
    )
    return Fitted(Fit(centroids, counts, **made.record), Bounds(low, high), made.brief())


def start_fit(task: tuple[FitJob, Bounds, tuple[Sample, ...]]) -> np.ndarray | InputError:
    """Starting centres (k, 6) from the days' samples, clipped, or why there are none."""
    fit, bounds, samples = task
    store = Store(fit.train[0].store)
    rows = [load_column(store.folder(sample.made.address), "z") for sample in samples]
    config, sample = fit.config, bounds.clip(np.concatenate(rows, axis=1))
    try:
        return clustering.starting_centres(sample, config.k, config.seed, config.n_init)
    except InputError as error:
        return error


def fit_merged(task: tuple[FitJob, Bounds, np.ndarray]) -> Fit:
    """scikit-learn's fit from given centres, on all training rows in the memory of one worker."""
    fit, bounds, centres = task
    rows = np.concatenate([train.z() for train in fit.train], axis=1)
    return clustering.fit_sklearn(bounds.clip(rows), centres)


Share = tuple[TrainDay, Bounds, np.ndarray]
"""What one fit asks of one of its days in one pass: rows, bounds and centroids."""


def lloyd_day(shares: Sequence[Share]) -> list[Partial]:
    """One Lloyd pass over a day for every fit that trains on it."""
    held: dict[int, np.ndarray] = {}
    for train, _, _ in shares:
        if train.until not in held:
            held[train.until] = train.z()
    return [clustering.partial(held[train.until], bounds, centres) for train, bounds, centres in shares]


def high_counts_day(train: TrainDay) -> np.ndarray:
    """Counts of the upper halves of a training day's z-scores."""
    return clustering.high_counts(train.z())


def low_counts_day(task: tuple[TrainDay, np.ndarray]) -> np.ndarray:
    """Counts of the lower halves inside the bins asked for."""
    train, bins = task
    return clustering.low_counts(train.z(), bins)


# ---- labelling ------------------------------------------------------------------------------------------

Labelling = tuple[Model, int]
"""A model, and the width (us) of the buckets in which its labels are summed up."""


@dataclass(frozen=True)
class LabelJob:
    """Label one day with models, and sum each labelling up in buckets of its own width."""

    job: ClusterDay
    book: BookDay
    next_book: BookDay | None
    state: State
    features: FeatureDay
    asked: tuple[Labelling, ...]
    trades_file: Path | None
    """Where the trades labelled by the first model are written, if anywhere."""


@dataclass(frozen=True)
class LabelledDay:
    """What a day's labelled trades add up to, clusters in the order of the model; tables in the store."""

    day: date
    made: Made
    counts: np.ndarray
    z_sums: np.ndarray
    raw_sums: np.ndarray

    @classmethod
    def of(cls, day: date, made: Made) -> LabelledDay:
        """From what the store has kept."""
        counts = np.array(made.record["counts"], np.int64)
        z_sums, raw_sums = np.array(made.record["z_sums"]), np.array(made.record["raw_sums"])
        return cls(day, made.brief(), counts, z_sums, raw_sums)

    def flow(self, store: Store) -> pd.DataFrame:
        """`bars.flow_table` of the day."""
        return read_frame(store.folder(self.made.address) / "flow.parquet")

    def markouts(self, store: Store) -> pd.DataFrame:
        """`returns.day_markouts` of the day."""
        return read_frame(store.folder(self.made.address) / "markouts.parquet")


def label_artefacts(task: LabelJob) -> list[Artefact]:
    """Names of a day's labellings, in the order asked for."""
    carry = task.state.book
    shared = {
        "code": LABEL_CODE,
        "features": task.features.made.address,
        "book": task.book.made.address,
        "next_book": task.next_book.made.address if task.next_book else None,
        "carry": asdict(carry) if carry else None,
        "config": task.job.config.model_dump(include={"same_side", "max_staleness"}),
    }
    return [
        task.job.artefact("label", **shared, model=model_hash(model), bucket=width)
        for model, width in task.asked
    ]


def model_hash(model: Model) -> str:
    """Hash of all of a model that labels depend on."""
    bounds = [model.bounds.low.tolist(), model.bounds.high.tolist()]
    return config_hash({"centroids": model.centroids.tolist(), "numbers": model.numbers, "bounds": bounds})


@dataclass(frozen=True)
class _Kept:
    """A day's trades with features, as the store has them, and the book they met."""

    ts: np.ndarray
    sign: np.ndarray
    price: np.ndarray
    qty: np.ndarray
    row: np.ndarray
    z: np.ndarray
    raw: np.ndarray
    around: Context


def label_day(task: LabelJob) -> list[LabelledDay]:
    """Label a day's trades with every model and sum them up; writes the trades themselves if asked to."""
    store, artefacts = Store(task.job.store), label_artefacts(task)
    held: list[_Kept] = []

    def trades() -> _Kept:
        if not held:
            held.append(_kept(task))
        return held[0]

    made = []
    for artefact, (model, width) in zip(artefacts, task.asked, strict=True):

        def fill(folder: Path, model: Model = model, width: int = width) -> dict[str, Any]:
            return _fill_labelled(folder, task, trades(), model, width)

        made.append(LabelledDay.of(task.job.day, store.make(artefact, fill)))
    if task.trades_file is not None:
        kept = trades()
        _write_trades(task, task.asked[0][0].label(kept.z), kept.raw)
    return made


def _kept(task: LabelJob) -> _Kept:
    folder = Store(task.job.store).folder(task.features.made.address)
    names = ("ts", "sign", "price", "qty", "row", "z")
    ts, sign, price, qty, row, z = (load_column(folder, name) for name in names)
    around = day_context(task.job, task.book, task.state.book)
    raw = features.raw_features(ts, sign, qty, row, around, task.job.config.same_side == "own")
    return _Kept(ts, sign, price, qty, row, z, raw, around)


def _fill_labelled(folder: Path, task: LabelJob, trades: _Kept, model: Model, width: int) -> dict[str, Any]:
    symbol, start = task.job.lake.symbol, day_start_us(task.job.day)
    label, k = model.label(trades.z), len(model.numbers)
    z_sums, raw_sums = np.zeros((k, len(FEATURES))), np.zeros((k, len(FEATURES)))
    kernels.cluster_sums(trades.z, label, z_sums)
    kernels.cluster_sums(trades.raw, label, raw_sums)
    flow = bars.day_flow(
        trades.ts, trades.sign, trades.price, trades.qty, label, start=start, width=width, k=k
    )
    units = {"price_unit": symbol.price_unit, "qty_unit": symbol.qty_unit}
    table = bars.flow_table(flow, start=start, width=width, numbers=model.numbers, **units)
    table.to_parquet(folder / "flow.parquet", index=False)
    _markouts(task, trades, model, width, label).to_parquet(folder / "markouts.parquet", index=False)
    counts = np.bincount(label, minlength=k)
    return {"counts": counts.tolist(), "z_sums": z_sums.tolist(), "raw_sums": raw_sums.tolist()}


def _markouts(task: LabelJob, trades: _Kept, model: Model, width: int, label: np.ndarray) -> pd.DataFrame:
    """Mark-outs of a day, with the first minutes of the next day's book where the lake has it."""
    job = task.job
    stop = day_start_us(job.day) + US_PER_DAY
    book_ts, mid2 = trades.around.ts, trades.around.mid2
    if task.next_book is not None:
        soon = book_rows(job, task.next_book, until=stop + max(returns.MARKOUTS_US))
        book_ts = np.concatenate([book_ts, soon["ts"].to_numpy(np.int64)])
        mid2 = np.concatenate([mid2, (soon["bid"] + soon["ask"]).to_numpy(np.int64)])
        stop += US_PER_DAY
    return returns.day_markouts(
        trades.ts,
        trades.sign,
        trades.row,
        label,
        book_ts,
        mid2,
        covered_until=stop,
        max_staleness=job.config.max_staleness,
        start=day_start_us(job.day),
        width=width,
        numbers=model.numbers,
    )


def _write_trades(task: LabelJob, label: np.ndarray, raw: np.ndarray) -> None:
    """Write the kept trades of a day, z-scores in float64, computed anew from the lake."""
    assert task.trades_file is not None
    symbol = task.job.lake.symbol
    if feature_artefact((task.job, task.book, task.state)).address != task.features.made.address:
        raise ClusterlobError(
            f"{symbol.name} {task.job.day}: trades were changed in the lake since they were labelled; "
            "give the same command again"
        )
    met, z, _ = scored_day(task.job, task.book, task.state, np.float64)
    columns: dict[str, np.ndarray] = {
        "ts_local_us": met.ts,
        "sign": met.sign,
        "price": symbols.decode(met.price, symbol.price_unit),
        "qty": symbols.decode(met.qty, symbol.qty_unit),
    }
    columns |= dict(zip(FEATURES, raw, strict=True)) | dict(zip(Z_FEATURES, z, strict=True))
    columns["cluster"] = np.array(task.asked[0][0].numbers, np.int8)[label]
    task.trades_file.parent.mkdir(parents=True, exist_ok=True)
    temporary = task.trades_file.with_name(f".{task.trades_file.name}.tmp")
    pq.write_table(pa.table(columns), temporary, compression="zstd")
    temporary.replace(task.trades_file)

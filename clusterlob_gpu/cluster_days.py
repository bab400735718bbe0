"""Tasks of one (symbol, day) that fit and label; see `days` for what a task is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from types import ModuleType
from typing import Any, Self

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from clusterlob_gpu import (
    backend,
    bars,
    clustering,
    context,
    features,
    kernels,
    returns,
    schema,
    settling,
    starts,
)
from clusterlob_gpu.bars import DayFlow
from clusterlob_gpu.clustering import Bounds, Fit, Model, Partial
from clusterlob_gpu.config import ClusterConfig, config_hash
from clusterlob_gpu.days import (
    BookDay,
    ClusterDay,
    FeatureDay,
    FeatureTask,
    Meetings,
    State,
    day_context,
    day_pieces,
    day_scores,
    feature_artefact,
    first_rows,
    with_room,
)
from clusterlob_gpu.errors import ClusterlobError
from clusterlob_gpu.features import Piece
from clusterlob_gpu.files import Location
from clusterlob_gpu.lake import symbols
from clusterlob_gpu.lake.layout import day_start_us
from clusterlob_gpu.returns import Markouts, Mids
from clusterlob_gpu.schema import FEATURES, US_PER_DAY, Z_FEATURES, Context
from clusterlob_gpu.settling import Settled
from clusterlob_gpu.store import Artefact, Made, Store, load_column, read_frame, save_columns, source_hash

_HERE = Path(__file__).parent
_KERNELS: list[ModuleType | Path] = [kernels, _HERE / "device_kernels.py", backend]
FIT_CODE = source_hash(__file__, [*_KERNELS, clustering, settling, starts, _HERE / "pipeline" / "fits.py"])
LABEL_CODE = source_hash(__file__, [*_KERNELS, bars, clustering, context, features, returns, schema])

# ---- training -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainDay:
    """A training day: its features, up to the time (us) at which the purge begins."""

    task: FeatureTask
    features: FeatureDay
    until: int
    cut: int | None = None
    """Met trades before `until`; None for all of the day."""

    @property
    def job(self) -> ClusterDay:
        """What its tasks need to know."""
        return self.task[0]

    @property
    def key(self) -> tuple[str, int]:
        """What tells its rows from those of any other training day."""
        return self.features.made.address, self.until

    @property
    def whole(self) -> bool:
        """Whether every row of the day may be trained on."""
        return self.until >= day_start_us(self.features.day) + US_PER_DAY

    def z(self) -> Any:
        """z-scores (6, n) float32 of the rows that may be trained on; NaN where a trade has none."""
        z = day_scores(self.task, self.features)
        return z if self.cut is None else z[:, : self.cut]


def train_rows(train: TrainDay) -> tuple[int, int]:
    """Met trades of a day before its purge begins, and how many of them have z-scores."""
    job, book, state = train.task

    def count() -> tuple[int, int]:
        meetings = Meetings(job, day_context(job, book, state.book))
        cut = sum(int(job.on.xp.count_nonzero(met.ts < train.until)) for met in meetings)
        z = day_scores(train.task, train.features)[0, :cut]
        return cut, int(job.on.xp.count_nonzero(~job.on.xp.isnan(z)))

    return with_room(job.on, count)


@dataclass(frozen=True)
class SampleJob:
    """The share of a day in the seeded sample of a training of `total` rows."""

    train: TrainDay
    symbol: str
    total: int
    seed: int

    @property
    def job(self) -> ClusterDay:
        """What its tasks need to know."""
        return self.train.job


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
    job = task.job

    def fill(folder: Path) -> dict[str, Any]:
        z, number = task.train.z(), (job.day - date(1970, 1, 1)).days
        known = job.on.xp.flatnonzero(~job.on.xp.isnan(z[0]))
        rows = starts.sample_rows(len(known), task.total, task.seed, number)
        save_columns(folder, z=job.on.to_host(z[:, known[job.on.xp.asarray(rows)]]))
        return {}

    made = with_room(job.on, lambda: Store(job.store).make(sample_artefact(task), fill))
    return Sample(made.brief())


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
        inputs = self.train[0].job.machine | {
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


@dataclass(frozen=True)
class StartJob:
    """One of the starts of a fit; of its days no more than where their samples are, for there are many."""

    store: Location
    samples: tuple[str, ...]
    """Addresses."""
    bounds: Bounds
    k: int
    seed: int
    number: int


def start_fit(task: StartJob) -> tuple[Fit | None, int]:
    """`starts.attempt` on the days' samples, clipped, and the rows of them together."""
    store = Store(task.store)
    rows = [load_column(store.folder(address), "z") for address in task.samples]
    sample = task.bounds.clip(np.concatenate(rows, axis=1))
    return starts.attempt(sample, task.k, task.seed, task.number), sample.shape[1]


def fit_merged(task: tuple[FitJob, Bounds, np.ndarray]) -> Fit:
    """The library's fit from given centres, on all training rows in the memory of one worker."""
    fit, bounds, centres = task
    on = fit.train[0].job.on

    def merged() -> Fit:
        rows = on.xp.concatenate([clustering.known_rows(train.z(), on) for train in fit.train], axis=1)
        return clustering.fit_merged(bounds.clip(rows, on), centres, on)

    return with_room(on, merged)


def clipped_rows(task: tuple[TrainDay, Bounds]) -> Any:
    """Training rows of a day as cuML wants them: (n, 6) float32 on the device, clipped, none with a NaN."""
    train, bounds = task
    on = train.job.on

    def rows() -> Any:
        return on.xp.ascontiguousarray(bounds.clip(clustering.known_rows(train.z(), on), on).T)

    return with_room(on, rows)


@dataclass(frozen=True)
class Share:
    """What one fit asks of one of its days in one pass."""

    train: TrainDay
    bounds: Bounds
    centroids: np.ndarray
    reach: float = 0.0
    """Distance for which rows shall be settled; 0 for a plain pass."""
    most: int = 0
    """Rows that may be left when they are."""

    def passed(self, z: Any) -> Partial | Settled:
        """The day's share of the pass, z as `TrainDay.z`."""
        return settling.passed(z, self.bounds, self.centroids, self.reach, self.most, self.train.job.on)


def lloyd_day(shares: Sequence[Share]) -> list[Partial | Settled]:
    """One Lloyd pass over a day for every fit that trains on it."""

    def passes() -> list[Partial | Settled]:
        held = {share.train.cut: share.train.z() for share in shares}
        return [share.passed(held[share.train.cut]) for share in shares]

    return with_room(shares[0].train.job.on, passes)


def high_counts_day(train: TrainDay) -> np.ndarray:
    """Counts of the upper halves of a training day's z-scores."""
    return with_room(train.job.on, lambda: clustering.high_counts(train.z(), train.job.on))


def low_counts_day(task: tuple[TrainDay, np.ndarray]) -> np.ndarray:
    """Counts of the lower halves inside the bins asked for."""
    train, bins = task
    return with_room(train.job.on, lambda: clustering.low_counts(train.z(), bins, train.job.on))


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

    @property
    def feature_task(self) -> FeatureTask:
        """The task that makes the day's features."""
        return self.job, self.book, self.state


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
    } | task.job.machine
    return [
        task.job.artefact("label", **shared, model=model_hash(model), bucket=width)
        for model, width in task.asked
    ]


def model_hash(model: Model) -> str:
    """Hash of all of a model that labels depend on."""
    bounds = [model.bounds.low.tolist(), model.bounds.high.tolist()]
    return config_hash({"centroids": model.centroids.tolist(), "numbers": model.numbers, "bounds": bounds})


def label_day(task: LabelJob) -> list[LabelledDay]:
    """Label a day's trades with every model and sum them up; writes the trades themselves if asked to."""
    store, artefacts = Store(task.job.store), label_artefacts(task)
    missing = [n for n, artefact in enumerate(artefacts) if store.find(artefact, verify=True) is None]

    def work() -> list[LabelledDay]:
        asked = [task.asked[n] for n in missing]
        sums = dict(zip(missing, _sums(task, asked), strict=True)) if missing else {}
        made = []
        for number, (artefact, (model, width)) in enumerate(zip(artefacts, task.asked, strict=True)):

            def fill(folder: Path, n: int = number, asked: Labelling = (model, width)) -> dict[str, Any]:
                held = sums[n] if n in sums else _sums(task, [asked])[0]
                return held.write(folder, task, *asked)

            made.append(LabelledDay.of(task.job.day, store.make(artefact, fill)))
        return made

    labelled = with_room(task.job.on, work)
    if task.trades_file is not None:
        _write_trades(task)
    return labelled


@dataclass(frozen=True)
class _Sums:
    """What the labelled trades of a day add up to under one model."""

    z: np.ndarray
    raw: np.ndarray
    flow: DayFlow
    markouts: Markouts

    @classmethod
    def none(cls, model: Model, width: int) -> Self:
        """Of no trades yet."""
        k = len(model.numbers)
        z, raw = np.zeros((2, k, len(FEATURES)))
        return cls(z, raw, DayFlow.none(width, k), Markouts.none(width, k))

    def write(self, folder: Path, task: LabelJob, model: Model, width: int) -> dict[str, Any]:
        """Write the tables of the day, and give the rest as a record."""
        symbol, start = task.job.lake.symbol, day_start_us(task.job.day)
        units = {"price_unit": symbol.price_unit, "qty_unit": symbol.qty_unit}
        flow = bars.flow_table(self.flow, start=start, width=width, numbers=model.numbers, **units)
        flow.to_parquet(folder / "flow.parquet", index=False)
        table = self.markouts.table(start=start, width=width, numbers=model.numbers)
        table.to_parquet(folder / "markouts.parquet", index=False)
        counts = self.flow.counts[..., 0].sum(axis=0)
        return {"counts": counts.tolist(), "z_sums": self.z.tolist(), "raw_sums": self.raw.tolist()}


def _sums(task: LabelJob, asked: Sequence[Labelling]) -> list[_Sums]:
    """Label a day's trades piece by piece with every model asked for, and sum them up."""
    job, on = task.job, task.job.on
    around = day_context(job, task.book, task.state.book)
    z, mids = day_scores(task.feature_task, task.features), _mids(task, around)
    sums = [_Sums.none(model, width) for model, width in asked]
    for piece in day_pieces(task.feature_task, Meetings(job, around), around):
        scores = on.xp.ascontiguousarray(z[:, piece.rows])
        for (model, width), held in zip(asked, sums, strict=True):
            label, when = model.label(scores, on), {"start": day_start_us(job.day), "width": width}
            on.kernels.cluster_sums(scores, label, held.z)
            on.kernels.cluster_sums(piece.raw, label, held.raw)
            held.flow.add(piece.met, label, **when, on=on)
            staleness = job.config.max_staleness
            held.markouts.add(piece.met, label, mids, max_staleness=staleness, **when, on=on)
    return sums


def _mids(task: LabelJob, around: Context) -> Mids:
    """Mids of a day, with the first minutes of the next day's book where the lake has it."""
    job, on = task.job, task.job.on
    stop = day_start_us(job.day) + US_PER_DAY
    if task.next_book is None:
        return Mids(around.ts, around.mid2, stop)
    soon = first_rows(job, task.next_book, ("ts", "bid", "ask"), stop + max(returns.MARKOUTS_US))
    book_ts = on.xp.concatenate([around.ts, soon["ts"]])
    mid2 = on.xp.concatenate([around.mid2, soon["bid"] + soon["ask"]])
    return Mids(book_ts, mid2, stop + US_PER_DAY)


def _write_trades(task: LabelJob) -> None:
    """Write the kept trades of a day, z-scores in float64, computed anew from the lake."""
    assert task.trades_file is not None
    symbol = task.job.lake.symbol
    if feature_artefact(task.feature_task).address != task.features.made.address:
        raise ClusterlobError(
            f"{symbol.name} {task.job.day}: trades were changed in the lake since they were labelled; "
            "give the same command again"
        )
    task.trades_file.parent.mkdir(parents=True, exist_ok=True)
    temporary = task.trades_file.with_name(f".{task.trades_file.name}.tmp")
    with_room(task.job.on, lambda: _write_pieces(task, temporary))
    temporary.replace(task.trades_file)


def _write_pieces(task: LabelJob, path: Path) -> None:
    """Write the trades piece by piece, so that they need not be in memory together."""
    job, on, (model, _) = task.job, task.job.on, task.asked[0]
    around = day_context(job, task.book, task.state.book)
    stored = day_scores(task.feature_task, task.features)
    with pq.ParquetWriter(path, _TRADE_FEATURES, compression="zstd") as writer:
        for piece in day_pieces(task.feature_task, Meetings(job, around), around):
            z = on.xp.empty(piece.raw.shape)
            features.z_scores(piece, job.config.window, z, on)
            # Labels are those of the scores as they were stored.
            label = on.to_host(model.label(stored[:, piece.rows], on))
            known = label != kernels.NO_CLUSTER
            writer.write_table(_trade_table(task, piece, on.to_host(z), label).filter(pa.array(known)))


_TRADE_FEATURES = pa.schema(
    [("ts_local_us", pa.int64()), ("sign", pa.int8()), ("price", pa.float64()), ("qty", pa.float64())]
    + [(name, pa.float64()) for name in (*FEATURES, *Z_FEATURES)]
    + [("cluster", pa.int8())]
)


def _trade_table(task: LabelJob, piece: Piece, z: np.ndarray, label: np.ndarray) -> pa.Table:
    symbol, to_host = task.job.lake.symbol, task.job.on.to_host
    columns: dict[str, np.ndarray] = {
        "ts_local_us": to_host(piece.met.ts),
        "sign": to_host(piece.met.sign),
        "price": symbols.decode(to_host(piece.met.price), symbol.price_unit),
        "qty": symbols.decode(to_host(piece.met.qty), symbol.qty_unit),
    }
    columns |= dict(zip(FEATURES, to_host(piece.raw), strict=True)) | dict(zip(Z_FEATURES, z, strict=True))
    columns["cluster"] = np.array(task.asked[0][0].numbers, np.int8)[label]
    return pa.table(columns, schema=_TRADE_FEATURES)

"""Real captures through the ingest and the whole pipeline, against the slow reference.

The quotes of AIG are many: there the reference sees the first half hour of a day, the pipeline the
whole day.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import reference as ref

from clusterlob_gpu import pipeline
from clusterlob_gpu.clustering import Model, read_models
from clusterlob_gpu.config import ClusterConfig, make_config
from clusterlob_gpu.lake.tardis import ingest_tardis
from clusterlob_gpu.workers import Place, open_workers

CAPTURES = Path(__file__).parents[2] / "shared" / "data" / "tardis"
pytestmark = pytest.mark.skipif(
    not CAPTURES.is_dir(), reason="the real captures in ../shared/data are absent"
)

SECOND, MINUTE, HOUR = 1_000_000, 60_000_000, 3_600_000_000
RETURNS = {"conr": "conr", "frnb": "frnb", "freb": "freb", "r_15m": str(15 * MINUTE), "r_1h": str(HOUR)}
THREADS = Place(kind="threads", n_workers=2)


@dataclass(frozen=True)
class Capture:
    """A recorded stretch of a market; the reference sees what was received before `until`."""

    exchange: str
    symbols: tuple[str, ...]
    start: date
    end: date
    settings: dict[str, Any] = field(default_factory=dict)
    until: int | None = None

    @property
    def config(self) -> ClusterConfig:
        return make_config({"keep_trades": True, "horizons": ["15m", "1h"]} | self.settings)


SETS = {
    "bitstamp 2015": Capture("bitstamp", ("BTCUSD",), date(2015, 5, 1), date(2015, 5, 1)),
    "binance 2023": Capture("binance-futures", ("BTCUSDT",), date(2023, 4, 4), date(2023, 4, 5)),
    "binance 2024": Capture("binance-futures", ("BTCUSDT", "ETHUSDT"), date(2024, 7, 18), date(2024, 7, 19)),
    "aig 2013": Capture(
        "us-equity",
        ("AIG",),
        date(2013, 10, 7),
        date(2013, 10, 7),
        {"book": "quotes"},
        ref.day_of("2013-10-07") * ref.DAY + 14 * HOUR,
    ),
}
SYMBOLS = [(name, symbol) for name, capture in SETS.items() for symbol in capture.symbols]


# ---- running ----------------------------------------------------------------------------------------


def make_lake(capture: Capture, lake: Path) -> Path:
    ingest_tardis(
        CAPTURES,
        lake,
        exchanges=[capture.exchange],
        symbols=list(capture.symbols),
        start=capture.start,
        end=capture.end,
    )
    return lake


def run(
    capture: Capture,
    lake: Path,
    out: Path,
    *,
    place: Place = THREADS,
    models: dict[str, Model] | None = None,
    days: tuple[date, date] | None = None,
) -> Path:
    """Run a capture with a store of its own and give its output folder."""
    start, end = days or (capture.start, capture.end)
    keys = [] if models is None else list(pipeline.cluster.FIT_KEYS)
    config = ClusterConfig(**{k: v for k, v in capture.config.resolved().items() if k not in keys})
    request = pipeline.RunRequest(
        lake=lake,
        exchange=capture.exchange,
        symbols=capture.symbols,
        start=start,
        end=end,
        out=out,
        config=config,
        store=out.with_name(f"{out.name}-store"),
        models=models,
        pictures=False,
    )
    with open_workers(place, lambda *_: None) as workers:
        return (pipeline.run_cluster if models is None else pipeline.label)(request, workers)


@dataclass(frozen=True)
class Finished:
    capture: Capture
    lake: Path
    out: Path

    def table(self, name: str) -> pd.DataFrame:
        return pd.read_parquet(self.out / "results" / f"{name}.parquet")

    def trades(self, symbol: str) -> pd.DataFrame:
        files = (self.out / "results" / "trade_features.parquet").glob(f"{symbol}-*")
        return pd.concat(map(pd.read_parquet, sorted(files)), ignore_index=True)

    def rows(self, symbol: str) -> dict[str, Any]:
        return dict(json.loads((self.out / "run.json").read_text())["rows"][symbol])


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Finished]:
    """The finished run of a capture, made once."""

    @cache
    def finish(name: str) -> Finished:
        root = tmp_path_factory.mktemp("capture")
        lake = make_lake(SETS[name], root / "lake")
        return Finished(SETS[name], lake, run(SETS[name], lake, root / "out"))

    return finish


# ---- the reference ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Expected:
    rows: list[ref.Row]
    history: ref.BookHistory
    faults: dict[str, int]
    config: dict[str, Any]


def before(lake: Path, until: int | None, copy: Path) -> Path:
    """The lake as it was before a time."""
    if until is None:
        return lake
    for path in lake.glob("*/*/*/*.parquet"):
        table = pq.ParquetFile(path).read()
        target = copy / path.relative_to(lake)
        target.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table.filter(pc.less(table["ts_local_us"], until)), target)
    (copy / "dim_symbol.parquet").write_bytes((lake / "dim_symbol.parquet").read_bytes())
    return copy


def expect(lake: Path, capture: Capture, symbol: str) -> Expected:
    config = dict(capture.config)
    where = (lake, capture.exchange, symbol)
    book = ref.read_book(*where, config["book"], config["depth"])
    history = ref.BookHistory(book)
    return Expected(
        ref.features(ref.read_trades(*where), history, config), history, ref.fault_counts(book), config
    )


def largest_differences(got: pd.DataFrame, want: Expected) -> dict[str, float]:
    """Largest |pipeline - reference| of every feature and score; times and signs must be equal."""
    kept = ref.kept(want.rows)
    got = got.head(len(kept))
    assert got["ts_local_us"].tolist() == [row.trade.ts for row in kept]
    assert got["sign"].tolist() == [row.trade.sign for row in kept]
    assert got["price"].tolist() == [float(row.trade.price) for row in kept]
    assert got["qty"].tolist() == [float(row.trade.qty) for row in kept]
    found = {}
    for name in ref.FEATURES:
        raw = np.array([row.raw[name] for row in kept], float)
        z = np.array([row.z[name] for row in kept])
        found[name] = float(np.abs(got[name].to_numpy() - raw).max())
        found[f"z_{name}"] = float(np.abs(got[f"z_{name}"].to_numpy() - z).max())
    return found


# ---- tests ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "symbol"), SYMBOLS)
def test_capture__equals_reference(
    finished: Callable[[str], Finished], tmp_path: Path, name: str, symbol: str
) -> None:
    """Features and scores within 1e-9, labels, flow, returns and counts of every trade."""
    done = finished(name)
    capture = done.capture
    want = expect(before(done.lake, capture.until, tmp_path), capture, symbol)
    got, kept = done.trades(symbol), ref.kept(want.rows)
    differences = largest_differences(got, want)
    assert len(kept) > 1_000
    assert max(differences.values()) <= 1e-9, differences

    model = read_models(done.out / "model.json")[symbol]
    assert model.numbers == [0, 1, 2]
    clusters = got["cluster"].tolist()[: len(kept)]
    assert_nearest(kept, clusters, model.centroids.tolist())

    table = done.table("buckets").query("symbol == @symbol").set_index(["bucket_ts", "cluster"])
    starts = ref.bucket_starts(str(capture.start), str(capture.end), want.config["bucket"])
    seen = starts if capture.until is None else range(starts.start, capture.until, starts.step)
    sums = ref.bucket_sums(kept, clusters, 3, seen)
    assert set(sums) <= set(table.index)
    flow = table.loc[list(sums), ["ofi_size", "ofi_count", "ofi_notional"]].to_numpy()
    np.testing.assert_array_equal(flow, [[float(value) for value in values] for values in sums.values()])
    if capture.until is None:
        assert len(table) == 4 * len(starts)
        assert len(got) == len(kept)
        assert_returns(table.xs(-1, level="cluster"), want)
        assert_counts(done.rows(symbol), want)


def assert_nearest(kept: list[ref.Row], clusters: list[int], centroids: list[list[float]]) -> None:
    """Every trade has its nearest centroid, but for ties within the rounding of float32."""
    for row, cluster in zip(kept, clusters, strict=True):
        to_each = ref.distances([row.z[name] for name in ref.FEATURES], centroids)
        assert to_each[cluster] <= min(to_each) + 1e-5 * (1.0 + min(to_each))


def assert_returns(table: pd.DataFrame, want: Expected) -> None:
    for bucket_ts, values in zip(table.index, table[list(RETURNS)].to_numpy(), strict=True):
        expected = ref.bucket_returns(want.history, bucket_ts, want.config)
        wanted = np.array([expected[key] for key in RETURNS.values()], float)
        np.testing.assert_allclose(values, wanted, rtol=1e-12, atol=1e-16, err_msg=str(bucket_ts))


def assert_counts(rows: dict[str, Any], want: Expected) -> None:
    assert rows["trades"] == len(want.rows)
    assert rows["kept"] == len(ref.kept(want.rows))
    assert {k: n for k, n in rows["dropped"].items() if n} == ref.drop_counts(want.rows)
    assert {k: n for k, n in rows["book_skipped"].items() if n} == want.faults


def test_days__one_by_one_equal_one_run(finished: Callable[[str], Finished], tmp_path: Path) -> None:
    """Over midnight, with the model of the whole run: bit by bit."""
    done = finished("binance 2023")
    models = read_models(done.out / "model.json")
    parts = [
        Finished(
            done.capture,
            done.lake,
            run(done.capture, done.lake, tmp_path / str(day), models=models, days=(day, day)),
        )
        for day in (done.capture.end, done.capture.start)
    ][::-1]
    trades = pd.concat([part.trades("BTCUSDT") for part in parts], ignore_index=True)
    pd.testing.assert_frame_equal(trades, done.trades("BTCUSDT"), check_exact=True)
    buckets = pd.concat([part.table("buckets") for part in parts], ignore_index=True)
    pd.testing.assert_frame_equal(buckets, done.table("buckets"), check_exact=True)


@pytest.mark.parametrize("n_workers", [1, 2])
def test_workers__equal_threads(finished: Callable[[str], Finished], tmp_path: Path, n_workers: int) -> None:
    """Every table of a run over two symbols and two days is the same bit by bit."""
    done = finished("binance 2024")
    place = Place(kind="local", n_workers=n_workers)
    other = run(done.capture, done.lake, tmp_path / "out", place=place)
    files = sorted(path.relative_to(done.out) for path in done.out.rglob("*.parquet") if path.is_file())
    assert files == sorted(path.relative_to(other) for path in other.rglob("*.parquet") if path.is_file())
    assert len(files) == 4 + 4
    for file in files:
        pd.testing.assert_frame_equal(
            pd.read_parquet(other / file), pd.read_parquet(done.out / file), check_exact=True, obj=str(file)
        )
    assert (other / "model.json").read_text() == (done.out / "model.json").read_text()

"""Walk-forward: what a fit may see, and that the days it labels cannot touch it."""

from __future__ import annotations

import datetime as dt
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from clusterlob_gpu import pipeline
from clusterlob_gpu.config import make_config
from clusterlob_gpu.lake.layout import day_start_us
from clusterlob_gpu.lake.synthetic import ingest_synthetic, make_market
from clusterlob_gpu.workers import Place, open_workers

DAYS = [dt.date(2024, 5, 1) + dt.timedelta(days=n) for n in range(4)]
HOUR_US = 3_600_000_000
QUICK = ["n_init=1", "keep_trades=true", "horizons=[5m, 30m]"]


@pytest.fixture(scope="module")
def lake(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("walk") / "lake"
    ingest_synthetic(root, make_market(start=DAYS[0], days=4, trades_per_day=5_000, snapshots_per_day=15_000))
    return root


def run(lake: Path, out: Path, *settings: str) -> Path:
    request = pipeline.RunRequest(
        lake=lake,
        exchange="synthetic",
        symbols=("BTCUSDT",),
        start=DAYS[0],
        end=DAYS[-1],
        out=out,
        config=make_config({}, [*QUICK, *settings]),
        pictures=False,
    )
    with open_workers(Place(kind="threads", n_workers=2), lambda *_: None) as workers:
        return pipeline.run_cluster(request, workers)


def table(out: Path, name: str) -> pd.DataFrame:
    return pd.read_parquet(out / "results" / f"{name}.parquet")


def trades(out: Path, day: dt.date) -> pd.DataFrame:
    return pd.read_parquet(out / "results" / "trade_features.parquet" / f"BTCUSDT-{day}.parquet")


@pytest.mark.parametrize(("setting", "purge_h"), [("purge=null", 35 / 60), ("purge=6h", 6)])
def test_purge__leaves_out_the_end_of_the_training_days(
    lake: Path, tmp_path: Path, setting: str, purge_h: float
) -> None:
    whole = run(lake, tmp_path / "whole")
    out = run(lake, tmp_path / "walk", "train_days=2", setting)
    windows = table(out, "windows")
    assert windows["test_start"].tolist() == [str(day) for day in DAYS[2:]]
    for number, row in enumerate(windows.itertuples()):
        rows = pd.concat([trades(whole, day) for day in DAYS[number : number + 2]])
        until = day_start_us(DAYS[number + 2]) - int(purge_h * HOUR_US)
        assert row.n_train == (rows["ts_local_us"] < until).sum() < len(rows)
    assert json.loads((out / "run.json").read_text())["sample"] == "out_of_sample"
    assert set(table(out, "buckets")["bucket_ts"] // (24 * HOUR_US)) == {
        day_start_us(day) // (24 * HOUR_US) for day in DAYS[2:]
    }


def test_fit__does_not_know_the_days_that_it_labels(lake: Path, tmp_path: Path) -> None:
    other = shutil.copytree(lake, tmp_path / "lake")
    for name in ("trades", "book_snapshot_25"):
        for path in (other / name).rglob("*.parquet"):
            if f"date={DAYS[3]}" in str(path):
                rows = pq.read_table(path)
                pq.write_table(rows.take(np.arange(0, len(rows), 2)), path)
    settings = ("train_days=3", "winsorize=[0.01, 0.99]")
    true, changed = (run(where, tmp_path / where.parent.name / "out", *settings) for where in (lake, other))
    models = [json.loads((out / "model.json").read_text())["models"][0] for out in (true, changed)]
    assert models[0] == models[1]
    assert models[0]["train_days"] == [str(day) for day in DAYS[:3]]
    assert len(trades(true, DAYS[3])) != len(trades(changed, DAYS[3]))


def test_bounds__are_the_quantiles_of_the_training_rows(lake: Path, tmp_path: Path) -> None:
    whole = run(lake, tmp_path / "whole")
    out = run(lake, tmp_path / "walk", "train_days=3", "winsorize=[0.02, 0.9]", "purge=30m")
    rows = pd.concat([trades(whole, day) for day in DAYS[:3]])
    rows = rows[rows["ts_local_us"] < day_start_us(DAYS[3]) - HOUR_US // 2]
    bounds = json.loads((out / "model.json").read_text())["models"][0]["bounds"]
    z = rows[[name for name in rows.columns if name.startswith("z_")]].astype(np.float32).astype(np.float64)
    np.testing.assert_array_equal(bounds["low"], np.quantile(z, 0.02, axis=0))
    np.testing.assert_array_equal(bounds["high"], np.quantile(z, 0.9, axis=0))


def test_days_left_over__are_named(lake: Path, tmp_path: Path) -> None:
    out = run(lake, tmp_path / "walk", "train_days=1", "test_days=2", "step_days=2")
    notes = json.loads((out / "run.json").read_text())["notes"]
    assert [note for note in notes if str(DAYS[3]) in note] == [
        f"{DAYS[3]}: no whole test window is left for these days"
    ]

"""The synthetic market through the whole pipeline: what is planted is found, what is not is not."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import adjusted_rand_score

from clusterlob_gpu import evaluation, pipeline
from clusterlob_gpu.config import make_config
from clusterlob_gpu.evaluation import Target
from clusterlob_gpu.lake.synthetic import MarketConfig, ingest_synthetic, make_market
from clusterlob_gpu.pipeline import parts
from clusterlob_gpu.schema import SIDE_UNKNOWN
from clusterlob_gpu.workers import Place, open_workers

SYMBOL = "BTCUSDT"
FIVE_MINUTES = 300_000_000
MARKETS = 60
"""Markets with nothing planted."""
NAMES = {0: "passive", 1: "opportunistic", 2: "directional"}


def run_market(
    root: Path,
    market: MarketConfig,
    monkeypatch: pytest.MonkeyPatch,
    *,
    evaluate: bool = True,
    **settings: object,
) -> Path:
    """Make a lake, run the experiment on all of it, and give the folder of its tables."""
    ingest_synthetic(root / "lake", market)
    request = pipeline.RunRequest(
        lake=root / "lake",
        exchange=market.exchange,
        symbols=market.symbols,
        start=market.start,
        end=market.end,
        out=root / "out",
        config=make_config(settings),
        pictures=False,
    )
    if not evaluate:
        names = ("symbol", "cluster", "label", "signal", "target", "ic", "verdict")
        nothing = pd.DataFrame({name: [] for name in names})
        monkeypatch.setattr(parts, "ic_of", lambda *_: nothing)
    with open_workers(Place(kind="threads", n_workers=2), lambda *_: None) as workers:
        return pipeline.run_cluster(request, workers) / "results"


def lake_days(root: Path, market: MarketConfig, table: str) -> pd.DataFrame:
    """Every row of a table of the lake, in order."""
    days = [market.start + timedelta(days=n) for n in range(market.days)]
    folder = root / "lake" / table / f"exchange={market.exchange}"
    files = [path for day in days for path in sorted((folder / f"date={day}").glob("*.parquet"))]
    return pd.concat([pq.ParquetFile(path).read().to_pandas() for path in files], ignore_index=True)


@pytest.mark.parametrize("seed", [7, 8])
def test_types__are_found_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """At the default strength each planted type is the cluster of its name."""
    market = make_market(days=2, trades_per_day=50_000, seed=seed)
    results = run_market(tmp_path, market, monkeypatch, evaluate=False, keep_trades=True)
    files = sorted((results / "trade_features.parquet").iterdir())
    trades = pd.concat(map(pd.read_parquet, files), ignore_index=True)
    known = lake_days(tmp_path, market, "trades")["side"] != SIDE_UNKNOWN
    truth = lake_days(tmp_path, market, "truth")[known]
    # A moment's trades share their book, so they are kept or dropped together but for the first ones.
    truth = truth[truth["ts_local_us"].isin(trades["ts_local_us"])].tail(len(trades))
    np.testing.assert_array_equal(truth["ts_local_us"], trades["ts_local_us"])
    assert len(trades) > 0.97 * 2 * 50_000
    planted, found = truth["trade_type"].to_numpy(), trades["cluster"].to_numpy()
    assert adjusted_rand_score(planted, found) >= 0.8
    for number in NAMES:
        assert (found[planted == number] == number).mean() >= 0.9
    centroids = pd.read_parquet(results / "centroids.parquet")
    assert dict(zip(centroids["cluster"], centroids["label"], strict=True)) == NAMES
    shares = pd.Series(planted).value_counts(normalize=True)
    np.testing.assert_allclose(centroids["share"], shares[centroids["cluster"]], atol=0.03)


@pytest.mark.parametrize("seed", range(5))
def test_strength_zero__no_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Where nothing is planted, no cluster's flow predicts anything."""
    market = make_market(days=2, trades_per_day=8_000, seed=seed, strength=0.0)
    ic = pd.read_parquet(run_market(tmp_path, market, monkeypatch) / "ic.parquet")
    tested = ic[ic["predictive"] & ~ic["thin"]]
    assert set(tested["cluster"]) == {-1, 0, 1, 2}
    assert len(tested) >= 24
    assert set(tested["verdict"]) == {"undecided"}


def null_tests(root: Path, monkeypatch: pytest.MonkeyPatch) -> pd.DataFrame:
    """Every cluster's flow against the next bucket's return, in many markets with nothing planted."""
    tables = []
    for seed in range(100, 100 + MARKETS):
        market = make_market(days=2, trades_per_day=4_000, seed=seed, strength=0.0)
        results = run_market(root / str(seed), market, monkeypatch, evaluate=False)
        buckets = pd.read_parquet(results / "buckets.parquet")
        table = evaluation.cluster_ic(
            buckets, [Target("frnb", "frnb", FIVE_MINUTES)], width_us=FIVE_MINUTES, draws=10
        )
        tables.append(table[table["signal"] == "ofi_size"])
    return pd.concat(tables, ignore_index=True)


def test_strength_zero__tests_reject_as_often_as_they_should(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """5 % within two standard errors of as many independent markets; clusters share a market's returns.

    ICs are zero on average, and their spread over markets is the one that the HAC errors tell, not the
    smaller one of white noise.
    """
    tests = null_tests(tmp_path, monkeypatch)
    assert len(tests) == 4 * MARKETS
    error = np.sqrt(0.05 * 0.95 / MARKETS)
    assert abs((tests["hac_p"] < 0.05).mean() - 0.05) < 2 * error
    ics = tests.groupby("cluster")["ic"]
    assert (ics.mean().abs() < 3 * ics.std() / np.sqrt(MARKETS)).all()
    told = np.sqrt((tests["hac_se"] ** 2).mean())
    assert tests["ic"].std() == pytest.approx(told, rel=0.15)
    assert told > 1.2 / np.sqrt(574)

"""Result tables of several symbols: each symbol's are its own, and tests are corrected over all of them."""

from __future__ import annotations

import datetime as dt
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.stats import false_discovery_control

from clusterlob_gpu import pipeline
from clusterlob_gpu.config import ClusterConfig, FlowConfig, make_config
from clusterlob_gpu.lake.synthetic import ingest_synthetic, make_market
from clusterlob_gpu.workers import Place, open_workers

SYMBOLS = ("BTCUSDT", "ETHUSDT")
START = dt.date(2024, 5, 1)
SETTINGS = {
    "cluster": ["bucket=30m", "horizons=[1h]"],
    "flow": [
        "bar=15m",
        "threshold_window=6h",
        "min_trades=100",
        "require_full_window=false",
        "horizons=[1h]",
        "variants=[[3h,0.9,0.5]]",
    ],
}
CORRECTED = {"ic": "hac_p", "variants": "hac_p"} | dict.fromkeys(
    ("ic_differences", "regimes", "stability"), "diff_p"
)
"""Tables with corrected p-values, and the column that is corrected."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tables")
    ingest_synthetic(folder / "lake", make_market(symbols=SYMBOLS, start=START, days=3, trades_per_day=6_000))
    return folder


def run(root: Path, name: str, *symbols: str) -> Path:
    request = pipeline.RunRequest(
        lake=root / "lake",
        exchange="synthetic",
        symbols=symbols,
        start=START,
        end=START + dt.timedelta(days=2),
        out=root / "-".join([name, *symbols]),
        config=make_config({}, SETTINGS[name], ClusterConfig if name == "cluster" else FlowConfig),
        pictures=False,
    )
    with open_workers(Place(kind="threads", n_workers=2), lambda *_: None) as workers:
        return (pipeline.run_cluster if name == "cluster" else pipeline.run_flow)(request, workers)


@pytest.mark.parametrize("name", ["cluster", "flow"])
def test_tables__are_those_of_each_symbol_and_corrected_over_all(root: Path, name: str) -> None:
    alone = [run(root, name, symbol) for symbol in SYMBOLS]
    both = run(root, name, *reversed(SYMBOLS))
    assert json.loads((both / "run.json").read_text())["artefacts"]["tables"]["there"] == len(SYMBOLS)
    files = sorted(path.name for path in (both / "results").glob("*.parquet"))
    assert ("variants.parquet" in files) == (name == "flow")
    for file in files:
        got, *held = (pd.read_parquet(out / "results" / file) for out in (both, *alone))
        want = pd.concat(held, ignore_index=True)
        judged = [column for column in ("p_fdr", "verdict") if column in got]
        pd.testing.assert_frame_equal(got.drop(columns=judged), want.drop(columns=judged))
        p = CORRECTED.get(file.removesuffix(".parquet"))
        assert bool(judged) == (p is not None), file
        if p is not None:
            tested = ~got["thin"].to_numpy(bool) & got[p].notna().to_numpy()
            tested &= got["predictive"].to_numpy(bool) if "predictive" in got else True
            corrected = false_discovery_control(got[p].to_numpy()[tested])
            np.testing.assert_allclose(got["p_fdr"].to_numpy()[tested], corrected, rtol=1e-12)
            assert got["p_fdr"][~tested].isna().all()
    ic, *held = (pd.read_parquet(out / "results" / "ic.parquet") for out in (both, *alone))
    assert not np.allclose(ic["p_fdr"], pd.concat(held)["p_fdr"], equal_nan=True)

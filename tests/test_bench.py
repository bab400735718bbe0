"""The benchmarks: the Polars baseline gives the same numbers, and the tables and simulations add up."""

from __future__ import annotations

import itertools
import sys
from dataclasses import dataclass
from datetime import date
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType
from typing import Any

import lakes
import numpy as np
import pandas as pd
import polars as pl
import pytest
import reference as ref
from rich.console import Console
from rich.table import Table

from clusterlob_gpu import flow_evaluation, pipeline
from clusterlob_gpu.config import ClusterConfig, FlowConfig, RunConfig
from clusterlob_gpu.lake.synthetic import MarketConfig, ingest_synthetic, make_market
from clusterlob_gpu.pipeline import parts
from clusterlob_gpu.schema import FEATURES, Z_FEATURES
from clusterlob_gpu.workers import Place, joined, open_workers

SCRIPTS = Path(__file__).parents[1] / "scripts"
MARKET = make_market(days=3, trades_per_day=12_000)


def load(name: str) -> ModuleType:
    """A script as a module, whether its file has a suffix or not."""
    sys.path.insert(0, str(SCRIPTS))
    try:
        path = SCRIPTS / name
        spec = spec_from_loader(path.stem, SourceFileLoader(path.stem, str(path)))
        assert spec is not None
        assert spec.loader is not None
        module = module_from_spec(spec)
        sys.modules[path.stem] = module
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(SCRIPTS))
    return module


common = load("bench_common.py")
baseline = load("polars_baseline.py")
bench = load("bench")
scale = load("simulate_scale")


# ---- the baseline -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Made:
    """A small lake, what the package makes of it, and what the baseline has to start from."""

    lake: Path
    cluster: Path
    flow: Path

    @property
    def market(self) -> Any:
        return baseline.Market(self.lake, MARKET.exchange, MARKET.symbols[0])

    @property
    def days(self) -> list[date]:
        return baseline.days_between(MARKET.start, MARKET.end)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Both experiments without what the baseline leaves out, which takes most of their time."""
    root = tmp_path_factory.mktemp("bench")
    ingest_synthetic(root / "lake", MARKET)
    with pytest.MonkeyPatch.context() as patch:
        nothing = pd.DataFrame(
            {name: [] for name in ("symbol", "cluster", "label", "signal", "target", "ic", "verdict")}
        )
        patch.setattr(parts, "ic_of", lambda *_: nothing)
        patch.setattr(flow_evaluation, "flow_tables", lambda *_: {"ic": nothing})
        cluster = _run(pipeline.run_cluster, root, MARKET, ClusterConfig(keep_trades=True))
        flow = _run(pipeline.run_flow, root, MARKET, FlowConfig())
    return Made(root / "lake", cluster, flow)


def _run(function: Any, root: Path, market: MarketConfig, config: RunConfig) -> Path:
    request = pipeline.RunRequest(
        lake=root / "lake",
        exchange=market.exchange,
        symbols=market.symbols,
        start=market.start,
        end=market.end,
        out=root / type(config).__name__,
        config=config,
        pictures=False,
    )
    with open_workers(Place(kind="threads", n_workers=2), lambda *_: None) as workers:
        return function(request, workers) / "results"


def trades_of(made: Made) -> pl.DataFrame:
    """Trades with features, z-scores and cluster, as the package has them."""
    files = sorted((made.cluster / "trade_features.parquet").glob("*.parquet"))
    return pl.concat([pl.read_parquet(path) for path in files])


@pytest.mark.parametrize(
    "name", ["ties", "broken_books", "unknown_sides", "late_book", "stale_book", "over_midnight"]
)
def test_met_trades__see_the_book_of_the_reference(tmp_path: Path, name: str) -> None:
    lake = lakes.NAMED[name]().write(tmp_path)
    config = {
        "depth": 5,
        "window": 2,
        "same_side": "own",
        "spread": "ticks",
        "asof": "strict",
        "max_staleness": lakes.MINUTE,
    }
    history = ref.BookHistory(ref.read_book(lake, lakes.EXCHANGE, lakes.SYMBOL))
    rows = ref.features(ref.read_trades(lake, lakes.EXCHANGE, lakes.SYMBOL), history, config)
    wanted = [row for row in rows if row.raw is not None]
    market = baseline.Market(lake, lakes.EXCHANGE, lakes.SYMBOL)
    days = [
        date.fromisoformat(day)
        for day in lakes.DAYS
        if (lake / "trades" / f"exchange={lakes.EXCHANGE}" / f"date={day}").exists()
    ]
    found = pl.concat(
        [baseline.met_trades(market, day, book).collect() for day, book in baseline.books(market, days)]
    )
    assert found["ts"].to_list() == [row.trade.ts for row in wanted]
    for feature in FEATURES:
        values = [row.raw[feature] for row in wanted if row.raw is not None]
        expected = np.array([np.nan if value is None else value for value in values], float)
        np.testing.assert_allclose(found[feature].cast(float).to_numpy(), expected, rtol=1e-14)


def test_feature_days__equal_those_of_the_package(made: Made) -> None:
    """Raw features to the last digit, z-scores as far as float32 goes, in constant windows too."""
    ours = trades_of(made)
    scored = pl.concat([trades for trades, _ in baseline.feature_days(made.market, made.days)])
    raw = pl.concat(
        [
            baseline.met_trades(made.market, day, book).collect()
            for day, book in baseline.books(made.market, made.days)
        ]
    ).tail(len(ours))
    assert scored["ts"].to_list() == ours["ts_local_us"].to_list()
    for name in FEATURES:
        np.testing.assert_allclose(raw[name], ours[name], rtol=1e-14, err_msg=name)
    for name in Z_FEATURES:
        np.testing.assert_allclose(scored[name], ours[name], rtol=1e-5, atol=1e-5, err_msg=name)


def test_bucket_flow__equals_ours_given_our_labels(made: Made) -> None:
    trades = pl.concat([trades for trades, _ in baseline.feature_days(made.market, made.days)])
    found = baseline.bucket_flow(
        made.market, trades.with_columns(trades_of(made)["cluster"]).lazy(), made.days
    )
    ours = pl.read_parquet(made.cluster / "buckets.parquet").sort("bucket_ts", "cluster")
    assert found["n_trades"].to_list() == ours["n_trades"].to_list()
    for name in ("ofi_size", "ofi_count", "ofi_notional"):
        np.testing.assert_allclose(found[name], ours[name], rtol=1e-12, atol=1e-9, err_msg=name)


def test_run_cluster__finds_our_clusters_and_returns(made: Made) -> None:
    tables = baseline.run_cluster(made.market, made.days, 3)
    ours = pl.read_parquet(made.cluster / "centroids.parquet").sort("share")
    found = tables["centroids"].sort("count")
    np.testing.assert_allclose(found["count"], ours["share"], atol=1e-3)
    np.testing.assert_allclose(found.select(Z_FEATURES), ours.select(Z_FEATURES), atol=1e-2)
    every = pl.read_parquet(made.cluster / "buckets.parquet").filter(cluster=-1)
    returns = tables["buckets"].filter(cluster=-1)
    for name in ("conr", "frnb", "freb", "r_5m", "r_15m", "r_1h"):
        expected, got = every[name].to_numpy(), returns[name].cast(float).to_numpy()
        np.testing.assert_allclose(got, expected, atol=1e-13, err_msg=name)


def test_run_flow__gives_our_bars_and_daily_thresholds(made: Made) -> None:
    found = baseline.run_flow(made.market, made.days)["features"]
    ours = pl.read_parquet(made.flow / "features.parquet")
    assert found["q_large"].is_not_null().sum() > 0
    shared = [name for name in found.columns if name in ours.columns and found[name].dtype.is_numeric()]
    assert {"q_large", "q_small", "top5_share", "rv_3h", "flow_toxicity_acceleration"} < set(shared)
    for name in shared:
        got, expected = (table[name].cast(float).to_numpy() for table in (found, ours))
        np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-9, err_msg=name)


# ---- simulations ------------------------------------------------------------------------------------


def test_stage_costs__tell_every_stage(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the pipeline asks of its workers, it can be asked of one core."""
    monkeypatch.setattr(common, "SYMBOL", MARKET.symbols[0])
    monkeypatch.setattr("clusterlob_gpu.report.render_run", lambda _: [])
    told = common.stage_costs("cluster", made.lake, 2, tmp_path / "run")
    assert {"book", "features", "fit", "label", "mids"} <= set(told["stages"])
    assert told["stages"]["label"]["tasks"] == 2
    assert min(one["seconds"] for one in told["stages"].values()) > 0
    assert set(told["client"]) == {"evaluate", "report", "between"}


def stages(seed: int = 7) -> list[Any]:
    rng = np.random.default_rng(seed)
    maps = [scale.Stage(name, rng.exponential(size=n)) for name, n in (("a", 300), ("b", 40), ("c", 300))]
    return [*maps, scale.Stage("evaluate", np.ones(3), client=True)]


def test_simulate__without_overheads_is_work_over_workers() -> None:
    even = [scale.Stage("a", np.full(64, 0.5)), scale.Stage("b", np.full(32, 2.0))]
    for workers in (1, 2, 4, 16, 32):
        outcome = scale.simulate(even, workers, scale.Overheads())
        assert outcome.makespan == pytest.approx(outcome.work / workers, rel=1e-12)
        assert outcome.work == 96


@pytest.mark.parametrize("overheads", [{}, {"task_s": 0.02, "submit_s": 0.001, "round_trip_s": 0.1}])
def test_simulate__more_workers_hardly_ever_take_longer(overheads: dict[str, float]) -> None:
    """Tasks are joined otherwise for other numbers of workers, so that it may be a little."""
    spans = [scale.simulate(stages(), n, scale.Overheads(**overheads)).makespan for n in range(1, 400, 3)]
    best = list(itertools.accumulate(spans, min))
    assert all(span <= 1.05 * least for span, least in zip(spans, best, strict=True))


def test_simulate__the_scheduler_takes_joined_tasks() -> None:
    stage = [scale.Stage("a", np.ones(10_000))]
    outcome = scale.simulate(stage, 4, scale.Overheads(task_s=0.01, submit_s=0.001))
    assert outcome.scheduler == pytest.approx(10_000 * 0.001 + len(joined(range(10_000), 4)) * 0.01)
    assert outcome.scheduler < 10_000 * 0.002
    assert outcome.makespan == pytest.approx(2500, rel=0.01)


def test_simulate__joined_tasks_share_out_the_days_of_a_large_symbol() -> None:
    """Of fifty symbols, the largest of which has fifty times the trades of the smallest."""
    stage = [scale.Stage("a", np.repeat(10.0 / np.arange(1, 51), 365))]
    joined_ = scale.simulate(stage, 256, scale.Overheads(task_s=1e-9)).makespan
    assert joined_ < 1.2 * stage[0].seconds.sum() / 256


def test_simulate__is_bounded_by_scheduler_client_and_storage() -> None:
    overheads = scale.Overheads(start_s=5, submit_s=0.01, task_s=0.5)
    outcome = scale.simulate(stages(), 10_000, overheads)
    assert outcome.scheduler == pytest.approx(640 * 0.51)
    assert outcome.makespan >= 5 + outcome.scheduler + 3
    slow = [scale.Stage("a", np.ones(8), read_gb=100.0)]
    assert scale.simulate(slow, 8, scale.Overheads(), storage_gbs=2.0).makespan == 50


BENCH = [
    {
        "days": days,
        "stages": {
            "book": {"calls": 1, "tasks": days, "seconds": 2.0 * days},
            "start": {"calls": 1, "tasks": 1, "seconds": 0.5},
            "fit": {"calls": 3, "tasks": 3 * days, "seconds": 0.3 * days},
            "tables": {"calls": 1, "tasks": 1, "seconds": 1 + 0.2 * days},
        },
        "client": {"evaluate": 1 + 0.1 * days, "report": 2.0, "between": 0.01 * days},
    }
    for days in (2, 7)
]


def test_pipeline_stages__scale_what_was_measured() -> None:
    """Two symbols, the second half as large, for ten days: tasks, work, and the client's parts."""
    made = scale.pipeline_stages(BENCH, np.array([1.0, 0.5]), 10, day_gb=0.1, speed=1.0, floor_s=0.0)
    assert [stage.name for stage in made] == [
        "between",
        "book",
        "start",
        "fit",
        "fit",
        "fit",
        "tables",
        "evaluate",
        "report",
    ]
    assert [len(stage.seconds) for stage in made] == [1, 20, 2, 20, 20, 20, 2, 2, 2]
    totals = [float(stage.seconds.sum()) for stage in made]
    assert totals == pytest.approx([0.2, 30, 1, 1.5, 1.5, 1.5, 6, 4, 4])
    assert sum(stage.read_gb for stage in made) == pytest.approx(1.5)
    on_four = scale.pipeline_stages(BENCH, np.array([1.0, 0.5]), 10, 0.1, 1.0, 0.0, client_cores=4)
    assert float(on_four[-1].seconds.sum()) == pytest.approx(1)
    halves = scale.apart(made, 2, 2)
    assert [float(stage.seconds.sum()) for stage in halves] == pytest.approx([0.1, 20, 0.5, 1, 1, 1, 3, 2, 2])


def test_saturation__names_where_and_why() -> None:
    slow_client = [scale.Stage("a", np.ones(100)), scale.Stage("evaluate", np.full(1, 50.0), client=True)]
    counts = (1, 2, 4, 8)
    outcomes = [scale.simulate(slow_client, n, scale.Overheads()) for n in counts]
    assert scale.saturation(counts, outcomes).startswith("saturated at 4 workers")
    assert scale.saturation(counts, outcomes).endswith("the client's own work")


# ---- measuring and tables ---------------------------------------------------------------------------


def printed(table: Table) -> list[list[str]]:
    console = Console(width=200, no_color=True)
    with console.capture() as capture:
        console.print(table)
    return [
        [cell.strip() for cell in line.strip("│┃").replace("┃", "│").split("│")]
        for line in capture.get().splitlines()
        if line.startswith(("│", "┃"))
    ]


def case(seconds: float, peak_mib: float, rows: int = 1_000_000) -> dict[str, Any]:
    return {"seconds": seconds, "s_per_m": seconds / (rows / 1e6), "peak_mib": peak_mib, "rows": rows}


def test_compare__shows_both_and_their_ratio() -> None:
    old = {"cases": {"flow": case(2.0, 100), "gone": case(1, 1), "label": case(1, 1, rows=5)}}
    new = {"cases": {"flow": case(1.0, 150), "label": case(1, 1), "new": case(1, 1)}}
    rows = printed(bench.compare_table(old, new))
    assert rows[1] == ["flow", "2.00", "1.00", "0.50", "100.00", "150.00", "1.50"]
    assert rows[2][:2] == ["label", "other size: 5 rows, now 1,000,000"]
    assert len(rows) == 3


def test_differences__names_what_is_not_the_same() -> None:
    old = {"machine": {"cores": 2}, "versions": {"polars": "1.37"}}
    new = {"machine": {"cores": 2}, "versions": {"polars": "2.1", "numpy": "2.4"}}
    assert bench.differences(old, new) == [
        "versions polars: 1.37 before, 2.1 now",
        "versions numpy: None before, 2.4 now",
    ]


def test_targets__are_met_or_missed() -> None:
    rows = {
        "cluster, 2 threads": case(0.2, 100),
        "cluster, 2 workers": case(0.3, 3000),
        "polars cluster": case(0.8, 1),
    }
    scaling = [{"days": days, "workers": 2, "peak_mib": size} for days, size in ((7, 1000), (14, 1500))]
    found = printed(bench.target_table(rows, scaling))[1:]
    verdicts = {(row[0], row[1]): row[4] for row in found}
    assert verdicts == {
        ("cluster, 2 threads", "s/M"): "met",
        ("cluster, 2 threads", "times faster than Polars"): "met",
        ("cluster, 2 threads", "MiB in all"): "met",
        ("cluster, 2 workers", "s/M"): "MISSED",
        ("cluster, 2 workers", "times faster than Polars"): "MISSED",
        ("cluster, 2 workers", "MiB in all"): "MISSED",
        ("cluster, 2 workers", "memory of 14 days / of 7"): "MISSED",
    }


def test_observe__counts_memory_of_children_and_pages_read(tmp_path: Path) -> None:
    """A child holds 150 MiB for a second; of two files of 1 MiB one is read."""
    for name in ("read", "left"):
        (tmp_path / name).write_bytes(bytes(1 << 20))
    holds = "import time; held = bytearray(150 << 20); time.sleep(1)"
    starts = f"import subprocess, sys; open({str(tmp_path / 'read')!r}, 'rb').read(); "
    starts += f"subprocess.run([sys.executable, '-c', {holds!r}], check=True)"
    seen = common.observe([sys.executable, "-c", starts], tmp_path)
    assert 150 < seen.worker_mib < 250
    assert seen.peak_mib > 150
    assert seen.client_mib < 100
    assert seen.read_mib in (None, 1.0)


def test_run__tells_what_failed() -> None:
    with pytest.raises(SystemExit, match="no such thing"):
        common.run([sys.executable, "-c", "raise RuntimeError('no such thing')"])


def test_make_lake__is_a_view_of_exactly_the_days(tmp_path: Path) -> None:
    ingest_synthetic(tmp_path / "lake-500", make_market(days=3, trades_per_day=500))
    lake = common.make_lake(tmp_path, 2, 500)
    for table in ("trades", "book_snapshot_25", "derivative_ticker"):
        days = sorted(path.name for path in (lake / table).glob("exchange=*/date=*"))
        assert days == ["date=2024-05-01", "date=2024-05-02"]


def test_make_tardis__round_trips(tmp_path: Path, made: Made) -> None:
    from clusterlob_gpu.lake.tardis import ingest_tardis

    for table, prices in (("trades", "price_int"), ("book_snapshot_25", "bids_px")):
        source = common.make_tardis(tmp_path, made.lake, table, 200)
        ingest_tardis(source, tmp_path / "lake")
        pair = [tmp_path / "lake", made.lake]
        found, given = (
            pl.read_parquet(root / table / "exchange=*" / "date=2024-05-01" / "*.parquet") for root in pair
        )
        assert found[prices].to_list() == given[prices].head(200).to_list()

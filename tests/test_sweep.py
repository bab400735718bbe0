"""A sweep's trials are the runs of their own settings, share all that they can, and fail alone."""

from __future__ import annotations

import datetime as dt
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from test_failures import flip_bits

from clusterlob_gpu import pipeline, sweep
from clusterlob_gpu.config import FlowConfig, RunConfig, make_config
from clusterlob_gpu.errors import ConfigError, InputError
from clusterlob_gpu.lake.synthetic import ingest_synthetic, make_market
from clusterlob_gpu.output import read_ledger
from clusterlob_gpu.places import read_place
from clusterlob_gpu.workers import Workers, open_workers

DAYS = [dt.date(2024, 5, 1) + dt.timedelta(days=n) for n in range(4)]
SYMBOLS = ("BTCUSDT", "ETHUSDT")
COMMON = {"exchange": "synthetic", "symbols": SYMBOLS, "start": DAYS[0], "end": DAYS[-1]}


@pytest.fixture(scope="module")
def lake(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sweep") / "lake"
    market = make_market(
        symbols=SYMBOLS, start=DAYS[0], days=4, trades_per_day=4_000, snapshots_per_day=9_000
    )
    ingest_synthetic(root, market)
    return root


@pytest.fixture(scope="module")
def workers() -> Any:
    with open_workers(read_place(None), lambda *_: None) as opened:
        yield opened


def run_sweep(lake: Path, out: Path, workers: Workers, **file: Any) -> Path:
    asked = sweep.SweepRequest(lake=lake, out=out, file=sweep.SweepFile(**{**COMMON, **file}), pictures=False)
    return sweep.run_sweep(asked, workers)


def table(out: Path, name: str) -> pd.DataFrame:
    return pd.read_parquet(out / "results" / f"{name}.parquet")


def single_ic(lake: Path, out: Path, workers: Workers, config: RunConfig, symbols: Any = SYMBOLS) -> Any:
    """The IC table of a run of its own, with a store of its own."""
    request = pipeline.RunRequest(
        lake=lake,
        exchange="synthetic",
        symbols=tuple(symbols),
        start=DAYS[0],
        end=DAYS[-1],
        out=out / "run",
        config=config,
        pictures=False,
    )
    job = pipeline.run_flow if isinstance(config, FlowConfig) else pipeline.run_cluster
    return table(job(request, workers), "ic")


def same_tests(of_sweep: pd.DataFrame, of_run: pd.DataFrame) -> None:
    """Every number but those that depend on what else was tested, row by row."""
    corrected = ["p_fdr", "verdict", "sample"]
    names = [name for name in of_run.columns if name not in corrected]
    pd.testing.assert_frame_equal(
        of_sweep[names].reset_index(drop=True),
        of_run[names].reset_index(drop=True),
        check_exact=True,
        check_dtype=False,
    )


# Wide buckets and bars: the tests of a trial are what takes time.
WIDE = {"n_init": 1, "bucket": "30m"}
GRID: dict[str, Any] = {
    "config": {**WIDE, "min_trades": 100, "bar": "30m"},
    "experiments": ["cluster", "flow"],
    "grid": {"k": [2, 3], "quantiles": [[0.85, 0.5], [0.9, 0.3]], "horizons": [["1h"], ["3h"]]},
}


@pytest.fixture(scope="module")
def swept(lake: Path, tmp_path_factory: pytest.TempPathFactory, workers: Workers) -> Path:
    return run_sweep(lake, tmp_path_factory.mktemp("swept") / "sweep", workers, **GRID)


@pytest.mark.parametrize("trial", [3, 6])
def test_trial__is_the_run_of_its_settings(
    swept: Path, lake: Path, tmp_path: Path, workers: Workers, trial: int
) -> None:
    row = table(swept, "sweep").set_index("trial").loc[trial]
    settings = {name: json.loads(row[name]) for name in ("k", "quantiles", "horizons")}
    tests = table(swept, "sweep_ic")
    mine = tests[tests["trial"] == trial]
    cluster = {**WIDE, "k": settings["k"], "horizons": settings["horizons"]}
    flow = {
        "min_trades": 100,
        "bar": "30m",
        "quantiles": settings["quantiles"],
        "horizons": settings["horizons"],
    }
    of_run = single_ic(lake, tmp_path / "c", workers, make_config(cluster))
    same_tests(mine[mine["experiment"] == "cluster"], of_run)
    of_run = single_ic(lake, tmp_path / "f", workers, make_config(flow, kind=FlowConfig))
    same_tests(mine[mine["experiment"] == "flow"], of_run)


def test_sweep__shares_what_trials_have_in_common(swept: Path) -> None:
    made = {
        stage: held["made"]
        for stage, held in json.loads((swept / "run.json").read_text())["artefacts"].items()
    }
    # Two symbols x four days; features once, a fit per k, a labelling per k and day, evaluations per
    # distinct (k, horizons) and (quantiles, horizons) and symbol.
    assert made["book"] == 8
    assert made["features"] == 8
    assert made["trades"] == 8
    assert made["fit"] == 2 * 2
    assert made["label"] == 2 * 8
    assert made["evaluation"] == 2 * (2 * 2 + 2 * 2)
    tests = table(swept, "sweep_ic")
    assert tests["trial"].nunique() == 8
    assert tests["evaluation"].nunique() == 16


def test_sweep__corrects_every_distinct_test_once(swept: Path) -> None:
    from scipy.stats import false_discovery_control

    tests = table(swept, "sweep_ic").drop(columns="trial")
    distinct = tests.drop_duplicates(["evaluation", "signal", "target", "cluster"])
    repeated = distinct.duplicated(["experiment", "symbol", "signal", "target", "cluster", "ic", "hac_p"])
    assert repeated.any()  # frnb of every k is tested under both horizons
    distinct = distinct[~repeated]
    counted = distinct[distinct["predictive"] & distinct["hac_p"].notna() & ~distinct["thin"]]
    expected = false_discovery_control(counted["hac_p"].to_numpy())
    assert counted["p_fdr"].tolist() == expected.tolist()
    assert (counted["p_fdr"] >= counted["hac_p"]).all()


def test_sweep__ledger_has_a_line_per_trial_and_one_of_its_own(swept: Path) -> None:
    lines = read_ledger(swept.parent)
    *trials, whole = lines
    assert [line["trial"] for line in trials] == list(range(8))
    assert {line["sweep"] for line in trials} == {whole["id"]}
    assert {line["status"] for line in lines} == {"done"}
    assert (whole["experiment"], whole["trials"], whole["failed"]) == ("sweep", 8, 0)
    assert len({line["id"] for line in lines}) == 9
    assert trials[3]["settings"] == {"k": 2, "quantiles": [0.9, 0.3], "horizons": ["3h"]}


def test_sweep__again_makes_nothing_and_gives_the_same(swept: Path, lake: Path, workers: Workers) -> None:
    """A second sweep over the same store, under another name."""
    again = run_sweep(lake, swept.with_name("again"), workers, **GRID)
    record = json.loads((again / "run.json").read_text())
    assert sum(held["made"] for held in record["artefacts"].values()) == 0
    for name in ("sweep", "sweep_ic"):
        mine, other = (out / "results" / f"{name}.parquet" for out in (again, swept))
        assert mine.read_bytes() == other.read_bytes()


def test_sweep__order_and_company_of_trials_change_no_test(
    swept: Path, lake: Path, tmp_path: Path, workers: Workers
) -> None:
    alone = run_sweep(
        lake,
        tmp_path / "sweep",
        workers,
        **{**GRID, "grid": {}, "trials": [{"horizons": ["3h"], "k": 3, "quantiles": [0.9, 0.3]}]},
    )
    mine = table(alone, "sweep_ic")
    tests = table(swept, "sweep_ic")
    other = tests[tests["trial"] == 7]
    kept = [name for name in mine.columns if name not in ("trial", "evaluation", "p_fdr", "verdict")]
    pd.testing.assert_frame_equal(mine[kept], other[kept].reset_index(drop=True), check_exact=True)


def test_sweep__walk_forward_windows_and_features_may_vary(
    lake: Path, tmp_path: Path, workers: Workers
) -> None:
    grid = {
        "train_days": [None, 2],
        "window": [50, 100],
        "winsorize": [None, [0.01, 0.99]],
        "horizons": [["1h"]],
    }
    out = run_sweep(lake, tmp_path / "sweep", workers, config=WIDE | {"horizons": ["1h"]}, grid=grid)
    tests, rows = table(out, "sweep_ic"), table(out, "sweep").set_index("trial")
    assert (rows["status"] == "done").all()
    for trial in (0, 7):
        settings = {name: json.loads(rows.loc[trial, name]) for name in grid}
        of_run = single_ic(
            lake, tmp_path / str(trial), workers, make_config(WIDE | {"horizons": ["1h"]} | settings)
        )
        same_tests(tests[tests["trial"] == trial], of_run)


def test_sweep__symbols_may_vary(lake: Path, tmp_path: Path, workers: Workers) -> None:
    out = run_sweep(
        lake,
        tmp_path / "sweep",
        workers,
        config=WIDE,
        grid={"symbols": [["BTCUSDT"], "ETHUSDT", list(SYMBOLS)]},
    )
    tests = table(out, "sweep_ic")
    assert Counter(tests.groupby("trial")["symbol"].unique().map(tuple)) == Counter(
        [("BTCUSDT",), ("ETHUSDT",), SYMBOLS]
    )
    assert tests["evaluation"].nunique() == 2


# ---- failures -----------------------------------------------------------------------------------------


def test_failed_trial__is_a_row_and_not_the_end(lake: Path, tmp_path: Path, workers: Workers) -> None:
    out = run_sweep(
        lake,
        tmp_path / "sweep",
        workers,
        config=WIDE,
        trials=[
            {"k": 3},
            {"k": 1},
            {"k": 3, "engine": "cuml"},
            {"k": 3, "train_days": 9},
            {"k": 2, "symbols": ["NOTHERE"]},
            {"k": 3, "book": "quotes"},
            {"k": 2},
        ],
    )
    rows = table(out, "sweep")
    assert rows["status"].tolist() == ["done", *["failed"] * 5, "done"]
    errors = rows["error"].tolist()
    assert pd.isna(errors[0])
    for error, words in zip(
        errors[1:6], ("k = 1", "cuml", "walk-forward", "NOTHERE", "no quotes"), strict=True
    ):
        assert words in error
        assert "\n" not in error
    assert rows["tests"].tolist()[1:6] == [0] * 5
    assert sorted(table(out, "sweep_ic")["trial"].unique()) == [0, 6]
    statuses = [line["status"] for line in read_ledger(tmp_path)]
    assert statuses.count("failed") == 5
    same_tests(
        table(out, "sweep_ic").query("trial == 0"),
        single_ic(lake, tmp_path / "alone", workers, make_config(WIDE)),
    )


def spoil(lake: Path, table: str, symbol: str, days: list[dt.date]) -> None:
    for day in days:
        (file,) = (lake / table / "exchange=synthetic" / f"date={day}").glob(f"{symbol}-*.parquet")
        flip_bits(file)


@pytest.mark.parametrize("on_bad_day", ["fail", "skip"])
def test_broken_symbol__fails_its_own_trials_alone(
    lake: Path, tmp_path: Path, workers: Workers, on_bad_day: str
) -> None:
    own = shutil.copytree(lake, tmp_path / "lake")
    spoil(own, "trades", "ETHUSDT", DAYS)
    out = run_sweep(
        own,
        tmp_path / "sweep",
        workers,
        config=WIDE | {"on_bad_day": on_bad_day},
        grid={"symbols": [["BTCUSDT"], ["ETHUSDT"]]},
    )
    rows = table(out, "sweep")
    assert rows["status"].tolist() == ["done", "failed"]
    assert "ETHUSDT" in rows["error"].tolist()[1]
    of_run = single_ic(own, tmp_path / "alone", workers, make_config(WIDE), ["BTCUSDT"])
    same_tests(table(out, "sweep_ic"), of_run)


def test_broken_day__fails_only_the_trials_that_look_at_it(
    lake: Path, tmp_path: Path, workers: Workers
) -> None:
    """The book of the second day after the range is looked at for returns of thirty hours alone."""
    own = shutil.copytree(lake, tmp_path / "lake")
    spoil(own, "book_snapshot_25", "BTCUSDT", [DAYS[3]])
    out = run_sweep(
        own,
        tmp_path / "sweep",
        workers,
        symbols=["BTCUSDT"],
        end=DAYS[1],
        config=WIDE,
        grid={"horizons": [["1h"], ["30h"], ["2h"]]},
    )
    assert table(out, "sweep")["status"].tolist() == ["done", "failed", "done"]


def test_sweep__without_any_trial_that_can_run_is_refused(
    lake: Path, tmp_path: Path, workers: Workers
) -> None:
    with pytest.raises(InputError, match=r"none of the 2 trials can run: k = 0: .*"):
        run_sweep(lake, tmp_path / "sweep", workers, grid={"k": [0, 1]})
    assert list(tmp_path.iterdir()) == []


WHERE = "exchange: e\nsymbols: [A]\nstart: 2024-05-01\nend: 2024-05-02\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("grid: {k: [2]}\n", "exchange"),
        (
            "grid: {kk: [2]}\n" + WHERE,
            "kk: no such key",
        ),
        (
            "grid: {k: []}\n" + WHERE,
            "grid.k: has no",
        ),
        ("grid: {k: 3}\n" + WHERE, "grid.k = 3"),
        ("grids: {k: [2]}\n", "grids"),
        ("experiments: [moon]\n", "experiments.0 = 'moon'"),
        (
            "experiments: [flow]\ngrid: {k: [2]}\n" + WHERE,
            "k: no such key of flow",
        ),
    ],
)
def test_read_sweep__names_the_file_and_the_field(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        sweep.read_sweep(file)
    assert str(caught.value).startswith(f"{file}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_plan__tells_what_is_there_and_writes_nothing(
    swept: Path, lake: Path, tmp_path: Path, workers: Workers
) -> None:
    file = sweep.SweepFile(**{**COMMON, **GRID})
    fresh = sweep.SweepRequest(lake=lake, out=tmp_path / "sweep", file=file)
    trials, tallies, problems = sweep.plan_sweep(fresh, workers)
    assert (len(trials), problems) == (8, [])
    assert (tallies["book"].there, tallies["book"].missing) == (0, 8)
    assert list(tmp_path.iterdir()) == []
    held = sweep.SweepRequest(lake=lake, out=tmp_path / "sweep", file=file, store=swept.parent / "store")
    _, tallies, _ = sweep.plan_sweep(held, workers)
    assert {name: tally.missing for name, tally in tallies.items()} == dict.fromkeys(tallies, 0)
    assert tallies["evaluation"].there == 16
    assert list(tmp_path.iterdir()) == []

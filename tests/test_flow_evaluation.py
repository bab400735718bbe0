"""The whole evaluation of a taker-flow run on made-up bars, its page, and the size of its tests."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from clusterlob_gpu import flow_evaluation, flow_report
from clusterlob_gpu.calibration import ROLLUPS, rejection_rates, rejections
from clusterlob_gpu.differences import difference_table, slice_table
from clusterlob_gpu.errors import ConfigError, InputError
from clusterlob_gpu.evaluation import Signal, Target, ic_table
from clusterlob_gpu.flow_evaluation import HEADLINE, LARGE, SMALL, TOTAL, FlowPlan, flow_signals, flow_tables
from clusterlob_gpu.report import console_tables, render_run

WIDTH = 300_000_000
START = 1_714_521_600_000_000  # 2024-05-01
HOURS = {"1h": 12, "3h": 36}
SUMS = {"30m": 6, **HOURS}


def summed(values: np.ndarray, first: int, n: int, bars: int) -> np.ndarray:
    path = np.concatenate([[0.0], np.cumsum(values)])
    end = first + np.arange(n) + 1
    return path[end] - path[end - bars]


def made_bars(days: int, effect: float = 0.0, seed: int = 1, symbol: str = "BTCUSDT") -> pd.DataFrame:
    """Bars in which one unit of large imbalance moves the mid by effect * 10 bps over the next bar."""
    rng = np.random.default_rng(seed)
    n, first = days * 288, 40
    total = n + 2 * first
    flow = {name: rng.normal(size=total) * 0.3 for name in (LARGE, SMALL)}
    flow[TOTAL] = 0.5 * flow[LARGE] + 0.5 * flow[SMALL]
    returns = 1e-3 * rng.normal(size=total)
    returns[1:] += 1e-3 * effect * flow[LARGE][:-1]
    path = np.concatenate([[0.0], np.cumsum(returns)])
    at = first + np.arange(n)
    columns: dict[str, object] = {"symbol": symbol, "bar_ts": START + np.arange(n) * WIDTH}
    columns |= {"mid": 6e4 * np.exp(path[at + 1]), "spread_bps": 0.5 + rng.random(n)}
    for name, values in flow.items():
        columns[name] = values[at]
        columns |= {f"{name}_sum_{text}": summed(values, first, n, bars) for text, bars in SUMS.items()}
    for text, bars in HOURS.items():
        columns[f"ret_fwd_{text}"] = path[at + 1 + bars] - path[at + 1]
        columns[f"ret_{text}"] = summed(returns, first, n, bars)
        columns[f"ETHUSDT_ret_{text}"] = rng.normal(size=n)
    columns["low_liquidity"] = (rng.random(n) < 0.3).astype(float)
    columns["liquidity_regime"] = np.where(columns["low_liquidity"] == 1, "low", "normal")
    columns["volatility_regime"] = np.tile(np.repeat(["low", "middle", "high"], 96), days)
    columns["stress_regime"] = None
    return pd.DataFrame(columns)


def plan(**options: object) -> FlowPlan:
    values: dict[str, object] = {"width_us": WIDTH, "horizons_us": [12 * WIDTH, 36 * WIDTH], "draws": 200}
    return FlowPlan(**(values | options))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def tables() -> dict[str, pd.DataFrame]:
    bars = [made_bars(20, effect=1.0), made_bars(20, seed=2, symbol="ETHUSDT")]
    return flow_tables(pd.concat(bars), plan())


def row(table: pd.DataFrame, **keys: object) -> pd.Series:
    for name, value in keys.items():
        table = table[table[name] == value]
    assert len(table) == 1
    return table.iloc[0]


def test_signals__rollups_and_benchmarks() -> None:
    columns = [TOTAL, LARGE, f"{LARGE}_sum_3h", f"{TOTAL}_sum_3h", f"{LARGE}_acceleration", "flow_toxicity"]
    found = {signal.name: signal for signal in flow_signals(columns, WIDTH)}
    assert {name: signal.rollup_bars for name, signal in found.items()} == {
        LARGE: 1,
        f"{LARGE}_sum_3h": 36,
        f"{LARGE}_acceleration": 36,
        TOTAL: 1,
        f"{TOTAL}_sum_3h": 36,
        "flow_toxicity": 1,
    }
    assert found[f"{LARGE}_sum_3h"].benchmark == f"{TOTAL}_sum_3h"
    assert found[f"{LARGE}_acceleration"].benchmark is None


def test_planted_flow__is_found_inside_its_interval(tables: dict[str, pd.DataFrame]) -> None:
    std = 0.3e-3  # return per standard deviation of large flow
    for horizon, bars in HOURS.items():
        noise = (bars * (1e-3**2 + std**2)) ** 0.5
        got = row(tables["ic"], symbol="BTCUSDT", signal=LARGE, target=f"ret_fwd_{horizon}")
        assert got["ci_low"] < std / noise < got["ci_high"]
        assert got["n"] == 20 * 288
    first = row(tables["ic"], symbol="BTCUSDT", signal=LARGE, target="ret_fwd_1h")
    assert first["verdict"] == "positive"
    rest = tables["ic"].query("symbol == 'ETHUSDT'")
    assert (rest["verdict"] == "undecided").mean() > 0.9
    less = row(tables["ic_differences"], symbol="BTCUSDT", signal=LARGE, benchmark=SMALL, target="ret_fwd_1h")
    assert less["verdict"] == "larger"
    assert less["diff"] == pytest.approx(less["ic"] - less["ic_benchmark"], abs=1e-15)
    spread = row(tables["spreads"], symbol="BTCUSDT", signal=LARGE, target="ret_fwd_1h")
    assert spread["ci_low"] < 2 * 1.755 * 1e4 * std < spread["ci_high"]
    slope = row(
        tables["regressions"],
        symbol="BTCUSDT",
        signal=LARGE,
        target="ret_fwd_1h",
        model="controls",
        term=LARGE,
    )
    assert abs(slope["coef_bps"] - 1e4 * std) < 3 * 1e4 * slope["se"] * 0.3
    book = row(tables["backtest"], symbol="BTCUSDT", signal=LARGE, horizon_us=12 * WIDTH, rule="sign")
    # a sleeve of 1/12 earns E|x| effect = 0.3 * 0.798 bp * 10 over its first bar
    assert book["gross_bps_per_day"] == pytest.approx(288 / 12 * 2.394, abs=3 * 25)
    assert book["gross_t"] > 2


def test_tables__cover_signals_targets_and_slices(tables: dict[str, pd.DataFrame]) -> None:
    assert len(tables["ic"]) == 2 * 12 * 2
    assert len(tables["ic_differences"]) == 2 * 2 * 4 * 2
    assert len(tables["spreads"]) == 2 * len(HEADLINE) * 2
    assert len(tables["quantiles"]) == 11 * len(tables["spreads"])
    regimes = tables["regimes"]
    assert set(regimes["by"]) == {"volatility_regime", "liquidity_regime", "stress_regime"}
    assert (regimes.loc[regimes["by"] == "stress_regime", "verdict"] == "thin").all()
    thirds = regimes[regimes["by"] == "volatility_regime"]
    assert (thirds["n"] == 20 * 96).all()
    stable = tables["stability"]
    assert set(stable["by"]) == {"symbol", "month", "volatility_regime", "liquidity_regime"}
    whole = row(stable, symbol="BTCUSDT", by="symbol", signal=LARGE, target="ret_fwd_3h")
    assert whole["ic"] == row(tables["ic"], symbol="BTCUSDT", signal=LARGE, target="ret_fwd_3h")["ic"]
    notes = tables["regressions"].query("model == 'controls'")["notes"]
    assert notes.str.contains("oi: absent").all()


def test_tables__at_once_are_as_many_as_is_said() -> None:
    """Those who ask for them take as many cores."""
    sizes = []

    def each(function: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
        sizes.append(len(items))
        return [function(item) for item in items]

    flow_tables(made_bars(3), plan(draws=20), each)
    assert sizes == [flow_evaluation.AT_ONCE]


def test_slices__match_each_slice_on_its_own() -> None:
    rng = np.random.default_rng(3)
    n = 900
    panel = pd.DataFrame({"bucket_ts": START + np.arange(n) * WIDTH, "x": rng.normal(size=n)})
    panel["kind"] = np.where(np.arange(n) % 300 < 100, "a", "b")
    panel.loc[850:, "kind"] = None
    panel["y"] = np.where(panel["kind"] == "a", 0.5, 0.0) * panel["x"] + rng.normal(size=n)
    signals, targets = [Signal("x", "x")], [Target("y", "y", 3 * WIDTH)]
    got = slice_table(panel, {"kind": ["a", "b"]}, signals, targets, width_us=WIDTH, draws=300)
    assert got["bucket"].tolist() == ["a", "b"]
    assert got["n"].tolist() == [300, 550]
    assert got["share"].tolist() == pytest.approx([300 / 850, 550 / 850])
    for at, name in enumerate("ab"):
        mine = panel[panel["kind"] == name]
        assert got["ic"][at] == pytest.approx(np.corrcoef(mine["x"], mine["y"])[0, 1], abs=1e-12)
        only = panel.assign(x=panel["x"].where(panel["kind"] == name))
        alone = ic_table(only, signals, targets, width_us=WIDTH, draws=5).iloc[0]
        assert got["hac_t"][at] == pytest.approx(alone["hac_t"], rel=1e-9)
        assert got["ic_rest"][at] == got["ic"][1 - at]
    assert got["diff"].tolist() == pytest.approx([got["ic"][0] - got["ic"][1], got["ic"][1] - got["ic"][0]])
    assert got["verdict"].tolist() == ["larger", "smaller"]
    assert got["diff_low"][0] == pytest.approx(-got["diff_high"][1], abs=1e-12)


def test_differences__use_rows_that_both_signals_have() -> None:
    rng = np.random.default_rng(4)
    panel = pd.DataFrame(rng.normal(size=(400, 3)), columns=["a", "b", "y"])
    panel["bucket_ts"] = START + np.arange(400) * WIDTH
    panel.loc[:99, "b"] = np.nan
    pair = (Signal("a", "a"), Signal("b", "b"))
    got = difference_table(panel, [pair, pair[::-1]], [Target("y", "y", WIDTH)], width_us=WIDTH, draws=200)
    kept = panel.iloc[100:]
    a, b = (np.corrcoef(kept[name], kept["y"])[0, 1] for name in "ab")
    assert got["n"].tolist() == [300, 300]
    assert got["diff"].tolist() == pytest.approx([a - b, b - a], abs=1e-12)
    assert got["diff_low"][0] == pytest.approx(-got["diff_high"][1], abs=1e-12)


def test_future__changes_no_signal_side_value() -> None:
    """Quantiles and positions before a cut stay when flow and prices after it change."""
    base = made_bars(4, seed=5)
    cut = 3 * 288
    altered = base.copy()
    numeric = [
        name for name in base.columns if name not in ("symbol", "bar_ts") and base[name].dtype == float
    ]
    altered.loc[cut:, numeric] = altered.loc[cut:, numeric] * 3 + 1
    paths = [flow_tables(bars, plan(draws=20))["backtest_path"] for bars in (base, altered)]
    before = [path[path["ts"] < START + (cut - 12) * WIDTH] for path in paths]
    pd.testing.assert_frame_equal(*before)


def test_gap_of_hours__moves_no_statistic_of_the_rest() -> None:
    full = made_bars(6, effect=0.5, seed=6)
    gone = full.drop(index=range(500, 560))
    hollow = full.copy()
    numeric = [
        name for name in full.columns if name not in ("symbol", "bar_ts") and full[name].dtype == float
    ]
    hollow.loc[500:559, numeric] = np.nan
    a, b = (flow_tables(bars, plan(draws=20)) for bars in (gone, hollow))
    for name in ("ic", "ic_differences", "spreads", "regressions", "backtest"):
        numbers = a[name].select_dtypes("number").columns.drop("null", errors="ignore")
        pd.testing.assert_frame_equal(a[name][numbers], b[name][numbers], rtol=1e-9)


@pytest.mark.parametrize("kind", ["no thresholds", "two hours", "no prices"])
def test_thin_bars__give_tables_and_a_page(kind: str, tmp_path: Path) -> None:
    bars = made_bars(2)
    if kind == "no thresholds":
        bars[[name for name in bars.columns if "large" in name or "small" in name]] = np.nan
    elif kind == "no prices":
        bars[["mid", "ret_fwd_1h", "ret_fwd_3h"]] = np.nan
    else:
        bars = bars.head(24)
    found = flow_tables(bars, plan(draws=20))
    assert row(found["ic"], signal=LARGE, target="ret_fwd_3h")["verdict"] == "thin"
    out = write_run(tmp_path, found, days=2)
    assert "This sample cannot tell" in " ".join(flow_report.findings(flow_report.read_run(out)[1][0]))
    assert render_run(out)[-1].name == "report.html"


def test_missing_columns__are_named() -> None:
    bars = made_bars(1)
    with pytest.raises(InputError, match="no column flow_imbalance_large"):
        flow_tables(bars.drop(columns=LARGE), plan())
    with pytest.raises(InputError, match="no column mid"):
        flow_tables(bars.drop(columns="mid"), plan())
    with pytest.raises(InputError, match="no rows"):
        flow_tables(bars.head(0), plan())


@pytest.mark.parametrize("name", ["nope", "ret_fwd_3h", "volatility_regime"])
def test_unknown_control__is_named_with_those_that_the_bars_have(name: str) -> None:
    known = "spread_bps, ret_1h, ret_3h, ETHUSDT_ret_1h, ETHUSDT_ret_3h, low_liquidity"
    with pytest.raises(ConfigError, match=f"controls = '{name}': no such control; name some of {known}$"):
        flow_tables(made_bars(1), plan(controls=("ret_1h", name)))


def write_run(out: Path, tables: dict[str, pd.DataFrame], days: int, **more: object) -> Path:
    (out / "results").mkdir(parents=True)
    for name, table in tables.items():
        table.to_parquet(out / "results" / f"{name}.parquet", index=False)
    info = {"experiment": "flow", "status": "done", "exchange": "binance-futures", "days": days}
    info |= {"symbols": ["BTCUSDT", "ETHUSDT"], "start": "2024-05-01", "end": "2024-05-20", "backend": "cpu"}
    info |= {"workers": 1, "seconds": 1.0, "config_hash": "0" * 16, "config": {"bar": "5m"}, "notes": []}
    (out / "run.json").write_text(json.dumps(info | {"versions": {}, "timings": {}} | more))
    return out


def test_report__says_what_the_numbers_allow(tables: dict[str, pd.DataFrame], tmp_path: Path) -> None:
    out = write_run(tmp_path, tables, days=20)
    files = render_run(out)
    names = ["ic", "ic_decay", "ic_factors", "quantiles", "regimes", "stability", "backtest"]
    expected = [f"{name}_{symbol}.png" for symbol in ("BTCUSDT", "ETHUSDT") for name in names]
    assert [path.name for path in files] == [*expected, "report.html"]
    page = files[-1].read_text()
    assert page.count("data:image/png;base64,") == 14
    assert re.search(r"(src|href|url)\W{1,2}https?:", page) is None
    views = flow_report.read_run(out)[1]
    said = {view.symbol: flow_report.findings(view) for view in views}
    null = row(tables["ic"], symbol="ETHUSDT", signal=LARGE, target="ret_fwd_3h")
    assert said["ETHUSDT"][0].startswith(
        "Does large taker flow predict the return of the next 3h? Not distinguishably from zero "
        f"(IC {null['ic']:+.4f}"
    )
    assert f"80 % power, before correction, is {null['mde']:.3f}" in said["ETHUSDT"][1]
    needed = flow_report.needed_days(null, views[1])
    assert needed == -(-20 * (null["mde"] / 0.02) ** 2 // 1)
    found = "after correction for 48 tests of all symbols: large on ret_fwd_1h"
    assert any(found in words for words in said["BTCUSDT"])
    console = Console(width=150, record=True, file=io.StringIO())
    made = console_tables(out)
    for table in made:
        console.print(table)
    text = console.export_text()
    assert "BTCUSDT: long/short books" in text
    assert sum(line.startswith("│") for line in text.splitlines()) == sum(table.row_count for table in made)
    assert "…" not in text
    ic = tables["ic"]
    tests, mine = int(ic["p_fdr"].notna().sum()), int(ic.query("symbol == 'ETHUSDT'")["p_fdr"].notna().sum())
    assert (mine, tests) == (24, 48)
    assert any("after correction for 48 tests of all symbols" in w for w in said["ETHUSDT"])


def test_rows__are_told_with_unknown_sides_and_orders(
    tables: dict[str, pd.DataFrame], tmp_path: Path
) -> None:
    rows = {"trades": 450_000, "kept": 450_000, "dropped": {}, "side_unknown": 39, "orders": 120_000}
    rows |= {"book_rows": 98_430, "book_skipped": {"empty_side": 0, "crossed": 41}}
    out = write_run(tmp_path, tables, days=20, rows={"BTCUSDT": rows})
    said = flow_report.findings(flow_report.read_run(out)[1][0])
    assert said[-1] == (
        "450,000 trades were used, put together to 120,000 orders; 39 of unknown side count as volume, in no "
        "imbalance. Of 98,430 book rows these were no valid book and skipped: 41 crossed."
    )


def test_missing_table__is_named(tables: dict[str, pd.DataFrame], tmp_path: Path) -> None:
    out = write_run(tmp_path, tables, days=20)
    (out / "results" / "spreads.parquet").unlink()
    with pytest.raises(InputError, match=r"spreads\.parquet: is missing"):
        render_run(out)


def test_size_of_the_tests__on_small_null_markets() -> None:
    markets = 120
    rates = rejection_rates(rejections(10, seed, 100) for seed in range(markets))
    noise = 3 * (0.05 * 0.95 / markets) ** 0.5
    assert rates["3h"]["naive_t"] > 0.5
    assert rates["5m"]["hac"] < 0.05 + noise
    assert rates["3h"]["both"] < 0.05 + noise + 0.03  # ten days hold only 80 horizons
    assert rates["3h"]["hac"] < rates["3h"]["default_newey_west"] < rates["3h"]["naive_t"]


@pytest.mark.parametrize("market", ["plain", "clustered"])
def test_kept_calibration__rejects_3_to_8_percent(market: str) -> None:
    kept = json.loads((Path(__file__).parent / "calibration.json").read_text())
    assert kept["markets"] >= 200
    for flow in ROLLUPS:
        for test in ("hac", "bootstrap", "both"):
            assert 0.03 <= kept["rejection_rates"][market][flow][test] <= 0.08
        assert kept["rejection_rates"][market][flow]["naive_t"] > (0.5 if flow != "5m" else 0.03)


def test_slices__are_thin_below_twenty_spans_and_a_thin_rest_gives_no_test() -> None:
    rng = np.random.default_rng(9)
    n = 1000
    panel = pd.DataFrame({"bucket_ts": START + np.arange(n) * WIDTH, "y": rng.normal(size=n)})
    panel["x"], panel["kind"] = rng.normal(size=n), np.where(np.arange(n) < 300, "few", "many")
    found = slice_table(
        panel,
        {"kind": ["few", "many"]},
        [Signal("x", "x"), Signal("sum", "x", 12)],
        [Target("y", "y", 12 * WIDTH)],
        width_us=WIDTH,
        draws=50,
    ).set_index(["signal", "bucket"])
    # 20 spans: 240 rows of one bar, 460 rows of a sum of 12
    assert found["thin"].tolist() == [False, False, True, False]
    assert found["diff_p"].isna().tolist() == [False, False, False, True]
    assert found["verdict"].tolist()[2:] == ["thin", "undecided"]

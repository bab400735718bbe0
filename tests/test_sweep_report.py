"""The page of a sweep and its words, on small made-up tables."""

from __future__ import annotations

import io
import itertools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from rich.console import Console
from scipy.stats import norm

from clusterlob_gpu import page, sweep_pictures, sweep_report, sweep_view
from clusterlob_gpu.errors import InputError
from clusterlob_gpu.evaluation import Z_POWER, judge
from clusterlob_gpu.report import console_tables, render_run
from clusterlob_gpu.sweep_report import findings
from clusterlob_gpu.sweep_view import STANDING, SweepView, headlines, read_run

HOUR = 3_600_000_000
LABELS = {-1: "all", 0: "passive", 1: "opportunistic", 2: "directional"}
N = 1440
Grid = dict[str, list[Any]]


def a_test(ic: float, cluster: float, signal: str, target: str, horizon_us: int) -> dict[str, Any]:
    se = N**-0.5
    thin = bool(np.isnan(ic))
    label = None if np.isnan(cluster) else LABELS.get(int(cluster), f"other {cluster:.0f}")
    return {
        "cluster": cluster,
        "label": label,
        "signal": signal,
        "target": target,
        "horizon_us": horizon_us,
        "n": 3 if thin else N,
        "ic": ic,
        "rank_ic": ic,
        "ci_low": ic - 1.96 * se,
        "ci_high": ic + 1.96 * se,
        "hac_t": ic / se,
        "hac_p": 2 * norm.sf(abs(ic / se)),
        "mde": Z_POWER * se,
        "predictive": target != "conr",
        "thin": thin,
    }


def cluster_evaluation(k: int, effect: float, rng: np.random.Generator) -> list[dict[str, Any]]:
    """Opportunistic flow predicts; in the largest of the clusters beyond the named ones nothing is known."""
    rows = []
    for cluster, target in itertools.product(range(-1, k), ("conr", "frnb", "r_1h")):
        ic = rng.normal() * N**-0.5 + (effect if cluster == 1 else 0.0)
        ic = float("nan") if cluster == 5 else ic
        rows.append(a_test(ic, cluster, "ofi_size", target, HOUR // 12))
    return rows


def flow_evaluation(horizons: list[str], effect: float, rng: np.random.Generator) -> list[dict[str, Any]]:
    return [
        a_test(rng.normal() * N**-0.5 + effect, float("nan"), signal, f"ret_fwd_{h}", int(h[:-1]) * HOUR)
        for signal in ("flow_imbalance_large", "flow_imbalance_large_sum_3h", "flow_imbalance_total")
        for h in horizons
    ]


OWN = {"cluster": ("k", "window", "horizons"), "flow": ("quantiles", "horizons")}


def make_sweep(
    out: Path,
    grid: Grid,
    experiments: tuple[str, ...] = ("cluster",),
    symbols: tuple[str, ...] = ("BTCUSDT",),
    effect: float = 0.0,
    failed: tuple[int, ...] = (),
    config: dict[str, Any] | None = None,
) -> Path:
    """A finished sweep: a trial per point of the grid; settings of another experiment share an evaluation."""
    points = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    numbers: dict[str, int] = {}
    parts, made = [], {}
    for trial, point in enumerate(points):
        for experiment, symbol in itertools.product(experiments, symbols):
            if trial in failed:
                continue
            mine = {name: point[name] for name in OWN[experiment] if name in point}
            number = numbers.setdefault(json.dumps([experiment, symbol, mine]), len(numbers))
            if number not in made:
                rng = np.random.default_rng([7, point.get("k", 3), symbols.index(symbol)])
                k, horizons = point.get("k", 3), point.get("horizons", ["1h", "3h"])
                rows = (
                    cluster_evaluation(k, effect, rng)
                    if experiment == "cluster"
                    else flow_evaluation(horizons, effect, np.random.default_rng(number))
                )
                made[number] = pd.DataFrame(rows).assign(
                    evaluation=number, experiment=experiment, symbol=symbol
                )
            parts.append((trial, number))
    tests = pd.DataFrame({"trial": np.empty(0, np.int64)})
    if made:
        alone = [
            judge(t).rename(columns={"p_fdr": "p_fdr_alone", "verdict": "verdict_alone"})
            for t in made.values()
        ]
        tests = judge(pd.concat(alone, ignore_index=True))
        tests = pd.DataFrame(parts, columns=["trial", "evaluation"]).merge(tests, on="evaluation")
    rows = []
    for trial, point in enumerate(points):
        row: dict[str, Any] = {"trial": trial, "id": f"{trial:016x}"}
        row |= {name: json.dumps(value) for name, value in point.items()}
        row |= {"status": "failed", "error": f"no <trades> on day {trial}", "tests": 0, "stand": 0}
        row |= {"best_hac_t": None, "best_ic": None, "best_p_fdr": None}
        if trial not in failed:
            mine = tests[(tests["trial"] == trial) & tests["predictive"] & ~tests["thin"]]
            best = mine.loc[mine["hac_p"].idxmin()]
            row |= {"status": "done", "error": None, "tests": len(mine)}
            row |= {"stand": int(mine["verdict"].isin(STANDING).sum())}
            row |= {f"best_{name}": best[name] for name in ("hac_t", "ic", "p_fdr")}
        rows.append(row)
    (out / "results").mkdir(parents=True)
    pd.DataFrame(rows).to_parquet(out / "results" / "sweep.parquet", index=False)
    tests.to_parquet(out / "results" / "sweep_ic.parquet", index=False)
    info = {
        "experiment": "sweep",
        "status": "done",
        "sweep": {
            "experiments": experiments,
            "exchange": "binance-futures",
            "symbols": symbols,
            "start": "2024-05-01",
            "end": "2024-05-05",
            "config": config or {},
            "grid": grid,
            "trials": [],
        },
        "config_hash": "0123456789abcdef",
        "trials": len(points),
        "failed": len(failed),
        "versions": {"numpy": "2.4"},
        "backend": "cpu",
        "workers": "1 process",
        "timings": {"evaluate": 1.0},
        "seconds": 3.21,
    }
    (out / "run.json").write_text(json.dumps(info))
    return out


WIDE: Grid = {"k": [2, 3, 4, 5, 6, 7], "quantiles": [[0.8, 0.5], [0.9, 0.5]], "horizons": [["1h"], ["3h"]]}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = make_sweep(tmp_path_factory.mktemp("wide"), WIDE, ("cluster", "flow"), effect=0.15, failed=(2, 5))
    render_run(out)
    return out


def test_render__writes_pictures_and_one_self_contained_page(wide: Path) -> None:
    written = sorted(wide.glob("plots/*.png"))
    names = ["ic_cluster_BTCUSDT", "ic_flow_BTCUSDT", "map_flow_BTCUSDT", "p_values_sweep"]
    assert [path.stem for path in written] == names
    text = (wide / "report.html").read_text()
    assert re.search(r"(src|href)=\"(?!data:)", text) is None
    assert "http" not in re.sub(r"base64,[^\"]*", "", text)
    assert "url(" not in text
    assert text.count("<figure") == len(names)
    assert ">IN SAMPLE<" in text
    assert sorted(path.name for path in wide.iterdir()) == ["plots", "report.html", "results", "run.json"]


def test_page__counts_what_was_searched_as_the_tables_do(wide: Path) -> None:
    tests = pd.read_parquet(wide / "results" / "sweep_ic.parquet")
    distinct = tests.drop_duplicates(["evaluation", "cluster", "signal", "target"])
    tested = distinct[distinct["p_fdr"].notna()].sort_values("evaluation", kind="stable")
    numbers = ["experiment", "symbol", "cluster", "signal", "target", "n", "ic", "hac_p"]
    repeated = int(tested.duplicated(numbers).sum())
    tested = tested.drop_duplicates(numbers)
    small, standing = (tested["hac_p"] < 0.05).sum(), tested["verdict"].isin(STANDING).sum()
    alone = tested["verdict_alone"].isin(STANDING).sum()
    text = (wide / "report.html").read_text()
    evaluations = tests["evaluation"].nunique()
    assert f"24 trials, of which 2 failed, gave {evaluations} distinct evaluations" in text
    assert f"with {len(tested)} distinct tests; {repeated} further ones only repeat the numbers" in text
    assert (
        f"{small} of {len(tested)} tests have p below 0.05 before any correction; from noise alone one"
        in text
    )
    assert f"expects {0.05 * len(tested):.1f}." in text
    assert f"{standing} stand after correction for all {len(tested)} tests of the sweep" in text
    assert f"corrected alone, as if nothing else had been tried, {alone} would" in text
    best = tested.loc[tested["hac_p"].idxmin()]
    assert f"IC {best['ic']:+.4f}, 95 % {best['ci_low']:+.4f} to {best['ci_high']:+.4f}" in text
    assert "biased upwards" in text
    thin = distinct[distinct["predictive"]]["thin"].sum()
    assert f"{thin} of {int(distinct['predictive'].sum())} predictive ICs are too thin to judge" in text


def test_page__lists_failed_trials_with_their_reason(wide: Path) -> None:
    text = (wide / "report.html").read_text()
    assert "<summary>Failed trials (2)</summary>" in text
    for trial in (2, 5):
        assert f"no &lt;trades&gt; on day {trial}" in text


def test_trial_rows__are_the_tables_strongest_tests(wide: Path) -> None:
    view = read_run(wide)
    done = view.trials[view.trials["status"] == "done"]
    rows = sweep_report.trial_rows(view, done)
    assert [row["trial"] for row in rows] == [str(trial) for trial in done["trial"]]
    assert [row["IC"] for row in rows] == [f"{ic:+.4f}" for ic in done["best_ic"]]
    assert [row["p corrected"] for row in rows] == [f"{p:.3f}" for p in done["best_p_fdr"]]
    assert [row["stand"] for row in rows] == [str(count) for count in done["stand"]]
    assert {row["quantiles"] for row in rows} == {"0.8, 0.5", "0.9, 0.5"}


def test_settings_that_matter__leave_out_what_changes_nothing(wide: Path) -> None:
    """frnb knows neither horizons nor quantiles; flow knows no k."""
    cluster, flow = headlines(read_run(wide), "BTCUSDT")
    assert cluster.settings == ["k"]
    assert flow.settings == ["quantiles", "horizons"]
    assert cluster.evaluations == 12
    assert list(cluster.points["k"]) == ["2", "3", "4", "5", "6", "7"]
    assert cluster.panels == ["all clusters", "opportunistic", "directional", "passive"]
    assert set(cluster.rows["target"]) == {"frnb"}


def test_settings_that_matter__stay_where_nothing_can_be_told_apart() -> None:
    """Two settings that always change together: no rows differ in one of them alone."""
    rows = pd.DataFrame({"panel": "a", "k": ["2", "3"], "window": ["50", "100"], "ic": [0.1, 0.2]})
    assert sweep_view.settings_that_matter(rows, ["k", "window"], ["panel"]) == ["k", "window"]


def test_values__stand_in_rising_order_and_durations_by_length() -> None:
    for values, expected in (
        ([10, 2, None], ["-", "2", "10"]),
        (["1h", "5m", "1d"], ["5m", "1h", "1d"]),
        ([["3h"], ["5m", "1h"]], ["5m, 1h", "3h"]),
        (["own", 3], ["own", "3"]),
    ):
        assert list(sweep_view._ordered(values).categories) == expected


def test_pictures__show_ic_and_interval_of_the_tables(wide: Path) -> None:
    cluster, flow = headlines(read_run(wide), "BTCUSDT")
    axes = dict(zip(cluster.panels, sweep_pictures.ic_by_setting(cluster).axes, strict=True))
    mine = cluster.rows[cluster.rows["panel"] == "opportunistic"].sort_values("k")
    marks = [line.get_data() for line in axes["opportunistic"].lines if line.get_marker() == "o"]
    drawn = {y: x for line in marks for x, y in zip(*line, strict=True)}
    assert [drawn[y] for y in range(6)] == pytest.approx(mine["ic"].tolist())
    spans = [c.get_segments() for c in axes["opportunistic"].collections]
    found = sorted(tuple(segment[:, 0]) for part in spans for segment in part)
    assert found == [
        pytest.approx(pair) for pair in sorted(zip(mine["ci_low"], mine["ci_high"], strict=True))
    ]
    means, stands = sweep_pictures.cells(flow, "large, one bar")
    row = flow.rows.query("panel == 'large, one bar' and quantiles == '0.9, 0.5' and horizons == '3h'").iloc[
        0
    ]
    assert means.loc["0.9, 0.5", "3h"] == row["ic"]
    assert stands.loc["0.9, 0.5", "3h"] == float(row["verdict"] in STANDING)


def test_console__shows_trials_failures_and_how_much_was_searched(wide: Path) -> None:
    tables = console_tables(wide)
    assert [str(t.title) for t in tables] == [
        "finished trials (22)",
        "failed trials (2)",
        "strongest distinct tests, the best of many: biased upwards",
        "how much was searched, in sample",
    ]
    console = Console(width=200, record=True, file=io.StringIO())
    for table in tables:
        console.print(table)
    assert "no <trades> on day 5" in console.export_text()


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two k in thirty-five windows: 70 evaluations."""
    grid: Grid = {"window": list(range(50, 400, 10)), "k": [2, 3]}
    return make_sweep(tmp_path_factory.mktemp("many"), grid, config={"train_days": 2})


def distinguishable(view: SweepView) -> pd.DataFrame:
    """ICs that depend on every setting."""
    noise = np.random.default_rng(1).normal(size=len(view.ic)) * 1e-4
    return view.ic.assign(ic=view.ic["ic"] + noise)


def test_many_trials__show_the_strongest_in_the_terminal_and_no_names_in_the_picture(many: Path) -> None:
    title = str(console_tables(many)[0].title)
    assert title == "finished trials (the strongest 20 of 70)"
    view = read_run(many)
    view = SweepView(view.info, view.trials, distinguishable(view), view.evaluations)
    (headline,) = headlines(view, "BTCUSDT")
    assert len(headline.points) == 70
    figure = sweep_pictures.ic_by_setting(headline)
    assert [label.get_text() for axes in figure.axes for label in axes.get_yticklabels()] == []
    assert sweep_pictures.widest(headline) == ("window", "k")
    assert not headline.in_sample
    sweep_pictures.ic_map(headline)


def test_many_trials__page_without_any_effect_says_so(many: Path) -> None:
    render_run(many)
    text = (many / "report.html").read_text()
    assert "No test stands after correction for all" in text
    assert ">IN SAMPLE<" not in text
    assert "CHOSEN AFTER LOOKING" in text


def test_one_trial__has_a_page_without_pictures_of_settings(tmp_path: Path) -> None:
    out = make_sweep(tmp_path / "one", {"k": [3]}, effect=0.2)
    assert [path.name for path in render_run(out)] == ["report.html"]
    text = (out / "report.html").read_text()
    assert "1 trial, of which none failed, gave 1 distinct evaluation with 8 distinct tests." in text
    assert "opportunistic +0." in text


def test_all_trials_failed__still_has_a_page(tmp_path: Path) -> None:
    out = make_sweep(tmp_path / "none", {"k": [2, 3]}, failed=(0, 1))
    assert [path.name for path in render_run(out)] == ["report.html"]
    text = (out / "report.html").read_text()
    assert "Nothing could be tested." in text
    assert "no &lt;trades&gt; on day 1" in text
    assert "Sweep: BTCUSDT" in re.sub(r"\s+", " ", text)
    assert [str(t.title) for t in console_tables(out)] == ["failed trials (2)", "how much was searched"]


def test_nan__is_a_dash_and_never_a_point(tmp_path: Path) -> None:
    out = make_sweep(tmp_path / "nan", {"k": [2, 3], "window": [50, 100]}, effect=0.1)
    path = out / "results" / "sweep_ic.parquet"
    tests = pd.read_parquet(path)
    null = (tests["cluster"] == 1) & (tests["trial"] < 2)
    tests.loc[null, ["ic", "ci_low", "ci_high", "hac_t", "hac_p", "mde", "p_fdr"]] = np.nan
    tests.loc[null, ["thin", "verdict"]] = [True, "thin"]
    tests.to_parquet(path, index=False)
    render_run(out)
    body = re.sub(r"base64,[^\"]*", "", (out / "report.html").read_text())
    assert re.search(r"\bnan\b", body, re.IGNORECASE) is None
    assert ">thin<" in body


def test_two_symbols__have_a_section_each_and_names_say_which(tmp_path: Path) -> None:
    out = make_sweep(tmp_path / "two", {"k": [2, 3]}, symbols=("BTCUSDT", "ETHUSDT"), effect=0.2)
    names = [path.name for path in render_run(out)]
    assert names == ["p_values_sweep.png", "ic_cluster_BTCUSDT.png", "ic_cluster_ETHUSDT.png", "report.html"]
    words = " ".join(findings(read_run(out)))
    assert re.search("The strongest test is (BTC|ETH)USDT opportunistic: ofi_size on", words)


def test_largest_t_of_noise() -> None:
    assert sweep_report.median_largest_t(1) == pytest.approx(0.6745, abs=1e-4)
    draws = np.abs(np.random.default_rng(2).normal(size=(4000, 50))).max(axis=1)
    assert sweep_report.median_largest_t(50) == pytest.approx(np.median(draws), abs=0.03)


def test_missing_table__is_named(tmp_path: Path) -> None:
    out = make_sweep(tmp_path / "gone", {"k": [2]})
    (out / "results" / "sweep_ic.parquet").unlink()
    with pytest.raises(InputError, match=r"sweep_ic\.parquet: is missing"):
        render_run(out)
    assert page.read_info(out)["experiment"] == "sweep"

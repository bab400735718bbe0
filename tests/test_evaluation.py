"""Statistics against slow plain references, known answers, and simulations where the null is true."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm
from scipy.stats import spearmanr

from clusterlob_gpu import evaluation as ev
from clusterlob_gpu.errors import InputError
from clusterlob_gpu.evaluation import MIXED, Signal, Target, cluster_ic, ic_table, judge, markout_table

WIDTH = 300_000_000
DAY = 86_400_000_000
START = 1_714_521_600_000_000  # 2024-05-01


def panel_of(**columns: np.ndarray) -> pd.DataFrame:
    n = len(next(iter(columns.values())))
    return pd.DataFrame({"bucket_ts": START + np.arange(n) * WIDTH, **columns})


def one(panel: pd.DataFrame, horizon: int = 1, rollup: int = 1, **options: int) -> pd.Series:
    table = ic_table(
        panel, [Signal("x", "x", rollup)], [Target("y", "y", horizon * WIDTH)], width_us=WIDTH, **options
    )
    assert len(table) == 1
    return table.iloc[0]


def forward(returns: np.ndarray, n: int, horizon: int) -> np.ndarray:
    path = np.concatenate([[0.0], np.cumsum(returns)])
    return path[1 + horizon : 1 + horizon + n] - path[1 : 1 + n]


def rolled(flow: np.ndarray, n: int, bars: int) -> np.ndarray:
    """Sum over the last `bars` values, the last of them at the row itself; `flow` starts earlier."""
    path = np.concatenate([[0.0], np.cumsum(flow)])
    end = len(flow) - n + np.arange(n) + 1
    return path[end] - path[end - bars]


def with_nulls(rng: np.random.Generator, n: int = 240) -> tuple[np.ndarray, np.ndarray]:
    x = rng.normal(size=n).round(1)  # rounding makes ties
    y = 0.3 * x + rng.normal(size=n)
    x[rng.random(n) < 0.1] = np.nan
    y[rng.random(n) < 0.1] = np.nan
    y[50:60] = np.nan
    return x, y


# ---- slow references


def pearson_by_hand(x: list[float], y: list[float]) -> float:
    mx, my = sum(x) / len(x), sum(y) / len(y)
    cov = sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True))
    return cov / (sum((a - mx) ** 2 for a in x) * sum((b - my) ** 2 for b in y)) ** 0.5


def ranks_by_counting(values: list[float]) -> list[float]:
    return [sum(v < a for v in values) + (sum(v == a for v in values) + 1) / 2 for a in values]


def hac_t_by_hand(x: np.ndarray, y: np.ndarray, lags: int) -> float:
    """Every pair of rows at most `lags` buckets apart, weighted by the Bartlett kernel; nulls are skipped."""
    rows = [t for t in range(len(x)) if np.isfinite(x[t]) and np.isfinite(y[t])]
    n = len(rows)
    mean = {"x": sum(x[t] for t in rows) / n, "y": sum(y[t] for t in rows) / n}
    sd = {
        "x": (sum((x[t] - mean["x"]) ** 2 for t in rows) / n) ** 0.5,
        "y": (sum((y[t] - mean["y"]) ** 2 for t in rows) / n) ** 0.5,
    }
    zx = {t: (x[t] - mean["x"]) / sd["x"] for t in rows}
    zy = {t: (y[t] - mean["y"]) / sd["y"] for t in rows}
    ic = sum(zx[t] * zy[t] for t in rows) / n
    score = {t: zx[t] * (zy[t] - ic * zx[t]) for t in rows}
    total = 0.0
    for s in rows:
        for t in rows:
            if abs(s - t) <= lags:
                total += (1 - abs(s - t) / (lags + 1)) * score[s] * score[t]
    return ic / (total / n**2 * n / (n - 2)) ** 0.5


def bootstrap_by_hand(x: np.ndarray, y: np.ndarray, block: int, draws: int, seed: int) -> list[float]:
    """Rows copied one by one, in the draws' order: whole blocks first, then the cut one."""
    n = len(x)
    whole, rest = divmod(n, block)
    rng = np.random.default_rng(seed)
    starts, ends = [], []
    for first in range(0, draws, ev._DRAWS_AT_ONCE):
        now = min(ev._DRAWS_AT_ONCE, draws - first)
        starts.extend(rng.integers(n, size=(now, whole)).tolist())
        ends.extend(rng.integers(n, size=now).tolist() if rest else [None] * now)
    out = []
    for begin, end in zip(starts, ends, strict=True):
        rows = [(s + i) % n for s in begin for i in range(block)]
        rows += [(end + i) % n for i in range(rest)] if rest else []
        assert len(rows) == n
        kept = [t for t in rows if np.isfinite(x[t]) and np.isfinite(y[t])]
        out.append(pearson_by_hand([x[t] for t in kept], [y[t] for t in kept]))
    return out


def test_ic_and_rank_ic__match_definition_with_ties_and_nulls() -> None:
    x, y = with_nulls(np.random.default_rng(1))
    got = one(panel_of(x=x, y=y), draws=10)
    kept = np.isfinite(x) & np.isfinite(y)
    a, b = x[kept].tolist(), y[kept].tolist()
    assert got["n"] == kept.sum()
    assert got["ic"] == pytest.approx(pearson_by_hand(a, b), abs=1e-12)
    assert got["rank_ic"] == pytest.approx(
        pearson_by_hand(ranks_by_counting(a), ranks_by_counting(b)), abs=1e-12
    )
    assert got["rank_ic"] == pytest.approx(spearmanr(a, b).statistic, abs=1e-12)


@pytest.mark.parametrize(("horizon", "rollup", "lags"), [(1, 1, 1), (3, 1, 5), (3, 12, 14), (12, 36, 47)])
def test_hac__matches_double_loop_in_time(horizon: int, rollup: int, lags: int) -> None:
    x, y = with_nulls(np.random.default_rng(2))
    got = one(panel_of(x=x, y=y), horizon, rollup, draws=10)
    assert got["lags"] == lags
    assert got["hac_t"] == pytest.approx(hac_t_by_hand(x, y, lags), rel=1e-9)
    assert got["hac_t_min"] == pytest.approx(hac_t_by_hand(x, y, horizon - 1), rel=1e-9)
    kept = np.isfinite(x) & np.isfinite(y)
    rx, ry = np.full(len(x), np.nan), np.full(len(x), np.nan)
    rx[kept], ry[kept] = ranks_by_counting(x[kept].tolist()), ranks_by_counting(y[kept].tolist())
    assert got["rank_hac_t"] == pytest.approx(hac_t_by_hand(rx, ry, lags), rel=1e-9)


def test_hac__matches_statsmodels_without_nulls() -> None:
    rng = np.random.default_rng(3)
    x = rolled(rng.normal(size=611), 600, 12)
    y = forward(rng.normal(size=612), 600, 12) + 0.2 * x
    got = one(panel_of(x=x, y=y), 12, 12, draws=10)
    zx, zy = (x - x.mean()) / x.std(), (y - y.mean()) / y.std()
    kwds = {"maxlags": 23, "kernel": "bartlett", "use_correction": True}
    fit = sm.OLS(zy, sm.add_constant(zx)).fit(cov_type="HAC", cov_kwds=kwds)
    assert got["ic"] == pytest.approx(fit.params[1], abs=1e-12)
    assert got["hac_se"] == pytest.approx(fit.bse[1], rel=1e-9)
    assert got["hac_t"] == pytest.approx(fit.tvalues[1], rel=1e-9)
    assert got["hac_p"] == pytest.approx(fit.pvalues[1], rel=1e-6)
    plain = sm.OLS(zy, sm.add_constant(zx)).fit()
    assert got["n_eff"] == pytest.approx(600 * (plain.bse[1] / fit.bse[1]) ** 2, rel=1e-9)
    assert got["mde"] == pytest.approx((1.959964 + 0.841621) * fit.bse[1], rel=1e-6)


@pytest.mark.parametrize("at_once", [1, 1 << 21])
@pytest.mark.parametrize("block", [1, 7, 40])
def test_bootstrap__matches_brute_force(monkeypatch: pytest.MonkeyPatch, block: int, at_once: int) -> None:
    """However many signals are resampled at a time: all on the same blocks."""
    monkeypatch.setattr(ev, "_MOMENTS_AT_ONCE", at_once)
    x, y = with_nulls(np.random.default_rng(4), 120)
    pairs = [ev.pair_of(x, y), ev.pair_of(-(y**3), y)]
    got = ev.bootstrap_ics(pairs, block, 100, seed=5)
    np.testing.assert_allclose(got[:, 0], bootstrap_by_hand(x, y, block, 100, 5), atol=1e-10)
    np.testing.assert_allclose(got[:, 1], bootstrap_by_hand(-(y**3), y, block, 100, 5), atol=1e-10)


def test_bootstrap_interval__is_the_quantiles_and_the_difference_is_paired() -> None:
    rng = np.random.default_rng(6)
    x, b = rng.normal(size=(2, 400))
    y = 0.2 * x + 0.1 * b + rng.normal(size=400)
    signals = [Signal("x", "x", benchmark="b"), Signal("b", "b", benchmark="b")]
    table = ic_table(
        panel_of(x=x, b=b, y=y), signals, [Target("y", "y", WIDTH)], width_us=WIDTH, draws=300, seed=11
    )
    block = int(table["block"].iloc[0])
    bx, bb = (np.array(bootstrap_by_hand(s, y, block, 300, 11)) for s in (x, b))
    row = table.iloc[0]
    assert row[["ci_low", "ci_high"]].tolist() == pytest.approx(
        np.quantile(bx, [0.025, 0.975]).tolist(), abs=1e-9
    )
    assert row["diff"] == pytest.approx(np.corrcoef(x, y)[0, 1] - np.corrcoef(b, y)[0, 1], abs=1e-12)
    assert row[["diff_low", "diff_high"]].tolist() == pytest.approx(
        np.quantile(bx - bb, [0.025, 0.975]).tolist(), abs=1e-9
    )
    below = int((bx - bb <= 0).sum())
    assert row["diff_p"] == pytest.approx(min(1.0, 2 * (min(below, 300 - below) + 1) / 301), abs=1e-12)
    assert table.iloc[1][["diff", "diff_low", "diff_high", "diff_p"]].isna().all()


def test_block__covers_the_horizon_and_persistence_but_at_most_a_quarter() -> None:
    rng = np.random.default_rng(7)
    n = 2000
    white = one(panel_of(x=rng.normal(size=n), y=rng.normal(size=n)), draws=5)
    assert 1 <= white["block"] <= 10
    flow, returns = rng.normal(size=n + 35), rng.normal(size=n + 37)
    slow = one(panel_of(x=rolled(flow, n, 36), y=forward(returns, n, 36)), 36, 36, draws=5)
    assert 36 <= slow["block"] <= 500
    short = one(panel_of(x=rng.normal(size=100), y=rng.normal(size=100)), 60, draws=5)
    assert short["block"] == 25
    assert short["lags"] == 25
    assert short["verdict"] == "thin"


def test_non_overlapping_and_daily__match_slices() -> None:
    rng = np.random.default_rng(8)
    n = 5 * 288
    x = rng.normal(size=n)
    y = 0.2 * x + rng.normal(size=n)
    got = one(panel_of(x=x, y=y), 3, draws=5)
    offsets = [pearson_by_hand(x[o::3].tolist(), y[o::3].tolist()) for o in range(3)]
    assert got[["non_overlap_mean", "non_overlap_min", "non_overlap_max"]].tolist() == pytest.approx(
        [sum(offsets) / 3, min(offsets), max(offsets)], abs=1e-12
    )
    days = [np.corrcoef(x[d : d + 288], y[d : d + 288])[0, 1] for d in range(0, n, 288)]
    assert got["daily_ic_mean"] == pytest.approx(np.mean(days), abs=1e-12)
    assert got["daily_ic_t"] == pytest.approx(np.mean(days) / (np.std(days, ddof=1) / 5**0.5), rel=1e-9)
    assert got["daily_hit_rate"] == pytest.approx(np.mean(np.array(days) > 0))
    two_days = one(panel_of(x=x[:576], y=y[:576]), draws=5)
    assert two_days[["daily_ic_mean", "daily_ic_t", "daily_hit_rate"]].isna().all()


# ---- invariances


def test_absent_buckets__are_null_rows_and_keep_their_place() -> None:
    x, y = with_nulls(np.random.default_rng(9))
    full = panel_of(x=x, y=y)
    gone = full[np.isfinite(x) & np.isfinite(y)]
    a, b = one(full, 3, draws=50), one(gone, 3, draws=50)
    same = [
        "n",
        "ic",
        "rank_ic",
        "lags",
        "hac_t",
        "rank_hac_t",
        "non_overlap_mean",
        "block",
        "ci_low",
        "ci_high",
    ]
    pd.testing.assert_series_equal(a[same], b[same], check_names=False)


def test_scale_shift_and_mirror() -> None:
    x, y = with_nulls(np.random.default_rng(10))
    base = one(panel_of(x=x, y=y), 3, draws=80)
    scaled = one(panel_of(x=1e-6 * x + 2, y=1e-4 * y - 7), 3, draws=80)
    keys = [
        "ic",
        "rank_ic",
        "hac_se",
        "hac_t",
        "rank_hac_t",
        "ci_low",
        "ci_high",
        "n_eff",
        "mde",
        "non_overlap_min",
    ]
    np.testing.assert_allclose(scaled[keys].astype(float), base[keys].astype(float), rtol=1e-6)
    mirrored = one(panel_of(x=-x, y=y), 3, draws=80)
    for name in ("ic", "rank_ic", "hac_t", "rank_hac_t", "non_overlap_mean", "hac_t_min"):
        assert mirrored[name] == pytest.approx(-base[name], abs=1e-12)
    assert mirrored["ci_low"] == pytest.approx(-base["ci_high"], abs=1e-9)
    assert mirrored["non_overlap_min"] == pytest.approx(-base["non_overlap_max"], abs=1e-12)
    assert mirrored["hac_se"] == pytest.approx(base["hac_se"], rel=1e-9)


def test_signal_order__changes_no_row_and_input_stays() -> None:
    rng = np.random.default_rng(11)
    panel = panel_of(a=rng.normal(size=300), b=rng.normal(size=300), y=rng.normal(size=300))
    before = panel.copy()
    signals, targets = [Signal("a", "a", benchmark="b"), Signal("b", "b")], [Target("y", "y", WIDTH)]
    forth = ic_table(panel, signals, targets, width_us=WIDTH, draws=50)
    back = ic_table(panel, signals[::-1], targets, width_us=WIDTH, draws=50)
    pd.testing.assert_frame_equal(forth, back.iloc[::-1].reset_index(drop=True), rtol=1e-12)
    pd.testing.assert_frame_equal(panel, before)


def test_seed__fixes_the_answer() -> None:
    rng = np.random.default_rng(12)
    panel = panel_of(x=rng.normal(size=300), y=rng.normal(size=300))
    a, b, c = (one(panel, draws=200, seed=s)["ci_low"] for s in (7, 7, 8))
    assert a == b
    assert a != c


# ---- verdicts


def test_verdicts__positive_negative_undecided() -> None:
    rng = np.random.default_rng(13)
    n = 2016
    x, noise = rng.normal(size=(2, n))
    y = 0.3 * x + rng.normal(size=n)
    signals = [Signal("up", "x"), Signal("down", "minus"), Signal("noise", "noise")]
    targets = [Target("next", "y", WIDTH), Target("same", "x3", WIDTH, predictive=False)]
    table = ic_table(
        panel_of(x=x, minus=-x, noise=noise, y=y, x3=x**3), signals, targets, width_us=WIDTH, draws=400
    )
    assert table["verdict"].tolist() == ["positive", "negative", "undecided"] * 2
    assert table["p_fdr"].isna().tolist() == [False] * 3 + [True] * 3
    up = table.iloc[0]
    assert up["ic"] == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-12)
    assert up["ci_low"] < up["ic"] < up["ci_high"]
    assert up["mde"] == pytest.approx(2.8 / n**0.5, rel=0.1)


def test_false_discovery__corrects_over_predictive_rows_of_joined_tables() -> None:
    base = {"thin": False, "ci_low": 0.01, "ci_high": 0.2}
    rows = [{"hac_p": p, "predictive": True, **base} for p in (0.01, 0.04, 0.03, 0.2)]
    rows += [
        {"hac_p": 1e-9, "predictive": False, **base},
        {"hac_p": np.nan, "predictive": True, **base, "thin": True},
    ]
    table = judge(pd.DataFrame(rows))
    # Benjamini-Hochberg by hand: sorted 0.01 0.03 0.04 0.2 times 4/1, 4/2, 4/3, 4/4, then running minima
    assert table["p_fdr"].tolist()[:4] == pytest.approx([0.04, 0.16 / 3, 0.16 / 3, 0.2])
    assert table["p_fdr"].isna().tolist()[4:] == [True, True]
    assert table["verdict"].tolist() == [
        "positive",
        "undecided",
        "undecided",
        "undecided",
        "positive",
        "thin",
    ]
    tiny = pd.DataFrame([{"hac_p": 1e-12, "predictive": True, **base, "thin": True}] * 4)
    joined = judge(pd.concat([table, tiny], ignore_index=True))  # thin rows loosen nothing
    assert joined["p_fdr"].tolist()[:4] == table["p_fdr"].tolist()[:4]
    assert joined["p_fdr"].isna().tolist()[4:] == [True] * 6
    assert joined["verdict"].tolist()[6:] == ["thin"] * 4
    called = [MIXED, *table["verdict"][1:]]
    again = judge(table.assign(verdict=called))
    assert again["verdict"].tolist() == called
    assert again["p_fdr"].tolist() == pytest.approx(table["p_fdr"].tolist(), nan_ok=True)
    disagreeing = judge(table.assign(ci_low=-0.01))
    assert disagreeing["verdict"].tolist() == ["undecided"] * 5 + ["thin"]


def test_paired_difference__finds_a_planted_one_that_two_t_values_would_miss() -> None:
    rng = np.random.default_rng(14)
    n = 2016
    common = rng.normal(size=n)
    a = common + 0.2 * rng.normal(size=n)
    extra = 0.1 * (a - common)
    y = 0.03 * common + 3 * extra + rng.normal(size=n)
    panel = panel_of(a=a, b=common, y=y)
    signals = [Signal("a", "a", benchmark="b"), Signal("b", "b", benchmark="b")]
    row = ic_table(panel, signals, [Target("y", "y", WIDTH)], width_us=WIDTH).iloc[0]
    assert row["diff_low"] > 0
    assert row["diff_p"] < 0.05
    separate = row["diff"] / (2**0.5 * row["hac_se"])
    assert separate < 1.96


@pytest.mark.parametrize(
    ("x", "y"),
    [
        (np.ones(100), np.arange(100.0)),
        (np.arange(100.0), np.full(100, 0.1)),
        (np.full(100, np.nan), np.arange(100.0)),
        (np.arange(2.0), np.arange(2.0)),
        (np.empty(0), np.empty(0)),
        (np.full(100, np.inf), np.arange(100.0)),
    ],
)
def test_degenerate_input__is_null_and_thin(x: np.ndarray, y: np.ndarray) -> None:
    panel = panel_of(x=x, y=y)
    signals = [Signal("x", "x", benchmark="y"), Signal("y", "y")]
    table = ic_table(panel, signals, [Target("y", "y", WIDTH)], width_us=WIDTH, draws=20)
    row = table.iloc[0]
    nulls = [
        "ic",
        "rank_ic",
        "hac_se",
        "hac_t",
        "hac_p",
        "ci_low",
        "ci_high",
        "n_eff",
        "mde",
        "p_fdr",
        "diff",
    ]
    assert row[nulls].isna().all()
    assert row["verdict"] == "thin"


def test_perfect_signal__has_ic_one_without_warnings() -> None:
    x = np.random.default_rng(15).normal(size=200)
    row = one(panel_of(x=x, y=2 * x), draws=20)
    assert row[["ic", "rank_ic", "ci_low", "ci_high"]].tolist() == pytest.approx([1, 1, 1, 1], abs=1e-9)


@pytest.mark.parametrize("n", [3, 4, 5, 8, 29])
def test_few_rows__are_thin(n: int) -> None:
    rng = np.random.default_rng(n)
    row = one(panel_of(x=rng.normal(size=n), y=rng.normal(size=n)), 3, draws=20)
    assert row["verdict"] == "thin"
    assert row["n"] == n
    assert row["lags"] == min(5, n // 4)


def test_errors__name_what_is_wrong() -> None:
    panel = panel_of(x=np.arange(5.0), y=np.arange(5.0))
    x, y = Signal("x", "x"), Target("y", "y", WIDTH)
    with pytest.raises(InputError, match="no column z; it has bucket_ts, x, y"):
        ic_table(panel, [Signal("z", "z")], [y], width_us=WIDTH)
    with pytest.raises(InputError, match="benchmark all is not a signal"):
        ic_table(panel, [Signal("x", "x", benchmark="all")], [y], width_us=WIDTH)
    with pytest.raises(InputError, match="unique"):
        ic_table(panel, [x, x], [y], width_us=WIDTH)
    with pytest.raises(InputError, match=f"row 3 = {START + WIDTH}"):
        ic_table(panel.iloc[[0, 2, 3, 1]], [x], [y], width_us=WIDTH)
    with pytest.raises(InputError, match="row 1 ="):
        ic_table(panel, [x], [y], width_us=2 * WIDTH)
    with pytest.raises(InputError, match="must be positive"):
        ic_table(panel, [x], [Target("y", "y", 0)], width_us=WIDTH)


# ---- size: how often a true null is rejected


def test_size__holds_with_overlap_and_persistence() -> None:
    """30 days of 5 min bars, 3 h target, flow of 5 min, 1 h and 3 h: about 5 % false positives, not 65 %."""
    rng = np.random.default_rng(16)
    n, runs = 30 * 288, 120
    bars = (1, 12, 36)
    rejected = {"hac": np.zeros(3), "rank": np.zeros(3), "bootstrap": np.zeros(3), "iid": np.zeros(3)}
    signals = [Signal(f"x{b}", f"x{b}", b) for b in bars]
    for run in range(runs):
        flow, returns = rng.normal(size=n + 35), rng.normal(size=n + 37)
        panel = panel_of(**{f"x{b}": rolled(flow, n, b) for b in bars}, y=forward(returns, n, 36))
        table = ic_table(panel, signals, [Target("y", "y", 36 * WIDTH)], width_us=WIDTH, draws=100, seed=run)
        rejected["hac"] += table["hac_p"] < 0.05
        rejected["rank"] += table["rank_hac_p"] < 0.05
        rejected["bootstrap"] += (table["ci_low"] > 0) | (table["ci_high"] < 0)
        rejected["iid"] += table["ic"].abs() > 1.96 / n**0.5
    share = {name: counts / runs for name, counts in rejected.items()}
    for name in ("hac", "rank", "bootstrap"):
        assert share[name].max() <= 0.13, share  # 5 % + 4 standard errors of 120 runs
    assert share["iid"][2] > 0.45  # what the lags are for


def test_size__holds_on_white_noise() -> None:
    rng = np.random.default_rng(17)
    n, count = 2016, 150
    panel = panel_of(**{f"x{i}": rng.normal(size=n) for i in range(count)}, y=rng.standard_t(4, size=n))
    signals = [Signal(f"x{i}", f"x{i}") for i in range(count)]
    table = ic_table(panel, signals, [Target("y", "y", WIDTH)], width_us=WIDTH, draws=300)
    assert 0.0 < (table["hac_p"] < 0.05).mean() < 0.12
    assert 0.0 < ((table["ci_low"] > 0) | (table["ci_high"] < 0)).mean() < 0.12
    assert (table["verdict"] == "undecided").all()


# ---- clusters


def buckets_of(rng: np.random.Generator, symbols: tuple[str, ...] = ("A",), n: int = 600) -> pd.DataFrame:
    parts = []
    for symbol in symbols:
        good = rng.normal(size=n)
        target = {"frnb": 0.4 * good + rng.normal(size=n), "conr": rng.normal(size=n)}
        flows = {0: rng.normal(size=n), 1: good}
        flows[-1] = flows[0] + flows[1]
        for cluster, flow in flows.items():
            ofi = {"ofi_size": flow, "ofi_count": np.sign(flow), "ofi_notional": 100 * flow}
            parts.append(panel_of(**ofi, **target).assign(symbol=symbol, cluster=cluster))
    return pd.concat(parts, ignore_index=True)


def test_cluster_ic__is_ic_table_per_symbol_with_one_correction() -> None:
    buckets = buckets_of(np.random.default_rng(18), ("B", "A"))
    targets = [Target("conr", "conr", WIDTH, predictive=False), Target("frnb", "frnb", WIDTH)]
    table = cluster_ic(buckets.sample(frac=1, random_state=1), targets, width_us=WIDTH, draws=50)
    assert len(table) == 2 * 2 * 3 * 3
    assert table.columns.tolist()[:4] == ["symbol", "cluster", "signal", "target"]
    assert (table["benchmark"] == table["signal"]).all()
    row = table[(table["symbol"] == "B") & (table["cluster"] == 1) & (table["target"] == "frnb")].iloc[0]
    mine = buckets[(buckets["symbol"] == "B") & (buckets["cluster"] == 1)]
    everyone = buckets[(buckets["symbol"] == "B") & (buckets["cluster"] == -1)]
    ic = np.corrcoef(mine["ofi_size"], mine["frnb"])[0, 1]
    assert row["signal"] == "ofi_size"
    assert row["ic"] == pytest.approx(ic, abs=1e-12)
    assert row["diff"] == pytest.approx(ic - np.corrcoef(everyone["ofi_size"], mine["frnb"])[0, 1], abs=1e-12)
    assert row["verdict"] == "positive"
    predictive = table[table["predictive"]]
    assert predictive["p_fdr"].tolist() == pytest.approx(judge(predictive)["p_fdr"].tolist())
    assert table.loc[table["cluster"] == -1, "diff"].isna().all()


# ---- mark-outs


def sums_of(
    counts: np.ndarray, sums: np.ndarray, horizon_us: int = 1_000_000, cluster: int = 0
) -> pd.DataFrame:
    frame = pd.DataFrame({"bucket_ts": START + np.arange(len(counts)) * WIDTH, "n": counts, "sum_bps": sums})
    return frame.assign(cluster=cluster, horizon_us=horizon_us)


def test_markout__matches_the_ratio_estimator_by_hand() -> None:
    rng = np.random.default_rng(19)
    counts = rng.poisson(5, size=80)
    counts[[10, 11, 40]] = 0
    sums = 0.3 * counts + rng.normal(size=80) * np.sqrt(counts)
    table = sums_of(counts, sums, 2 * WIDTH)
    got = markout_table(table[table["n"] > 0].sample(frac=1, random_state=2), width_us=WIDTH).iloc[0]
    mean = sum(sums) / sum(counts)
    residual = [s - mean * c for s, c in zip(sums, counts, strict=True)]
    lags = 5
    total = sum(
        (1 - abs(i - j) / (lags + 1)) * residual[i] * residual[j]
        for i in range(80)
        for j in range(80)
        if abs(i - j) <= lags
    )
    used = int((counts > 0).sum())
    se = (total * used / (used - 1)) ** 0.5 / sum(counts)
    assert got[["n", "buckets"]].tolist() == [sum(counts), used]
    assert got["mean_bps"] == pytest.approx(mean, rel=1e-12)
    assert got["se_bps"] == pytest.approx(se, rel=1e-9)
    assert got[["ci_low", "ci_high"]].tolist() == pytest.approx(
        [mean - 1.959964 * se, mean + 1.959964 * se], rel=1e-6
    )
    assert got["t"] == pytest.approx(mean / se, rel=1e-9)


def test_markout__rows_per_cluster_and_horizon_and_thin_ones() -> None:
    many = sums_of(np.full(50, 2), np.arange(50.0), 1_000_000, cluster=1)
    longer = sums_of(np.full(50, 2), np.full(50, 3.0), 30_000_000, cluster=1)
    few = sums_of(np.array([1, 1]), np.array([2.0, 4.0]), cluster=0)
    none = sums_of(np.array([0]), np.array([0.0]), cluster=2)
    table = markout_table(pd.concat([longer, none, many, few]), width_us=WIDTH)
    assert table["cluster"].tolist() == [0, 1, 1, 2]
    assert table["horizon_us"].tolist() == [1_000_000, 1_000_000, 30_000_000, 1_000_000]
    assert table["n"].tolist() == [2, 100, 100, 0]
    assert table["mean_bps"].tolist()[:3] == pytest.approx([3.0, 12.25, 1.5])
    assert np.isnan(table["mean_bps"].iloc[3])
    assert table["se_bps"].isna().tolist() == [True, False, False, True]
    assert table["se_bps"].iloc[2] == 0.0


def test_markout__interval_covers_in_bursts() -> None:
    """Trades of a bucket share its shock: an error that counts trades would cover far less than 95 %."""
    rng = np.random.default_rng(20)
    covered = naive = 0
    for _ in range(200):
        counts = rng.poisson(rng.exponential(20, size=288)) + 1
        shock = rng.normal(size=288)
        sums = counts * shock + rng.normal(size=288) * np.sqrt(counts)
        row = markout_table(sums_of(counts, sums), width_us=WIDTH).iloc[0]
        covered += row["ci_low"] < 0 < row["ci_high"]
        naive += abs(row["mean_bps"]) < 1.96 * (2 / counts.sum()) ** 0.5
    assert covered / 200 > 0.90
    assert naive / 200 < 0.60


@pytest.mark.parametrize("block", [1, 7, 8, 40])
def test_block_resamples__blocks_added_or_counted_are_the_same(
    monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    moments = np.random.default_rng(5).normal(size=(101, 3))
    sums = []
    for long in (1, 1000):
        monkeypatch.setattr(ev, "_LONG_BLOCK", long)
        sums.append(ev.block_resamples(moments, block, 150, 3))
    np.testing.assert_allclose(sums[0], sums[1], rtol=0, atol=1e-11)

"""Quantile portfolios against slow plain loops, and the rules of edges, ties, zeros and nulls."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr

from clusterlob_gpu.evaluation import Signal, Target
from clusterlob_gpu.quantiles import Edges, assign_quantiles, mean_error, past_edges, quantile_tables

WIDTH = 300_000_000
DAY = 86_400_000_000
START = 1_714_521_600_000_000  # 2024-05-01


def grid(n: int, start: int = START) -> np.ndarray:
    return start + np.arange(n) * WIDTH


def quantile_by_hand(values: list[float], level: float) -> float:
    ordered = sorted(values)
    at = level * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


def assigned_by_hand(x: np.ndarray, ts: np.ndarray, edges: Edges) -> list[int]:
    out = []
    for t in range(len(x)):
        midnight = ts[t] // DAY * DAY
        past = [
            x[s]
            for s in range(len(x))
            if ts[s] + WIDTH <= midnight
            and (edges.window_us is None or ts[s] >= midnight - edges.window_us)
            and np.isfinite(x[s])
            and x[s] != 0
        ]
        if not np.isfinite(x[t]) or len(past) < edges.min_rows:
            out.append(-1)
            continue
        cuts = [quantile_by_hand(past, i / edges.count) for i in range(1, edges.count)]
        touched = [
            q
            for q in range(1, edges.count + 1)
            if (q == 1 or cuts[q - 2] <= x[t]) and (q == edges.count or x[t] <= cuts[q - 1])
        ]
        outer = {1, edges.count} & set(touched)
        place = outer.pop() if len(outer) == 1 else touched[(len(touched) - 1) // 2]
        out.append(0 if x[t] == 0 else place)
    return out


def rough(n: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=n).round(1)  # many ties, some of them zeros
    x[rng.random(n) < 0.1] = np.nan
    return x


@pytest.mark.parametrize("edges", [Edges(), Edges(count=5, min_rows=20), Edges(window_us=DAY)])
def test_assignment__matches_plain_loops(edges: Edges) -> None:
    n = 3 * 288
    ts = grid(n, START + 7 * WIDTH)
    x = rough(n, 1)
    got = assign_quantiles(x, ts, WIDTH, edges)
    assert got.tolist() == assigned_by_hand(x, ts, edges)
    assert (got[~np.isfinite(x)] == -1).all()
    assert set(got[x == 0]) == {-1, 0}


def test_ties__take_the_middle_and_zero_moves_no_edge() -> None:
    past = np.repeat([1.0, 2.0, 3.0, 4.0], 72)  # edges of the next day: ties on every quarter
    today = np.array([1.0, 2.0, 3.0, 4.0, 0.5, 5.0, 0.0])
    ts = grid(288 + len(today))
    got = assign_quantiles(np.concatenate([past, today]), ts, WIDTH, Edges(count=4))
    # edges: 1.75, 2.5, 3.25 by linear interpolation
    assert got[288:].tolist() == [1, 2, 3, 4, 1, 4, 0]
    flat = assign_quantiles(np.concatenate([np.ones(288), [1.0, 0.9, 1.1]]), grid(291), WIDTH, Edges(count=4))
    assert flat[288:].tolist() == [2, 1, 4]  # one value touches all four: the lower middle
    _, plain = past_edges(past, ts[:288], WIDTH, Edges(count=4))
    assert np.isnan(plain).all()  # the first day has no past
    _, with_zeros = past_edges(np.concatenate([np.zeros(288), past, [1.0]]), grid(577), WIDTH, Edges(count=4))
    assert with_zeros[2].tolist() == [1.75, 2.5, 3.25]


@pytest.mark.parametrize("share", [0.0, 0.12, 0.25])
def test_ends__that_many_share_fill_the_outer_quantiles_alike(share: float) -> None:
    n = 20 * 288
    rng = np.random.default_rng(5)
    x = rng.uniform(-1, 1, n)
    at = rng.random(n)
    x[at < share], x[at > 1 - share] = -1.0, 1.0
    up, down = (assign_quantiles(sign * x, grid(n), WIDTH, Edges()) for sign in (1, -1))
    ready = up > 0
    inside = ready & (np.abs(x) < 1)
    assert (up[ready & (x == 1)] == 10).all()
    assert (up[ready & (x == -1)] == 1).all()
    np.testing.assert_array_equal(up[inside], 11 - down[inside])
    assert min((up == 1).sum(), (up == 10).sum()) >= 0.08 * ready.sum()


def test_future__changes_no_quantile_before_it() -> None:
    n = 4 * 288
    x = rough(n, 2)
    ts = grid(n)
    for cut in (288, 500, 864, 1000):
        changed = x.copy()
        changed[cut:] = np.random.default_rng(3).normal(size=n - cut) * 50
        before, after = (assign_quantiles(v, ts, WIDTH, Edges())[:cut] for v in (x, changed))
        assert before.tolist() == after.tolist()


def test_mean_error__matches_pairs_of_places() -> None:
    rng = np.random.default_rng(4)
    values, mask = rng.normal(size=60), rng.random(60) < 0.4
    n, lags = mask.sum(), 5
    scores = [(values[t] - values[mask].mean()) if mask[t] else 0.0 for t in range(60)]
    total = sum(
        max(1 - abs(s - t) / (lags + 1), 0) * scores[s] * scores[t] for s in range(60) for t in range(60)
    )
    assert mean_error(values, mask, lags) == pytest.approx((total * n / (n - 1)) ** 0.5 / n, rel=1e-12)
    assert np.isnan(mean_error(values, np.arange(60) == 3, lags))


def tables(
    x: np.ndarray, y: np.ndarray, horizon: int = 3, **options: int
) -> tuple[pd.DataFrame, pd.DataFrame]:
    panel = pd.DataFrame({"bucket_ts": grid(len(x)), "x": x, "y": y})
    return quantile_tables(
        panel, [Signal("x", "x")], [Target("y", "y", horizon * WIDTH)], width_us=WIDTH, **options
    )


def test_tables__match_plain_loops() -> None:
    n = 3 * 288
    x = rough(n, 5)
    rng = np.random.default_rng(6)
    y = 1e-4 * (0.5 * np.nan_to_num(x) + rng.normal(size=n))
    y[rng.random(n) < 0.1] = np.nan
    cells, spreads = tables(x, y, draws=100)
    q = assigned_by_hand(x, grid(n), Edges())
    means = {}
    for quantile in range(11):
        mine = [1e4 * y[t] for t in range(n) if q[t] == quantile and np.isfinite(y[t])]
        row = cells[cells["quantile"] == quantile].iloc[0]
        assert row["n"] == len(mine)
        means[quantile] = sum(mine) / len(mine)
        assert row["mean_bps"] == pytest.approx(means[quantile], abs=1e-12)
        assert row["median_bps"] == pytest.approx(sorted(mine)[len(mine) // 2], abs=0.5)
        assert row["hit_rate"] == pytest.approx(sum(v > 0 for v in mine) / len(mine))
        assert row["ci_high"] - row["mean_bps"] == pytest.approx(1.959964 * row["se_bps"], rel=1e-6)
    got = spreads.iloc[0]
    assert got["spread_bps"] == pytest.approx(means[10] - means[1], abs=1e-12)
    assert got["null"] == np.isnan(x).sum()
    assert got["warmup"] == np.isfinite(x[:288]).sum()
    assert got["zero"] == (x[288:] == 0).sum()
    assert got["monotonicity"] == pytest.approx(
        spearmanr(range(1, 11), [means[k] for k in range(1, 11)]).statistic
    )
    book = [1 if v == 10 else -1 if v == 1 else 0 for v in q]
    first, last = min(t for t in range(n) if q[t] >= 0), max(t for t in range(n) if q[t] >= 0)
    moves = [abs(book[t] - book[t - 1]) for t in range(first + 1, last + 1)]
    assert got["turnover"] == pytest.approx(sum(moves) / len(moves))
    right = [book[t] * y[t] > 0 for t in range(n) if book[t] and np.isfinite(y[t]) and y[t] != 0]
    assert got["hit_rate"] == pytest.approx(sum(right) / len(right))


def test_spread__planted_effect_lies_in_both_intervals() -> None:
    rng = np.random.default_rng(7)
    n = 40 * 288
    x = rng.normal(size=n)
    y = 1e-4 * (x + 5 * rng.normal(size=n))
    cells, spreads = tables(x, y, horizon=1, draws=400)
    row = spreads.iloc[0]
    expected = 2 * 1.755  # mean of the top tenth of a normal
    assert row["ci_low"] < expected < row["ci_high"]
    assert abs(row["spread_bps"] - expected) < 3 * row["se_bps"]
    assert row["se_bps"] == pytest.approx(5 * (2 / (n / 10)) ** 0.5, rel=0.1)
    assert row["ci_high"] - row["ci_low"] == pytest.approx(3.92 * row["se_bps"], rel=0.15)
    assert row["t"] > 10
    assert row["monotonicity"] > 0.95
    assert cells.loc[cells["quantile"] >= 1, "n"].sum() == n - 288


@pytest.mark.parametrize("kind", ["empty", "nulls", "constant", "zeros", "short", "no target"])
def test_degenerate_input__gives_null_statistics(kind: str) -> None:
    n = {"empty": 0, "short": 40}.get(kind, 600)
    x, y = np.random.default_rng(8).normal(size=(2, n))
    x = {"nulls": x * np.nan, "zeros": x * 0, "constant": x * 0 + 2}.get(kind, x)
    y = y * np.nan if kind == "no target" else y
    cells, spreads = tables(x, y, draws=20)
    assert len(cells) == 11
    assert np.isnan(spreads["spread_bps"].iloc[0])
    assert spreads["null"].iloc[0] == np.isnan(x).sum()

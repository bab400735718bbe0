"""The book of sleeves against plain loops and tiny markets whose answer fits in the head."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from clusterlob_gpu.evaluation import Signal
from clusterlob_gpu.portfolio import Book, Costs, backtest_tables, book_statistics, make_book, wishes

WIDTH = 300_000_000
DAY = 86_400_000_000
START = 1_714_521_600_000_000
FREE = Costs(fee_bps=0.0)


def grid(n: int) -> np.ndarray:
    return START + np.arange(n) * WIDTH


def market(n: int, seed: int = 1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Signal, mid and spread with nulls; the mid has an outage of 20 bars."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=n).round(1)
    x[rng.random(n) < 0.1] = np.nan
    mid = 100 * np.exp(np.cumsum(1e-3 * rng.normal(size=n)))
    mid[n // 2 : n // 2 + 20] = np.nan
    spread = 1 + rng.random(n)
    spread[::7] = np.nan
    return x, mid, spread


def book_by_hand(
    wish: list[float], mid: np.ndarray, spread: np.ndarray, sleeves: int, costs: Costs
) -> dict[str, list[float]]:
    """Sleeves held one by one; trades only where there is a mid, closing at the last one."""
    n = len(wish)
    last = max(t for t in range(n) if np.isfinite(mid[t]))
    out: dict[str, list[float]] = {"position": [], "gross": [], "cost": []}
    held, price, half, before = 0.0, None, 0.0, 0.0
    for t in range(n):
        if np.isfinite(spread[t]):
            half = spread[t] / 2
        if out["position"]:
            now = mid[t] if np.isfinite(mid[t]) else price
            out["gross"].append(held * (now / price - 1) if price and now else 0.0)
            price = now
        elif np.isfinite(mid[t]):
            price = mid[t]
        if np.isfinite(mid[t]):
            held = 0.0 if t >= last else sum(wish[max(0, t - sleeves + 1) : t + 1]) / sleeves
        out["position"].append(held)
        out["cost"].append(abs(held - before) * (costs.fee_bps + costs.slippage_bps + half) / 1e4)
        before = held
    out["gross"].append(0.0)
    return out


@pytest.mark.parametrize("sleeves", [1, 12, 36])
def test_book__matches_sleeves_held_one_by_one(sleeves: int) -> None:
    x, mid, spread = market(300)
    costs = Costs(fee_bps=4.0, slippage_bps=1.5)
    wish = wishes(x, grid(300), WIDTH, "sign")
    got = make_book(wish, mid, spread, grid(300), WIDTH, sleeves, costs)
    expected = book_by_hand(wish.tolist(), mid, spread, sleeves, costs)
    np.testing.assert_allclose(got.position, expected["position"], atol=1e-12)
    np.testing.assert_allclose(got.gross, expected["gross"], atol=1e-15)
    np.testing.assert_allclose(got.gross - got.net, expected["cost"], atol=1e-15)
    assert (got.ts == grid(300) + WIDTH).all()
    assert got.position[-1] == 0.0


def test_book__of_three_bars_by_hand() -> None:
    mid, spread = np.array([100.0, 101.0, 100.0, 102.0]), np.array([2.0, 2.0, 4.0, 4.0])
    book = make_book(np.array([1.0, 1.0, -1.0, 1.0]), mid, spread, grid(4), WIDTH, 2, Costs(3.0, 1.0))
    assert book.position.tolist() == [0.5, 1.0, 0.0, 0.0]
    np.testing.assert_allclose(book.gross, [0.5 * 0.01, -1 / 101, 0.0, 0.0])
    np.testing.assert_allclose(book.traded, [0.5, 0.5, 1.0, 0.0])
    np.testing.assert_allclose(book.fee, [1.5e-4, 1.5e-4, 3e-4, 0.0])
    np.testing.assert_allclose(book.spread, [0.5e-4, 0.5e-4, 2e-4, 0.0])
    np.testing.assert_allclose(book.slippage, [0.5e-4, 0.5e-4, 1e-4, 0.0])


def test_wishes__sign_and_scale_from_the_past() -> None:
    n = 3 * 288
    x, _, _ = market(n, 2)
    ts = grid(n)
    sign, scaled = (wishes(x, ts, WIDTH, rule) for rule in ("sign", "scaled"))
    for t in range(0, n, 37):
        if not np.isfinite(x[t]):
            assert sign[t] == scaled[t] == 0.0
            continue
        assert sign[t] == int(x[t] > 0) - int(x[t] < 0)
        past = [v for v in x[: t // 288 * 288] if np.isfinite(v)]
        if len(past) < 50:
            assert scaled[t] == 0.0
        else:
            scale = 2 * (sum(v * v for v in past) / len(past)) ** 0.5
            assert scaled[t] == pytest.approx(min(max(x[t] / scale, -1), 1), rel=1e-12)


@pytest.mark.parametrize("rule", ["sign", "scaled"])
def test_future__changes_no_position_before_it(rule: str) -> None:
    n = 3 * 288
    x, mid, spread = market(n, 3)
    ts = grid(n)

    def positions(x: np.ndarray, mid: np.ndarray, spread: np.ndarray) -> Book:
        return make_book(wishes(x, ts, WIDTH, rule), mid, spread, ts, WIDTH, 36, Costs())

    base = positions(x, mid, spread)
    for cut in (100, 400, 700):
        rng = np.random.default_rng(cut)
        altered = [v.copy() for v in (x, mid, spread)]
        for values, fresh in zip(altered, (9.0, 1.0, 5.0), strict=True):
            values[cut:] = fresh * (1 + rng.random(n - cut))
        got = positions(*altered)
        assert (got.position[:cut] == base.position[:cut]).all()
        assert (got.net[: cut - 1] == base.net[: cut - 1]).all()


def test_outage__keeps_the_position_and_books_the_jump_once() -> None:
    mid = np.array([100.0, np.nan, np.nan, 110.0, 110.0])
    book = make_book(np.array([1.0, -1.0, -1.0, 1.0, 1.0]), mid, np.full(5, 2.0), grid(5), WIDTH, 1, FREE)
    assert book.position.tolist() == [1.0, 1.0, 1.0, 1.0, 0.0]
    np.testing.assert_allclose(book.gross, [0.0, 0.0, 0.1, 0.0, 0.0])
    assert book.traded.tolist() == [1.0, 0.0, 0.0, 0.0, 1.0]


def flat_book(gross: np.ndarray, traded: np.ndarray, cost: np.ndarray) -> Book:
    nothing = np.zeros(len(gross))
    return Book(grid(len(gross)), np.ones(len(gross)), traded, gross, cost, nothing, nothing)


def test_statistics__match_their_definitions() -> None:
    rng = np.random.default_rng(5)
    n = 576
    gross = 1e-4 * rng.normal(0.1, 1, size=n)
    traded = np.full(n, 0.02)
    got = book_statistics(flat_book(gross, traded, traded * 5e-4), WIDTH, 6)
    net = [g - 1e-5 for g in gross]
    per_year = 365 * 288
    mean, std = np.mean(net), np.std(net, ddof=1)
    assert got["bars"] == n
    assert got["days"] == 2.0
    assert got["net"] == pytest.approx(sum(net))
    assert got["net_bps_per_day"] == pytest.approx(1e4 * sum(net) / 2)
    assert got["sharpe_net"] == pytest.approx(mean / std * per_year**0.5)
    scores = [v - mean for v in net]
    total = sum(
        (1 - abs(s - t) / 12) * scores[s] * scores[t] for s in range(n) for t in range(n) if abs(s - t) <= 11
    )
    t_value = mean / ((total * n / (n - 1)) ** 0.5 / n)
    assert got["net_t"] == pytest.approx(t_value)
    assert got["sharpe_lo_net"] == pytest.approx(t_value * (per_year / n) ** 0.5)
    downside = np.mean([min(v, 0) ** 2 for v in net]) ** 0.5
    assert got["sortino"] == pytest.approx(mean / downside * per_year**0.5)
    wealth, top, fall = 0.0, 0.0, 0.0
    for v in net:
        wealth += v
        top = max(top, wealth)
        fall = max(fall, top - wealth)
    assert got["max_drawdown"] == pytest.approx(fall)
    assert got["calmar"] == pytest.approx(sum(net) / 2 * 365 / fall)
    assert got["hit_rate"] == pytest.approx(np.mean(gross > 0))
    assert got["day_hit_rate"] == np.mean([sum(net[:288]) > 0, sum(net[288:]) > 0])
    assert got["turnover"] == pytest.approx(0.02 * n / 2)
    assert got["breakeven_fee_bps"] == pytest.approx(1e4 * gross.sum() / (0.02 * n))


def panel(n: int, seed: int = 1) -> pd.DataFrame:
    x, mid, spread = market(n, seed)
    return pd.DataFrame({"bucket_ts": grid(n), "x": x, "mid": mid, "spread_bps": spread})


def run(panel: pd.DataFrame, costs: Costs = FREE) -> tuple[pd.DataFrame, pd.DataFrame]:
    return backtest_tables(panel, [Signal("x", "x")], [3 * WIDTH, 36 * WIDTH], width_us=WIDTH, costs=costs)


def test_breakeven_fee__makes_net_zero() -> None:
    base, _ = run(panel(600), Costs(5.0, 0.5))
    assert base[["horizon_us", "sleeves", "rule"]].to_numpy().tolist() == [
        [3 * WIDTH, 3, "sign"],
        [3 * WIDTH, 3, "scaled"],
        [36 * WIDTH, 36, "sign"],
        [36 * WIDTH, 36, "scaled"],
    ]
    for i in (0, 2):
        again, _ = run(panel(600), Costs(float(base["breakeven_fee_bps"].iloc[i]), 0.5))
        assert again["net"].iloc[i] == pytest.approx(0.0, abs=1e-12)
        assert again["gross"].iloc[i] == base["gross"].iloc[i]


def test_path__adds_up_to_the_table() -> None:
    table, path = run(panel(600), Costs(5.0, 0.5))
    sums = path.groupby(["horizon_us", "rule"])[["gross", "net", "traded"]].sum()
    for _, row in table.iterrows():
        got = sums.loc[(row["horizon_us"], row["rule"])]
        assert got["gross"] == pytest.approx(row["gross"], abs=1e-12)
        assert got["net"] == pytest.approx(row["net"], abs=1e-12)
        assert got["traded"] == pytest.approx(row["turnover"] * row["days"], rel=1e-12)
    assert (path["ts"] % 3_600_000_000 == 0).all()


def test_foresight__earns_and_its_mirror_loses() -> None:
    rng = np.random.default_rng(6)
    returns = 1e-3 * rng.normal(size=601)
    mid = 100 * np.cumprod(1 + returns)
    table = pd.DataFrame({"bucket_ts": grid(600), "x": np.sign(returns[1:]), "mid": mid[:600]})
    good, _ = backtest_tables(table, [Signal("x", "x")], [WIDTH], width_us=WIDTH, costs=FREE)
    bad, _ = backtest_tables(
        table.assign(x=-table["x"]), [Signal("x", "x")], [WIDTH], width_us=WIDTH, costs=FREE
    )
    assert good["gross"].iloc[0] == pytest.approx(np.abs(returns[1:600]).sum(), rel=1e-9)
    assert bad["gross"].iloc[0] == pytest.approx(-good["gross"].iloc[0], rel=1e-12)
    assert not good["spread_known"].iloc[0]
    assert good["hit_rate"].iloc[0] == 1.0


@pytest.mark.parametrize("kind", ["empty", "no signal", "no mid", "one bar", "zero signal"])
def test_degenerate_input__never_trades(kind: str) -> None:
    table = panel({"empty": 0, "one bar": 1}.get(kind, 100))
    column = {"no signal": "x", "no mid": "mid", "zero signal": "x"}.get(kind)
    if column:
        table[column] = 0.0 if kind == "zero signal" else np.nan
    got, path = run(table)
    assert got["bars"].tolist() == [0] * 4
    assert got["net"].isna().all()
    assert path["traded"].sum() == 0

"""The slow reference against answers that were worked out by hand, and the lakes it reads."""

from __future__ import annotations

import math
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import lakes
import pytest
import reference as ref
from hypothesis import HealthCheck, given, settings
from lakes import BUY, EXCHANGE, MINUTE, SECOND, SELL, SYMBOL, BookIn, Market, PeriodIn, TradeIn, at

CONFIG: dict[str, Any] = {
    "book": "book_snapshot_25",
    "depth": 2,
    "window": 2,
    "same_side": "own",
    "spread": "ticks",
    "asof": "strict",
    "max_staleness": MINUTE,
    "bucket": 5 * MINUTE,
    "horizons": [10 * MINUTE],
}
T = at(0, 12 * lakes.HOUR)


def compute(lake: Path, **changes: Any) -> tuple[list[ref.Row], ref.BookHistory]:
    config = CONFIG | changes
    history = ref.BookHistory(ref.read_book(lake, EXCHANGE, SYMBOL, config["book"], config["depth"]))
    return ref.features(ref.read_trades(lake, EXCHANGE, SYMBOL), history, config), history


TWO_ROWS = [
    BookIn(T, [(1000, 3000), (999, 2000), (998, 9)], [(1002, 1000)]),
    BookIn(T + 10, [(1001, 3000), (None, None), (998, 9)], [(1002, 1000), (1005, 500)]),
]


def test_features__by_hand(tmp_path: Path) -> None:
    """Bid 100.1 x 3, then a missing level; ask 100.2 x 1 and 100.5 x 0.5; the buy takes 0.4."""
    lake = Market([TradeIn(T + 15, BUY, 1002, 400), TradeIn(T + 15, SELL, 1001, 800)], TWO_ROWS).write(
        tmp_path
    )
    (buy, sell), _ = compute(lake)
    assert buy.raw == {
        "v_rel": 0.1,
        "sbs": math.log(4),
        "obs": pytest.approx(math.log(2.5), rel=1e-15),
        "spread": 1.0,
        "t_m": 5,
        "t_age": None,
    }
    assert sell.raw is not None
    assert [sell.raw[name] for name in ref.FEATURES] == [0.2, buy.raw["obs"], buy.raw["sbs"], 1.0, 5, 5]
    assert [buy.drop, sell.drop] == ["warmup", "null_change_time"]


def test_features__same_side_consumed_swaps_the_two_depths(tmp_path: Path) -> None:
    lake = Market([TradeIn(T + 15, BUY, 1002, 400)], TWO_ROWS).write(tmp_path)
    (own,), _ = compute(lake)
    (consumed,), _ = compute(lake, same_side="consumed")
    assert own.raw is not None
    assert consumed.raw is not None
    assert (own.raw["sbs"], own.raw["obs"]) == (consumed.raw["obs"], consumed.raw["sbs"])


def test_features__spread_in_bps(tmp_path: Path) -> None:
    """Bid 99.95, ask 100.05: 0.1 on 100 is 10 bps, and 2 ticks of 0.05."""
    book = [BookIn(T, [(9995, 1)], [(10005, 1)])]
    periods = [PeriodIn(price_increment=0.01, tick_size=0.05)]
    lake = Market([TradeIn(T + 1, BUY, 10005, 1)], book, periods).write(tmp_path)
    assert [compute(lake, spread=unit)[0][0].raw["spread"] for unit in ("bps", "ticks")] == [10.0, 2.0]


def test_features__quotes_have_one_level(tmp_path: Path) -> None:
    lake = Market([TradeIn(T + 5, BUY, 1002, 400)], TWO_ROWS).write(tmp_path)
    (row,), _ = compute(lake, book="quotes", depth=5)
    assert row.raw is not None
    assert (row.raw["sbs"], row.raw["obs"]) == (math.log(4), math.log(2))


def test_asof__strict_does_not_see_its_own_moment(tmp_path: Path) -> None:
    lake = Market([TradeIn(T + 10, BUY, 1002, 400)], TWO_ROWS).write(tmp_path)
    assert compute(lake)[0][0].raw["spread"] == 2.0
    (seen,), _ = compute(lake, asof="inclusive")
    assert (seen.raw["spread"], seen.raw["t_m"]) == (1.0, 0)


def test_staleness__the_limit_itself_still_counts(tmp_path: Path) -> None:
    trades = [TradeIn(ts, BUY, 1001, 1) for ts in (T, T + MINUTE, T + MINUTE + 1)]
    rows, history = compute(Market(trades, [lakes.book(T)]).write(tmp_path))
    assert [row.drop for row in rows] == ["no_book", "warmup", "stale_book"]
    assert [history.mid(t, MINUTE) for t in (T, T + MINUTE, T + MINUTE + 1)] == [
        None,
        Fraction("100.05"),
        None,
    ]


def test_drops__first_reason_wins(tmp_path: Path) -> None:
    """Only the fourth trade has two eligible ones with change times behind it."""
    books = [lakes.book(T + 1), lakes.book(T + 3, 1001, 1003), lakes.book(T + 7, 1002, 1004)]
    trades = [TradeIn(T + i, (BUY, lakes.UNKNOWN)[i in (0, 6)], 1001, 1 + i) for i in (0, 1, 2, 4, 5, 6, 8)]
    rows, _ = compute(Market(trades, books).write(tmp_path))
    reasons = ["side_unknown", "no_book", "warmup", "null_change_time", None, "side_unknown", None]
    assert [row.drop for row in rows] == reasons
    assert ref.drop_counts(rows) == Counter(reasons) - Counter([None, None])


def test_zscore__by_hand() -> None:
    assert ref.zscore([1, 2, 3]) == 1.0
    assert ref.zscore([1.0, 1.0, 1.0, 4.0]) == 1.5
    assert ref.zscore([3, 3]) == 0.0
    assert ref.zscore([1e9, 1e9 + 1, 1e9 + 2]) == 1.0


def test_features__window_is_of_eligible_trades_only(tmp_path: Path) -> None:
    """Sizes 5, (unknown side) 50, 6 and 7 lots: z over the last three known ones is 1."""
    books = [lakes.book(T, 1000, 1002), lakes.book(T + 1, 1001, 1003)]
    sides_and_sizes = [(BUY, 5), (lakes.UNKNOWN, 50), (SELL, 6), (BUY, 7)]
    trades = [TradeIn(T + 2 + i, side, 1002, qty) for i, (side, qty) in enumerate(sides_and_sizes)]
    rows, _ = compute(Market(trades, books).write(tmp_path), window=3)
    assert [row.drop for row in rows] == ["warmup", "side_unknown", "warmup", None]
    assert rows[3].z == {"v_rel": pytest.approx(1.0), "sbs": 0.0, "obs": 0.0, "spread": 0.0} | {
        name: ref.zscore([1, 3, 4]) for name in ("t_m", "t_age")
    }


@pytest.mark.parametrize(
    ("levels", "fault"),
    [
        ((None, 10, 1, 1), "empty_side"),
        ((9, None, 1, 1), "empty_side"),
        ((9, 10, 0, 1), "non_positive"),
        ((-1, 10, 1, 1), "non_positive"),
        ((10, 10, 1, 1), "crossed"),
        ((11, 10, 1, 1), "crossed"),
        ((9, 10, 1, 1), None),
    ],
)
def test_book_fault__by_hand(levels: tuple[int | None, ...], fault: str | None) -> None:
    assert ref.book_fault(*levels) == fault


@pytest.mark.parametrize("table", ["book_snapshot_25", "quotes"])
def test_fault_counts__broken_books(tmp_path: Path, table: str) -> None:
    """600 valid rows, each with three empty, three non-positive and two crossed ones after it."""
    book = ref.read_book(lakes.broken_books().write(tmp_path), EXCHANGE, SYMBOL, table)
    assert ref.fault_counts(book) == {"empty_side": 1800, "non_positive": 1800, "crossed": 1200}
    assert len(book) == 5400


def test_faulty_rows__change_nothing(tmp_path: Path) -> None:
    plain, _ = compute(lakes.plain().write(tmp_path / "plain"))
    broken, _ = compute(lakes.broken_books().write(tmp_path / "broken"))
    assert broken == plain


def test_change_times__a_move_of_both_sides_that_keeps_the_mid(tmp_path: Path) -> None:
    """Bid + 1 and ask - 1: the mid stands still, both best prices are new."""
    books = [lakes.book(T, 1000, 1004), lakes.book(T + 10, 1001, 1003), lakes.book(T + 20, 1001, 1003)]
    trades = [TradeIn(T + 25, side, 1002, 1) for side in (BUY, SELL)]
    rows, _ = compute(Market(trades, books).write(tmp_path))
    assert [(row.raw["t_m"], row.raw["t_age"]) for row in rows] == [(None, 15), (None, 15)]


@pytest.mark.parametrize("new_id", [False, True])
def test_finer_ticks__prices_go_on(tmp_path: Path, new_id: bool) -> None:
    """Only the spread may differ from the market without the change, and it is ten times as wide."""
    plain, _ = compute(lakes.plain().write(tmp_path / "plain"))
    finer, _ = compute(lakes.finer_ticks(new_id).write(tmp_path / "finer"))
    assert [row.trade for row in finer] == [row.trade for row in plain]
    turn = T + 300 * SECOND
    for before, after in zip(plain, finer, strict=True):
        wider = 10 if after.trade.ts > turn else 1
        assert (
            after.raw == before.raw | {"spread": before.raw["spread"] * wider}
            if before.raw
            else not after.raw
        )


def test_midnight__is_no_border_between_present_days(tmp_path: Path) -> None:
    """Warm-up and missing change times occur at the start of the lake and nowhere else."""
    rows, history = compute(lakes.over_midnight().write(tmp_path), window=5)
    first = [row.drop for row in rows if row.drop not in (None, "stale_book")]
    assert first == ["no_book", "warmup", "warmup", "warmup", "warmup", "null_change_time"]
    after = [row.drop for row in rows if row.trade.ts >= at(1)][:5]
    assert after == [None] * 5
    assert history.mid(at(1), MINUTE) is not None


def test_midnight__missing_trades_restart_the_window(tmp_path: Path) -> None:
    rows, _ = compute(lakes.over_midnight(missing_trades=[1]).write(tmp_path), window=5)
    dropped = [(row.trade.ts // lakes.DAY - at(0) // lakes.DAY, row.drop) for row in rows if row.drop]
    at_the_start = {(0, "no_book"): 1, (0, "warmup"): 4, (0, "null_change_time"): 1}
    assert Counter(dropped) == at_the_start | {(0, "stale_book"): 1, (2, "warmup"): 4, (2, "stale_book"): 1}


def test_midnight__missing_books_restart_the_book(tmp_path: Path) -> None:
    """Day 1 has no book: its first minute still sees day 0, day 2 starts from nothing."""
    rows, history = compute(lakes.over_midnight(missing_books=[1]).write(tmp_path), window=2)
    seen = [row for row in rows if at(1) <= row.trade.ts < at(2) and row.drop is None]
    assert [seen[0].trade.ts, seen[-1].trade.ts] == [at(1) + SECOND // 2, at(1) + 56 * SECOND + SECOND // 2]
    restart = [row.drop for row in rows if row.trade.ts >= at(2)][:4]
    assert restart == ["no_book", "null_change_time", "null_change_time", None]
    assert history.mid(at(1), MINUTE) is not None
    assert [history.mid(t, MINUTE) for t in (at(1) + 1, at(2), at(2) + SECOND)] == [None] * 3


def test_chains__pass_over_a_day_without_eligible_trades() -> None:
    assert ref.chain_start(5, {1, 3, 4, 5}) == 3
    assert ref.chain_start(5, {1, 3}) == 5
    assert ref.chain_start(4, {1, 3}) == 3


def test_buckets__by_hand(tmp_path: Path) -> None:
    """Buy 2 lots at 100.2 and sell 3 at 100.1 in one bucket, sell 1 in the next, into two clusters."""
    trades = [
        TradeIn(T + 1, BUY, 1002, 2),
        TradeIn(T + 2, SELL, 1001, 3),
        TradeIn(T + 5 * MINUTE, SELL, 1000, 1),
    ]
    rows = [ref.Row(trade) for trade in ref.read_trades(Market(trades, []).write(tmp_path), EXCHANGE, SYMBOL)]
    starts = ref.bucket_starts(lakes.DAYS[0], lakes.DAYS[0], 5 * MINUTE)
    sums = ref.bucket_sums(rows, [0, 1, 1], 2, starts)
    assert len(sums) == 288 * 3
    assert sums[T, 0] == (Fraction("0.002"), 1, Fraction("0.2004"))
    assert sums[T, 1] == (Fraction("-0.003"), -1, Fraction("-0.3003"))
    assert sums[T, -1] == (Fraction("-0.001"), 0, Fraction("-0.0999"))
    assert sums[T + 5 * MINUTE, -1] == (Fraction("-0.001"), -1, Fraction("-0.1"))
    assert sums[T + 10 * MINUTE, 1] == (0, 0, 0)


def test_returns__by_hand(tmp_path: Path) -> None:
    """Mids of 100, 101, 103 from 23:50 on, five minutes apart, and 104 after midnight."""
    start = at(0, lakes.DAY - 10 * MINUTE)
    mids = [1000, 1010, 1030, 1040]
    books = [lakes.book(start + i * 5 * MINUTE - SECOND, mid - 1, mid + 1) for i, mid in enumerate(mids)]
    _, history = compute(Market([], books).write(tmp_path))
    got = ref.bucket_returns(history, start, CONFIG)
    assert got == pytest.approx(
        {
            "conr": math.log(1.01),
            "frnb": math.log(103 / 101),
            "freb": math.log(103 / 101),
            str(10 * MINUTE): math.log(104 / 101),
        }
    )
    last = ref.bucket_returns(history, start + 5 * MINUTE, CONFIG)
    assert (last["conr"], last["freb"]) == (pytest.approx(math.log(103 / 101)), 0.0)
    assert ref.bucket_returns(history, start - 5 * MINUTE, CONFIG)["conr"] is None


def test_markout__is_signed(tmp_path: Path) -> None:
    """The mid rises from 100 to 101 within a second: +100 bps for the buyer."""
    books = [lakes.book(T, 999, 1001), lakes.book(T + SECOND // 2, 1009, 1011)]
    trades = [TradeIn(T + 1, side, 1000, 1) for side in (BUY, SELL)]
    rows, history = compute(Market(trades, books).write(tmp_path))
    got = [ref.markout_bps(row.trade, history, SECOND, MINUTE) for row in rows]
    assert got == [100.0, -100.0]


def test_nearest__first_one_at_a_tie() -> None:
    centroids = [[1.0, 0.0], [-1.0, 0.0], [0.0, 3.0]]
    assert [ref.nearest(z, centroids) for z in ([0.0, 0.0], [-0.1, 0.0], [0.0, 2.0])] == [0, 1, 2]


def test_correlations__by_hand() -> None:
    """Pairs with a gap go; ranks are (1, 2.5, 2.5, 4) against (1, 2, 3, 4)."""
    assert ref.ic([1, 2, 3, None], [2, 4, 6, 0]) == pytest.approx(1.0)
    assert ref.ic([1, 2, 3], [1, 3, 2]) == pytest.approx(0.5)
    assert ref.ranks([1, 5, 5, 9]) == [1, 2.5, 2.5, 4]
    assert ref.rank_ic([1, 5, 5, 9, 7], [1, 2, 3, 99, None]) == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    assert ref.ic([1, 1], [1, 2]) is None


@pytest.mark.parametrize("name", lakes.NAMED)
def test_lakes__files_and_their_order_do_not_matter(tmp_path: Path, name: str) -> None:
    market = lakes.NAMED[name]()
    one, _ = compute(market.write(tmp_path / "one"))
    many, _ = compute(market.write(tmp_path / "many", parts=3, shuffle=5))
    assert many == one
    assert len(one) == len(market.trades)


def test_constant_market__scores_are_zero(tmp_path: Path) -> None:
    rows, _ = compute(lakes.constant().write(tmp_path), window=10)
    scores = [row.z for row in ref.kept(rows)]
    assert len(scores) == 600 - 9 - 1
    assert {z[name] for z in scores for name in ("v_rel", "sbs", "obs", "spread")} == {0.0}


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(lakes.markets(), lakes.CONFIGS)
def test_random_markets__reference_does_not_look_ahead(
    tmp_path_factory: pytest.TempPathFactory, market: Market, config: dict[str, Any]
) -> None:
    """Whatever happens from the middle of the trades on, the rows before stay as they were."""
    lake = tmp_path_factory.mktemp("lake")
    rows, _ = compute(market.write(lake / "whole", parts=2, shuffle=1), **config)
    cut = market.trades[len(market.trades) // 2].ts
    past, _ = compute(market.before(cut).write(lake / "past"), **config)
    assert [row for row in rows if row.trade.ts < cut] == past

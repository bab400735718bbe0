"""Tasks of one day by themselves: the tail of a day, from a part of its book or all of it."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import lakes
import numpy as np
import pyarrow.parquet as pq
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from clusterlob_gpu import context, days
from clusterlob_gpu.backend import CPU
from clusterlob_gpu.config import ClusterConfig
from clusterlob_gpu.days import DayJob
from clusterlob_gpu.files import Location
from clusterlob_gpu.lake.layout import day_of_us
from clusterlob_gpu.lake.native import open_symbol

NOON = lakes.at(0, 12 * lakes.HOUR)
WINDOW = 4


def tail(root: Path, **sizes: int) -> tuple[np.ndarray, int]:
    """Raw features of the last trades of the first day, and how many book rows their context had."""
    job = DayJob(
        open_symbol(root / "lake", lakes.EXCHANGE, lakes.SYMBOL),
        Location.of(root / f"store{sizes}"),
        ClusterConfig(window=WINDOW, max_staleness="30d"),
        day_of_us(NOON),
    )
    rows: list[int] = []

    def counted(table: Any, *rest: Any) -> Any:
        rows.append(len(table["ts"]))
        return make_context(table, *rest)

    make_context = context.make_context
    with patch.multiple(days, **sizes), patch.object(context, "make_context", counted):
        book = days.reduce_book(job)
        return days.own_tail((job, book, None)).raw, rows[-1]


def write(root: Path, market: lakes.Market) -> None:
    """The market, its trades in row groups of two."""
    for path in (market.write(root / "lake") / "trades").rglob("*.parquet"):
        pq.write_table(pq.read_table(path), path, row_group_size=2)


@settings(max_examples=20, deadline=None)
@given(steps=st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=30, max_size=60))
def test_own_tail__from_the_last_rows_as_from_all(steps: list[tuple[int, int]]) -> None:
    """Books that move seldom or often: a row group in which nothing changes does not do."""
    times = range(NOON, NOON + len(steps) * lakes.SECOND, lakes.SECOND)
    bids, asks = (np.cumsum([step[side] for step in steps]) for side in (0, 1))
    books = [lakes.book(ts, int(1000 + b), int(2000 + a)) for ts, b, a in zip(times, bids, asks, strict=True)]
    market = lakes.Market(lakes.trades_every(NOON + 1, times[-1], lakes.SECOND), books)
    with TemporaryDirectory() as folder:
        write(Path(folder), market)
        (late, some), (whole, every) = (
            tail(Path(folder), _TAIL_ROWS=1, _BOOK_GROUP_ROWS=rows) for rows in (3, 1000)
        )
        np.testing.assert_array_equal(late, whole)
        assert late.shape == (6, WINDOW - 1)
        assert some <= every == len(books)


def test_own_tail__reads_few_rows(tmp_path: Path) -> None:
    write(
        tmp_path,
        lakes.Market(
            lakes.trades_every(NOON + 1, NOON + 99 * lakes.SECOND, lakes.SECOND),
            lakes.flips(NOON, NOON + 100 * lakes.SECOND, lakes.SECOND),
        ),
    )
    assert tail(tmp_path, _TAIL_ROWS=1, _BOOK_GROUP_ROWS=10)[1] <= 30


@settings(max_examples=15, deadline=None)
@given(market=lakes.markets(max_days=1, gaps=False), rows=st.integers(1, 30))
def test_make_features__in_stretches_as_at_once(market: lakes.Market, rows: int) -> None:
    """However many trades are read at a time: scores, counts and drops."""
    with TemporaryDirectory() as folder:
        root = Path(folder)
        write(root, market)
        symbol = open_symbol(root / "lake", lakes.EXCHANGE, lakes.SYMBOL)
        day = day_of_us(market.trades[0].ts) if market.trades else day_of_us(NOON)
        assume(symbol.has("trades", day) and symbol.has("book_snapshot_25", day))
        found = []
        for number, read in enumerate((rows, None)):
            config = ClusterConfig(window=WINDOW)
            job = DayJob(symbol, Location.of(root / f"store{number}"), config, day)
            with patch.object(CPU, "rows_read", read):
                task = job, days.reduce_book(job), days.State(None, np.empty((6, 0)))
                made = days.make_features(task)
            found.append((made.trades, made.kept, made.dropped, days.day_scores(task, made)))
        assert found[0][:3] == found[1][:3]
        assert sum(made.dropped.values()) + made.kept == made.trades
        np.testing.assert_array_equal(found[0][3], found[1][3])


def test_make_context__changes_are_those_of_its_columns() -> None:
    rows = {name: np.arange(1, 4) for name in context.ROW_COLUMNS}
    rows |= {"ask": np.full(3, 9), "tick": np.ones(3)}
    around = context.make_context(rows, None, 1, "ticks")  # type: ignore[arg-type]
    assert [changes.tolist() for changes in around.changes] == [
        around.mid_change.tolist(),
        around.bid_change.tolist(),
        around.ask_change.tolist(),
    ]

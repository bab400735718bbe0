"""Reading the lake: files and symbols in any order, columns of any make, every fault named; lake check."""

from __future__ import annotations

import errno
import hashlib
import io
import pickle
import random
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import date
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import lakes
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lakes import (
    BUY,
    DECOY,
    DECOY_ID,
    EXCHANGE,
    NEXT_ID,
    SECOND,
    SELL,
    SYMBOL,
    BookIn,
    Market,
    PeriodIn,
    TradeIn,
    at,
    write_lake,
)

from clusterlob_gpu import quality
from clusterlob_gpu.errors import LakeError
from clusterlob_gpu.files import Location
from clusterlob_gpu.kernels import NO_LEVEL
from clusterlob_gpu.lake.native import SymbolLake, open_symbol
from clusterlob_gpu.lake.symbols import decimal_unit, decode, exchange_id, symbol_id
from clusterlob_gpu.schema import SIDE_UNKNOWN, BookRows, Trades

TODAY = date.fromisoformat(lakes.DAYS[0])
TOMORROW = date.fromisoformat(lakes.DAYS[1])
NOON = at(0, 12 * lakes.HOUR)
BOOK = "book_snapshot_25"


def opened(lake: Path, name: str = SYMBOL) -> SymbolLake:
    return open_symbol(lake, EXCHANGE, name)


def folder(lake: Path, table: str, day: date = TODAY) -> Path:
    return lake / table / f"exchange={EXCHANGE}" / f"date={day}"


def only_file(lake: Path, table: str) -> Path:
    (path,) = folder(lake, table).glob("*.parquet")
    return path


def rewrite(lake: Path, table: str, change: Callable[[pa.Table], pa.Table], **how: Any) -> Path:
    path = only_file(lake, table)
    pq.write_table(change(pq.ParquetFile(path).read()), path, **how)
    return path


def assert_same(got: Trades | BookRows, want: Trades | BookRows) -> None:
    for name, values in vars(want).items():
        np.testing.assert_array_equal(getattr(got, name), values, err_msg=name)


def rows_of(trades: Trades) -> list[tuple[int, int, int, int]]:
    return list(zip(*(column.tolist() for column in vars(trades).values()), strict=True))


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    return lakes.plain().write(tmp_path / "lake")


# ---- what comes out ---------------------------------------------------------------------------------


def test_read_trades__by_hand(tmp_path: Path) -> None:
    trades = [TradeIn(NOON, BUY, 1001, 3), TradeIn(NOON, 2, 1000, 5), TradeIn(NOON + 7, SELL, 999, 1)]
    got = opened(write_lake(tmp_path, trades=trades)).read_trades(TODAY)
    assert rows_of(got) == [(NOON, 0, 1001, 3), (NOON, 2, 1000, 5), (NOON + 7, 1, 999, 1)]
    assert [column.dtype for column in vars(got).values()] == [np.int64, np.uint8, np.int64, np.int64]


def test_read_book__by_hand(tmp_path: Path) -> None:
    """Depth counts the first levels that are there; an empty side has no touch."""
    books = [
        BookIn(NOON, [(1000, 3), (None, None), (998, 5), (997, 7)], [(1001, 2)]),
        BookIn(NOON + 1, [], [(1001, 2), (1002, 4)]),
        BookIn(NOON + 2, [(None, None), (998, 5)], [(1001, 0), (1002, 4)]),
    ]
    lake = opened(write_lake(tmp_path, books=books))
    got = lake.read_book(TODAY, BOOK, 3)
    assert got.ts.tolist() == [NOON, NOON + 1, NOON + 2]
    assert got.bid.tolist() == [1000, NO_LEVEL, NO_LEVEL]
    assert got.ask.tolist() == [1001, 1001, 1001]
    assert got.bid_sz.tolist() == [3, NO_LEVEL, NO_LEVEL]
    assert got.ask_sz.tolist() == [2, 2, 0]
    assert got.bid_depth.tolist() == [8, 0, 5]
    assert got.ask_depth.tolist() == [2, 6, 4]
    assert got.tick.tolist() == [1.0, 1.0, 1.0]
    assert lake.read_book(TODAY, BOOK, 25).bid_depth.tolist() == [15, 0, 5]
    quotes = lake.read_book(TODAY, "quotes", 1)
    for name in ("ts", "bid", "ask", "bid_sz", "ask_sz", "tick"):
        np.testing.assert_array_equal(getattr(quotes, name), getattr(got, name))
    assert quotes.bid_depth.tolist() == [3, 0, 0]
    assert quotes.ask_depth.tolist() == [2, 2, 0]


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 5), st.integers(0, 1000))
def test_read__files_in_any_order(tmp_path_factory: pytest.TempPathFactory, parts: int, seed: int) -> None:
    """Rows shuffled over files give the columns of one file, ties in the order of lines."""
    market = lakes.ties()
    root = tmp_path_factory.mktemp("lakes")
    one = opened(market.write(root / "one"))
    many = opened(market.write(root / "many", parts=parts, shuffle=seed))
    assert_same(many.read_trades(TODAY), one.read_trades(TODAY))
    for table in (BOOK, "quotes"):
        assert_same(many.read_book(TODAY, table, 5), one.read_book(TODAY, table, 5))


@pytest.mark.parametrize("group_rows", [7, 100, 10_000])
def test_read__two_symbols_in_one_file(tmp_path: Path, group_rows: int) -> None:
    """Row groups of one symbol, of the other and of both: each symbol sees its own rows alone."""
    market = lakes.plain()
    decoys = [row._replace(symbol_id=DECOY_ID, price=77) for row in market.trades[::3]]
    decoy_books = [row._replace(symbol_id=DECOY_ID) for row in market.books[::2]]
    both = Market(
        [*decoys, *market.trades],
        [*decoy_books, *market.books],
        [PeriodIn(), PeriodIn(DECOY_ID, name=DECOY)],
    )
    alone = opened(market.write(tmp_path / "alone"))
    mixed = both.write(tmp_path / "mixed")
    for table in ("trades", BOOK, "quotes"):
        rewrite(mixed, table, lambda rows: rows, row_group_size=group_rows)
    mine, other = opened(mixed), opened(mixed, DECOY)
    assert_same(mine.read_trades(TODAY), alone.read_trades(TODAY))
    assert_same(mine.read_trades(TODAY, last=50), tail_of(alone.read_trades(TODAY), mine, 50))
    for table in (BOOK, "quotes"):
        assert_same(mine.read_book(TODAY, table, 5), alone.read_book(TODAY, table, 5))
        assert len(other.read_book(TODAY, table, 5).ts) == len(decoy_books)
    assert set(other.read_trades(TODAY).price.tolist()) == {77}
    assert len(other.read_trades(TODAY).ts) == len(decoys)


@pytest.mark.parametrize("order", ["sorted", "shuffled", "one late"])
@pytest.mark.parametrize("rows", [1, 40, 10_000, None])
def test_trade_stretches__together_are_the_day(plain: Path, order: str, rows: int | None) -> None:
    """Ties within and across row groups, groups out of order, a row of another time in a group."""
    rng = np.random.default_rng(3)

    def changed(table: pa.Table) -> pa.Table:
        n = len(table)
        ts = np.sort(NOON + rng.integers(0, n // 2, n))
        table = table.set_column(table.schema.get_field_index("ts_local_us"), "ts_local_us", pa.array(ts))
        places = {
            "sorted": np.arange(n),
            "shuffled": rng.permutation(n),
            "one late": np.roll(np.arange(n), 1),
        }
        return table.take(places[order])

    rewrite(plain, "trades", changed, row_group_size=7)
    lake = opened(plain)
    found = list(lake.trade_stretches(TODAY, rows))
    assert_same(
        Trades(*(np.concatenate(part) for part in zip(*(vars(one).values() for one in found), strict=True))),
        lake.read_trades(TODAY),
    )
    assert all(a.ts[-1] < b.ts[0] for a, b in pairwise(found))
    if order == "sorted" and rows == 1:
        assert len(found) > 5
    if rows == 40:
        assert all(len(trades.ts) >= 40 for trades in found[:-1])


def test_trade_stretches__statistics_that_lie_are_found_out(
    plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row groups in an order that their statistics deny: nothing comes out of order in silence."""
    rewrite(plain, "trades", lambda table: table.take(np.arange(len(table))[::-1]), row_group_size=50)
    lake = opened(plain)
    lake.look("trades", [TODAY])
    monkeypatch.setattr(
        "clusterlob_gpu.lake.native._bounds", lambda _, group, __: (10 * group, 10 * group + 5)
    )
    with pytest.raises(LakeError, match=r"row groups are not what their statistics say; ingest it again"):
        list(lake.trade_stretches(TODAY, 50))


def test_trade_stretches__of_several_files_are_one(plain: Path) -> None:
    path = only_file(plain, "trades")
    path.with_name("more.parquet").write_bytes(path.read_bytes())
    assert len(list(opened(plain).trade_stretches(TODAY, 1))) == 1


def tail_of(whole: Trades, lake: SymbolLake, last: int) -> Trades:
    """As many of the whole day's last trades as `read_trades(last=...)` gives, at least `last`."""
    n = len(lake.read_trades(TODAY, last=last).ts)
    assert n >= min(last, len(whole.ts))
    return Trades(*(column[len(whole.ts) - n :] for column in vars(whole).values()))


@pytest.mark.parametrize("last", [0, 1, 99, 100, 101, 399, 400, 5_000])
@pytest.mark.parametrize("name", ["plain", "ties"])
def test_read_trades__last_ones_are_the_end_of_all(tmp_path: Path, name: str, last: int) -> None:
    lake = lakes.NAMED[name]().write(tmp_path / "lake")
    rewrite(lake, "trades", lambda rows: rows, row_group_size=50)
    reader = opened(lake)
    whole = reader.read_trades(TODAY)
    assert_same(reader.read_trades(TODAY, last=last), tail_of(whole, reader, last))
    if name == "plain" and last == 99:
        assert len(reader.read_trades(TODAY, last=last).ts) == 100


def test_read_trades__last_ones_of_unsorted_groups_are_read_whole(tmp_path: Path) -> None:
    """A file whose row groups overlap in time cannot be cut at a group."""
    lake = lakes.plain().write(tmp_path / "lake")
    rng = np.random.default_rng(1)
    rewrite(lake, "trades", lambda rows: rows.take(rng.permutation(len(rows))), row_group_size=50)
    reader = opened(lake)
    assert_same(reader.read_trades(TODAY, last=10), reader.read_trades(TODAY))
    assert (np.diff(reader.read_trades(TODAY).ts) > 0).all()


def test_read__other_types_of_integers_and_lists(tmp_path: Path) -> None:
    """int32 columns, large lists, lists of fixed size and null lists read like the lake's own types."""
    market = lakes.broken_books()
    want = opened(market.write(tmp_path / "want"))
    for name, kind in {
        "large": pa.large_list(pa.int64()),
        "fixed": pa.list_(pa.int64(), 25),
    }.items():
        lake = market.write(tmp_path / name)

        def cast(rows: pa.Table, kind: pa.DataType = kind) -> pa.Table:
            for column in ("bids_px", "bids_sz", "asks_px", "asks_sz"):
                at_ = rows.column_names.index(column)
                lists = rows[column].to_pylist()
                full = [(entry + [None] * 25)[:25] for entry in lists]
                rows = rows.set_column(at_, column, pa.array(full, kind))
            return rows

        rewrite(lake, BOOK, cast)
        assert_same(opened(lake).read_book(TODAY, BOOK, 5), want.read_book(TODAY, BOOK, 5))

    def narrow(rows: pa.Table) -> pa.Table:
        for column in ("price_int", "qty_int"):
            rows = rows.set_column(rows.column_names.index(column), column, rows[column].cast(pa.int32()))
        return rows

    rewrite(tmp_path / "fixed", "trades", narrow)
    assert_same(opened(tmp_path / "fixed").read_trades(TODAY), want.read_trades(TODAY))


def test_read_book__null_list_is_an_empty_side(tmp_path: Path) -> None:
    lake = write_lake(tmp_path, books=[lakes.book(NOON), lakes.book(NOON + 1)])

    def with_null(rows: pa.Table) -> pa.Table:
        at_ = rows.column_names.index("bids_px")
        lists = pa.array([None, rows["bids_px"][1].as_py()], rows.schema.field("bids_px").type)
        return rows.set_column(at_, pa.field("bids_px", lists.type), lists)

    rewrite(lake, BOOK, with_null)
    got = opened(lake).read_book(TODAY, BOOK, 5)
    assert got.bid.tolist() == [NO_LEVEL, 1000]
    assert got.bid_sz.tolist() == [1000, 1000]


def test_read_book__more_rows_than_a_batch(tmp_path: Path) -> None:
    n = 40_000
    books = [BookIn(NOON + i, [(1000 + i % 7, 1 + i % 5)], [(1010, 2)]) for i in range(n)]
    got = opened(write_lake(tmp_path, books=books, quotes=())).read_book(TODAY, BOOK, 5)
    np.testing.assert_array_equal(got.bid, 1000 + np.arange(n) % 7)
    np.testing.assert_array_equal(got.bid_depth, 1 + np.arange(n) % 5)


# ---- dim_symbol -------------------------------------------------------------------------------------


@pytest.mark.parametrize("new_id", [False, True])
def test_read__periods_share_one_unit(tmp_path: Path, new_id: bool) -> None:
    """Increments fall from 0.1 to 0.01 half way: coarse integers are ten times as large afterwards."""
    lake = opened(lakes.finer_ticks(new_id).write(tmp_path / "lake"))
    plain_lake = opened(lakes.plain().write(tmp_path / "plain"))
    assert lake.symbol.price_unit == Fraction(1, 100)
    got, want = lake.read_trades(TODAY), plain_lake.read_trades(TODAY)
    np.testing.assert_array_equal(got.price, 10 * want.price)
    np.testing.assert_array_equal(got.qty, want.qty)
    book = lake.read_book(TODAY, BOOK, 5)
    np.testing.assert_array_equal(book.bid, 10 * plain_lake.read_book(TODAY, BOOK, 5).bid)
    assert book.tick.tolist() == [10.0] * 300 + [1.0] * 300


def test_read__row_outside_every_period_is_named(tmp_path: Path) -> None:
    market = replace(lakes.plain(), periods=[PeriodIn(end=NOON + 10 * SECOND)])
    lake = market.write(tmp_path / "lake")
    with pytest.raises(LakeError, match=rf"row 10 of {EXCHANGE} {SYMBOL} .* has no dim_symbol row") as caught:
        opened(lake).read_trades(TODAY)
    assert str(only_file(lake, "trades")) in str(caught.value)


def test_open_symbol__errors(tmp_path: Path, plain: Path) -> None:
    with pytest.raises(
        LakeError, match=rf"no symbol XRPUSDT of {EXCHANGE}; the lake has {EXCHANGE} {SYMBOL}"
    ):
        opened(plain, "XRPUSDT")
    with pytest.raises(LakeError, match="no such lake; make one with `clusterlob ingest`"):
        opened(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(LakeError, match="the lake has none: ingest something first"):
        opened(tmp_path / "empty")
    overlapping = [PeriodIn(end=NOON + 1), PeriodIn(start=NOON)]
    lake = replace(lakes.plain(), periods=overlapping).write(tmp_path / "overlapping")
    with pytest.raises(LakeError, match=f"periods of {EXCHANGE} {SYMBOL} overlap"):
        opened(lake)


def test_open_symbol__broken_dim_symbol(plain: Path) -> None:
    path = plain / "dim_symbol.parquet"
    table = pq.read_table(path)
    pq.write_table(table.drop_columns(["tick_size"]), path)
    with pytest.raises(LakeError, match=r"dim_symbol\.parquet: column tick_size is missing"):
        opened(plain)


def test_ids__depend_on_names_alone() -> None:
    assert symbol_id("binance-futures", "BTCUSDT") == symbol_id("binance-futures", "BTCUSDT")
    assert len({symbol_id(e, s) for e in ("a", "b", "ab") for s in ("A", "B", "bA")}) == 9
    assert 0 <= symbol_id("x", "y") < 2**63
    assert exchange_id("binance-futures") == 2
    assert 1000 <= exchange_id("an exchange nobody knows") <= 32_767


def test_units__are_exact_decimals() -> None:
    assert decimal_unit([0.1]) == Fraction(1, 10)
    assert decimal_unit([0.1, 0.025]) == Fraction(1, 40)
    assert decimal_unit([1e-8, 5.0]) == Fraction(1, 10**8)
    assert decode(np.array([639441, -3]), Fraction(1, 10)).tolist() == [63944.1, -0.3]


# ---- faults -----------------------------------------------------------------------------------------


def read_table(lake: Path, table: str) -> Trades | BookRows:
    reader = opened(lake)
    return reader.read_trades(TODAY) if table == "trades" else reader.read_book(TODAY, table, 5)


COLUMNS = [
    *(("trades", name) for name in ("ts_local_us", "side", "price_int", "file_id", "symbol_id")),
    *((BOOK, name) for name in ("ts_local_us", "file_line_number", "bids_px", "asks_sz", "symbol_id")),
    *(("quotes", name) for name in ("bid_px_int", "ask_sz_int")),
]


@pytest.mark.parametrize(("table", "column"), COLUMNS)
def test_fault__missing_column(plain: Path, table: str, column: str) -> None:
    path = rewrite(plain, table, lambda rows: rows.drop_columns([column]))
    with pytest.raises(LakeError, match=f"column {column} is missing") as caught:
        read_table(plain, table)
    assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize("table", ["trades", BOOK, "quotes"])
@pytest.mark.parametrize("damage", ["cut off", "empty", "text"])
def test_fault__broken_parquet(plain: Path, table: str, damage: str) -> None:
    path = only_file(plain, table)
    whole = path.read_bytes()
    path.write_bytes({"cut off": whole[: len(whole) // 2], "empty": b"", "text": b"not Parquet"}[damage])
    with pytest.raises(LakeError, match=r"not a readable Parquet file \(.*\); ingest it again") as caught:
        read_table(plain, table)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_fault__damaged_pages(plain: Path) -> None:
    """The footer is whole, the data is not."""
    path = only_file(plain, "trades")
    content = bytearray(path.read_bytes())
    content[4:2000] = random.Random(1).randbytes(1996)
    path.write_bytes(content)
    with pytest.raises(LakeError, match="not a readable Parquet file"):
        read_table(plain, "trades")


@pytest.mark.parametrize(
    ("table", "column"),
    [("trades", "price_int"), ("trades", "side"), ("trades", "ts_local_us"), (BOOK, "ts_local_us")],
)
def test_fault__nulls(plain: Path, table: str, column: str) -> None:
    def with_null(rows: pa.Table) -> pa.Table:
        values = [None, *rows[column].to_pylist()[1:]]
        kind = rows.schema.field(column).type
        return rows.set_column(
            rows.column_names.index(column), pa.field(column, kind), pa.array(values, kind)
        )

    path = rewrite(plain, table, with_null)
    with pytest.raises(LakeError, match=f"column {column} has 1 nulls; it may have none") as caught:
        read_table(plain, table)
    assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize("table", ["trades", BOOK, "quotes"])
def test_fault__row_of_another_day(plain: Path, table: str) -> None:
    path = only_file(plain, table)
    moved = folder(plain, table, TOMORROW) / path.name
    moved.parent.mkdir(parents=True)
    path.rename(moved)
    reader = opened(plain)
    with pytest.raises(
        LakeError, match=r"row 0 has ts_local_us = \d+ \(2024-02-28\), not the day 2024-02-29"
    ):
        reader.read_trades(TOMORROW) if table == "trades" else reader.read_book(TOMORROW, table, 5)


def test_fault__price_times_quantity_beyond_int64(tmp_path: Path) -> None:
    """2^62 is refused, just below is not."""
    lake = write_lake(tmp_path / "a", trades=[TradeIn(NOON, BUY, 2**31, 2**31)])
    with pytest.raises(LakeError, match=r"price_int \* qty_int reaches 4\.61e\+18, beyond 2\^62; coarsen"):
        opened(lake).read_trades(TODAY)
    lake = write_lake(tmp_path / "b", trades=[TradeIn(NOON, BUY, 2**31, 2**30)])
    assert opened(lake).read_trades(TODAY).price.tolist() == [2**31]


def test_fault__absent_day_says_what_there_is(tmp_path: Path) -> None:
    lake = opened(lakes.over_midnight(missing_trades=[1]).write(tmp_path / "lake"))
    assert lake.days("trades") == [TODAY, date.fromisoformat(lakes.DAYS[2])]
    assert [lake.has("trades", day) for day in (TODAY, TOMORROW)] == [True, False]
    held = "the lake holds 2024-02-28 to 2024-03-01"
    with pytest.raises(LakeError, match=rf"no trades for {EXCHANGE} {SYMBOL} on 2024-02-29: .*{held}"):
        lake.read_trades(TOMORROW)
    with pytest.raises(LakeError, match=rf"no quotes for {EXCHANGE} {SYMBOL} on 2024-03-03"):
        lake.read_book(date.fromisoformat(lakes.DAYS[4]), "quotes", 1)


def test_fault__folder_that_is_no_day(plain: Path) -> None:
    (folder(plain, "trades").parent / "date=yesterday").mkdir()
    with pytest.raises(LakeError, match="date=yesterday: not a partition; it must read date=YYYY-MM-DD"):
        opened(plain).days("trades")


def test_hidden_files__are_not_read(plain: Path) -> None:
    want = opened(plain).read_trades(TODAY)
    for name in (".x.parquet", "_x.parquet", "x.tmp"):
        (folder(plain, "trades") / name).write_bytes(b"junk")
    assert_same(opened(plain).read_trades(TODAY), want)


def test_fingerprint__changes_with_content_and_dim_symbol(tmp_path: Path) -> None:
    market = lakes.plain()
    one = opened(market.write(tmp_path / "one"))
    first = one.fingerprint("trades", TODAY)
    assert one.fingerprint("trades", TODAY) == first
    assert one.fingerprint("quotes", TODAY) != first
    rewrite(tmp_path / "one", "trades", lambda rows: rows.slice(0, 500))
    rewritten = SymbolLake(one.root, one.symbol)
    assert rewritten.fingerprint("trades", TODAY) != first
    coarse = replace(market, periods=[PeriodIn(price_increment=0.5)]).write(tmp_path / "one")
    second = opened(coarse).fingerprint("trades", TODAY)
    assert second not in (first, SymbolLake(one.root, one.symbol).fingerprint("trades", TODAY))


# ---- what an object has seen -------------------------------------------------------------------------


def days_of(lake: SymbolLake, table: str) -> list[date]:
    return [date.fromisoformat(day) for day in lakes.DAYS if lake.has(table, date.fromisoformat(day))]


def test_seen__every_day_looked_at(tmp_path: Path) -> None:
    lake = opened(lakes.over_midnight(days=3, missing_trades=[1]).write(tmp_path / "lake"))
    assert lake.seen() == {}
    lake.has("trades", TOMORROW)
    lake.read_trades(TODAY)
    lake.size("quotes", TODAY)
    assert lake.seen() == {
        f"quotes {TODAY}": lake.fingerprint("quotes", TODAY),
        f"trades {TODAY}": lake.fingerprint("trades", TODAY),
        f"trades {TOMORROW}": None,
    }
    assert list(lake.seen()) == sorted(lake.seen())


def test_look__sees_what_single_looks_see(tmp_path: Path) -> None:
    path = lakes.over_midnight(days=4, missing_trades=[2]).write(tmp_path / "lake", parts=3)
    many, single = opened(path), opened(path)
    days = [date.fromisoformat(day) for day in lakes.DAYS]
    for table in ("trades", BOOK, "quotes"):
        many.look(table, days)
        for day in days:
            single.has(table, day)
    assert many.seen() == single.seen()
    assert len(many.seen()) == 15


def test_look__is_remembered(plain: Path) -> None:
    """The object answers from what it saw, even when the lake is no longer there."""
    lake = opened(plain)
    lake.look("trades", [TODAY, TOMORROW])
    was = lake.seen(), lake.size("trades", TODAY)
    plain.rename(plain.with_name("elsewhere"))
    assert (lake.has("trades", TODAY), lake.has("trades", TOMORROW)) == (True, False)
    assert (lake.seen(), lake.size("trades", TODAY)) == was
    with pytest.raises(FileNotFoundError, match="the lake has gone"):
        lake.has("quotes", TODAY)


def test_look__all_days_before_the_first_broken_one_is_told(tmp_path: Path) -> None:
    path = lakes.over_midnight(days=4).write(tmp_path / "lake")
    days = [date.fromisoformat(day) for day in lakes.DAYS]
    for day in days[1:3]:
        (folder(path, "trades", day) / "part-00000.parquet").write_bytes(b"junk")
    lake = opened(path)
    with pytest.raises(LakeError, match="not a readable Parquet file") as caught:
        lake.look("trades", days)
    assert fault_of(caught.value) == ("trades", days[1])
    assert list(lake.seen()) == [f"trades {day}" for day in (days[0], days[3], days[4])]


def test_look__threads_agree(tmp_path: Path) -> None:
    path = lakes.over_midnight(days=4).write(tmp_path / "lake", parts=2)
    lake, want = opened(path), opened(path)
    days = [date.fromisoformat(day) for day in lakes.DAYS[:4]]
    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(lake.read_trades, days * 4))
    for i, day in enumerate(days):
        for trades in read[i::4]:
            assert_same(trades, want.read_trades(day))
    assert lake.seen() == want.seen()


def test_size__rows_and_bytes_of_the_symbol(tmp_path: Path) -> None:
    market = lakes.plain()
    decoys = [row._replace(symbol_id=DECOY_ID) for row in market.trades]
    both = replace(
        market, trades=[*decoys, *market.trades], periods=[PeriodIn(), PeriodIn(DECOY_ID, name=DECOY)]
    )
    lake = both.write(tmp_path / "lake")
    path = rewrite(lake, "trades", lambda rows: rows, row_group_size=600)
    whole, mine, other = path.stat().st_size, opened(lake), opened(lake, DECOY)
    assert (mine.size("trades", TODAY)[0], other.size("trades", TODAY)[0]) == (600, 600)
    assert whole - 1 <= mine.size("trades", TODAY)[1] + other.size("trades", TODAY)[1] <= whole
    (book,) = folder(lake, BOOK).glob("*.parquet")
    assert mine.size(BOOK, TODAY) == (600, book.stat().st_size)
    assert mine.size(BOOK, TOMORROW) == (0, 0)


def test_fingerprint__names_sizes_times_and_ends_of_files(tmp_path: Path) -> None:
    """By its definition, so that artefacts keep their names; files of another symbol do not count."""
    market = lakes.plain()
    path = market.write(tmp_path / "lake", parts=2)
    other = replace(market, trades=[row._replace(symbol_id=DECOY_ID) for row in market.trades])
    foreign = only_file(other.write(tmp_path / "other"), "trades")
    foreign.rename(folder(path, "trades") / "another.parquet")
    for padded in (False, True):
        if padded:
            long = folder(path, "trades") / "part-00001.parquet"
            table = pq.ParquetFile(long).read()
            pq.write_table(table, long, row_group_size=2)
            assert long.stat().st_size > 65_536
        lake = opened(path)
        digest = hashlib.sha256(lake.symbol.rows.to_csv().encode())
        for file in sorted(folder(path, "trades").glob("part*.parquet")):
            stat = file.stat()
            digest.update(f"{file.name} {stat.st_size} {stat.st_mtime_ns}".encode())
            digest.update(file.read_bytes()[-65_536:])
        assert lake.fingerprint("trades", TODAY) == digest.hexdigest()


def test_pickle__forgets_what_was_seen(plain: Path) -> None:
    lake = opened(plain).leaving_out([("quotes", TODAY)])
    lake.has("trades", TODAY)
    copy = pickle.loads(pickle.dumps(lake))
    assert copy.seen() == {f"quotes {TODAY}": None}
    assert (copy.root, copy.without) == (lake.root, lake.without)
    assert_same(copy.read_trades(TODAY), lake.read_trades(TODAY))
    assert len(pickle.dumps(lake)) == len(pickle.dumps(copy))
    assert lake == SymbolLake(lake.root, lake.symbol, lake.without)
    assert "_memory" not in repr(lake)


def test_leaving_out__as_if_the_day_had_no_rows(tmp_path: Path) -> None:
    """Every answer is that of a lake without the partition's rows, and the other tables are untouched."""
    market = lakes.over_midnight(days=3)
    lake = opened(market.write(tmp_path / "whole"))
    lake.look("trades", [TODAY, TOMORROW])
    left = lake.leaving_out([("trades", TODAY)]).leaving_out([("quotes", TOMORROW)])
    gone = opened(
        replace(market, trades=[t for t in market.trades if t.ts >= at(1)]).write(tmp_path / "gone")
    )
    assert days_of(left, "trades") == days_of(gone, "trades")
    for got in (left.size, left.fingerprint):
        assert got("trades", TODAY) == getattr(gone, got.__name__)("trades", TODAY)
    for read in (left.read_trades, left.read_fills):
        with pytest.raises(LakeError, match=f"no trades for {EXCHANGE} {SYMBOL} on {TODAY}") as caught:
            read(TODAY)
        assert fault_of(caught.value) == ("trades", TODAY)
    with pytest.raises(LakeError, match=f"no quotes for {EXCHANGE} {SYMBOL} on {TOMORROW}"):
        left.read_book(TOMORROW, "quotes", 1)
    assert_same(left.read_book(TODAY, "quotes", 1), lake.read_book(TODAY, "quotes", 1))
    assert left.seen()[f"trades {TODAY}"] is None
    assert left.seen()[f"quotes {TOMORROW}"] is None
    assert left.seen()[f"trades {TOMORROW}"] == lake.seen()[f"trades {TOMORROW}"] is not None
    assert lake.seen()[f"trades {TODAY}"] is not None
    assert lake.has("trades", TODAY)


# ---- whose fault it is -------------------------------------------------------------------------------


def fault_of(error: BaseException) -> tuple[str, date]:
    """The table and day to leave out, as another process sees them."""
    copy = pickle.loads(pickle.dumps(error))
    assert str(copy) == str(error)
    return copy.table, copy.day


READ = {
    "trades": lambda lake: lake.read_trades(TODAY),
    "last": lambda lake: lake.read_trades(TODAY, last=5),
    "fills": lambda lake: lake.read_fills(TODAY),
    BOOK: lambda lake: lake.read_book(TODAY, BOOK, 5),
    "quotes": lambda lake: lake.read_book(TODAY, "quotes", 1),
    "ticker": lambda lake: lake.read_ticker(TODAY, ["funding_rate"]),
}
"""Every way to read, by name."""
TABLE_OF = {"last": "trades", "fills": "trades", "ticker": "derivative_ticker"}


@pytest.fixture
def ticked(plain: Path) -> Path:
    """The plain lake with a ticker, in row groups of 50, with checksums."""
    rows = [{"ts_local_us": NOON + i, "symbol_id": 11, "funding_rate": 1e-4} for i in range(600)]
    kept = pa.Table.from_pylist(rows).append_column("ts_exch_us", pa.array(range(600), pa.int64()))
    folder(plain, "derivative_ticker").mkdir(parents=True)
    pq.write_table(kept, folder(plain, "derivative_ticker") / "part.parquet")
    for table in ("trades", BOOK, "quotes", "derivative_ticker"):
        rewrite(plain, table, lambda rows: rows, row_group_size=50, write_page_checksum=True, **ZSTD)
    return plain


ZSTD = {"compression": "zstd", "use_dictionary": False}


def pages_of(path: Path, columns: tuple[str, ...]) -> list[range]:
    """Where the last bytes of these columns lie in a file: content, not headers of pages."""
    meta = pq.read_metadata(path)
    chunks = [
        meta.row_group(g).column(c) for g in range(meta.num_row_groups) for c in range(meta.num_columns)
    ]
    return [
        range(end - 12, end)
        for chunk in chunks
        if chunk.path_in_schema.startswith(columns)
        for end in [chunk.data_page_offset + chunk.total_compressed_size]
    ]


@pytest.mark.parametrize("way", READ)
def test_fault__every_flipped_bit_of_a_page_is_the_days(ticked: Path, way: str) -> None:
    """The pages' checksums find what Zstandard and the encodings let pass."""
    table = TABLE_OF.get(way, way)
    path, rng = only_file(ticked, table), random.Random(1)
    whole = path.read_bytes()
    needed = {BOOK: ("bids_", "asks_"), "ticker": ("funding_rate",)}.get(way, ("ts_local_us",))
    spans = pages_of(path, needed)[-1 if way == "last" else 0 :]
    READ[way](opened(ticked))
    for _ in range(40):
        at_ = rng.choice(rng.choice(spans))
        path.write_bytes(whole[:at_] + bytes([whole[at_] ^ 1 << rng.randrange(8)]) + whole[at_ + 1 :])
        with pytest.raises(LakeError, match=r"not a readable Parquet file \(.*\); ingest it again") as caught:
            READ[way](opened(ticked))
        assert str(caught.value).startswith(f"{path}: ")
        assert "\n" not in str(caught.value)
        assert fault_of(caught.value) == (table, TODAY)


@pytest.mark.parametrize("way", ["trades", BOOK, "quotes"])
def test_fault__flipped_bits_of_a_footer_are_the_days_or_harmless(ticked: Path, way: str) -> None:
    """No other error, and never the end of the process."""
    path, rng = only_file(ticked, way), random.Random(2)
    told: list[tuple[str, date]] = []
    whole = path.read_bytes()
    size = int.from_bytes(whole[-8:-4], "little") + 8
    for _ in range(60):
        at_ = len(whole) - 1 - rng.randrange(size)
        path.write_bytes(whole[:at_] + bytes([whole[at_] ^ 1 << rng.randrange(8)]) + whole[at_ + 1 :])
        try:
            READ[way](opened(ticked))
        except LakeError as error:
            told.append(fault_of(error))
    assert len(told) > 10
    assert set(told) == {(way, TODAY)}


def test_fault__statistics_of_another_type(plain: Path) -> None:
    """Arrow would end the process over them."""
    path = only_file(plain, "trades")
    whole = path.read_bytes()
    size = int.from_bytes(whole[-8:-4], "little") + 8
    told = 0
    # The metadata of a column follow 0x1c; 0x15 and 4 at their start say int64, 0 says boolean.
    for found in re.finditer(b"\x1c\x15\x04", whole[-size:]):
        at_ = len(whole) - size + found.end() - 1
        path.write_bytes(whole[:at_] + b"\x00" + whole[at_ + 1 :])
        try:
            opened(plain).read_trades(TODAY)
        except LakeError:
            told += 1
    assert told >= 4


@pytest.mark.parametrize("way", READ)
@pytest.mark.parametrize("fault", ["column", "another day"])
def test_fault__wrong_rows_are_the_days(ticked: Path, way: str, fault: str) -> None:
    table = TABLE_OF.get(way, way)

    def spoil(rows: pa.Table) -> pa.Table:
        if fault == "column":
            return rows.drop_columns(["ts_local_us"])
        moved = pc.add(rows["ts_local_us"], lakes.DAY)
        return rows.set_column(rows.column_names.index("ts_local_us"), "ts_local_us", moved)

    path = rewrite(ticked, table, spoil)
    text = {"column": "column ts_local_us is missing", "another day": "not the day 2024-02-28"}[fault]
    with pytest.raises(LakeError, match=f"{path}: .*{text}") as caught:
        READ[way](opened(ticked))
    assert fault_of(caught.value) == (table, TODAY)


@pytest.mark.parametrize(
    ("way", "column", "kind"),
    [
        *(
            ("trades", name, kind)
            for name in ("price_int", "ts_local_us")
            for kind in (pa.float64(), pa.string())
        ),
        ("trades", "symbol_id", pa.string()),
        ("quotes", "bid_sz_int", pa.float64()),
        (BOOK, "asks_sz", pa.list_(pa.float64())),
        (BOOK, "bids_px", pa.int64()),
        ("ticker", "funding_rate", pa.string()),
    ],
)
def test_fault__columns_of_another_type_are_the_days(
    ticked: Path, way: str, column: str, kind: pa.DataType
) -> None:
    """No fraction is cut off and no text taken for a number."""
    table = TABLE_OF.get(way, way)

    def retype(rows: pa.Table) -> pa.Table:
        values = rows[column].combine_chunks()
        other = pa.array(range(len(rows)), kind) if kind == pa.int64() else values.cast(kind)
        return rows.set_column(rows.column_names.index(column), column, other)

    path = rewrite(ticked, table, retype)
    with pytest.raises(LakeError, match=f"column {column} is .*, it must be .*; ingest it again") as caught:
        READ[way](opened(ticked))
    assert str(caught.value).startswith(f"{path}: ")
    assert fault_of(caught.value) == (table, TODAY)


def test_fault__lake_errors_of_trades_too_large_and_absent_days(tmp_path: Path) -> None:
    lake = opened(write_lake(tmp_path, trades=[TradeIn(NOON, BUY, 2**31, 2**31)]))
    for day in (TODAY, TOMORROW):
        with pytest.raises(LakeError) as caught:
            lake.read_trades(day)
        assert fault_of(caught.value) == ("trades", day)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ENOENT, errno.ESTALE])
@pytest.mark.parametrize("way", READ)
def test_fault__file_that_cannot_be_reached_is_not_the_days(
    ticked: Path, way: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither when a day is looked at nor when it is read."""
    lake, table = opened(ticked), TABLE_OF.get(way, way)
    path = only_file(ticked, table)

    def refuse(where: Location) -> None:
        raise OSError(number, "refused", str(where))

    with monkeypatch.context() as patch:
        patch.setattr(Location, "open", refuse)
        for act in (
            lambda: lake.has(table, TODAY),
            lambda: lake.look(table, [TODAY]),
            lambda: READ[way](lake),
        ):
            with pytest.raises(OSError, match=f"refused: '{path}'") as caught:
                act()
            assert caught.value.errno == number
    assert lake.seen() == {}
    lake.look(table, [TODAY])
    monkeypatch.setattr(Location, "open", refuse)
    with pytest.raises(OSError, match="refused"):
        READ[way](lake)


@pytest.mark.parametrize("way", READ)
def test_fault__error_of_the_disk_in_the_middle_is_not_the_days(
    ticked: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Arrow passes on what its source raises."""
    lake, table = opened(ticked), TABLE_OF.get(way, way)
    lake.look(table, [TODAY])
    monkeypatch.setattr(Location, "open", lambda where: pa.PythonFile(Failing(where), "r"))
    with pytest.raises(OSError, match=r"\[Errno 5\] .*\.parquet'") as caught:
        READ[way](lake)
    assert caught.value.errno == errno.EIO


class Failing(io.BytesIO):
    """A file of the right size on a disk that fails."""

    def __init__(self, where: Location) -> None:
        super().__init__(where.read())

    def read(self, *_: object) -> bytes:
        raise OSError(errno.EIO, "Input/output error")


def test_fault__folder_in_place_of_a_file(plain: Path) -> None:
    path = only_file(plain, "trades")
    path.unlink()
    path.mkdir()
    with pytest.raises(OSError, match=f"is a directory: '{path}'"):
        opened(plain).has("trades", TODAY)


@pytest.mark.parametrize("way", READ)
def test_fault__file_that_changes_under_a_run(ticked: Path, way: str) -> None:
    """What was seen is what is read: nothing of another file passes under its fingerprint."""
    lake, table = opened(ticked), TABLE_OF.get(way, way)
    READ[way](lake)
    path = rewrite(ticked, table, lambda rows: rows.slice(0, 500))
    with pytest.raises(OSError, match=f"has changed while it was in use; run again: '{path}'") as caught:
        READ[way](lake)
    assert caught.value.errno == errno.ESTALE
    assert not isinstance(caught.value, LakeError)
    READ[way](opened(ticked))


def test_fault__broken_dim_symbol(plain: Path) -> None:
    path = plain / "dim_symbol.parquet"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(LakeError, match=f"{path}: not a readable Parquet file") as caught:
        opened(plain)
    assert not hasattr(caught.value, "day")


# ---- the check --------------------------------------------------------------------------------------


def touch_market() -> Market:
    """Three buys at the ask and a sell at the bid before they move away; one trade before any book."""
    books = [lakes.book(NOON, 1000, 1001), lakes.book(NOON + 10, 1001, 1003)]
    trades = [
        TradeIn(NOON - 5, BUY, 1001, 1),
        TradeIn(NOON + 1, BUY, 1001, 1),
        TradeIn(NOON + 10, BUY, 1001, 1),
        TradeIn(NOON + 10, SELL, 1000, 1),
        TradeIn(NOON + 10, BUY, 1000, 1),
        TradeIn(NOON + 12, SIDE_UNKNOWN, 1001, 1),
    ]
    return Market(trades, books)


def test_check_day__by_hand(tmp_path: Path) -> None:
    lake = opened(touch_market().write(tmp_path / "lake"))
    found = quality.check_day(lake, BOOK, TODAY)
    assert (found.trades, found.book_rows) == (6, 2)
    assert found.skipped == {"empty_side": 0, "non_positive": 0, "crossed": 0}
    assert found.touch_strict == 3 / 4
    assert found.touch_inclusive == 2 / 4
    assert found.buy_share == 4 / 5
    assert found.longest_book_gap_s == 1e-5


def test_check_lake__days_gaps_and_broken_files(tmp_path: Path) -> None:
    lake = lakes.over_midnight(days=4, missing_trades=[1, 2]).write(tmp_path / "lake")
    found = quality.check_lake(lake)
    tables = {check.table: check for check in found.tables}
    assert sorted(tables) == [BOOK, "quotes", "trades"]
    assert [str(day) for day in tables["trades"].gaps] == [lakes.DAYS[1], lakes.DAYS[2]]
    assert tables["trades"].rows == 1_200
    assert tables["quotes"].gaps == []
    assert [(check.book, str(check.day)) for check in found.days] == [
        (book, lakes.DAYS[day]) for book in (BOOK, "quotes") for day in (0, 3)
    ]
    only_file(lake, "quotes").write_bytes(b"junk")
    again = {check.table: check for check in quality.check_lake(lake, EXCHANGE, SYMBOL).tables}
    assert len(again["quotes"].broken) == 1
    assert "not a readable Parquet file" in again["quotes"].broken[0]
    assert TODAY not in again["quotes"].days


def test_check_lake__same_symbol_on_two_exchanges(tmp_path: Path) -> None:
    """Tables that one exchange lacks are not looked for because the other has them."""
    lake, market = lakes.plain().write(tmp_path / "lake"), lakes.plain()
    first = pq.read_table(lake / "dim_symbol.parquet")
    trades = [row._replace(symbol_id=NEXT_ID) for row in market.trades]
    books = [row._replace(symbol_id=NEXT_ID) for row in market.books]
    write_lake(lake, trades=trades, books=books, quotes=(), symbols=[PeriodIn(NEXT_ID)], exchange="zzz")
    both = pa.concat_tables([first, pq.read_table(lake / "dim_symbol.parquet")])
    pq.write_table(both, lake / "dim_symbol.parquet")
    found = quality.check_lake(lake)
    assert [(check.exchange, check.book) for check in found.days] == [
        (EXCHANGE, BOOK),
        (EXCHANGE, "quotes"),
        ("zzz", BOOK),
    ]
    assert [check.broken for check in found.tables] == [[]] * 5


def test_check_lake__a_day_that_cannot_be_read_is_listed(tmp_path: Path) -> None:
    """Its footer is whole, so only the join finds out; the other days are still checked."""
    lake = lakes.over_midnight(days=2).write(tmp_path / "lake")
    path = only_file(lake, BOOK)
    content = bytearray(path.read_bytes())
    content[4:2000] = random.Random(1).randbytes(1996)
    path.write_bytes(content)
    found = quality.check_lake(lake)
    assert [(check.book, check.day) for check in found.days] == [
        (BOOK, TOMORROW),
        ("quotes", TODAY),
        ("quotes", TOMORROW),
    ]
    (broken,) = (check.broken for check in found.tables if check.table == BOOK)
    assert len(broken) == 1
    assert broken[0].startswith(f"{path}: not a readable Parquet file")


def test_check_lake__unknown_symbol(plain: Path) -> None:
    with pytest.raises(LakeError, match=f"no such symbol; the lake has {EXCHANGE} {SYMBOL}"):
        quality.check_lake(plain, symbol="XRPUSDT")


def test_touch_share__no_trade_met_a_book() -> None:
    nothing = Trades(np.array([5]), np.array([2], np.uint8), np.array([1]), np.array([1]))
    rows = {"ts": np.array([3]), "bid": np.array([10]), "ask": np.array([11])}
    assert np.isnan(quality.touch_share(nothing, rows, inclusive=False))

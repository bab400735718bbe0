"""A lake in S3: the same arrays as from a disk, in few requests, and no lost connection passes for a gap."""

from __future__ import annotations

import errno
import pickle
import time
from datetime import date
from pathlib import Path

import lakes
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import S3
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lakes import DECOY, EXCHANGE, SYMBOL, Market

from clusterlob_gpu import quality
from clusterlob_gpu.errors import LakeError
from clusterlob_gpu.files import Location
from clusterlob_gpu.lake import manifest
from clusterlob_gpu.lake.native import SymbolLake, open_symbol
from clusterlob_gpu.schema import LAKE_TABLES

BOOK, TICKER = "book_snapshot_25", "derivative_ticker"
TABLES = ("trades", BOOK, "quotes")
DAYS = [date.fromisoformat(day) for day in lakes.DAYS]
TODAY = DAYS[0]


def opened(lake: Path | Location, name: str = SYMBOL) -> SymbolLake:
    return open_symbol(lake, EXCHANGE, name)


def with_ticker(lake: Path, ts: list[int]) -> Path:
    rows = [
        {"ts_local_us": t, "ts_exch_us": t, "symbol_id": lakes.SYMBOL_ID, "funding_rate": 1e-4 * i}
        | {"file_id": 1, "file_line_number": i}
        for i, t in enumerate(ts)
    ]
    folder = lake / TICKER / f"exchange={EXCHANGE}" / f"date={TODAY}"
    folder.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=LAKE_TABLES[TICKER]), folder / "part.parquet")
    return lake


def all_of(lake: SymbolLake) -> dict[str, np.ndarray]:
    """Everything that can be read, by method, day and column; and the rows of every day."""
    found: dict[str, np.ndarray] = {}
    for day in DAYS:
        read = {table: lake.has(table, day) for table in (*TABLES, TICKER)}
        columns = {f"has {table}": np.array([held, *lake.size(table, day)]) for table, held in read.items()}
        if read["trades"]:
            columns |= vars(lake.read_trades(day))
            columns |= {f"last {name}": v for name, v in vars(lake.read_trades(day, last=9)).items()}
            fills = lake.read_fills(day)
            columns |= {"ts_exch": fills.ts_exch, "trade_id": fills.trade_id}
            columns |= {f"fills {name}": values for name, values in vars(fills.trades).items()}
        for table in (BOOK, "quotes"):
            if read[table]:
                book = lake.read_book(day, table, 5)
                columns |= {f"{table} {name}": values for name, values in vars(book).items()}
        if read[TICKER]:
            columns |= lake.read_ticker(day, ["funding_rate", "open_interest"])
        found |= {f"{day} {name}": values for name, values in columns.items()}
    return found


def assert_same(got: SymbolLake, want: SymbolLake) -> None:
    have, expected = all_of(got), all_of(want)
    assert sorted(have) == sorted(expected)
    for name, values in expected.items():
        np.testing.assert_array_equal(have[name], values, err_msg=name)
        assert have[name].dtype == values.dtype
    assert [got.days(table) for table in TABLES] == [want.days(table) for table in TABLES]
    assert sorted(got.seen()) == sorted(want.seen())


def requests(s3: S3) -> list[str]:
    """Kinds of the requests since the last call."""
    return [line.split()[0] for line in s3.asked()]


@pytest.mark.parametrize("name", ["ties", "broken_books", "finer_ticks_new_id", "trades_missing"])
def test_read__same_from_a_path_and_from_s3(s3: S3, tmp_path: Path, name: str) -> None:
    market = lakes.NAMED[name]()
    path = with_ticker(market.write(tmp_path / "lake"), [row.ts for row in market.books[:50]])
    assert_same(opened(s3.upload(path, s3 / "lakes/one")), opened(path))


@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(market=lakes.markets(max_days=2, max_rows=12), parts=st.integers(1, 3), seed=st.integers(0, 99))
def test_read__same_from_shuffled_files(
    s3: S3, tmp_path_factory: pytest.TempPathFactory, market: Market, parts: int, seed: int
) -> None:
    path = market.write(tmp_path_factory.mktemp("lake"), parts=parts, shuffle=seed)
    assert_same(opened(s3.upload(path, s3 / path.name)), opened(path))


def test_check_lake__same_from_a_path_and_from_s3(s3: S3, tmp_path: Path) -> None:
    path = lakes.over_midnight(days=2, missing_trades=[1]).write(tmp_path / "lake")
    assert quality.check_lake(str(s3.upload(path, s3 / "lake"))) == quality.check_lake(path)


# ---- requests ---------------------------------------------------------------------------------------


def test_open_symbol__few_requests(s3: S3, tmp_path: Path) -> None:
    """Two for the folder, two for the journal of an ingest, two to read dim_symbol."""
    lake = s3.upload(lakes.plain().write(tmp_path / "lake"), s3 / "lake")
    s3.asked()
    opened(lake)
    assert len(s3.asked()) <= 6


@pytest.mark.parametrize("parts", [1, 3])
def test_look__a_listing_and_two_requests_a_file(s3: S3, tmp_path: Path, parts: int) -> None:
    """What was looked at costs nothing afterwards; a day without files costs a listing and a question."""
    market = lakes.over_midnight(days=3, missing_trades=[1])
    reader = opened(s3.upload(market.write(tmp_path / "lake", parts=parts), s3 / "lake"))
    s3.asked()
    reader.look("trades", DAYS[:3])
    asked = requests(s3)
    assert asked.count("LIST") == 3
    assert asked.count("GET") == 2 * parts
    assert asked.count("HEAD") == 2 * parts + 1
    assert [reader.has("trades", day) for day in DAYS[:3]] == [True, False, True]
    assert [reader.size("trades", day)[0] for day in DAYS[:3]] == [600, 0, 600]
    assert len({reader.fingerprint("trades", day) for day in DAYS[:3]}) == 3
    reader.look("trades", DAYS[:3])
    assert requests(s3) == []


@pytest.mark.parametrize("group_rows", [100, 1_000])
def test_read__few_requests(s3: S3, tmp_path: Path, group_rows: int) -> None:
    """One to open a file, and for each row group one for every run of neighbouring columns."""
    path = lakes.plain().write(tmp_path / "lake")
    for table in TABLES:
        (file,) = (path / table).rglob("*.parquet")
        pq.write_table(pq.ParquetFile(file).read(), file, row_group_size=group_rows)
    reader = opened(s3.upload(path, s3 / "lake"))
    for table in TABLES:
        reader.look(table, [TODAY])
    groups = -(-600 // group_rows)
    s3.asked()
    reader.read_trades(TODAY)
    assert requests(s3).count("HEAD") == 1
    reader.read_trades(TODAY)
    assert len(s3.asked()) <= 1 + 2 * groups
    reader.read_book(TODAY, "quotes", 1)
    assert len(s3.asked()) <= 1 + 2 * groups
    reader.read_book(TODAY, BOOK, 5)
    assert len(s3.asked()) <= 1 + 3 * groups


def test_look__long_footer_costs_one_request_more(s3: S3, tmp_path: Path) -> None:
    path = lakes.plain().write(tmp_path / "lake")
    (file,) = (path / "trades").rglob("*.parquet")
    pq.write_table(pq.ParquetFile(file).read(), file, row_group_size=5)
    assert pq.read_metadata(file).serialized_size > 65_536
    reader = opened(s3.upload(path, s3 / "lake"))
    s3.asked()
    assert reader.has("trades", TODAY)
    assert requests(s3) == ["LIST", "HEAD", "GET", "GET"]
    assert len(reader.read_trades(TODAY).ts) == 600


# ---- faults -----------------------------------------------------------------------------------------


@pytest.fixture
def lake(s3: S3, tmp_path: Path) -> Location:
    return s3.upload(lakes.over_midnight(days=2).write(tmp_path / "lake"), s3 / "lake")


def file_of(lake: Location, table: str) -> Location:
    folder = lake / table / f"exchange={EXCHANGE}" / f"date={TODAY}"
    return folder / folder.entries()[0].name


def read_table(reader: SymbolLake, table: str) -> object:
    return reader.read_trades(TODAY) if table == "trades" else reader.read_book(TODAY, table, 5)


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("damage", ["cut off", "empty", "text", "pages"])
def test_fault__broken_file_is_the_days(lake: Location, table: str, damage: str) -> None:
    file = file_of(lake, table)
    whole = file.read()
    spoilt = {"cut off": whole[: len(whole) // 2], "empty": b"", "text": b"not Parquet"}
    file.write(spoilt.get(damage, whole[:4] + b"\xff" * 3_000 + whole[3_004:]))
    with pytest.raises(LakeError, match=r"not a readable Parquet file \(.*\); ingest it again") as caught:
        read_table(opened(lake), table)
    assert str(caught.value).startswith(f"{file}: ")
    error = pickle.loads(pickle.dumps(caught.value))
    assert (error.table, error.day) == (table, TODAY)


REFUSALS = [(a, t, k) for a in ("403 Forbidden", "404 Not Found") for t in TABLES for k in (False, True)]
TRIED_AGAIN = [("500 Internal Server Error", BOOK, True), ("cut", "trades", True)]
"""These take seconds: the client does not give up at once."""


@pytest.mark.parametrize(("answer", "table", "looked"), REFUSALS + TRIED_AGAIN)
def test_fault__store_that_fails_is_not_the_days(
    s3: S3, lake: Location, answer: str, table: str, looked: bool
) -> None:
    """Whenever the store begins to fail, also in the middle of a file, no LakeError lets a day be skipped."""
    reader = opened(lake)
    if looked:
        reader.look(table, [TODAY])
    s3.server.spoil = lambda line: answer if line.startswith("GET") else None
    with pytest.raises(OSError, match=r"\[Errno \d+\] .*AWS Error.*'s3://") as caught:
        read_table(reader, table)
    assert caught.value.errno == errno.EIO
    assert "\n" not in str(caught.value)


def test_fault__listing_that_is_refused(s3: S3, lake: Location) -> None:
    reader = opened(lake)
    s3.server.spoil = lambda line: "403 Forbidden" if line.startswith("LIST") else None
    for act in (lambda: reader.has("trades", TODAY), lambda: reader.look("trades", DAYS)):
        with pytest.raises(OSError, match="AWS Error ACCESS_DENIED"):
            act()
    with pytest.raises(OSError, match="AWS Error ACCESS_DENIED"):
        reader.days("trades")
    assert reader.seen() == {}


def test_fault__bucket_that_has_gone(s3: S3, lake: Location) -> None:
    reader = SymbolLake(Location("s3://no-such-bucket-at-all/lake"), opened(lake).symbol)
    with pytest.raises(FileNotFoundError, match="the lake has gone: 's3://no-such-bucket-at-all/lake'"):
        reader.has("trades", TODAY)
    with pytest.raises(LakeError, match="no such lake") as caught:
        opened(reader.root)
    assert not hasattr(caught.value, "day")


def test_fault__no_connection_within_seconds(s3: S3, lake: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = opened(lake)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    start = time.monotonic()
    with pytest.raises(OSError, match=r"Could not connect.*: 's3://") as caught:
        reader.look("trades", DAYS)
    assert time.monotonic() - start < 30
    assert caught.value.errno == errno.EIO
    assert "\n" not in str(caught.value)


def test_fault__file_that_changes_under_a_run(lake: Location) -> None:
    reader = opened(lake)
    assert reader.has("trades", TODAY)
    file = file_of(lake, "trades")
    file.write(file.read()[:-1] + b"2")
    with pytest.raises(OSError, match=f"has changed while it was in use; run again: '{file}'") as caught:
        reader.read_trades(TODAY)
    assert caught.value.errno == errno.ESTALE
    file.remove()
    with pytest.raises(FileNotFoundError):
        reader.read_trades(TODAY)


def test_open_symbol__what_is_missing(s3: S3, lake: Location) -> None:
    with pytest.raises(LakeError, match=f"no symbol {DECOY} of {EXCHANGE}; the lake has"):
        opened(lake, DECOY)
    with pytest.raises(LakeError, match=r"s3://.*/nothing: no such lake; make one with"):
        opened(s3 / "nothing")
    (lake / manifest.JOURNAL_FILE).write(b"{}")
    with pytest.raises(LakeError, match="an ingest was cut off between two renames"):
        opened(lake)


def test_open_symbol__broken_dim_symbol(lake: Location) -> None:
    (lake / "dim_symbol.parquet").write(b"junk")
    with pytest.raises(LakeError, match=r"s3://.*/dim_symbol\.parquet: not a readable Parquet file"):
        opened(lake)

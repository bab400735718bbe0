"""Tardis CSV into the lake: every oddity of a file, exact numbers, and commits that are all or nothing."""

from __future__ import annotations

import csv
import datetime as dt
import gzip
import json
import random
import tempfile
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clusterlob_gpu.errors import InputError, LakeError
from clusterlob_gpu.lake import csv_blocks, manifest
from clusterlob_gpu.lake.increments import NotMultipleError, StepTracker, decimal_increment, to_integers
from clusterlob_gpu.lake.layout import PartitionWriter, day_of_us, day_start_us, file_stem, symbol_files
from clusterlob_gpu.lake.manifest import FileKey, read_manifest
from clusterlob_gpu.lake.runs import id_keys
from clusterlob_gpu.lake.symbols import read_dim_symbol, symbol_id
from clusterlob_gpu.lake.tardis import IngestReport, ingest_tardis
from clusterlob_gpu.schema import LAKE_TABLES, MAX_TS, TRADES, US_PER_DAY

CAPTURES = Path(__file__).parents[2] / "shared" / "data" / "tardis"
needs_captures = pytest.mark.skipif(
    not CAPTURES.is_dir(), reason="the real captures in ../shared/data are absent"
)

DAY = dt.date(2024, 5, 1)
NOON = day_start_us(DAY) + US_PER_DAY // 2
TRADE_HEADER = "exchange,symbol,timestamp,local_timestamp,id,side,price,amount"
QUOTE_HEADER = "exchange,symbol,timestamp,local_timestamp,ask_amount,ask_price,bid_price,bid_amount"


def trade(
    ts: int,
    number: object = 1,
    side: str = "buy",
    price: object = "100.5",
    amount: object = "1",
    late: int = 5,
) -> str:
    return f"binance-futures,BTCUSDT,{ts - late},{ts},{number},{side},{price},{amount}"


def quote(ts: int, bid: str, ask: str, bid_size: str = "1", ask_size: str = "2") -> str:
    return f"binance-futures,BTCUSDT,{ts},{ts},{ask_size},{ask},{bid},{bid_size}"


def put(
    root: Path,
    rows: list[str],
    kind: str = "trades",
    day: dt.date = DAY,
    symbol: str = "BTCUSDT",
    header: str = TRADE_HEADER,
) -> Path:
    path = root / "binance-futures" / kind / day.strftime("%Y/%m/%d") / f"{symbol}.csv.gz"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress("".join(f"{row}\n" for row in [header, *rows]).encode()))
    return path


def read(lake: Path, table: str = "trades") -> pd.DataFrame:
    """All rows of a table, file by file in the order of partitions."""
    files = sorted((lake / table).glob("exchange=*/date=*/*.parquet"))
    tables = [pq.ParquetFile(path).read() for path in files]
    assert all(part.schema.equals(LAKE_TABLES[table]) for part in tables)
    return pa.concat_tables(tables).to_pandas() if tables else LAKE_TABLES[table].empty_table().to_pandas()


def units_at(lake: Path, ts: int, symbol: str = "BTCUSDT") -> pd.Series:
    rows = read_dim_symbol(lake)
    rows = rows[(rows.exchange_symbol == symbol) & (rows.valid_from_ts <= ts) & (ts < rows.valid_until_ts)]
    assert len(rows) == 1
    return rows.iloc[0]


def decoded(lake: Path, column: str, unit: str, table: str = "trades") -> list[Decimal]:
    """Exact values: the integer times the decimal increment that holds at its time."""
    rows = read(lake, table)
    return [
        int(n) * Decimal(repr(float(units_at(lake, ts)[unit])))
        for n, ts in zip(rows[column], rows.ts_local_us, strict=True)
    ]


def visible(lake: Path) -> dict[str, tuple[int, bytes]]:
    """Every file that a reader would see, with its time of change and content."""
    files = (path for path in lake.rglob("*.parquet") if path.name != manifest.MANIFEST_FILE)
    return {str(path.relative_to(lake)): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def leftovers(lake: Path) -> list[Path]:
    return [
        path for path in lake.rglob("*") if path.name.endswith(".tmp") or path.name == manifest.JOURNAL_FILE
    ]


def ingest_rows(tmp_path: Path, rows: list[str], **options: object) -> tuple[Path, IngestReport]:
    put(tmp_path / "src", rows, **options)  # type: ignore[arg-type]
    return tmp_path / "lake", ingest_tardis(tmp_path / "src", tmp_path / "lake")


# ---- layout ------------------------------------------------------------------------------------------


def trades_table(n: int) -> pa.Table:
    values = {field.name: np.arange(n) for field in reversed(list(TRADES))}
    small = {"exchange_id": np.full(n, 2), "side": np.arange(n) % 2}
    return pa.table({"further": np.arange(n)} | values | small | {"trade_id": [str(i) for i in range(n)]})


def test_partition_writer__groups_rows_and_packs_integers(tmp_path):
    rows = trades_table(300_000)
    with PartitionWriter(tmp_path, "trades", "x", DAY, file_stem("A-B", 7)) as writer:
        for batch in rows.to_batches(50_000):
            writer.write(batch)
        assert symbol_files(tmp_path, "trades", "x", DAY, "A-B") == []
    path = tmp_path / "trades" / "exchange=x" / "date=2024-05-01" / "A-B-000007.parquet"
    meta = pq.read_metadata(path)
    assert [meta.row_group(i).num_rows for i in range(3)] == [131_072, 131_072, 37_856]
    assert "DELTA_BINARY_PACKED" in meta.row_group(0).column(6).encodings
    assert meta.row_group(0).column(6).compression == "ZSTD"
    assert pq.ParquetFile(path).read().equals(rows.select(TRADES.names).cast(TRADES))
    assert symbol_files(tmp_path, "trades", "x", DAY, "A-B") == [path]
    assert symbol_files(tmp_path, "trades", "x", DAY, "A") == []


def test_partition_writer__abort_leaves_the_old_file(tmp_path):
    for n in (3, 5):
        with PartitionWriter(tmp_path, "trades", "x", DAY, "A-000001") as writer:
            writer.write(trades_table(n))
    with (
        pytest.raises(ZeroDivisionError),
        PartitionWriter(tmp_path, "trades", "x", DAY, "A-000001") as writer,
    ):
        writer.write(trades_table(9))
        raise ZeroDivisionError
    (path,) = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert pq.read_metadata(path).num_rows == 5


def test_days__are_utc_days():
    assert day_start_us(dt.date(1970, 1, 2)) == US_PER_DAY
    assert day_of_us(day_start_us(DAY) - 1) == dt.date(2024, 4, 30)
    assert day_of_us(day_start_us(DAY)) == DAY


# ---- integers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("decimals", [0, 1, 2, 8, 12])
def test_to_integers__is_exact_up_to_15_digits(decimals):
    integers = np.random.default_rng(decimals).integers(-(10**15) + 1, 10**15, 5000)
    values = np.array([float(Decimal(int(n)).scaleb(-decimals)) for n in integers])
    got = to_integers(values, Fraction(1, 10**decimals))
    np.testing.assert_array_equal(got.values, integers)
    assert got.rounded == 0


def test_to_integers__odd_increments_missing_cells_and_noise():
    got = to_integers(np.array([[0.15, np.nan], [0.1 + 0.2, -0.05]]), Fraction(1, 20))
    assert got.values.tolist() == [[3, 0], [6, -1]]
    assert got.rounded == 1
    assert to_integers(np.array([15.0, 37.5]), Fraction(5, 2)).values.tolist() == [6, 15]


@pytest.mark.parametrize("value", [0.125, np.inf, 2.0**53])
def test_to_integers__refuses_what_does_not_fit(value):
    with pytest.raises(NotMultipleError) as caught:
        to_integers(np.array([1.0, value, 1.0]), Fraction(1, 100))
    assert caught.value.index == 1
    assert caught.value.values.tolist() == [value]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([5000.0, 10.0], Fraction(1)),
        ([1.5, 2.25], Fraction(1, 100)),
        ([1e-12], Fraction(1, 10**12)),
        ([np.inf], None),
    ],
)
def test_decimal_increment__is_the_coarsest_that_fits(values, expected):
    assert decimal_increment(np.array(values)) == expected


def test_step_tracker__is_the_gcd_of_all_that_it_saw():
    tracker = StepTracker()
    assert tracker.step is None
    for values, expected in [([0], None), ([50, 0], 1), ([100, 150], 50), ([175], 25), ([25 * 7], 25)]:
        tracker.add(np.array(values))
        assert tracker.step == expected


def test_id_keys__equal_ids_have_equal_keys_in_any_company():
    alone, mixed = id_keys(pa.array(["12", "7"])), id_keys(pa.array(["7", "a-b", "12", "9" * 30]))
    assert alone.tolist() == [12, 7]
    assert mixed[[2, 0]].tolist() == [12, 7]
    assert len(set(mixed.tolist())) == 4


# ---- paths -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("below", [".", "binance-futures", "binance-futures/trades/2024", "file"])
def test_source__may_begin_at_any_depth(tmp_path, below):
    path = put(tmp_path / "src", [trade(NOON)])
    report = ingest_tardis(path if below == "file" else tmp_path / "src" / below, tmp_path / "lake")
    assert [(file.exchange, file.table, file.symbol, file.day) for file in report.files] == [
        ("binance-futures", "trades", "BTCUSDT", DAY)
    ]
    assert (report.rows_in, report.rows_written, report.unchanged) == (1, 1, 0)
    stored = tmp_path / "lake/trades/exchange=binance-futures/date=2024-05-01/BTCUSDT-000001.parquet"
    assert report.files[0].outputs == (stored,)


def test_source__flat_names_plain_text_and_ignored_types(tmp_path):
    flat = tmp_path / "binance-futures_book_ticker_2024-05-01_BTCUSDT.csv"
    flat.write_text(f"{QUOTE_HEADER}\n{quote(NOON, '9.5', '10')}\n")
    (tmp_path / "binance-futures_incremental_book_L2_2024-05-01_BTCUSDT.csv.gz").write_bytes(b"")
    (tmp_path / "notes.csv").write_text("a\n")
    report = ingest_tardis(tmp_path, tmp_path / "lake")
    assert [file.table for file in report.files] == ["quotes"]
    assert [name for name, _ in report.ignored] == [
        "binance-futures_incremental_book_L2_2024-05-01_BTCUSDT.csv.gz",
        "notes.csv",
    ]
    assert "incremental_book_L2 has no table" in report.ignored[0][1]


def test_source__filters_and_what_they_say_when_nothing_is_left(tmp_path):
    source, lake = tmp_path / "src", tmp_path / "lake"
    for shift in range(3):
        day = DAY + dt.timedelta(days=shift)
        put(source, [trade(NOON + shift * US_PER_DAY)], day=day)
        put(source, [trade(NOON + shift * US_PER_DAY).replace("BTC", "ETH")], day=day, symbol="ETHUSDT")
    options = {
        "symbols": ["ethusdt"],
        "exchanges": ["binance-futures"],
        "start": DAY,
        "end": DAY + dt.timedelta(days=1),
    }
    seen = []
    report = ingest_tardis(source, lake, tables=["trades"], progress=seen.append, **options)
    assert [(file.symbol, file.day.day) for file in report.files] == [("ETHUSDT", 1), ("ETHUSDT", 2)]
    assert [(item.number, item.of, item.rows) for item in seen] == [(1, 2, 1), (2, 2, 1)]
    with pytest.raises(
        LakeError, match=r"none of its 6 files.*binance-futures BTCUSDT.*2024-05-01 to 2024-05-03"
    ):
        ingest_tardis(source, lake, symbols=["SOLUSDT"])


def test_source__nothing_there(tmp_path):
    with pytest.raises(InputError, match="no such file or folder"):
        ingest_tardis(tmp_path / "absent", tmp_path / "lake")
    with pytest.raises(LakeError, match="nothing to ingest"):
        ingest_tardis(tmp_path, tmp_path / "lake")
    assert not (tmp_path / "lake").exists()


def test_source__of_two_types_for_one_table_the_richer_is_taken(tmp_path):
    source, lake = tmp_path / "src", tmp_path / "lake"
    ticker = put(source, [quote(NOON, "9.5", "10")], "book_ticker", header=QUOTE_HEADER)
    ingest_tardis(source, lake)
    put(source, [quote(NOON, "9.5", "10"), quote(NOON + 1, "9.5", "10")], "quotes", header=QUOTE_HEADER)
    report = ingest_tardis(source, lake)
    assert len(read(lake, "quotes")) == 2
    assert [reason for _, reason in report.ignored] == ["quotes of that day is taken"]
    report = ingest_tardis(ticker, lake)
    assert [reason for _, reason in report.ignored] == ["the lake has quotes of that day"]
    assert len(read(lake, "quotes")) == 2
    copy = source / "binance-futures_quotes_2024-05-01_BTCUSDT.csv"
    copy.write_text(QUOTE_HEADER)
    with pytest.raises(LakeError, match="are both quotes of binance-futures BTCUSDT on 2024-05-01"):
        ingest_tardis(source, lake)


# ---- columns and cells -------------------------------------------------------------------------------


def test_header__order_extra_columns_and_case_of_the_symbol(tmp_path):
    lake, report = ingest_rows(
        tmp_path,
        [
            f"x,0.25,buy,btcusdt,{NOON},77,binance-futures,{NOON - 9},100.5",
            f"y,1,sell,BTCUSDT,{NOON},78,binance-futures,{NOON},99",
        ],
        header="further,amount,side,symbol,local_timestamp,id,exchange,timestamp,price",
    )
    rows = read(lake)
    assert rows.trade_id.tolist() == ["77", "78"]
    assert rows.ts_exch_us.tolist() == [NOON - 9, NOON]
    assert rows.side.tolist() == [0, 1]
    assert rows.exchange_id.tolist() == [2, 2]
    assert rows.symbol_id.tolist() == [symbol_id("binance-futures", "BTCUSDT")] * 2
    assert rows.file_line_number.tolist() == [2, 3]
    assert decoded(lake, "price_int", "price_increment") == [Decimal("100.5"), 99]
    assert decoded(lake, "qty_int", "amount_increment") == [Decimal("0.25"), 1]
    assert report.anomalies == {}


BAD_FILES = {
    "missing column": (TRADE_HEADER.replace(",price", ",cost"), [], r"line 1: column price is missing"),
    "column twice": (f"{TRADE_HEADER},price", [], r"line 1: column price appears twice"),
    "other symbol": (
        None,
        [trade(NOON), "", trade(NOON).replace("BTC", "ETH")],
        r"line 4: symbol is 'ETHUSDT', the path says 'BTCUSDT'",
    ),
    "other exchange": (
        None,
        [trade(NOON).replace("-futures", "")],
        r"line 2: exchange is 'binance', the path says 'binance-futures'",
    ),
    "side": (None, [trade(NOON), trade(NOON, side="Buy")], r"line 3: side is 'Buy'"),
    "milliseconds": (
        None,
        [trade(NOON // 1000)],
        r"line 2: local_timestamp is \d{13} \(13 digits: milliseconds\)",
    ),
    "no local time": (None, [trade(NOON).replace(f",{NOON},", ",,")], r"line 2: local_timestamp is empty"),
    "text for a number": (
        None,
        [trade(NOON), trade(NOON, price="1O0")],
        r"line 3: column price: .*invalid value '1O0'",
    ),
    "fields": (None, [trade(NOON)] * 3 + [trade(NOON) + ",1"], r"line 5: 9 fields, the header has 8"),
    "short line": (None, [trade(NOON)] * 3 + ["binance-futures,BTC"], r"line 5: 2 fields, the header has 8"),
    "empty price": (None, [trade(NOON, price="")], r"line 2: price is empty"),
    "infinite": (None, [trade(NOON, price="inf")], r"line 2: price inf cannot be held"),
    "too many digits": (
        None,
        [trade(NOON, amount="90071992547409.25"), trade(NOON, amount="0.001")],
        r"cannot be held with 53 bits",
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_file__names_file_and_line_and_leaves_the_lake(tmp_path, case):
    header, rows, message = BAD_FILES[case]
    source, lake = tmp_path / "src", tmp_path / "lake"
    put(source, [trade(NOON - US_PER_DAY)], day=DAY - dt.timedelta(days=1))
    bad = put(source, rows, header=header or TRADE_HEADER)
    put(source, [quote(NOON, "1", "2")], "quotes", header=QUOTE_HEADER)
    with pytest.raises(LakeError, match=message) as caught:
        ingest_tardis(source, lake)
    assert str(bad) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert leftovers(lake) == []
    assert [len(read(lake)), len(read(lake, "quotes"))] == [1, 0]
    put(source, [trade(NOON)])
    report = ingest_tardis(source, lake)
    assert (report.unchanged, report.rows_written) == (1, 2)


@pytest.mark.parametrize("block_bytes", [4 << 20, 4096])
def test_bad_file__truncated_gzip_names_the_line_reached(tmp_path, monkeypatch, block_bytes):
    monkeypatch.setattr(csv_blocks, "BLOCK_BYTES", block_bytes)
    rng = random.Random(3)
    path = put(tmp_path / "src", [trade(NOON + i, i, price=rng.random()) for i in range(5000)])
    packed = path.read_bytes()
    path.write_bytes(packed[: len(packed) // 2])
    with pytest.raises(LakeError, match=r"the gzip stream ends early after line (\d+); download") as caught:
        ingest_tardis(tmp_path / "src", tmp_path / "lake")
    reached = int(str(caught.value).split("line ")[1].split(";")[0])
    assert 2000 < reached < 3500
    path.write_bytes(packed[:-8] + b"\0" * 8)
    with pytest.raises(LakeError, match=r"CRC check failed.* after line 5001"):
        ingest_tardis(tmp_path / "src", tmp_path / "lake")
    assert visible(tmp_path / "lake") == {}
    assert leftovers(tmp_path / "lake") == []


def test_empty_file__header_only_is_fine_and_no_header_is_not(tmp_path):
    lake, report = ingest_rows(tmp_path, [])
    assert (report.files[0].rows_in, report.files[0].outputs, report.files[0].median_latency_us) == (
        0,
        (),
        None,
    )
    assert ingest_tardis(tmp_path / "src", lake).unchanged == 1
    path = put(tmp_path / "src", [])
    path.write_bytes(b"")
    with pytest.raises(LakeError, match="the file is empty, a header line was expected"):
        ingest_tardis(tmp_path / "src", lake)


def test_text__blank_lines_crlf_and_no_last_line_end(tmp_path):
    path = put(tmp_path / "src", [])
    lines = [TRADE_HEADER, "", trade(NOON, 1), "  ", "", trade(NOON, 2), trade(NOON, 3)]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())  # not packed in spite of its name
    report = ingest_tardis(tmp_path / "src", tmp_path / "lake")
    rows = read(tmp_path / "lake")
    assert rows.file_line_number.tolist() == [3, 6, 7]
    assert rows.trade_id.tolist() == ["1", "2", "3"]
    assert report.anomalies == {"blank_lines": 3}


# ---- trades ------------------------------------------------------------------------------------------


def test_trades__sides_and_values_that_are_no_trade(tmp_path):
    rows = [trade(NOON, i, side) for i, side in enumerate(["buy", "sell", "unknown", ""])]
    rows += [trade(NOON, 10, price="0"), trade(NOON, 11, amount="-1"), trade(NOON, 12, amount="0")]
    lake, report = ingest_rows(tmp_path, rows)
    assert read(lake).side.tolist() == [0, 1, 2, 2]
    assert report.anomalies == {"unknown_side": 2, "nonpositive_dropped": 3}
    assert (report.rows_in, report.rows_written) == (7, 4)


@pytest.mark.parametrize("block_bytes", [4 << 20, 100])
@pytest.mark.parametrize("prefix", ["", "uuid-"])
def test_trades__exact_duplicates_go_and_conflicts_stay(tmp_path, monkeypatch, block_bytes, prefix):
    monkeypatch.setattr(csv_blocks, "BLOCK_BYTES", block_bytes)
    again = trade(NOON + 7, f"{prefix}1", late=12)  # received later, the same trade
    rows = [
        trade(NOON, f"{prefix}1"),
        trade(NOON + 1, f"{prefix}2"),
        again,
        trade(NOON + 8, f"{prefix}2", price="101"),
        trade(NOON + 9, "", late=0),
        trade(NOON + 9, "", late=0),
        trade(NOON + 9, f"{prefix}3"),
    ]
    lake, report = ingest_rows(tmp_path, rows)
    assert read(lake).file_line_number.tolist() == [2, 3, 5, 6, 7, 8]
    assert report.anomalies == {"duplicates_dropped": 1, "conflicting_ids": 1}


@settings(max_examples=30, deadline=None)
@given(
    offsets=st.lists(st.integers(0, 20), min_size=1, max_size=60),
    block_bytes=st.sampled_from([90, 300, 4096]),
)
def test_order__any_disorder_is_sorted_by_time_and_line(offsets, block_bytes):
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(csv_blocks, "BLOCK_BYTES", block_bytes)
        midnight = day_start_us(DAY)
        times = [midnight + offset - 10 for offset in offsets]
        lake, report = ingest_rows(Path(folder), [trade(ts, i, late=0) for i, ts in enumerate(times)])
        got = read(lake)
        expected = sorted((ts, line) for line, ts in enumerate(times, 2))
        assert list(zip(got.ts_local_us, got.file_line_number, strict=True)) == expected
        assert report.anomalies.get("out_of_order", 0) == sum(b < a for a, b in pairwise(times))
        assert report.anomalies.get("rows_other_day", 0) == sum(ts < midnight for ts in times)
        assert {path.name for path in (lake / "trades").rglob("*.parquet")} == {"BTCUSDT-000001.parquet"}
        assert leftovers(lake) == []


def test_rows__go_to_the_day_of_their_own_clock(tmp_path):
    midnight = day_start_us(DAY)
    _, report = ingest_rows(tmp_path, [trade(midnight - 1, 1), trade(midnight, 2)])
    folders = [output.parent.name for output in report.files[0].outputs]
    assert folders == ["date=2024-04-30", "date=2024-05-01"]
    assert [pq.read_metadata(output).num_rows for output in report.files[0].outputs] == [1, 1]
    assert report.anomalies == {"rows_other_day": 1}


def test_clock__negative_and_absent_latency(tmp_path):
    rows = [trade(NOON + i, i, late=late) for i, late in enumerate([-40, -20, 10, 100])]
    rows.append(trade(NOON + 9, 9).replace(f",{NOON + 4},", ",,"))
    lake, report = ingest_rows(tmp_path, rows)
    assert report.anomalies == {"negative_latency": 2, "empty_exchange_time": 1}
    assert report.files[0].negative_latency_share == 0.4
    assert report.files[0].median_latency_us == -5
    assert read(lake).ts_exch_us.iloc[-1] == NOON + 9


def test_liquidations__like_trades_without_ids(tmp_path):
    lake, report = ingest_rows(tmp_path, [trade(NOON, "", "sell")] * 2, kind="liquidations")
    rows = read(lake, "liquidations")
    assert rows.liq_id.tolist() == ["", ""]
    assert rows.side.tolist() == [1, 1]
    assert report.anomalies == {}


# ---- books -------------------------------------------------------------------------------------------


def book_header(levels: int) -> str:
    cells = [
        f"{side}[{i}].{what}"
        for i in range(levels)
        for side in ("asks", "bids")
        for what in ("price", "amount")
    ]
    return ",".join(["exchange,symbol,timestamp,local_timestamp", *cells])


def book(ts: int, *levels: str) -> str:
    return f"binance-futures,BTCUSDT,{ts},{ts}," + ",".join(levels)


def test_book__empty_levels_and_sides_are_null(tmp_path):
    rows = [
        book(NOON, "10.5,1,10,2", "11,3,9.5,4"),
        book(NOON + 1, "10.5,1,10,2", "11,,,"),
        book(NOON + 2, ",,10,2", ",,9.5,4"),
        book(NOON + 3, "10,1,10,2", "11,3,9.5,4"),
        book(NOON + 4, "9.5,1,10,2", "11,3,9,4"),
    ]
    lake, report = ingest_rows(tmp_path, rows, kind="book_snapshot_5", header=book_header(2))
    (path,) = (lake / "book_snapshot_25").rglob("*.parquet")
    table = pq.ParquetFile(path).read()
    assert table["bids_px"].to_pylist() == [[100, 95], [100, None], [100, 95], [100, 95], [100, 90]]
    assert table["asks_px"].to_pylist() == [[105, 110], [105, None], [None, None], [100, 110], [95, 110]]
    assert table["asks_sz"].to_pylist()[:3] == [[1, 3], [1, None], [None, None]]
    assert table["bids_sz"].to_pylist()[:3] == [[2, 4], [2, None], [2, 4]]
    assert report.anomalies == {"empty_levels": 4, "empty_side": 1, "locked": 1, "crossed": 1}
    row = units_at(lake, NOON)
    assert (row.tick_size, row.price_increment, row.lot_size) == (0.5, 0.1, 1.0)
    assert (row.base_asset, row.quote_asset, row.contract_size) == ("BTC", "USDT", 1.0)
    assert (row.valid_from_ts, row.valid_until_ts) == (0, MAX_TS)


def test_book__only_the_first_25_levels_and_all_their_columns(tmp_path):
    row = book(NOON, *(f"{100 + i},1,{99 - i},1" for i in range(30)))
    lake, _ = ingest_rows(tmp_path, [row], kind="book_snapshot_25", header=book_header(30))
    (path,) = (lake / "book_snapshot_25").rglob("*.parquet")
    assert pq.ParquetFile(path).read()["bids_px"].to_pylist() == [list(range(99, 74, -1))]
    put(tmp_path / "src", [], "book_snapshot_25", header=book_header(3).replace(",bids[2].amount", ""))
    with pytest.raises(LakeError, match=r"line 1: column bids\[2\].amount is missing"):
        ingest_tardis(tmp_path / "src", lake)


def test_quotes__empty_and_crossed(tmp_path):
    rows = [
        quote(NOON, "9.5", "10"),
        quote(NOON, "", "10", ""),
        quote(NOON, "11", "10"),
        quote(NOON, "10", "10"),
    ]
    lake, report = ingest_rows(tmp_path, rows, kind="quotes", header=QUOTE_HEADER)
    (path,) = (lake / "quotes").rglob("*.parquet")
    table = pq.ParquetFile(path).read()
    assert table["bid_px_int"].to_pylist() == [95, None, 110, 100]
    assert table["bid_sz_int"].to_pylist() == [1, None, 1, 1]
    assert table["ask_px_int"].to_pylist() == [100] * 4
    assert report.anomalies == {"empty_side": 1, "crossed": 1, "locked": 1}


def test_derivative_ticker__floats_and_nulls(tmp_path):
    header = (
        "exchange,symbol,timestamp,local_timestamp,funding_timestamp,funding_rate,predicted_funding_rate,"
        "open_interest,last_price,index_price,mark_price"
    )
    rows = [book(NOON, f"{NOON + 9}", "0.0001,,12.5,,100.25,100.5"), book(NOON + 1, ",,,,,,")]
    lake, _ = ingest_rows(tmp_path, rows, kind="derivative_ticker", header=header)
    (path,) = (lake / "derivative_ticker").rglob("*.parquet")
    got = (
        pq.ParquetFile(path)
        .read()
        .select(
            [
                "mark_px",
                "index_px",
                "last_px",
                "funding_rate",
                "predicted_funding_rate",
                "funding_ts_us",
                "open_interest",
            ]
        )
    )
    assert [list(row.values()) for row in got.to_pylist()] == [
        [100.5, 100.25, None, 0.0001, None, NOON + 9, 12.5],
        [None] * 7,
    ]

"""Tardis CSV into the lake: every oddity of a file, exact numbers, and commits that are all or nothing."""

from __future__ import annotations

import csv
import datetime as dt
import gzip
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
from clusterlob_gpu.lake.symbols import read_dim_symbol, split_assets, symbol_id, write_dim_symbol
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
        pytest.raises(KeyError, match="ts_local_us"),
        PartitionWriter(tmp_path, "trades", "x", DAY, "A-000001") as writer,
    ):
        writer.write(trades_table(9).drop_columns(["ts_local_us"]))
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
    np.testing.assert_array_equal(got.integers, integers)
    assert got.rounded == 0


def test_to_integers__odd_increments_missing_cells_and_noise():
    got = to_integers(np.array([[0.15, np.nan], [0.1 + 0.2, -0.05]]), Fraction(1, 20))
    assert got.integers.tolist() == [[3, 0], [6, -1]]
    assert got.rounded == 1
    assert to_integers(np.array([15.0, 37.5]), Fraction(5, 2)).integers.tolist() == [6, 15]


@pytest.mark.parametrize("value", [0.125, np.inf, 2.0**53])
def test_to_integers__refuses_what_does_not_fit(value):
    with pytest.raises(NotMultipleError) as caught:
        to_integers(np.array([1.0, value, 1.0]), Fraction(1, 100))
    assert caught.value.index == 1
    assert caught.value.misfits.tolist() == [value]


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
    seen = []
    for values in [[0], [50, 0], [50], [100, 150], [175], [-25 * 7]]:
        tracker.add(np.array(values))
        seen.append((tracker.divisor, tracker.varied))
    assert seen == [(0, False), (50, False), (50, False), (50, True), (25, True), (25, True)]


def test_id_keys__equal_ids_have_equal_keys_in_any_company():
    alone, mixed = id_keys(pa.array(["12", "7"])), id_keys(pa.array(["7", "a-b", "12", "9" * 30]))
    assert alone.tolist() == [12, 7]
    assert mixed[[2, 0]].tolist() == [12, 7]
    assert len(set(mixed.tolist())) == 4


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("BTCUSDT", ("BTC", "USDT")),
        ("ETH-USD", ("ETH", "USD")),
        ("ETHBTC", ("ETH", "BTC")),
        ("AIG", (None, None)),
        ("USD", (None, None)),
    ],
)
def test_split_assets__reads_the_name(name, expected):
    assert split_assets(name) == expected


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
    "infinite": (None, [trade(NOON, price="inf")], r"line 2: price inf has more digits than"),
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
    path = put(tmp_path / "src", [trade(NOON + i, i, price=round(rng.random(), 6)) for i in range(5000)])
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


# ---- increments, ticks and lots ----------------------------------------------------------------------


def day_after(n: int) -> dt.date:
    return DAY + dt.timedelta(days=n)


def put_prices(source: Path, prices: list[str], day: int = 0, kind: str = "trades") -> Path:
    """Trades, or quotes whose bid and ask are consecutive prices."""
    ts = NOON + day * US_PER_DAY
    if kind == "trades":
        return put(
            source, [trade(ts + i, i, price=price) for i, price in enumerate(prices)], day=day_after(day)
        )
    rows = [quote(ts + i, bid, ask) for i, (bid, ask) in enumerate(pairwise(prices))]
    return put(source, rows, kind, day=day_after(day), header=QUOTE_HEADER)


def periods(lake: Path) -> list[tuple[float, float, int, int]]:
    rows = read_dim_symbol(lake)
    assert len(set(rows.symbol_id)) == 1
    return list(
        zip(rows.price_increment, rows.tick_size, rows.valid_from_ts, rows.valid_until_ts, strict=True)
    )


def test_increments__tick_from_the_book_and_finer_trades_between_ticks(tmp_path):
    put_prices(tmp_path / "src", ["100.5", "101", "101.5"], kind="quotes")
    put_prices(tmp_path / "src", ["100.75", "101.123"])
    ingest_tardis(tmp_path / "src", tmp_path / "lake")
    assert periods(tmp_path / "lake") == [(0.001, 0.5, 0, MAX_TS)]
    assert decoded(tmp_path / "lake", "price_int", "price_increment") == [
        Decimal("100.75"),
        Decimal("101.123"),
    ]


def test_increments__finer_value_late_in_the_file_starts_the_group_again(tmp_path, monkeypatch):
    monkeypatch.setattr(csv_blocks, "BLOCK_BYTES", 128)
    put_prices(tmp_path / "src", ["1", "2"], kind="quotes")
    prices = [str(100 + i) for i in range(50)] + ["7.25", "8.125"]
    put_prices(tmp_path / "src", prices)
    ingest_tardis(tmp_path / "src", tmp_path / "lake")
    assert decoded(tmp_path / "lake", "price_int", "price_increment") == [Decimal(price) for price in prices]
    assert periods(tmp_path / "lake") == [(0.001, 1.0, 0, MAX_TS)]
    assert leftovers(tmp_path / "lake") == []


def test_increments__finer_from_a_later_day_makes_a_new_period(tmp_path):
    source, lake = tmp_path / "src", tmp_path / "lake"
    put_prices(source, ["100.5", "101"])
    ingest_tardis(source, lake)
    before = visible(lake)
    put_prices(source, ["100.25", "101"], day=1)
    put_prices(source, ["100", "200"], day=2)
    ingest_tardis(source, lake)
    midnight = day_start_us(day_after(1))
    assert periods(lake) == [(0.1, 0.5, 0, midnight), (0.01, 0.25, midnight, MAX_TS)]
    assert {name: visible(lake)[name] for name in before if "trades" in name} == {
        name: content for name, content in before.items() if "trades" in name
    }
    assert decoded(lake, "price_int", "price_increment") == [
        Decimal(v) for v in ("100.5", "101", "100.25", "101", "100", "200")
    ]


def test_increments__finer_on_an_earlier_day_rescales_what_is_there(tmp_path):
    source, lake = tmp_path / "src", tmp_path / "lake"
    put_prices(source, ["100.5", "101"], day=1)
    put_prices(source, ["100.5", "101", "101.5"], day=1, kind="quotes")
    row = book(NOON + US_PER_DAY, "10.5,1,10,2.5", "11,3,,")
    put(source, [row], "book_snapshot_5", day_after(1), header=book_header(2))
    ingest_tardis(source, lake)
    put_prices(source, ["99.125", "101"])
    ingest_tardis(source, lake)
    midnight = day_start_us(day_after(1))
    # The tick of the trades holds until there is a book.
    assert periods(lake) == [(0.001, 0.125, 0, midnight), (0.001, 0.5, midnight, MAX_TS)]
    assert read(lake).price_int.tolist() == [99125, 101000, 100500, 101000]
    assert decoded(lake, "bid_px_int", "price_increment", "quotes") == [Decimal("100.5"), 101]
    (path,) = (lake / "book_snapshot_25").rglob("*.parquet")
    table = pq.ParquetFile(path).read()
    assert table["bids_px"].to_pylist() == [[10000, None]]
    assert table["asks_px"].to_pylist() == [[10500, 11000]]
    assert table["bids_sz"].to_pylist() == [[25, None]]
    assert ingest_tardis(source, lake).unchanged == 4
    assert leftovers(lake) == []


def test_increments__finer_file_of_the_same_day_rescales_the_others(tmp_path):
    source, lake = tmp_path / "src", tmp_path / "lake"
    put_prices(source, ["100", "101"], day=0)
    put_prices(source, ["100", "102"], day=1)
    ingest_tardis(source, lake)
    put_prices(source, ["100.5", "101"], day=1, kind="quotes")
    ingest_tardis(source, lake)
    assert read(lake).price_int.tolist() == [100, 101, 1000, 1020]
    midnight = day_start_us(day_after(1))
    assert periods(lake) == [(1.0, 1.0, 0, midnight), (0.1, 0.5, midnight, MAX_TS)]


def test_increments__rows_of_the_evening_before_use_its_units(tmp_path):
    source, lake = tmp_path / "src", tmp_path / "lake"
    put_prices(source, ["100", "101"])
    ingest_tardis(source, lake)
    midnight = day_start_us(day_after(1))
    put(source, [trade(midnight - 1, 1, price="7"), trade(midnight, 2, price="7.5")], day=day_after(1))
    ingest_tardis(source, lake)
    assert periods(lake) == [(1.0, 1.0, 0, midnight), (0.1, 0.5, midnight, MAX_TS)]
    assert read(lake).price_int.tolist() == [100, 101, 7, 75]


def test_increments__one_value_alone_tells_no_tick_but_refines_one(tmp_path):
    source, lake = tmp_path / "src", tmp_path / "lake"
    put_prices(source, ["7.5"])
    ingest_tardis(source, lake)
    assert periods(lake) == [(0.1, 0.1, 0, MAX_TS)]
    put_prices(source, ["7.55"], day=1)
    ingest_tardis(source, lake)
    midnight = day_start_us(day_after(1))
    assert periods(lake) == [(0.1, 0.1, 0, midnight), (0.01, 0.05, midnight, MAX_TS)]


def test_increments__float_noise_is_rounded_and_counted(tmp_path):
    lake, report = ingest_rows(tmp_path, [trade(NOON, 1, price=0.1 + 0.2), trade(NOON, 2, price=0.1)])
    assert decoded(lake, "price_int", "price_increment") == [Decimal("0.3"), Decimal("0.1")]
    assert report.anomalies == {"rounded_values": 1}


decimals = st.builds(
    lambda digits, places: Decimal(digits).scaleb(-places), st.integers(1, 10**9), st.integers(0, 6)
)


@settings(max_examples=25, deadline=None)
@given(
    days=st.lists(st.lists(st.tuples(decimals, decimals), min_size=1, max_size=8), min_size=1, max_size=4),
    order=st.randoms(),
)
def test_round_trip__decimals_come_back_whatever_the_order_of_days(days, order):
    """Each day is an ingest of its own, in any order: restarts, periods and rescaling together."""
    with tempfile.TemporaryDirectory() as folder:
        root, numbers = Path(folder), list(range(len(days)))
        order.shuffle(numbers)
        for n in numbers:
            ts = NOON + n * US_PER_DAY
            rows = [trade(ts + i, i, price=f"{p:f}", amount=f"{q:f}") for i, (p, q) in enumerate(days[n])]
            ingest_tardis(put(root / "src", rows, day=day_after(n)), root / "lake")
        expected = [pair for day in days for pair in day]
        assert decoded(root / "lake", "price_int", "price_increment") == [price for price, _ in expected]
        assert decoded(root / "lake", "qty_int", "amount_increment") == [amount for _, amount in expected]
        rows = read_dim_symbol(root / "lake")
        assert rows.valid_from_ts.tolist() == [0, *rows.valid_until_ts.tolist()[:-1]]
        assert rows.valid_until_ts.iloc[-1] == MAX_TS


# ---- the same lake in any order ----------------------------------------------------------------------


def test_order_of_days__tick_that_became_finer(tmp_path):
    """Backwards a finer day is known first: the earlier one gets a period of its own."""
    source = tmp_path / "src"
    paths = [put_prices(source, ["100", "100.5", "101.5"]), put_prices(source, ["100.1", "100.2"], day=1)]
    paths.append(put_prices(source, ["99", "99.5"], day=4))
    midnight = day_start_us(day_after(1))
    for number, order in enumerate([(0, 1, 2), (1, 0, 2), (2, 0, 1), (2, 1, 0)]):
        lake = tmp_path / f"lake{number}"
        for n in order:
            ingest_tardis(paths[n], lake)
        assert periods(lake) == [(0.1, 0.5, 0, midnight), (0.1, 0.1, midnight, MAX_TS)]
        assert read(lake).price_int.tolist() == [1000, 1005, 1015, 1001, 1002, 990, 995]


def test_order_of_days__coarser_day_before_keeps_its_own_increment(tmp_path):
    source, lake = tmp_path / "src", tmp_path / "lake"
    put_prices(source, ["100.25", "100.5"], day=1)
    ingest_tardis(source, lake)
    assert periods(lake) == [(0.01, 0.25, 0, MAX_TS)]
    put_prices(source, ["98", "101"])
    ingest_tardis(source, lake)
    midnight = day_start_us(day_after(1))
    assert periods(lake) == [(1.0, 1.0, 0, midnight), (0.01, 0.25, midnight, MAX_TS)]
    assert read(lake).price_int.tolist() == [98, 101, 10025, 10050]


def test_order_of_files__a_replaced_file_leaves_nothing_behind(tmp_path):
    source, lake = tmp_path / "src", tmp_path / "lake"
    put_prices(source, ["100.125", "101"])
    put_prices(source, ["7", "9.5"], day=1)
    put(
        source,
        [book(NOON + US_PER_DAY, "10.5,1,10,2", "11,3,,")],
        "book_snapshot_5",
        day_after(1),
        header=book_header(2),
    )
    ingest_tardis(source, lake)
    assert read(lake).price_int.tolist() == [100125, 101000, 7000, 9500]
    put_prices(source, ["100", "101"])
    ingest_tardis(source, lake)
    midnight = day_start_us(day_after(1))
    assert periods(lake) == [(1.0, 1.0, 0, midnight), (0.1, 0.5, midnight, MAX_TS)]
    assert read(lake).price_int.tolist() == [100, 101, 70, 95]
    (path,) = (lake / "book_snapshot_25").rglob("*.parquet")
    assert pq.ParquetFile(path).read()["bids_px"].to_pylist() == [[100, None]]
    assert leftovers(lake) == []


def test_evidence__lost_or_edited_units_are_kept_as_they_stand(tmp_path):
    source, lake = tmp_path / "src", tmp_path / "lake"
    put_prices(source, ["100.5", "101"])
    ingest_tardis(source, lake)
    (lake / ".units" / "binance-futures-BTCUSDT.json").unlink()
    write_dim_symbol(lake, read_dim_symbol(lake).assign(tick_size=0.25))
    put_prices(source, ["100", "102"], day=1)
    ingest_tardis(source, lake)
    assert periods(lake) == [(0.1, 0.25, 0, MAX_TS)]
    write_dim_symbol(lake, read_dim_symbol(lake).assign(tick_size=0.1))
    put_prices(source, ["100.25", "102"], day=2)
    ingest_tardis(source, lake)
    midnight = day_start_us(day_after(2))
    assert periods(lake) == [(0.1, 0.1, 0, midnight), (0.01, 0.05, midnight, MAX_TS)]
    assert decoded(lake, "price_int", "price_increment") == [
        Decimal(v) for v in ("100.5", "101", "100", "102", "100.25", "102")
    ]
    (lake / ".units" / "binance-futures-BTCUSDT.json").write_text("{}")
    put_prices(source, ["100"], day=3)
    with pytest.raises(LakeError, match=r"BTCUSDT\.json: not readable; delete it"):
        ingest_tardis(source, lake)


steps = st.sampled_from([Decimal(text) for text in ("10", "1", "0.5", "0.25", "0.1", "0.01", "0.003")])
multiples = st.lists(st.integers(1, 400), max_size=4)


@st.composite
def market_days(draw: st.DrawFn) -> list[tuple[str, int, list[tuple[int, Decimal, Decimal]]]]:
    """Files as (table, day, rows of ts, price and amount); some rows are of the evening before."""
    files = []
    for day in draw(st.lists(st.integers(0, 6), min_size=1, max_size=4, unique=True)):
        tick, lot = draw(steps), draw(steps)
        for table in draw(
            st.lists(st.sampled_from(["trades", "quotes", "liquidations"]), min_size=1, unique=True)
        ):
            prices, early = draw(multiples), draw(st.integers(0, 1))
            start = day_start_us(day_after(day)) - early
            finer = draw(st.sampled_from([1, 1, 4])) if table == "trades" else 1
            rows = [(start + i, n * tick / finer, (n + i) * lot) for i, n in enumerate(prices)]
            files.append((table, day, rows))
    return files


def write_market_file(root: Path, table: str, day: int, rows: list[tuple[int, Decimal, Decimal]]) -> Path:
    if table == "quotes":  # the ask is twice the bid: it has no divisor of its own
        lines = [quote(ts, f"{p:f}", f"{2 * p:f}", f"{q:f}", f"{q:f}") for ts, p, q in rows]
        return put(root, lines, table, day_after(day), header=QUOTE_HEADER)
    lines = [trade(ts, ts, price=f"{p:f}", amount=f"{q:f}") for ts, p, q in rows]
    return put(root, lines, table, day_after(day))


def content(lake: Path) -> list[list[tuple[object, ...]]]:
    """Rows of every table, but for the number of their file, which tells the order of ingest."""
    found = []
    for table in ("trades", "quotes", "liquidations"):
        rows = read(lake, table).drop(columns="file_id")
        found.append(sorted(rows.itertuples(index=False, name=None)))
    return found


def largest_common(values: list[Decimal]) -> Decimal:
    """The divisor by Euclid's algorithm."""
    out = Decimal(0)
    for value in values:
        while value:
            out, value = value, out % value
    return out


def plain_periods(
    files: list[tuple[str, int, list[tuple[int, Decimal, Decimal]]]],
) -> list[tuple[object, ...]]:
    """The rule of `evidence`, midnight by midnight from scratch."""
    files = [file for file in files if file[2]]
    if not files:
        return [(1.0, 1.0, 1.0, 1.0, 0, MAX_TS)]
    first = min(day for _, day, _ in files)
    origin = day_start_us(DAY)

    def increment(values: list[Decimal]) -> Decimal:
        unit = Decimal(1)
        while any(value % unit for value in values):
            unit /= 10
        return unit

    def step(values: list[Decimal]) -> Decimal | None:
        return largest_common(values) if len(set(values)) > 1 else None

    out: list[tuple[object, ...]] = []
    for day in range(first, 8):
        rows = [(p, q) for *_, rows in files for ts, p, q in rows if (ts - origin) // US_PER_DAY <= day]
        prices: dict[str, list[Decimal]] = {"quotes": [], "trades": [], "liquidations": []}
        amounts: list[Decimal] = []
        for table, of_day, file_rows in files:
            own = [row for row in file_rows if (row[0] - origin) // US_PER_DAY == of_day] or file_rows
            if of_day <= day:
                prices[table] += [p for _, p, _ in own]
                prices[table] += [2 * p for _, p, _ in own if table == "quotes"]
                amounts += [q for _, _, q in own if table != "liquidations"]
        price, amount = (increment([row[i] for row in rows]) for i in range(2))
        tick, lot = step(prices["quotes"]) or step(prices["trades"]) or price, step(amounts) or amount
        units = tuple(map(float, (price, amount, tick, lot)))
        start = 0 if day == first else origin + day * US_PER_DAY
        if out and out[-1][:4] == units:
            continue
        if out:
            out[-1] = (*out[-1][:5], start)
        out.append((*units, start, MAX_TS))
    return out


@settings(max_examples=40, deadline=None)
@given(files=market_days(), order=st.randoms(), cuts=st.sets(st.integers(1, 11)))
def test_any_order__of_files_and_calls_gives_the_same_lake(files, order, cuts):
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for file in files:
            write_market_file(root / "all", *file)
        ingest_tardis(root / "all", root / "once")
        shuffled = order.sample(files, len(files))
        for begin, end in pairwise([0, *sorted(cut for cut in cuts if cut < len(files)), len(files)]):
            for file in shuffled[begin:end]:
                write_market_file(root / f"call{begin}", *file)
            ingest_tardis(root / f"call{begin}", root / "lake")
        once, lake = read_dim_symbol(root / "once"), read_dim_symbol(root / "lake")
        pd.testing.assert_frame_equal(once, lake)
        assert content(root / "once") == content(root / "lake")
        columns = [
            "price_increment",
            "amount_increment",
            "tick_size",
            "lot_size",
            "valid_from_ts",
            "valid_until_ts",
        ]
        assert list(lake[columns].itertuples(index=False, name=None)) == plain_periods(files)
        rows = sorted((ts, p, q) for table, _, rows in files if table == "trades" for ts, p, q in rows)
        prices = decoded(root / "lake", "price_int", "price_increment")
        amounts = decoded(root / "lake", "qty_int", "amount_increment")
        assert sorted(zip(read(root / "lake").ts_local_us, prices, amounts, strict=True)) == rows
        assert leftovers(root / "lake") == []


def symbol_table(folder: Path, text: str) -> Path:
    path = folder / "symbols.csv"
    path.write_text(text)
    return path


TABLE_HEADER = "exchange,exchange_symbol,tick_size,lot_size,price_increment,amount_increment"


def test_symbol_table__gives_the_units(tmp_path):
    source, lake = tmp_path / "src", tmp_path / "lake"
    put_prices(source, ["100.5", "101"])
    table = symbol_table(tmp_path, f"{TABLE_HEADER}\nbinance-futures,BTCUSDT,0.1,0.001,0.05,0.001\n")
    ingest_tardis(source, lake, symbol_table=table)
    assert periods(lake) == [(0.05, 0.1, 0, MAX_TS)]
    assert read(lake).price_int.tolist() == [2010, 2020]
    assert read(lake).qty_int.tolist() == [1000, 1000]
    path = put_prices(source, ["100.5", "100.57"], day=1)
    with pytest.raises(
        LakeError, match=r"line 3: price 100.57 is no multiple of .* price_increment 0.05"
    ) as caught:
        ingest_tardis(source, lake, symbol_table=table)
    assert str(path) in str(caught.value)
    coarser = symbol_table(tmp_path, f"{TABLE_HEADER}\nbinance-futures,BTCUSDT,0.1,0.001,0.1,0.001\n")
    with pytest.raises(LakeError, match="increments of binance-futures BTCUSDT differ"):
        ingest_tardis(source, lake, symbol_table=coarser)
    ingest_tardis(source, lake)
    midnight = day_start_us(day_after(1))
    assert periods(lake) == [(0.05, 0.1, 0, midnight), (0.01, 0.01, midnight, MAX_TS)]


def test_symbol_table__periods_may_change_within_a_day(tmp_path):
    source, lake = tmp_path / "src", tmp_path / "lake"
    put_prices(source, ["100", "101", "102"])
    header = f"{TABLE_HEADER},valid_from_ts,valid_until_ts"
    first = f"binance-futures,BTCUSDT,1,1,1,1,0,{NOON + 1}"
    second = f"binance-futures,BTCUSDT,0.5,1,0.1,1,{NOON + 1},{NOON + 3}"
    table = symbol_table(tmp_path, f"{header}\n{first}\n{second}\n")
    ingest_tardis(source, lake, symbol_table=table)
    assert read(lake).price_int.tolist() == [100, 1010, 1020]
    put_prices(source, ["100"], day=1)
    with pytest.raises(LakeError, match=rf"line 2: local_timestamp {NOON + US_PER_DAY} lies in no period"):
        ingest_tardis(source, lake, symbol_table=table)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("exchange,exchange_symbol,tick_size\na,b,1\n", "column lot_size is missing"),
        (f"{TABLE_HEADER}\na,b,1,0,1,1\n", "row 1: lot_size is 0; it must be positive"),
        (f"{TABLE_HEADER}\na,b,1,1,1,1\na,b,1,1,1,1\n", "periods of a b overlap"),
        ("", "no readable symbol table"),
    ],
)
def test_symbol_table__what_is_wrong_with_it(tmp_path, text, message):
    put_prices(tmp_path / "src", ["100"])
    with pytest.raises(InputError, match=message):
        ingest_tardis(tmp_path / "src", tmp_path / "lake", symbol_table=symbol_table(tmp_path, text))


# ---- manifest and commits ----------------------------------------------------------------------------


def test_manifest__tells_each_file_and_rerun_touches_nothing(tmp_path):
    source, lake = tmp_path / "src", tmp_path / "lake"
    put_prices(source, ["100", "-1", "101"])
    put_prices(source, ["100", "101"], kind="quotes")
    ingest_tardis(source, lake)
    rows = sorted(read_manifest(lake).values(), key=lambda row: row.file_id)
    assert [row.key for row in rows] == [
        FileKey("binance-futures", table, "BTCUSDT", DAY) for table in ("quotes", "trades")
    ]
    assert [(row.file_id, row.rows, row.last_line) for row in rows] == [(1, 1, 2), (2, 2, 4)]
    assert rows[1].source == "binance-futures/trades/2024/05/01/BTCUSDT.csv.gz"
    assert rows[1].anomalies == {"nonpositive_dropped": 1}
    path = source / rows[1].source
    assert (rows[1].size, rows[1].sha256) == (path.stat().st_size, manifest.sha256_of(path))
    times = {path: path.stat().st_mtime_ns for path in lake.rglob("*.parquet")}
    report = ingest_tardis(source, lake)
    assert (report.unchanged, report.rows_in, report.rows_written) == (2, 0, 0)
    assert {path: path.stat().st_mtime_ns for path in lake.rglob("*.parquet")} == times
    (lake / rows[1].outputs[0]).unlink()
    assert ingest_tardis(source, lake).rows_written == 2
    assert read(lake).file_id.tolist() == [2, 2]


def test_manifest__a_changed_file_replaces_its_rows_under_its_id(tmp_path):
    source, lake = tmp_path / "src", tmp_path / "lake"
    midnight = day_start_us(DAY)
    put(source, [trade(midnight - 1, 1), trade(midnight, 2)])
    put(source, [trade(midnight - 9, 8)], day=day_after(-1))
    ingest_tardis(source, lake)
    assert read(lake).trade_id.tolist() == ["8", "1", "2"]
    put(source, [trade(midnight, 3), trade(midnight + 1, 4)])
    report = ingest_tardis(source, lake)
    assert (report.unchanged, report.rows_written) == (1, 2)
    rows = read(lake)
    assert rows.trade_id.tolist() == ["8", "3", "4"]
    assert rows.file_id.tolist() == [1, 2, 2]
    assert len(list((lake / "trades").rglob("*.parquet"))) == 2


class Crash(BaseException):
    """Stands for a killed process."""


@pytest.mark.parametrize("step", ["sync", "journal", "first rename", "second rename"])
def test_commit__crash_leaves_the_old_or_the_new_rows(tmp_path, monkeypatch, step):
    """Finer prices on an earlier day: two data files, dim_symbol and the manifest change together."""
    source, lake = tmp_path / "src", tmp_path / "lake"
    put_prices(source, ["100", "101"])
    put_prices(source, ["100", "102"], day=1)
    ingest_tardis(source, lake)
    old = visible(lake)
    put_prices(source, ["100.5", "101"])
    steps_left = iter({"first rename": "c", "second rename": "-c"}.get(step, ""))
    os_replace = manifest.os.replace

    def crash(*args: object) -> None:
        raise Crash

    def replace_until(source: Path, target: Path) -> None:
        if manifest.pending(lake) and next(steps_left) == "c":
            raise Crash
        os_replace(source, target)

    with monkeypatch.context() as patch:
        if step == "sync":
            patch.setattr(manifest, "_sync", crash)
        elif step == "journal":
            patch.setattr(manifest, "_write_journal", crash)
        else:
            patch.setattr(manifest.os, "replace", replace_until)
        with pytest.raises(Crash):
            ingest_tardis(source, lake)
    assert manifest.pending(lake) == ("rename" in step)
    if not manifest.pending(lake):
        assert visible(lake) == old
        assert read(lake).price_int.tolist() == [100, 101, 100, 102]
    report = ingest_tardis(source, lake)
    assert report.unchanged == (2 if "rename" in step else 1)
    assert read(lake).price_int.tolist() == [1005, 1010, 1000, 1020]
    assert periods(lake) == [(0.1, 0.5, 0, MAX_TS)]
    assert leftovers(lake) == []


def test_commit__broken_journal_says_what_to_do(tmp_path):
    put_prices(tmp_path / "src", ["100"])
    (tmp_path / "lake").mkdir()
    (tmp_path / "lake" / manifest.JOURNAL_FILE).write_text("{")
    with pytest.raises(LakeError, match="not readable; delete it"):
        ingest_tardis(tmp_path / "src", tmp_path / "lake")


def test_ingest__concurrent_ones_lose_nothing(tmp_path):
    lake = tmp_path / "lake"
    sources = []
    for n in range(6):
        symbol = f"S{n // 2}USDT"  # two at a time for the same symbol, on different days
        row = trade(NOON + n * US_PER_DAY, n, price=f"{n}.5").replace("BTCUSDT", symbol)
        sources.append(put(tmp_path / f"src{n}", [row], day=day_after(n), symbol=symbol))
    with ThreadPoolExecutor(6) as pool:
        reports = list(pool.map(lambda source: ingest_tardis(source, lake), sources))
    assert sum(report.rows_written for report in reports) == 6
    assert sorted(row.file_id for row in read_manifest(lake).values()) == [1, 2, 3, 4, 5, 6]
    assert read(lake).trade_id.tolist() == ["0", "1", "2", "3", "4", "5"]
    rows = read_dim_symbol(lake)
    # One price alone tells no tick, the second does.
    assert rows.exchange_symbol.tolist() == [f"S{n // 2}USDT" for n in range(6)]
    assert rows.tick_size.tolist() == [0.1, 0.5] * 3


# ---- real captures -----------------------------------------------------------------------------------

CAPTURED_ROWS = {
    "bitstamp/trades": 4_251,
    "bitstamp/book_snapshot_25": 29_992,
    "us-equity/trades": 205_708,
    "binance-futures/trades/2020": 9_999,
    "binance-futures/quotes/2020": 9_999,
    "binance-futures/trades/2023": 12_934,
}


@pytest.fixture(scope="module")
def captured(tmp_path_factory):
    if not CAPTURES.is_dir():
        pytest.skip("the real captures in ../shared/data are absent")
    lake = tmp_path_factory.mktemp("captured")
    return lake, ingest_tardis(CAPTURES, lake)


@needs_captures
def test_captures__row_counts(captured):
    _, report = captured
    for prefix, expected in CAPTURED_ROWS.items():
        assert sum(file.rows_written for file in report.files if file.source.startswith(prefix)) == expected
    assert report.rows_in == report.rows_written == 1_794_517
    assert report.anomalies["empty_levels"] == 29_992 * 10
    ahead = [file.median_latency_us for file in report.files if "/2024/07/" in file.source]
    assert all(-1_530_000 < latency < -1_510_000 for latency in ahead)


CHECKED = [
    ("binance-futures/trades/2024/07/19/ETHUSDT", {"price_int": "price", "qty_int": "amount"}),
    ("binance-futures/quotes/2020/02/22/BTCUSDT", {"bid_px_int": "bid_price", "ask_sz_int": "ask_amount"}),
    ("bitstamp/trades/2015/05/01/BTCUSD", {"price_int": "price", "qty_int": "amount"}),
    (
        "bitstamp/book_snapshot_25/2015/05/01/BTCUSD",
        {
            f"{side}_{ours}": f"{side}[{{}}].{theirs}"
            for side in ("bids", "asks")
            for ours, theirs in (("px", "price"), ("sz", "amount"))
        },
    ),
]


@needs_captures
@pytest.mark.parametrize(("name", "columns"), CHECKED, ids=[name for name, _ in CHECKED])
def test_captures__integers_times_increments_equal_the_text(captured, name, columns):
    """Against the csv module and decimal arithmetic, cell by cell."""
    lake, report = captured
    (file,) = [file for file in report.files if file.source == f"{name}.csv.gz"]
    got = pq.ParquetFile(file.outputs[0]).read()
    dim = read_dim_symbol(lake)
    (row,) = dim[(dim.exchange == file.exchange) & (dim.exchange_symbol == file.symbol)].itertuples()
    units = {True: Decimal(repr(row.price_increment)), False: Decimal(repr(row.amount_increment))}
    with gzip.open(CAPTURES / file.source, "rt") as text:
        rows = list(csv.DictReader(text))
    assert got["ts_local_us"].to_pylist() == [int(cells["local_timestamp"]) for cells in rows]
    assert got["ts_exch_us"].to_pylist() == [int(cells["timestamp"]) for cells in rows]
    assert got["file_line_number"].to_pylist() == list(range(2, len(rows) + 2))
    for ours, theirs in columns.items():
        unit = units["p" in ours.split("_")[-1] or "px" in ours or "price" in ours]
        integers = got[ours].to_pylist()
        if "{}" in theirs:
            for level in range(25):
                texts = [cells[theirs.format(level)] for cells in rows]
                assert [n[level] for n in integers] == [int(Decimal(t) / unit) if t else None for t in texts]
        else:
            assert [n * unit for n in integers] == [Decimal(cells[theirs]) for cells in rows]

"""Lists reduced from the pages of a column, against Python, and against Arrow where the file is damaged."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clusterlob_gpu.files import Location
from clusterlob_gpu.kernels import NO_LEVEL
from clusterlob_gpu.lake import decode, pages

Lists = list[list[int | None] | None]
DELTA = {"use_dictionary": False, "column_encoding": {"a.list.element": "DELTA_BINARY_PACKED"}}
SIZES = [3, 40, 2**33, 2**63 - 1]
"""Largest absolute values: deltas of few bits, of some, of more than 32, and that wrap."""


def expected(lists: Lists, depth: int) -> tuple[list[int], list[int]]:
    """First entries and depth sums, modulo 2^64 as int64."""
    best, total = [], []
    for one in lists:
        held = one or []
        best.append(NO_LEVEL if not held or held[0] is None else held[0])
        total.append(sum(x for x in held[:depth] if x is not None and x > 0))
    return best, [(x + 2**63) % 2**64 - 2**63 for x in total]


def reduced(path: Path, depth: int) -> tuple[list[int], list[int], bool]:
    """What a reader makes of column `a`, and whether it could of all row groups."""
    meta, best, total, ok = pq.read_metadata(path), [], [], True
    levels = pages.list_levels(meta.schema.to_arrow_schema().field("a"))
    assert levels is not None
    with pa.OSFile(str(path)) as file:
        reader = pages.ListReader(file, depth)
        for at in range(meta.num_row_groups):
            group = meta.row_group(at)
            into = np.full((2, group.num_rows), 77)
            ok &= reader.fetch([group.column(0)]) and reader.reduce(group.column(0), levels, *into)
            best += into[0].tolist()
            total += into[1].tolist()
    return best, total, ok


def write(path: Path, lists: Lists, *, nullable: bool = True, empty: bool = True, **how: object) -> None:
    kind = pa.list_(pa.field("element", pa.int64(), nullable=nullable))
    schema = pa.schema([pa.field("a", kind, nullable=empty)])
    pq.write_table(pa.table([pa.array(lists, kind)], schema=schema), path, **DELTA | how)


@st.composite
def columns(draw: st.DrawFn) -> dict[str, object]:
    """Lists as they may be stored: nulls and empty lists or none, any size of page and row group."""
    size, nullable, empty = draw(st.sampled_from(SIZES)), draw(st.booleans()), draw(st.booleans())
    number: st.SearchStrategy[int | None] = st.integers(-size, size)
    some = st.lists(number | st.none() if nullable else number, max_size=30)
    length = draw(st.sampled_from([None, 1, 25]))
    one = some if length is None else st.lists(number, min_size=length, max_size=length)
    return {
        "lists": draw(st.lists(one | st.none() if empty else one, min_size=1, max_size=60)),
        "nullable": nullable,
        "empty": empty,
        "compression": draw(st.sampled_from(["none", "zstd", "snappy"])),
        "write_page_checksum": draw(st.booleans()),
        "row_group_size": draw(st.sampled_from([1, 7, 1000])),
        "data_page_size": draw(st.sampled_from([1, 200, 1 << 20])),
        "write_batch_size": draw(st.sampled_from([1, 10, 1024])),
    }


@settings(deadline=None)
@given(column=columns(), depth=st.integers(1, 25))
def test_reduce__as_python_has_it(tmp_path_factory: pytest.TempPathFactory, column: dict, depth: int) -> None:
    path = tmp_path_factory.mktemp("pages") / "a.parquet"
    write(path, **column)
    best, total, ok = reduced(path, depth)
    assert ok
    assert (best, total) == expected(column["lists"], depth)


def test_reduce__lists_across_pages(tmp_path: Path) -> None:
    lists: Lists = [[i * j for j in range(25)] for i in range(500)]
    write(tmp_path / "a", lists, data_page_size=1, write_batch_size=7)
    assert reduced(tmp_path / "a", 25) == (*expected(lists, 25), True)


OTHER = {
    "a dictionary": {"use_dictionary": True, "column_encoding": None},
    "plain values": {"column_encoding": {"a.list.element": "PLAIN"}},
    "pages of version 2": {"data_page_version": "2.0"},
    "another codec": {"compression": "brotli"},
}


@pytest.mark.parametrize("how", OTHER)
def test_reduce__leaves_the_rest_to_arrow(tmp_path: Path, how: str) -> None:
    lists: Lists = [[i, None, 3] for i in range(50)]
    write(tmp_path / "a", lists, **OTHER[how])
    assert not reduced(tmp_path / "a", 2)[2]


@pytest.mark.parametrize(
    "kind", [pa.int64(), pa.list_(pa.int32()), pa.list_(pa.int64(), 3), pa.list_(pa.float64())], ids=str
)
def test_list_levels__of_other_columns(kind: pa.DataType) -> None:
    assert pages.list_levels(pa.field("a", kind)) is None


@pytest.mark.parametrize("how", ["zstd", "none"])
def test_levels__damage_is_arrows_to_tell(tmp_path: Path, how: str) -> None:
    """Flipped bits: what is still read is what Arrow reads, or Arrow refuses it."""
    rng, path = random.Random(3), tmp_path / "book.parquet"
    lists: Lists = [[rng.randrange(100) for _ in range(25)] for _ in range(200)]
    kind = pa.list_(pa.int64())
    names = list(decode.LISTS)
    encoding = {f"{name}.list.element": "DELTA_BINARY_PACKED" for name in names}
    table = pa.table({name: pa.array(lists, kind) for name in names})
    pq.write_table(
        table, path, use_dictionary=False, column_encoding=encoding, compression=how, write_page_checksum=True
    )
    whole, meta, told = path.read_bytes(), pq.read_metadata(path), 0
    sound = read(path, meta)
    for _ in range(150):
        at = rng.randrange(4, meta.row_group(0).column(3).data_page_offset)
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << rng.randrange(8)]) + whole[at + 1 :])
        try:
            found = read(path, meta)
        except (pa.ArrowException, OSError):
            told += 1
        else:
            for name, values in sound.items():
                np.testing.assert_array_equal(found[name], values)
    assert told > 100


def test_reduce__a_count_that_is_none(tmp_path: Path) -> None:
    """Bytes in the place of the number of values, which no checksum covers."""
    path = tmp_path / "a"
    write(path, [[1, 2]] * 50, compression="none")
    whole = path.read_bytes()
    at = whole.index(b"\x15\xc8\x01")  # field 1 of the data page's header: 100 values
    path.write_bytes(whole[:at] + b"\x18\x01" + whole[at + 2 :])
    assert not reduced(path, 2)[2]


@pytest.mark.parametrize(
    ("kinds", "starts"),
    [([2, 0, 2], [0, 1]), ([0, 2], [0]), ([2, 0], [0])],
    ids=["after_another", "first", "empty"],
)
def test_with_nulls__nothing_goes_on_in_an_empty_list(kinds: list[int], starts: list[int]) -> None:
    values, levels = np.arange(9), np.array(kinds, np.uint8)
    count = kinds.count(2)
    assert pages._with_nulls(values, count, levels, 1, 2, np.array(starts, np.int32))[1] == -1


@pytest.mark.parametrize(("level", "found"), [(0, (8, 4)), (1, (8, 1)), (2, (-1, 0))])
def test_list_starts__a_run_of_levels_that_there_are_not(level: int, found: tuple[int, int]) -> None:
    """A level 0, and three that are equal."""
    data = np.array([4, 0, 0, 0, 1 << 1, 0, 3 << 1, level], np.uint8)
    assert pages._list_starts(data, 0, len(data), np.empty(4, np.int32)) == found


def read(path: Path, meta: pq.FileMetaData) -> dict[str, np.ndarray]:
    with pa.OSFile(str(path)) as file:
        return decode.levels(Location.of(path), file, meta, [0], 5)


def test_levels__cut_off_bytes_of_pages_without_checksum(tmp_path: Path) -> None:
    """Bits that nothing checks may give other values, but no error of ours and no end of the process."""
    rng, path = random.Random(4), tmp_path / "a"
    write(path, [[rng.randrange(100), None] for _ in range(300)], compression="none")
    whole, size = path.read_bytes(), pq.read_metadata(path).row_group(0).column(0).total_compressed_size
    for _ in range(400):
        at = rng.randrange(4, size)
        path.write_bytes(whole[:at] + rng.randbytes(2) + whole[at + 2 :])
        try:
            pq.read_metadata(path)
        except (pa.ArrowException, OSError):
            continue
        assert len(reduced(path, 5)[0]) == 300

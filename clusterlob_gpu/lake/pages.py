"""First entries and depth sums of lists of integers, straight from the pages of a Parquet column.

A snapshot has a hundred values, of which ten or so are wanted; to make lists of the others is most of
what Arrow does for a lake.  Here a page of deltas is unpacked and reduced in one go.  What is not as
this lake writes it (another encoding, another kind of page, a fault of any sort) is left to Arrow, which
reads all of Parquet and knows what to say of damage.

Parquet format 2.11: Encodings.md (RLE hybrid, DELTA_BINARY_PACKED), parquet.thrift (PageHeader).
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from operator import add
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numba import njit

from clusterlob_gpu.kernels import NO_LEVEL, levels_of

_pass = njit(cache=True, nogil=True, error_model="numpy")

_CODECS = {"UNCOMPRESSED": None, "ZSTD": "zstd", "SNAPPY": "snappy"}
_DATA_PAGE, _RLE, _DELTA = 0, 3, 5
"""Numbers of a kind of page and of two encodings."""
_BLOCK = 1024
"""Most deltas of a block; Arrow writes 128."""
_LOWEST = np.array([0, *((byte & -byte).bit_length() - 1 for byte in range(1, 256))])
"""Number of the lowest bit of a byte."""
_TILE = 4096
"""Values that are held at once."""
_MOST_VALUES = 1 << 26
"""Of a chunk; a footer that tells of more is damaged, or its columns too large for one worker."""


class Levels(NamedTuple):
    """Definition levels of a list column: of an entry, null or not, and of one that is not null."""

    entry: int
    value: int


def list_levels(field: pa.Field) -> Levels | None:
    """Definition levels of a column of lists of int64; None for any other column."""
    kind = field.type
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)) or kind.value_type != pa.int64():
        return None
    entry = int(field.nullable) + 1
    return Levels(entry, entry + int(kind.value_field.nullable))


class ListReader:
    """Reduces list columns of a file; what it takes memory for serves it again from page to page."""

    def __init__(self, file: pa.NativeFile, depth: int) -> None:
        self._file, self._depth = file, depth
        self._first, self._read = 0, memoryview(b"")
        self._words = np.empty(0, np.uint64)
        self._starts, self._flat = np.empty(0, np.int32), np.empty(_BLOCK, np.int64)

    def fetch(self, chunks: Sequence[pq.ColumnChunkMetaData]) -> bool:
        """Read columns of a row group in one request; False where Arrow has to, or where they lie apart."""
        if not all(map(_is_known, chunks)):
            return False
        starts = [chunk.data_page_offset for chunk in chunks]
        sizes = [chunk.total_compressed_size for chunk in chunks]
        first, size = min(starts), max(map(add, starts, sizes)) - min(starts)
        if first < 0 or min(sizes) < 0 or first + size > self._file.size() or size > 2 * sum(sizes):
            return False
        self._first, self._read = first, memoryview(self._file.read_at(size, first))
        return True

    def reduce(self, chunk: pq.ColumnChunkMetaData, levels: Levels, best: Any, total: Any) -> bool:
        """First entry and sum of the first `depth` entries of every list of a column chunk, as
        `kernels.reduce_levels` has them.

        The chunk is one of those that were fetched.  Writes `best` and `total`, int64 with an entry per row.
        False where Arrow has to read the chunk; then what they hold means nothing.
        """
        place, left = np.array([-1, 0]), chunk.num_values
        read = self._read[chunk.data_page_offset - self._first :][: chunk.total_compressed_size]
        for page in _pages(read, _CODECS[chunk.compression]):
            if page is None or page.values > left:
                return False
            left -= page.values
            held = self._room(page)
            if not _reduce_page(*held, len(page.content), *levels, self._depth, place, best, total):
                return False
        return left == 0 and place[0] == len(best) - 1

    def _room(self, page: _Page) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Content of a page as words, and room for the starts of its lists and for its values."""
        words = len(page.content) // 8 + 3  # those beyond the end may be looked at
        if words > len(self._words):
            self._words = np.zeros(words, np.uint64)
        if page.values > len(self._starts):
            self._starts = np.empty(page.values, np.int32)
            self._flat = np.empty(page.values + _BLOCK, np.int64)
        self._words.view(np.uint8)[: len(page.content)] = page.content
        return self._words, self._starts[: page.values], self._flat[: page.values + _BLOCK]


def _is_known(chunk: pq.ColumnChunkMetaData) -> bool:
    """Whether a column chunk is packed as this lake packs it, for all that its metadata say."""
    packed = chunk.physical_type == "INT64" and "DELTA_BINARY_PACKED" in chunk.encodings
    plain = chunk.compression in _CODECS and not chunk.has_dictionary_page
    return packed and plain and 0 <= chunk.num_values <= _MOST_VALUES


# ---- pages ------------------------------------------------------------------------------------------


class _Page(NamedTuple):
    """A data page."""

    content: np.ndarray
    """Levels and values, uint8."""
    values: int
    """How many, null ones and empty lists included."""


def _pages(read: memoryview, codec: str | None) -> Iterator[_Page | None]:
    """Data pages of a column chunk; None, at last, for one that is not to be read here."""
    at = 0
    while at < len(read):
        try:
            header = _Thrift(read, at)
            fields = header.struct()
            page, size, packed, data = fields[1], fields[2], fields[3], fields[5]
            values, encodings = data[1], (data[2], data[3], data[4])
            at = header.at + packed
            content = read[header.at : at]
            whole = zlib.crc32(content) == fields.get(4, 0) & 0xFFFFFFFF or 4 not in fields
            usual = page == _DATA_PAGE and encodings == (_DELTA, _RLE, _RLE)
            if not usual or not whole or packed < 0 or values < 0:
                raise ValueError
            yield _Page(_unpacked(content, size, codec), values)
        except (LookupError, TypeError, ValueError, RecursionError, OSError, pa.ArrowException):
            yield None
            return


def _unpacked(content: memoryview, size: int, codec: str | None) -> np.ndarray:
    """Content of a page; raises unless it has that many bytes."""
    if not 0 <= size <= 1 << 30:
        raise ValueError
    flat = np.frombuffer(content if codec is None else pa.decompress(content, size, codec), np.uint8)
    if len(flat) != size:
        raise ValueError
    return flat


class _Thrift:
    """Structs of Thrift's compact protocol, as far as the header of a page needs it.

    What it does not know, and bytes that end too soon, raise LookupError.
    """

    def __init__(self, read: memoryview, at: int) -> None:
        self.read, self.at = read, at

    def struct(self) -> dict[int, Any]:
        """Fields by their number."""
        fields, number = {}, 0
        while head := self._byte():
            number = number + (head >> 4) if head >> 4 else self._integer()
            fields[number] = self._value(head & 15)
        return fields

    def _value(self, kind: int) -> Any:
        if kind in (1, 2):
            return kind == 1
        if kind in (4, 5, 6):
            return self._integer()
        if kind == 8:
            size = self._varint()
            self.at += size
            return None
        if kind == 12:
            return self.struct()
        raise LookupError

    def _byte(self) -> int:
        self.at += 1
        return self.read[self.at - 1]

    def _varint(self) -> int:
        value, shift = 0, 0
        while shift < 64:
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7
        raise LookupError

    def _integer(self) -> int:
        value = self._varint()
        return value >> 1 ^ -(value & 1)


# ---- levels and values ------------------------------------------------------------------------------


@_pass
def _reduce_page(words, starts, flat, size, entry, value, depth, place, best, total):
    """Reduce the lists of a page, whose `size` bytes are in `words`; False unless it is sound.

    There is room in `starts` for its levels and in `flat` for its values and a block more.  `place` (row,
    entries of its list so far) goes on from page to page, for a list may lie in two.
    """
    data, width, n = words.view(np.uint8), 1 if value == 1 else 2, len(starts)
    at, n_starts = _list_starts(data, 0, size, starts)
    if at < 0:
        return False
    starts = starts[:n_starts]
    if _one_run(data, at, size, n, value):
        at = _section(data, at, size)[1]
        return _reduce_dense(words, at, size, n, starts, flat, depth, place, best, total)
    kinds = np.empty(n, np.uint8)
    at = _expand(data, at, size, width, kinds)
    minis, per, count, latest, at = _deltas(data, at, size)
    if at < 0 or count > len(flat) - _BLOCK:
        return False
    flat[0] = np.int64(latest)
    if _unpack(words, at, size, minis, per, latest, flat[1:], count - 1)[1] < 0:
        return False
    flat, entries = _with_nulls(flat, count, kinds, entry, value, starts)
    return entries >= 0 and _enter(flat[:entries], starts, depth, place, best, total)


@_pass
def _reduce_dense(words, at, size, n, starts, flat, depth, place, best, total):
    """`_reduce_page` of n entries that are all there: some at a time, which stay in the nearest cache."""
    minis, per, count, latest, at = _deltas(words.view(np.uint8), at, size)
    if at < 0 or count != n:
        return False
    flat[0], held, done, begun = np.int64(latest), 1, 0, 0
    some = _TILE // (minis * per) * minis * per
    while done < n:
        more = min(some, n - done - held)
        latest, at = _unpack(words, at, size, minis, per, latest, flat[held:], more)
        held, first = held + more, begun
        while begun < len(starts) and starts[begun] < done + held:
            starts[begun] -= done
            begun += 1
        if at < 0 or not _enter(flat[:held], starts[first:begun], depth, place, best, total):
            return False
        held, done = 0, done + held
    return True


@_pass
def _section(data, at, size):
    """Where levels begin and end that follow their length of four bytes; an end of -1 does not fit."""
    if at < 0 or at + 4 > size:
        return 0, -1
    length = np.int64(data[at]) | np.int64(data[at + 1]) << 8 | np.int64(data[at + 2]) << 16
    length |= np.int64(data[at + 3]) << 24
    stop = at + 4 + length
    return at + 4, stop if stop <= size else -1


@_pass
def _list_starts(data, at, size, starts):
    """Which of the repetition levels are 0, so that a list starts: where the levels end, and how many."""
    at, stop = _section(data, at, size)
    i, n, found = 0, len(starts), 0
    while i < n:
        packed, run, at = _run(data, at, stop, 1)
        if at < 0:
            return -1, 0
        if packed:
            for byte in data[at : at + min(run, (n - i + 7) // 8)]:
                zeros = 255 - np.int64(byte)
                if n - i < 8:
                    zeros &= (1 << n - i) - 1
                while zeros:
                    starts[found] = i + _LOWEST[zeros]
                    found, zeros = found + 1, zeros & zeros - 1
                i += 8
        elif data[at] == 0:
            for j in range(i, min(n, i + run)):
                starts[found] = j
                found += 1
        elif data[at] > 1:
            return -1, 0
        i, at = (i, at + run) if packed else (i + run, at + 1)
    return stop, found


@_pass
def _one_run(data, at, size, n, value):
    """Whether all n definition levels are one run of `value`."""
    at, stop = _section(data, at, size)
    packed, run, at = _run(data, at, stop, 1)
    return at >= 0 and not packed and run >= n and data[at] == value


@_pass
def _expand(data, at, size, width, out):
    """Levels of `width` bits (1 or 2) as they are; gives where they end."""
    at, stop = _section(data, at, size)
    i, n, mask, each = 0, len(out), (1 << width) - 1, 8 // width
    while i < n:
        packed, run, at = _run(data, at, stop, width)
        if at < 0:
            return -1
        if packed:
            for byte in data[at : at + run]:
                for j in range(min(each, n - i)):
                    out[i + j] = byte >> j * width & mask
                i += each
            at += run
        else:
            out[i : min(n, i + run)] = data[at]
            i, at = i + run, at + 1
    return stop


@_pass
def _run(data, at, stop, width):
    """The next run: whether it is packed, its bytes then, else how many levels it has, and where it lies."""
    head, at = _whole(data, at, stop)
    packed, run = head & 1, head >> 1
    length = run * width if packed else 1
    if at < 0 or length > stop - at:
        return 0, 0, -1
    return packed, length if packed else run, at


@_pass
def _deltas(data, at, size):
    """Head of packed deltas: parts of a block, deltas of a part, how many values, the first, and where blocks
    begin; -1 where there is no such head."""
    block, at = _whole(data, at, size)
    minis, at = _whole(data, at, size)
    count, at = _whole(data, at, size)
    first, at = _zigzag(data, at, size)
    if at < 0 or not 0 < minis <= block <= _BLOCK or block % minis or block // minis % 8:
        return 0, 0, 0, first, -1
    return minis, block // minis, count, first, at


@_pass
def _unpack(words, at, size, minis, per, latest, out, count):
    """`count` values after `latest` from the blocks that begin at `at`; gives the last of them, and where the
    next block begins, -1 where they do not fit.

    `out` has `_BLOCK` entries more than that: the last block is unpacked to its end.
    """
    data, n = words.view(np.uint8), 0
    while n < count:
        least, widths = _zigzag(data, at, size)
        at = widths + minis
        if widths < 0 or at > size:
            return latest, -1
        for width in data[widths:at]:
            length = per * np.int64(width) // 8
            if n < count:
                if width > 64 or at + length > size:
                    return latest, -1
                latest = _unpack_mini(
                    words, np.uint64(8 * at), np.uint64(width), least, latest, out[n : n + per]
                )
                n, at = n + per, at + length
    return latest, at


@_pass
def _unpack_mini(words, bit, width, least, latest, out):
    """Values after `latest`, whose deltas less `least` are packed from a bit on; gives the last of them.

    All in uint64, which wraps as the format wants it and is never taken for an index from the end.
    """
    mask = ~np.uint64(0) >> np.uint64(64) - width if width else np.uint64(0)
    one, n = np.uint64(1), np.uint64(len(out))
    if width > 16:
        for j in range(np.uint64(0), n):
            latest += least + (_word(words, bit + j * width) & mask)
            out[j] = np.int64(latest)
        return latest
    second, third = width + width, width + width + width
    for j in range(np.uint64(0), n, np.uint64(4)):  # four fit one word, and wait for each other less
        word = _word(words, bit + j * width)
        a, b = (word & mask) + least, (word >> width & mask) + least
        c, d = (word >> second & mask) + least, (word >> third & mask) + least
        b, d = a + b, c + d
        out[j], out[j + one] = np.int64(latest + a), np.int64(latest + b)
        out[j + one + one], out[j + one + one + one] = np.int64(latest + b + c), np.int64(latest + b + d)
        latest += b + d
    return latest


@_pass
def _word(words, bit):
    """The 64 bits from a bit on."""
    at, shift = bit >> np.uint64(6), bit & np.uint64(63)
    return words[at] >> shift | words[at + np.uint64(1)] << np.uint64(1) << np.uint64(63) - shift


@_pass
def _with_nulls(values, n_values, kinds, entry, value, starts):
    """Entries of all lists, null ones as `NO_LEVEL`, and how many, -1 where levels and values do not fit.

    `starts` becomes numbers of entries.
    """
    out, used, entries, next_start, filled = np.empty(len(kinds), np.int64), 0, 0, 0, True
    for i in range(len(kinds)):
        begins = next_start < len(starts) and starts[next_start] == i
        if begins:
            starts[next_start] = entries
            next_start += 1
            filled = kinds[i] >= entry
        elif kinds[i] < entry or not filled:  # nothing goes on in a list that is null or empty
            return out, -1
        there = kinds[i] == value
        if kinds[i] > value or (there and used == n_values):
            return out, -1
        if kinds[i] >= entry:
            out[entries] = values[used] if there else NO_LEVEL
            used, entries = used + there, entries + 1
    return out, entries if used == n_values else -1


@_pass
def _enter(flat, starts, depth, place, best, total):
    """Reduce lists, the first of which may go on from the page before; False where there are too many."""
    row, position = place
    first = starts[0] if len(starts) else len(flat)
    if first > 0 and position == 0:
        return False
    for x in flat[: max(0, min(first, depth - position))]:
        total[row] += max(x, 0)
    if row + len(starts) >= len(best):
        return False
    for i in range(len(starts)):
        stop = starts[i + 1] if i + 1 < len(starts) else len(flat)
        row += 1
        best[row], total[row] = levels_of(flat, starts[i], stop, depth)
    place[0], place[1] = row, len(flat) - starts[-1] if len(starts) else position + first
    return True


@_pass
def _varint(data, at, stop):
    """Unsigned integer of seven bits a byte, and where it ends; -1 where it does not, or began there."""
    if 0 <= at < stop and data[at] < 128:  # nearly all
        return np.uint64(data[at]), at + 1
    value, shift = np.uint64(0), np.uint64(0)
    while 0 <= at < stop and shift < 64:
        byte = np.uint64(data[at])
        value |= (byte & np.uint64(127)) << shift
        at, shift = at + 1, shift + np.uint64(7)
        if byte < 128:
            return value, at
    return value, -1


@_pass
def _whole(data, at, stop):
    """`_varint` of a number below 2^31, as int64."""
    value, at = _varint(data, at, stop)
    return np.int64(value), at if value < np.uint64(1 << 31) else -1


@_pass
def _zigzag(data, at, stop):
    """Signed integer in two's complement, as uint64, and where it ends."""
    value, at = _varint(data, at, stop)
    return value >> np.uint64(1) ^ (~(value & np.uint64(1)) + np.uint64(1)), at

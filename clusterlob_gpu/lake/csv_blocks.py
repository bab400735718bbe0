"""Large CSV files, plain or gzip, in blocks of rows that know their line numbers.

The file is cut at line ends into blocks of a few MiB; pyarrow parses each block with its own threads
while the next one is being decompressed.  Memory does not grow with the file.  Lines are counted as an
editor counts them: the header is line 1, blank lines count but give no row.
"""

from __future__ import annotations

import csv
import gzip
import re
import zlib
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
from isal import igzip, igzip_lib

from clusterlob_gpu.errors import LakeError

BLOCK_BYTES = 4 << 20
LONGEST_LINE = 1 << 20

_GZIP_MAGIC = b"\x1f\x8b"
_DAMAGE = (EOFError, OSError, cast(type[Exception], igzip_lib.IsalError))
_ARROW_COLUMN = re.compile(r"In CSV column #(?P<column>\d+): (?:Row #\d+: )?(?P<what>.*)")


@dataclass(frozen=True)
class CsvBlock:
    """Some consecutive rows of a file.

    table : the requested columns; lines : (n_rows,) int32, the line of each row; last_line : the last
    line that the block covers; blank_lines : lines of the block that hold no row.
    """

    table: pa.Table
    lines: np.ndarray
    last_line: int
    blank_lines: int


def read_header(path: Path) -> list[str]:
    """Column names of a CSV file.

    Raises LakeError if the file cannot be read, has no header, or names a column twice.
    """
    with _open(path) as file:
        try:
            line = file.readline(LONGEST_LINE)
        except _DAMAGE as error:
            raise _broken(path, error) from None
    try:
        names = next(csv.reader([line.decode("utf-8-sig").rstrip("\r\n")]), [])
    except UnicodeDecodeError:
        raise LakeError(f"{path}, line 1: not UTF-8 text; is this a CSV file?") from None
    if not names:
        raise LakeError(f"{path}: the file is empty, a header line was expected; download it again")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise LakeError(f"{path}, line 1: column {twice[0]} appears twice; keep one of them")
    return names


def read_blocks(
    path: Path, header: Sequence[str], types: Mapping[str, pa.DataType]
) -> Generator[CsvBlock, None, None]:
    """Rows of `path` with the columns `types`, in order.

    An empty cell is null, except in text columns, where it is the empty text.  Raises LakeError, naming
    the line, for a line with another number of fields than the header, a value of another type, and a
    compressed stream that ends early or is damaged.
    """
    parse = partial(_parse, header=list(header), types=types)
    last_line = 1
    for text in _texts(path):
        yield (block := _read_block(path, text, last_line, parse))
        last_line = block.last_line


def _read_block(path: Path, text: bytes, last_line: int, parse: partial[pa.Table]) -> CsvBlock:
    n_ends = int(np.count_nonzero(np.frombuffer(text, np.uint8) == ord("\n")))
    n_lines = n_ends + (not text.endswith(b"\n"))
    try:
        table = parse(text)
        if len(table) == n_lines:
            lines = np.arange(last_line + 1, last_line + 1 + n_lines, dtype=np.int32)
            return CsvBlock(table, lines, last_line + n_lines, 0)
    except pa.ArrowInvalid:
        pass
    # Blank lines, or something wrong: find out which line is which.
    all_lines = text.split(b"\n")[:n_lines]
    filled = [i for i, line in enumerate(all_lines) if line.strip()]
    rows = [all_lines[i] for i in filled]
    lines = np.array(filled, dtype=np.int32) + np.int32(last_line + 1)
    try:
        table = parse(b"\n".join(rows))
    except pa.ArrowInvalid:
        raise _first_bad_line(path, rows, lines, parse) from None
    if len(table) != len(rows):
        raise LakeError(
            f"{path}, between lines {last_line + 1} and {last_line + n_lines}: {len(rows)} lines but "
            f"{len(table)} rows; a quoted field spans lines, or a lone carriage return ends one"
        )
    return CsvBlock(table, lines, last_line + n_lines, n_lines - len(rows))


def _parse(text: bytes, header: list[str], types: Mapping[str, pa.DataType]) -> pa.Table:
    if not text or text.isspace():
        return pa.schema(list(types.items())).empty_table()
    return pacsv.read_csv(
        pa.BufferReader(text),
        read_options=pacsv.ReadOptions(column_names=header, block_size=1 << 20),
        convert_options=pacsv.ConvertOptions(
            column_types=types, include_columns=list(types), null_values=[""], strings_can_be_null=False
        ),
    )


def _first_bad_line(path: Path, rows: list[bytes], lines: np.ndarray, parse: partial[pa.Table]) -> LakeError:
    """Bisect for the first line that the parser refuses, so that both always agree."""
    good, bad = 0, len(rows)
    while bad - good > 1:
        middle = (good + bad) // 2
        try:
            parse(b"\n".join(rows[good:middle]))
            good = middle
        except pa.ArrowInvalid:
            bad = middle
    try:
        parse(rows[good])
        what = "differs in its number of fields from the lines before it"
    except pa.ArrowInvalid as error:
        what = _explain(str(error), parse.keywords["header"], rows[good])
    return LakeError(f"{path}, line {lines[good]}: {what}; mend the line or download the file again")


def _explain(message: str, header: list[str], row: bytes) -> str:
    match = _ARROW_COLUMN.match(message)
    if match:
        return f"column {header[int(match['column'])]}: {' '.join(match['what'].split())}"
    n_fields = len(next(csv.reader([row.decode("utf-8", "replace")]), []))
    return f"{n_fields} fields, the header has {len(header)}"


def _texts(path: Path) -> Iterator[bytes]:
    """Decompressed text after the header line, cut at line ends, one block decoded ahead."""
    with _open(path) as file, ThreadPoolExecutor(1) as ahead:
        try:
            file.readline()
            rest = b""
            pending = ahead.submit(file.read, BLOCK_BYTES)
            while chunk := pending.result():
                pending = ahead.submit(file.read, BLOCK_BYTES)
                cut = chunk.rfind(b"\n") + 1
                if cut:
                    text, rest = rest + chunk[:cut], chunk[cut:]
                    yield text
                else:
                    rest += chunk
                if len(rest) > LONGEST_LINE:
                    raise LakeError(
                        f"{path}: a line is longer than {LONGEST_LINE} bytes; is this a CSV file?"
                    )
        except _DAMAGE as error:
            raise _broken(path, error) from None
        if rest:
            yield rest


def _open(path: Path, unpack: Callable[[Path, str], Any] = igzip.open) -> BinaryIO:
    """By content, not by name: a browser may have unpacked a `.gz` on its way."""
    try:
        with path.open("rb") as file:
            packed = file.read(2) == _GZIP_MAGIC
        return cast(BinaryIO, unpack(path, "rb") if packed else path.open("rb"))
    except OSError as error:
        raise LakeError(f"{path}: cannot be opened ({error.strerror}); check the path") from None


def _broken(path: Path, error: Exception) -> LakeError:
    what = "the gzip stream ends early" if isinstance(error, EOFError) else f"cannot be read ({error})"
    return LakeError(f"{path}: {what} after line {_readable_lines(path)}; download the file again")


def _readable_lines(path: Path) -> int:
    """Complete lines before the damage; a block that fails takes its good start with it, so read again.

    By zlib, which gives small pieces.
    """
    lines = 0
    with _open(path, gzip.open) as file, suppress(EOFError, OSError, zlib.error):
        while chunk := cast(gzip.GzipFile, file).read1(1 << 16):
            lines += chunk.count(b"\n")
    return lines

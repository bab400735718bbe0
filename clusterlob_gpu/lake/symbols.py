"""`dim_symbol`: what an integer price or size means, and from when to when.

The table is a slowly changing dimension of type 2: a symbol has one row per period of constant
tick, lot and increments.  `Symbol` brings all of them to one pair of units, so that integers of
different periods can be compared and added.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from fractions import Fraction
from functools import reduce
from math import gcd
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from clusterlob_gpu.errors import LakeError
from clusterlob_gpu.files import Location, parquet_faults
from clusterlob_gpu.schema import DIM_SYMBOL, EXCHANGE_IDS

DIM_SYMBOL_FILE = "dim_symbol.parquet"
QUOTE_ASSETS = ("USDT", "USDC", "BUSD", "USD", "BTC", "ETH")


def exchange_id(exchange: str) -> int:
    """Number of an exchange: the known one, else 1000 to 32767 from a hash of the name."""
    if exchange in EXCHANGE_IDS:
        return EXCHANGE_IDS[exchange]
    return 1000 + int.from_bytes(hashlib.sha256(exchange.encode()).digest()[:4], "big") % 31767


def symbol_id(exchange: str, exchange_symbol: str) -> int:
    """A positive 63-bit key that depends on the two names alone."""
    digest = hashlib.sha256(f"{exchange}/{exchange_symbol}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def decimal_unit(increments: list[float]) -> Fraction:
    """Largest unit of which every increment (a short decimal) is a whole multiple."""
    parts = [Fraction(repr(float(value))) for value in increments]
    scale = reduce(lambda a, b: a * b // gcd(a, b), (part.denominator for part in parts))
    return Fraction(reduce(gcd, (int(part * scale) for part in parts)), scale)


def decode(values: np.ndarray, unit: Fraction) -> np.ndarray:
    """Integers in real units, float64: the nearest float to the decimal, as 639441 x 0.1 = 63944.1."""
    return values * unit.numerator / unit.denominator


@dataclass(frozen=True)
class Symbol:
    """One instrument: the rows of `dim_symbol`, sorted by `valid_from_ts`, and its common units."""

    exchange: str
    name: str
    rows: pd.DataFrame

    @property
    def ids(self) -> list[int]:
        """Every symbol_id under which the lake may hold the instrument."""
        return sorted(set(self.rows["symbol_id"].tolist()))

    @property
    def price_unit(self) -> Fraction:
        """Quote units per common price integer."""
        return decimal_unit(self.rows["price_increment"].tolist())

    @property
    def qty_unit(self) -> Fraction:
        """Base units per common size integer."""
        return decimal_unit(self.rows["amount_increment"].tolist())

    def row_at(self, symbol_ids: np.ndarray, ts: np.ndarray, where: str) -> np.ndarray:
        """Index into `rows` of the period that holds for each event.

        Raises LakeError, naming `where`, if an event falls outside every period of its id.
        """
        found = np.full(len(ts), -1, dtype=np.int64)
        for i, row in enumerate(self.rows.itertuples()):
            inside = (ts >= row.valid_from_ts) & (ts < row.valid_until_ts)
            found[inside & (symbol_ids == row.symbol_id)] = i
        if len(found) and found.min() < 0:
            at = int(np.argmin(found))
            raise LakeError(
                f"{where}: row {at} of {self.exchange} {self.name} at ts_local_us = {ts[at]} has no "
                f"dim_symbol row (symbol_id {symbol_ids[at]}); extend its valid_from_ts or valid_until_ts"
            )
        return found

    def factors(self, column: str) -> np.ndarray:
        """Whole number of common units per increment, one per row of `rows`."""
        values = self.rows[column].tolist()
        unit = decimal_unit(values)
        return np.array([int(Fraction(repr(float(v))) / unit) for v in values], dtype=np.int64)

    def ticks(self) -> np.ndarray:
        """Tick size in common price units, one per row of `rows`."""
        sizes = self.rows["tick_size"].tolist()
        return np.array([float(Fraction(repr(float(size))) / self.price_unit) for size in sizes])


def read_dim_symbol(lake: str | Path | Location) -> pd.DataFrame:
    """All rows of `dim_symbol`; an empty table where the lake has none yet.

    Raises LakeError if its file is broken, OSError if it cannot be reached.
    """
    where = Location.of(lake) / DIM_SYMBOL_FILE
    try:
        content = where.read()
    except FileNotFoundError:
        return DIM_SYMBOL.empty_table().to_pandas()
    with parquet_faults(where):
        table = pq.read_table(pa.BufferReader(content))
    missing = [name for name in DIM_SYMBOL.names if name not in table.column_names]
    if missing:
        raise LakeError(f"{where}: column {missing[0]} is missing; see spec of dim_symbol")
    return table.select(DIM_SYMBOL.names).to_pandas()


def write_dim_symbol(lake: Path, rows: pd.DataFrame) -> None:
    """Replace `dim_symbol` in one step, sorted by exchange, symbol and validity."""
    path = Path(lake) / DIM_SYMBOL_FILE
    temporary = path.with_name(f".{path.name}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(dim_symbol_table(rows), temporary)
    temporary.replace(path)


def dim_symbol_table(rows: pd.DataFrame) -> pa.Table:
    """The rows as they are stored: sorted by exchange, symbol and validity."""
    rows = rows.sort_values(["exchange", "exchange_symbol", "valid_from_ts"], kind="stable")
    return pa.Table.from_pandas(rows[DIM_SYMBOL.names], schema=DIM_SYMBOL, preserve_index=False)


def canonical_symbol(name: str) -> str:
    """Name of a symbol as in Tardis paths: upper case, `-` for slashes and colons."""
    return name.upper().replace("/", "-").replace(":", "-")


def split_assets(name: str) -> tuple[str | None, str | None]:
    """Base and quote asset of a name such as BTCUSDT or ETH-USD; (None, None) where it does not tell."""
    for quote in QUOTE_ASSETS:
        base = name.upper().removesuffix(quote).rstrip("-_")
        if name.upper().endswith(quote) and base:
            return base, quote
    return None, None


def find_symbol(lake: str | Path | Location, exchange: str, name: str) -> Symbol:
    """The instrument `name` of `exchange`.

    Raises LakeError, with the names that the lake has, if it is not there or its periods overlap.
    """
    rows, where = read_dim_symbol(lake), Location.of(lake) / DIM_SYMBOL_FILE
    mine = rows[(rows["exchange"] == exchange) & (rows["exchange_symbol"] == name)]
    if mine.empty:
        known = sorted({f"{e} {s}" for e, s in zip(rows["exchange"], rows["exchange_symbol"], strict=True)})
        raise LakeError(
            f"{where}: no symbol {name} of {exchange}; "
            f"the lake has {', '.join(known[:10]) or 'none: ingest something first'}"
        )
    mine = mine.sort_values("valid_from_ts", kind="stable").reset_index(drop=True)
    for _, periods in mine.groupby("symbol_id"):
        if (periods["valid_from_ts"].to_numpy()[1:] < periods["valid_until_ts"].to_numpy()[:-1]).any():
            raise LakeError(f"{where}: periods of {exchange} {name} overlap")
    return Symbol(exchange, name, mine)

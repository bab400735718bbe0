"""Order-flow imbalance per bucket and cluster, in exact integers.

A bucket [b, b + width) holds the trades with b <= ts < b + width, is labelled by its start and known
at its end.  Buckets hold sums alone, so a day may be cut anywhere and its pieces added.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Protocol, Self

import numpy as np
import pandas as pd

from clusterlob_gpu.backend import CPU, Backend
from clusterlob_gpu.schema import ALL_CLUSTERS, US_PER_DAY


@dataclass(frozen=True)
class DayFlow:
    """Integer sums of one day, (n_buckets, k) int64 in the order of the model's clusters."""

    size: np.ndarray
    """Sum of s qty."""
    counts: np.ndarray
    """(n_buckets, k, 2): number of trades, sum of s."""
    notional_high: np.ndarray
    """The sum of s price qty is notional_high 2^32 + notional_low."""
    notional_low: np.ndarray

    @classmethod
    def none(cls, width: int, k: int) -> Self:
        """Of no trades yet."""
        shape = (US_PER_DAY // width, k)
        size, high, low = (np.zeros(shape, np.int64) for _ in range(3))
        return cls(size, np.zeros((*shape, 2), np.int64), high, low)

    def add(self, trades: TradesLike, label: Any, *, start: int, width: int, on: Backend = CPU) -> None:
        """Add labelled trades of the day whose first microsecond is `start`, in order of time."""
        on.kernels.bucket_flow(
            trades.ts,
            trades.sign,
            trades.price,
            trades.qty,
            label,
            start,
            width,
            self.size,
            self.counts,
            self.notional_high,
            self.notional_low,
        )


class TradesLike(Protocol):
    """Trades with their signs, as `features.MetTrades`; arrays of the backend."""

    @property
    def ts(self) -> Any: ...
    @property
    def sign(self) -> Any: ...
    @property
    def price(self) -> Any: ...
    @property
    def qty(self) -> Any: ...


def flow_table(
    flow: DayFlow, *, start: int, width: int, numbers: list[int], price_unit: Fraction, qty_unit: Fraction
) -> pd.DataFrame:
    """Buckets of a day in real units, a row per (bucket, cluster) and per bucket for all clusters.

    Columns bucket_ts, cluster (-1 = all), n_trades, ofi_size = sum(s qty) in base units,
    ofi_count = sum(s), ofi_notional = sum(s price qty) in quote units; 0 where nothing traded.
    Each value is the float nearest to the exact sum.
    """
    n_buckets, k = flow.size.shape
    notional = flow.notional_high.astype(object) * 2**32 + flow.notional_low.astype(object)
    columns = {
        "n_trades": flow.counts[..., 0].astype(object),
        "ofi_size": flow.size.astype(object),
        "ofi_count": flow.counts[..., 1].astype(object),
        "ofi_notional": notional,
    }
    table = pd.DataFrame(
        {
            "bucket_ts": np.repeat(start + width * np.arange(n_buckets, dtype=np.int64), k + 1),
            "cluster": np.tile(np.array([ALL_CLUSTERS, *numbers], np.int8), n_buckets),
        }
    )
    one = Fraction(1)
    units = {"n_trades": one, "ofi_size": qty_unit, "ofi_count": one, "ofi_notional": price_unit * qty_unit}
    for name, values in columns.items():
        whole = np.concatenate([values.sum(axis=1, keepdims=True), values], axis=1).ravel()
        unit = units[name]
        # Python divides integers of any size with one rounding.
        real = whole * unit.numerator / unit.denominator
        table[name] = whole.astype(np.int64) if name == "n_trades" else real.astype(np.float64)
    return table


def empty_flow_table(*, start: int, width: int, numbers: list[int]) -> pd.DataFrame:
    """Buckets of a day that the lake does not have: flow is null, not zero."""
    n_buckets = US_PER_DAY // width
    table = pd.DataFrame(
        {
            "bucket_ts": np.repeat(start + width * np.arange(n_buckets, dtype=np.int64), len(numbers) + 1),
            "cluster": np.tile(np.array([ALL_CLUSTERS, *numbers], np.int8), n_buckets),
        }
    )
    nothing = np.full(len(table), np.nan)
    return table.assign(
        n_trades=np.zeros(len(table), np.int64), ofi_size=nothing, ofi_count=nothing, ofi_notional=nothing
    )

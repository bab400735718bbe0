"""The book as a trade can know it: valid rows, the times of the last changes, the state at midnight.

A day of book rows is reduced once to flat columns (`valid_rows`).  What a day needs from the days
before it is a `BookCarry`: the last valid row and the times of the last changes.  Carries are folded
from `BookSummary`s, which are tiny, so that days can be reduced in any order on any worker.

Units: times in us UTC, prices and sizes in the symbol's integer units.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any, Self

import numpy as np

from clusterlob_gpu import kernels
from clusterlob_gpu.backend import CPU, Backend, Columns
from clusterlob_gpu.kernels import NO_TIME
from clusterlob_gpu.lake.symbols import decode
from clusterlob_gpu.schema import BookRows, Context

FAULTS = {kernels.EMPTY_SIDE: "empty_side", kernels.NON_POSITIVE: "non_positive", kernels.CROSSED: "crossed"}
"""Reasons for which a book row is skipped, in the order in which they are asked."""

ROW_COLUMNS = ("ts", "bid", "ask", "bid_sz", "ask_sz", "bid_depth", "ask_depth", "tick")


def valid_rows(rows: BookRows, on: Backend = CPU) -> tuple[Columns, dict[str, int]]:
    """Valid book rows as flat columns, and how many were skipped by reason.

    A row is skipped if a side is empty, if a price or size at level 1 is not positive, or if
    bid >= ask.  Gives the columns `ROW_COLUMNS` (int64, tick float64) in the order of the input.
    """
    fault = on.xp.empty(len(rows.ts), np.uint8)
    on.kernels.book_fault(rows.bid, rows.ask, rows.bid_sz, rows.ask_sz, fault)
    counts = on.to_host(on.xp.bincount(fault, minlength=4))
    skipped = {name: int(counts[code]) for code, name in FAULTS.items()}
    columns = {name: getattr(rows, name) for name in ROW_COLUMNS}
    if counts[0] < len(fault):
        keep = fault == 0
        columns = {name: values[keep] for name, values in columns.items()}
    return columns, skipped


@dataclass(frozen=True)
class BookCarry:
    """Book state at the end of a day: the last valid row, and when each price last changed.

    A change time is NO_TIME before the first change that the unbroken chain of days has seen.
    """

    ts: int
    bid: int
    ask: int
    bid_sz: int
    ask_sz: int
    bid_depth: int
    ask_depth: int
    tick: float
    mid_change: int
    bid_change: int
    ask_change: int

    @property
    def complete(self) -> bool:
        """Whether all change times are known, so that no earlier day could alter this state."""
        return NO_TIME not in (self.mid_change, self.bid_change, self.ask_change)


@dataclass(frozen=True)
class BookSummary:
    """What a day adds to the carry: its first and last valid rows, and the changes inside it."""

    first: dict[str, Any] | None
    last: dict[str, Any] | None
    mid_change: int
    bid_change: int
    ask_change: int

    def as_record(self) -> dict[str, Any]:
        """Plain values for a JSON record."""
        return asdict(self)

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Self:
        """The inverse of `as_record`."""
        return cls(**record)


def summarise(rows: Columns, on: Backend = CPU) -> BookSummary:
    """Summary of a day's valid rows."""
    if len(rows["ts"]) == 0:
        return BookSummary(None, None, NO_TIME, NO_TIME, NO_TIME)
    mid, bid, ask = change_times(rows, rows["bid"] + rows["ask"], None, on)
    first, last = (_row(rows, at) for at in (0, -1))
    return BookSummary(first, last, int(mid[-1]), int(bid[-1]), int(ask[-1]))


def _row(rows: Columns, at: int) -> dict[str, Any]:
    """One row as plain values."""
    values = {name: rows[name][at] for name in ROW_COLUMNS}
    return {name: float(value) if name == "tick" else int(value) for name, value in values.items()}


def fold(carry: BookCarry | None, day: BookSummary) -> BookCarry | None:
    """Carry after a day, given the carry before it; None where the chain has had no valid row."""
    if day.first is None or day.last is None:
        return carry
    if carry is None:
        return BookCarry(**day.last, **_changes(day, NO_TIME, NO_TIME, NO_TIME))
    first = day.first
    moved = {
        "mid_change": first["bid"] + first["ask"] != carry.bid + carry.ask,
        "bid_change": first["bid"] != carry.bid,
        "ask_change": first["ask"] != carry.ask,
    }
    before = {name: first["ts"] if moved[name] else getattr(carry, name) for name in moved}
    return BookCarry(**day.last, **_changes(day, **before))


def _changes(day: BookSummary, mid_change: int, bid_change: int, ask_change: int) -> dict[str, int]:
    """The day's own last changes, else those known before."""
    before = {"mid_change": mid_change, "bid_change": bid_change, "ask_change": ask_change}
    own = {name: getattr(day, name) for name in before}
    return {name: own[name] if own[name] != NO_TIME else before[name] for name in before}


def change_times(
    rows: Columns, mid2: Any, carry: BookCarry | None, on: Backend = CPU
) -> tuple[Any, Any, Any]:
    """Times (us) of the last change of mid2 = bid + ask, best bid and best ask at every row of `rows`.

    The first row is that of the carry where there is one.  A change compares integers with the row
    before.  NO_TIME before the first change.
    """
    known = (carry.mid_change, carry.bid_change, carry.ask_change) if carry else (NO_TIME,) * 3
    changes = []
    for value, since in zip((mid2, rows["bid"], rows["ask"]), known, strict=True):
        out = on.xp.empty(len(value), np.int64)
        on.kernels.last_changes(rows["ts"], value, since, out)
        changes.append(out)
    return changes[0], changes[1], changes[2]


def make_context(
    rows: Columns, carry: BookCarry | None, qty_unit: Fraction, spread: str, on: Backend = CPU
) -> Context:
    """Context columns of a day from the state it starts from, its row in front, and its valid rows."""
    mid2 = rows["bid"] + rows["ask"]
    mid_change, bid_change, ask_change = change_times(rows, mid2, carry, on)
    width = (rows["ask"] - rows["bid"]).astype(np.float64)
    return Context(
        ts=rows["ts"],
        mid2=mid2,
        touch_qty=rows["bid_sz"] + rows["ask_sz"],
        log_bid=on.xp.log1p(decode(rows["bid_depth"], qty_unit)),
        log_ask=on.xp.log1p(decode(rows["ask_depth"], qty_unit)),
        spread=width / rows["tick"] if spread == "ticks" else 2e4 * width / mid2,
        mid_change=mid_change,
        bid_change=bid_change,
        ask_change=ask_change,
    )

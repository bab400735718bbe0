"""Six features of every trade, and their rolling z-scores over the symbol's last trades.

A trade counts if its side is known and it met a fresh book row.  Its window reaches over midnight:
the raw features of the last `window - 1` trades of the days before come along as a tail.  A day is gone
through in pieces, whose size changes nothing but the memory they take.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from clusterlob_gpu import kernels
from clusterlob_gpu.backend import CPU, Backend
from clusterlob_gpu.schema import FEATURES, Context, Trades

DROPS = {
    kernels.SIDE_UNKNOWN: "side_unknown",
    kernels.NO_BOOK: "no_book",
    kernels.STALE_BOOK: "stale_book",
}
"""Reasons for which a trade has no raw features, in the order in which they are asked."""


@dataclass(frozen=True)
class MetTrades:
    """Trades with a known side and a book row, in order; arrays of the backend."""

    ts: Any
    sign: Any
    """+1 taker buy, -1 taker sell, int8."""
    price: Any
    qty: Any
    row: Any
    """Index of the book row that the trade met, into the day's `Context`, int32."""
    dropped: dict[str, int]

    def __len__(self) -> int:
        return len(self.ts)

    def parts(self, rows: int) -> Iterator[MetTrades]:
        """The trades in parts of `rows`, the last of fewer."""
        for start in range(0, len(self), rows):
            yield self.part(slice(start, start + rows))

    def part(self, rows: slice) -> MetTrades:
        """The trades of a slice."""
        ts, sign, price, qty, row = (
            column[rows] for column in (self.ts, self.sign, self.price, self.qty, self.row)
        )
        return MetTrades(ts, sign, price, qty, row, self.dropped)


def meet(
    trades: Trades, context: Context, *, max_staleness: int, inclusive: bool, on: Backend = CPU
) -> MetTrades:
    """Join each trade with the book it met.

    The book row is the last one strictly before the trade (at or before, if `inclusive`).  Trades of
    unknown side, before the first book row, or whose row is older than `max_staleness` us are dropped
    and counted in `dropped`.
    """
    xp, n = on.xp, len(trades.ts)
    row, fate = xp.empty(n, np.int32), xp.empty(n, np.uint8)
    kept = on.kernels.meet_book(trades.ts, trades.side, context.ts, max_staleness, inclusive, row, fate)
    columns = (trades.ts, trades.side, trades.price, trades.qty, row)
    dropped = dict.fromkeys(DROPS.values(), 0)
    if kept < n:
        dropped = {name: int(xp.count_nonzero(fate == code)) for code, name in DROPS.items()}
        met = tuple(xp.empty(kept, column.dtype) for column in columns)
        on.kernels.take_kept(fate, *columns, *met)
        columns = met
    ts, side, price, qty, row = columns
    sign = np.int8(1) - np.int8(2) * side.astype(np.int8)
    return MetTrades(ts, sign, price, qty, row, dropped)


def raw_features(met: MetTrades, context: Context, out: Any, *, own_side: bool, on: Backend = CPU) -> None:
    """Raw features of trades that met rows of the context, written to `out` (6, n) float64.

    v_rel = qty / (bid_sz1 + ask_sz1); sbs and obs = ln(1 + depth) on the same and the opposite side (the
    taker's own, or the one that it consumes); spread; t_m and t_age = us since the last change of the mid
    and of the best price consumed, NaN before the first.
    """
    on.kernels.raw_features(
        met.ts,
        met.sign,
        met.qty,
        met.row,
        context.touch_qty,
        context.log_bid,
        context.log_ask,
        context.spread,
        context.mid_change,
        context.bid_change,
        context.ask_change,
        own_side,
        out,
    )


class Piece(NamedTuple):
    """Some of a day's met trades in a row."""

    rows: slice
    """Which of the day's met trades."""
    met: MetTrades
    lead: int
    history: Any
    """(6, lead + m) float64 in the order of `FEATURES`: raw features of `lead` trades before and of these."""

    @property
    def raw(self) -> Any:
        """(6, m) raw features; NaN where a change time is not known."""
        return self.history[:, self.lead :]


def pieces(
    meetings: Iterable[MetTrades],
    context: Context,
    tail: np.ndarray,
    *,
    window: int,
    own_side: bool,
    on: Backend = CPU,
) -> Iterator[Piece]:
    """Met trades of a day, as they come, in pieces of at most `on.rows_at_once`, with their raw features and
    those that their windows need.

    `tail` (6, l), l < window, holds the raw features of the last trades of the days before.
    """
    n, history = 0, on.xp.asarray(tail)
    for met in meetings:
        for part in met.parts(on.rows_at_once):
            done = tail.shape[1] + n
            # Windows are made of blocks counted from the first of the tail: the block before stays whole.
            lead = min(done, done % window + window)
            room = on.xp.empty((len(FEATURES), lead + len(part)))
            room[:, :lead] = history[:, history.shape[1] - lead :]
            history = room
            raw_features(part, context, history[:, lead:], own_side=own_side, on=on)
            yield Piece(slice(n, n + len(part)), part, lead, history)
            n += len(part)


def z_scores(piece: Piece, window: int, out: Any, on: Backend = CPU) -> int:
    """Rolling z-scores of a piece, written to `out` (6, m); gives how many trades have all six.

    z = (x - mean) / std over the last `window` trades, the current one included, ddof = 1; 0 where
    the window is constant; NaN in all six where one window is short or holds a NaN.  Computed in float64,
    stored in the type of `out`.
    """
    on.kernels.rolling_z(piece.history, window, piece.lead, out)
    known: int = on.kernels.void_nulls(out)
    return known


def last_columns(tail: np.ndarray, raw: np.ndarray, window: int) -> np.ndarray:
    """Tail after a day: the last `window - 1` columns of tail and day together."""
    keep = window - 1
    if raw.shape[1] >= keep:
        return raw[:, raw.shape[1] - keep :].copy()
    return np.concatenate([tail, raw], axis=1)[:, -keep:]


def without_scores(
    dropped: Mapping[str, int], met: int, known: int, lead: int, window: int
) -> dict[str, int]:
    """Trades without z-scores by reason, of a day of which `met` trades met a book and `known` have scores.

    To those that met none, `dropped`: `warmup` (fewer than `window` trades so far, of which `lead` came
    before the day), `null_change_time` (a trade in the window came before the first change of the mid or
    of the price that it consumes).
    """
    warm = max(0, min(met, window - 1 - lead))
    return {**dropped, "warmup": warm, "null_change_time": met - known - warm}

"""Six features of every trade, and their rolling z-scores over the symbol's last trades.

A trade counts if its side is known and it met a fresh book row.  Its window reaches over midnight:
the raw features of the last `window - 1` trades of the days before come along as a tail.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from clusterlob_gpu import kernels
from clusterlob_gpu.schema import FEATURES, Context, Trades

DROPS = {
    kernels.SIDE_UNKNOWN: "side_unknown",
    kernels.NO_BOOK: "no_book",
    kernels.STALE_BOOK: "stale_book",
}
"""Reasons for which a trade has no raw features, in the order in which they are asked."""


@dataclass(frozen=True)
class MetTrades:
    """Trades with a known side and a book row, in order, and their raw features."""

    ts: np.ndarray
    sign: np.ndarray
    """+1 taker buy, -1 taker sell, int8."""
    price: np.ndarray
    qty: np.ndarray
    row: np.ndarray
    """Index of the book row that the trade met, into the day's `Context`."""
    raw: np.ndarray
    """(6, n) float64 in the order of `FEATURES`; NaN where a change time is not known."""
    dropped: dict[str, int]

    def take(self, mask: np.ndarray | slice) -> MetTrades:
        """The trades that the mask or slice keeps."""
        ts, sign, price, qty, row = (
            column[mask] for column in (self.ts, self.sign, self.price, self.qty, self.row)
        )
        return MetTrades(ts, sign, price, qty, row, self.raw[:, mask], self.dropped)


def meet(
    trades: Trades, context: Context, *, max_staleness: int, inclusive: bool, own_side: bool
) -> MetTrades:
    """Join each trade with the book it met and compute its raw features.

    The book row is the last one strictly before the trade (at or before, if `inclusive`).  Trades of
    unknown side, before the first book row, or whose row is older than `max_staleness` us are dropped
    and counted in `dropped`.
    """
    row = np.empty(len(trades.ts), np.int64)
    fate = np.empty(len(trades.ts), np.uint8)
    kept = kernels.meet_book(trades.ts, trades.side, context.ts, max_staleness, inclusive, row, fate)
    counts = np.bincount(fate, minlength=4)
    dropped = {name: int(counts[code]) for code, name in DROPS.items()}
    columns = (trades.ts, trades.side, trades.price, trades.qty, row)
    if kept < len(row):
        keep = fate == kernels.KEPT
        columns = tuple(column[keep] for column in columns)
    ts, side, price, qty, row = columns
    sign = np.int8(1) - np.int8(2) * side.astype(np.int8)
    raw = raw_features(ts, sign, qty, row, context, own_side)
    return MetTrades(ts, sign, price, qty, row, raw, dropped)


def raw_features(
    ts: np.ndarray, sign: np.ndarray, qty: np.ndarray, row: np.ndarray, context: Context, own_side: bool
) -> np.ndarray:
    """Raw features (6, n) float64 of trades that met the given rows of the context.

    v_rel = qty / (bid_sz1 + ask_sz1); sbs and obs = ln(1 + depth) on the same and the opposite side;
    spread; t_m and t_age = us since the last change of the mid and of the best price consumed.
    """
    raw = np.empty((len(FEATURES), len(ts)))
    kernels.raw_features(
        ts,
        sign,
        qty,
        row,
        context.touch_qty,
        context.log_bid,
        context.log_ask,
        context.spread,
        context.mid_change,
        context.bid_change,
        context.ask_change,
        own_side,
        raw,
    )
    return raw


def z_scores(
    raw: np.ndarray, tail: np.ndarray, window: int, dtype: type[np.floating] = np.float64
) -> np.ndarray:
    """Rolling z-scores (6, n) of a day's raw features, given the tail of the days before.

    z = (x - mean) / std over the last `window` trades, the current one included, ddof = 1; 0 where
    the window is constant; NaN where it is short or holds a NaN.  `tail` is (6, m), m < window.
    Computed in float64, stored as `dtype`.
    """
    lead = tail.shape[1]
    out = np.empty(raw.shape, dtype)
    # Two columns are used over and over: touching fresh memory costs more than the arithmetic.
    column, scores = np.empty((2, lead + raw.shape[1]))
    for j in range(raw.shape[0]):
        column[:lead], column[lead:] = tail[j], raw[j]
        kernels.rolling_z(column, window, scores)
        out[j] = scores[lead:]
    return out


def last_columns(tail: np.ndarray, raw: np.ndarray, window: int) -> np.ndarray:
    """Tail after a day: the last `window - 1` columns of tail and day together."""
    keep = window - 1
    if raw.shape[1] >= keep:
        return raw[:, raw.shape[1] - keep :].copy()
    return np.concatenate([tail, raw], axis=1)[:, -keep:]


def scored(
    met: MetTrades, tail: np.ndarray, window: int, dtype: type[np.floating] = np.float64
) -> tuple[MetTrades, np.ndarray]:
    """The trades whose six z-scores are all known, and those scores (6, m).

    Dropped and counted: `warmup` (fewer than `window` trades so far), `null_change_time` (a trade in
    the window came before the first change of the mid or of the price that it consumes).
    """
    z = z_scores(met.raw, tail, window, dtype)
    warm = max(0, min(z.shape[1], window - 1 - tail.shape[1]))
    known = ~np.isnan(z.sum(axis=0))
    dropped = met.dropped | {
        "warmup": warm,
        "null_change_time": int(np.count_nonzero(~known[warm:])),
    }
    if not known.all():
        first = int(np.argmax(known))
        # Nearly always the first trades of a lake: a slice of them copies nothing.
        kept = slice(first, None) if known[first:].all() else known
        met, z = met.take(kept), z[:, kept]
    return MetTrades(met.ts, met.sign, met.price, met.qty, met.row, met.raw, dropped), z

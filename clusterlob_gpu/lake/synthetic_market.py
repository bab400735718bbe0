"""The synthetic market itself: one day of book and trades from a seed and the state of midnight.

The book lives in episodes of a few snapshots.  An episode opens with a change of the mid; then one
side is thick and the other thin (tilted), a lull without trades follows, and at last the book rests,
balanced, under a mid that has stood for long.  Trades come in sweeps, and so does their type:

- opportunistic trades meet a tilted book and take from its thin side: own side thick, opposite thin;
- directional trades meet a tilted book and take from its thick side;
- passive trades meet a resting book, on either side.

A slow latent process, `flow`, tilts the book and the share of opportunistic trades; its lagged copy
tilts the direction of the mid, some minutes later.  Thus opportunistic flow predicts returns,
directional flow leans weakly against them, passive flow says nothing.  `strength` is the probability
that a trade follows the book (others draw type and side at random), and scales both tilts.  At 0
type and side are independent of everything else, and the mid is a martingale.

Random numbers are hashes of (key, counter), the key a hash of (seed, symbol, day, stream): no draw depends
on how a day is cut or on how many days are asked for.  Units: ticks, lots, int64 us UTC.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numba import njit
from scipy.special import ndtri

from clusterlob_gpu.schema import BOOK_LEVELS, SIDE_BUY, SIDE_SELL, SIDE_UNKNOWN, US_PER_DAY, US_PER_SECOND

PASSIVE, OPPORTUNISTIC, DIRECTIONAL = 0, 1, 2
"""Codes of `truth.trade_type`."""

LEVELS_STREAM = 7
"""Number of the stream of random numbers that `fill_levels` takes; the day itself takes 0 to 6."""

PASSIVE_SHARE, OPPORTUNISTIC_SHARE = 0.43, 0.19
"""Expected shares of the types; the rest, 0.38, is directional."""

_MEAN_EPISODE = 5.5  # snapshots: 1 or 2 tilted, 2 or 3 of lull, 1 or 2 of rest
_OPPORTUNISTIC_IN_TILT = OPPORTUNISTIC_SHARE / (1 - PASSIVE_SHARE)
_DAILY_VOLATILITY = 0.025
_BOOK_BIAS = 0.12  # shift of P(bids thick) per unit of `flow`
_ROLE_BIAS = 0.43  # relative shift of the opportunistic share per unit of `flow` on its side
_DRIFT = 0.55  # mean 5 min return per unit of lagged `flow`, in 5 min standard deviations
_TILT = 0.8  # log ratio of a thick side to a balanced one
_LEVEL_LOTS = 2_400.0
_MEDIAN_QTY_LOTS = 30.0
_MAX_QTY_LOTS = 5_000_000.0
_UNKNOWN_SHARE = 1e-4
_QTY_SIGMA = 1.1

# Decay times of the latent processes, seconds: flow, depth, bursts of activity, volatility.
_LATENT_SECONDS = np.array([300.0, 900.0, 20.0, 3600.0])
_FLOW, _DEPTH, _BURST, _VOLATILITY, _LAGGED = range(5)

# Positions in the integer state of the running episode.
_STEP, _TILTED, _LULL, _REST, _CENTRE, _AWAY, _SIDE = range(7)

# Draws of one book row, eight counters apart.
_LATENT, _LENGTHS, _MOVE, _JUMP, _SHAPE, _NOISE, _GAP = range(7)

_QUANTILES = (np.arange(1 << 14) + 0.5) / (1 << 14)
_QTY_LOTS = _MEDIAN_QTY_LOTS * np.exp(_QTY_SIGMA * ndtri(_QUANTILES))
_SIZE_NOISE = np.exp(0.3 * ndtri((np.arange(256) + 0.5) / 256))
_LEVEL_SHAPE = _LEVEL_LOTS * (0.6 + 0.8 * np.sqrt(np.arange(BOOK_LEVELS) / BOOK_LEVELS))

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class Rates(NamedTuple):
    """What the kernels need of a config; decays and scales are per snapshot."""

    strength: float
    decay: np.ndarray
    kick: np.ndarray
    drift: float
    jump: float


class BookPath(NamedTuple):
    """Columns of the book rows; row 0 is the one in force at midnight, the others are the day's.

    ts int64 us; bid, ask int64 ticks; tilt int8 (+1 bids thick, -1 asks thick, 0 balanced); flow float64,
    the latent lean; bid_depth, ask_depth float64, factors on the sizes; shape uint64, the bits of the gaps
    between levels, one per episode; weight float64, share of the day's trades up to a constant.
    """

    ts: np.ndarray
    bid: np.ndarray
    ask: np.ndarray
    tilt: np.ndarray
    flow: np.ndarray
    bid_depth: np.ndarray
    ask_depth: np.ndarray
    shape: np.ndarray
    weight: np.ndarray


class Trades(NamedTuple):
    """Columns of the trades in time order: ts us, side and trade_type codes, price ticks, qty lots."""

    ts: np.ndarray
    side: np.ndarray
    trade_type: np.ndarray
    price: np.ndarray
    qty: np.ndarray


@dataclass(frozen=True)
class Midnight:
    """All that one day leaves to the next: latent processes, running episode, last book row, ticker."""

    latent: np.ndarray
    episode: np.ndarray
    row: tuple[float, ...]
    ticker: np.ndarray


@dataclass(frozen=True)
class MarketDay:
    """One simulated day; `book` has one row more than the day has snapshots, see BookPath.

    Its trades are made when they are first asked for: its book may be written meanwhile.
    """

    book: BookPath
    ticker: np.ndarray
    state: Midnight
    _make_trades: Callable[[], Trades]

    @cached_property
    def trades(self) -> Trades:
        """Trades of the day, in time order."""
        return self._make_trades()


@njit(nogil=True, cache=True, inline="always")
def _bits(key: np.uint64, counter: int) -> np.uint64:
    """Number `counter` of the SplitMix64 stream that starts at `key`."""
    z = key + (np.uint64(counter) + np.uint64(1)) * _GOLDEN
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@njit(nogil=True, cache=True, inline="always")
def _u16(bits: np.uint64, part: int) -> float:
    """Quarter `part` (0 to 3) of 64 random bits, as a number in (0, 1) with mean exactly 1/2."""
    return ((bits >> np.uint64(16 * part)) & np.uint64(0xFFFF)) * (1.0 / 65536) + 0.5 / 65536


@njit(nogil=True, cache=True, inline="always")
def _uniform(key: np.uint64, counter: int) -> float:
    """A number in (0, 1) with 53 random bits."""
    return (float(_bits(key, counter) >> np.uint64(11)) + 0.5) * (1.0 / 9007199254740992.0)


@njit(nogil=True, cache=True, inline="always")
def _gap(bits: np.uint64, level: int) -> int:
    """Ticks from level - 1 to `level` (1 to 24) of one side: one, now and then three."""
    return 3 if (bits >> np.uint64(2 * level)) & np.uint64(3) == np.uint64(3) else 1


@njit(nogil=True, cache=True)
def _open_episode(key: np.uint64, k: int, rates: Rates, latent: np.ndarray, episode: np.ndarray) -> None:
    """Draw the lengths and the thick side of a new episode, and move the mid."""
    lengths, bits = _bits(key, 8 * k + _LENGTHS), _bits(key, 8 * k + _MOVE)
    episode[_STEP] = 0
    episode[_TILTED] = 1 + int(2 * _u16(lengths, 0))
    episode[_LULL] = 2 + int(2 * _u16(lengths, 1))
    episode[_REST] = 1 + int(2 * _u16(lengths, 2))
    lean = 0.5 + rates.strength * _BOOK_BIAS * latent[_FLOW]
    episode[_SIDE] = 1 if _u16(bits, 0) < lean else -1
    stressed = latent[_VOLATILITY] > 1.3
    if episode[_AWAY] == 0 and _u16(bits, 1) < (0.25 if stressed else 0.02):
        # One best price steps back and the other stays: the spread opens, the centre does not move.
        ticks = 3 if _u16(bits, 2) < 0.2 else 1
        episode[_AWAY] = ticks if _u16(bits, 3) < 0.5 else -ticks
        return
    episode[_AWAY] = 0
    scale = rates.jump * episode[_CENTRE] * math.exp(0.4 * latent[_VOLATILITY] - 0.16)
    # At least two ticks: with an odd step back of a side, the mid then changes in any case.
    size = 2 + int(-scale * math.log(_uniform(key, 8 * k + _JUMP)))
    up = _u16(lengths, 3) < min(max(0.5 + rates.strength * rates.drift * latent[_LAGGED], 0.05), 0.95)
    episode[_CENTRE] += size if up or episode[_CENTRE] < 4 * size + 400 else -size


@njit(nogil=True, cache=True)
def _walk_book(
    key: np.uint64, rates: Rates, latent: np.ndarray, episode: np.ndarray, book: BookPath, gap: np.ndarray
) -> None:
    """Fill rows 1 to n of `book` except `ts`, and `gap`, the times between rows up to a constant."""
    n = len(book.bid) - 1
    for k in range(n + 1):
        spell = _u16(_bits(key, 8 * (k // 64) + _GAP), 0) < 0.2
        u = _u16(_bits(key, 8 * k + _GAP), 1)
        gap[k] = 0.02 - math.log(u) if spell else 0.95 + 0.1 * u
    for k in range(1, n + 1):
        bits = _bits(key, 8 * k + _LATENT)
        for i in range(4):
            latent[i] = rates.decay[i] * latent[i] + rates.kick[i] * (_u16(bits, i) - 0.5)
        latent[_LAGGED] += (1 - rates.decay[_FLOW]) * (latent[_FLOW] - latent[_LAGGED])
        episode[_STEP] += 1
        if episode[_STEP] >= episode[_TILTED] + episode[_LULL] + episode[_REST]:
            _open_episode(key, k, rates, latent, episode)
        step, away = episode[_STEP], episode[_AWAY]
        opened = step == 0
        tilted = step < episode[_TILTED]
        resting = step >= episode[_TILTED] + episode[_LULL]
        side = episode[_SIDE] if tilted else 0
        noise = _bits(key, 8 * k + _NOISE)
        common = math.exp(0.3 * latent[_DEPTH])
        book.bid[k] = episode[_CENTRE] + min(away, 0)
        book.ask[k] = episode[_CENTRE] + 1 + max(away, 0)
        book.tilt[k] = side
        book.flow[k] = latent[_FLOW]
        book.bid_depth[k] = common * math.exp(_TILT * side + 0.2 * (_u16(noise, 0) - 0.5))
        book.ask_depth[k] = common * math.exp(-_TILT * side + 0.2 * (_u16(noise, 1) - 0.5))
        book.shape[k] = _bits(key, 8 * k + _SHAPE) if opened else book.shape[k - 1]
        share = 0.0
        if tilted:
            share = (1 - PASSIVE_SHARE) / episode[_TILTED]
        elif resting:
            share = PASSIVE_SHARE / episode[_REST]
        daily = 1.0 - 0.5 * math.cos(2 * math.pi * (k / n - 0.1))
        book.weight[k] = share * daily * math.exp(0.5 * latent[_BURST]) * (0.5 - math.log(_u16(noise, 2)))


@njit(nogil=True, cache=True)
def _stamp(start: int, gap: np.ndarray, ts: np.ndarray) -> None:
    """Spread rows 1 to n over the day so that row k follows row k - 1 by its share of all gaps."""
    total = gap.sum()
    passed = 0.0
    ts[0] = start - 1
    for k in range(1, len(ts)):
        passed += gap[k - 1]
        ts[k] = max(start + int(passed / total * US_PER_DAY), ts[k - 1] + 2)


@njit(nogil=True, cache=True, inline="always")
def _random_type(u: float) -> int:
    """Type of a trade that does not look at the book."""
    if u < PASSIVE_SHARE:
        return PASSIVE
    return OPPORTUNISTIC if u < PASSIVE_SHARE + OPPORTUNISTIC_SHARE else DIRECTIONAL


@njit(nogil=True, cache=True)
def _draw_qty(bits: np.uint64, key: np.uint64, counter: int) -> int:
    """Lots: lognormal, and rarely a block from a Pareto tail with exponent 2.5."""
    qty = _QTY_LOTS[(bits >> np.uint64(48)) & np.uint64(0x3FFF)]
    if _u16(bits, 2) > 0.9997:
        qty *= 15 * _uniform(key, counter) ** (-1 / 2.5)
    return max(1, int(min(qty, _MAX_QTY_LOTS)))


@njit(nogil=True, cache=True)
def _fill_interval(
    keys: np.ndarray,
    strength: float,
    book: BookPath,
    row: int,
    start: int,
    stop: int,
    first: int,
    until: int,
    trades: Trades,
) -> None:
    """Trades `first` to `until` - 1 meet book row `row`; their stamps lie in [start, stop], in order."""
    tilt, bid, ask = book.tilt[row], book.bid[row], book.ask[row]
    last = row == len(book.ts) - 1
    moves = not last and bid + ask != book.bid[row + 1] + book.ask[row + 1]
    late = _u16(_bits(keys[2], row), 0) < (0.6 if moves else 0.1)
    # The book leans with `flow` already; less its mean the product leaves the share of the type alone.
    lean = book.flow[row] * tilt - 2 * strength * _BOOK_BIAS
    opportunistic = _OPPORTUNISTIC_IN_TILT * (1 + strength * _ROLE_BIAS * lean)
    n = until - first
    ts, buy, kind, through = start, True, PASSIVE, False
    for j in range(first, until):
        bits, more = _bits(keys[0], j), _bits(keys[1], j)
        if j > first and _u16(bits, 0) < 0.4:  # one more fill of the same sweep
            through = through or _u16(bits, 2) < 0.1
        else:
            through = False
            buy = more & np.uint64(1) == np.uint64(0)
            if _u16(more, 1) >= strength:
                kind = _random_type(_u16(more, 2))
            elif tilt == 0:
                kind = PASSIVE
            else:
                kind = OPPORTUNISTIC if _u16(more, 2) < opportunistic else DIRECTIONAL
                buy = (tilt > 0) == (kind == OPPORTUNISTIC)
            if late and 2 * (j - first) >= n:
                ts = stop
            else:
                ts = start + int((j - first + _u16(bits, 1)) / n * (stop - start))
        steps = _gap(_bits(book.shape[row], 1 if buy else 0), 1) if through else 0
        if not through and _u16(more, 3) < 0.002:
            steps = -1  # a print better than the touch, as late or hidden orders give
        trades.ts[j] = ts
        trades.side[j] = SIDE_BUY if buy else SIDE_SELL
        trades.trade_type[j] = kind
        trades.price[j] = ask + steps if buy else bid - steps
        trades.qty[j] = _draw_qty(bits, keys[3], j)


@njit(nogil=True, cache=True)
def _trade(keys: np.ndarray, strength: float, book: BookPath, end: int, trades: Trades) -> None:
    """Fill `trades`: every row of `book` gets its share, stamped after it and no later than the next row.

    A trade with the stamp of the next row came before it, so it met the row that was there.
    """
    n, last = len(trades.ts), len(book.ts) - 1
    # A few rows may all lie in lulls; then they share the trades evenly.
    weight = book.weight if book.weight.sum() > 0 else np.ones(last + 1)
    total, planned, done = weight.sum(), 0.0, 0
    rounding = _uniform(keys[4], n)
    for row in range(last + 1):
        planned += weight[row]
        until = n if row == last else min(n, int(n * (planned / total) + rounding))
        stop = end if row == last else book.ts[row + 1]
        _fill_interval(keys, strength, book, row, book.ts[row] + 1, stop, done, until, trades)
        done = until
    for j in range(n):
        if _uniform(keys[4], j) < _UNKNOWN_SHARE:
            trades.side[j] = SIDE_UNKNOWN


@njit(nogil=True, cache=True)
def fill_levels(
    key: np.uint64,
    book: BookPath,
    first: int,
    bids_px: np.ndarray,
    bids_sz: np.ndarray,
    asks_px: np.ndarray,
    asks_sz: np.ndarray,
) -> None:
    """Write all levels of the book rows from `first` on into four (rows, 25) int64 arrays."""
    for row in range(len(bids_px)):
        k = first + row
        for side in range(2):
            prices, sizes = (asks_px, asks_sz) if side else (bids_px, bids_sz)
            price = book.ask[k] if side else book.bid[k]
            depth = book.ask_depth[k] if side else book.bid_depth[k]
            gaps = _bits(book.shape[k], side)
            bits = np.uint64(0)
            for level in range(BOOK_LEVELS):
                if level % 8 == 0:
                    bits = _bits(key, 8 * k + 4 * side + level // 8)
                if level > 0:
                    price += _gap(gaps, level) if side else -_gap(gaps, level)
                prices[row, level] = price
                noise = _SIZE_NOISE[(bits >> np.uint64(8 * (level % 8))) & np.uint64(255)]
                sizes[row, level] = 1 + int(depth * _LEVEL_SHAPE[level] * noise)


@njit(nogil=True, cache=True)
def _walk_ticker(key: np.uint64, state: np.ndarray, decay: float, out: np.ndarray) -> None:
    """Open interest (log, a random walk) and premium (mean-reverting, unit variance) per ticker row."""
    for k in range(len(out)):
        bits = _bits(key, k)
        state[0] += 2e-4 * (_u16(bits, 0) - 0.5) * math.sqrt(12.0)
        state[1] = decay * state[1] + math.sqrt(12.0 * (1 - decay * decay)) * (_u16(bits, 1) - 0.5)
        out[k, 0], out[k, 1] = state[0], state[1]


def stream_key(seed: int, symbol_id: int, day: int, stream: int) -> np.uint64:
    """Key of one stream of random numbers; `day` counts from the first day of the market."""
    return np.uint64(np.random.SeedSequence([seed, symbol_id, day, stream]).generate_state(1, np.uint64)[0])


def market_rates(strength: float, snapshots_per_day: int) -> Rates:
    """Constants of a market whose daily volatility and 5 min drift do not depend on its size."""
    gap_seconds = US_PER_DAY / US_PER_SECOND / snapshots_per_day
    decay = np.exp(-gap_seconds / _LATENT_SECONDS)
    moves = snapshots_per_day / _MEAN_EPISODE
    per_bucket = math.sqrt(moves / 288)
    return Rates(
        strength=strength,
        decay=decay,
        kick=np.sqrt(12 * (1 - decay**2)),
        drift=_DRIFT / math.sqrt(2) / per_bucket,
        jump=_DAILY_VOLATILITY / math.sqrt(2 * moves),
    )


def opening(centre: int) -> Midnight:
    """State before the first day: a quiet, balanced book around `centre` ticks, everything at its mean."""
    episode = np.array([0, 1, 1, 1, centre, 0, 1], dtype=np.int64)
    row = (centre, centre + 1, 0, 0.0, 1.0, 1.0, 0, 0.0)
    return Midnight(np.zeros(5), episode, row, np.array([math.log(80_000.0), 0.0]))


def simulate_day(
    seed: int,
    symbol_id: int,
    day: int,
    start_us: int,
    rates: Rates,
    n_snapshots: int,
    n_trades: int,
    n_ticker: int,
    state: Midnight,
) -> MarketDay:
    """Day number `day` of the market, which begins at `start_us`; `state` is left as it was.

    Gives n_snapshots + 1 book rows, n_trades trades in time order, and a (n_ticker, 2) array of log open
    interest and premium at evenly spaced times.
    """
    book_key, ticker_key, *trade_keys = (stream_key(seed, symbol_id, day, i) for i in range(LEVELS_STREAM))
    latent, episode, ticker_state = state.latent.copy(), state.episode.copy(), state.ticker.copy()
    book = BookPath(*_columns(n_snapshots + 1, "i8 i8 i8 i1 f8 f8 f8 u8 f8"))
    for column, value in zip(book[1:], state.row, strict=True):
        column[0] = value
    gap = np.empty(n_snapshots + 1)
    _walk_book(book_key, rates, latent, episode, book, gap)
    _stamp(start_us, gap, book.ts)
    ticker = np.empty((n_ticker, 2))
    _walk_ticker(ticker_key, ticker_state, math.exp(-8.0 / n_ticker), ticker)
    row = tuple(column[-1].item() for column in book[1:])

    def make_trades() -> Trades:
        trades = Trades(*_columns(n_trades, "i8 u1 u1 i8 i8"))
        _trade(np.array(trade_keys), rates.strength, book, start_us + US_PER_DAY - 1, trades)
        return trades

    return MarketDay(book, ticker, Midnight(latent, episode, row, ticker_state), make_trades)


def _columns(rows: int, types: str) -> list[np.ndarray]:
    """Uninitialised columns of the given types."""
    return [np.empty(rows, dtype) for dtype in types.split()]

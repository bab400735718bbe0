"""Second opinion on the taker-flow numbers: slow, plain, and written apart from the package.

Trades are a list of rows for the whole lake; sizes are Python integers, thresholds and ratios
`Fraction`s, and a quantile is read off a sorted list.  Times are int microseconds UTC.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction
from typing import NamedTuple

DAY = 86_400_000_000


class Fill(NamedTuple):
    """A trade in the lake's order; `side` 0 buy, 1 sell, 2 unknown."""

    ts: int
    side: int
    price: int
    qty: int
    ts_exch: int = 0
    trade_id: str = ""


class Taker(NamedTuple):
    ts: int
    side: int
    notional: int


def takers_of(fills: Sequence[Fill]) -> list[Taker]:
    return [Taker(row.ts, row.side, row.price * row.qty) for row in fills]


def orders_of(fills: Sequence[Fill], width: int) -> list[Taker]:
    """Fills of one exchange time, known side and bar, whose ids count up, merged; stamped by the last."""
    groups: list[list[Fill]] = []
    for row in fills:
        last = groups[-1][-1] if groups else None
        joins = (
            last is not None
            and row.side in (0, 1)
            and (row.side, row.ts_exch, row.ts // width) == (last.side, last.ts_exch, last.ts // width)
            and is_number(row.trade_id)
            and is_number(last.trade_id)
            and int(row.trade_id) == int(last.trade_id) + 1
        )
        if joins:
            groups[-1].append(row)
        else:
            groups.append([row])
    return [Taker(group[-1].ts, group[-1].side, sum(f.price * f.qty for f in group)) for group in groups]


def is_number(trade_id: str) -> bool:
    return 1 <= len(trade_id) <= 18 and all(char in "0123456789" for char in trade_id)


def quantile(values: Iterable[int], q: Fraction) -> Fraction:
    """Linear interpolation between the two neighbours of place (n - 1) q."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * q
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return Fraction(ordered[below]) + (place - below) * (ordered[above] - ordered[below])


def threshold(
    takers: Sequence[Taker],
    bar: int,
    window: int,
    q: Fraction,
    *,
    refresh: str,
    min_trades: int,
    require_full_window: bool,
    held: set[int],
) -> Fraction | None:
    """Threshold of the bar that starts at `bar`; `held` are the days (ts // DAY) with a partition."""
    end = bar if refresh == "bar" else bar // DAY * DAY
    inside = [row.notional for row in takers if end - window <= row.ts < end]
    if len(inside) < max(min_trades, 1):
        return None
    if require_full_window and not all(
        day in held for day in range((end - window) // DAY, (end - 1) // DAY + 1)
    ):
        return None
    return quantile(inside, q)


def ratio(top: int, bottom: int) -> float:
    return float(Fraction(top, bottom)) if bottom else math.nan


def bar(
    fills: Sequence[Fill],
    takers: Sequence[Taker],
    start: int,
    width: int,
    large: Fraction | None,
    small: Fraction | None,
    price_unit: Fraction,
    qty_unit: Fraction,
) -> dict[str, float]:
    """One bar in real units."""
    rows = [row for row in fills if start <= row.ts < start + width]
    units = [row for row in takers if start <= row.ts < start + width]
    known = large is not None and small is not None

    def flow(side: int, chosen: Callable[[int], bool] = lambda _: True) -> int:
        return sum(row.notional for row in units if row.side == side and chosen(row.notional))

    def is_large(a: int) -> bool:
        return large is not None and Fraction(a) >= large

    def is_small(a: int) -> bool:
        return small is not None and Fraction(a) <= small

    buy, sell, total = flow(0), flow(1), sum(row.notional for row in units)
    lb, ls, sb, ss = flow(0, is_large), flow(1, is_large), flow(0, is_small), flow(1, is_small)
    unit = price_unit * qty_unit
    prices = [row.price for row in rows]
    qty = sum(row.qty for row in rows)
    largest = sorted((row.notional for row in units), reverse=True)
    out = {
        "bar_ts": float(start),
        "open": float(prices[0] * price_unit) if rows else math.nan,
        "high": float(max(prices) * price_unit) if rows else math.nan,
        "low": float(min(prices) * price_unit) if rows else math.nan,
        "close": float(prices[-1] * price_unit) if rows else math.nan,
        "vwap": float(Fraction(sum(r.price * r.qty for r in rows), qty) * price_unit) if qty else math.nan,
        "trade_count": float(len(units)),
        "total_notional": float(total * unit),
        "buy_notional": float(buy * unit),
        "sell_notional": float(sell * unit),
        "flow_imbalance_total": ratio(buy - sell, buy + sell),
        "flow_toxicity": ratio(abs(buy - sell), total),
        **{f"top{k}_share": ratio(sum(largest[:k]), total) for k in (1, 3, 5)},
    }
    classes = {
        "large_count": float(sum(is_large(row.notional) for row in units)),
        "small_count": float(sum(is_small(row.notional) for row in units)),
        "buy_notional_large": float(lb * unit),
        "sell_notional_large": float(ls * unit),
        "buy_notional_small": float(sb * unit),
        "sell_notional_small": float(ss * unit),
        "flow_imbalance_large": ratio(lb - ls, lb + ls),
        "flow_imbalance_small": ratio(sb - ss, sb + ss),
        "flow_share_large": ratio(lb + ls, total),
        "large_net_share": ratio(lb - ls, total),
        "large_small_disagreement": ratio((lb - ls) - (sb - ss), total),
    }
    return out | (classes if known else dict.fromkeys(classes, math.nan))


def rolled(
    bars: Mapping[int, Mapping[str, float]], factor: str, start: int, length: int, width: int
) -> float:
    """Sum of a factor over the bars that end in (start + width - length, start + width]."""
    total = 0.0
    for at in range(start + width - length, start + 1, width):
        row = bars.get(at)
        if row is None or math.isnan(row["total_notional"]):
            return math.nan
        needs_cuts = factor in ("flow_share_large", "large_net_share", "large_small_disagreement")
        needs_cuts = needs_cuts or factor in ("flow_imbalance_large", "flow_imbalance_small")
        if needs_cuts and math.isnan(row["large_count"]):
            return math.nan
        total += 0.0 if math.isnan(row[factor]) else row[factor]
    return total


def trailing(values: Mapping[int, float], at: int, length: int) -> list[float]:
    """Known values of the bars that start in [at - length, at)."""
    inside = [value for when, value in sorted(values.items()) if at - length <= when < at]
    return [value for value in inside if not math.isnan(value)]


def z_score(values: Mapping[int, float], at: int, length: int, least: int) -> float:
    past, x = trailing(values, at, length), values.get(at, math.nan)
    if math.isnan(x) or len(past) < least:
        return math.nan
    exact = [Fraction(value) for value in past]
    mean = sum(exact, Fraction(0)) / len(exact)
    variance = sum(((value - mean) ** 2 for value in exact), Fraction(0)) / (len(exact) - 1)
    if variance == 0:
        return 0.0 if Fraction(x) == mean else math.nan
    return float(Fraction(x) - mean) / math.sqrt(variance)


def float_quantile(values: Sequence[float], q: float) -> float:
    ordered = sorted(values)
    place = (len(ordered) - 1) * q
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])

"""What the values of every ingested file say about a symbol's units, and the periods that follow from it.

The periods are a function of the files that the lake has, in whatever order and in however many calls
they came.  Of every file the greatest common divisors of its prices and amounts are kept, by the UTC day
of its rows, in `<lake>/.units/<exchange>-<symbol>.json`.  From them, in the order of days:

- increments on a day are the largest of 1, 0.1, 0.01, ... of which all values up to this day are whole
  multiples, so they only become finer; with a symbol table its increments as long as these fit;
- the tick is the divisor of all book prices up to this day, of trade prices as long as no book told one,
  and the lot that of all amounts in books and trades.  One value alone tells no step: it takes two that
  differ, else the increment stands in.  Rows outside their file's own day count only for the increments,
  unless the file has no others.

A later day never changes what holds before its midnight.  The first day's units hold from the beginning
of time, the last day's for ever.
"""

from __future__ import annotations

import datetime as dt
import json
import re
import uuid
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import reduce
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, NamedTuple

from clusterlob_gpu.errors import LakeError
from clusterlob_gpu.lake.increments import common
from clusterlob_gpu.lake.layout import day_start_us
from clusterlob_gpu.lake.periods import WHOLE_NUMBERS, Period, Periods

UNITS_DIR = ".units"
BOOK_TABLES = ("book_snapshot_25", "quotes")
INTEGER_TABLES = (*BOOK_TABLES, "trades", "liquidations")

_FRACTIONS = ("price", "amount", "tick", "lot")


class Step(NamedTuple):
    """Of some positive decimals the greatest common divisor, and whether two of them differ."""

    divisor: Fraction
    varied: bool


class Values(NamedTuple):
    """What is known of the prices and amounts of some rows; None where there are none."""

    price: Step | None = None
    amount: Step | None = None


FileValues = dict[dt.date, Values]
"""Values of one file by the UTC day of its rows; empty if it has none with prices."""

FileName = tuple[str, dt.date]
"""Lake table and day of a file of the symbol."""


class _Evidence(NamedTuple):
    price: Step | None = None
    amount: Step | None = None
    book: Step | None = None
    trade: Step | None = None
    lot: Step | None = None


def joined(one: Step | None, other: Step | None) -> Step | None:
    """The step of the values of both."""
    if one is None or other is None or one == other:
        return one or other
    varied = one.varied or other.varied or one.divisor != other.divisor
    return Step(common(one.divisor, other.divisor), varied)


@dataclass(frozen=True)
class Seen:
    """All that the periods of one symbol follow from."""

    given: Periods = ()
    """Of a symbol table, or found in the lake without evidence; empty if there is neither."""

    files: dict[FileName, FileValues] = field(default_factory=dict)

    @classmethod
    def taken_as_given(cls, periods: Periods, files: Iterable[FileName]) -> Seen:
        """`periods` whatever the values of `files`, which count only for what comes later."""
        return cls(periods, {(table, day): {day: Values()} for table, day in files})

    def updated(self, files: dict[FileName, FileValues]) -> Seen:
        """With these files in place of older ones of the same names; a file without values leaves none."""
        merged = self.files | files
        return replace(self, files={name: values for name, values in merged.items() if values})

    def periods(self) -> Periods:
        """Units by time, see the head of this module; WHOLE_NUMBERS of a symbol of which nothing is known."""
        base, by_day = self.given or WHOLE_NUMBERS, self._by_day()
        if not by_day:
            return base
        starts: list[int] = []
        so_far: list[_Evidence] = []
        days = sorted(by_day)
        for day, seen in zip(days, accumulate((by_day[day] for day in days), _both), strict=True):
            if not so_far or seen != so_far[-1]:
                starts.append(day_start_us(day) if starts else min(0, base[0].start))
                so_far.append(seen)
        return tuple(piece for period in base for piece in _pieces(period, starts, so_far))

    def _by_day(self) -> dict[dt.date, _Evidence]:
        found: dict[dt.date, _Evidence] = {}

        def add(day: dt.date, evidence: _Evidence) -> None:
            found[day] = _both(found.get(day, _Evidence()), evidence)

        first = min((day for _, day in self.files), default=dt.date.min)
        for (table, day), values in self.files.items():
            for row_day, (price, amount) in values.items():
                # A file's first rows may be of the evening before; they make no period of their own.
                add(max(row_day, first), _Evidence(price, amount))
            own = [values[day]] if day in values else list(values.values())
            price, amount = reduce(lambda a, b: Values(*map(joined, a, b)), own)
            if table in BOOK_TABLES:
                add(day, _Evidence(book=price, lot=amount))
            elif table == "trades":
                add(day, _Evidence(trade=price, lot=amount))
        return found


def _both(one: _Evidence, other: _Evidence) -> _Evidence:
    return _Evidence(*map(joined, one, other))


def _pieces(period: Period, starts: list[int], so_far: list[_Evidence]) -> list[Period]:
    """`period` cut where its units change; `so_far[i]` holds from `starts[i]` on."""
    cuts = [period.start, *(ts for ts in starts if period.start < ts < period.end), period.end]
    out: list[Period] = []
    for begin, end in pairwise(cuts):
        piece = _in_force(period, so_far[bisect_right(starts, begin) - 1])
        if out and piece == replace(out[-1], start=period.start, end=period.end):
            out[-1] = replace(out[-1], end=end)
        else:
            out.append(replace(piece, start=begin, end=end))
    return out


def _in_force(base: Period, seen: _Evidence) -> Period:
    price, amount = _increment(base.price, seen.price), _increment(base.amount, seen.amount)
    tick = _step(base.tick, seen.book, seen.trade) or price
    lot = _step(base.lot, seen.lot) or amount
    return replace(base, price=price, amount=amount, tick=tick, lot=lot)


def _increment(base: Fraction, seen: Step | None) -> Fraction:
    """`base` if the values fit it, else the largest power of ten below 1 that fits both."""
    if seen is None or (seen.divisor / base).denominator == 1:
        return base
    divisor, increment = common(base, seen.divisor), Fraction(1)
    while (divisor / increment).denominator != 1:
        increment /= 10
    return increment


def _step(base: Fraction | None, *told: Step | None) -> Fraction | None:
    """`base` refined by the first that tells a step; one value alone does so only if there is a base."""
    for step in told:
        if step and (step.varied or base):
            return common(base, step.divisor) if base else step.divisor
    return base


def units_file(lake: Path, exchange: str, symbol: str) -> Path:
    """Where the evidence of a symbol is kept."""
    return lake / UNITS_DIR / f"{exchange}-{symbol}.json"


def read_seen(lake: Path, exchange: str, symbol: str) -> Seen:
    """The evidence of a symbol; empty if the lake has none.  Raises LakeError if it cannot be read."""
    path = units_file(lake, exchange, symbol)
    if not path.exists():
        return Seen()
    try:
        record = json.loads(path.read_text())
        return Seen(
            tuple(map(_period, record["given"])),
            {(table, dt.date.fromisoformat(day)): _values(days) for table, day, days in record["files"]},
        )
    except (ValueError, KeyError, TypeError):
        raise LakeError(
            f"{path}: not readable; delete it, and the units in dim_symbol stay as they are"
        ) from None


def stage_seen(lake: Path, exchange: str, symbol: str, seen: Seen) -> tuple[Path, Path]:
    """Write the evidence under a hidden name; gives this name and the final one."""
    path = units_file(lake, exchange, symbol)
    path.parent.mkdir(exist_ok=True)
    staged = path.with_name(f".{path.stem}.{uuid.uuid4().hex[:12]}.tmp")
    record = {
        "given": [_record(period) for period in seen.given],
        "files": [
            [table, str(day), {str(row_day): _texts(told) for row_day, told in sorted(values.items())}]
            for (table, day), values in sorted(seen.files.items())
        ],
    }
    staged.write_text(json.dumps(record))
    return staged, path


def remove_staged(lake: Path, exchange: str, symbol: str) -> None:
    """Delete what a killed ingest of the symbol left under hidden names."""
    left = re.compile(rf"\.{re.escape(f'{exchange}-{symbol}')}\.[0-9a-f]{{12}}\.tmp")
    for path in (lake / UNITS_DIR).glob(".*.tmp"):
        if left.fullmatch(path.name):
            path.unlink(missing_ok=True)


def _record(period: Period) -> dict[str, Any]:
    fractions = {name: getattr(period, name) for name in _FRACTIONS}
    return vars(period) | {name: value and str(value) for name, value in fractions.items()}


def _period(record: dict[str, Any]) -> Period:
    return Period(**record | {name: record[name] and Fraction(record[name]) for name in _FRACTIONS})


def _texts(values: Values) -> list[list[str | bool] | None]:
    return [step and [str(step.divisor), step.varied] for step in values]


def _values(days: dict[str, Any]) -> FileValues:
    return {
        dt.date.fromisoformat(day): Values(
            *(step and Step(Fraction(step[0]), bool(step[1])) for step in steps)
        )
        for day, steps in days.items()
    }

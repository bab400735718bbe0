"""What each day starts from: books reduced, and the state carried over midnight.

A day needs of the days before it the book at midnight and, for ClusterLOB, the raw features of the last
trades.  Days before the range are added one by one until nothing earlier could alter the first state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date

import numpy as np

from clusterlob_gpu import context, days, features, returns
from clusterlob_gpu.config import ClusterConfig, RunConfig
from clusterlob_gpu.context import BookCarry
from clusterlob_gpu.days import State, next_day, previous_day
from clusterlob_gpu.lake.layout import day_of_us, day_start_us
from clusterlob_gpu.lake.native import days_between
from clusterlob_gpu.pipeline.run import RunRequest, SymbolRun
from clusterlob_gpu.schema import FEATURES
from clusterlob_gpu.workers import Workers


@dataclass
class CarriedRun(SymbolRun):
    """A symbol whose days start from a book and from the features of the trades before."""

    states: dict[date, State] = field(default_factory=dict)
    """State at the start of each day."""
    tails: dict[tuple[date, BookCarry | None], np.ndarray] = field(default_factory=dict)
    """Raw features of the last trades of a day, by the book that it started from."""


def reduce_books(
    run: SymbolRun, request: RunRequest[RunConfig], held: Sequence[date], stage: str, workers: Workers
) -> None:
    """Reduce the books of the days that the lake has of `held`."""
    jobs = [run.job(request, day) for day in held if run.lake.has(request.config.book, day)]
    run.has_read(request.config.book, [job.day for job in jobs])
    run.books |= {book.day: book for book in workers.map(stage, days.reduce_book, jobs)}


def carry_books(run: SymbolRun, earliest: date) -> None:
    """Book state at the start of every day from `earliest` on; a missing day breaks the chain."""
    carry: BookCarry | None = None
    run.carries = {}
    last = max(run.books)
    for day in days_between(earliest, last):
        run.carries[day] = carry
        book = run.books.get(day)
        carry = context.fold(carry, book.summary) if book else None
    run.carries[next_day(last)] = carry


def prepare_states(run: CarriedRun, request: RunRequest[ClusterConfig], workers: Workers) -> None:
    """Reduce the books of the range and of the days around it, and carry the state over midnights.

    Days before the range are added one by one until nothing earlier could alter the first state.
    """
    config, first, last = request.config, request.start, request.end
    reach = max(config.reach, 2 * config.bucket, max(returns.MARKOUTS_US))
    last_needed = day_of_us(day_start_us(next_day(last)) + reach)
    reduce_books(run, request, days_between(first, last_needed), "book", workers)
    earliest = first
    while True:
        carry_books(run, earliest)
        _carry_tails(run, request, days_between(earliest, last), workers)
        before = previous_day(earliest)
        if _settled(run, config, earliest, first):
            break
        reduce_books(run, request, [before], "book before", workers)
        earliest = before


def _carry_tails(
    run: CarriedRun, request: RunRequest[ClusterConfig], chain: list[date], workers: Workers
) -> None:
    """State at the start of every day of a chain, from the tails of the days before that have trades."""
    traded = [day for day in chain[:-1] if run.lake.has("trades", day)]
    run.has_read("trades", traded)
    unknown = [day for day in traded if (day, run.carries.get(day)) not in run.tails]
    tasks = [(run.job(request, day), run.books.get(day), run.carries.get(day)) for day in unknown]
    for day, found in zip(unknown, workers.map("tails", days.own_tail, tasks), strict=True):
        run.tails[day, run.carries.get(day)] = found
    own = {day: run.tails[day, run.carries.get(day)] for day in traded}
    nothing = np.empty((len(FEATURES), 0))
    window = request.config.window
    tail, run.states = nothing, {}
    for day in chain:
        run.states[day] = State(run.carries.get(day), tail)
        tail = features.last_columns(tail, own[day], window) if day in own else nothing


def _settled(run: CarriedRun, config: ClusterConfig, earliest: date, first: date) -> bool:
    """Whether no day before `earliest` could alter the state at the start of the range."""
    state = run.states[first]
    around = days_between(previous_day(earliest), previous_day(first))
    book_ends = any(not run.lake.has(config.book, day) for day in around)
    trades_end = any(not run.lake.has("trades", day) for day in around)
    book_known = book_ends or (state.book is not None and state.book.complete)
    full = state.tail.shape[1] == config.window - 1 and not np.isnan(state.tail).any()
    return book_known and (full or (trades_end and book_ends))

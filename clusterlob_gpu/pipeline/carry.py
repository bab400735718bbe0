"""What each day starts from: books reduced, and the state carried over midnight.

A day needs of the days before it the book at midnight and, for ClusterLOB, the raw features of the last
trades.  Days before the range are added one by one until nothing earlier could alter the first state.
All symbols go through each step together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from typing import TypeVar

import numpy as np

from clusterlob_gpu import context, days, features
from clusterlob_gpu.config import ClusterConfig, RunConfig
from clusterlob_gpu.context import BookCarry
from clusterlob_gpu.days import State, next_day, previous_day
from clusterlob_gpu.lake.layout import day_of_us, day_start_us
from clusterlob_gpu.lake.native import days_between
from clusterlob_gpu.pipeline.run import RunRequest, SymbolRun
from clusterlob_gpu.pipeline.stages import Stages
from clusterlob_gpu.schema import FEATURES

Run = TypeVar("Run", bound=SymbolRun)


@dataclass
class CarriedRun(SymbolRun):
    """A symbol whose days start from a book and from the features of the trades before."""

    states: dict[date, State] = field(default_factory=dict)
    """State at the start of each day."""
    tails: dict[tuple[date, BookCarry | None], np.ndarray] = field(default_factory=dict)
    """Raw features of the last trades of a day, by the book that it started from."""


def reduce_books(
    asked: Sequence[tuple[Run, Sequence[date]]], request: RunRequest[RunConfig], stages: Stages
) -> None:
    """Reduce the books of the days that the lake has of those asked of each symbol, which may come twice."""
    table = request.config.book
    wanted = [(run, day) for run, days_ in asked for day in run.held(table, days_)]
    jobs = {(run.name, day): run.job(request, day) for run, day in wanted}
    made = stages.make("book", days.book_artefact, days.reduce_book, list(jobs.values()), table)
    books = dict(zip(jobs, made, strict=True))
    for run, day in wanted:
        run.books[day] = books[run.name, day]


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


def prepare_states(
    runs: Sequence[CarriedRun], request: RunRequest[ClusterConfig], reach: int, stages: Stages
) -> None:
    """Reduce the books of the range and of the days around it, and carry the state over midnights.

    `reach` is how far (us) past the last day's end a book is needed.
    """
    first, last = request.start, request.end
    last_needed = day_of_us(day_start_us(next_day(last)) + reach)
    reduce_books([(run, days_between(first, last_needed)) for run in runs], request, stages)
    earliest, open_runs = first, list(runs)
    while open_runs:
        for run in open_runs:
            carry_books(run, earliest)
        _carry_tails(open_runs, request, days_between(earliest, last), stages)
        open_runs = [run for run in open_runs if not _settled(run, request.config, earliest, first)]
        earliest = previous_day(earliest)
        reduce_books([(run, [earliest]) for run in open_runs], request, stages)


def _carry_tails(
    runs: Sequence[CarriedRun], request: RunRequest[ClusterConfig], chain: list[date], stages: Stages
) -> None:
    """State at the start of every day of a chain, from the tails of the days before that have trades."""
    traded = {run.name: run.held("trades", chain[:-1]) for run in runs}
    unknown = [
        (run, day) for run in runs for day in traded[run.name] if (day, run.carries.get(day)) not in run.tails
    ]
    tasks = [(run.job(request, day), run.books.get(day), run.carries.get(day)) for run, day in unknown]
    made = stages.make("tail", days.tail_artefact, days.own_tail, tasks)
    for (run, day), found in zip(unknown, made, strict=True):
        run.tails[day, run.carries.get(day)] = found.raw
    for run in runs:
        own = {day: run.tails[day, run.carries.get(day)] for day in traded[run.name]}
        run.states = _chain_states(run.carries, own, chain, request.config.window)


def _chain_states(
    carries: Mapping[date, BookCarry | None],
    own: Mapping[date, np.ndarray],
    chain: Sequence[date],
    window: int,
) -> dict[date, State]:
    nothing = np.empty((len(FEATURES), 0))
    tail, states = nothing, {}
    for day in chain:
        states[day] = State(carries.get(day), tail)
        tail = features.last_columns(tail, own[day], window) if day in own else nothing
    return states


def _settled(run: CarriedRun, config: ClusterConfig, earliest: date, first: date) -> bool:
    """Whether no day before `earliest` could alter the state at the start of the range."""
    state = run.states[first]
    around = days_between(previous_day(earliest), previous_day(first))
    book_ends = len(run.held(config.book, around)) < len(around)
    trades_end = len(run.held("trades", around)) < len(around)
    book_known = book_ends or (state.book is not None and state.book.complete)
    full = state.tail.shape[1] == config.window - 1 and not np.isnan(state.tail).any()
    return book_known and (full or (trades_end and book_ends))

"""What a run would do: days, gaps, bytes, what the store has, what is left, and the memory it takes.

A plan is the run itself on what is there (see `stages`); it writes nothing.  Where the names of later
artefacts depend on earlier ones that are missing, their number is given without telling which exist.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from datetime import date
from typing import Any

from clusterlob_gpu.config import ClusterConfig, FlowConfig, RunConfig
from clusterlob_gpu.pipeline.run import Bad, Clock, Experiment, RunRequest, SymbolRun, Work, without_bad_days
from clusterlob_gpu.pipeline.stages import PlanEnds, Stages, Tally
from clusterlob_gpu.schema import US_PER_DAY
from clusterlob_gpu.store import Store
from clusterlob_gpu.workers import Workers

BYTES_PER_TRADE = {ClusterConfig: 150, FlowConfig: 50}
"""Peak memory of a task per trade of its day, as `scripts/bench_memory` measures it."""
BYTES_PER_BOOK_ROW = 200
"""The same per book row."""
BYTES_PER_BUCKET = 9_000
"""Peak memory of the task that makes a symbol's tables, per bucket or bar of the range."""
BASE_BYTES = 340 << 20
"""Memory of a worker that has done nothing but import and compile."""


@dataclass(frozen=True)
class SymbolPlan:
    """A symbol's days in the range, and what the lake holds for them."""

    symbol: str
    days: list[date]
    gaps: list[date]
    trades: int
    book_rows: int
    size: int
    """Bytes of the lake's trades and books of these days."""
    largest: tuple[date, int]
    """The day that takes most memory, and how much (bytes) one task on it takes."""
    tables: int
    """Bytes that the task takes which makes the tables of all days."""


@dataclass(frozen=True)
class StagePlan:
    """Artefacts of a stage that are there, and that are missing; `known` False where it is not told which."""

    stage: str
    there: int
    missing: int
    why: dict[str, int] = field(default_factory=dict)
    """How many are missing for which reason."""
    known: bool = True


@dataclass(frozen=True)
class Plan:
    """What a run would do."""

    experiment: str
    symbols: list[SymbolPlan]
    stages: list[StagePlan]
    base_memory: int = BASE_BYTES
    left_out: list[str] = field(default_factory=list)
    """Bad days that on_bad_day: skip leaves out."""

    @property
    def memory(self) -> int:
        """Bytes that the largest task takes, beside BASE_BYTES of its worker."""
        return max(max(symbol.largest[1], symbol.tables) for symbol in self.symbols)


def plan_run(request: RunRequest[RunConfig], experiment: Experiment[Any], workers: Workers) -> Plan:
    """The plan of a request: what the store has, and what the run would make."""
    bad: Bad = {}

    def attempt(bad: Bad) -> tuple[list[SymbolRun], dict[str, Tally]]:
        runs = experiment.check(request, bad)
        stages = Stages(workers, Store(request.artefacts), planning=True)
        with suppress(PlanEnds):
            experiment.compute(request, runs, Work(stages, Clock(), None, bad))
        return runs, stages.tallies

    runs, tallies = without_bad_days(request, attempt, bad)
    found = {
        name: StagePlan(name, tally.there, tally.missing, dict(tally.why)) for name, tally in tallies.items()
    }
    later = {
        name: StagePlan(name, 0, count, known=False)
        for name, count in experiment.expected(request, runs).items()
        if name not in found
    }
    left_out = [f"{symbol} {table} {day}" for symbol, days in bad.items() for table, day in sorted(days)]
    symbols = [_symbol_plan(run, request.config) for run in runs]
    return Plan(experiment.name, symbols, [*found.values(), *later.values()], left_out=left_out)


def _symbol_plan(run: SymbolRun, config: RunConfig) -> SymbolPlan:
    sizes = {day: (run.lake.size("trades", day), run.lake.size(config.book, day)) for day in run.wanted}
    kind = FlowConfig if isinstance(config, FlowConfig) else ClusterConfig
    memory = {
        day: trades[0] * BYTES_PER_TRADE[kind] + book[0] * BYTES_PER_BOOK_ROW
        for day, (trades, book) in sizes.items()
    }
    largest = max(memory, key=lambda day: memory[day])
    return SymbolPlan(
        symbol=run.name,
        days=run.wanted,
        gaps=run.missing,
        trades=sum(trades[0] for trades, _ in sizes.values()),
        book_rows=sum(book[0] for _, book in sizes.values()),
        size=sum(trades[1] + book[1] for trades, book in sizes.values()),
        largest=(largest, memory[largest]),
        tables=len(run.wanted) * (US_PER_DAY // _width(config)) * BYTES_PER_BUCKET,
    )


def _width(config: RunConfig) -> int:
    """Length (us) of a bucket or bar."""
    if isinstance(config, FlowConfig):
        return config.bar
    assert isinstance(config, ClusterConfig)
    return config.bucket

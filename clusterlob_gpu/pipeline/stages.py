"""Stages over the tasks of days: what is there is reused, what is not is made, and both are counted.

A plan is the same run that stops where the store has no more: what is there is taken, and the first stage
with something missing ends it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date
from functools import partial
from typing import Any, TypeVar

from clusterlob_gpu.errors import ClusterlobError, InputError, LakeError, TasksFailed
from clusterlob_gpu.store import Artefact, Made, Store
from clusterlob_gpu.workers import Workers

Item = TypeVar("Item")
Result = TypeVar("Result")
Partition = tuple[str, date]
"""A table and a day."""


class PlanEnds(Exception):  # noqa: N818 - not an error: a plan has found what is still to be done
    """What follows depends on artefacts that are not there."""


class BadDaysError(ClusterlobError):
    """Days that cannot be read or computed: by symbol and (table, day), what is wrong with them."""

    def __init__(self, days: dict[str, dict[Partition, ClusterlobError]]) -> None:
        self.days = days
        errors = [error for found in days.values() for error in found.values()]
        self.exit_code = 2 if all(isinstance(error, InputError) for error in errors) else 1
        rest = [f"{symbol} {day}" for symbol, found in days.items() for _, day in found][1:]
        more = f" (bad as well: {', '.join(rest)})" if rest else ""
        super().__init__(f"{errors[0]}{more}")


@dataclass
class Tally:
    """Artefacts of one stage: there already, made, why, and their bytes; in a plan, still to be made."""

    there: int = 0
    made: int = 0
    missing: int = 0
    size: int = 0
    why: Counter[str] = field(default_factory=Counter)

    def as_record(self) -> dict[str, Any]:
        """Plain values for run.json."""
        return {"there": self.there, "made": self.made, "bytes": self.size, "why": dict(self.why)}


class Stages:
    """Runs the stages of a run on its workers."""

    def __init__(self, workers: Workers, store: Store, *, planning: bool = False) -> None:
        self.workers, self.store, self.planning = workers, store, planning
        self.tallies: dict[str, Tally] = {}
        self._counted: set[str] = set()

    def map(self, stage: str, function: Callable[[Item], Result], tasks: Sequence[Item]) -> list[Result]:
        """Results of tasks that leave no artefact, in order."""
        return self.workers.map(stage, function, tasks, _home) if tasks else []

    def make(
        self,
        stage: str,
        name: Callable[[Item], Artefact | Sequence[Artefact] | None],
        function: Callable[[Item], Result],
        tasks: Sequence[Item],
        table: str = "trades",
    ) -> list[Result]:
        """Results of tasks that leave the artefacts that `name` tells, in order.

        A task that fails by the fault of its day does not keep the others from being done; then BadDaysError
        is raised, which blames `table` where the error itself names none.  A plan raises PlanEnds instead
        of making anything.
        """
        tally = self.tallies.setdefault(stage, Tally())
        if self.planning:
            self._count_missing(tally, stage, name, tasks)
        with blaming(tasks, table):
            results = self.map(stage, function, tasks)
        for result in results:
            held: list[Any] = result if isinstance(result, list) else [result]
            for one in held:
                self.count(stage, one.made)
        return results

    def _count_missing(
        self,
        tally: Tally,
        stage: str,
        name: Callable[[Item], Artefact | Sequence[Artefact] | None],
        tasks: Sequence[Item],
    ) -> None:
        found = self.map(f"{stage} there", partial(_absences, self.store, name), tasks)
        wanted = {address: why for one in found for address, why in one.items()}
        if not any(why is not None for why in wanted.values()):
            return
        for address, why in wanted.items():
            self._count_wanted(tally, address, why)
        raise PlanEnds

    def _count_wanted(self, tally: Tally, address: str, why: str | None) -> None:
        if address in self._counted:
            return
        self._counted.add(address)
        if why is None:
            tally.there += 1
        else:
            tally.missing += 1
            tally.why[why] += 1

    def find(self, stage: str, artefact: Artefact) -> Made | None:
        """An artefact that the caller makes itself, if it is there; a plan counts what is not."""
        found = self.store.find(artefact, verify=not self.planning)
        if found is not None:
            self.count(stage, found)
        elif self.planning:
            tally = self.tallies.setdefault(stage, Tally())
            self._count_wanted(tally, artefact.address, self.store.why(artefact))
        return found

    def end_of_plan(self) -> None:
        """Nothing is left to be made: here a plan ends."""
        if self.planning:
            raise PlanEnds

    def count(self, stage: str, made: Made | None) -> None:
        """Note an artefact that was there, or was made; once, however often it is asked for."""
        if made is None or made.address in self._counted:
            return
        self._counted.add(made.address)
        tally = self.tallies.setdefault(stage, Tally())
        tally.size += made.size
        if made.why is None:
            tally.there += 1
        else:
            tally.made += 1
            tally.why[made.why] += 1


def _absences(store: Store, name: Callable[[Any], Any], task: Any) -> dict[str, str | None]:
    """Why each artefact of a task has to be made, by address; None for one that is there."""
    named = name(task)
    artefacts = [] if named is None else [named] if isinstance(named, Artefact) else named
    return {one.address: store.why(one) if store.find(one) is None else None for one in artefacts}


@contextmanager
def blaming(tasks: Sequence[Any], table: str) -> Iterator[None]:
    """Turn the failures of tasks into the days that are to blame."""
    try:
        yield
    except TasksFailed as failure:
        days: dict[str, dict[Partition, ClusterlobError]] = {}
        for number, error in failure.failed.items():
            job = _job(tasks[number])
            if not hasattr(job, "lake"):
                raise
            partition = (getattr(error, "table", table), getattr(error, "day", job.day))
            days.setdefault(job.lake.symbol.name, {})[partition] = _about(job, error)
        raise BadDaysError(days) from None


def _job(task: Any) -> Any:
    """The job of a task: itself, its first entry, or its field."""
    if isinstance(task, tuple):
        return task[0]
    return getattr(task, "job", task)


def _home(task: Any) -> str | None:
    """The day of a task whose trades stay in a worker's memory, so that its next task finds them there."""
    while isinstance(task, (tuple, list)):
        task = task[0]
    job = getattr(task, "job", task)
    at_home = getattr(job, "backend", "cpu") == "gpu"
    return f"{job.symbol_folder} {job.day}" if at_home else None


def _about(job: Any, error: Exception) -> ClusterlobError:
    if isinstance(error, LakeError):
        return error
    return ClusterlobError(f"{job.lake.symbol.name} {job.day}: {error}")


@contextmanager
def blaming_lake(symbol: str) -> Iterator[None]:
    """Turn an error that names a partition of the lake into the bad day that it is."""
    try:
        yield
    except LakeError as error:
        table, day = getattr(error, "table", None), getattr(error, "day", None)
        if table is None or day is None:
            raise
        raise BadDaysError({symbol: {(table, day): error}}) from None

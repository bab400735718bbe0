"""Cores of this process, and those of them that have nothing to do, where its tasks run in threads.

At the end of a stage, and where there are few days, a task may use those that the others leave.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import wraps
from pathlib import Path
from threading import Lock
from typing import ParamSpec, TypeVar, cast

Arguments = ParamSpec("Arguments")
Item = TypeVar("Item")
Result = TypeVar("Result")

_CGROUP = Path("/sys/fs/cgroup")
_lock = Lock()
_free = 0


def available() -> int:
    """Cores that this process may use: of its machine, its affinity, and the quota of its container."""
    affine = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(affine, _quota()))


def _quota() -> int:
    """Cores' time that the container has, a part of one counting as one; many where there is no bound."""
    for names in (["cpu.max"], ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"]):  # version 2 and 1
        with suppress(OSError, ValueError):  # other systems; "max"
            quota, period = (int(word) for name in names for word in (_CGROUP / name).read_text().split())
            if quota > 0:
                return -(-quota // period)
    return sys.maxsize


def _add(cores: int) -> None:
    global _free
    with _lock:
        _free += cores


@contextmanager
def shared(cores: int) -> Iterator[None]:
    """Tasks of this process may use so many cores during the block."""
    _add(cores)
    try:
        yield
    finally:
        _add(-cores)


def taking_one(task: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """The same task, which has a core while it runs."""

    @wraps(task)
    def run(*args: Arguments.args, **options: Arguments.kwargs) -> Result:
        _add(-1)
        try:
            return task(*args, **options)
        finally:
            _add(1)

    return run


@contextmanager
def spare(most: int) -> Iterator[int]:
    """How many further cores, `most` at most, the task has during the block."""
    global _free
    with _lock:
        taken = max(0, min(most, _free))
        _free -= taken
    try:
        yield taken
    finally:
        _add(taken)


def ahead(items: Iterable[Item]) -> Iterator[Item]:
    """The items; while one is used the next is made, if there is a core to spare."""
    source, none = iter(items), object()
    with ThreadPoolExecutor(1) as other:  # its thread begins when it is first needed
        item = next(source, none)
        while item is not none:
            with spare(1) as more:
                making = other.submit(next, source, none) if more else None
                yield cast("Item", item)
                item = making.result() if making else next(source, none)
